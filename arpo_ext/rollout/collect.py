"""Collect rollout trees: sample, run tools, fork where the policy says so, until every prompt has its M leaves.

Paths advance one by one, never in rounds: while one waits for its tool, all others decode. Left out here: how tokens
are drawn (`sampler`), the branch rule (`branching`), texts and tags (`render`), rewards.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from arpo_ext import ops
from arpo_ext.config import RolloutConfig
from arpo_ext.errors import DataError
from arpo_ext.render import Renderer
from arpo_ext.rollout.branching import Baselines, Brancher, Window, draw_seed
from arpo_ext.rollout.expansion import expand_tokens, expand_turns
from arpo_ext.rollout.paths import Budget, OpenPath
from arpo_ext.rollout.sampler import Completion, Probe, Sampler, SampleRequest
from arpo_ext.rollout.tree import GrowingTree
from arpo_ext.types import Prompt, RolloutTree, Segment, StopReason, ToolCall, ToolResult

if TYPE_CHECKING:
    from arpo_ext.tools import ToolPool


@dataclass(frozen=True)
class Collected:
    """One tree a prompt, in the order of the prompts, and the metrics of the call (names start with `rollout/`)."""

    trees: list[RolloutTree]
    metrics: dict[str, float]


def collect(
    prompts: Sequence[Prompt],
    *,
    sampler: Sampler,
    tools: ToolPool,
    renderer: Renderer,
    config: RolloutConfig,
    seed: int,
    greedy: bool = False,
    progress: Callable[[int], object] | None = None,
    baselines: Baselines | None = None,
) -> Collected:
    """Exactly `config.paths` leaves for every prompt (ARPO section 3; semantics in DESIGN section 5).

    sampler: has no open requests. tools: started. seed: of every draw and branch decision; with
    `config.deterministic` and tools that answer alike, the same seed gives the same trees. progress: called with the
    number of paths that just ended, for instance `tqdm.update`. baselines: what the policy `reference` remembers from
    call to call, see `Brancher`; None: nothing. DataError if a prompt leaves no room to answer, before anything is
    sampled. What a tool or the model does wrong becomes part of a tree, never an exception.
    """
    run = _Run(sampler, tools, renderer, config, seed, greedy, progress or (lambda ended: None), baselines)
    run.plant(prompts)
    if config.deterministic:
        sampler.reset_prefix_cache()
    try:
        run.start_paths()
        while run.is_open:
            run.take_results()
            run.branch()
            if sampler.num_unfinished:
                events = run.step()
                run.measure(events)
                run.branch()
                for event in events:
                    if isinstance(event, Completion):
                        run.end_turn(event)
                run.start_paths()
    finally:
        run.abort()
    trees = [tree.freeze(policy=config.policy, seed=seed) for tree in run.trees]
    return Collected(trees, run.metrics(trees))


class _Run:
    """The state of one collect call."""

    def __init__(
        self,
        sampler: Sampler,
        tools: ToolPool,
        renderer: Renderer,
        config: RolloutConfig,
        seed: int,
        greedy: bool,
        progress: Callable[[int], object],
        baselines: Baselines | None,
    ) -> None:
        self.sampler, self.tools, self.renderer, self.config = sampler, tools, renderer, config
        self.seed, self.greedy, self.progress = seed, greedy, progress
        self.budget = Budget(config, renderer, sampler.max_model_len)
        self.brancher = Brancher(config, sampler.vocab_size, seed, baselines)
        self.trees: list[GrowingTree] = []
        # Of policies that wait for complete paths; the others decide while they sample.
        self.rounds = {"at2po": config.rounds, "appo": 1}.get(config.policy, 0)
        # Of each tree: the paths as they were when a turn began, by the turn's first segment.
        self.turns: defaultdict[int, dict[int, OpenPath]] = defaultdict(dict)
        self.monitored: dict[int, list[float]] = {}
        self.sampling: dict[int, OpenPath] = {}
        self.asking: list[OpenPath] = []
        self.waiting: list[tuple[Future[ToolResult], OpenPath]] = []
        self.requests = 0
        self.fresh = 0
        self.ran = 0
        self.began = time.perf_counter()
        self.decode_s = 0.0
        self.tool_wait_s = 0.0

    @property
    def is_open(self) -> bool:
        return bool(self.sampling or self.waiting)

    def plant(self, prompts: Sequence[Prompt]) -> None:
        """A tree with a root for every prompt; DataError for one that cannot be answered."""
        for prompt in prompts:
            tokens = tuple(self.renderer.prompt_tokens(prompt))
            if len(tokens) >= self.sampler.max_model_len:
                raise DataError(
                    f"prompt {prompt.id!r} has {len(tokens)} tokens; expected fewer than engine.max_model_len "
                    f"({self.sampler.max_model_len}), so that there is room for an answer"
                )
            root = Segment(parent=-1, tokens=tokens, sampled=False, text=self.renderer.decode(tokens))
            self.trees.append(GrowingTree(prompt, [root]))

    def start_paths(self) -> None:
        """Start what is missing of every tree that has no open path: initial paths, an expansion, or all the rest."""
        for index, tree in enumerate(self.trees):
            while not tree.open and tree.started < self.config.paths:
                if tree.started and tree.rounds < self.rounds:
                    self.expand(index)
                    tree.rounds += 1
                else:
                    self.start_at_prompt(index)

    def start_at_prompt(self, index: int) -> None:
        tree = self.trees[index]
        total = self.initial_paths(index)
        if tree.started >= total:
            total = self.config.paths
            self.fresh += total - tree.started
        for ordinal in range(tree.started, total):
            tree.started += 1
            path = OpenPath(index, (ordinal,), tip=0, tokens=tree.segments[0].tokens)
            if self.config.policy == "aepo" and ordinal == 0:
                path.monitored = self.monitored.setdefault(index, [])
            self.sample(path)

    def initial_paths(self, index: int) -> int:
        """How many paths of a tree begin at its prompt before anything may fork.

        chain: all, for nothing is gained by holding paths back. aepo: one that is monitored first, then as many as its
        entropies say, that one included.
        """
        if self.config.policy == "chain":
            return self.config.paths
        if self.config.policy != "aepo":
            return self.config.initial_paths
        if not self.trees[index].started:
            return 1
        root, *after_tools = self.monitored[index]
        mean = sum(after_tools) / len(after_tools) if after_tools else math.nan
        pair = torch.tensor([[root], [mean]], dtype=torch.float64)
        return int(ops.aepo_initial_paths(*pair, paths=self.config.paths, slope=self.config.split_slope))

    def expand(self, index: int) -> None:
        """Sample again from where the paths of a tree, all complete, were least certain."""
        tree = self.trees[index]
        expand = {"at2po": expand_turns, "appo": expand_tokens}[self.config.policy]
        for path in expand(tree, self.turns[index], config=self.config, renderer=self.renderer, seed=self.seed):
            tree.started += 1
            self.sample(path)

    def sample(self, path: OpenPath) -> None:
        self.sampling[self.requests] = path
        self.sampler.submit(
            SampleRequest(
                id=self.requests,
                tokens=path.tokens,
                max_tokens=self.budget.tokens_left(path),
                probe_tokens=self.config.probe_tokens,
                seed=draw_seed(self.seed, path.tree, path.key, path.turn),
                greedy=self.greedy,
                top_logprobs=self.brancher.top_logprobs,
            )
        )
        self.requests += 1

    def step(self) -> list[Probe | Completion]:
        """Events of one engine step, in the order of the requests."""
        started = time.perf_counter()
        events = sorted(self.sampler.step(), key=lambda event: event.id)
        self.decode_s += time.perf_counter() - started
        return events

    def measure(self, events: Iterable[Probe | Completion]) -> None:
        """Note the windows that are complete."""
        for event in events:
            path = self.sampling[event.id]
            if path.probe_entropy is not None:
                continue
            window = event.entropies[: self.config.probe_tokens]
            path.probe_entropy = sum(window) / len(window)
            path.window = self.brancher.measure(event)
            if path.monitored is not None:
                path.monitored.append(path.window)
            if path.root is None:
                path.root = self.brancher.root(path.tree, path.lineage, path.window)
            elif not path.asked and path.monitored is None and not self.brancher.decides_on_results:
                self.asking.append(path)

    def branch(self) -> None:
        """Decide for all paths that ask together, and start their siblings."""
        asking = sorted(self.asking, key=lambda path: (path.tree, path.key))
        self.asking = []
        windows = [Window(p.tree, p.key, p.turn, p.window, p.root, p.streak) for p in asking]
        room = [self.config.paths - tree.started for tree in self.trees]
        for path, branch in zip(asking, self.brancher.decide(windows, room), strict=True):
            path.asked, path.branch = True, branch
            path.streak = self.brancher.streak(path.streak, branch)
            for ordinal in range(branch.children if branch else 0):
                self.trees[path.tree].started += 1
                sibling = path.sibling(ordinal)
                if self.brancher.forgets_baseline:
                    sibling.root = None
                self.sample(sibling)

    def end_turn(self, completion: Completion) -> None:
        """Add what was sampled; hand a call to its tool, or end the path."""
        path = self.sampling.pop(completion.id)
        keep = len(completion.tokens) if self.config.entropies == "all" else self.config.probe_tokens
        segment = Segment(
            parent=path.tip,
            tokens=completion.tokens,
            sampled=True,
            text=self.renderer.answer_text(completion.tokens),
            logprobs=completion.logprobs,
            entropies=completion.entropies[:keep],
            stop_reason=completion.stop_reason,
            probe_entropy=path.probe_entropy,
            branch=path.branch,
        )
        index = self.trees[path.tree].add(segment)
        if self.rounds:
            self.turns[path.tree][index] = replace(path, branch=None)
        turn = (*path.head, *completion.tokens)
        path.advance(index, completion.tokens)
        path.probe_entropy = path.branch = None
        reason = completion.stop_reason
        if reason is StopReason.TOOL:
            path.calls += 1
            answer = self.budget.answer_call(path, turn)
            if isinstance(answer, ToolCall):
                self.ran += 1
                self.waiting.append((self.tools.submit(answer), path))
                return
            if isinstance(answer, ToolResult):
                self.add_result(path, answer)
                return
            reason = answer
        self.trees[path.tree].end(path.tip, reason)
        self.progress(1)

    def take_results(self) -> None:
        """Hand results to their paths: all, in the order of the calls, if deterministic; else those that are there.

        Waits for a tool only if that order asks for it or nothing is left to decode.
        """
        if not self.waiting:
            return
        started = time.perf_counter()
        if not self.config.deterministic and not self.sampling:
            self.tools.wait([future for future, _ in self.waiting])
        due, later = [], []
        for future, path in self.waiting:
            (due if self.config.deterministic or future.done() else later).append((future, path))
        results = [(path, future.result()) for future, path in due]
        self.tool_wait_s += time.perf_counter() - started
        self.waiting = later
        for path, result in results:
            self.add_result(path, result)

    def add_result(self, path: OpenPath, result: ToolResult) -> None:
        """Hang a tool result from its call and sample on from it."""
        tokens = tuple(self.renderer.result_tokens(result.text, self.budget.result_limit(path)))
        text = self.renderer.decode(tokens)
        segment = Segment(parent=path.tip, tokens=tokens, sampled=False, text=text, tool=replace(result, text=text))
        path.advance(self.trees[path.tree].add(segment), tokens)
        path.turn += 1
        path.asked = False
        self.sample(path)
        if self.brancher.decides_on_results:
            self.asking.append(path)

    def abort(self) -> None:
        """Leave no open request behind, so that the sampler can be used again after an error."""
        for request in self.sampling:
            self.sampler.abort(request)

    def metrics(self, trees: Sequence[RolloutTree]) -> dict[str, float]:
        """Work of the call. A shared prefix or tool call counts once, but for each path in `tool_calls_per_path`."""
        leaves = [(tree, leaf) for tree in trees for leaf in tree.leaves]
        results = sum(s.tool is not None for tree, leaf in leaves for s in tree.response_segments(leaf))
        counts = [tree.counts for tree in trees]
        return {
            "rollout/tool_calls": float(self.ran),
            "rollout/tool_calls_refused": float(sum(c["tool_calls"] for c in counts) - self.ran),
            "rollout/tool_calls_per_path": results / max(1, len(leaves)),
            "rollout/sampled_tokens": float(sum(c["sampled_tokens"] for c in counts)),
            "rollout/forks": float(sum(c["forks"] for c in counts)),
            "rollout/fresh_paths": float(self.fresh),
            "rollout/seconds": time.perf_counter() - self.began,
            "rollout/decode_seconds": self.decode_s,
            "rollout/tool_wait_seconds": self.tool_wait_s,
        }
