"""Collect rollout trees: sample, run tools, fork where the policy says so, until every prompt has its M leaves.

Paths advance one by one, never in rounds: while one waits for its tool, all others decode. Left out here: how tokens
are drawn (`sampler`), the branch rule (`branching`), queues and clocks (`schedule`), texts and tags (`render`) and
rewards.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from arpo_ext import ops
from arpo_ext.config import RolloutConfig
from arpo_ext.errors import CollectError, DataError, SamplerError
from arpo_ext.render import Renderer
from arpo_ext.rollout.branching import Baselines, Brancher, Window, draw_seed
from arpo_ext.rollout.expansion import expand_tokens, expand_turns
from arpo_ext.rollout.metrics import Meter
from arpo_ext.rollout.paths import Budget, OpenPath
from arpo_ext.rollout.sampler import Completion, Probe, Sampler, SampleRequest
from arpo_ext.rollout.schedule import Schedule
from arpo_ext.rollout.tree import GrowingTree, match_finished
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
    cancel: threading.Event | None = None,
    finished: Sequence[RolloutTree] = (),
) -> Collected:
    """Exactly `config.paths` leaves for every prompt (ARPO section 3; semantics in DESIGN section 5).

    sampler: has no open requests. tools: started. seed: of every draw and branch decision; with
    `config.deterministic` and tools that answer alike, the same seed gives the same trees. progress: called with the
    number of paths that just ended, for instance `tqdm.update`. baselines: what the policy `reference` remembers from
    call to call, see `Brancher`; None: nothing. cancel: once set, by any thread, the call returns what there is.
    finished: trees of an earlier call with the same arguments; those that are complete are returned as they are, and
    only the other prompts are sampled.

    What a tool or the model does wrong becomes part of a tree, never an exception. A path whose time is over ends as
    `timeout`; those that are open when the call is cancelled or its time is over, and those not begun, end as
    `cancelled`. Both are leaves (`StopReason.is_forced`) that are never trained. CollectError, with the trees, if the
    sampler fails. DataError, before anything is sampled, if a prompt leaves no room to answer or a finished tree is of
    another call.
    """
    run = _Run(sampler, tools, renderer, config, seed, greedy, progress, baselines, cancel)
    run.plant(prompts, finished)
    if config.deterministic:
        sampler.reset_prefix_cache()
    try:
        run.start_paths()
        while run.schedule.is_open and not run.schedule.is_stopped:
            for path in run.schedule.take_overdue():
                run.cut(path, StopReason.TIMEOUT)
            for path, result in run.schedule.take_results():
                run.add_result(path, result)
            run.branch()
            events = run.schedule.step()
            run.measure(events)
            run.branch()
            for path, event in events:
                if isinstance(event, Completion):
                    run.end_turn(path, event)
            run.start_paths()
    except SamplerError as error:
        run.cancel_open()
        collected = run.collected()
        complete = sum(tree.is_complete for tree in collected.trees)
        message = f"sampling failed with {complete} of {len(prompts)} trees complete: {error}"
        raise CollectError(message, collected) from error
    finally:
        run.cancel_open()
    return run.collected()


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
        progress: Callable[[int], object] | None,
        baselines: Baselines | None,
        cancel: threading.Event | None,
    ) -> None:
        self.renderer, self.config, self.seed, self.greedy = renderer, config, seed, greedy
        self.progress = progress or (lambda ended: None)
        self.max_model_len = sampler.max_model_len
        self.meter = Meter()
        self.schedule = Schedule(sampler, tools, config, self.meter, cancel)
        self.budget = Budget(config, renderer, sampler.max_model_len)
        self.brancher = Brancher(config, sampler.vocab_size, seed, baselines)
        self.trees: list[GrowingTree] = []
        # Trees of an earlier call, by the position of their prompt.
        self.finished: dict[int, RolloutTree] = {}
        # Of policies that wait for complete paths; the others decide while they sample.
        self.rounds = {"at2po": config.rounds, "appo": 1}.get(config.policy, 0)
        # Of each tree: the paths as they were when a turn began, by the turn's first segment.
        self.turns: defaultdict[int, dict[int, OpenPath]] = defaultdict(dict)
        self.monitored: dict[int, list[float]] = {}
        self.asking: list[OpenPath] = []
        self.requests = 0

    def plant(self, prompts: Sequence[Prompt], finished: Sequence[RolloutTree]) -> None:
        """A tree with a root for every prompt; DataError for one that cannot be answered."""
        for prompt in prompts:
            tokens = tuple(self.renderer.prompt_tokens(prompt))
            if len(tokens) >= self.max_model_len:
                raise DataError(
                    f"prompt {prompt.id!r} has {len(tokens)} tokens; expected fewer than engine.max_model_len "
                    f"({self.max_model_len}), so that there is room for an answer"
                )
            root = Segment(parent=-1, tokens=tokens, sampled=False, text=self.renderer.decode(tokens))
            self.trees.append(GrowingTree(prompt, [root], spare=self.config.max_tree_tokens))
        self.finished = match_finished(
            finished, self.trees, policy=self.config.policy, seed=self.seed, paths=self.config.paths
        )
        if self.finished:
            self.progress(len(self.finished) * self.config.paths)

    def start_paths(self) -> None:
        """Start what is missing of every tree that has no open path: initial paths, an expansion, or all the rest."""
        for index, tree in enumerate(self.trees):
            while index not in self.finished and not tree.open and tree.started < self.config.paths:
                # Without a turn, every path having run out of time, there is nothing to expand.
                if tree.rounds < self.rounds and self.turns[index]:
                    self.expand(index)
                    tree.rounds += 1
                else:
                    self.start_at_prompt(index)

    def start_at_prompt(self, index: int) -> None:
        tree = self.trees[index]
        total = self.initial_paths(index)
        if tree.started >= total:
            total = self.config.paths
            self.meter.fresh += total - tree.started
        for ordinal in range(tree.started, total):
            path = OpenPath(index, (ordinal,), tip=0, tokens=tree.segments[0].tokens)
            if self.config.policy == "aepo" and ordinal == 0:
                path.monitored = self.monitored.setdefault(index, [])
            self.begin(path)

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
        root, *after_tools = self.monitored[index] or [math.nan]
        mean = sum(after_tools) / len(after_tools) if after_tools else math.nan
        pair = torch.tensor([[root], [mean]], dtype=torch.float64)
        return int(ops.aepo_initial_paths(*pair, paths=self.config.paths, slope=self.config.split_slope))

    def expand(self, index: int) -> None:
        """Sample again from where the paths of a tree, all complete, were least certain."""
        tree = self.trees[index]
        expand = {"at2po": expand_turns, "appo": expand_tokens}[self.config.policy]
        for path in expand(tree, self.turns[index], config=self.config, renderer=self.renderer, seed=self.seed):
            self.begin(path)

    def begin(self, path: OpenPath) -> None:
        self.budget.open(path, self.trees[path.tree])
        self.sample(path)

    def sample(self, path: OpenPath) -> None:
        request = SampleRequest(
            id=self.requests,
            tokens=path.tokens,
            max_tokens=self.budget.tokens_left(path),
            probe_tokens=self.config.probe_tokens,
            seed=draw_seed(self.seed, path.tree, path.key, path.turn),
            greedy=self.greedy,
            top_logprobs=self.brancher.top_logprobs,
        )
        self.requests += 1
        self.schedule.ask(path, request)

    def measure(self, events: Sequence[tuple[OpenPath, Probe | Completion]]) -> None:
        """Note the windows that are complete."""
        for path, event in events:
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
                sibling = path.sibling(ordinal)
                if self.brancher.forgets_baseline:
                    sibling.root = None
                self.begin(sibling)

    def end_turn(self, path: OpenPath, completion: Completion) -> None:
        """Add what was sampled; hand a call to its tool, or end the path."""
        self.schedule.close(completion)
        tree = self.trees[path.tree]
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
        index = tree.add(segment)
        if self.rounds:
            self.turns[path.tree][index] = replace(path, branch=None)
        turn = (*path.head, *completion.tokens)
        path.advance(index, completion.tokens)
        path.probe_entropy = path.branch = None
        reason = completion.stop_reason
        if reason is StopReason.TOOL:
            answer = self.budget.answer_call(path, tree, turn)
            if isinstance(answer, ToolCall):
                self.schedule.call(path, path.ask(answer))
                return
            if isinstance(answer, ToolResult):
                self.meter.refused += 1
                self.add_result(path, answer)
                return
            reason = answer
        self.budget.close(path, tree)
        tree.end(path.tip, reason)
        self.progress(1)

    def add_result(self, path: OpenPath, result: ToolResult) -> None:
        """Hang a tool result from its call and sample on from it."""
        path.take_answer(result)
        tokens = tuple(self.renderer.result_tokens(result.text, self.budget.result_limit(path)))
        text = self.renderer.decode(tokens)
        segment = Segment(parent=path.tip, tokens=tokens, sampled=False, text=text, tool=replace(result, text=text))
        path.advance(self.trees[path.tree].add(segment), tokens)
        path.turn += 1
        path.asked = False
        self.sample(path)
        if self.brancher.decides_on_results:
            self.asking.append(path)

    def cut(self, path: OpenPath, reason: StopReason) -> None:
        """End an open path from outside."""
        tree = self.trees[path.tree]
        self.asking = [other for other in self.asking if other is not path]
        self.budget.close(path, tree)
        # The siblings that a turn was granted stay accounted for, though it was not finished.
        tree.cut(path.tip, reason, probe_entropy=path.probe_entropy, branch=path.branch)
        self.progress(1)

    def cancel_open(self) -> None:
        """End all that is open or not begun; leaves no request behind, so that the sampler can be used again."""
        for path in self.schedule.take_all():
            self.cut(path, StopReason.CANCELLED)
        for index, tree in enumerate(self.trees):
            while index not in self.finished and tree.started < self.config.paths:
                tree.started += 1
                tree.cut(0, StopReason.CANCELLED)
                self.progress(1)

    def collected(self) -> Collected:
        new = {
            index: tree.freeze(policy=self.config.policy, seed=self.seed)
            for index, tree in enumerate(self.trees)
            if index not in self.finished
        }
        trees = [{**new, **self.finished}[index] for index in range(len(self.trees))]
        return Collected(trees, self.meter.summary(list(new.values())))
