"""The calls of one tool on their way through its threads: timeouts, retries, defects that become answers."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from arpo_ext.errors import TransientToolError
from arpo_ext.types import ToolCall, ToolResult

if TYPE_CHECKING:
    from arpo_ext.tools.base import Tool
    from arpo_ext.tools.cache import AnswerCache

_log = logging.getLogger(__name__)

# How soon a thread that the system refused is asked for again.
_RETRY_THREAD_S = 1.0
# From here on, at every power of two, the log says how many threads are stuck.
_MANY_STUCK = 64


@dataclass(frozen=True, slots=True)
class Retry:
    """What follows a `TransientToolError`: up to `attempts` more runs, `delay_s` apart, doubling each time.

    All of them share the call's one timeout. Nothing else is run again: a program that prints nothing or fails has
    given its answer.
    """

    attempts: int = 2
    delay_s: float = 0.5


def is_stateful(tool: Tool) -> bool:
    """Whether the tool's answers depend on the earlier calls of a path."""
    return bool(getattr(tool, "stateful", False))


class Run:
    """One call that is to be run once, and who waits for its answer."""

    def __init__(self, call: ToolCall) -> None:
        self.call = call
        self.waiters: list[Future[ToolResult]] = []
        self.attempts = 0
        # Set once the run has its answer or nobody wants it any more.
        self.settled = threading.Event()
        self._start: float | None = None

    def start(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return 0.0 if self._start is None else time.monotonic() - self._start


class Lane:
    """The calls of one tool: a queue and `tool.workers` daemon threads.

    A thread cannot be stopped. When a run passes its timeout or is dropped, a fresh thread takes the place of the stuck
    one, which ends whenever its run returns; a tool with a method `abandon(*arguments of run)` is asked to end it.

    answered: called once for every run that was not dropped, from any thread.
    """

    def __init__(
        self, tool: Tool, retry: Retry, cache: AnswerCache | None, answered: Callable[[Run, ToolResult], None]
    ) -> None:
        self._tool = tool
        self._retry = retry
        # Without an identity nobody knows what else an answer depends on, so it is not kept.
        self._identity: str | None = getattr(tool, "identity", None)
        self._cache = cache if self._identity is not None else None
        self._answered = answered
        self._waiting: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        # In the order of their starts, which is that of their deadlines.
        self._running: dict[Run, None] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._threads_due = 0
        self._given_up: set[Run] = set()
        for _ in range(tool.workers):
            self._thread(self._work)
        self._thread(self._watch)

    def put(self, run: Run) -> None:
        with self._changed:
            if not self._closed:
                self._waiting.put(run)
                return
        self._answered(run, self._failure("the tool pool was closed before the call ran"))

    def drop(self, run: Run) -> None:
        """Nobody waits for `run` any more: leave it out, or give its thread up."""
        with self._changed:
            run.settled.set()
            was_running = self._forget(run)
        if was_running:
            self._abandon(run)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            running = list(self._running)
            unstarted = []
            with contextlib.suppress(queue.Empty):
                while True:
                    unstarted.append(self._waiting.get_nowait())
            for _ in range(self._tool.workers):
                self._waiting.put(None)
            self._changed.notify_all()
        for run in unstarted:
            if run is not None and not run.settled.is_set():
                run.settled.set()
                self._answered(run, self._failure("the tool pool was closed before the call ran"))
        for run in running:
            self._settle(run, self._failure("the tool pool was closed while the call ran", run.seconds))

    def _thread(self, target: Callable[[], None]) -> None:
        threading.Thread(target=target, name=f"tool-{self._tool.name}", daemon=True).start()

    def _work(self) -> None:
        while (run := self._waiting.get()) is not None:
            with self._changed:
                if run.settled.is_set():
                    continue
                run.start()
                self._running[run] = None
                self._changed.notify_all()
            if not self._settle(run, self._answer(run)):
                return

    def _watch(self) -> None:
        """End runs at their deadline and replace the threads that are given up."""
        while True:
            with self._changed:
                if self._closed:
                    return
                oldest = next(iter(self._running), None)
                rest = None if oldest is None else self._tool.timeout_s - oldest.seconds
                if not self._threads_due and (rest is None or rest > 0):
                    self._changed.wait(rest)
                    continue
                due, self._threads_due = self._threads_due, 0
            if rest is not None and rest <= 0:
                text = f"the {self._tool.name} tool did not answer within {self._tool.timeout_s:g} s"
                self._settle(oldest, self._failure(text, oldest.seconds), abandon=True)
            for _ in range(due):
                self._replace_thread()

    def _replace_thread(self) -> None:
        try:
            self._thread(self._work)
        except RuntimeError as error:
            _log.error("the %s tool gets no thread (%s); trying again", self._tool.name, error)
            with self._changed:
                self._changed.wait(_RETRY_THREAD_S)
                self._threads_due += 1

    def _answer(self, run: Run) -> ToolResult:
        kept = None if self._cache is None else self._cache.get(self._identity, run.call)
        if kept is not None:
            return replace(kept, seconds=run.seconds)
        result = self._run(run)
        if self._cache is not None:
            self._cache.put(self._identity, run.call, result)
        return result

    def _run(self, run: Run) -> ToolResult:
        delay_s = self._retry.delay_s
        while True:
            run.attempts += 1
            try:
                return self._checked(self._tool.run(*self._arguments(run)), run.seconds)
            except TransientToolError as error:
                # A run whose call was answered meanwhile (timeout, closed pool) stops here.
                if run.attempts > self._retry.attempts or run.settled.wait(delay_s):
                    text = f"the {self._tool.name} tool failed {run.attempts} times, last: {error}"
                    return self._failure(text, run.seconds)
                delay_s *= 2
            except BaseException as error:  # noqa: BLE001 - the one place where a tool's defect becomes an answer
                _log.exception("the %s tool raised on the call %r", self._tool.name, run.call.text[:200])
                return self._failure(f"the {self._tool.name} tool failed: {type(error).__name__}: {error}", run.seconds)

    def _arguments(self, run: Run) -> tuple[Any, ...]:
        return (run.call.text, run.call.history) if is_stateful(self._tool) else (run.call.text,)

    def _checked(self, result: ToolResult, seconds: float) -> ToolResult:
        """The result as the collector can use it; TypeError for what is none."""
        if not isinstance(result, ToolResult) or not isinstance(result.text, str):
            raise TypeError(f"got {result!r:.200}; expected a ToolResult with a text")
        # Half of a surrogate pair (a service may send one as a JSON escape) would stop every tokenizer.
        text = result.text.encode("utf-8", "replace").decode("utf-8")
        return replace(result, name=self._tool.name, text=text, ok=bool(result.ok), seconds=seconds)

    def _settle(self, run: Run, result: ToolResult, *, abandon: bool = False) -> bool:
        """Answer `run` unless that has happened already or it was dropped; tells whether it did."""
        with self._changed:
            if run not in self._running:
                if not abandon:
                    self._given_up.discard(run)
                return False
            if abandon:
                self._forget(run)
            else:
                del self._running[run]
            run.settled.set()
        if abandon:
            self._abandon(run)
        self._answered(run, result)
        return True

    def _forget(self, run: Run) -> bool:
        """Give the run's thread up, if it has one; the watch makes another. The lock is held."""
        if run not in self._running:
            return False
        del self._running[run]
        self._threads_due += 1
        self._given_up.add(run)
        stuck = len(self._given_up)
        if stuck >= _MANY_STUCK and stuck & (stuck - 1) == 0:
            _log.warning("%d calls of the %s tool still run after they were given up", stuck, self._tool.name)
        self._changed.notify_all()
        return True

    def _abandon(self, run: Run) -> None:
        abandon = getattr(self._tool, "abandon", None)
        if abandon is None:
            return
        try:
            abandon(*self._arguments(run))
        except Exception:  # noqa: BLE001 - a tool's defect must not stop the watch
            _log.exception("the %s tool raised when a call was given up", self._tool.name)

    def _failure(self, text: str, seconds: float = 0.0) -> ToolResult:
        return ToolResult(self._tool.name, text, ok=False, seconds=seconds)
