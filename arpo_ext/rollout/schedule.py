"""What is under way in one collect call: requests at the sampler, calls at the tools, what waits for its turn, clocks.

Left out here: what a path does next (`collect`) and how many tokens it may take (`paths`).
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arpo_ext.config import RolloutConfig
from arpo_ext.errors import SamplerError
from arpo_ext.rollout.metrics import Meter
from arpo_ext.rollout.paths import OpenPath
from arpo_ext.rollout.sampler import Completion, Probe, Sampler, SampleRequest
from arpo_ext.types import ToolCall, ToolResult

if TYPE_CHECKING:
    from arpo_ext.tools import ToolPool

# How late a cancellation is noticed while only tools run.
_CANCEL_POLL_S = 0.05


@dataclass
class _Call:
    """A call of a path; future: None while it waits for its turn."""

    path: OpenPath
    call: ToolCall
    future: Future[ToolResult] | None = None

    @property
    def is_done(self) -> bool:
        return self.future is not None and self.future.done()


class Schedule:
    """Every open path has either one request or one call here.

    At most `config.max_open_requests` requests are at the sampler and `config.max_open_calls` calls at the tools at a
    time. The rest waits and starts in the order in which the paths asked.

    cancel: ends the call once it is set, by whatever thread. Only `step` talks to the sampler, and SamplerError stands
    for everything that the sampler raises: at no other place can an engine that died interrupt a decision.
    """

    def __init__(
        self, sampler: Sampler, tools: ToolPool, config: RolloutConfig, meter: Meter, cancel: threading.Event | None
    ) -> None:
        self._sampler, self._tools, self._config, self._meter, self._cancel = sampler, tools, config, meter, cancel
        self._paths: dict[int, OpenPath] = {}
        self._queue: deque[SampleRequest] = deque()
        self._calls: list[_Call] = []
        self._ends_at = time.monotonic() + (math.inf if config.collect_timeout_s is None else config.collect_timeout_s)

    @property
    def is_open(self) -> bool:
        return bool(self._paths or self._calls)

    @property
    def is_stopped(self) -> bool:
        """Whether the call was cancelled or its time is over."""
        return time.monotonic() >= self._ends_at or (self._cancel is not None and self._cancel.is_set())

    def ask(self, path: OpenPath, request: SampleRequest) -> None:
        self._paths[request.id] = path
        self._queue.append(request)

    def call(self, path: OpenPath, call: ToolCall) -> None:
        self._calls.append(_Call(path, call))

    def step(self) -> list[tuple[OpenPath, Probe | Completion]]:
        """Events of one engine step, in the order of the requests; none if nothing is to be sampled."""
        if not self._paths:
            return []
        self._fill_requests()
        started = time.perf_counter()
        try:
            # Without this a request that the sampler lost would be waited for forever.
            if not self._sampler.num_unfinished:
                raise SamplerError(f"the sampler lost {len(self._paths)} requests; expected a completion of each")
            events = sorted(self._sampler.step(), key=lambda event: event.id)
        except Exception as error:
            raise _as_sampler_error(error) from error
        self._meter.decode_s += time.perf_counter() - started
        return [(self._paths[event.id], event) for event in events if event.id in self._paths]

    def close(self, completion: Completion) -> None:
        """Forget a request that is complete; until then its path counts as open."""
        del self._paths[completion.id]
        self._meter.count_completion(completion)

    def take_results(self) -> list[tuple[OpenPath, ToolResult]]:
        """Results: all, in the order of the calls, if deterministic; else those that are there.

        Waits for a tool only if that order asks for it or nothing is left to sample.
        """
        if not self._calls:
            return []
        started = time.perf_counter()
        self._fill_calls()
        while self._must_wait():
            self._wait()
            self._fill_calls()
        self._meter.tool_wait_s += time.perf_counter() - started
        due, later = [], []
        for call in self._calls:
            # Asked once: a tool that answers between two looks would leave both lists, and its path would be lost.
            (due if call.is_done else later).append(call)
        self._calls = later
        results = [(call.path, call.future.result()) for call in due]
        for _, result in results:
            self._meter.count_result(result)
        return results

    def take_overdue(self) -> list[OpenPath]:
        """The paths whose time is over; their requests are aborted and what their tools answer is not looked at."""
        if self._config.path_timeout_s is None:
            return []
        now = time.monotonic()
        return self._drop(lambda path: path.expires <= now)

    def take_all(self) -> list[OpenPath]:
        """All open paths, as `take_overdue`. The sampler is left without requests of this call."""
        return self._drop(lambda path: True)

    def _drop(self, is_due: Callable[[OpenPath], bool]) -> list[OpenPath]:
        sampling = {id: path for id, path in self._paths.items() if is_due(path)}
        calling = [call for call in self._calls if is_due(call.path)]
        self._queue = deque(request for request in self._queue if request.id not in sampling)
        for id in sampling:
            del self._paths[id]
            # An engine that died raises here too; its requests died with it.
            with contextlib.suppress(Exception):
                self._sampler.abort(id)
        self._calls = [call for call in self._calls if not is_due(call.path)]
        for call in calling:
            if call.future is not None:
                self._tools.cancel(call.future)
                self._meter.abandoned += 1
        return [*sampling.values(), *(call.path for call in calling)]

    def _fill_requests(self) -> None:
        limit = self._config.max_open_requests
        while self._queue and (limit is None or len(self._paths) - len(self._queue) < limit):
            request = self._queue.popleft()
            path = self._paths[request.id]
            if self._config.path_timeout_s is not None and path.expires == math.inf:
                path.expires = time.monotonic() + self._config.path_timeout_s
            try:
                self._sampler.submit(request)
            except Exception as error:
                raise _as_sampler_error(error) from error
            self._meter.count_request(request)

    def _fill_calls(self) -> None:
        limit = math.inf if self._config.max_open_calls is None else self._config.max_open_calls
        running = sum(call.future is not None and not call.is_done for call in self._calls)
        for call in self._calls:
            if call.future is None and running < limit:
                call.future = self._tools.submit(call.call)
                self._meter.calls += 1
                # An answer that is there at once, from a cache, leaves its place to the next call.
                running += not call.is_done

    def _must_wait(self) -> bool:
        if self.is_stopped or self._next_deadline() <= time.monotonic():
            return False
        if self._config.deterministic:
            return not all(call.is_done for call in self._calls)
        return not self._paths and not any(call.is_done for call in self._calls)

    def _wait(self) -> None:
        """Until a tool answers or something else is due."""
        futures = [call.future for call in self._calls if call.future is not None and not call.is_done]
        until = self._next_deadline() - time.monotonic()
        if self._cancel is not None:
            until = min(until, _CANCEL_POLL_S)
        if until == math.inf:
            self._tools.wait(futures)
        else:
            self._tools.wait(futures, timeout_s=max(until, 0.0))

    def _next_deadline(self) -> float:
        """Of the call and of the paths that wait for a tool."""
        return min((self._ends_at, *(call.path.expires for call in self._calls)))


def _as_sampler_error(error: Exception) -> SamplerError:
    return error if isinstance(error, SamplerError) else SamplerError(f"{type(error).__name__}: {error}")
