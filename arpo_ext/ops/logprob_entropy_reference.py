"""logprob and entropy in plain torch: the formulas of `logprob_entropy` in the order a reader would write them.

Arguments as in the op's schema: logits [..., V], labels [...] or None, mask [...] or None, temperatures 0-d or [...] or
None (then the number `temperature`). Computes in float32, or in float64 for float64 logits. Nothing here is shared with
the fast backends, which are tested against it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _scaled(logits: Tensor, temperatures: Tensor | None, temperature: float) -> tuple[Tensor, Tensor, Tensor | float]:
    """(maximum [..., 1], z [..., V], temperature that broadcasts over z)."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    divisor: Tensor | float = temperature
    if temperatures is not None:
        divisor = temperatures.unsqueeze(-1) if temperatures.dim() else temperatures
    maximum = x.amax(-1, keepdim=True)
    maximum = torch.where(maximum.isfinite(), maximum, torch.nan)
    return maximum, (x - maximum) / divisor, divisor


def forward(
    logits: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(logprob or None, entropy, stats [3, ...] = maximum, log1p(s), mean of z)."""
    maximum, z, _ = _scaled(logits, temperatures, temperature)
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
) -> Tensor:
    """Gradient of the logits in their dtype; upstream gradients [...], None for zero."""
    _, z, divisor = _scaled(logits, temperatures, temperature)
    _, log1p_s, mean_z = stats.unsqueeze(-1)
    log_p = z - log1p_s
    p = log_p.exp()
    gradient = torch.zeros_like(p)
    if grad_logprob is not None and labels is not None:
        wanted = labels != ignore_index
        if mask is not None:
            wanted = wanted & mask
        index = torch.where(wanted, labels, 0).unsqueeze(-1)
        # 1 - p without cancellation where p is close to 1.
        difference = (-p).scatter(-1, index, -torch.expm1(log_p.gather(-1, index)))
        gradient = difference * torch.where(wanted, grad_logprob, 0).unsqueeze(-1)
    if grad_entropy is not None:
        centred = torch.where(p > 0, p * (z - mean_z), p)
        gradient = gradient - grad_entropy.unsqueeze(-1) * centred
    gradient = gradient / divisor
    if mask is not None:
        gradient = torch.where(mask.unsqueeze(-1), gradient, 0)
    return gradient.to(logits.dtype)
