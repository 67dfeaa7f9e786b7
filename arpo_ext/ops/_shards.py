"""logprob_entropy over a vocabulary that is read shard by shard: tiles on one device, or the parts of several ranks.

A shard is a LogitsCall with `vocab_start` and `vocab_total`. `running` [..., 4] float64 is what the shards so far leave
of each row: the maximum m of the raw logits (-inf before the first, NaN once a NaN or +inf was met); with
z = (x - m) / temperature the sums s of e^z and a of (x - m) e^z over all but one arg-max; the label's logit (NaN before
its shard).
"""

from __future__ import annotations

import torch
from torch import Tensor

from arpo_ext.ops._dispatch import choose
from arpo_ext.ops._logits import LogitsCall, check_temperatures, result_dtype, without_invalid_labels
from arpo_ext.ops._logits_backends import BACKWARD, SHARD_FORWARD


def new_running(logits: Tensor) -> Tensor:
    """`running` before the first shard, for the rows of `logits`."""
    running = logits.new_zeros((*logits.shape[:-1], 4), dtype=torch.float64)
    # Numbers filled in on the device: a tensor made from them would be copied to a GPU while the host waits.
    running[..., 0] = -torch.inf
    running[..., 3] = torch.nan
    return running


def shard_forward(call: LogitsCall, running: Tensor, backend: str = "auto") -> None:
    """Adds the shard to `running`, in place. Masked rows keep theirs."""
    expected = ((*call.logits.shape[:-1], 4), torch.float64, call.logits.device)
    assert (running.shape, running.dtype, running.device) == expected
    assert running.is_contiguous()
    choose("logprob_entropy over shards", SHARD_FORWARD, backend, call).run(call, running)


def no_columns(call: LogitsCall, backend: str = "auto") -> Tensor:
    """`running` of a shard without columns, whose rank must raise what the others do: they wait for it otherwise."""
    choose("logprob_entropy over shards", SHARD_FORWARD, backend, call._replace(logits=call.logits.new_empty(0, 1)))
    check_temperatures(call)
    without_invalid_labels(call, count=False)
    return new_running(call.logits)


def shard_finish(running: Tensor, call: LogitsCall) -> tuple[Tensor | None, Tensor, Tensor]:
    """(logprob or None, entropy, stats [3, ...]) of rows whose every shard is in `running`; `call` is any of these."""
    maximum, s, a, label_logit = running.unbind(-1)
    maximum = torch.where(maximum.isneginf(), torch.nan, maximum)
    temperature = call.temperature if call.temperatures is None else call.temperatures.double()
    log1p_s = torch.where(maximum.isnan(), maximum, s.log1p())
    mean_z = a / temperature / (1 + s)
    entropy = log1p_s - mean_z
    logprob = None
    if call.labels is not None:
        wanted = (call.labels != call.ignore_index) & (call.labels >= 0) & (call.labels < call.vocab)
        logprob = torch.where(wanted, (label_logit - maximum) / temperature - log1p_s, 0)
    stats = torch.stack((maximum, log1p_s, mean_z))
    if call.mask is not None:
        entropy, stats = torch.where(call.mask, entropy, 0), torch.where(call.mask, stats, 0)
        logprob = None if logprob is None else torch.where(call.mask, logprob, 0)
    dtype = result_dtype(call.logits)
    return None if logprob is None else logprob.to(dtype), entropy.to(dtype), stats.to(dtype)


def shard_backward(
    call: LogitsCall,
    stats: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    out: Tensor,
    backend: str = "auto",
) -> None:
    """Writes the gradient of the shard's logits into `out`, which may be the logits; `stats` are shard_finish's."""
    choose("logprob_entropy over shards", BACKWARD, backend, call).run(call, stats, grad_logprob, grad_entropy, out)
