"""From one advantage a leaf to one a token, in rows or packed, and from names of groups to numbers.

    expand_advantages(leaf, mask)             torch.where(mask != 0, leaf[:, None], 0), times mask if that is a float
    expand_advantages(leaf, length=length)    torch.repeat_interleave(leaf, length)

With `group_advantages` this is what trainers compute from rewards [L, T], a mask [L, T] and a name a row:

    tree = first_occurrences(names)
    leaf = group_advantages(token_reward.sum(dim=-1), tree, estimator="grpo").leaf
    advantage = expand_advantages(leaf, mask)

No gradient: advantages are constants of the loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable

import numpy as np
import torch
from torch import Tensor

from arpo_ext.ops import _native
from arpo_ext.ops import expand_advantages_reference as reference
from arpo_ext.ops._dispatch import CPU_BACKENDS, Backend, choose, refuse_cuda
from arpo_ext.ops._result_memory import empty_result

# Codes as in csrc/expand_advantages.h. Masks of other types are converted first.
_MASKS = {
    torch.bool: 0,
    torch.uint8: 0,
    torch.int8: 0,
    torch.int32: 1,
    torch.int64: 2,
    torch.float32: 3,
}


def expand_advantages(
    leaf: Tensor,
    mask: Tensor | None = None,
    *,
    length: Tensor | None = None,
    total: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Advantages of tokens, [L, T] by mask or [N] by length; one pass, in the dtype of `leaf`.

    leaf: [L] float32 (float64: by the reference).
    mask: [L, T], bool, integer or floating point, rows at any distance. A token with mask 0 gets 0 even from a NaN;
        another one gets the advantage of its row, times the mask if that is floating point.
    length: [L] int64, tokens of each leaf; the tokens of leaf l follow those of leaf l - 1.
    total: N, the sum of length. On the CPU it is found if not given; on a GPU that would have to wait for the GPU, and
        under torch.compile for the values.

    ValueError: neither or both of mask and length, shape, dtype or device is wrong, or (on the CPU) a length is
    negative or total is not the sum. On a GPU a negative length counts as 0, tokens past the last leaf get 0 and leaves
    past total none. BackendError: the backend named cannot serve.
    """
    if (mask is None) == (length is None):
        got = "neither" if mask is None else "both"
        raise ValueError(f"expand_advantages: got {got} of mask and length; expected one of them")
    if leaf.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expand_advantages: got leaf of {leaf.dtype}; expected torch.float32 or torch.float64")
    if leaf.ndim != 1:
        raise ValueError(f"expand_advantages: got leaf of shape {list(leaf.shape)}; expected one dimension")
    leaves, device = leaf.shape[0], leaf.device
    other, name = (mask, "mask") if mask is not None else (length, "length")
    if other.device != device:
        raise ValueError(f"expand_advantages: got {name} on {other.device}; expected {device}, where leaf is")
    if mask is not None:
        if mask.ndim != 2 or mask.shape[0] != leaves:
            raise ValueError(f"expand_advantages: got mask of shape {list(mask.shape)}; expected [{leaves}, T]")
        if mask.is_complex():
            raise ValueError(f"expand_advantages: got mask of {mask.dtype}; expected bool, integer or floating point")
        return choose("expand_advantages", _ROWS, backend, leaf).run(leaf.detach(), mask.detach())
    if length.dtype != torch.int64 or length.shape != leaf.shape:
        raise ValueError(
            f"expand_advantages: got length of {length.dtype} and shape {list(length.shape)}; "
            f"expected torch.int64 and [{leaves}]"
        )
    if total is None:
        if device.type != "cpu":
            raise ValueError("expand_advantages: got no total; expected the sum of length, which is not read off a GPU")
        total = int(length.sum())
    if total < 0:
        raise ValueError(f"expand_advantages: got total {total}; expected at least 0")
    return choose("expand_advantages", _PACKED, backend, leaf).run(leaf.detach(), length, total)


def first_occurrences(names: Iterable[Hashable]) -> Tensor:
    """[L] int64 on the CPU: for each name the position at which it first occurs, a group number below L.

    names: anything hashable, such as the uuids that trainers give to the rows of a prompt.
    """
    return torch.from_numpy(np.fromiter(map({}.setdefault, names, itertools.count()), np.int64))


def _refuse_cpu(isa: str):
    def refuse(leaf: Tensor) -> str | None:
        reason = _native.cpu_missing(isa)
        if reason is None and leaf.device.type != "cpu":
            reason = f"needs CPU tensors, got them on {leaf.device}"
        if reason is None and leaf.dtype != torch.float32:
            reason = f"needs float32, got {leaf.dtype}"
        return reason

    return refuse


def _refuse_cuda(leaf: Tensor) -> str | None:
    if _native.device_kind(leaf) == "cuda" and leaf.dtype != torch.float32:
        return f"needs float32, got {leaf.dtype}"
    return refuse_cuda(leaf)


torch.library.define("arpo_ext::expand_advantages", "(Tensor leaf, Tensor mask, int isa) -> Tensor")
torch.library.define(
    "arpo_ext::expand_packed_advantages", "(Tensor leaf, Tensor length, SymInt total, int isa) -> Tensor"
)


def _table(op: object, reference_run: object) -> dict[str, Backend]:
    def run(isa: str):
        return lambda *inputs: op(*inputs, _native.ISA_CODES.get(isa, -1))

    table = {name: Backend(_refuse_cpu(isa), run(isa)) for name, isa in CPU_BACKENDS.items()}
    table["cuda"] = Backend(_refuse_cuda, run("best"))
    table["reference"] = Backend(lambda leaf: None, reference_run)
    return table


_ROWS = _table(torch.ops.arpo_ext.expand_advantages, reference.expand_rows)
_PACKED = _table(torch.ops.arpo_ext.expand_packed_advantages, reference.expand_packed)


@torch.library.register_fake("arpo_ext::expand_advantages")
def _expand_rows_fake(leaf: Tensor, mask: Tensor, isa: int) -> Tensor:
    return leaf.new_empty(mask.shape)


@torch.library.register_fake("arpo_ext::expand_packed_advantages")
def _expand_packed_fake(leaf: Tensor, length: Tensor, total: int, isa: int) -> Tensor:
    return leaf.new_empty(total)


@torch.library.impl("arpo_ext::expand_advantages", ("cpu", "cuda"))
def _expand_rows(leaf: Tensor, mask: Tensor, isa: int) -> Tensor:
    if mask.dtype not in _MASKS:
        mask = mask.to(torch.float32) if mask.is_floating_point() else mask != 0
    if mask.stride(1) != 1:
        mask = mask.contiguous()
    leaf = leaf.contiguous()
    out = empty_result(mask.shape, leaf)
    cpu = _native.device_kind(leaf) == "cpu"
    threads = torch.get_num_threads() if cpu else 1
    shape = _MASKS[mask.dtype], mask.stride(0), *mask.shape
    call = _native.C.ExpandRows(leaf.data_ptr(), mask.data_ptr(), *shape, out.data_ptr(), threads)
    if cpu:
        _native.C.expand_rows(isa, call)
    else:
        _native.C.expand_rows_cuda(call, *_native.place(leaf))
    return out


@torch.library.impl("arpo_ext::expand_packed_advantages", ("cpu", "cuda"))
def _expand_packed(leaf: Tensor, length: Tensor, total: int, isa: int) -> Tensor:
    leaf = leaf.contiguous()
    out = empty_result((total,), leaf)
    if _native.device_kind(leaf) == "cpu":
        sizes = length.contiguous(), leaf.numel(), total, out
        lengths, *sizes = (x.data_ptr() if isinstance(x, Tensor) else x for x in sizes)
        _native.C.expand_packed(isa, leaf.data_ptr(), lengths, *sizes, torch.get_num_threads())
    else:
        end = length.clamp(min=0).cumsum(0)
        sizes = leaf.numel(), total, out.data_ptr()
        _native.C.expand_packed_cuda(leaf.data_ptr(), end.data_ptr(), *sizes, *_native.place(leaf))
    return out
