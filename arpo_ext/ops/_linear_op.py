"""The torch.library ops under linear_logprob_entropy: sums of this rank's columns, results of all sums, gradients.

running = sums(hidden, weight)                         # no gradient; with a group then gathered and merged
logprob, entropy = combine(hidden, weight, running)    # its backward pass is the op `backward`

They take and give rows of any leading dimensions: a reshaped result of one of flat rows would be a view, which FSDP
warns of.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from arpo_ext.ops import _linear_tiles as tiles
from arpo_ext.ops import _vocab_parallel as parallel
from arpo_ext.ops import linear_logprob_entropy_reference as reference
from arpo_ext.ops._dispatch import Backend, choose
from arpo_ext.ops._linear_tiles import LinearCall, Upstream, Wanted
from arpo_ext.ops._logits import LogitsCall, check_temperatures, result_dtype, without_invalid_labels
from arpo_ext.ops._logits_backends import SHARD_FORWARD
from arpo_ext.ops._shards import no_columns, shard_finish


def _refuse_tiles(name: str, call: LinearCall, *_: object) -> str | None:
    return SHARD_FORWARD[name].refuse(LogitsCall(call.hidden.new_empty(0, 1), None, None, None, 1.0, -100))


def _serves(*_: object) -> None:
    return None


def _valid(call: LinearCall, *, count: bool) -> LinearCall:
    rows = LogitsCall(call.hidden, *call[3:8], vocab_start=call.vocab_start, vocab_total=call.vocab_total)
    check_temperatures(rows)
    return call._replace(labels=without_invalid_labels(rows, count=count).labels)


def _sums_reference(call: LinearCall) -> Tensor:
    call = _valid(call, count=True)
    options = (call.mask, call.temperatures, call.temperature, call.softcap, call.vocab_start)
    return reference.sums(call.hidden, call.weight, call.bias, call.labels, *options)


def _finish(call: LinearCall, running: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    return shard_finish(running, call.rows(call.hidden))


def _finish_reference(call: LinearCall, running: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    call = _valid(call, count=False)
    return reference.finish(running, *call[3:8])


def _gradients_reference(call: LinearCall, upstream: Upstream, wanted: Wanted) -> tuple[Tensor | None, ...]:
    call = _valid(call, count=False)
    found = reference.backward(*call[:9], call.vocab_start, *upstream)
    return tuple(t if want else None for t, want in zip(found, wanted, strict=True))


def _sums_triton(call: LinearCall) -> Tensor:
    # Imported here: a machine without Triton imports this file too.
    from arpo_ext.ops import linear_logprob_entropy_triton

    return linear_logprob_entropy_triton.sums(call)


# Each names what sums up the tiles; the matrix products between are the same.
_TILED = [name for name in SHARD_FORWARD if name != "reference"]
_SUMS = {
    **{name: Backend(partial(_refuse_tiles, name), partial(tiles.sums, name)) for name in _TILED},
    "triton": Backend(partial(_refuse_tiles, "triton"), _sums_triton),
    "reference": Backend(_serves, _sums_reference),
}
_COMBINE = {
    **{name: Backend(partial(_refuse_tiles, name), _finish) for name in _TILED},
    "reference": Backend(_serves, _finish_reference),
}
_BACKWARD = {
    **{name: Backend(partial(_refuse_tiles, name), partial(tiles.gradients, name)) for name in _TILED},
    "reference": Backend(_serves, _gradients_reference),
}

_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? labels, Tensor? mask, Tensor? temperatures, "
    "float temperature, int ignore_index, float softcap, int chunk_tokens, SymInt vocab_start, SymInt vocab_total"
)
_COUNT = len(LinearCall._fields)
torch.library.define("arpo_ext::linear_logprob_entropy_sums", f"({_INPUTS}, str backend) -> Tensor")
torch.library.define(
    "arpo_ext::linear_logprob_entropy_combine",
    f"({_INPUTS}, Tensor running, str group, str backend) -> (Tensor logprob, Tensor entropy, Tensor stats)",
)
torch.library.define(
    "arpo_ext::linear_logprob_entropy_backward",
    f"({_INPUTS}, Tensor stats, Tensor? grad_logprob, Tensor? grad_entropy, bool need_hidden, bool need_weight, "
    "bool need_bias, bool in_float32, str backend) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
)


def _run(table: dict[str, Backend], backend: str, call: LinearCall, *args: object):
    # The products inside choose their own precision.
    with torch.autocast(call.hidden.device.type, enabled=False):
        return choose("linear_logprob_entropy", table, backend, call, *args).run(call, *args)


@torch.library.impl("arpo_ext::linear_logprob_entropy_sums", "default")
def _sums(*args):
    *inputs, backend = args
    call = LinearCall(*inputs)
    if call.weight.shape[0] == 0:
        return no_columns(call.rows(call.hidden), backend)
    return _run(_SUMS, backend, call.flat()).view(*call.hidden.shape[:-1], 4)


@torch.library.register_fake("arpo_ext::linear_logprob_entropy_sums")
def _sums_fake(hidden, *_):
    return hidden.new_empty((*hidden.shape[:-1], 4), dtype=torch.float64)


def _empty_results(hidden: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = hidden.shape[:-1], result_dtype(hidden)
    logprob = hidden.new_empty((0,) if labels is None else rows, dtype=dtype)
    return logprob, hidden.new_empty(rows, dtype=dtype), hidden.new_empty((3, *rows), dtype=dtype)


@torch.library.impl("arpo_ext::linear_logprob_entropy_combine", "default")
def _combine(*args):
    *inputs, running, _group, backend = args
    call = LinearCall(*inputs)
    results = _empty_results(call.hidden, call.labels)
    found = _run(_COMBINE, backend, call.flat(), running.reshape(-1, 4))
    for out, result in zip(results, found, strict=True):
        if result is not None:
            out.copy_(result.view_as(out))
    return results


@torch.library.register_fake("arpo_ext::linear_logprob_entropy_combine")
def _combine_fake(*args):
    return _empty_results(args[0], args[3])


def _empty_gradients(hidden, weight, need_hidden, need_weight, need_bias, in_float32):
    dtype = torch.promote_types(hidden.dtype, torch.float32) if in_float32 else hidden.dtype
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,), dtype=dtype)
    grad_weight = weight.new_empty(weight.shape if need_weight else (0,))
    return grad_hidden, grad_weight, weight.new_empty(weight.shape[:1] if need_bias else (0,))


@torch.library.impl("arpo_ext::linear_logprob_entropy_backward", "default")
def _backward(*args):
    inputs, (stats, *upstream), (*needs, in_float32, backend) = args[:_COUNT], args[_COUNT:-5], args[-5:]
    call = LinearCall(*inputs)
    if call.weight.shape[0] == 0:
        gradients = _empty_gradients(call.hidden, call.weight, *needs, in_float32)
        return gradients[0].zero_(), *gradients[1:]
    flat = Upstream(stats.reshape(3, -1), *(None if t is None else t.reshape(-1) for t in upstream))
    grad_hidden, *others = _run(_BACKWARD, backend, call.flat(), flat, Wanted(*needs))
    found = (None if grad_hidden is None else grad_hidden.view(call.hidden.shape), *others)
    nothing = _empty_gradients(call.hidden, call.weight, False, False, False, in_float32)
    return tuple(empty if t is None else t.to(empty.dtype) for t, empty in zip(found, nothing, strict=True))


@torch.library.register_fake("arpo_ext::linear_logprob_entropy_backward")
def _backward_fake(*args):
    *needs, in_float32, _backend = args[_COUNT + 3 :]
    return _empty_gradients(args[0], args[1], *needs, in_float32)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6], output[2])
    ctx.numbers, ctx.group, ctx.backend = inputs[6:_COUNT], *inputs[_COUNT + 1 :]
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_logprob, grad_entropy, _grad_stats):
    nothing = (None,) * (_COUNT + 3)
    *tensors, stats = ctx.saved_tensors
    if tensors[3] is None:
        grad_logprob = None
    if grad_logprob is None and grad_entropy is None:
        return nothing
    needs = ctx.needs_input_grad[:3]
    found = torch.ops.arpo_ext.linear_logprob_entropy_backward(
        *tensors, *ctx.numbers, stats, grad_logprob, grad_entropy, *needs, ctx.group != "", ctx.backend
    )
    grad_hidden, grad_weight, grad_bias = (t if need else None for t, need in zip(found, needs, strict=True))
    if grad_hidden is not None and ctx.group:
        # Summed over the ranks before it is rounded.
        grad_hidden = parallel.all_reduce(grad_hidden, ctx.group).to(tensors[0].dtype)
    return grad_hidden, grad_weight, grad_bias, *nothing[3:]


def _refuse_second_derivative(ctx, *_):
    raise RuntimeError("linear_logprob_entropy has no second derivative; expected backward() without create_graph=True")


def _sums_have_no_gradient(ctx, inputs, output):
    ctx.mark_non_differentiable(output)


torch.library.register_autograd(
    "arpo_ext::linear_logprob_entropy_sums",
    lambda ctx, _: (None,) * (_COUNT + 1),
    setup_context=_sums_have_no_gradient,
)
torch.library.register_autograd("arpo_ext::linear_logprob_entropy_combine", _differentiate, setup_context=_save)
torch.library.register_autograd("arpo_ext::linear_logprob_entropy_backward", _refuse_second_derivative)
