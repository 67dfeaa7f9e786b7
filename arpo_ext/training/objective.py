"""The loss of one micro-batch from flat columns of its trained tokens, whatever layout the model read them in.

Which old log-probability the ratio is taken against (`train.old_logprob`):

sampler: ratio = p_trainer / p_sampler, both at the sampling temperature. It corrects for the old policy and for the
numerical gap between sampler and trainer at once and costs no extra forward. As in truncated importance sampling the
ratio (of the token, the turn or the sequence) is cut at `importance_cap` C with its gradient kept: it contributes
min(ratio, C) * A * grad log p, never more. PPO's own clip bounds the ratio of good tokens already; the cap bounds bad
ones (A < 0), where PPO's does not. A `dual_clip` below the cap acts first, and drops the gradient of such tokens.

trainer: the ratio is taken against the trainer's own log-probability before the first update of the step, as in the
published code; the sampler's gap is measured and not corrected. With one update per step the ratio is 1 and its
gradient that of log p, so no forward is spent on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from arpo_ext import ops
from arpo_ext.config import TrainConfig


@dataclass(frozen=True)
class TokenColumns:
    """What the loss reads of N tokens besides what the model says of them. Nothing is read where weight is 0.

    A token that several rollouts share stands once for each of them, or once with the pair form of the advantage.

    sampler_logprob: float32 [N], as recorded while sampling, NaN where none was.
    advantage: float32 [N], or [N, 2]: sums of weight * advantage over the rows that share the token, positive and
        negative ones apart.
    weight: float32 [N], at least 0, share of the token in the loss before normalisation.
    row, turn: int64 [N], numbers below N of the rollout and of the turn of the model that hold the token; no two
        rows share a turn, and all tokens of a row are in one micro-batch.
    old_logprob: float32 [N] that the ratio is taken against; None: the trainer's own at the time of the update.
    ref_logprob: float32 [N] of the reference model; needed if `train.kl_coef` is above 0.
    """

    sampler_logprob: Tensor
    advantage: Tensor
    weight: Tensor
    row: Tensor
    turn: Tensor
    old_logprob: Tensor | None = None
    ref_logprob: Tensor | None = None

    def to(self, device: torch.device) -> TokenColumns:
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return TokenColumns(**{k: None if v is None else v.to(device, non_blocking=True) for k, v in own.items()})


def objective(
    logprob: Tensor, entropy: Tensor, columns: TokenColumns, config: TrainConfig, normalizer: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one micro-batch, 0-d with gradient, and 0-d statistics: sums, and maxima under names ending in _max.

    logprob, entropy: float32 [N], of the policy in training. normalizer: over all micro-batches and ranks of the
    update, so that losses and gradients of any split add up to those of the whole.
    """
    trained = columns.weight > 0
    current = logprob.detach()
    old = current if columns.old_logprob is None else columns.old_logprob
    group = {"token": None, "turn": columns.turn, "sequence": columns.row}[config.ratio]
    base = _capped(old, current, trained, group, config.importance_cap) if config.old_logprob == "sampler" else old
    loss, sums = ops.policy_loss(
        logprob,
        base,
        columns.advantage,
        columns.weight,
        normalizer=normalizer,
        ratio=config.ratio,
        segment=columns.turn if config.ratio == "turn" else None,
        row=columns.row if config.ratio == "sequence" else None,
        clip="dual" if config.clip == "ppo" and config.dual_clip is not None else config.clip,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        tau_positive=config.tau_positive,
        tau_negative=config.tau_negative,
        ref_logprob=columns.ref_logprob,
        kl=config.kl if config.kl_coef > 0 else None,
        kl_coef=config.kl_coef,
        entropy=entropy if config.entropy_coef > 0 else None,
        entropy_coef=config.entropy_coef,
    )
    return loss, {
        "loss": loss.detach(),
        "tokens": trained.sum(),
        "entropy": torch.where(trained, entropy.detach(), 0.0).sum(),
        "weight": sums.weight,
        "clipped": sums.clipped,
        "clipped_high": sums.clipped_high,
        "clipped_low": sums.clipped_low,
        "ref_kl": sums.ref_kl_k3,
        **_gap(current, columns.sampler_logprob, trained),
        "log_ratio_max": torch.where(trained, current - old, -torch.inf).max(),
    }


def _gap(current: Tensor, sampler: Tensor, trained: Tensor) -> dict[str, Tensor]:
    """How far the trainer, log-probabilities `current`, is from the sampler on what the sampler drew.

    With d = current - sampler of a token: sums of |d|, of Schulman's three estimates of KL(sampler || trainer), which
    are -d, d^2 / 2 and e^d - 1 - d, and of the importance weight e^d and its square.
    """
    measured = trained & sampler.isfinite()
    # In float64 a ratio overflows beyond e^709 only.
    d = torch.where(measured, current - sampler, 0.0).double()
    weight = torch.where(measured, d.exp(), 0.0)
    return {
        "gap": d.abs().sum(),
        "gap_max": d.abs().max(),
        "gap_tokens": measured.sum(),
        "kl_k1": -d.sum(),
        "kl_k2": d.square().sum() / 2,
        "kl_k3": (d.expm1() - d).sum(),
        "importance": weight.sum(),
        "importance_squares": weight.square().sum(),
    }


def _capped(old: Tensor, current: Tensor, trained: Tensor, group: Tensor | None, cap: float) -> Tensor:
    """What the ratio is taken against so that no group's is above `cap`.

    Raising the old log-probability keeps the gradient, cutting the ratio itself would lose it. For a mean over a group,
    all its tokens are raised alike. group: [N]; None: every token by itself.
    """
    if group is None:
        return torch.maximum(old, current - math.log(cap))
    counted = trained.to(current.dtype)
    log_ratio = torch.where(trained, current - old, 0.0)
    sums = torch.zeros(2, len(group), dtype=current.dtype, device=current.device)
    total, count = sums.index_add(1, group, torch.stack([log_ratio, counted]))
    excess = (total / count.clamp(min=1) - math.log(cap)).clamp(min=0)
    return old + excess[group]
