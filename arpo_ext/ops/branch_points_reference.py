"""Branch points in plain torch: the definition that every other backend must match bit for bit.

Runs on any device. Each line is one rounded float32 operation or exact integer arithmetic, in the order in which the
native bodies compute it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def branch_scores(
    entropy_now: Tensor,
    entropy_root: Tensor,
    tree: Tensor,
    room: Tensor,
    key: Tensor,
    turn: Tensor,
    streak: Tensor | None,
    siblings: Tensor | None,
    value: Tensor | None,
    policy: str,
    base: float,
    weight: float,
    threshold: float,
    penalty: float,
    width: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Score [L] float32 and wished children [L] int32, as `arpo_ext.ops.branch_scores` defines them."""
    base_f32, weight_f32, threshold_f32, penalty_f32 = (
        torch.full((), value, dtype=torch.float32, device=tree.device) for value in (base, weight, threshold, penalty)
    )
    if policy == "paper":
        score = base_f32 + weight_f32 * (entropy_now - entropy_root)
        wishes = score > threshold_f32
    elif policy == "random":
        draw = uniform(seed, tree, key, turn)
        score = base_f32 - draw
        wishes = draw < base_f32
    elif policy == "reference":
        clipped = (uniform(seed, tree, key, turn) - weight_f32 * (entropy_now - entropy_root)).clamp(0, 1)
        score = base_f32 - clipped
        wishes = clipped <= base_f32
    elif policy == "aepo":
        kept = 1 - (penalty_f32 * streak.to(torch.float32)).clamp(0, 1)
        score = (base_f32 + weight_f32 * (entropy_now - entropy_root)) * kept
        wishes = score > threshold_f32
    elif policy == "at2po":
        score = entropy_now - weight_f32 * siblings.to(torch.float32)
        wishes = score.isfinite()
    elif policy == "appo":
        score = entropy_now * value
        wishes = (entropy_now > 0) & (value > 0) & (score > 0)
    elif policy == "chain":
        score = torch.zeros_like(entropy_now)
        wishes = torch.zeros_like(tree, dtype=torch.bool)
    else:
        raise ValueError(f"branch_scores: got policy {policy!r}; expected one that arpo_ext.ops.branch_points names")
    return score, wishes.to(torch.int32) * width


def uniform(seed: int, tree: Tensor, key: Tensor, turn: Tensor) -> Tensor:
    """Draw [L] in [0, 1), float32 with 24 random bits: a function of (seed, tree, key, turn) and nothing else."""
    state = _mix(torch.full_like(tree, seed) + _GOLDEN)
    for part in (tree, key, turn.to(torch.int64)):
        state = _mix((state ^ part) + _GOLDEN)
    return _shift_right(state, 40).to(torch.float32) * 2.0**-24


def branch_points(
    score: Tensor,
    wish: Tensor,
    tree: Tensor,
    room: Tensor,
    key: Tensor,
) -> Tensor:
    """Children [L] int32 granted to the wishes: per tree by score (high first), then key, then index, within room."""
    trees = room.numel()
    known = (tree >= 0) & (tree < trees)
    if tree.device.type == "cpu" and not bool(known.all()):
        raise ValueError(f"branch_points: got tree index {int(tree[~known][0])}; expected 0 to {trees - 1}")
    wish = torch.where(known, wish, 0).to(torch.int64)
    tree = torch.where(known, tree, 0)
    if trees == 0:
        return torch.zeros_like(wish, dtype=torch.int32)

    order = torch.sort(key, stable=True).indices
    # Adding zero turns -0.0 into 0.0; a radix sort would tell them apart.
    order = order[torch.sort(score[order] + 0.0, descending=True, stable=True).indices]
    order = order[torch.sort(tree[order], stable=True).indices]

    wish, tree = wish[order], tree[order]
    wished_in_tree = torch.zeros(trees, dtype=torch.int64, device=tree.device).scatter_add(0, tree, wish)
    before_tree = wished_in_tree.cumsum(0) - wished_in_tree
    before = wish.cumsum(0) - wish - before_tree[tree]
    granted = torch.minimum(wish, (room.to(torch.int64)[tree] - before).clamp(min=0))
    return torch.empty_like(granted).scatter(0, order, granted).to(torch.int32)


def _mix(state: Tensor) -> Tensor:
    """Finaliser of splitmix64 (Steele, Lea and Flood 2014); int64 products wrap as unsigned ones do."""
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    return state ^ _shift_right(state, 31)


def _shift_right(state: Tensor, bits: int) -> Tensor:
    return (state >> bits) & ((1 << (64 - bits)) - 1)
