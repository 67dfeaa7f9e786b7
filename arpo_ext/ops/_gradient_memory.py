"""Memory for gradients as large as the logits, which every step allocates and drops again."""

from __future__ import annotations

import torch
from torch import Tensor

from arpo_ext.ops import _native

# What glibc's malloc keeps at most; more it maps anew every time.
_KEPT_FROM_BYTES = 32 << 20


def empty_gradient(like: Tensor) -> Tensor:
    """Contiguous, uninitialised memory of `like`'s shape, dtype and device.

    On the CPU it comes in huge pages where that helps, and large memory from what an earlier gradient left.
    """
    if like.device.type != "cpu" or _native.C is None:
        return like.new_empty(like.shape)
    if like.nbytes < _KEPT_FROM_BYTES:
        gradient = like.new_empty(like.shape)
        _native.C.prefer_huge_pages(gradient.data_ptr(), gradient.nbytes)
        return gradient
    memory = _native.C.KeptMemory(like.numel() * like.element_size())
    return torch.frombuffer(memory, dtype=like.dtype, count=like.numel()).view(like.shape)


def empty_cache() -> None:
    """Give the CPU memory that earlier gradients left back to the system; like `torch.cuda.empty_cache` on a GPU.

    The backward passes of `logprob_entropy` and `linear_logprob_entropy` keep the memory of at most two dropped
    gradients of 32 MiB or more for the next ones, because fresh memory costs several times what the gradient does. The
    system may take its pages whenever it is short of memory (MADV_FREE); calling this is rarely needed.
    """
    if _native.C is not None:
        _native.C.release_kept_memory()
