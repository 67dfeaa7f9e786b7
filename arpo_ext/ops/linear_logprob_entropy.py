"""Log-probability of a label and entropy at the end of a language model, from the hidden states, without the logits.

    logits = hidden @ weight.T + bias
    logits = softcap * tanh(logits / softcap)                   # if there is a softcap
    logprob, entropy = logprob_entropy(logits, labels)          # see ops/logprob_entropy.py

The logits exist one small tile at a time, in float32: computed, summed up row by row, overwritten. The backward pass
computes each tile again, turns it into the gradient of the logits where it lies, and adds its products with weight and
hidden to theirs, in float32 whatever the dtype of the operands. So memory above inputs, outputs and gradients does not
grow with N (but for a float32 accumulator of the gradient of low-precision hidden states), and time is that of one
matrix product forward and three backward.
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
from arpo_ext.ops._logits import LogitsCall, check_temperatures, checked_call, result_dtype, without_invalid_labels
from arpo_ext.ops._logits_backends import SHARD_FORWARD
from arpo_ext.ops._shards import shard_finish


def linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_total: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor]:
    """`(logprob, entropy)` of each row of hidden, differentiable in hidden, weight and bias; no labels, no logprob.

    hidden: [..., D], weight: [V, D], bias: [V] or None; one dtype: float32, bfloat16, float16, or float64 (reference
        backend only). Under autocast all are cast to its dtype. bfloat16 and float16: products accumulate and logits
        are kept in float32; only the gradient of the logits is rounded, on the GPU, for the products that follow.
    labels: [...] integers in 0 to V-1. `ignore_index` gives logprob 0 (the entropy is still computed).
    temperature: a number, or a tensor that is 0-d or [...]; positive, not differentiable. Divides after the softcap.
    mask: [...] bool; where False both results are 0 and hidden is not used. On the CPU such rows cost nothing; on the
        GPU they still pass through the matrix products, because counting them would wait for the device.
    softcap: positive number or None.
    chunk_tokens: rows of a tile, at most; None: what was measured to be fast. Memory above the results follows it.
    group: the process group over which the vocabulary is divided, in the order of its ranks: weight and bias hold this
        rank's V rows, labels count over all of them, and hidden, labels and everything else are the same on every rank.
        Both results are those of the whole vocabulary, on every rank. The gradients that come back into this op must be
        the same on every rank too; the gradient of hidden is summed over the ranks inside.
    vocab_start, vocab_total: with a group whose ranks hold unequal parts, the number of the first column of this one,
        and of all columns (default: rank * V and ranks * V).
    backend: as in `logprob_entropy`: what sums up the tiles. The matrix products are torch's.

    Both results: [...], float32 (float64 for float64). NaN, infinities, labels out of range and their errors as in
    `logprob_entropy`. On the CPU a row whose upstream gradients are all zero takes part in no product of the backward
    pass. ValueError besides: shapes, differing dtypes, a DTensor. BackendError: the backend cannot serve the call.
    """
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if any(cls.__name__ == "DTensor" for cls in type(tensor).__mro__):
            raise ValueError(
                f"{name} is a DTensor, expected a plain tensor; call this inside the model's forward, "
                "where FSDP has gathered the weights"
            )
    hidden, weight, bias = _autocast(hidden, weight, bias)
    _check_operands(hidden, weight, bias)
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, or None, got {chunk_tokens}")
    rows = hidden.shape[:-1]
    checked = checked_call(hidden, labels, temperature, ignore_index, mask)
    shard = parallel.shard_of(group, weight.shape[0], vocab_start, vocab_total)
    call = LinearCall(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        *(t if t is None or t.shape != rows else t.reshape(-1) for t in checked[1:4]),
        checked.temperature,
        ignore_index,
        softcap or 0.0,
        chunk_tokens or 0,
        shard.start,
        shard.total,
    )
    running = torch.ops.arpo_ext.linear_logprob_entropy_sums(*call, backend)
    running = parallel.gather(running, shard, weight.shape[0], call.mask, call.temperatures, call.temperature)
    logprob, entropy, _ = torch.ops.arpo_ext.linear_logprob_entropy_combine(*call, running, shard.group, backend)
    return (None if labels is None else logprob.view(rows)), entropy.view(rows)


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[0] == 0 or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            "hidden must be [..., D] and weight [V, D] with V >= 1, "
            f"got hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be of shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype, tensor.device) != (hidden.dtype, hidden.device):
            raise ValueError(
                f"{name} must have the dtype and device of hidden, {hidden.dtype} on {hidden.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )


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


# Each names what sums up the tiles; the matrix products between are the same.
_TILED = [name for name in SHARD_FORWARD if name != "reference"]
_SUMS = {
    **{name: Backend(partial(_refuse_tiles, name), partial(tiles.sums, name)) for name in _TILED},
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
    "float temperature, int ignore_index, float softcap, int chunk_tokens, int vocab_start, int vocab_total"
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
    return _run(_SUMS, backend, LinearCall(*inputs))


@torch.library.register_fake("arpo_ext::linear_logprob_entropy_sums")
def _sums_fake(hidden, *_):
    return hidden.new_empty((hidden.shape[0], 4), dtype=torch.float64)


def _empty_results(hidden: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    count, dtype = hidden.shape[0], result_dtype(hidden)
    logprob = hidden.new_empty(0 if labels is None else count, dtype=dtype)
    return logprob, hidden.new_empty(count, dtype=dtype), hidden.new_empty((3, count), dtype=dtype)


@torch.library.impl("arpo_ext::linear_logprob_entropy_combine", "default")
def _combine(*args):
    *inputs, running, _group, backend = args
    call = LinearCall(*inputs)
    results = _empty_results(call.hidden, call.labels)
    for out, result in zip(results, _run(_COMBINE, backend, call, running), strict=True):
        if result is not None:
            out.copy_(result)
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
    inputs, (stats, grad_logprob, grad_entropy, *needs, in_float32, backend) = args[:_COUNT], args[_COUNT:]
    call = LinearCall(*inputs)
    found = _run(_BACKWARD, backend, call, Upstream(stats, grad_logprob, grad_entropy), Wanted(*needs))
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
