"""logprob_entropy in Triton: for GPUs that the native module does not serve. Definitions: logprob_entropy.py.

Floor: forward reads N * V elements once; backward reads and writes them once. 8192 x 151,936 bfloat16 at 4.8 TB/s:
0.52 ms and 1.04 ms. The forward loop is 13.6 instructions an element in bfloat16 for sm_90, which the device issues at
about the rate at which the elements come. Not yet measured on a GPU.

V, N, strides and temperatures are arguments at run time and none of them makes a new binary. A kernel is compiled once
for each dtype, set of inputs that are present (labels, mask, temperatures as a tensor, upstream gradients, a running
sum) and, forward, for one program per row or several; twice that if some base pointer is not aligned to 16 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arpo_ext.ops._invalid_labels import invalid_label_counter
from arpo_ext.ops._logits import LogitsCall, row_layout
from arpo_ext.ops._triton import (
    ALIGNMENT,
    INFINITY,
    LOG2E,
    LOG2E_REST,
    clamp_low,
    exp_scaled,
    exp_scales,
    expm1,
    merged,
    on_device,
    row_sums,
    storage_start,
)
from arpo_ext.ops._triton_rows import (
    MOST_PIECES,
    RUN_TIME,
    WARPS,
    finish_row,
    forward_tile,
    label_of,
    pieces_of,
    row_arguments,
    row_begin,
    temperature_of,
    write_row,
)

_PACKS_BACKWARD = 4


@triton.jit(do_not_specialize=RUN_TIME)
def forward_kernel(
    logits,
    labels,
    mask,
    temperatures,
    counter,
    logprob,
    entropy,
    stats,
    running,
    partials,
    begin: tl.int64,
    rows: tl.int64,
    vocab: tl.int32,
    inner: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    pieces: tl.int32,
    length: tl.int32,
    temperature: tl.float32,
    temperature_rest: tl.float32,
    temperature_stride: tl.int32,
    ignore_index: tl.int64,
    vocab_start: tl.int64,
    vocab_total: tl.int64,
    EXACT: tl.constexpr,
    LANES: tl.constexpr,
    PACK: tl.constexpr,
):
    """One program per row, or per piece of a row: then partials[row][piece] = (m, s, a)."""
    program = tl.program_id(0).to(tl.int64)
    row = program // pieces
    if mask is not None:  # noqa: SIM102 (decided when the kernel is compiled)
        if tl.load(mask + row) == 0:
            if (partials is None) and (running is None):
                write_row(row, rows, logprob, entropy, stats, 0.0, 0.0, 0.0, 0.0)
            return
    high, rest = temperature_of(row, temperatures, temperature_stride, temperature, temperature_rest)
    scale, scale_rest, lowest = exp_scales(high, rest)
    x_begin = row_begin(row, begin, inner, outer_stride, inner_stride)
    first = (program % pieces).to(tl.int32) * length
    size = tl.minimum(length, vocab - first)
    maximum, s, a, _, _ = row_sums(
        logits, x_begin + first, size, scale, scale_rest, lowest, EXACT, LANES, PACK, STATS=False
    )
    if partials is not None:
        tl.store(partials + 3 * program, maximum)
        tl.store(partials + 3 * program + 1, s)
        tl.store(partials + 3 * program + 2, a)
    else:
        finish_row(
            row,
            rows,
            logits + x_begin,
            labels,
            counter,
            logprob,
            entropy,
            stats,
            running,
            maximum,
            s,
            a,
            high,
            rest,
            vocab,
            vocab_start,
            vocab_total,
            ignore_index,
        )


@triton.jit(do_not_specialize=RUN_TIME)
def merge_kernel(
    logits,
    labels,
    mask,
    temperatures,
    counter,
    logprob,
    entropy,
    stats,
    running,
    partials,
    begin: tl.int64,
    rows: tl.int64,
    vocab: tl.int32,
    inner: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    pieces: tl.int32,
    temperature: tl.float32,
    temperature_rest: tl.float32,
    temperature_stride: tl.int32,
    ignore_index: tl.int64,
    vocab_start: tl.int64,
    vocab_total: tl.int64,
    PIECES: tl.constexpr,
):
    """One program per row: the pieces of the row to its results."""
    row = tl.program_id(0).to(tl.int64)
    if mask is not None:  # noqa: SIM102 (decided when the kernel is compiled)
        if tl.load(mask + row) == 0:
            if running is None:
                write_row(row, rows, logprob, entropy, stats, 0.0, 0.0, 0.0, 0.0)
            return
    high, rest = temperature_of(row, temperatures, temperature_stride, temperature, temperature_rest)
    scale, scale_rest, lowest = exp_scales(high, rest)
    piece = tl.arange(0, PIECES)
    part = partials + 3 * (row * pieces + piece)
    m = tl.load(part, mask=piece < pieces, other=-INFINITY)
    s = tl.load(part + 1, mask=piece < pieces, other=0.0)
    a = tl.load(part + 2, mask=piece < pieces, other=0.0)
    maximum, s, a, _, _ = merged(m, s, a, s, piece, scale, scale_rest, lowest)
    finish_row(
        row,
        rows,
        logits + row_begin(row, begin, inner, outer_stride, inner_stride),
        labels,
        counter,
        logprob,
        entropy,
        stats,
        running,
        maximum,
        s,
        a,
        high,
        rest,
        vocab,
        vocab_start,
        vocab_total,
        ignore_index,
    )


@triton.jit
def _write_tile(x_from, out_to, within, kept, label, of_row, EXACT: tl.constexpr, SIZE: tl.constexpr):
    """gradient = e^z (constant + slope (x - m)) for SIZE positions, except at position `label`."""
    maximum, log1p_s, mean_z, up_logprob, up_entropy, high, rest = of_row
    scale, scale_rest, lowest = exp_scales(high, rest)
    p_scale = exp_scaled(clamp_low(-log1p_s, -150.0), LOG2E, LOG2E_REST, True) / high
    constant = p_scale * (up_entropy * mean_z - up_logprob)
    slope = -p_scale * up_entropy / high
    index = tl.arange(0, SIZE)
    # Not `within & kept`: Triton's interpreter takes a comparison of single numbers for an integer there.
    x = tl.load(x_from + index, mask=tl.where(kept, within, False), other=0.0).to(tl.float32)
    d = clamp_low(x - maximum, lowest)
    gradient = exp_scaled(d, scale, scale_rest, EXACT) * tl.fma(slope, d, constant)
    if (label >= 0) & (label < SIZE):
        # The label's logit comes out of this program's own registers: in place, no other program touches it.
        at_label = index == label
        z = (tl.sum(tl.where(at_label, x, 0.0), 0) - maximum) / high
        log_p = z - log1p_s
        p = exp_scaled(clamp_low(log_p, -150.0), LOG2E, LOG2E_REST, True)
        of_entropy = tl.where(p > 0, up_entropy * p * (z - mean_z), p)
        special = (-up_logprob * expm1(log_p) - of_entropy) / high
        gradient = tl.where(at_label, special, gradient)
    tl.store(out_to + index, gradient.to(out_to.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=RUN_TIME)
def backward_kernel(
    logits,
    labels,
    mask,
    temperatures,
    stats,
    grad_logprob,
    grad_entropy,
    out,
    begin: tl.int64,
    rows: tl.int64,
    vocab: tl.int32,
    inner: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    to_begin: tl.int64,
    to_inner: tl.int64,
    to_outer_stride: tl.int64,
    to_inner_stride: tl.int64,
    tiles: tl.int32,
    temperature: tl.float32,
    temperature_rest: tl.float32,
    temperature_stride: tl.int32,
    ignore_index: tl.int64,
    vocab_start: tl.int64,
    vocab_total: tl.int64,
    EXACT: tl.constexpr,
    TILE: tl.constexpr,
    SMALL: tl.constexpr,
):
    """One program per tile of a row, tiles cut where the memory of the logits is aligned. `out` may be the logits."""
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    from_begin = row_begin(row, begin, inner, outer_stride, inner_stride)
    out_begin = row_begin(row, to_begin, to_inner, to_outer_stride, to_inner_stride)
    # Tiles count from the last aligned element at or before the row's first: `before` positions are not of the row.
    before = (from_begin % ALIGNMENT).to(tl.int32)
    first = (program % tiles).to(tl.int32) * TILE - before
    high, rest = temperature_of(row, temperatures, temperature_stride, temperature, temperature_rest)
    kept = first < vocab
    if mask is not None:
        # A row left out gets the gradient 0 * e^0: its statistics are 0, and nothing else of it is used.
        kept = tl.load(mask + row) != 0
        high = tl.where(kept, high, 1.0)
    up_logprob = 0.0
    up_entropy = 0.0
    label = tl.full([], -TILE, tl.int32)
    if grad_entropy is not None:
        up_entropy = tl.load(grad_entropy + row, mask=kept, other=0.0)
    if labels is not None:
        column, wanted, _ = label_of(row, labels, vocab, vocab_start, vocab_total, ignore_index)
        wanted = wanted & kept
        label = tl.where(kept & (column >= 0), column, -TILE)
        if grad_logprob is not None:
            up_logprob = tl.load(grad_logprob + row, mask=wanted, other=0.0)
    log1p_s = tl.load(stats + rows + row)
    mean_z = tl.load(stats + 2 * rows + row)
    of_row = (tl.load(stats + row), log1p_s, mean_z, up_logprob, up_entropy, high, rest)
    if (first >= 0) & (first + TILE <= vocab) & ((out_begin - from_begin) % ALIGNMENT == 0):
        # Said as multiples, so that the compiler makes loads and stores of 16 bytes.
        x_from = logits + (from_begin + first) // ALIGNMENT * ALIGNMENT
        out_to = out + (out_begin + first) // ALIGNMENT * ALIGNMENT
        _write_tile(x_from, out_to, tl.arange(0, TILE) < TILE, kept, label - first, of_row, EXACT, TILE)
    else:
        for part in range(first, first + TILE, SMALL):
            index = part + tl.arange(0, SMALL)
            within = (index >= 0) & (index < vocab)
            x_from = logits + from_begin + part
            _write_tile(x_from, out + out_begin + part, within, kept, label - part, of_row, EXACT, SMALL)


def _backward_tile(dtype: torch.dtype) -> dict[str, int | bool]:
    tile = _PACKS_BACKWARD * 32 * WARPS * 16 // dtype.itemsize
    return {"EXACT": dtype == torch.float32, "TILE": tile, "SMALL": 4 * 32 * WARPS}


_RESULTS = dict.fromkeys(("counter", "logprob", "entropy", "stats", "running"))


def _read(call: LogitsCall, **results: Tensor | None) -> None:
    if call.logits.numel() == 0:
        return
    arguments = {**row_arguments(call), **_RESULTS, **results}
    rows, vocab, device = arguments["rows"], arguments["vocab"], call.logits.device
    pieces, length = pieces_of(rows, vocab, device)
    arguments |= {
        "counter": None if call.labels is None else invalid_label_counter(device),
        "pieces": pieces,
        "partials": None if pieces == 1 else call.logits.new_empty((rows, pieces, 3), dtype=torch.float32),
    }
    with on_device(call.logits):
        forward_kernel[(rows * pieces,)](
            **arguments, length=length, **forward_tile(call.logits.dtype), num_warps=WARPS, enable_fp_fusion=True
        )
        if pieces > 1:
            _merge(arguments)


def _merge(arguments: dict[str, object]) -> None:
    merge_kernel[(arguments["rows"],)](**arguments, PIECES=MOST_PIECES, num_warps=1, enable_fp_fusion=True)


def merge(described: dict[str, object], running: Tensor, partials: Tensor) -> None:
    """Adds partials [N, pieces, 3] = (m, s, a) to `running`; `described` are row_arguments."""
    pieces = partials.shape[1]
    with on_device(partials):
        _merge({**described, **_RESULTS, "running": running, "partials": partials, "pieces": pieces})


def forward(call: LogitsCall, logprob: Tensor | None, entropy: Tensor, stats: Tensor | None) -> None:
    _read(call, logprob=logprob, entropy=entropy, stats=stats)


def shard_forward(call: LogitsCall, running: Tensor) -> None:
    _read(call, running=running)


def backward(
    call: LogitsCall, stats: Tensor, grad_logprob: Tensor | None, grad_entropy: Tensor | None, out: Tensor
) -> None:
    if call.logits.numel() == 0:
        return
    arguments = row_arguments(call)
    to_inner, to_outer_stride, to_inner_stride = row_layout(out)
    tile = _backward_tile(out.dtype)
    tiles = triton.cdiv(call.logits.shape[-1] + ALIGNMENT.value - 1, tile["TILE"])
    arguments |= {
        "stats": stats,
        "grad_logprob": None if grad_logprob is None else grad_logprob.contiguous(),
        "grad_entropy": None if grad_entropy is None else grad_entropy.contiguous(),
        "out": storage_start(out),
        "to_begin": out.storage_offset(),
        "to_inner": to_inner,
        "to_outer_stride": to_outer_stride,
        "to_inner_stride": to_inner_stride,
        "tiles": tiles,
    }
    with on_device(out):
        backward_kernel[(arguments["rows"] * tiles,)](**arguments, **tile, num_warps=WARPS, enable_fp_fusion=True)
