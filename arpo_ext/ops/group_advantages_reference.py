"""Group and tree advantages in plain torch: statistics in float64, results in the dtype of the reward."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(
    reward: Tensor, tree: Tensor, subgroup: Tensor | None, length: Tensor | None, *, estimator: str, eps: float
) -> Tensor:
    """Advantage [L] of each leaf within its tree, as `arpo_ext.ops.group_advantages` defines it."""
    known = _known("tree", tree)
    if subgroup is not None:
        known = known & _known("subgroup", subgroup)
    if length is not None and length.device.type == "cpu" and bool((length < 0).any()):
        index = int((length < 0).nonzero()[0])
        raise ValueError(f"group_advantages: got length {int(length[index])} of leaf {index}; expected at least 0")
    if estimator == "none":
        return reward.clone()
    value = reward.to(torch.float64)
    weight = torch.ones_like(value) if length is None else length.clamp(min=0).to(torch.float64)
    # Leaves that belong nowhere share the extra row L, and get 0 in the end.
    leaves = reward.numel()
    by_tree = _Groups(torch.where(known, tree, leaves), leaves)
    flat, deviation = by_tree.flat(value), by_tree.deviation(value)
    if estimator in ("grpo", "at2po"):
        advantage = deviation / (by_tree.std(value) + eps)
    elif estimator == "dr_grpo":
        advantage = deviation
    elif estimator == "rloo":
        others = (by_tree.count - 1).clamp(min=1)
        advantage = value - (by_tree.sum(value) - value) / others
        advantage = torch.where(deviation.isnan(), torch.nan, advantage)
    elif estimator == "opo":
        tokens = by_tree.sum(weight)
        advantage = deviation - by_tree.sum(weight * deviation) / tokens
        flat = flat | ((tokens == 0) & ~deviation.isnan())
    elif estimator == "grpo_passk":
        advantage = _best_against_second(by_tree, value) / (by_tree.std(value) + eps)
        advantage = torch.where(deviation.isnan(), torch.nan, advantage)
    elif estimator == "reinforce_pp_baseline":
        advantage = _whitened(torch.where(flat, 0.0, deviation), weight * known, eps)
    else:
        assert subgroup is not None
        advantage, flat = _by_subgroup(estimator, value, by_tree, torch.where(known, subgroup, leaves), eps)
    return torch.where(flat | ~known, 0.0, advantage).to(reward.dtype)


class _Groups:
    """Statistics of the leaves of equal row, each given at every leaf [L]. Rows are in [0, highest]."""

    def __init__(self, row: Tensor, highest: int):
        self.row, self.highest = row, highest
        self.count = self.sum(torch.ones(row.shape, dtype=torch.float64, device=row.device))

    def _reduce(self, x: Tensor, reduce: str, start: float) -> Tensor:
        initial = torch.full((self.highest + 1,), start, dtype=torch.float64, device=x.device)
        return initial.scatter_reduce(0, self.row, x, reduce)[self.row]

    def sum(self, x: Tensor) -> Tensor:
        return self._reduce(x, "sum", 0.0)

    def highest_of(self, x: Tensor) -> Tensor:
        return self._reduce(x, "amax", -torch.inf)

    def flat(self, x: Tensor) -> Tensor:
        return self.highest_of(x) == self._reduce(x, "amin", torch.inf)

    def deviation(self, x: Tensor) -> Tensor:
        mean = self.sum(x) / self.count
        return x - torch.where(mean.isfinite(), mean, torch.nan)

    def std(self, x: Tensor, ddof: int = 1) -> Tensor:
        return (self.sum(self.deviation(x).square()) / (self.count - ddof).clamp(min=1)).sqrt()


def _best_against_second(by_tree: _Groups, value: Tensor) -> Tensor:
    position = torch.arange(value.numel(), dtype=torch.float64, device=value.device)
    is_best = value == by_tree.highest_of(value)
    first = -by_tree.highest_of(torch.where(is_best, -position, -torch.inf))
    second = by_tree.highest_of(torch.where(position == first, -torch.inf, value))
    return torch.where(position == first, value - second, 0.0)


def _whitened(deviation: Tensor, weight: Tensor, eps: float) -> Tensor:
    valid = ~deviation.isnan()
    weight, finite = torch.where(valid, weight, 0.0), torch.where(valid, deviation, 0.0)
    tokens = weight.sum()
    mean = (weight * finite).sum() / tokens
    std = ((weight * (finite - mean).square()).sum() / (tokens - 1)).sqrt()
    teaches = (tokens > 1) & (std > 0)
    return torch.where(teaches | ~valid, (deviation - mean) / (std + eps), 0.0)


def _by_subgroup(
    estimator: str, value: Tensor, by_tree: _Groups, subgroup: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Advantage of the estimators that have subgroups, and where it is 0."""
    by_pair = _Groups(_pair_rows(by_tree.row, subgroup, by_tree.highest), by_tree.highest)
    inner_flat, outer_flat = by_pair.flat(value), by_tree.flat(value)
    if estimator == "appo":
        return by_pair.deviation(value) / (by_pair.std(value, ddof=0) + eps), inner_flat
    outer = by_tree.deviation(value) / (by_tree.std(value) + eps)
    inner_flat = inner_flat & ~outer.isnan()
    if estimator == "tree_grpo":
        return by_pair.deviation(outer) / (by_pair.std(outer) + eps), inner_flat | outer_flat
    inner = by_pair.deviation(value) / (by_pair.std(value) + eps)
    return outer + torch.where(inner_flat, 0.0, inner), outer_flat


def _pair_rows(tree: Tensor, subgroup: Tensor, highest: int) -> Tensor:
    """A number in [0, L] for each leaf, equal where tree and subgroup are."""
    key, order = (tree * (highest + 1) + subgroup).sort(stable=True)
    starts = torch.cat([key[:0].new_zeros(min(1, key.numel())), (key[1:] != key[:-1]).to(torch.int64)])
    return torch.empty_like(tree).scatter_(0, order, starts.cumsum(0))


def _known(name: str, index: Tensor) -> Tensor:
    leaves = index.numel()
    known = (index >= 0) & (index < leaves)
    if index.device.type == "cpu" and not bool(known.all()):
        bad = int((~known).nonzero()[0])
        raise ValueError(
            f"group_advantages: got {name} index {int(index[bad])} at leaf {bad}; expected 0 to {leaves - 1}"
        )
    return known


def segment_advantages(
    leaf: Tensor,
    parent: Tensor,
    leaf_segment: Tensor,
    leaf_weight: Tensor | None,
    segment_entropy: Tensor | None,
    subgroup: Tensor | None,
    credit: int,
) -> tuple[Tensor, Tensor]:
    """Credit of the segments as `arpo_ext.ops.group_advantages` defines it. credit: 0 mean, 1 turn, 2 prefix."""
    segments = parent.numel()
    own = torch.arange(segments, device=parent.device)
    if parent.device.type == "cpu":
        _check_segments(parent, leaf_segment, own)
    weight = (torch.ones_like(leaf) if leaf_weight is None else leaf_weight).to(torch.float64)
    value = leaf.to(torch.float64)
    # Row S is a sink: the parent of every root, and where leaves without a known segment go.
    ends = torch.where((leaf_segment >= 0) & (leaf_segment < segments), leaf_segment, segments)
    above = torch.where((parent >= 0) & (parent < own), parent, segments)
    one = torch.ones_like(value)
    if credit == 0:
        columns = [one, value, weight * value.clamp(min=0), weight * value.clamp(max=0)]
        count, total, positive, negative = _sums_below(columns, above, ends)
        segment, pair = _ratio(total, count), torch.stack([positive, negative], dim=1)
        return segment.to(leaf.dtype), pair.to(leaf.dtype)
    if credit == 1:
        assert segment_entropy is not None
        count, rows = _sums_below([one, weight], above, ends)
        segment = _turn_values(value, count, segment_entropy.to(torch.float64), above, ends)
    else:
        assert subgroup is not None
        first = (subgroup == 0).to(torch.float64)
        later = 1 - first
        columns = [
            first,
            torch.where(later == 0, value, 0.0),
            later,
            torch.where(later == 1, value, 0.0),
            weight * first,
        ]
        initial, initial_sum, branches, branch_sum, rows = _sums_below(columns, above, ends)
        segment = _ratio(initial_sum, initial) + torch.where(initial > 0, _ratio(branch_sum, branches), 0.0)
    pair = torch.stack([rows * segment.clamp(min=0), rows * segment.clamp(max=0)], dim=1)
    return segment.to(leaf.dtype), pair.to(leaf.dtype)


def _ratio(total: Tensor, count: Tensor) -> Tensor:
    return torch.where(count > 0, total / count.clamp(min=1), 0.0)


def _sums_below(columns: list[Tensor], above: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    """Each column summed over the leaves below each segment [S]."""
    segments = above.numel()
    totals = torch.zeros(segments + 1, len(columns), dtype=torch.float64, device=above.device)
    totals = totals.index_add(0, ends, torch.stack(columns, dim=1))
    # After k rounds a segment holds everything less than 2^k generations below it.
    ancestor = torch.cat([above, above.new_full((1,), segments)])
    for _ in range(segments.bit_length()):
        totals = totals.index_add(0, ancestor[:-1], totals[:-1])
        ancestor = ancestor[ancestor]
    return totals[:-1].unbind(dim=1)


def _turn_values(value: Tensor, count: Tensor, entropy: Tensor, above: Tensor, ends: Tensor) -> Tensor:
    """Child-entropy-weighted means, one segment at a time from the last to the first."""
    segments = above.numel()
    items: list[list[tuple[float, float]]] = [[] for _ in range(segments + 1)]
    h = [*entropy.tolist(), 0.0]
    for s, v in zip(ends.tolist(), value.tolist(), strict=True):
        items[s].append((h[s], v))
    up, leads_to_a_leaf = above.tolist(), (count > 0).tolist()
    values = [0.0] * segments
    for s in reversed(range(segments)):
        if not leads_to_a_leaf[s]:
            continue
        entropies, worth = torch.tensor(items[s], dtype=torch.float64).unbind(dim=1)
        values[s] = float((entropies.softmax(0) * worth).sum())
        items[up[s]].append((h[s], values[s]))
    return torch.tensor(values, dtype=torch.float64, device=above.device)


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
