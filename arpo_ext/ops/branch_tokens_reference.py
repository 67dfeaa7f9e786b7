"""Token positions to branch at in plain torch: the definition that every other backend must match.

Runs on any device and never waits for a GPU. The last bit of a float64 sum depends on its order, which is part of the
definition: 32 partial sums, position t in sum t % 32, added up in halves.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LANES = 32
_NOWHERE = float("-inf")


def branch_tokens(
    entropy: Tensor,
    mask: Tensor | None,
    tree: Tensor,
    room: Tensor,
    value: Tensor | None,
    candidate: Tensor | None,
    key: Tensor | None,
    count: int,
    scope: str,
    min_distance: int,
    fallback: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row, token and score [R, count] of the chosen positions, as `arpo_ext.ops.branch_tokens` defines them."""
    trees = room.numel()
    known = (tree >= 0) & (tree < trees)
    if tree.device.type == "cpu" and not bool(known.all()):
        raise ValueError(f"branch_tokens: got tree index {int(tree[~known][0])}; expected 0 to {trees - 1}")
    if entropy.numel() == 0 or trees == 0 or count == 0:
        return _no_places(trees, count, entropy.device)

    order = torch.argsort(key, stable=True) if key is not None else torch.arange(len(tree), device=tree.device)
    order = order[torch.argsort(tree[order], stable=True)]
    entropy, tree, known = entropy[order], tree[order].clamp(0, trees - 1), known[order]
    value, mask, candidate = (None if t is None else t[order] for t in (value, mask, candidate))

    counted = entropy.isfinite() & known[:, None]
    counted = counted if value is None else counted & value.isfinite()
    counted = counted if mask is None else counted & mask
    z_entropy = _z_score(entropy, counted, tree, trees, scope, eps)
    z_value = torch.ones_like(entropy) if value is None else _z_score(value, counted, tree, trees, scope, eps)
    score = z_entropy * z_value + 0.0
    strict = (z_entropy > 0) & (z_value > 0) & (score > 0)
    may = counted & score.isfinite() & (strict | fallback)
    may = may if candidate is None else may & candidate
    return _choose(score, strict, may, tree, room, order, count, min_distance)


def future_value(log_ratio: Tensor, mask: Tensor | None, gamma: float, clip: float) -> Tensor:
    """[B, T] float32, as `arpo_ext.ops.future_value` defines it."""
    ratio = log_ratio.to(torch.float64)
    ratio = ratio if mask is None else torch.where(mask, ratio, 0.0)
    running = torch.zeros_like(ratio[:, :1])
    sums = []
    for column in ratio.split(1, dim=1)[::-1] if ratio.shape[1] else ():
        running = column + gamma * running
        sums.append(running)
    total = torch.cat(sums[::-1], dim=1) if sums else ratio
    value = total.clamp(-20, 20).exp().to(torch.float32)
    return value.clamp(1 - clip, 1 + clip) if clip > 0 else value


def _z_score(x: Tensor, counted: Tensor, tree: Tensor, trees: int, scope: str, eps: float) -> Tensor:
    if scope == "none":
        return torch.where(counted, x, 0.0)
    x = torch.where(counted, x, 0.0).to(torch.float64)

    def total(per_row: Tensor) -> Tensor:
        return per_row if scope == "row" else _sum_in_order(per_row, tree, trees)[tree]

    positions = total(counted.sum(1).to(torch.float64))
    mean = torch.where(positions == 0, 0.0, total(_lane_sum(x)) / positions)
    distance = torch.where(counted, x - mean[:, None], 0.0)
    deviation = (total(_lane_sum(distance * distance)) / positions).sqrt() + eps
    inverse = torch.where(deviation > 0, 1.0 / deviation, 0.0)
    return (distance * inverse[:, None]).to(torch.float32)


def _lane_sum(x: Tensor) -> Tensor:
    """Sum of each row of [B, T] in the order of the definition."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % _LANES))
    lanes = torch.zeros_like(padded[:, :_LANES])
    for part in padded.split(_LANES, dim=1):
        lanes = lanes + part
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def _sum_in_order(per_row: Tensor, tree: Tensor, trees: int) -> Tensor:
    """Sum [R] of the rows of each tree, one after the other."""
    total = torch.zeros(trees, dtype=per_row.dtype, device=per_row.device)
    for row in range(len(per_row)):
        total = total.index_add(0, tree[row : row + 1], per_row[row : row + 1])
    return total


def _choose(
    score: Tensor,
    strict: Tensor,
    may: Tensor,
    tree: Tensor,
    room: Tensor,
    order: Tensor,
    count: int,
    min_distance: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One position of every tree after the other; the rows come sorted by tree, then key, then index."""
    trees, rows = room.numel(), len(tree)
    chosen_row, chosen_token, chosen_score = _no_places(trees, count, score.device)
    position = torch.arange(score.shape[1], device=score.device)
    slots = torch.arange(rows, device=score.device)
    for place in range(count):
        best_of_row, token_of_row, class_of_row = _best(score, strict, may)
        # A strict position beats any other, so the tree looks at its best class first, then at the score in it.
        best_class = _maximum(class_of_row, tree, trees, -1)
        of_class = class_of_row == best_class[tree]
        best = _maximum(torch.where(of_class, best_of_row, _NOWHERE), tree, trees, _NOWHERE)
        leads = of_class & (class_of_row >= 0) & (best_of_row == best[tree])
        slot = torch.full((trees,), rows, device=score.device)
        slot = slot.scatter_reduce(0, tree, torch.where(leads, slots, rows), "amin")
        taken = (slot < rows) & (place < room)
        slot = torch.where(taken, slot, 0)
        token = token_of_row[slot]
        chosen_row[:, place] = torch.where(taken, order[slot], -1)
        chosen_token[:, place] = torch.where(taken, token, -1)
        chosen_score[:, place] = torch.where(taken, best, 0.0)
        is_slot = taken[tree] & (slots == slot[tree])
        may = may & ~(is_slot[:, None] & ((position - token[tree][:, None]).abs() < min_distance))
    return chosen_row, chosen_token, chosen_score


def _best(score: Tensor, strict: Tensor, may: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's best score, its first position, and its class: 1 strict, 0 other, -1 nothing left."""
    has_strict = (may & strict).any(1)
    allowed = may & (strict | ~has_strict[:, None])
    masked = torch.where(allowed, score, _NOWHERE)
    token = masked.argmax(1)  # the first of equal ones
    row_class = torch.where(has_strict, 1, torch.where(may.any(1), 0, -1))
    return masked.gather(1, token[:, None])[:, 0], token, row_class


def _maximum(values: Tensor, tree: Tensor, trees: int, least: float) -> Tensor:
    start = torch.full((trees,), least, dtype=values.dtype, device=values.device)
    return start.scatter_reduce(0, tree, values, "amax")


def _no_places(trees: int, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    row = torch.full((trees, count), -1, dtype=torch.int64, device=device)
    return row, row.clone(), torch.zeros(trees, count, device=device)
