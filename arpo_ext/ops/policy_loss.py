"""The clipped policy loss over tokens: loss, gradient and every metric from one read of the inputs.

With x = logprob - old_logprob, r = exp(clamp(x, -20, 20)), low = 1 - clip_low, high = 1 + clip_high and, per token,

    advantage [N]     Ap = weight * max(advantage, 0),  An = weight * min(advantage, 0)
    advantage [N, 2]  Ap, An = advantage: sums over the rows that share the token, weights already in them

the loss is

    ppo   -sum(Ap * min(r, high) + An * max(r, low)) / normalizer                    (PPO, arXiv 1707.06347)
    dual  -sum(Ap * min(r, high) + An * min(max(r, low), dual_clip)) / normalizer    (arXiv 1912.09729)

For [N] this is the usual max(-A * r, -A * clamp(r, low, high)). For [N, 2] it equals the sum of that over the rows,
which a mean advantage does not where a clipped token has rows of both signs.

Where x lies outside [-20, 20] the gradient is 0, as in verl. At r equal to a bound the gradient passes, as through
`torch.clamp`. Nothing of a token of weight 0 counts: its other inputs may be NaN, its gradient is 0. A NaN elsewhere
makes the loss NaN. `normalizer` is the sum of `weight` over all ranks and micro-batches of the step, so that the losses
and gradients of any split into micro-batches add up to those of the whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from arpo_ext.ops import _native
from arpo_ext.ops import policy_loss_reference as reference
from arpo_ext.ops._dispatch import CPU_BACKENDS, Backend, choose

# Codes as in csrc/policy_loss.h.
CLIPS = {"ppo": 0, "dual": 1}
RATIOS = ("token",)


class PolicyLossSums(NamedTuple):
    """Sums over the tokens of nonzero weight w, as 0-d float64 tensors without gradient.

    To average one, divide by `weight`; sums (not the two maxima) of several calls and ranks add up.
    """

    weight: Tensor  # sum of w
    tokens: Tensor  # number of tokens
    clipped: Tensor  # clipped_high + clipped_low
    clipped_high: Tensor  # sum of w where Ap > 0 and r > high
    clipped_low: Tensor  # sum of w where An < 0 and r < low
    dual_clipped: Tensor  # sum of w where An < 0 and r > dual_clip
    ratio_sum: Tensor  # sum of w * r
    ratio_max: Tensor  # largest r; 0 without tokens
    kl_k1: Tensor  # sum of w * -x: estimates KL(old || new), nats
    kl_k3: Tensor  # sum of w * (r - 1 - x): the same, never negative (http://joschu.net/blog/kl-approx.html)
    log_ratio_max: Tensor  # largest |x|; 0 without tokens


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    weight: Tensor,
    *,
    normalizer: float | Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio: str = "token",
    clip: str = "ppo",
    backend: str = "auto",
) -> tuple[Tensor, PolicyLossSums]:
    """Loss (0-d, dtype of logprob) and its sums, over N tokens.

    logprob: [N] float32, nats, of the policy in training: the only input with a gradient. float64 is computed in
        float64, by the reference.
    old_logprob: [N], of the policy that sampled. advantage: [N] or [N, 2]. weight: [N], at least 0. All of logprob's
        dtype.
    normalizer: number above 0, or 0-d tensor (not read on the host).
    clip_low in [0, 1], clip_high at least 0; dual_clip above 1, given exactly when clip is "dual".

    ValueError: a shape, dtype, device or number is wrong. BackendError: the backend named cannot serve.
    """
    _check_tensors(logprob, old_logprob, advantage, weight)
    _check_numbers(normalizer, clip_low, clip_high, dual_clip, ratio, clip)
    chosen = choose("policy_loss", _BACKENDS, backend, logprob)
    bounds = float(clip_low), float(clip_high), None if dual_clip is None else float(dual_clip)
    loss, sums = chosen.run(
        logprob, old_logprob.detach(), advantage.detach(), weight.detach(), normalizer, CLIPS[clip], *bounds
    )
    return loss, PolicyLossSums(*sums.detach().unbind())


def _check_tensors(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, weight: Tensor) -> None:
    if logprob.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"policy_loss: got logprob of {logprob.dtype}; expected torch.float32 or torch.float64")
    if logprob.ndim != 1:
        raise ValueError(f"policy_loss: got logprob of shape {list(logprob.shape)}; expected [N]")
    tokens = logprob.shape[0]
    for name, tensor in (("old_logprob", old_logprob), ("advantage", advantage), ("weight", weight)):
        fits = tensor.shape == (tokens,) or (name == "advantage" and tensor.shape == (tokens, 2))
        if not fits:
            expected = f"[{tokens}] or [{tokens}, 2]" if name == "advantage" else f"[{tokens}]"
            raise ValueError(f"policy_loss: got {name} of shape {list(tensor.shape)}; expected {expected}")
        if tensor.dtype != logprob.dtype:
            raise ValueError(f"policy_loss: got {name} of {tensor.dtype}; expected {logprob.dtype}, as logprob")
        if tensor.device != logprob.device:
            raise ValueError(f"policy_loss: got {name} on {tensor.device}; expected {logprob.device}, as logprob")


def _check_numbers(
    normalizer: float | Tensor, clip_low: float, clip_high: float, dual_clip: float | None, ratio: str, clip: str
) -> None:
    if isinstance(normalizer, Tensor):
        if normalizer.ndim != 0:
            raise ValueError(f"policy_loss: got normalizer of shape {list(normalizer.shape)}; expected a 0-d tensor")
    elif not normalizer > 0:
        raise ValueError(f"policy_loss: got normalizer {normalizer}; expected a number above 0")
    if not 0 <= clip_low <= 1:
        raise ValueError(f"policy_loss: got clip_low {clip_low}; expected 0 to 1")
    if not clip_high >= 0:
        raise ValueError(f"policy_loss: got clip_high {clip_high}; expected at least 0")
    if ratio not in RATIOS:
        raise ValueError(f"policy_loss: got ratio {ratio!r}; expected {', '.join(RATIOS)}")
    if clip not in CLIPS:
        raise ValueError(f"policy_loss: got clip {clip!r}; expected {', '.join(CLIPS)}")
    if (clip == "dual") != (dual_clip is not None):
        raise ValueError(f"policy_loss: got dual_clip {dual_clip} with clip {clip!r}; expected it with 'dual' only")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"policy_loss: got dual_clip {dual_clip}; expected a number above 1")


def _refuse_cpu(isa: str, logprob: Tensor) -> str | None:
    if logprob.device.type != "cpu":
        return f"needs CPU tensors, got them on {logprob.device}"
    if logprob.dtype != torch.float32:
        return f"needs float32, got {logprob.dtype}"
    return _native.cpu_missing(isa)


def _run_reference(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    weight: Tensor,
    normalizer: float | Tensor,
    clip: int,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor]:
    name = next(name for name, code in CLIPS.items() if code == clip)
    bounds = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    return reference.policy_loss(logprob, old_logprob, advantage, weight, normalizer, clip=name, **bounds)


def _run_cpu(isa: str):
    def run(
        logprob: Tensor,
        old_logprob: Tensor,
        advantage: Tensor,
        weight: Tensor,
        normalizer: float | Tensor,
        *rule: float | None,
    ) -> tuple[Tensor, Tensor]:
        number, tensor = 1.0, None
        if isinstance(normalizer, Tensor):
            tensor = normalizer.detach().to(logprob.device, torch.float64)
        else:
            number = float(normalizer)
        want_gradient = torch.is_grad_enabled() and logprob.requires_grad
        options = (want_gradient, _native.ISA_CODES[isa])
        op = torch.ops.arpo_ext.policy_loss
        loss, sums, _ = op(logprob, old_logprob, advantage, weight, tensor, number, *rule, *options)
        return loss, sums

    return run


torch.library.define(
    "arpo_ext::policy_loss",
    "(Tensor logprob, Tensor old_logprob, Tensor advantage, Tensor weight, Tensor? normalizer, float normalizer_value,"
    " int clip, float clip_low, float clip_high, float? dual_clip, bool want_gradient, int isa)"
    " -> (Tensor, Tensor, Tensor)",
)

_BACKENDS = {
    name: Backend(lambda logprob, isa=isa: _refuse_cpu(isa, logprob), _run_cpu(isa))
    for name, isa in CPU_BACKENDS.items()
}
_BACKENDS["reference"] = Backend(lambda logprob: None, _run_reference)


@torch.library.register_fake("arpo_ext::policy_loss")
def _policy_loss_fake(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    weight: Tensor,
    normalizer: Tensor | None,
    normalizer_value: float,
    clip: int,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    want_gradient: bool,
    isa: int,
) -> tuple[Tensor, Tensor, Tensor]:
    sums = logprob.new_empty(len(PolicyLossSums._fields), dtype=torch.float64)
    gradient = logprob.new_empty(logprob.shape[0] if want_gradient else 0)
    return logprob.new_empty(()), sums, gradient


@torch.library.impl("arpo_ext::policy_loss", "cpu")
def _policy_loss_cpu(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    weight: Tensor,
    normalizer: Tensor | None,
    normalizer_value: float,
    clip: int,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    want_gradient: bool,
    isa: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, sums, and the gradient of the loss with respect to logprob (empty unless wanted)."""
    logprob, old_logprob, advantage, weight = (t.contiguous() for t in (logprob, old_logprob, advantage, weight))
    outputs = _policy_loss_fake(
        logprob, old_logprob, advantage, weight, normalizer, 0.0, clip, 0.0, 0.0, None, want_gradient, isa
    )
    _native.C.policy_loss_cpu(
        isa,
        torch.get_num_threads(),
        logprob.data_ptr(),
        old_logprob.data_ptr(),
        advantage.data_ptr(),
        advantage.ndim == 2,
        weight.data_ptr(),
        logprob.numel(),
        _native.pointer(normalizer),
        normalizer_value,
        clip,
        clip_low,
        clip_high,
        0.0 if dual_clip is None else dual_clip,
        outputs[0].data_ptr(),
        outputs[1].data_ptr(),
        _native.pointer(outputs[2] if want_gradient else None),
    )
    return outputs


def _keep_gradient(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    # Not save_for_backward: its copies share memory uncounted, so autograd would take the buffer for a leaf's .grad
    # and add to it in place. Detached, since an output that holds itself is never freed.
    ctx.gradient = output[2].detach()
    ctx.version = ctx.gradient._version


def _backward(ctx, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("policy_loss cannot be differentiated twice; its reference backend can")
    rest = (None,) * 11
    if grad_loss is None:
        return None, *rest
    if ctx.gradient._version != ctx.version:
        raise RuntimeError(
            "the gradient that an earlier backward pass of this policy_loss returned was modified in place; "
            "expected it unchanged, or a clone of it, while the graph is retained"
        )
    # A loss that is back-propagated itself has grad_loss 1: handing the gradient on saves reading and writing it again.
    # Traced tensors are subclasses and take the product.
    if type(grad_loss) is Tensor and grad_loss.device.type == "cpu" and grad_loss.item() == 1.0:
        return ctx.gradient, *rest
    return ctx.gradient * grad_loss, *rest


torch.library.register_autograd("arpo_ext::policy_loss", _backward, setup_context=_keep_gradient)
