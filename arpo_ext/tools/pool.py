"""Runs tool calls beside the sampler: concurrency per tool, an enforced timeout, retries, equal calls only once.

What it leaves out: rate limits.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING

from arpo_ext.errors import ToolError
from arpo_ext.tools.lane import Lane, Retry, Run, is_stateful
from arpo_ext.types import ToolCall, ToolResult

if TYPE_CHECKING:
    from arpo_ext.tools.base import Tool
    from arpo_ext.tools.cache import AnswerCache
    from arpo_ext.tools.records import CallRecords

# Answers kept in memory while the pool is open, in characters; the least recently used go first.
_KEPT_CHARS = 1 << 27
_RETRY = Retry()


@dataclass(frozen=True, slots=True)
class ToolStats:
    """Counts since the pool started.

    calls: calls submitted. cached: of those, answered by an equal call that had run or was running, or by the cache on
    disk. cancelled: of those, given up by who had submitted them. failures: runs that gave `ok=False`. retries:
    attempts after the first. seconds: wall-clock of all runs, added up.
    """

    calls: int = 0
    failures: int = 0
    cached: int = 0
    retries: int = 0
    cancelled: int = 0
    seconds: float = 0.0


class ToolPool:
    """The started tools of one collection of rollouts; a context manager.

    Equal calls (same name, text and, for a tool that keeps state, history) run once while the pool is open: those that
    arrive while the first one runs share its answer, later ones get it from memory with `cached=True`. A failure is
    shared by those waiting for it and then forgotten, so that a passing fault is not kept.

    Every answer comes as a `ToolResult`. What the tool itself raises is its defect: it is logged with its traceback
    and becomes an answer with `ok=False`, here and nowhere else.

    cache: keeps good answers of tools that have an `identity` beyond the pool. records: gets every call that was
    answered. The pool closes both.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        *,
        retry: Retry = _RETRY,
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
        self._lanes: dict[str, Lane] = {}
        self._lock = threading.Lock()
        # Of calls: those that are on their way, and good answers, the most recently used last.
        self._runs: dict[ToolCall, Run] = {}
        self._answers: OrderedDict[ToolCall, ToolResult] = OrderedDict()
        self._answer_chars = 0
        self._waiting: dict[Future[ToolResult], Run] = {}
        self._stats = {name: ToolStats() for name in self.names}

    def __enter__(self) -> ToolPool:
        with contextlib.ExitStack() as undo:
            self._close_later(undo)
            for tool in self._tools.values():
                tool.start()
            undo.pop_all()
        self._lanes = {name: Lane(tool, self._retry, self._cache, self._finished) for name, tool in self._tools.items()}
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
        """Start `call`, or join an equal one. The future always gets a result, never an exception; its `cancel` is
        this pool's.

        ToolError if the pool is not open.
        """
        lanes = self._lanes
        if not lanes and self._tools:
            raise ToolError("the tool pool is not open; expected calls between its __enter__ and __exit__")
        answer = _Answer(self)
        lane = lanes.get(call.name)
        if lane is None:
            known = ", ".join(self.names) or "none"
            answer.set_result(ToolResult(call.name, f"there is no tool named {call.name!r}; tools: {known}", ok=False))
            return answer
        if call.history and not is_stateful(self._tools[call.name]):
            call = replace(call, history=())
        with self._lock:
            self._count(call.name, calls=1)
            kept = self._answers.get(call)
            if kept is not None:
                self._answers.move_to_end(call)
                self._count(call.name, cached=1)
            else:
                run = self._runs.get(call)
                is_new = run is None
                if is_new:
                    run = self._runs[call] = Run(call)
                run.waiters.append(answer)
                self._waiting[answer] = run
        if kept is not None:
            self._share(call, kept, [answer])
        elif is_new:
            lane.put(run)
        return answer

    def cancel(self, future: Future[ToolResult]) -> bool:
        """Give up a call: its future gets a failure "cancelled" at once. False if it has its result already.

        Others that wait for an equal call still get its answer. A call for which nobody waits is left out if it has not
        begun; else it is abandoned, and a fresh worker takes the place of its own.
        """
        with self._lock:
            run = self._waiting.pop(future, None)
            if run is None:
                return False
            run.waiters.remove(future)
            name = run.call.name
            self._count(name, cancelled=1)
            unwanted = not run.waiters
            if unwanted:
                del self._runs[run.call]
        lane = self._lanes.get(name)
        if unwanted and lane is not None:
            lane.drop(run)
        future.set_result(ToolResult(name, "cancelled", ok=False))
        return True

    def wait(self, futures: Iterable[Future[ToolResult]], timeout_s: float | None = None) -> None:
        """Return once one of the futures has its result, or after `timeout_s`."""
        wait(set(futures), timeout=timeout_s, return_when=FIRST_COMPLETED)

    def _finished(self, run: Run, result: ToolResult) -> None:
        with self._lock:
            waiters, run.waiters = run.waiters, []
            for waiter in waiters:
                del self._waiting[waiter]
            if self._runs.get(run.call) is run:
                del self._runs[run.call]
                if result.ok:
                    self._keep(run.call, result)
            self._count(
                run.call.name,
                failures=int(not result.ok),
                cached=int(result.cached) + len(waiters[1:]),
                retries=max(run.attempts - 1, 0),
                seconds=result.seconds,
            )
        if self._records is not None and waiters:
            self._records.add(run.call, result, attempts=run.attempts)
        for waiter in waiters[:1]:
            waiter.set_result(result)
        self._share(run.call, result, waiters[1:])

    def _share(self, call: ToolCall, result: ToolResult, waiters: Sequence[Future[ToolResult]]) -> None:
        shared = replace(result, seconds=0.0, cached=True)
        for waiter in waiters:
            if self._records is not None:
                self._records.add(call, shared, attempts=0)
            waiter.set_result(shared)

    def _keep(self, call: ToolCall, result: ToolResult) -> None:
        self._answers[call] = result
        self._answer_chars += _size(call, result)
        while self._answer_chars > _KEPT_CHARS:
            oldest, answer = self._answers.popitem(last=False)
            self._answer_chars -= _size(oldest, answer)

    def _count(self, name: str, **more: float) -> None:
        old = self._stats[name]
        self._stats[name] = replace(old, **{field: getattr(old, field) + value for field, value in more.items()})


def _size(call: ToolCall, result: ToolResult) -> int:
    return len(call.text) + sum(map(len, call.history)) + len(result.text)


class _Answer(Future[ToolResult]):
    """A future whose `cancel` gives its call up, see `ToolPool.cancel`; `result` never raises for that."""

    def __init__(self, pool: ToolPool) -> None:
        super().__init__()
        self._pool = pool

    def cancel(self) -> bool:
        return self._pool.cancel(self)
