"""Answers kept on disk between runs and shared by processes, in SQLite through the diskcache library.

A cache makes runs cheaper, never worse: a disk that is full or read-only, or another process that holds the database
too long, costs the answer's place in the cache and one warning.

What it leaves out: expiry by age. Delete the folder to start anew.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from pathlib import Path

from arpo_ext.errors import ToolError
from arpo_ext.types import ToolCall, ToolResult

_log = logging.getLogger(__name__)


class AnswerCache:
    """What tools answered, by tool, the tool's `identity` (what else its answers depend on) and the call's text.

    Only good answers are kept: a failure may pass. `size_mb` bounds the folder; the answers least recently stored go
    first. Usable from several threads and processes at the same time. ToolError if the folder cannot be opened.
    """

    def __init__(self, folder: Path, *, size_mb: int = 1024) -> None:
        try:
            import diskcache
        except ImportError:
            raise ToolError("the tool cache needs the diskcache library: pip install 'arpo-ext[search]'") from None
        self._faults = (OSError, sqlite3.Error, diskcache.Timeout)
        try:
            # Keys and values are JSON strings, which diskcache stores as they are: nothing is ever unpickled, and any
            # text fits, also one that UTF-8 cannot hold.
            self._store = diskcache.Cache(str(folder), size_limit=size_mb << 20, timeout=5)
        except self._faults as error:
            raise ToolError(f"the tool cache {folder} cannot be opened ({error}); expected a writable folder") from None
        self._folder = folder
        self._warned = False

    def get(self, identity: str, call: ToolCall) -> ToolResult | None:
        """The kept answer with `cached=True`, or None."""
        try:
            kept = self._store.get(_key(identity, call))
            text = None if kept is None else json.loads(kept)
            if text is not None and not isinstance(text, str):
                raise ValueError(f"got {text!r:.60}; expected a text")
        except (*self._faults, ValueError, TypeError) as error:  # the latter two: what was kept is damaged
            self._warn("read", error)
            return None
        return None if text is None else ToolResult(call.name, text, ok=True, cached=True)

    def put(self, identity: str, call: ToolCall, result: ToolResult) -> None:
        if not result.ok:
            return
        try:
            self._store.set(_key(identity, call), json.dumps(result.text))
        except self._faults as error:
            self._warn("written", error)

    def close(self) -> None:
        self._store.close()

    def _warn(self, what: str, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(
                "the tool cache %s cannot be %s (%s: %s); the run goes on without", self._folder, what, *_named(error)
            )


def _named(error: Exception) -> tuple[str, Exception]:
    return type(error).__name__, error


def _key(identity: str, call: ToolCall) -> str:
    return json.dumps([call.name, identity, call.text, *call.history])
