"""Memory for results as large as the logits or a batch's tokens, which every step allocates and drops again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from arpo_ext.ops import _native

# Below it malloc usually serves from memory whose pages are there.
_KEPT_FROM_BYTES = 4 << 20


def empty_result(shape: Sequence[int], like: Tensor) -> Tensor:
    """Contiguous, uninitialised memory of the dtype and device of `like`.

    On the CPU large memory comes from what an earlier result left, or fresh, in huge pages where those help.
    """
    count = math.prod(shape)
    size = count * like.element_size()
    if size < _KEPT_FROM_BYTES or like.device.type != "cpu" or _native.C is None:
        return like.new_empty(shape)
    return torch.frombuffer(_native.C.KeptMemory(size), dtype=like.dtype, count=count).view(*shape)


def empty_cache() -> None:
    """Give the CPU memory that earlier results left back to the system; like `torch.cuda.empty_cache` on a GPU.

    The gradients of `logprob_entropy` and `linear_logprob_entropy` and the result of `expand_advantages` take the place
    of dropped ones, of which up to four of 4 MiB or more are kept, because fresh memory costs several times what
    filling it does. The system may take the pages of those above 32 MiB whenever it is short of memory (MADV_FREE);
    calling this is rarely needed.
    """
    if _native.C is not None:
        _native.C.release_kept_memory()
