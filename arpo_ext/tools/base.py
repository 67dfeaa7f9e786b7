"""The tool protocol and the tools a configuration asks for."""

from __future__ import annotations

import importlib
from typing import Protocol

from arpo_ext.config import CustomToolConfig, ToolsConfig
from arpo_ext.errors import ToolError
from arpo_ext.tools.browser import BrowserTool
from arpo_ext.tools.cache import AnswerCache
from arpo_ext.tools.lane import Retry
from arpo_ext.tools.mcp_client import McpTool
from arpo_ext.tools.pool import ToolPool
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
    whenever those settings do: its good answers are then kept in the cache on disk, if there is one. A tool whose runs
    can be ended early may have a method `abandon(text)`, called when nobody waits for `run(text)` any more; it returns
    at once. A tool that keeps state along a path has `stateful = True` and takes `run(text, history)`, see `ToolCall`.
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
    """The configured tools, not started, in the order of `config.names`.

    With `replay`, each is replaced by a tool of the same name that answers from those records alone.
    """
    if config.replay is None:
        return [_build(name, config) for name in config.names]
    answers = read_records(config.replay)
    return [
        ReplayTool(name, answers.get(name, {}), workers=section.workers, wait=config.replay_wait)
        for name, section in config.sections.items()
    ]


def _build(name: str, config: ToolsConfig) -> Tool:
    if name in config.mcp:
        return McpTool(name, config.mcp[name])
    if name in config.custom:
        return _load(name, config.custom[name])
    return _TOOLS[name](getattr(config, name))


def _load(name: str, config: CustomToolConfig) -> Tool:
    """`Class(name, **options)`, checked against the protocol. ToolError names what is wrong with it."""
    module_name, _, class_name = config.path.partition(":")
    where = f"tools.custom.{name}.path {config.path!r}"
    try:
        made = getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        raise ToolError(f"{where} cannot be imported ({error}); expected package.module:Class") from error
    except AttributeError:
        raise ToolError(
            f"{where} names no class {class_name!r} of {module_name}; expected package.module:Class"
        ) from None
    try:
        tool = made(name, **config.options)
    except TypeError as error:
        raise ToolError(f"{where} cannot be made from its options ({error})") from error
    missing = [
        member for member in ("name", "timeout_s", "workers", "start", "run", "close") if not hasattr(tool, member)
    ]
    if missing:
        raise ToolError(f"{where} lacks {', '.join(missing)}; expected what arpo_ext.tools.Tool lists")
    if tool.name != name:
        raise ToolError(f"{where} calls itself {tool.name!r}; expected {name!r}, its key")
    return tool


def open_pool(config: ToolsConfig) -> ToolPool:
    """The pool a configuration asks for: its tools, retries, cache and records. Enter it to start the tools."""
    return ToolPool(
        build_tools(config),
        retry=Retry(config.retries, config.retry_delay_s),
        cache=None if config.cache is None else AnswerCache(config.cache, size_mb=config.cache_mb),
        records=None if config.records is None else CallRecords(config.records),
    )
