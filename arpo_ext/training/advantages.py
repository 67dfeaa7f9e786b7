"""From the rewards of the leaves to the advantage of every leaf, every segment and every token of their trees.

In this order, each part off by default:

    overlong   r - min(1, max(0, length - begin) / (limit - begin)), begin = limit * (1 - overlong_share)
               DAPO, arXiv 2503.14476, Eq. 13
    estimator  the rewards of one tree to the advantages of its leaves, as `ops.group_advantages`
    whiten     (A - mean(A)) / (std(A) + 1e-6) over the trained tokens of the step; REINFORCE++, arXiv 2501.03262
    credit     what a shared segment gets of its leaves, as `ops.group_advantages`
    entropy    A * (1 + a * (H - mean(H)) / std(H)) over the trained tokens of the step; AEPO, arXiv 2510.14545

Statistics "of the step" are over all ranks, a token counts once for every leaf whose path holds it, std is unbiased.
Paths that were cut from outside are no part of it: their advantage is 0 and they move no baseline and no statistic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arpo_ext import ops
from arpo_ext.types import Leaf, RolloutTree, Segment

# The arguments of `credit_trees` that are keys of TrainConfig.
CREDIT_KEYS = ("estimator", "credit", "whiten", "entropy_advantage", "overlong_share")

GlobalSum = Callable[[Sequence[float]], list[float]]


@dataclass(frozen=True, slots=True)
class CreditedTree:
    """A tree whose leaves hold their advantages, and the advantage of its segments.

    segment: float32 [S], what the rows that share a segment get for its tokens: under credit `turn` AT2PO's value of
        the turn, else the mean over the leaves below it (ARPO section 4.1, "hard" credit).
    factor: for every segment the float32 factors of its tokens' advantages, 1 where nothing was sampled; None: all 1.
    """

    tree: RolloutTree
    segment: Tensor
    factor: tuple[Tensor, ...] | None = None


def credit_trees(
    trees: Sequence[RolloutTree],
    *,
    estimator: str,
    credit: str = "soft",
    whiten: bool = False,
    entropy_advantage: float = 0.0,
    overlong_share: float = 0.0,
    response_limit: int = 0,
    global_sum: GlobalSum = list,
) -> list[CreditedTree]:
    """Advantages within each tree: all leaves of one prompt are one group, whatever prefix they share.

    response_limit: the most tokens of a path after its prompt; read with `overlong_share`.
    global_sum: sums each number over the ranks; every rank calls it equally often, also with no trees.
    ValueError if a leaf has no reward yet, or a segment lacks the log-probabilities or entropies that are asked for.
    """
    trees = list(trees)
    leaves = [(tree, leaf) for tree in trees for leaf in _ended(tree)]
    for tree, leaf in leaves:
        if leaf.reward is None:
            raise ValueError(f"tree {tree.prompt_id!r} has a leaf without a reward; expected scored trees")
    reward = torch.tensor(
        [leaf.reward - _overlong(tree, leaf, overlong_share, response_limit) for tree, leaf in leaves],
        dtype=torch.float32,
    )
    length = torch.tensor([_trained_length(tree, leaf) for tree, leaf in leaves], dtype=torch.int64)
    group = torch.tensor([i for i, tree in enumerate(trees) for _ in _ended(tree)], dtype=torch.int64)
    # The op wants group numbers below the number of leaves; trees without leaves would break that.
    _, group = torch.unique(group, return_inverse=True)
    advantage = ops.group_advantages(reward, group, estimator=estimator, length=length).leaf
    if whiten:
        mean, std = _moments(advantage.tolist(), length.tolist(), global_sum)
        advantage = (advantage - mean) / (std + 1e-6)
    segment = _segment_advantages(trees, advantage, group, credit)
    factors = _entropy_factors(trees, entropy_advantage, global_sum) if entropy_advantage else [None] * len(trees)
    own = iter(advantage.tolist())
    return [
        CreditedTree(_with_advantages(tree, own), *rest) for tree, *rest in zip(trees, segment, factors, strict=True)
    ]


def _ended(tree: RolloutTree) -> list[Leaf]:
    """The leaves that the model ended."""
    return [leaf for leaf in tree.leaves if not leaf.end.is_forced]


def _with_advantages(tree: RolloutTree, advantage: Iterator[float]) -> RolloutTree:
    """The tree with the next advantages at its leaves, 0 at those that were cut."""
    leaves = (replace(leaf, advantage=0.0 if leaf.end.is_forced else next(advantage)) for leaf in tree.leaves)
    return replace(tree, leaves=tuple(leaves))


def _overlong(tree: RolloutTree, leaf: Leaf, share: float, limit: int) -> float:
    """DAPO's soft overlong punishment of a path, 0 to 1; its length counts everything after the prompt."""
    zone = share * limit
    if not zone:
        return 0.0
    length = sum(len(segment.tokens) for segment in tree.response_segments(leaf))
    return min(1.0, max(0.0, length - (limit - zone)) / zone)


def _trained_length(tree: RolloutTree, leaf: Leaf) -> int:
    return sum(len(segment.tokens) for segment in tree.response_segments(leaf) if segment.sampled)


def _segment_advantages(trees: Sequence[RolloutTree], advantage: Tensor, group: Tensor, credit: str) -> list[Tensor]:
    """For each tree the advantages of its segments [S]."""
    parent, leaf_segment, counts = [], [], []
    for tree in trees:
        offset = len(parent)
        parent.extend(s.parent + offset if s.parent >= 0 else -1 for s in tree.segments)
        leaf_segment.extend(leaf.segment + offset for leaf in _ended(tree))
        counts.append(len(tree.segments))
    turn = credit == "turn"
    surprise = [_surprise(segment, tree.prompt_id) for tree in trees for segment in tree.segments] if turn else []
    return list(
        ops.group_advantages(
            advantage,
            group,
            estimator="none",
            parent=torch.tensor(parent, dtype=torch.int64),
            leaf_segment=torch.tensor(leaf_segment, dtype=torch.int64),
            segment_entropy=torch.tensor(surprise, dtype=torch.float32) if turn else None,
            credit="turn" if turn else "mean",
        ).segment.split(counts)
    )


def _surprise(segment: Segment, prompt_id: str) -> float:
    """mean(-log p) of what the model wrote, AT2PO's estimate of a turn's entropy; 0 for other segments."""
    if not segment.sampled or not segment.tokens:
        return 0.0
    if not segment.logprobs:
        raise ValueError(f"tree {prompt_id!r} has a sampled segment without logprobs; train.credit=turn weighs by them")
    return -sum(segment.logprobs) / len(segment.logprobs)


def _entropy_factors(trees: Sequence[RolloutTree], scale: float, global_sum: GlobalSum) -> list[tuple[Tensor, ...]]:
    """1 + scale * z(H) for every sampled token, from the entropies that the sampler measured while it sampled."""
    values: list[float] = []
    counts: list[int] = []
    for tree in trees:
        shared_by = [0] * len(tree.segments)
        for leaf in _ended(tree):
            for index in tree.path(leaf.segment):
                shared_by[index] += 1
        for segment, count in zip(tree.segments, shared_by, strict=True):
            if count and segment.sampled and len(segment.entropies) != len(segment.tokens):
                raise ValueError(
                    f"tree {tree.prompt_id!r} has a sampled segment with {len(segment.entropies)} entropies for "
                    f"{len(segment.tokens)} tokens; train.entropy_advantage expects rollout.entropies=all"
                )
            values.extend(segment.entropies)
            counts.extend([count] * len(segment.entropies))
    mean, std = _moments(values, counts, global_sum)
    # Without spread no token is special.
    slope = scale / std if std > 0 else 0.0

    def factor(segment: Segment) -> Tensor:
        factors = torch.ones(len(segment.tokens))
        if segment.sampled:
            entropy = torch.tensor(segment.entropies, dtype=torch.float64)
            factors[: len(entropy)] += (slope * (entropy - mean)).float()
        return factors

    return [tuple(factor(segment) for segment in tree.segments) for tree in trees]


def _moments(values: Iterable[float], counts: Iterable[int], global_sum: GlobalSum) -> tuple[float, float]:
    """Mean and unbiased standard deviation over all ranks of values that count `counts` times; 0 where undefined."""
    value, count = (torch.tensor(list(x), dtype=torch.float64) for x in (values, counts))
    total, weighted = global_sum([float(count.sum()), float((count * value).sum())])
    mean = weighted / total if total else 0.0
    (squares,) = global_sum([float((count * (value - mean).square()).sum())])
    return mean, math.sqrt(squares / (total - 1)) if total > 1 else 0.0
