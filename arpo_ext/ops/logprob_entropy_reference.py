"""logprob and entropy in plain torch: the formulas of `logprob_entropy` in the order a reader would write them.

Arguments as in the op's schema: logits [..., V], labels [...] or None, mask [...] or None, temperatures 0-d or [...] or
None (then the number `temperature`). Computes in float32, or in float64 for float64 logits. Nothing here is shared with
the fast backends, which are tested against it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _scaled(
    logits: Tensor, maximum: Tensor, temperatures: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor | float]:
    """(z [..., V], temperature that broadcasts over z); maximum [..., 1]."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    divisor: Tensor | float = temperature
    if temperatures is not None:
        divisor = temperatures.unsqueeze(-1) if temperatures.dim() else temperatures
    return (x - maximum) / divisor, divisor


def forward(
    logits: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(logprob or None, entropy, stats [3, ...] = maximum, log1p(s), mean of z)."""
    maximum = logits.amax(-1, keepdim=True).to(torch.promote_types(logits.dtype, torch.float32))
    maximum = torch.where(maximum.isfinite(), maximum, torch.nan)
    z, _ = _scaled(logits, maximum, temperatures, temperature)
    weight = z.exp()
    z_weight = torch.where(weight > 0, z * weight, weight)
    s = weight.scatter(-1, z.argmax(-1, keepdim=True), 0).sum(-1)
    mean_z = z_weight.sum(-1) / (1 + s)
    log1p_s = s.log1p()
    # argmax of a NaN row points at the NaN, so that row has to be marked again.
    log1p_s = torch.where(maximum[..., 0].isnan(), maximum[..., 0], log1p_s)
    stats = torch.stack((maximum[..., 0], log1p_s, mean_z))
    entropy = log1p_s - mean_z
    logprob = None
    if labels is not None:
        wanted = labels != ignore_index
        index = torch.where(wanted, labels, 0).unsqueeze(-1)
        if mask is not None:
            # A masked row may hold any label.
            index = index.masked_fill(~mask.unsqueeze(-1), 0)
        logprob = torch.where(wanted, z.gather(-1, index)[..., 0] - log1p_s, 0)
    if mask is not None:
        entropy, stats = torch.where(mask, entropy, 0), torch.where(mask, stats, 0)
        logprob = None if logprob is None else torch.where(mask, logprob, 0)
    return logprob, entropy, stats


def shard_forward(
    logits: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    running: Tensor,
    *,
    vocab_start: int,
) -> Tensor:
    """`running` [..., 4] with the columns `logits` of a larger vocabulary added: maximum, s, a, the label's logit."""
    before, s_before, a_before, label_logit = running.unbind(-1)
    x = logits.double()
    divisor = temperature if temperatures is None else temperatures.double()
    here = x.amax(-1)
    maximum = torch.maximum(before, here)
    shift = torch.where(x.isneginf(), 0, x - maximum.unsqueeze(-1))
    weight = torch.where(x.isneginf(), 0, (shift / torch.as_tensor(divisor, device=x.device).unsqueeze(-1)).exp())
    # One arg-max is left out: it is in the last shard that raised the maximum, and the one before becomes ordinary.
    raises = here > before
    left_out = torch.zeros_like(weight).scatter(-1, x.argmax(-1, keepdim=True), 1) * raises.unsqueeze(-1)
    kept = torch.where(left_out > 0, 0, weight)
    drop = torch.where(before.isneginf(), 0, before - maximum)
    factor = torch.where(before.isneginf(), 0, (drop / divisor).exp())
    others = s_before + raises
    s = factor * others + kept.sum(-1)
    a = factor * (a_before + drop * others) + (kept * shift).sum(-1)
    empty = maximum.isneginf()
    columns = [torch.where(maximum.isposinf(), torch.nan, maximum), torch.where(empty, 0, s), torch.where(empty, 0, a)]
    if labels is not None:
        column = labels - vocab_start
        found = (labels != ignore_index) & (column >= 0) & (column < x.shape[-1])
        there = x.gather(-1, torch.where(found, column, 0).unsqueeze(-1))[..., 0]
        label_logit = torch.where(found, there, label_logit)
    updated = torch.stack([*columns, label_logit], -1)
    return updated if mask is None else torch.where(mask.unsqueeze(-1), updated, running)


def backward(
    logits: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    stats: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    *,
    vocab_start: int = 0,
) -> Tensor:
    """Gradient of the logits in their dtype; upstream gradients [...], None for zero.

    The logits may be columns `vocab_start` and up of a larger vocabulary, whose statistics `stats` are then.
    """
    maximum, log1p_s, mean_z = stats.unsqueeze(-1)
    z, divisor = _scaled(logits, maximum, temperatures, temperature)
    log_p = z - log1p_s
    p = log_p.exp()
    gradient = torch.zeros_like(p)
    if grad_logprob is not None and labels is not None:
        wanted = labels != ignore_index
        if mask is not None:
            wanted = wanted & mask
        column = labels - vocab_start
        here = wanted & (column >= 0) & (column < p.shape[-1])
        index = torch.where(here, column, 0).unsqueeze(-1)
        # 1 - p without cancellation where p is close to 1.
        at_label = torch.where(here.unsqueeze(-1), -torch.expm1(log_p.gather(-1, index)), -p.gather(-1, index))
        difference = (-p).scatter(-1, index, at_label)
        gradient = difference * torch.where(wanted, grad_logprob, 0).unsqueeze(-1)
    if grad_entropy is not None:
        centred = torch.where(p > 0, p * (z - mean_z), p)
        gradient = gradient - grad_entropy.unsqueeze(-1) * centred
    gradient = gradient / divisor
    if mask is not None:
        gradient = torch.where(mask.unsqueeze(-1), gradient, 0)
    return gradient.to(logits.dtype)
