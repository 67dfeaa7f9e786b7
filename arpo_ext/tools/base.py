"""The tool protocol and the tools a configuration asks for."""

from __future__ import annotations

from typing import Protocol

from arpo_ext.config import ToolsConfig
from arpo_ext.tools.python_sandbox import PythonTool
from arpo_ext.tools.search import SearchTool
from arpo_ext.types import ToolResult


class Tool(Protocol):
    """Something the model can call by writing `<name>text</name>`.

    name: the tag, and the name its results carry.
    timeout_s: seconds of wall-clock after which the pool gives up on one call. A tool with a limit of its own
        announces a little more than that, so that its own, better worded answer comes first.
    workers: how many calls may run at the same time.
    """

    name: str
    timeout_s: float
    workers: int

    def start(self) -> None:
        """Get ready. ToolError if it cannot work here (no corpus, no sandbox mechanism)."""

    def run(self, text: str) -> ToolResult:
        """Answer one call; blocking, thread-safe, never raises for what the model wrote."""

    def close(self) -> None:
        """Give back what `start` took; safe to call twice and without a start."""


_TOOLS = {"python": PythonTool, "search": SearchTool}


def build_tools(config: ToolsConfig) -> list[Tool]:
    """The configured tools, not started, in the order of the configuration's fields."""
    return [_TOOLS[name](getattr(config, name)) for name in config.names]
