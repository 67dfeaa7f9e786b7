"""linear_logprob_entropy in plain torch: all logits at once, then the formulas in the order a reader would write them.

Rows are flat: hidden [N, D], labels, mask and temperatures [N] (temperatures may be 0-d, or None: then the number
`temperature`). weight [V, D] and bias [V] may be the rows `vocab_start` and up of a larger vocabulary. Computes in
float32, or in float64 for float64 operands. Nothing here is shared with the fast backends, which are tested against it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, softcap: float) -> Tensor:
    if mask is not None:
        hidden = hidden.masked_fill(~mask.unsqueeze(1), 0)
    logits = _wide(hidden) @ _wide(weight).t()
    if bias is not None:
        logits = logits + _wide(bias)
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def sums(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    vocab_start: int,
) -> Tensor:
    """[N, 4] float64 of these columns alone: the maximum m, and over all but one arg-max the sums of e^z and of
    (x - m) e^z with z = (x - m) / temperature; the label's logit, NaN if it is not among them."""
    x = _logits(hidden, weight, bias, mask, softcap).double()
    divisor = torch.as_tensor(temperature if temperatures is None else temperatures, device=x.device).double()
    maximum = x.amax(1, keepdim=True)
    shift = torch.where(x == -torch.inf, 0, x - maximum)
    power = torch.where(x == -torch.inf, 0, torch.exp(shift / divisor.expand(len(x)).unsqueeze(1)))
    power = power.scatter(1, x.argmax(1, keepdim=True), 0)
    label_logit = torch.full_like(maximum, torch.nan)
    if labels is not None:
        column = (labels - vocab_start).unsqueeze(1)
        here = (column >= 0) & (column < x.shape[1])
        label_logit = torch.where(here, x.gather(1, torch.where(here, column, 0)), torch.nan)
    maximum = torch.where(maximum == torch.inf, torch.nan, maximum)
    total, moment = power.sum(1, keepdim=True), (power * shift).sum(1, keepdim=True)
    result = torch.cat((maximum, total, moment, label_logit), 1)
    if mask is not None:
        nothing = result.new_tensor((-torch.inf, 0, 0, torch.nan))
        result = torch.where(mask.unsqueeze(1), result, nothing)
    return result


def finish(
    sums: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(logprob or None, entropy, stats [3, N] = maximum, log1p(s), mean of z) of the sums over the whole vocabulary."""
    divisor = temperature if temperatures is None else temperatures.double()
    maximum, s, moment, label_logit = sums.t()
    maximum = torch.where(maximum == -torch.inf, torch.nan, maximum)
    log1p_s = torch.log1p(s) + 0 * maximum
    mean_z = moment / divisor / (1 + s)
    entropy, stats = log1p_s - mean_z, torch.stack((maximum, log1p_s, mean_z))
    logprob = None
    if labels is not None:
        logprob = torch.where(labels == ignore_index, 0, (label_logit - maximum) / divisor - log1p_s)
    if mask is not None:
        entropy, stats = torch.where(mask, entropy, 0), torch.where(mask, stats, 0)
        logprob = None if logprob is None else torch.where(mask, logprob, 0)
    return logprob, entropy, stats


def backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    softcap: float,
    vocab_start: int,
    stats: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, in the dtype of the computation; upstream gradients [N], None for zero."""
    x = _logits(hidden, weight, bias, mask, softcap)
    divisor = torch.as_tensor(temperature if temperatures is None else temperatures, device=x.device, dtype=x.dtype)
    divisor = divisor.expand(len(x)).unsqueeze(1)
    maximum, log1p_s, mean_z = stats.to(x.dtype).unsqueeze(2)
    z = (x - maximum) / divisor
    p = torch.exp(z - log1p_s)
    d_logits = torch.zeros_like(p)
    if grad_logprob is not None and labels is not None:
        column = (labels - vocab_start).unsqueeze(1)
        is_label = torch.arange(x.shape[1], device=x.device) == column
        difference = torch.where(is_label, -torch.expm1(z - log1p_s), -p)
        d_logits = difference * torch.where(labels == ignore_index, 0, grad_logprob).unsqueeze(1)
    if grad_entropy is not None:
        d_logits = d_logits - grad_entropy.unsqueeze(1) * torch.where(p > 0, p * (z - mean_z), p)
    d_logits = d_logits / divisor
    if softcap:
        d_logits = d_logits * (1 - (x / softcap) ** 2)
    if mask is not None:
        d_logits = torch.where(mask.unsqueeze(1), d_logits, 0)
        hidden = hidden.masked_fill(~mask.unsqueeze(1), 0)
    return d_logits @ _wide(weight), d_logits.t() @ _wide(hidden), d_logits.sum(0)
