"""The tool protocol and the tools a configuration asks for."""

from __future__ import annotations

from typing import Protocol

from arpo_ext.config import ToolsConfig
from arpo_ext.tools.browser import BrowserTool
from arpo_ext.tools.cache import AnswerCache
from arpo_ext.tools.pool import Retry, ToolPool
from arpo_ext.tools.python_sandbox import PythonTool
from arpo_ext.tools.records import CallRecords, ReplayTool, read_records
from arpo_ext.tools.search import SearchTool
from arpo_ext.types import ToolResult


class Tool(Protocol):
    """Something the model can call by writing `<name>text</name>`.

    name: the tag, and the name its results carry.
    timeout_s: seconds of wall-clock after which the pool gives up on one call. A tool with a limit of its own
        announces a little more than that, so that its own, better worded answer comes first.
    workers: how many calls may run at the same time.

    A tool whose answers depend on the call and its settings alone may have an `identity: str`, a text that differs
    whenever those settings do: its good answers are then kept in the cache on disk, if there is one.
    """

    name: str
    timeout_s: float
    workers: int

    def start(self) -> None:
        """Get ready. ToolError if it cannot work here (no corpus, no sandbox mechanism)."""

    def run(self, text: str) -> ToolResult:
        """Answer one call; blocking, thread-safe, never raises for what the model wrote.

        TransientToolError for a fault of the world that may pass: the pool runs the call again.
        """

    def close(self) -> None:
        """Give back what `start` took; safe to call twice and without a start."""


_TOOLS = {"python": PythonTool, "search": SearchTool, "browser": BrowserTool}


def build_tools(config: ToolsConfig) -> list[Tool]:
    """The configured tools, not started, in the order of the configuration's fields.

    With `replay`, each is replaced by a tool of the same name that answers from those records alone.
    """
    sections = {name: getattr(config, name) for name in config.names}
    if config.replay is None:
        return [_TOOLS[name](section) for name, section in sections.items()]
    answers = read_records(config.replay)
    return [
        ReplayTool(name, answers.get(name, {}), workers=section.workers, wait=config.replay_wait)
        for name, section in sections.items()
    ]


def open_pool(config: ToolsConfig) -> ToolPool:
    """The pool a configuration asks for: its tools, retries, cache and records. Enter it to start the tools."""
    return ToolPool(
        build_tools(config),
        retry=Retry(config.retries, config.retry_delay_s),
        cache=None if config.cache is None else AnswerCache(config.cache, size_mb=config.cache_mb),
        records=None if config.records is None else CallRecords(config.records),
    )
