"""Group and tree advantages in plain torch: statistics in float64, results in the dtype of the reward."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(reward: Tensor, tree: Tensor, *, estimator: str, eps: float) -> Tensor:
    """Advantage [L] of each leaf within its tree, as `arpo_ext.ops.group_advantages` defines it."""
    leaves = reward.numel()
    known = (tree >= 0) & (tree < leaves)
    if tree.device.type == "cpu" and not bool(known.all()):
        index = int((~known).nonzero()[0])
        raise ValueError(
            f"group_advantages: got tree index {int(tree[index])} at leaf {index}; expected 0 to {leaves - 1}"
        )
    if estimator == "none":
        return reward.clone()
    # Leaves without a known tree share the extra row L, and get 0 in the end.
    row = torch.where(known, tree, leaves)
    value = reward.to(torch.float64)

    def per_tree(x: Tensor, reduce: str, start: float = 0.0) -> Tensor:
        initial = torch.full((leaves + 1,), start, dtype=torch.float64, device=x.device)
        return initial.scatter_reduce(0, row, x, reduce)[row]

    count = per_tree(torch.ones_like(value), "sum")
    others = (count - 1).clamp(min=1)
    mean = per_tree(value, "sum") / count
    deviation = value - torch.where(mean.isfinite(), mean, torch.nan)
    if estimator == "grpo":
        std = (per_tree(deviation.square(), "sum") / others).sqrt()
        advantage = deviation / (std + eps)
    elif estimator == "dr_grpo":
        advantage = deviation
    elif estimator == "rloo":
        advantage = value - (per_tree(value, "sum") - value) / others
        advantage = torch.where(deviation.isnan(), torch.nan, advantage)
    else:
        raise ValueError(f"group_advantages: got estimator {estimator!r}; expected grpo, dr_grpo, rloo or none")
    flat = per_tree(value, "amax", -torch.inf) == per_tree(value, "amin", torch.inf)
    return torch.where(flat | ~known, 0.0, advantage).to(reward.dtype)


def segment_advantages(
    leaf: Tensor, parent: Tensor, leaf_segment: Tensor, leaf_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean [S] and weighted sums of positive and of negative advantages [S, 2] of the leaves below each segment."""
    segments = parent.numel()
    own = torch.arange(segments, device=parent.device)
    if parent.device.type == "cpu":
        _check_segments(parent, leaf_segment, own)
    weight = torch.ones_like(leaf) if leaf_weight is None else leaf_weight
    value, weight = leaf.to(torch.float64), weight.to(torch.float64)
    columns = torch.stack(
        [torch.ones_like(value), value, weight * value.clamp(min=0), weight * value.clamp(max=0)], dim=1
    )
    # Row S is a sink: the parent of every root, and where leaves without a known segment go.
    sink = torch.full((1,), segments, device=parent.device)
    known = (leaf_segment >= 0) & (leaf_segment < segments)
    totals = torch.zeros(segments + 1, 4, dtype=torch.float64, device=leaf.device)
    totals = totals.index_add(0, torch.where(known, leaf_segment, sink), columns)
    # After k rounds a segment holds everything less than 2^k generations below it.
    ancestor = torch.cat([torch.where((parent >= 0) & (parent < own), parent, sink), sink])
    for _ in range(segments.bit_length()):
        totals = totals.index_add(0, ancestor[:-1], totals[:-1])
        ancestor = ancestor[ancestor]
    count, total = totals[:-1, 0], totals[:-1, 1]
    segment = torch.where(count > 0, total / count.clamp(min=1), 0.0)
    return segment.to(leaf.dtype), totals[:-1, 2:].to(leaf.dtype)


def _check_segments(parent: Tensor, leaf_segment: Tensor, own: Tensor) -> None:
    segments = parent.numel()
    bad = (parent < -1) | (parent >= own)
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise ValueError(
            f"group_advantages: got parent {int(parent[index])} of segment {index}; expected -1 to {index - 1}"
        )
    bad = (leaf_segment < 0) | (leaf_segment >= segments)
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise ValueError(
            f"group_advantages: got segment {int(leaf_segment[index])} of leaf {index}; expected 0 to {segments - 1}"
        )
