"""Rollouts against a clock that only counts: a sampler and tools that take time without spending it.

The collector runs as it is; the engine's step and the tools' latencies move the clock. Lock-step rounds, the way most
agent trainers collect, run against the same clock, the same turns and the same latencies. Lengths and latencies are
functions of (seed, path, turn), so every scheduler meets the same ones.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from arpo_ext.config import RolloutConfig
from arpo_ext.rollout import Completion, Probe, SampleRequest, collect
from arpo_ext.types import Prompt, StopReason, ToolCall, ToolResult


@dataclass(frozen=True)
class Engine:
    """Cost of a step with n sequences of which m are new: step_s + n * token_s + m * admit_s; at most max_num_seqs."""

    step_s: float = 5e-3
    token_s: float = 0.17e-3
    admit_s: float = 0.0
    max_num_seqs: int = 512

    def step_cost_s(self, sequences: int, new: int = 0) -> float:
        return self.step_s + sequences * self.token_s + new * self.admit_s


@dataclass(frozen=True)
class Workload:
    """turns: tool calls of every path. tokens: mean length of a turn. Latencies: log-normal, median and sigma; or drawn
    from `recorded` ones, if there are any."""

    prompts: int = 64
    paths: int = 8
    turns: int = 3
    tokens: int = 32
    median_s: float = 1.0
    sigma: float = 1.0
    seed: int = 0
    recorded: tuple[float, ...] = ()

    @property
    def all_paths(self) -> int:
        return self.prompts * self.paths

    def length(self, path: int, turn: int) -> int:
        draw = random.Random(f"length {self.seed} {path} {turn}")
        return max(3, round(draw.uniform(0.5, 1.5) * self.tokens))

    def latency_s(self, path: int, turn: int) -> float:
        draw = random.Random(f"latency {self.seed} {path} {turn}")
        if self.recorded:
            return draw.choice(self.recorded)
        return self.median_s * math.exp(self.sigma * draw.gauss(0, 1))


@dataclass
class Clock:
    now: float = 0.0


class SimulatedTools:
    """Answers a call `path turn` after its latency on the clock."""

    def __init__(self, clock: Clock, workload: Workload) -> None:
        self._clock, self._workload = clock, workload
        self._due: list[tuple[float, int, Future[ToolResult], str]] = []
        self._count = itertools.count()

    def submit(self, call: ToolCall) -> Future[ToolResult]:
        path, turn = call.text.split()
        future: Future[ToolResult] = Future()
        due = self._clock.now + self._workload.latency_s(int(path), int(turn))
        heapq.heappush(self._due, (due, next(self._count), future, call.text))
        return future

    def settle(self) -> None:
        """Answer what is due."""
        while self._due and self._due[0][0] <= self._clock.now:
            _, _, future, text = heapq.heappop(self._due)
            future.set_result(ToolResult("search", text, ok=True))

    def wait(self, futures: Iterable[Future[ToolResult]]) -> None:
        """Move the clock to the next answer."""
        if self._due and not any(future.done() for future in futures):
            self._clock.now = max(self._clock.now, self._due[0][0])
            self.settle()


# No turn and no path has these numbers.
_RESULT, _CALL, _END, _FIRST_PATH = -(1 << 20), -(2 << 20), -(3 << 20), 8


class SimulatedRenderer:
    """Tokens that say what the simulation needs: prompt p is (-1 - p,), a turn repeats its path's number."""

    result_overhead = 1

    def prompt_tokens(self, prompt: Prompt) -> list[int]:
        return [-1 - int(prompt.id)]

    def result_tokens(self, text: str, limit: int | None = None) -> list[int]:
        return [_RESULT]

    def parse_call(self, tokens: Sequence[int]) -> ToolCall:
        return ToolCall("search", f"{tokens[0] - _FIRST_PATH} {tokens[-2]}")

    def closing_name(self, tokens: Sequence[int]) -> str:
        return "search"

    def answer_text(self, tokens: Sequence[int]) -> str:
        return ""

    decode = answer_text


@dataclass
class _Sequence:
    request: SampleRequest
    path: int
    turn: int
    length: int
    done: int = 0


class SimulatedSampler:
    """Decodes one token of every running sequence a step; the clock pays."""

    vocab_size = 1 << 16
    max_model_len = 1 << 16

    def __init__(self, clock: Clock, engine: Engine, workload: Workload, tools: SimulatedTools) -> None:
        self._clock, self._engine, self._workload, self._tools = clock, engine, workload, tools
        self._running: dict[int, _Sequence] = {}
        self._queue: deque[_Sequence] = deque()
        self._started: Counter[int] = Counter()

    @property
    def num_unfinished(self) -> int:
        return len(self._running) + len(self._queue)

    def submit(self, request: SampleRequest) -> None:
        if len(request.tokens) == 1:
            prompt = -1 - request.tokens[0]
            path = prompt * self._workload.paths + self._started[prompt]
            self._started[prompt] += 1
        else:
            path = request.tokens[1] - _FIRST_PATH
        turn = request.tokens.count(_RESULT)
        self._queue.append(_Sequence(request, path, turn, self._workload.length(path, turn)))

    def step(self) -> list[Probe | Completion]:
        before = len(self._running)
        while self._queue and len(self._running) < self._engine.max_num_seqs:
            sequence = self._queue.popleft()
            self._running[sequence.request.id] = sequence
        self._clock.now += self._engine.step_cost_s(len(self._running), len(self._running) - before)
        self._tools.settle()
        events: list[Probe | Completion] = []
        for sequence in list(self._running.values()):
            sequence.done += 1
            if sequence.done == sequence.length:
                del self._running[sequence.request.id]
                events.append(self._completion(sequence))
        return events

    def _completion(self, sequence: _Sequence) -> Completion:
        calls = sequence.turn < self._workload.turns
        body = (sequence.path + _FIRST_PATH,) * (sequence.length - 2)
        tokens = (*body, sequence.turn, _CALL if calls else _END)
        zeros = (0.0,) * len(tokens)
        return Completion(sequence.request.id, tokens, zeros, zeros, StopReason.TOOL if calls else StopReason.EOS)

    def abort(self, id: int) -> None:
        self._running.pop(id, None)

    def reset_prefix_cache(self) -> None: ...


def collector_makespan_s(engine: Engine, workload: Workload) -> float:
    """Seconds on the clock that `collect` takes."""
    clock = Clock()
    tools = SimulatedTools(clock, workload)
    config = RolloutConfig(
        paths=workload.paths,
        initial_paths=workload.paths,
        policy="chain",
        max_tool_calls=workload.turns,
        max_response_tokens=1 << 15,
        probe_tokens=1 << 15,
        deterministic=False,
    )
    collected = collect(
        [Prompt(str(p), ({"role": "user", "content": "?"},), ()) for p in range(workload.prompts)],
        sampler=SimulatedSampler(clock, engine, workload, tools),
        tools=tools,
        renderer=SimulatedRenderer(),
        config=config,
        seed=workload.seed,
    )
    assert sum(tree.counts["tool_calls"] for tree in collected.trees) == workload.all_paths * workload.turns
    return clock.now


def lock_step_makespan_s(engine: Engine, workload: Workload) -> float:
    """Rounds as published agent trainers run them: generate for all, wait for every tool, next round."""
    now = 0.0
    for turn in range(workload.turns + 1):
        lengths = sorted((workload.length(path, turn) for path in range(workload.all_paths)), reverse=True)
        waiting, running = deque(lengths), []
        while waiting or running:
            before = len(running)
            while waiting and len(running) < engine.max_num_seqs:
                running.append(waiting.popleft())
            now += engine.step_cost_s(len(running), len(running) - before)
            running = [left - 1 for left in running if left > 1]
        if turn < workload.turns:
            now += max(workload.latency_s(path, turn) for path in range(workload.all_paths))
    return now


def bound_s(engine: Engine, workload: Workload) -> float:
    """No scheduler is faster: the longest path alone, and all tokens at the engine's best rate."""
    turns = range(workload.turns + 1)
    alone = max(
        sum(workload.length(path, turn) for turn in turns) * engine.step_cost_s(1)
        + len(turns) * engine.admit_s
        + sum(workload.latency_s(path, turn) for turn in range(workload.turns))
        for path in range(workload.all_paths)
    )
    tokens = sum(workload.length(path, turn) for path in range(workload.all_paths) for turn in turns)
    admitted = workload.all_paths * len(turns) * engine.admit_s
    return max(alone, tokens * engine.step_cost_s(engine.max_num_seqs) / engine.max_num_seqs + admitted)
