"""policy_loss in Triton: for GPUs that the native module does not serve. Definitions: policy_loss.py.

Floor: token ratios read each input once (16 bytes a token with logprob, old_logprob, advantage and weight) and write
the gradient once (4 bytes): 42 MB and 10 us for 256 x 8192 tokens at 4.3 TB/s. A second kernel of one program adds up
the blocks' sums. Sums run in an order that depends on the shape alone, never through atomics on floats, so equal inputs
give equal bits. Ratios over groups are found before that, which reads the inputs once more, see _triton_policy.py.
Not yet measured on a GPU.

N and every number of the call are arguments at run time: a kernel is compiled once for each clip, kind of KL and set of
inputs and gradients that are present.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arpo_ext.ops import _triton_policy as policy
from arpo_ext.ops._policy_loss import TENSORS, PolicyLossCall
from arpo_ext.ops._triton import on_device
from arpo_ext.ops._triton_policy import (
    BOUND,
    CISPO,
    ROWS,
    above_line,
    clip_counts,
    clip_numbers_of,
    exponential,
    guarded,
    larger,
    load_advantages,
    number_of,
    ratio_at,
)

_BLOCK = 1024
_GROUP_BLOCK = 256
_LEAF_BLOCK = 128
NUMBERS = policy.NUMBERS


@triton.jit(do_not_specialize=NUMBERS)
def tokens_kernel(
    logprob,
    old_logprob,
    advantage,
    weight,
    entropy,
    ref_logprob,
    importance,
    group,
    ratios,
    normalizer_tensor,
    kl_coef_tensor,
    entropy_coef_tensor,
    clip_numbers,
    gradient_out,
    entropy_gradient_out,
    partials,
    count: tl.int64,
    groups: tl.int64,
    columns: tl.int64,
    column: tl.int64,
    normalizer: tl.float32,
    kl_coef: tl.float32,
    entropy_coef: tl.float32,
    low: tl.float32,
    high: tl.float32,
    dual: tl.float32,
    tau_positive: tl.float32,
    tau_negative: tl.float32,
    CLIP: tl.constexpr,
    KL: tl.constexpr,
    PAIRS: tl.constexpr,
    PACKED: tl.constexpr,
    MEAN_GRADIENT: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK tokens, the first of them number `column`: gradients, and partials[row][column].

    FULL: all tokens exist, so that loads and stores need no mask and are 16 bytes wide.
    """
    column += tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    t = column * BLOCK + lane
    within = lane < BLOCK if FULL else t < count
    w = tl.load(weight + t, mask=within, other=0.0)
    trained = w != 0.0
    own = tl.where(trained, tl.load(logprob + t, mask=within, other=0.0), 0.0)
    x = own - tl.where(trained, tl.load(old_logprob + t, mask=within, other=0.0), 0.0)
    part = partials + column

    if PACKED:
        at = tl.load(group + t, mask=trained, other=0).to(tl.int64)
        placed = trained & (at >= 0) & (at < groups)
        gradient = tl.load(ratios + 5 * groups + tl.where(placed, at, 0), mask=placed, other=0.0)
        gradient = tl.where(trained & (placed == 0), float("nan"), gradient)
    else:
        low, high, dual, tau_positive, tau_negative = clip_numbers_of(
            clip_numbers, low, high, dual, tau_positive, tau_negative
        )
        positive, negative = load_advantages(advantage, importance, t, within, trained, w, PAIRS)
        if group is not None:
            at = tl.load(group + t, mask=trained, other=0).to(tl.int64)
            placed = trained & (at >= 0) & (at < groups)
            of_group = ratios + tl.where(placed, at, 0)
            # A token of a group that does not exist has no ratio.
            r = tl.load(of_group, mask=placed, other=float("nan"))
            above = tl.load(of_group + groups, mask=placed, other=float("nan"))
            above_slope = tl.load(of_group + 2 * groups, mask=placed, other=float("nan"))
            below = tl.load(of_group + 3 * groups, mask=placed, other=float("nan"))
            below_slope = tl.load(of_group + 4 * groups, mask=placed, other=float("nan"))
        else:
            r, above, above_slope, below, below_slope = ratio_at(x, low, high, dual, tau_positive, tau_negative, CLIP)
        objective = positive * above + negative * below
        if CLIP == CISPO:
            objective = objective * own
        gradient = (positive * above_slope + negative * below_slope) * (
            -1.0 / number_of(normalizer_tensor, normalizer)
        ).to(tl.float32)
        if (group is not None) and MEAN_GRADIENT and (CLIP != CISPO):
            gradient = tl.load(of_group + 5 * groups, mask=placed, other=float("nan"))
        over, under, far = clip_counts(r, w, positive, negative, low, high, dual, CLIP)
        tl.store(part + 3 * columns, tl.sum(tl.where(trained, over, 0.0), 0).to(tl.float64))
        tl.store(part + 4 * columns, tl.sum(tl.where(trained, under, 0.0), 0).to(tl.float64))
        tl.store(part + 5 * columns, tl.sum(tl.where(trained, far, 0.0), 0).to(tl.float64))
        tl.store(part + 6 * columns, tl.sum(tl.where(trained, w * r, 0.0), 0).to(tl.float64))
        tl.store(part + 7 * columns, larger(tl.where(trained, r, 0.0)).to(tl.float64))
        tl.store(part + 16 * columns, tl.sum(tl.where(trained, objective, 0.0), 0).to(tl.float64))

    g = guarded(x)
    tl.store(part, tl.sum(w, 0).to(tl.float64))
    tl.store(part + columns, tl.sum(tl.where(trained, 1.0, 0.0), 0).to(tl.float64))
    tl.store(part + 8 * columns, tl.sum(-w * x, 0).to(tl.float64))
    k3 = tl.where(g == x, above_line(x, exponential(g)), exponential(g) - 1.0 - x)
    tl.store(part + 9 * columns, tl.sum(w * k3, 0).to(tl.float64))
    tl.store(part + 10 * columns, larger(tl.abs(x)).to(tl.float64))
    tl.store(part + 11 * columns, tl.sum(0.5 * w * x * x, 0).to(tl.float64))
    if ref_logprob is not None:
        d = own - tl.where(trained, tl.load(ref_logprob + t, mask=within, other=0.0), 0.0)
        bounded = guarded(d)
        ref_k3 = above_line(-bounded, exponential(-bounded))
        tl.store(part + 12 * columns, tl.sum(w * d, 0).to(tl.float64))
        tl.store(part + 13 * columns, tl.sum(0.5 * w * d * d, 0).to(tl.float64))
        tl.store(part + 14 * columns, tl.sum(w * ref_k3, 0).to(tl.float64))
        scale = number_of(normalizer_tensor, normalizer)
        kl_scale = (number_of(kl_coef_tensor, kl_coef) / scale).to(tl.float32)
        if KL == 1:
            gradient += kl_scale * w
        if KL == 2:
            gradient += kl_scale * w * d
        if KL == 3:
            gradient += tl.where(tl.abs(d) > BOUND, 0.0, kl_scale * w * (d - ref_k3))
    if entropy is not None:
        value = tl.where(trained, tl.load(entropy + t, mask=within, other=0.0), 0.0)
        tl.store(part + 15 * columns, tl.sum(w * value, 0).to(tl.float64))
    # A weight of 0 times a scale or a group's ratio that is not finite would be NaN.
    if gradient_out is not None:
        tl.store(gradient_out + t, tl.where(trained, gradient, 0.0), mask=within)
    if entropy_gradient_out is not None:
        scale = number_of(normalizer_tensor, normalizer)
        entropy_scale = (-number_of(entropy_coef_tensor, entropy_coef) / scale).to(tl.float32)
        tl.store(entropy_gradient_out + t, tl.where(trained, entropy_scale * w, 0.0), mask=within)


@triton.jit(do_not_specialize=NUMBERS)
def finish_kernel(
    partials,
    misplaced,
    normalizer_tensor,
    kl_coef_tensor,
    entropy_coef_tensor,
    loss_out,
    sums_out,
    columns: tl.int64,
    normalizer: tl.float32,
    kl_coef: tl.float32,
    entropy_coef: tl.float32,
    KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the totals of all columns, and the loss."""
    clipped = tl.cast(0.0, tl.float64)
    loss = tl.cast(0.0, tl.float64)
    for row in tl.static_range(0, 17):
        total = tl.zeros([BLOCK], tl.float64)
        for first in range(0, columns, BLOCK):
            at = first + tl.arange(0, BLOCK)
            value = tl.load(partials + row * columns + at, mask=at < columns, other=0.0)
            if row == 7 or row == 10:
                total = tl.maximum(total, value, propagate_nan=tl.PropagateNan.ALL)
            else:
                total += value
        if row == 7 or row == 10:
            result = larger(total)
        else:
            result = tl.sum(total, 0)
        if row == 3 or row == 4:
            clipped += result
        if row == 11 + KL and KL != 0:
            loss += number_of(kl_coef_tensor, kl_coef) * result
        if row == 15:
            loss -= number_of(entropy_coef_tensor, entropy_coef) * result
        if row == 16:
            loss -= result
        elif row != 2:
            tl.store(sums_out + row, result)
    tl.store(sums_out + 2, clipped)
    loss = loss / number_of(normalizer_tensor, normalizer)
    if misplaced is not None:
        loss = tl.where(tl.load(misplaced) != 0, float("nan"), loss)
    tl.store(loss_out, loss.to(tl.float32))


def _arguments(call: PolicyLossCall) -> dict[str, object]:
    """What the kernels take: contiguous tensors, numbers of the host, the bounds of the clip."""
    given = {
        name: value.detach().contiguous() if isinstance(value, Tensor) else value
        for name, value in zip(call._fields[:TENSORS], call[:TENSORS], strict=True)
    }
    numbers = {name: getattr(call, name) for name in ("normalizer", "kl_coef", "entropy_coef")}
    for name in numbers:
        tensor = given[f"{name}_tensor"]
        # A number in the host's memory is read here; one on the device is read by the kernel.
        if tensor is not None and tensor.device != call.logprob.device:
            numbers[name], given[f"{name}_tensor"] = tensor.item(), None
    bounds = {
        "low": 1.0 - call.clip_low,
        "high": 1.0 + call.clip_high,
        "dual": float("inf") if call.dual_clip is None else call.dual_clip,
        "tau_positive": call.tau_positive,
        "tau_negative": call.tau_negative,
    }
    sizes = {"count": call.logprob.shape[0], "groups": call.groups}
    return {**given, **numbers, **bounds, **sizes}


def _launch(kernel, programs: int, arguments: dict[str, object], warps: int = 4) -> None:
    if programs > 0:
        names = set(kernel.arg_names)
        kernel[(programs,)](
            **{name: value for name, value in arguments.items() if name in names},
            num_warps=warps,
            enable_fp_fusion=True,
        )


def _find_ratios(call: PolicyLossCall, arguments: dict[str, object]) -> None:
    """Adds `ratios` [6, groups] of the groups to the arguments, and with packed paths the leaves' partial sums."""
    new = call.logprob.new_zeros
    groups, leaves = call.groups, 0 if call.leaf_segment is None else call.leaf_segment.shape[0]
    packed = call.parent is not None
    arguments |= {
        "bounds": new((groups, 2), dtype=torch.int64),
        "misplaced": new(1, dtype=torch.int32),
        "segments": new((3, groups), dtype=torch.float64) if packed else None,
        "ratios": new((6, groups)),
        "leaf_slope": new(leaves, dtype=torch.float64),
        "leaves": leaves,
    }
    _launch(policy.bounds_kernel, triton.cdiv(call.logprob.shape[0], _BLOCK), {**arguments, "BLOCK": _BLOCK})
    _launch(policy.groups_kernel, groups, {**arguments, "BLOCK": _GROUP_BLOCK})
    if packed:
        arguments["column"] = triton.cdiv(call.logprob.shape[0], _BLOCK)
        _launch(policy.leaves_kernel, triton.cdiv(leaves, _LEAF_BLOCK), {**arguments, "BLOCK": _LEAF_BLOCK})
        _launch(policy.segments_kernel, groups, {**arguments, "BLOCK": _LEAF_BLOCK})


def launch(
    call: PolicyLossCall, codes: tuple[int, int], results: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
) -> None:
    """Writes loss, sums and the wanted gradients; codes of clip and kl as in _policy_loss_op.py."""
    loss, sums, gradient, entropy_gradient = results
    count = call.logprob.shape[0]
    leaf_blocks = 0 if call.leaf_segment is None else triton.cdiv(call.leaf_segment.shape[0], _LEAF_BLOCK)
    columns = triton.cdiv(count, _BLOCK) + leaf_blocks
    arguments = _arguments(call) | {
        "ratios": None,
        "misplaced": None,
        "gradient_out": gradient,
        "entropy_gradient_out": entropy_gradient,
        "partials": call.logprob.new_zeros((ROWS, columns), dtype=torch.float64),
        "loss_out": loss,
        "sums_out": sums,
        "columns": columns,
        "CLIP": codes[0],
        "KL": codes[1],
        "PAIRS": call.advantage.ndim == 2,
        "PACKED": call.parent is not None,
        "MEAN_GRADIENT": call.ratio_gradient == "mean",
        "BLOCK": _BLOCK,
    }
    with on_device(call.logprob):
        if call.group is not None:
            _find_ratios(call, arguments)
        full = count // _BLOCK
        _launch(tokens_kernel, full, {**arguments, "column": 0, "FULL": True})
        _launch(tokens_kernel, int(count > full * _BLOCK), {**arguments, "column": full, "FULL": False})
        _launch(finish_kernel, 1, {**arguments, "BLOCK": _BLOCK})
