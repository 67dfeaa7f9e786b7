"""Rows of logits as Triton kernels see them: where a row begins, its temperature and label, its results."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from arpo_ext.ops._logits import LogitsCall, row_layout
from arpo_ext.ops._triton import INFINITY, log1p, processors, storage_start

WARPS = 4
PACKS_PER_THREAD = 2  # 16-byte loads of a thread and tile forward; the next tile's are in flight meanwhile
MOST_PIECES = 256
_PROGRAMS_PER_PROCESSOR = 4  # a row is cut into pieces until the device has as many programs
_SHORTEST_PIECE = 8192

# No value of these arguments is a reason to compile a kernel again.
RUN_TIME = [
    *("begin", "rows", "vocab", "inner", "outer_stride", "inner_stride", "pieces", "length", "tiles"),
    *("to_begin", "to_inner", "to_outer_stride", "to_inner_stride", "ignore_index", "vocab_start", "vocab_total"),
    *("temperature", "temperature_rest", "temperature_stride"),
]


@triton.jit
def row_begin(row, begin, inner, outer_stride, inner_stride):
    return begin + (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def temperature_of(row, temperatures, temperature_stride, temperature, temperature_rest):
    """(high, rest); NaN where it is out of range."""
    if temperatures is not None:
        value = tl.load(temperatures + row * temperature_stride)
        return tl.where((value >= 1e-15) & (value <= 1e30), value, float("nan")), 0.0
    else:
        return temperature, temperature_rest


@triton.jit
def label_of(row, labels, vocab, vocab_start, vocab_total, ignore_index):
    """(column here or -1, whether it counts as a label, whether it is out of range)."""
    label = tl.load(labels + row)
    inside = (label >= 0) & (label < vocab_total)
    wanted = label != ignore_index
    column = label - vocab_start
    here = wanted & inside & (column >= 0) & (column < vocab)
    return tl.where(here, column, -1).to(tl.int32), wanted & inside, wanted & (inside == 0)


@triton.jit
def write_row(row, rows, logprob, entropy, stats, maximum, log1p_s, mean_z, label_logprob):
    if logprob is not None:
        tl.store(logprob + row, label_logprob)
    tl.store(entropy + row, log1p_s - mean_z)
    if stats is not None:
        tl.store(stats + row, maximum)
        tl.store(stats + rows + row, log1p_s)
        tl.store(stats + 2 * rows + row, mean_z)


@triton.jit
def _add_to_running(running, maximum, s, a, temperature, column, x_label):
    """Merges sums into running = (m, s, a, the label's logit) in float64; temperature is float64."""
    m_before = tl.load(running)
    s_before = tl.load(running + 1)
    a_before = tl.load(running + 2)
    spoiled = (maximum == INFINITY) | (s != s) | (m_before != m_before) | (temperature != temperature)
    m_here = maximum.to(tl.float64)
    raised = m_here > m_before
    high = tl.where(raised, m_here, m_before)
    low = tl.where(raised, m_before, m_here)
    s_high = tl.where(raised, s.to(tl.float64), s_before)
    a_high = tl.where(raised, a.to(tl.float64), a_before)
    # The arg-max of the lower part becomes an ordinary element. A part without any adds nothing.
    with_max = tl.where(raised, s_before, s.to(tl.float64)) + 1.0
    a_low = tl.where(raised, a_before, a.to(tl.float64))
    empty = low == -INFINITY
    drop = tl.where(empty, 0.0, low - high)
    factor = tl.where(empty, 0.0, tl.exp(drop / temperature))
    tl.store(running, tl.where(spoiled, float("nan"), high))
    tl.store(running + 1, s_high + factor * with_max)
    tl.store(running + 2, a_high + factor * (a_low + drop * with_max))
    tl.store(running + 3, x_label.to(tl.float64), mask=column >= 0)


@triton.jit
def finish_row(
    row,
    rows,
    x,
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
):
    """From the sums of all columns to the results, or into `running`. `x` points at the row's first element."""
    column = tl.full([], -1, tl.int32)
    wanted = column >= 0
    if labels is not None:
        column, wanted, invalid = label_of(row, labels, vocab, vocab_start, vocab_total, ignore_index)
        # Every shard sees the label: the first one counts it.
        if counter is not None:
            tl.atomic_add(counter, 1, mask=invalid & (vocab_start == 0))
    x_label = tl.load(x + column, mask=column >= 0, other=0.0).to(tl.float32)
    if running is not None:
        temperature = tl.cast(high, tl.float64) + rest
        _add_to_running(running + 4 * row, maximum, s, a, temperature, column, x_label)
    else:
        valid = (tl.abs(maximum) < INFINITY) & (high == high)
        maximum = tl.where(valid, maximum, float("nan"))
        log1p_s = log1p(tl.where(valid, s, float("nan")))
        mean_z = a / high / (1.0 + s)
        label_logprob = tl.where(wanted, (x_label - maximum) / high - log1p_s, 0.0)
        write_row(row, rows, logprob, entropy, stats, maximum, log1p_s, mean_z, label_logprob)


def row_arguments(call: LogitsCall) -> dict[str, object]:
    """The kernels' arguments that describe the rows."""
    layout = row_layout(call.logits)
    assert layout is not None
    labels, mask, temperatures = (
        None if t is None else t.contiguous() for t in (call.labels, call.mask, call.temperatures)
    )
    high = torch.tensor(call.temperature, dtype=torch.float32).item()
    return {
        "logits": storage_start(call.logits),
        "labels": labels,
        "mask": mask,
        "temperatures": temperatures,
        "begin": call.logits.storage_offset(),
        "rows": call.logits.numel() // call.logits.shape[-1],
        "vocab": call.logits.shape[-1],
        "inner": layout[0],
        "outer_stride": layout[1],
        "inner_stride": layout[2],
        "temperature": high,
        "temperature_rest": call.temperature - high,
        "temperature_stride": int(temperatures is not None and temperatures.dim() > 0),
        "ignore_index": call.ignore_index,
        "vocab_start": call.vocab_start,
        "vocab_total": call.vocab,
    }


def forward_tile(dtype: torch.dtype) -> dict[str, int | bool]:
    """Positions of a tile: whole packs of 16 bytes for every thread. Exponentials are exact where the logits are."""
    lanes = PACKS_PER_THREAD * 32 * WARPS
    return {"EXACT": dtype == torch.float32, "LANES": lanes, "PACK": 16 // dtype.itemsize}


def pieces_of(rows: int, vocab: int, device: torch.device) -> tuple[int, int]:
    """(pieces of a row, length of a piece): a decode step has fewer rows than the device has room for."""
    wanted = triton.cdiv(_PROGRAMS_PER_PROCESSOR * processors(device), rows)
    pieces = max(min(wanted, vocab // _SHORTEST_PIECE, MOST_PIECES), 1)
    # Whole packs, so that the pieces of an aligned row are aligned. Rounding up leaves no piece empty.
    return pieces, triton.cdiv(triton.cdiv(vocab, pieces), 16) * 16
