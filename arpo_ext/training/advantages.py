"""From the rewards of the leaves to the advantage of every leaf and every segment of their trees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from arpo_ext import ops
from arpo_ext.types import RolloutTree


@dataclass(frozen=True, slots=True)
class CreditedTree:
    """A tree whose leaves hold their advantages, and the advantage of its segments.

    segment: float32 [S], mean over the leaves below each segment: the hard credit of its tokens (paper section 4.1,
    (1/d) * sum of the advantages of the d paths that share the token).
    """

    tree: RolloutTree
    segment: torch.Tensor


def credit_trees(trees: Sequence[RolloutTree], *, estimator: str) -> list[CreditedTree]:
    """Advantages within each tree: all leaves of one prompt are one group, whatever prefix they share.

    Paths that were cut from outside are no part of it: their advantage is 0 and they move nobody's baseline.

    estimator: as `ops.group_advantages`. ValueError if a leaf has no reward yet.
    """
    trees = list(trees)
    reward, tree_of_leaf, parent, leaf_segment, segment_counts = [], [], [], [], []
    for index, tree in enumerate(trees):
        offset = len(parent)
        parent.extend(s.parent + offset if s.parent >= 0 else -1 for s in tree.segments)
        segment_counts.append(len(tree.segments))
        for leaf in tree.leaves:
            if leaf.end.is_forced:
                continue
            if leaf.reward is None:
                raise ValueError(f"tree {tree.prompt_id!r} has a leaf without a reward; expected scored trees")
            reward.append(leaf.reward)
            tree_of_leaf.append(index)
            leaf_segment.append(leaf.segment + offset)
    if not reward:
        own = (torch.zeros(count) for count in segment_counts)
        return [CreditedTree(_with_advantages(tree, iter(())), none) for tree, none in zip(trees, own, strict=True)]
    # The op wants group numbers below the number of leaves; trees without leaves would break that.
    _, group = torch.unique(torch.tensor(tree_of_leaf), return_inverse=True)
    result = ops.group_advantages(
        torch.tensor(reward, dtype=torch.float32),
        group,
        estimator=estimator,
        parent=torch.tensor(parent),
        leaf_segment=torch.tensor(leaf_segment),
    )
    advantage = iter(result.leaf.tolist())
    return [
        CreditedTree(_with_advantages(tree, advantage), own)
        for tree, own in zip(trees, result.segment.split(segment_counts), strict=True)
    ]


def _with_advantages(tree: RolloutTree, advantage: Iterator[float]) -> RolloutTree:
    """The tree with the next advantages at its leaves, 0 at those that were cut."""
    leaves = (replace(leaf, advantage=0.0 if leaf.end.is_forced else next(advantage)) for leaf in tree.leaves)
    return replace(tree, leaves=tuple(leaves))
