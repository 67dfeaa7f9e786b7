"""What the Triton kernels share: exponentials that keep relative accuracy, sums of a row without its arg-max, launches.

Definitions as in logprob_entropy.py: m is a row's maximum, z = (x - m) / temperature, and over all but one arg-max
s = sum of e^z, a = sum of (x - m) e^z and q = sum of e^2z. Nothing here has been measured on a GPU yet.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

INFINITY = tl.constexpr(float("inf"))
LOG2E = tl.constexpr(1.4426950216293335)  # log2(e) rounded to float32
LOG2E_REST = tl.constexpr(1.925963033500e-08)
LN2 = tl.constexpr(0.6931471805599453)
NOWHERE = tl.constexpr(2**31 - 1)  # the column of a maximum that is not there
PROPAGATE_NAN = tl.constexpr(tl.PropagateNan.ALL)

# Elements that the hot loops may rely on: every base pointer plus a multiple of this is aligned to 16 bytes.
ALIGNMENT = tl.constexpr(16)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def processors(device: torch.device) -> int:
    """How many programs run at once, in units of multiprocessors; 1 under the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 64 if device.type == "xpu" else 1


def storage_start(tensor: Tensor) -> Tensor:
    """The first element of the tensor's memory, aligned where a view into it is not; add `storage_offset()`."""
    return tensor.as_strided((1,), (1,), 0)


@triton.jit
def exp_scales(high, rest):
    """For e^(d / (high + rest)): log2(e) / temperature in two floats, and a d so low that the result is exactly 0."""
    scale = LOG2E / high
    scale_rest = (tl.fma(-scale, high, LOG2E) + LOG2E_REST - scale * rest) / high
    return scale, scale_rest, -200.0 / scale


@triton.jit
def clamp_low(d, lowest):
    """d, at least `lowest`, so that d * e^d is finite where d is -inf. NaN stays."""
    return tl.maximum(d, lowest, propagate_nan=PROPAGATE_NAN)


@triton.jit
def exp_scaled(d, scale, scale_rest, EXACT: tl.constexpr):
    """e^(d / temperature) for clamped d <= 0.

    Without EXACT the rounding of d * scale costs |d * scale| * 2^-24: nothing beside the rounding of 16-bit logits, but
    4e-6 of the entropy of a nearly certain float32 row.
    """
    t = d * scale
    e = tl.exp2(t)
    if EXACT:
        rest = tl.fma(d, scale_rest, tl.fma(d, scale, -t))
        e = tl.fma(e, rest * LN2, e)
    return e


@triton.jit
def log1p(s):
    """log(1 + s) for s >= 0 to 2 units in the last place; NaN stays."""
    u = 1.0 + s
    # u = 2^k f with f from sqrt(1/2) to sqrt(2); what rounding took from u goes back in at first order.
    bits = u.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23
    f = (bits - (k << 23)).to(tl.float32, bitcast=True)
    small = s < 0.41
    numerator = tl.where(small, s, f - 1.0)
    denominator = tl.where(small, 2.0 + s, f + 1.0)
    w = numerator / denominator
    w2 = w * w
    series = 2.0 + w2 * (2.0 / 3 + w2 * (2.0 / 5 + w2 * (2.0 / 7 + w2 * (2.0 / 9 + w2 * (2.0 / 11)))))
    correction = tl.where(small, 0.0, (s - (u - 1.0)) / u)
    result = w * series + (tl.where(small, 0.0, k.to(tl.float32)) * LN2 + correction)
    return tl.where(s < INFINITY, result, s + s)


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 0 to 2 units in the last place; NaN stays."""
    series = 1.0 + x * (1.0 / 9)
    series = 1.0 + x * (1.0 / 8) * series
    series = 1.0 + x * (1.0 / 7) * series
    series = 1.0 + x * (1.0 / 6) * series
    series = 1.0 + x * (1.0 / 5) * series
    series = 1.0 + x * (1.0 / 4) * series
    series = 1.0 + x * (1.0 / 3) * series
    series = 1.0 + x * (1.0 / 2) * series
    return tl.where(x > -0.5, x * series, exp_scaled(clamp_low(x, -100.0), LOG2E, LOG2E_REST, True) - 1.0)


@triton.jit
def lowered(maximum, lower, s, a, q, scale, scale_rest, lowest, EXACT: tl.constexpr):
    """Sums that were taken relative to `lower`, relative to `maximum` >= lower. -inf stands for no element yet."""
    base = tl.where(maximum > -INFINITY, maximum, 0.0)  # -inf - -inf would be NaN
    shift = clamp_low(lower - base, lowest)
    factor = exp_scaled(shift, scale, scale_rest, EXACT)
    return factor * s, factor * (a + shift * s), factor * factor * q


@triton.jit
def all_but_one(m, maximum, scale, scale_rest, lowest, EXACT: tl.constexpr):
    """(e, (m - maximum) e, 1 at the maximum) for maxima m that become ordinary elements; e = 0 at the maximum."""
    base = tl.where(maximum > -INFINITY, maximum, 0.0)
    d = clamp_low(m - base, lowest)
    top = m == maximum
    e = tl.where(top, 0.0, exp_scaled(d, scale, scale_rest, EXACT))
    return e, d * e, tl.where(top, 1.0, 0.0)


@triton.jit
def merged(m, s, a, q, first, scale, scale_rest, lowest):
    """(m, s, a, q, first) of a row from vectors of them, one per part of the row."""
    maximum = tl.max(m, 0)
    s, a, q = lowered(maximum, m, s, a, q, scale, scale_rest, lowest, True)
    e, d_e, tops = all_but_one(m, maximum, scale, scale_rest, lowest, True)
    # One holder of the maximum is left out; no sum ever contains it, so nothing cancels.
    others = tl.where(maximum > -INFINITY, tl.sum(tops, 0) - 1.0, 0.0)
    first = tl.min(tl.where(m == maximum, first, NOWHERE), 0)
    return maximum, tl.sum(s + e, 0) + others, tl.sum(a + d_e, 0), tl.sum(q + e * e, 0) + others, first


@triton.jit
def row_sums(
    base,
    begin,
    size,
    scale,
    scale_rest,
    lowest,
    EXACT: tl.constexpr,
    LANES: tl.constexpr,
    PACK: tl.constexpr,
    STATS: tl.constexpr,
):
    """(m, s, a, q, first) of the `size` elements from element `begin` on; `base` is aligned.

    STATS: with q = sum of e^2z and the index of the first arg-max; else neither has a meaning.

    Every position of a [LANES, PACK] tile keeps the largest element it met. The smaller of that and the next element
    is never the row's arg-max, so it goes into the sums: exact, without a comparison or a branch. A thread holds whole
    lanes and sums each relative to the lane's largest element: no exchange between threads until the row is through.
    """
    aligned = tl.cdiv(begin, ALIGNMENT) * ALIGNMENT
    head = tl.minimum((aligned - begin).to(tl.int32), size)
    body = (size - head) // ALIGNMENT * ALIGNMENT
    index = tl.arange(0, LANES)[:, None] * PACK + tl.arange(0, PACK)[None, :]
    m = tl.full([LANES, PACK], -INFINITY, tl.float32)
    reference = tl.full([LANES], -INFINITY, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    a = tl.zeros([LANES], tl.float32)
    q = tl.zeros([LANES], tl.float32)
    at = tl.zeros([LANES, PACK], tl.int32)
    tile: tl.constexpr = LANES * PACK
    pointers = base + aligned + index
    ahead = tl.load(pointers, mask=index < body, other=-INFINITY)
    for first in range(0, body, tile):
        x = ahead.to(tl.float32)
        ahead = tl.load(pointers + (first + tile), mask=index < body - (first + tile), other=-INFINITY)
        y = tl.minimum(x, m, propagate_nan=PROPAGATE_NAN)
        if STATS:
            at = tl.where(x > m, first, at)
        m = tl.maximum(x, m)
        before = reference
        reference = tl.maximum(before, tl.max(x, 1))
        s, a, q = lowered(reference, before, s, a, q, scale, scale_rest, lowest, EXACT)
        finite = tl.where(reference > -INFINITY, reference, 0.0)
        d = clamp_low(y - finite[:, None], lowest)
        e = exp_scaled(d, scale, scale_rest, EXACT)
        s += tl.sum(e, 1)
        a += tl.sum(d * e, 1)
        if STATS:
            q += tl.sum(e * e, 1)

    # At most 15 elements lie before the aligned ones and 15 after.
    few = tl.arange(0, 2 * ALIGNMENT)
    outside = tl.where(few < ALIGNMENT, few, few - ALIGNMENT + head + body)
    within = tl.where(few < ALIGNMENT, few < head, outside < size)
    ends = tl.load(base + begin + outside, mask=within, other=-INFINITY).to(tl.float32)
    maximum = tl.maximum(tl.max(tl.max(m, 1), 0), tl.max(ends, 0))
    s, a, q = lowered(maximum, reference, s, a, q, scale, scale_rest, lowest, EXACT)
    e, d_e, tops = all_but_one(m, maximum, scale, scale_rest, lowest, EXACT)
    e_ends, d_e_ends, tops_ends = all_but_one(ends, maximum, scale, scale_rest, lowest, EXACT)
    others = tl.sum(tl.sum(tops, 1), 0) + tl.sum(tops_ends, 0) - 1.0
    others = tl.where(maximum > -INFINITY, others, 0.0)
    s = tl.sum(s + tl.sum(e, 1), 0) + tl.sum(e_ends, 0) + others
    a = tl.sum(a + tl.sum(d_e, 1), 0) + tl.sum(d_e_ends, 0)
    q = tl.sum(q + tl.sum(e * e, 1), 0) + tl.sum(e_ends * e_ends, 0) + others
    at = tl.min(tl.min(tl.where(m == maximum, head + at + index, NOWHERE), 1), 0)
    at = tl.minimum(at, tl.min(tl.where(ends == maximum, outside, NOWHERE), 0))
    return maximum, s, a, q, at
