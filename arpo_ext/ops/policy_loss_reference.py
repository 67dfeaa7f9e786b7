"""The policy loss in plain torch, differentiable by autograd; float64 input is computed in float64."""

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
    ratio: str,
    ratio_gradient: str,
    group: Tensor | None,
    groups: int,
    parent: Tensor | None,
    leaf_segment: Tensor | None,
    leaf_weight: Tensor | None,
    clip: str,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    dual_clip: float | Tensor | None,
    tau_positive: float | Tensor,
    tau_negative: float | Tensor,
    importance: Tensor | None,
    ref_logprob: Tensor | None,
    kl: str | None,
    kl_coef: float | Tensor,
    entropy: Tensor | None,
    entropy_coef: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Loss (0-d) and the sums of `arpo_ext.ops.PolicyLossSums` stacked in their order, float64."""
    trained = weight != 0

    def kept(value: Tensor) -> Tensor:
        return torch.where(trained if value.ndim == 1 else trained[:, None], value, 0.0)

    weight, logprob = kept(weight), kept(logprob)
    x = logprob - kept(old_logprob)
    index, outside = None, None
    if group is not None:
        misplaced = trained & ((group < 0) | (group >= groups))
        index = torch.where(trained & ~misplaced, group, 0).to(torch.int64)
        outside = misplaced.any()
    rule = {"clip": clip, "clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    rule |= {"tau_positive": tau_positive, "tau_negative": tau_negative}
    if parent is None:
        if advantage.ndim == 2:
            positive, negative = kept(advantage).unbind(dim=1)
        else:
            weighted = kept(advantage) * weight
            positive, negative = weighted.clamp(min=0), weighted.clamp(max=0)
        if importance is not None:
            positive, negative = positive * kept(importance), negative * kept(importance)
        level = x
        if ratio != "token":
            total, count = _group_sums(x, trained, index, groups)
            level = (total / count.clamp(min=1))[index].to(x.dtype)
            if ratio_gradient == "token":
                level = level.detach() + x - x.detach()
        objective, clip_sums = _objective(level, logprob, positive, negative, weight, trained, **rule)
    else:
        outside = outside | ((parent < -1) | (parent >= torch.arange(groups, device=parent.device))).any()
        outside = outside | ((leaf_segment < 0) | (leaf_segment >= groups)).any()
        path = _paths(parent, leaf_segment)
        columns = (*_group_sums(x, trained, index, groups), _group_sums(logprob, trained, index, groups)[0])
        total, count, text = (torch.where(path, column, 0.0).sum(dim=1) for column in columns)
        leaf_weight = torch.ones_like(advantage) if leaf_weight is None else leaf_weight
        used = (count > 0) & (leaf_weight != 0)
        count, leaf_weight = count.clamp(min=1), torch.where(used, leaf_weight, 0.0)
        mass = leaf_weight * count.to(x.dtype)
        weighted = torch.where(used, advantage, 0.0) * mass
        sides = weighted.clamp(min=0), weighted.clamp(max=0)
        level, mean_text = torch.where(used, total / count, 0.0), torch.where(used, text / count, 0.0)
        objective, clip_sums = _objective(level.to(x.dtype), mean_text.to(x.dtype), *sides, mass, used, **rule)

    loss = -objective.sum(dtype=torch.float64)
    wide = weight.to(torch.float64)
    ref_sums = wide.new_zeros(3)
    if ref_logprob is not None:
        estimates = _kl_estimates(logprob - kept(ref_logprob))
        ref_sums = torch.stack([(wide * value).sum() for value in estimates])
        if kl is not None:
            loss = loss + kl_coef * ref_sums[("k1", "k2", "k3").index(kl)]
    entropy_sum = wide.new_zeros(()) if entropy is None else (wide * kept(entropy)).sum()
    loss = (loss - entropy_coef * entropy_sum) / normalizer
    if outside is not None:
        loss = torch.where(outside, torch.nan, loss)

    with torch.no_grad():
        y = x.to(torch.float64)
        r = y.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        high, low, dual, ratio_sum, ratio_max = clip_sums
        sums = [wide.sum(), trained.sum(), high + low, high, low, dual, ratio_sum, ratio_max]
        sums += [(wide * -y).sum(), (wide * (r.expm1() - y)).sum(), _largest(y.abs(), trained)]
        sums += [(wide * 0.5 * y * y).sum(), *ref_sums.unbind(), entropy_sum]
        stacked = torch.stack([value.to(torch.float64) for value in sums])
    return loss.to(logprob.dtype), stacked


def _objective(
    level: Tensor,
    logprob: Tensor,
    positive: Tensor,
    negative: Tensor,
    weight: Tensor,
    used: Tensor,
    *,
    clip: str,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    dual_clip: float | Tensor | None,
    tau_positive: float | Tensor,
    tau_negative: float | Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """What is maximised, per token or leaf, and the sums high, low, dual, ratio and largest ratio of the clip."""
    r = _guarded(level).exp()
    low, high = 1 - clip_low, 1 + clip_high
    inf = torch.inf if dual_clip is None else dual_clip
    if clip == "sapo":
        above = torch.sigmoid(tau_positive * (r - 1)) * (4 / tau_positive)
        below = torch.sigmoid(tau_negative * (r - 1)) * (4 / tau_negative)
    elif clip == "cispo":
        above = below = r.detach().clamp(low, high) * logprob
    elif clip == "gppo":
        above = torch.where(r > high, high / r.detach() * r, r)
        below = r.clamp(min=low).clamp(max=inf)
    elif clip in ("ppo", "dual"):
        above, below = r.clamp(max=high), r.clamp(min=low).clamp(max=inf)
    else:
        raise ValueError(f"policy_loss: got clip {clip!r}; expected 'ppo', 'dual', 'gppo', 'cispo' or 'sapo'")
    with torch.no_grad():
        none = torch.zeros_like(used)
        rising, falling = (used, used) if clip == "cispo" else (positive > 0, negative < 0)
        over = none if clip == "sapo" else rising & (r > high)
        under = none if clip == "sapo" else falling & (r < low)
        far = none if dual_clip is None else falling & (r > dual_clip)
        wide, exact = weight.to(torch.float64), level.to(torch.float64).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        sums = [(wide * side).sum() for side in (over, under, far, exact)]
        sums.append(_largest(exact, used))
    return positive * above + negative * below, sums


def _group_sums(value: Tensor, trained: Tensor, index: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Sum of value over the trained tokens of each group and their number, float64. The others have index 0."""
    zeros = value.new_zeros(max(groups, 1), dtype=torch.float64)
    wide = torch.where(trained, value, 0.0).to(torch.float64)
    return zeros.index_add(0, index, wide)[:groups], zeros.index_add(0, index, trained.to(torch.float64))[:groups]


def _paths(parent: Tensor, leaf_segment: Tensor) -> Tensor:
    """[L, S] bool: the segment is on the leaf's path. Each round doubles the ancestors that are covered."""
    segments = torch.arange(parent.shape[0], device=parent.device)
    path = (leaf_segment[:, None] == segments).to(torch.float64)
    step = (parent[:, None] == segments).to(torch.float64)
    for _ in range(parent.shape[0].bit_length()):
        path, step = path + path @ step, step @ step
    return path > 0


def _guarded(x: Tensor) -> Tensor:
    """clamp(x, -20, 20), whose gradient at NaN is 1: `torch.clamp` has 0 there, which hides it from the optimizer."""
    passes = (x.abs() <= MAX_LOG_RATIO) | x.isnan()
    moving = x.nan_to_num()
    return x.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO) + passes * (moving - moving.detach())


def _kl_estimates(d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k1, k2 and k3 of KL(policy || reference) from d = logprob - ref_logprob."""
    guarded = _guarded(d)
    return d, 0.5 * d * d, torch.expm1(-guarded) + guarded


def _largest(value: Tensor, used: Tensor) -> Tensor:
    """Largest value that is used, 0 if there is none."""
    return torch.cat([torch.where(used, value, 0.0), value.new_zeros(1)]).amax()
