"""The clipped policy loss in plain torch, differentiable by autograd; float64 input is computed in float64."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    weight: Tensor,
    normalizer: float | Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    clip: str,
) -> tuple[Tensor, Tensor]:
    """Loss (0-d) and the sums of `arpo_ext.ops.PolicyLossSums` stacked in their order, float64."""
    trained = weight != 0
    weight = torch.where(trained, weight, 0.0)
    log_ratio = torch.where(trained, logprob, 0.0) - torch.where(trained, old_logprob, 0.0)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if advantage.ndim == 2:
        advantage = torch.where(trained[:, None], advantage, 0.0)
        positive, negative = advantage.unbind(dim=1)
    else:
        advantage = torch.where(trained, advantage, 0.0) * weight
        positive, negative = advantage.clamp(min=0), advantage.clamp(max=0)

    if clip not in ("ppo", "dual"):
        raise ValueError(f"policy_loss: got clip {clip!r}; expected 'ppo' or 'dual'")
    above = ratio.clamp(max=1 + clip_high)
    below = ratio.clamp(min=1 - clip_low, max=dual_clip if clip == "dual" else None)
    per_token = -(positive * above + negative * below)
    loss = per_token.sum(dtype=torch.float64) / normalizer

    with torch.no_grad():
        wide = weight.to(torch.float64)
        log_ratio = log_ratio.to(torch.float64)
        guarded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        high = (positive > 0) & (ratio > 1 + clip_high)
        low = (negative < 0) & (ratio < 1 - clip_low)
        dual = (negative < 0) & (ratio > dual_clip) if clip == "dual" else torch.zeros_like(high)
        sums = torch.stack(
            [
                wide.sum(),
                trained.sum(),
                (wide * (high | low)).sum(),
                (wide * high).sum(),
                (wide * low).sum(),
                (wide * dual).sum(),
                (wide * guarded.exp()).sum(),
                _largest(guarded.exp(), trained),
                (wide * -log_ratio).sum(),
                (wide * (guarded.expm1() - log_ratio)).sum(),
                _largest(log_ratio.abs(), trained),
            ]
        ).to(torch.float64)
    return loss.to(logprob.dtype), sums


def _largest(value: Tensor, trained: Tensor) -> Tensor:
    """Largest value of a trained token, 0 if there is none."""
    return torch.cat([torch.where(trained, value, 0.0), value.new_zeros(1)]).amax()
