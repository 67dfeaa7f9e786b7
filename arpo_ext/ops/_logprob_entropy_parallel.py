"""logprob_entropy of rows whose columns are divided over the ranks of a process group: sums, gather, results.

running = sums of this rank's columns (an op without gradient)
running = those of all ranks, gathered and merged
logprob, entropy = combine(logits, running): its backward pass writes the gradient of this rank's logits
"""

from __future__ import annotations

import torch
from torch import Tensor

from arpo_ext.ops._logits import LogitsCall, result_dtype
from arpo_ext.ops._shards import new_running, no_columns, shard_finish, shard_forward
from arpo_ext.ops._vocab_parallel import Shard, gather

_CALL = (
    "Tensor logits, Tensor? labels, Tensor? mask, Tensor? temperatures, float temperature, int ignore_index, "
    "SymInt vocab_start, SymInt vocab_total"
)
_COUNT = len(LogitsCall._fields)
torch.library.define("arpo_ext::logprob_entropy_sums", f"({_CALL}, str backend) -> Tensor")
torch.library.define(
    "arpo_ext::logprob_entropy_combine",
    f"({_CALL}, Tensor running, bool inplace_backward, str backend) -> (Tensor logprob, Tensor entropy, Tensor stats)",
)


def over_ranks(call: LogitsCall, shard: Shard, inplace_backward: bool, backend: str) -> tuple[Tensor, Tensor]:
    """(logprob, entropy) of whole rows; `call` holds this rank's columns. Without labels logprob is empty."""
    call = call._replace(vocab_start=shard.start, vocab_total=shard.total)
    running = torch.ops.arpo_ext.logprob_entropy_sums(*call, backend)
    running = gather(running, shard, call.logits.shape[-1], call.mask, call.temperatures, call.temperature)
    results = torch.ops.arpo_ext.logprob_entropy_combine(*call, running, inplace_backward, backend)
    return results[0], results[1]


@torch.library.impl("arpo_ext::logprob_entropy_sums", "default")
def _sums(*args):
    *inputs, backend = args
    call = LogitsCall(*inputs)
    if call.logits.shape[-1] == 0:
        return no_columns(call, backend)
    running = new_running(call.logits)
    shard_forward(call, running, backend)
    return running


@torch.library.register_fake("arpo_ext::logprob_entropy_sums")
def _sums_fake(logits, *_):
    return logits.new_empty((*logits.shape[:-1], 4), dtype=torch.float64)


@torch.library.impl("arpo_ext::logprob_entropy_combine", "default")
def _combine(*args):
    *inputs, running, _inplace_backward, _backend = args
    call = LogitsCall(*inputs)
    logprob, entropy, stats = shard_finish(running, call)
    return entropy.new_empty(0) if logprob is None else logprob, entropy, stats


@torch.library.register_fake("arpo_ext::logprob_entropy_combine")
def _combine_fake(logits, labels, *_):
    rows, dtype = logits.shape[:-1], result_dtype(logits)
    logprob = logits.new_empty((0,) if labels is None else rows, dtype=dtype)
    return logprob, logits.new_empty(rows, dtype=dtype), logits.new_empty((3, *rows), dtype=dtype)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], output[2])
    ctx.numbers, ctx.shard, (_, ctx.inplace, ctx.backend) = inputs[4:6], inputs[6:8], inputs[8:]
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_logprob, grad_entropy, _grad_stats):
    nothing = (None,) * (_COUNT + 2)
    *tensors, stats = ctx.saved_tensors
    if tensors[1] is None:
        grad_logprob = None
    if grad_logprob is None and grad_entropy is None:
        return None, *nothing
    args = (*tensors, *ctx.numbers, stats, grad_logprob, grad_entropy, ctx.backend, *ctx.shard)
    # As on one rank: with create_graph the functional op takes the call and refuses to be differentiated.
    if ctx.inplace and not torch.is_grad_enabled():
        torch.ops.arpo_ext.logprob_entropy_backward_(*args)
        return tensors[0].detach(), *nothing
    return torch.ops.arpo_ext.logprob_entropy_backward(*args), *nothing


def _sums_have_no_gradient(ctx, inputs, output):
    ctx.mark_non_differentiable(output)


torch.library.register_autograd(
    "arpo_ext::logprob_entropy_sums", lambda ctx, _: (None,) * (_COUNT + 1), setup_context=_sums_have_no_gradient
)
torch.library.register_autograd("arpo_ext::logprob_entropy_combine", _differentiate, setup_context=_save)
