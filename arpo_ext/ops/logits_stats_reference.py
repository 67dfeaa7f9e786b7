"""logits_stats in plain torch, in the order its definition gives. Shares no code with the fast backends.

Arguments as in the op's schema: logits [..., V], labels [...] or None, mask [...] or None, temperatures 0-d or [...] or
None (then the number `temperature`). Computes in float32, or in float64 for float64 logits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    logits: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor | None, ...]:
    """(logprob or None, entropy, logsumexp, sum_p2, argmax, argmax_logprob), each [...]."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    maximum = x.amax(-1)
    maximum = torch.where(maximum.isfinite(), maximum, torch.nan)
    divisor = torch.as_tensor(temperature if temperatures is None else temperatures, dtype=x.dtype, device=x.device)
    z = (x - maximum.unsqueeze(-1)) / divisor.unsqueeze(-1)
    weight = z.exp()
    argmax = torch.where(maximum.isnan(), -1, x.argmax(-1))
    others = weight.scatter(-1, argmax.clamp(min=0).unsqueeze(-1), 0).sum(-1)
    others = torch.where(maximum.isnan(), maximum, others)
    log_total = others.log1p()
    entropy = log_total - torch.where(weight > 0, z * weight, weight).sum(-1) / (1 + others)
    sum_p2 = (weight / (1 + others).unsqueeze(-1)).square().sum(-1)
    results = [entropy, maximum / divisor + log_total, sum_p2, argmax, -log_total]
    logprob = None
    if labels is not None:
        wanted = labels != ignore_index
        usable = wanted if mask is None else wanted & mask  # a masked row may hold any label
        index = torch.where(usable, labels, 0).unsqueeze(-1)
        logprob = torch.where(wanted, z.gather(-1, index)[..., 0] - log_total, 0)
    if mask is not None:
        empty = [0, 0, 0, -1, 0]
        results = [torch.where(mask, result, value) for result, value in zip(results, empty, strict=True)]
        logprob = None if logprob is None else torch.where(mask, logprob, 0)
    return logprob, *results
