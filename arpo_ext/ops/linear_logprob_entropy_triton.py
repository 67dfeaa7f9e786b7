"""The sums of linear_logprob_entropy without a tile of logits in memory: products and row sums in one Triton kernel.

Work: 2 N D V operations. Few rows are bound by reading the weights, V * D elements once: 151,936 x 4096 bfloat16 at
4.8 TB/s take 0.26 ms, which a product that also writes float32 logits and reads them back exceeds by 2 N / D of it.
Many rows are bound by the products, where the vendor's are faster than Triton's. So up to `_FUSED_ROWS` rows of 16-bit
operands come here; all others go tile by tile through `_linear_tiles`, as the backward pass does always.
Not yet measured on a GPU.

N, V, temperature and softcap are arguments at run time: a kernel is compiled once for each dtype, height of a tile and
set of inputs that are present, and once more where D or a row's stride is no multiple of 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arpo_ext.ops import _linear_tiles as tiles
from arpo_ext.ops import logprob_entropy_triton as rows_triton
from arpo_ext.ops._dispatch import triton_interprets
from arpo_ext.ops._invalid_labels import invalid_label_counter
from arpo_ext.ops._linear_tiles import LinearCall
from arpo_ext.ops._shards import new_running
from arpo_ext.ops._triton import INFINITY, clamp_low, exp_scaled, exp_scales, expm1, on_device, processors
from arpo_ext.ops._triton_rows import row_arguments, temperature_of

_FUSED_ROWS = 128
_MOST_SPLITS = 256
_RUN_TIME = ("rows", "vocab", "splits", "length", "temperature", "temperature_rest", "temperature_stride")
_RUN_TIME += ("softcap", "ignore_index", "vocab_start", "vocab_total")


@triton.jit
def _soft_capped(x, softcap):
    """softcap * tanh(x / softcap), accurate also where x is small beside softcap."""
    u = x / softcap
    t = expm1(-2.0 * tl.abs(u))
    return tl.where(u < 0, softcap, -softcap) * (t / (t + 2.0))


@triton.jit
def _add_tile(x, m, s, a, scale, scale_rest, lowest):
    """(m, s, a) of rows with the elements x [rows, columns] added; one arg-max of all is in no sum."""
    here = tl.max(x, 1)
    maximum = tl.maximum(m, here)
    found = maximum > -INFINITY
    base = tl.where(found, maximum, 0.0)  # -inf - -inf would be NaN
    raised = tl.where(here > m, 1.0, 0.0)
    shift = clamp_low(m - base, lowest)
    factor = exp_scaled(shift, scale, scale_rest, True)
    # Where this tile raises the maximum, the arg-max so far becomes an ordinary element, and one of the tile's is left
    # out. Factor is 0 where there was none so far.
    others = s + raised
    d = clamp_low(x - base[:, None], lowest[:, None])
    top = x == maximum[:, None]
    e = tl.where(top, 0.0, exp_scaled(d, scale[:, None], scale_rest[:, None], True))
    ties = tl.where(found, tl.sum(tl.where(top, 1.0, 0.0), 1) - raised, 0.0)
    return maximum, factor * others + tl.sum(e, 1) + ties, factor * (a + shift * others) + tl.sum(d * e, 1)


@triton.jit(do_not_specialize=_RUN_TIME)
def fused_kernel(
    hidden,
    weight,
    bias,
    labels,
    mask,
    temperatures,
    counter,
    partials,
    running,
    rows: tl.int32,
    depth: tl.int32,
    vocab: tl.int32,
    hidden_stride: tl.int64,
    weight_stride: tl.int64,
    splits: tl.int32,
    length: tl.int32,
    temperature: tl.float32,
    temperature_rest: tl.float32,
    temperature_stride: tl.int32,
    softcap: tl.float32,
    ignore_index: tl.int64,
    vocab_start: tl.int64,
    vocab_total: tl.int64,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One program per ROWS rows and split of the vocabulary: partials[row][split] = (m, s, a).

    Programs of the same split follow each other, so that its weights come from memory once.
    """
    blocks = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    split = program // blocks
    row = (program % blocks) * ROWS + tl.arange(0, ROWS)
    kept = row < rows
    if mask is not None:
        kept = kept & (tl.load(mask + row, mask=kept, other=0) != 0)
        if tl.max(kept.to(tl.int32), 0) == 0:
            return
    # Rows and columns out of range read the last one; nothing is kept of them.
    safe_row = tl.minimum(row, rows - 1)
    high, rest = temperature_of(safe_row, temperatures, temperature_stride, temperature, temperature_rest)
    scale, scale_rest, lowest = exp_scales(tl.zeros([ROWS], tl.float32) + high, rest)
    column_of_label = tl.full([ROWS], -1, tl.int32)
    if labels is not None:
        label = tl.load(labels + safe_row)
        inside = (label >= 0) & (label < vocab_total)
        wanted = kept & (label != ignore_index)
        column = label - vocab_start
        column_of_label = tl.where(wanted & inside & (column >= 0) & (column < vocab), column, -1).to(tl.int32)
        if counter is not None:  # noqa: SIM102 (decided when the kernel is compiled)
            if (split == 0) & (vocab_start == 0):  # every shard and split sees the label
                tl.atomic_add(counter + row * 0, 1, mask=wanted & (inside == 0))

    m = tl.full([ROWS], -INFINITY, tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    a = tl.zeros([ROWS], tl.float32)
    x_label = tl.zeros([ROWS], tl.float32)
    k = tl.arange(0, DEPTH)
    a_rows = hidden + safe_row.to(tl.int64)[:, None] * hidden_stride + k[None, :]
    begin = split * length
    end = tl.minimum(begin + length, vocab)
    for first in range(begin, end, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        b_columns = weight + tl.minimum(columns, vocab - 1).to(tl.int64)[None, :] * weight_stride + k[:, None]
        x = tl.zeros([ROWS, COLUMNS], tl.float32)
        for at in range(0, depth, DEPTH):
            a_tile = tl.load(a_rows + at, mask=(k < depth - at)[None, :], other=0.0)
            b_tile = tl.load(b_columns + at, mask=(k < depth - at)[:, None], other=0.0)
            if WIDEN:
                a_tile = a_tile.to(tl.float32)
                b_tile = b_tile.to(tl.float32)
            x = tl.dot(a_tile, b_tile, x, input_precision="ieee")
        if bias is not None:
            x += tl.load(bias + columns, mask=columns < end, other=0.0).to(tl.float32)[None, :]
        if SOFTCAP:
            x = _soft_capped(x, softcap)
        x = tl.where((columns < end)[None, :], x, -INFINITY)
        x_label += tl.sum(tl.where(columns[None, :] == column_of_label[:, None], x, 0.0), 1)
        m, s, a = _add_tile(x, m, s, a, scale, scale_rest, lowest)
    part = partials + 3 * (row.to(tl.int64) * splits + split)
    tl.store(part, m, mask=kept)
    tl.store(part + 1, s, mask=kept)
    tl.store(part + 2, a, mask=kept)
    met = (column_of_label >= begin) & (column_of_label < end)
    tl.store(running + 4 * row.to(tl.int64) + 3, x_label.to(tl.float64), mask=met)


def _tile(dtype: torch.dtype, rows: int) -> dict[str, int]:
    """Positions of a program's tile and what it runs on: the largest whose logits stay in registers everywhere."""
    # Products of float32 do not run on tensor cores. The interpreter takes the bits of a bfloat16 for an integer.
    if dtype == torch.float32:
        return {"ROWS": 32, "COLUMNS": 64, "DEPTH": 32, "num_warps": 4, "num_stages": 2, "WIDEN": False}
    height = min(max(triton.next_power_of_2(rows), 16), 128)
    return {
        "ROWS": height,
        "COLUMNS": 128 if height < 128 else 64,
        "DEPTH": 64,
        "num_warps": 4 if height <= 32 else 8,
        "num_stages": 4 if height == 16 else 3,
        "WIDEN": triton_interprets(),
    }


def _splits(call: LinearCall, tile: dict[str, int]) -> tuple[int, int]:
    """(splits of the vocabulary, columns of a split): two programs for every processor."""
    blocks = triton.cdiv(call.hidden.shape[0], tile["ROWS"])
    columns = triton.cdiv(call.weight.shape[0], tile["COLUMNS"])
    wanted = min(triton.cdiv(2 * processors(call.hidden.device), blocks), columns, _MOST_SPLITS)
    length = triton.cdiv(columns, wanted)
    return triton.cdiv(columns, length), length * tile["COLUMNS"]


def fused_sums(call: LinearCall) -> Tensor:
    """`running` [N, 4] of the columns `weight` stands for, see `_shards`."""
    running = new_running(call.hidden)
    if running.numel() == 0:
        return running
    tile = _tile(call.hidden.dtype, call.hidden.shape[0])
    splits, length = _splits(call, tile)
    partials = call.hidden.new_empty((call.hidden.shape[0], splits, 3), dtype=torch.float32)
    hidden = call.hidden if call.hidden.stride(1) == 1 else call.hidden.contiguous()
    # The rows as the kernel that merges pieces of logits takes them; it reads no logits where there are no labels.
    described = row_arguments(call.rows(partials.view(len(partials), -1)))
    shared = {
        name: described[name]
        for name in ("mask", "temperatures", "temperature", "temperature_rest", "temperature_stride", "ignore_index")
    }
    with on_device(hidden):
        fused_kernel[(triton.cdiv(hidden.shape[0], tile["ROWS"]) * splits,)](
            hidden,
            call.weight,
            call.bias,
            described["labels"],
            counter=None if call.labels is None else invalid_label_counter(hidden.device),
            partials=partials,
            running=running,
            rows=hidden.shape[0],
            depth=hidden.shape[1],
            vocab=call.weight.shape[0],
            hidden_stride=hidden.stride(0),
            weight_stride=call.weight.stride(0),
            splits=splits,
            length=length,
            softcap=call.softcap,
            vocab_start=call.vocab_start,
            vocab_total=call.vocab_total,
            SOFTCAP=call.softcap != 0,
            enable_fp_fusion=True,
            **shared,
            **tile,
        )
    rows_triton.merge(described | {"labels": None}, running, partials)
    return running


def sums(call: LinearCall) -> Tensor:
    fits = call.hidden.dtype != torch.float32 and len(call.hidden) <= _FUSED_ROWS and call.weight.stride(1) == 1
    return fused_sums(call) if fits else tiles.sums("triton", call)
