"""One advantage a token out of one a leaf, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def expand_rows(leaf: Tensor, mask: Tensor) -> Tensor:
    """[L] and [L, T] -> [L, T], as `arpo_ext.ops.expand_advantages` defines it."""
    wide = leaf.unsqueeze(1).expand(mask.shape)
    inside = mask != 0
    if mask.is_floating_point():
        wide = wide * mask.to(leaf.dtype)
    return torch.where(inside, wide, 0.0).contiguous()


def expand_packed(leaf: Tensor, length: Tensor, total: int) -> Tensor:
    """[L] and [L] -> [total], as `arpo_ext.ops.expand_advantages` defines it."""
    if length.device.type == "cpu":
        if bool((length < 0).any()):
            index = int((length < 0).nonzero()[0])
            raise ValueError(f"expand_advantages: got length {int(length[index])} of leaf {index}; expected at least 0")
        if int(length.sum()) != total:
            raise ValueError(
                f"expand_advantages: got total {total}; expected {int(length.sum())}, the sum of the lengths"
            )
    token = torch.arange(total, device=leaf.device)
    owner = torch.searchsorted(length.clamp(min=0).cumsum(0), token, right=True)
    return torch.cat([leaf, leaf.new_zeros(1)])[owner]
