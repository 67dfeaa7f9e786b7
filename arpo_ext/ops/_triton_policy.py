"""Arithmetic of the policy loss in Triton: clips, the token's terms, the ratios that groups of tokens share.

Definitions: policy_loss.py. Every number of a call is an argument at run time; the clip, the kind of KL and which
inputs there are belong to the kernel. Not yet measured on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from arpo_ext.ops._triton import LOG2E, LOG2E_REST, clamp_low, exp_scaled

# Codes as in _policy_loss_op.py, and the rows of the partial sums as in csrc/policy_loss.h: PolicyLossSums, then the
# objective.
GPPO = tl.constexpr(1)
CISPO = tl.constexpr(2)
SAPO = tl.constexpr(3)
ROWS = 17
BOUND = tl.constexpr(20.0)
NUMBERS = [
    *("count", "groups", "leaves", "columns", "column", "normalizer", "kl_coef", "entropy_coef"),
    *("low", "high", "dual", "tau_positive", "tau_negative"),
]


@triton.jit
def number_of(tensor, number):
    """A number given as such, or as the address of one on the device."""
    if tensor is not None:
        return tl.load(tensor).to(tl.float64)
    else:
        return tl.cast(number, tl.float64)


@triton.jit
def clip_numbers_of(numbers, low, high, dual, tau_positive, tau_negative):
    """low, high, dual and both tau of a clip, as given or from the five numbers on the device, see PolicyLossCall."""
    if numbers is not None:
        low = (1.0 - tl.load(numbers)).to(tl.float32)
        high = (1.0 + tl.load(numbers + 1)).to(tl.float32)
        dual = tl.load(numbers + 2).to(tl.float32)
        tau_positive = tl.load(numbers + 3).to(tl.float32)
        tau_negative = tl.load(numbers + 4).to(tl.float32)
    return low, high, dual, tau_positive, tau_negative


@triton.jit
def exponential(x):
    return exp_scaled(x, LOG2E, LOG2E_REST, True)


@triton.jit
def guarded(x):
    """x within [-20, 20]; NaN falls through."""
    return tl.where(x > BOUND, BOUND, tl.where(x < -BOUND, -BOUND, x))


@triton.jit
def above_line(v, r):
    """e^v - 1 - v for |v| <= 20, without cancellation near 0; r is e^v."""
    p = 1.3981999507e-3 + v * 1.9875691500e-4
    p = 8.3334519073e-3 + v * p
    p = 4.1665795894e-2 + v * p
    p = 1.6666665459e-1 + v * p
    p = 5.0000001201e-1 + v * p
    return tl.where(tl.abs(v) < 0.34, p * (v * v), r - 1.0 - v)


@triton.jit
def _soft_gate(r, tau):
    """4 / tau * sigmoid(t) and its derivative in log r, with t = tau * (r - 1)."""
    t = tau * (r - 1.0)
    e = exponential(clamp_low(-tl.abs(t), -120.0))
    inverse = 1.0 / (1.0 + e)
    return 4.0 / tau * tl.where(t < 0.0, e * inverse, inverse), 4.0 * e * inverse * inverse * r


@triton.jit
def ratio_at(mean, low, high, dual, tau_positive, tau_negative, CLIP: tl.constexpr):
    """(r, above, its slope in log r, below, its slope) at a mean log ratio; no slope beyond the guard but for cispo."""
    g = guarded(mean)
    r = exponential(g)
    if CLIP == SAPO:
        above, above_slope = _soft_gate(r, tau_positive)
        below, below_slope = _soft_gate(r, tau_negative)
    elif CLIP == CISPO:
        above = tl.where(r > high, high, tl.where(r < low, low, r))
        above_slope = above
        below = above
        below_slope = above
    else:
        over = r > high
        beyond = (r < low) | (r > dual)
        above = tl.where(over, high, r)
        below = tl.where(r < low, low, tl.where(r > dual, dual, r))
        below_slope = tl.where(beyond, 0.0, r)
        above_slope = tl.where(over, high if CLIP == GPPO else 0.0, r)
    if CLIP != CISPO:
        outside = (mean > BOUND) | (mean < -BOUND)
        above_slope = tl.where(outside, 0.0, above_slope)
        below_slope = tl.where(outside, 0.0, below_slope)
    return r, above, above_slope, below, below_slope


@triton.jit
def clip_counts(r, weight, positive, negative, low, high, dual, CLIP: tl.constexpr):
    """Weights where the ratio lies above `high`, below `low` and above `dual`, of advantages of the sign it clips."""
    if CLIP == SAPO:
        none = weight * 0.0
        return none, none, none
    else:
        falls = negative < 0.0
        far = tl.where(falls & (r > dual), weight, 0.0)
        if CLIP == CISPO:
            return tl.where(r > high, weight, 0.0), tl.where(r < low, weight, 0.0), far
        else:
            over = tl.where((positive > 0.0) & (r > high), weight, 0.0)
            return over, tl.where(falls & (r < low), weight, 0.0), far


@triton.jit
def larger(value):
    """The largest one; NaN if any is."""
    largest = tl.max(value, 0)
    spoiled = tl.max((value != value).to(tl.int32), 0)
    return tl.where(spoiled > 0, float("nan"), largest)


@triton.jit
def load_advantages(advantage, importance, t, within, trained, weight, PAIRS: tl.constexpr):
    """(positive, negative): the weighted advantage by sign; 0 for tokens that are not trained."""
    if PAIRS:
        both = tl.load(advantage + 2 * t[:, None] + tl.arange(0, 2)[None, :], mask=within[:, None], other=0.0)
        positive, negative = tl.split(both)
        positive = tl.where(trained, positive, 0.0)
        negative = tl.where(trained, negative, 0.0)
    else:
        weighted = tl.where(trained, tl.load(advantage + t, mask=within, other=0.0), 0.0) * weight
        # Comparisons are arranged so that NaN stays.
        positive = tl.where(weighted < 0.0, 0.0, weighted)
        negative = tl.where(weighted > 0.0, 0.0, weighted)
    if importance is not None:
        factor = tl.where(trained, tl.load(importance + t, mask=within, other=0.0), 0.0)
        positive = positive * factor
        negative = negative * factor
    return positive, negative


@triton.jit(do_not_specialize=NUMBERS)
def bounds_kernel(weight, group, bounds, misplaced, count: tl.int64, groups: tl.int64, BLOCK: tl.constexpr):
    """bounds[g] = (count - first token, last token + 1) of group g, or (0, 0). Only the ends of runs touch memory."""
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    within = t < count
    here = tl.load(group + t, mask=within, other=-1).to(tl.int64)
    before = tl.load(group + t - 1, mask=within & (t > 0), other=-1).to(tl.int64)
    after = tl.load(group + t + 1, mask=t + 1 < count, other=-1).to(tl.int64)
    inside = within & (here >= 0) & (here < groups)
    trained = tl.load(weight + t, mask=within, other=0.0) != 0.0
    tl.atomic_max(misplaced + t * 0, 1, mask=within & trained & (inside == 0))
    tl.atomic_max(bounds + 2 * here, count - t, mask=inside & (here != before))
    tl.atomic_max(bounds + 2 * here + 1, t + 1, mask=inside & (here != after))


@triton.jit(do_not_specialize=NUMBERS)
def groups_kernel(
    logprob,
    old_logprob,
    advantage,
    weight,
    importance,
    group,
    bounds,
    segments,
    ratios,
    normalizer_tensor,
    clip_numbers,
    count: tl.int64,
    groups: tl.int64,
    normalizer: tl.float32,
    low: tl.float32,
    high: tl.float32,
    dual: tl.float32,
    tau_positive: tl.float32,
    tau_negative: tl.float32,
    CLIP: tl.constexpr,
    PAIRS: tl.constexpr,
    MEAN_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per group: ratios[6][groups], or for packed paths segments[3][groups] = sums of x, 1 and logprob.

    Each group is read between its first and last token, in an order that depends on the tokens alone.
    """
    low, high, dual, tau_positive, tau_negative = clip_numbers_of(
        clip_numbers, low, high, dual, tau_positive, tau_negative
    )
    g = tl.program_id(0).to(tl.int64)
    first = count - tl.load(bounds + 2 * g)
    end = tl.load(bounds + 2 * g + 1)
    x = tl.zeros([BLOCK], tl.float64)
    number = tl.zeros([BLOCK], tl.float64)
    text = tl.zeros([BLOCK], tl.float64)
    ups = tl.zeros([BLOCK], tl.float64)
    downs = tl.zeros([BLOCK], tl.float64)
    for begin in range(first, end, BLOCK):
        t = begin + tl.arange(0, BLOCK)
        within = t < end
        w = tl.load(weight + t, mask=within, other=0.0)
        trained = within & (w != 0.0) & (tl.load(group + t, mask=within, other=-1) == g)
        value = tl.load(logprob + t, mask=trained, other=0.0)
        x += (value - tl.load(old_logprob + t, mask=trained, other=0.0)).to(tl.float64)
        number += tl.where(trained, 1.0, 0.0).to(tl.float64)
        if segments is not None:
            text += value.to(tl.float64)
        elif MEAN_GRADIENT:
            up, down = load_advantages(advantage, importance, t, within, trained, w, PAIRS)
            ups += up.to(tl.float64)
            downs += down.to(tl.float64)
    total = tl.sum(x, 0)
    tokens = tl.sum(number, 0)
    if segments is not None:
        tl.store(segments + g, total)
        tl.store(segments + groups + g, tokens)
        tl.store(segments + 2 * groups + g, tl.sum(text, 0))
    else:
        mean = (total / tl.maximum(tokens, 1.0)).to(tl.float32)
        r, above, above_slope, below, below_slope = ratio_at(mean, low, high, dual, tau_positive, tau_negative, CLIP)
        slope = tl.sum(ups, 0) * above_slope + tl.sum(downs, 0) * below_slope
        gradient = -slope / (tl.maximum(tokens, 1.0) * number_of(normalizer_tensor, normalizer))
        tl.store(ratios + g, r)
        tl.store(ratios + groups + g, above)
        tl.store(ratios + 2 * groups + g, above_slope)
        tl.store(ratios + 3 * groups + g, below)
        tl.store(ratios + 4 * groups + g, below_slope)
        tl.store(ratios + 5 * groups + g, gradient.to(tl.float32))


@triton.jit
def _segment_above(s, parent, misplaced, there):
    """The segments above s on their paths, -1 above a root. What is no parent counts as misplaced and ends the path."""
    above = tl.load(parent + s, mask=there, other=-1)
    valid = (above >= -1) & (above < s)
    if misplaced is not None:
        tl.atomic_max(misplaced + s * 0, 1, mask=there & (valid == 0))
    return tl.where(there & valid, above, -1)


@triton.jit(do_not_specialize=NUMBERS)
def leaves_kernel(
    advantage,
    leaf_weight,
    leaf_segment,
    parent,
    segments,
    misplaced,
    leaf_slope,
    partials,
    clip_numbers,
    groups: tl.int64,
    leaves: tl.int64,
    columns: tl.int64,
    column: tl.int64,
    low: tl.float32,
    high: tl.float32,
    dual: tl.float32,
    tau_positive: tl.float32,
    tau_negative: tl.float32,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK leaves of packed paths: the ratio over each path, its share of the sums, and the slope of its tokens."""
    low, high, dual, tau_positive, tau_negative = clip_numbers_of(
        clip_numbers, low, high, dual, tau_positive, tau_negative
    )
    leaf = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    within = leaf < leaves
    s = tl.load(leaf_segment + leaf, mask=within, other=-1)
    placed = within & (s >= 0) & (s < groups)
    tl.atomic_max(misplaced + s * 0, 1, mask=within & (placed == 0))
    s = tl.where(placed, s, -1)
    x = tl.zeros([BLOCK], tl.float64)
    tokens = tl.zeros([BLOCK], tl.float64)
    text = tl.zeros([BLOCK], tl.float64)
    while tl.max(s, 0) >= 0:
        there = s >= 0
        x += tl.load(segments + s, mask=there, other=0.0)
        tokens += tl.load(segments + groups + s, mask=there, other=0.0)
        text += tl.load(segments + 2 * groups + s, mask=there, other=0.0)
        s = _segment_above(s, parent, misplaced, there)
    w = tl.where(placed, 1.0, 0.0)
    if leaf_weight is not None:
        w = tl.load(leaf_weight + leaf, mask=placed, other=0.0)
    used = (tokens > 0.0) & (w != 0.0)
    weighted = tl.where(used, w * tl.load(advantage + leaf, mask=used, other=0.0), 0.0)
    positive = tl.where(weighted < 0.0, 0.0, weighted)
    negative = tl.where(weighted > 0.0, 0.0, weighted)
    mean = tl.where(used, x / tl.maximum(tokens, 1.0), 0.0).to(tl.float32)
    r, above, above_slope, below, below_slope = ratio_at(mean, low, high, dual, tau_positive, tau_negative, CLIP)
    objective = (positive * above + negative * below).to(tl.float64) * (text if CLIP == CISPO else tokens)
    mass = tl.where(used, w.to(tl.float64) * tokens, 0.0)
    over, under, far = clip_counts(r, mass, positive, negative, low, high, dual, CLIP)
    slope = tl.where(used, positive * above_slope + negative * below_slope, 0.0)
    tl.store(leaf_slope + leaf, slope.to(tl.float64), mask=within)
    part = partials + column + tl.program_id(0)
    tl.store(part + 3 * columns, tl.sum(over.to(tl.float64), 0))
    tl.store(part + 4 * columns, tl.sum(under.to(tl.float64), 0))
    tl.store(part + 5 * columns, tl.sum(far.to(tl.float64), 0))
    tl.store(part + 6 * columns, tl.sum(mass * tl.where(used, r, 0.0), 0))
    tl.store(part + 7 * columns, larger(tl.where(used, r, 0.0)).to(tl.float64))
    tl.store(part + 16 * columns, tl.sum(tl.where(used, objective, 0.0), 0))


@triton.jit(do_not_specialize=NUMBERS)
def segments_kernel(
    leaf_segment,
    parent,
    misplaced,
    leaf_slope,
    ratios,
    normalizer_tensor,
    groups: tl.int64,
    leaves: tl.int64,
    normalizer: tl.float32,
    BLOCK: tl.constexpr,
):
    """One program per segment: the gradient of its tokens, from the leaves below it, found by walking up from each."""
    segment = tl.program_id(0).to(tl.int64)
    _segment_above(segment, parent, misplaced, segment >= 0)  # it may be on no path
    slope = tl.zeros([BLOCK], tl.float64)
    for first in range(0, leaves, BLOCK):
        leaf = first + tl.arange(0, BLOCK)
        s = tl.load(leaf_segment + leaf, mask=leaf < leaves, other=-1)
        s = tl.where(s < groups, s, -1)
        while tl.max(s, 0) > segment:
            above = _segment_above(s, parent, None, s > segment)
            s = tl.where(s > segment, above, s)
        slope += tl.load(leaf_slope + leaf, mask=s == segment, other=0.0)
    gradient = -tl.sum(slope, 0) / number_of(normalizer_tensor, normalizer)
    tl.store(ratios + 5 * groups + segment, gradient.to(tl.float32))
