"""Advantages of the leaves of rollout trees, and their attribution to the segments that leaves share.

With r the rewards of one tree, n of them, each leaf gets

    grpo     (r - mean(r)) / (std(r) + eps)     unbiased std (GRPO, arXiv 2402.03300; with this std as in verl)
    dr_grpo  r - mean(r)                        (Dr. GRPO, arXiv 2503.20783)
    rloo     r - mean of the other leaves       (RLOO, arXiv 2402.14740)
    none     r

and 0 (but for `none`) where the tree has one leaf or all its rewards are equal. A segment gets, over the leaves below
it (those whose path holds it), A being their advantages and w their weights,

    segment       mean(A)                                          "hard" credit of ARPO, arXiv 2507.19849
    segment_pair  [sum(w * max(A, 0)), sum(w * min(A, 0))]         exact under clipping: see `policy_loss`

A NaN, or an infinity among other rewards, makes its own tree NaN and no other. Statistics are float64. Nothing waits
for the GPU, and a group may have any size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from arpo_ext.ops import _native
from arpo_ext.ops import group_advantages_reference as reference
from arpo_ext.ops._dispatch import Backend, choose, refuse_cuda

# Codes as in csrc/group_advantages.h.
ESTIMATORS = {"grpo": 0, "dr_grpo": 1, "rloo": 2, "none": 3}


class Advantages(NamedTuple):
    """leaf [L]; segment [S] and segment_pair [S, 2], None if no tree of segments was given."""

    leaf: Tensor
    segment: Tensor | None
    segment_pair: Tensor | None


def group_advantages(
    reward: Tensor,
    tree: Tensor,
    *,
    estimator: str = "grpo",
    parent: Tensor | None = None,
    leaf_segment: Tensor | None = None,
    leaf_weight: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Advantages:
    """Advantages of L leaves and, given `parent` and `leaf_segment`, of the S segments above them.

    reward: [L] float32 (float64: computed and returned in float64, by the reference).
    tree: [L] int64 in [0, L), in any order: leaves with equal numbers form one group.
    parent: [S] int64, each smaller than its own index, -1 for a root. One forest may hold the segments of many trees.
    leaf_segment: [L] int64 in [0, S), the last segment of each leaf's path.
    leaf_weight: [L] like reward, at least 0, default 1; it enters `segment_pair` only.

    A segment above no leaf gets zeros. ValueError: shape, dtype, device, estimator or (on the CPU) an index is wrong.
    On a GPU, a leaf with a tree index out of range gets 0; one with a segment out of range counts for no segment.
    BackendError: the backend named cannot serve.
    """
    leaves, device = reward.numel(), reward.device
    if reward.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"group_advantages: got reward of {reward.dtype}; expected torch.float32 or torch.float64")
    _check("reward", reward, reward.dtype, None, device)
    _check("tree", tree, torch.int64, leaves, device)
    if estimator not in ESTIMATORS:
        raise ValueError(f"group_advantages: got estimator {estimator!r}; expected {', '.join(ESTIMATORS)}")
    if (parent is None) != (leaf_segment is None):
        missing = "parent" if parent is None else "leaf_segment"
        raise ValueError(f"group_advantages: got no {missing}; expected parent and leaf_segment, or neither")
    if not eps >= 0:
        raise ValueError(f"group_advantages: got eps {eps}; expected at least 0")
    leaf = choose("group_advantages", _LEAVES, backend, reward).run(reward, tree, ESTIMATORS[estimator], float(eps))
    if parent is None or leaf_segment is None:
        return Advantages(leaf, None, None)
    _check("parent", parent, torch.int64, None, device)
    _check("leaf_segment", leaf_segment, torch.int64, leaves, device)
    if leaf_weight is not None:
        _check("leaf_weight", leaf_weight, reward.dtype, leaves, device)
    chosen = choose("group_advantages", _SEGMENTS, backend, reward)
    return Advantages(leaf, *chosen.run(leaf, parent, leaf_segment, leaf_weight))


def _check(name: str, tensor: Tensor, dtype: torch.dtype, size: int | None, device: torch.device) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"group_advantages: got {name} of {tensor.dtype}; expected {dtype}")
    if tensor.ndim != 1 or (size is not None and tensor.numel() != size):
        expected = "one dimension" if size is None else f"[{size}]"
        raise ValueError(f"group_advantages: got {name} of shape {list(tensor.shape)}; expected {expected}")
    if tensor.device != device:
        raise ValueError(f"group_advantages: got {name} on {tensor.device}; expected {device}, where reward is")


def _refuse_cpu(reward: Tensor) -> str | None:
    if reward.device.type != "cpu":
        return f"needs CPU tensors, got them on {reward.device}"
    if reward.dtype != torch.float32:
        return f"needs float32, got {reward.dtype}"
    return _native.cpu_missing()


def _refuse_cuda(reward: Tensor) -> str | None:
    if _native.device_kind(reward) == "cuda" and reward.dtype != torch.float32:
        return f"needs float32, got {reward.dtype}"
    return refuse_cuda(reward)


def _reference_leaves(reward: Tensor, tree: Tensor, estimator: int, eps: float) -> Tensor:
    name = next(name for name, code in ESTIMATORS.items() if code == estimator)
    return reference.group_advantages(reward, tree, estimator=name, eps=eps)


torch.library.define("arpo_ext::group_advantages", "(Tensor reward, Tensor tree, int estimator, float eps) -> Tensor")
torch.library.define(
    "arpo_ext::segment_advantages",
    "(Tensor leaf, Tensor parent, Tensor leaf_segment, Tensor? leaf_weight) -> (Tensor, Tensor)",
)

_LEAVES = {
    "cpu": Backend(_refuse_cpu, torch.ops.arpo_ext.group_advantages),
    "cuda": Backend(_refuse_cuda, torch.ops.arpo_ext.group_advantages),
    "reference": Backend(lambda reward: None, _reference_leaves),
}
_SEGMENTS = {
    "cpu": Backend(_refuse_cpu, torch.ops.arpo_ext.segment_advantages),
    "cuda": Backend(_refuse_cuda, torch.ops.arpo_ext.segment_advantages),
    "reference": Backend(lambda reward: None, reference.segment_advantages),
}


@torch.library.register_fake("arpo_ext::group_advantages")
def _group_advantages_fake(reward: Tensor, tree: Tensor, estimator: int, eps: float) -> Tensor:
    return torch.empty_like(reward, memory_format=torch.contiguous_format)


@torch.library.register_fake("arpo_ext::segment_advantages")
def _segment_advantages_fake(
    leaf: Tensor, parent: Tensor, leaf_segment: Tensor, leaf_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    segments = parent.shape[0]
    return leaf.new_empty(segments), leaf.new_empty(segments, 2)


@torch.library.impl("arpo_ext::group_advantages", ("cpu", "cuda"))
def _group_advantages(reward: Tensor, tree: Tensor, estimator: int, eps: float) -> Tensor:
    reward, tree = reward.contiguous(), tree.contiguous()
    leaf = torch.empty_like(reward)
    call = _native.C.group_advantages_cpu if _native.device_kind(reward) == "cpu" else _native.C.group_advantages_cuda
    sizes_and_addresses = reward.data_ptr(), tree.data_ptr(), reward.numel(), leaf.data_ptr()
    call(estimator, eps, *sizes_and_addresses, *_native.place(reward))
    return leaf


@torch.library.impl("arpo_ext::segment_advantages", ("cpu", "cuda"))
def _segment_advantages(
    leaf: Tensor, parent: Tensor, leaf_segment: Tensor, leaf_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    segments = parent.shape[0]
    inputs = [None if t is None else t.contiguous() for t in (leaf, leaf_weight, parent, leaf_segment)]
    segment, pair = leaf.new_empty(segments), leaf.new_empty(segments, 2)
    tree = _native.C.SegmentTree(*map(_native.pointer, inputs), leaf.numel(), segments)
    if _native.device_kind(leaf) == "cpu":
        _native.C.segment_advantages_cpu(tree, segment.data_ptr(), pair.data_ptr())
    else:
        totals = leaf.new_empty(segments, 4, dtype=torch.float64)
        outputs = segment.data_ptr(), pair.data_ptr(), totals.data_ptr()
        _native.C.segment_advantages_cuda(tree, *outputs, *_native.place(leaf))
    return segment, pair
