"""logits_stats in Triton: for GPUs that the native module does not serve. Definitions: logits_stats.py.

Floor: one read of N * V elements, as of logprob_entropy_triton.py, whose row sums it shares; the sum of squares and the
column of the maximum cost three more instructions an element. Not yet measured on a GPU.

V, N, strides and temperatures are arguments at run time and none of them makes a new binary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arpo_ext.ops._invalid_labels import invalid_label_counter
from arpo_ext.ops._logits import LogitsCall
from arpo_ext.ops._triton import INFINITY, NOWHERE, exp_scales, log1p, merged, on_device, row_sums
from arpo_ext.ops._triton_rows import (
    MOST_PIECES,
    RUN_TIME,
    WARPS,
    forward_tile,
    label_of,
    pieces_of,
    row_arguments,
    row_begin,
    temperature_of,
)


@triton.jit
def _write(
    row,
    logprob,
    entropy,
    logsumexp,
    sum_p2,
    argmax,
    argmax_logprob,
    of_label,
    of_entropy,
    of_logsumexp,
    of_sum_p2,
    of_argmax,
    of_argmax_logprob,
):
    if logprob is not None:
        tl.store(logprob + row, of_label)
    tl.store(entropy + row, of_entropy)
    tl.store(logsumexp + row, of_logsumexp)
    tl.store(sum_p2 + row, of_sum_p2)
    tl.store(argmax + row, of_argmax)
    tl.store(argmax_logprob + row, of_argmax_logprob)


@triton.jit
def _finish(
    row,
    x,
    labels,
    counter,
    logprob,
    entropy,
    logsumexp,
    sum_p2,
    argmax,
    argmax_logprob,
    maximum,
    s,
    a,
    q,
    first,
    high,
    vocab,
    ignore_index,
):
    """From the sums of all columns to the results. `x` points at the row's first element."""
    column = tl.full([], -1, tl.int32)
    wanted = column >= 0
    if labels is not None:
        column, wanted, invalid = label_of(row, labels, vocab, 0, vocab, ignore_index)
        if counter is not None:
            tl.atomic_add(counter, 1, mask=invalid)
    x_label = tl.load(x + column, mask=column >= 0, other=0.0).to(tl.float32)
    valid = (tl.abs(maximum) < INFINITY) & (high == high) & (s == s)
    maximum = tl.where(valid, maximum, float("nan"))
    log1p_s = log1p(tl.where(valid, s, float("nan")))
    total = 1.0 + s
    _write(
        row,
        logprob,
        entropy,
        logsumexp,
        sum_p2,
        argmax,
        argmax_logprob,
        tl.where(wanted, (x_label - maximum) / high - log1p_s, 0.0),
        log1p_s - a / high / total,
        maximum / high + log1p_s,
        tl.where(valid, (1.0 + q) / total / total, float("nan")),
        tl.where(valid, first, -1),
        -log1p_s,
    )


@triton.jit(do_not_specialize=RUN_TIME)
def stats_kernel(
    logits,
    labels,
    mask,
    temperatures,
    counter,
    logprob,
    entropy,
    logsumexp,
    sum_p2,
    argmax,
    argmax_logprob,
    partials,
    firsts,
    begin: tl.int64,
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
    EXACT: tl.constexpr,
    LANES: tl.constexpr,
    PACK: tl.constexpr,
):
    """One program per row, or per piece of a row: then partials[row][piece] = (m, s, a, q), firsts[row][piece]."""
    program = tl.program_id(0).to(tl.int64)
    row = program // pieces
    if mask is not None:  # noqa: SIM102 (decided when the kernel is compiled)
        if tl.load(mask + row) == 0:
            if partials is None:
                _write(row, logprob, entropy, logsumexp, sum_p2, argmax, argmax_logprob, 0.0, 0.0, 0.0, 0.0, -1, 0.0)
            return
    high, rest = temperature_of(row, temperatures, temperature_stride, temperature, temperature_rest)
    scale, scale_rest, lowest = exp_scales(high, rest)
    x_begin = row_begin(row, begin, inner, outer_stride, inner_stride)
    before = (program % pieces).to(tl.int32) * length
    size = tl.minimum(length, vocab - before)
    maximum, s, a, q, first = row_sums(
        logits, x_begin + before, size, scale, scale_rest, lowest, EXACT, LANES, PACK, STATS=True
    )
    if partials is not None:
        tl.store(partials + 4 * program, maximum)
        tl.store(partials + 4 * program + 1, s)
        tl.store(partials + 4 * program + 2, a)
        tl.store(partials + 4 * program + 3, q)
        tl.store(firsts + program, before + first)
    else:
        _finish(
            row,
            logits + x_begin,
            labels,
            counter,
            logprob,
            entropy,
            logsumexp,
            sum_p2,
            argmax,
            argmax_logprob,
            maximum,
            s,
            a,
            q,
            first,
            high,
            vocab,
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
    logsumexp,
    sum_p2,
    argmax,
    argmax_logprob,
    partials,
    firsts,
    begin: tl.int64,
    vocab: tl.int32,
    inner: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    pieces: tl.int32,
    temperature: tl.float32,
    temperature_rest: tl.float32,
    temperature_stride: tl.int32,
    ignore_index: tl.int64,
    PIECES: tl.constexpr,
):
    """One program per row: the pieces of the row to its results."""
    row = tl.program_id(0).to(tl.int64)
    if mask is not None:  # noqa: SIM102 (decided when the kernel is compiled)
        if tl.load(mask + row) == 0:
            _write(row, logprob, entropy, logsumexp, sum_p2, argmax, argmax_logprob, 0.0, 0.0, 0.0, 0.0, -1, 0.0)
            return
    high, rest = temperature_of(row, temperatures, temperature_stride, temperature, temperature_rest)
    scale, scale_rest, lowest = exp_scales(high, rest)
    piece = tl.arange(0, PIECES)
    there = piece < pieces
    part = partials + 4 * (row * pieces + piece)
    m = tl.load(part, mask=there, other=-INFINITY)
    s = tl.load(part + 1, mask=there, other=0.0)
    a = tl.load(part + 2, mask=there, other=0.0)
    q = tl.load(part + 3, mask=there, other=0.0)
    first = tl.load(firsts + row * pieces + piece, mask=there, other=NOWHERE)
    maximum, s, a, q, first = merged(m, s, a, q, first, scale, scale_rest, lowest)
    _finish(
        row,
        logits + row_begin(row, begin, inner, outer_stride, inner_stride),
        labels,
        counter,
        logprob,
        entropy,
        logsumexp,
        sum_p2,
        argmax,
        argmax_logprob,
        maximum,
        s,
        a,
        q,
        first,
        high,
        vocab,
        ignore_index,
    )


def launch(call: LogitsCall, out: dict[str, Tensor | None]) -> None:
    """Writes the results, by their names in LogitsStats; logprob None: not wanted."""
    if call.logits.numel() == 0:
        return
    arguments = {**row_arguments(call), **out}
    rows, vocab, device = arguments["rows"], arguments["vocab"], call.logits.device
    pieces, length = pieces_of(rows, vocab, device)
    new = call.logits.new_empty
    arguments |= {
        "counter": None if call.labels is None else invalid_label_counter(device),
        "pieces": pieces,
        "partials": None if pieces == 1 else new((rows, pieces, 4), dtype=torch.float32),
        "firsts": None if pieces == 1 else new((rows, pieces), dtype=torch.int32),
    }
    for of_shards in ("rows", "vocab_start", "vocab_total"):
        del arguments[of_shards]
    with on_device(call.logits):
        stats_kernel[(rows * pieces,)](
            **arguments, length=length, **forward_tile(call.logits.dtype), num_warps=WARPS, enable_fp_fusion=True
        )
        if pieces > 1:
            merge_kernel[(rows,)](**arguments, PIECES=MOST_PIECES, num_warps=1, enable_fp_fusion=True)
