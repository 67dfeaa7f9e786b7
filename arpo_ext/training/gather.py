"""The trees of one step: collected, scored, and without those that teach nothing, if so wished.

DAPO's dynamic sampling (arXiv 2503.14476, Eq. 11): a prompt whose paths all have one reward has no advantage, so the
next prompts of the order take its place, until every place has a tree with spread or `tries` is used up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from accelerate import Accelerator
from accelerate.utils import gather_object

from arpo_ext.training.step import global_sum
from arpo_ext.types import Prompt, RolloutTree


class Collected(Protocol):
    """What `collect` returns: one tree per prompt and the `rollout/*` metrics."""

    trees: Sequence[RolloutTree]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Gathered:
    """trees: what to train on. scored: everything collected, in order. metrics: of all ranks, seconds those of the
    slowest. drawn: prompts used up by all ranks together."""

    trees: list[RolloutTree]
    scored: list[RolloutTree]
    metrics: dict[str, float]
    drawn: int


def gather_trees(
    accelerator: Accelerator,
    draw: Callable[[int, int], Sequence[Prompt]],
    collect: Callable[[Sequence[Prompt], int], Collected],
    score: Callable[[Sequence[RolloutTree]], Sequence[RolloutTree]],
    *,
    prompts: int,
    tries: int,
) -> Gathered:
    """Trees of `prompts` prompts over all ranks; with `tries` above 0 of prompts with spread only, or fewer.

    draw(start, count): the prompts at these places of the data order, 0 being the step's first. collect(prompts,
    attempt): attempt 0 is the step's own, 1 to `tries` fill up. All ranks call this together; one that has all its
    trees waits for the others.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    kept: list[RolloutTree] = []
    scored: list[RolloutTree] = []
    metrics: dict[str, float] = {}
    places = len(range(rank, prompts, ranks))
    own, drawn = list(draw(0, prompts))[rank::ranks], prompts
    for attempt in range(tries + 1):
        if own:
            collected = collect(own, attempt)
            new = list(score(collected.trees))
            metrics = _joined(metrics, len(scored), collected.metrics, len(new))
            scored.extend(new)
            kept.extend(tree for tree in new if tries == 0 or has_spread(tree))
        if attempt == tries:
            break
        missing = [int(n) for n in global_sum(accelerator, [(places - len(kept)) * (r == rank) for r in range(ranks)])]
        if not any(missing):
            break
        before = sum(missing[:rank])
        own = list(draw(drawn, sum(missing)))[before : before + missing[rank]]
        drawn += sum(missing)
    return Gathered(kept, scored, _over_ranks(metrics, len(scored)), drawn)


def has_spread(tree: RolloutTree) -> bool:
    """Whether two paths that the model ended have different rewards."""
    return len({leaf.reward for leaf in tree.leaves if not leaf.end.is_forced}) > 1


def _over_ranks(metrics: Mapping[str, float], prompts: int) -> dict[str, float]:
    """Metrics of all ranks as those of one that did all of it, in the time of the slowest."""
    parts = [part for part in gather_object([(dict(metrics), prompts)]) if part[1]]
    joined, count = {}, 0
    for own, own_count in parts:
        joined, count = _joined(joined, count, own, own_count), count + own_count
    slowest = {name: max(own.get(name, 0.0) for own, _ in parts) for name in joined if name.endswith("seconds")}
    return joined | slowest


def _joined(one: Mapping[str, float], prompts: int, other: Mapping[str, float], more: int) -> dict[str, float]:
    """Metrics of two calls as those of one: counts and seconds add up, what is per path is the mean by prompts."""
    if not prompts:
        return dict(other)
    joined = {}
    for name in {**one, **other}:
        first, second = one.get(name, 0.0), other.get(name, 0.0)
        mean = (first * prompts + second * more) / (prompts + more)
        joined[name] = mean if name.endswith("_per_path") else first + second
    return joined
