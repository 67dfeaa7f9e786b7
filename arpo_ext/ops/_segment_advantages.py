"""The registered op behind `group_advantages`' credit of segments: `arpo_ext::segment_advantages`."""

from __future__ import annotations

import torch
from torch import Tensor

from arpo_ext.ops import _native

# Codes as in csrc/segment_advantages.h.
MEAN, TURN, PREFIX = range(3)

torch.library.define(
    "arpo_ext::segment_advantages",
    "(Tensor leaf, Tensor parent, Tensor leaf_segment, Tensor? leaf_weight, Tensor? segment_entropy,"
    " Tensor? subgroup, int credit) -> (Tensor, Tensor)",
)
run = torch.ops.arpo_ext.segment_advantages


@torch.library.register_fake("arpo_ext::segment_advantages")
def _segment_advantages_fake(
    leaf: Tensor,
    parent: Tensor,
    leaf_segment: Tensor,
    leaf_weight: Tensor | None,
    segment_entropy: Tensor | None,
    subgroup: Tensor | None,
    credit: int,
) -> tuple[Tensor, Tensor]:
    segments = parent.shape[0]
    return leaf.new_empty(segments), leaf.new_empty(segments, 2)


@torch.library.impl("arpo_ext::segment_advantages", ("cpu", "cuda"))
def _segment_advantages(
    leaf: Tensor,
    parent: Tensor,
    leaf_segment: Tensor,
    leaf_weight: Tensor | None,
    segment_entropy: Tensor | None,
    subgroup: Tensor | None,
    credit: int,
) -> tuple[Tensor, Tensor]:
    segments = parent.shape[0]
    inputs = leaf, leaf_weight, segment_entropy, subgroup, parent, leaf_segment
    inputs = [None if t is None else t.contiguous() for t in inputs]
    segment, pair = leaf.new_empty(segments), leaf.new_empty(segments, 2)
    tree = _native.C.SegmentTree(*map(_native.pointer, inputs), leaf.numel(), segments)
    if _native.device_kind(leaf) == "cpu":
        _native.C.segment_advantages_cpu(credit, tree, segment.data_ptr(), pair.data_ptr())
    else:
        sums = leaf.new_empty(_native.C.segment_advantages_workspace(segments), dtype=torch.uint8)
        outputs = segment.data_ptr(), pair.data_ptr(), sums.data_ptr()
        _native.C.segment_advantages_cuda(credit, tree, *outputs, *_native.place(leaf))
    return segment, pair
