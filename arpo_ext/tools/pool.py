"""Runs tool calls beside the sampler: concurrency per tool, an enforced timeout, retries, equal calls only once.

What it leaves out: rate limits.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING

from arpo_ext.errors import ToolError, TransientToolError
from arpo_ext.types import ToolCall, ToolResult

if TYPE_CHECKING:
    from arpo_ext.tools.base import Tool
    from arpo_ext.tools.cache import AnswerCache
    from arpo_ext.tools.records import CallRecords

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ToolStats:
    """Counts since the pool started.

    calls: calls submitted. cached: of those, answered by an equal call that had run or was running, or by the cache on
    disk. failures: runs that gave `ok=False`. retries: attempts after the first. seconds: wall-clock of all runs, added
    up.
    """

    calls: int = 0
    failures: int = 0
    cached: int = 0
    retries: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Retry:
    """What follows a `TransientToolError`: up to `attempts` more runs, `delay_s` apart, doubling each time.

    All of them share the call's one timeout. Nothing else is run again: a program that prints nothing or fails has
    given its answer.
    """

    attempts: int = 2
    delay_s: float = 0.5


class ToolPool:
    """The started tools of one collection of rollouts; a context manager.

    Equal calls (same name, same text) run once while the pool is open: those that arrive while the first one runs
    share its answer, later ones get it from memory with `cached=True`. A failure is shared by those waiting for it
    and then forgotten, so that a passing fault is not kept.

    Every answer comes as a `ToolResult`. What the tool itself raises is its defect: it is logged with its traceback
    and becomes an answer with `ok=False`, here and nowhere else.

    cache: keeps good answers of tools that have an `identity` beyond the pool. records: gets every call. The pool
    closes both.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        *,
        retry: Retry = Retry(),
        cache: AnswerCache | None = None,
        records: CallRecords | None = None,
    ) -> None:
        self.names = tuple(tool.name for tool in tools)
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"got tools named {', '.join(self.names)}; expected every name once")
        self._tools = {tool.name: tool for tool in tools}
        self._retry = retry
        self._cache = cache
        self._records = records
        self._lanes: dict[str, _Lane] = {}
        self._lock = threading.Lock()
        self._shared: dict[ToolCall, Future[ToolResult]] = {}
        self._stats = {name: ToolStats() for name in self.names}

    def __enter__(self) -> ToolPool:
        with contextlib.ExitStack() as undo:
            self._close_later(undo)
            for tool in self._tools.values():
                tool.start()
            undo.pop_all()
        self._lanes = {name: _Lane(tool, self._retry, self._cache) for name, tool in self._tools.items()}
        return self

    def _close_later(self, stack: contextlib.ExitStack) -> None:
        for part in (self._cache, self._records, *self._tools.values()):
            if part is not None:
                stack.callback(part.close)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Answer what still waits with `ok=False` and close the tools. Returns although a tool may be stuck."""
        lanes, self._lanes = self._lanes, {}
        for lane in lanes.values():
            lane.close()
        with contextlib.ExitStack() as closing:
            self._close_later(closing)

    @property
    def stats(self) -> dict[str, ToolStats]:
        """A snapshot per tool."""
        with self._lock:
            return dict(self._stats)

    def submit(self, call: ToolCall) -> Future[ToolResult]:
        """Start `call`, or join an equal one. The future always gets a result, never an exception.

        ToolError if the pool is not open.
        """
        if not self._lanes and self._tools:
            raise ToolError("the tool pool is not open; expected calls between its __enter__ and __exit__")
        answer = _started_future()
        lane = self._lanes.get(call.name)
        if lane is None:
            known = ", ".join(self.names) or "none"
            answer.set_result(ToolResult(call.name, f"there is no tool named {call.name!r}; tools: {known}", ok=False))
            return answer
        with self._lock:
            self._count(call.name, calls=1)
            first = self._shared.get(call)
            if first is None:
                self._shared[call] = answer
            else:
                self._count(call.name, cached=1)
        if first is None:
            run = _Run(call, answer)
            answer.add_done_callback(lambda done: self._finished(run, done.result()))
            lane.put(run)
        else:
            first.add_done_callback(lambda done: self._share(call, answer, done.result()))
        return answer

    def wait(self, futures: Iterable[Future[ToolResult]], timeout_s: float | None = None) -> None:
        """Return once one of the futures has its result, or after `timeout_s`."""
        wait(set(futures), timeout=timeout_s, return_when=FIRST_COMPLETED)

    def _finished(self, run: _Run, result: ToolResult) -> None:
        with self._lock:
            self._count(
                run.call.name,
                failures=int(not result.ok),
                cached=int(result.cached),
                retries=max(run.attempts - 1, 0),
                seconds=result.seconds,
            )
            if not result.ok:
                del self._shared[run.call]
        if self._records is not None:
            self._records.add(run.call, result, attempts=run.attempts)

    def _share(self, call: ToolCall, answer: Future[ToolResult], result: ToolResult) -> None:
        shared = replace(result, seconds=0.0, cached=True)
        answer.set_result(shared)
        if self._records is not None:
            self._records.add(call, shared, attempts=0)

    def _count(self, name: str, **more: float) -> None:
        old = self._stats[name]
        self._stats[name] = replace(old, **{field: getattr(old, field) + value for field, value in more.items()})


class _Lane:
    """The calls of one tool: a queue and `tool.workers` daemon threads.

    A thread cannot be stopped. When a run passes its timeout its call is answered at once, a fresh thread takes the
    place of the stuck one, and the stuck one ends whenever its run returns.
    """

    def __init__(self, tool: Tool, retry: Retry, cache: AnswerCache | None) -> None:
        self._tool = tool
        self._retry = retry
        # Without an identity nobody knows what else an answer depends on, so it is not kept.
        self._identity: str | None = getattr(tool, "identity", None)
        self._cache = cache if self._identity is not None else None
        self._waiting: queue.SimpleQueue[_Run | None] = queue.SimpleQueue()
        self._running: set[_Run] = set()
        self._lock = threading.Lock()
        self._closed = False
        for _ in range(tool.workers):
            self._add_worker()

    def put(self, run: _Run) -> None:
        with self._lock:
            if not self._closed:
                self._waiting.put(run)
                return
        run.answer.set_result(self._failure("the tool pool was closed before the call ran"))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            running = list(self._running)
            unstarted = []
            with contextlib.suppress(queue.Empty):
                while True:
                    unstarted.append(self._waiting.get_nowait())
            for _ in range(self._tool.workers):
                self._waiting.put(None)
        for run in filter(None, unstarted):
            run.answer.set_result(self._failure("the tool pool was closed before the call ran"))
        for run in running:
            self._settle(run, self._failure("the tool pool was closed while the call ran", run.seconds))

    def _add_worker(self) -> None:
        threading.Thread(target=self._work, name=f"tool-{self._tool.name}", daemon=True).start()

    def _work(self) -> None:
        while (run := self._waiting.get()) is not None:
            run.start()
            with self._lock:
                self._running.add(run)
            timer = threading.Timer(self._tool.timeout_s, self._expire, (run,))
            timer.daemon = True
            timer.start()
            result = self._answer(run)
            timer.cancel()
            if not self._settle(run, result):
                return

    def _answer(self, run: _Run) -> ToolResult:
        kept = None if self._cache is None else self._cache.get(self._identity, run.call)
        if kept is not None:
            return replace(kept, seconds=run.seconds)
        result = self._run(run)
        if self._cache is not None:
            self._cache.put(self._identity, run.call, result)
        return result

    def _run(self, run: _Run) -> ToolResult:
        delay_s = self._retry.delay_s
        while True:
            run.attempts += 1
            try:
                # Inside: a tool that returns something else than a ToolResult is as broken as one that raises.
                return replace(self._tool.run(run.call.text), seconds=run.seconds)
            except TransientToolError as error:
                # A run whose call was answered meanwhile (timeout, closed pool) stops here.
                if run.attempts > self._retry.attempts or run.settled.wait(delay_s):
                    text = f"the {self._tool.name} tool failed {run.attempts} times, last: {error}"
                    return self._failure(text, run.seconds)
                delay_s *= 2
            except Exception as error:  # noqa: BLE001 - the one place where a tool's defect becomes an answer
                _log.exception("the %s tool raised on the call %r", self._tool.name, run.call.text[:200])
                return self._failure(f"the {self._tool.name} tool failed: {type(error).__name__}: {error}", run.seconds)

    def _expire(self, run: _Run) -> None:
        text = f"the {self._tool.name} tool did not answer within {self._tool.timeout_s:g} s"
        if self._settle(run, self._failure(text, run.seconds)):
            self._add_worker()

    def _settle(self, run: _Run, result: ToolResult) -> bool:
        """Answer `run` unless that has happened already; tells whether it did."""
        with self._lock:
            if run not in self._running:
                return False
            self._running.remove(run)
        run.settled.set()
        run.answer.set_result(result)
        return True

    def _failure(self, text: str, seconds: float = 0.0) -> ToolResult:
        return ToolResult(self._tool.name, text, ok=False, seconds=seconds)


class _Run:
    """One call on its way through a lane."""

    def __init__(self, call: ToolCall, answer: Future[ToolResult]) -> None:
        self.call = call
        self.answer = answer
        self.attempts = 0
        self.settled = threading.Event()
        self._start: float | None = None

    def start(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return 0.0 if self._start is None else time.monotonic() - self._start


def _started_future() -> Future[ToolResult]:
    """A future that can no longer be cancelled: others may wait for the same answer."""
    future: Future[ToolResult] = Future()
    future.set_running_or_notify_cancel()
    return future
