"""Log-probability of a label and entropy of the distribution, for every row of logits, from one read of the logits.

    log_p = (logits / temperature).log_softmax(-1)
    logprob = log_p.gather(-1, labels[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)          # in nats; a logit of -inf is probability 0 and adds 0

The expression above loses what it is used for: the entropy of a nearly certain row is percents off, one -inf makes it
NaN, and it needs several copies of the logits. Here, with m the row's maximum and z = (logits - m) / temperature,

    s = sum of e^z over all but the arg-max           B = (sum of z e^z) / (1 + s), the mean of z
    logprob = z[label] - log1p(s)                     entropy = log1p(s) - B
    d logprob / d logits[j] = (1[j = label] - p[j]) / temperature
    d entropy / d logits[j] = -p[j] (z[j] - B) / temperature

in float32 whatever the dtype of the logits (float64 for float64, reference backend only). m, log1p(s) and B are kept
apart for the backward pass, which reads the logits once and writes the gradient once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arpo_ext.ops._dispatch import choose, refuse_forward_mode
from arpo_ext.ops._logits import LogitsCall, checked_call, result_dtype
from arpo_ext.ops._logits_backends import BACKWARD, FORWARD
from arpo_ext.ops._logprob_entropy_parallel import over_ranks
from arpo_ext.ops._result_memory import empty_result
from arpo_ext.ops._vocab_parallel import shard_of


def logprob_entropy(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
    group: torch.distributed.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_total: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor]:
    """`(logprob, entropy)` of each row, differentiable in the logits; `logprob` is None without labels.

    logits: [..., V], float32, bfloat16, float16 or float64; rows may be strided (`logits[:, :-1]`), columns adjacent.
    labels: [...] integers in 0 to V-1. `ignore_index` gives logprob 0 (the entropy is still computed).
    temperature: a number, or a tensor that is 0-d or [...]; positive, in 1e-15 to 1e30, not differentiable.
    mask: [...] bool; where False both results are 0 and the row is not read.
    inplace_backward: let the gradient take the logits' memory. Any other use of the logits in the backward pass then
        raises torch's "modified by an inplace operation". Inside `torch.compile` it has no effect.
    group: the process group over which the vocabulary is divided, in the order of its ranks: logits hold this rank's V
        columns, labels count over all of them, and labels, temperature and mask are the same on every rank. Both
        results are those of the whole rows, on every rank; the gradients that come back must be the same too.
    vocab_start, vocab_total: with a group whose ranks hold unequal parts, the number of the first column of this one,
        and of all columns (default: rank * V and ranks * V). A part may have no column.
    backend: "auto", "cpu", "cuda", "triton", "reference", or one instruction set: "cpu-avx512", "cpu-avx2",
        "cpu-portable".

    Both results: [...], float32 (float64 for float64 logits). A row that holds NaN or +inf, or only -inf, gives NaN in
    that row alone. A label on a logit of -inf gives -inf with a finite gradient.
    ValueError: shapes, dtypes, temperatures or, on the CPU, labels out of range; on the GPU those count as ignored and
    `invalid_labels` tells how many there were. BackendError: the backend cannot serve the call.
    """
    call = checked_call(logits, labels, temperature, ignore_index, mask, least=1 if group is None else 0)
    refuse_forward_mode("logprob_entropy", logits)
    if inplace_backward:
        _check_inplace(logits)
        inplace_backward = not torch.compiler.is_compiling()
    shard = shard_of(group, logits.shape[-1], vocab_start, vocab_total)
    if shard.group:
        logprob, entropy = over_ranks(call, shard, inplace_backward, backend)
    else:
        logprob, entropy, _ = torch.ops.arpo_ext.logprob_entropy_forward(*call.inputs, inplace_backward, backend)
    return (None if labels is None else logprob), entropy


def entropy(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
    group: torch.distributed.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_total: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Entropy of each row in nats; arguments and errors as in `logprob_entropy`."""
    return logprob_entropy(
        logits,
        temperature=temperature,
        mask=mask,
        inplace_backward=inplace_backward,
        group=group,
        vocab_start=vocab_start,
        vocab_total=vocab_total,
        backend=backend,
    )[1]


def logprob(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
    group: torch.distributed.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_total: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log-probability of each label; arguments and errors as in `logprob_entropy`."""
    result, _ = logprob_entropy(
        logits,
        labels,
        temperature=temperature,
        ignore_index=ignore_index,
        mask=mask,
        inplace_backward=inplace_backward,
        group=group,
        vocab_start=vocab_start,
        vocab_total=vocab_total,
        backend=backend,
    )
    assert result is not None
    return result


def logprob_entropy_into(
    logits: Tensor,
    *,
    entropy: Tensor,
    logprob: Tensor | None = None,
    labels: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """The forward pass into given tensors, for a sampler that calls once per token.

    Skips autograd and torch's dispatcher, which cost more than a small row does (about 20 us a call), and allocates
    nothing on the CPU. `entropy`, and `logprob` if given, are [...] float32 (float64 for float64 logits), contiguous.
    Everything else as in `logprob_entropy`.
    """
    call = checked_call(logits, labels, temperature, ignore_index, mask)
    for name, out in (("entropy", entropy), ("logprob", logprob)):
        if out is not None:
            _check_out(name, out, logits)
    if (logprob is None) != (labels is None):
        raise ValueError("logprob and labels go together; got only one of them")
    choose("logprob_entropy", FORWARD, backend, call).run(call, logprob, entropy, None)


class EntropyWriter:
    """`logprob_entropy_into(logits, entropy=entropy, temperature=temperature)`, checked once for a layout of logits.

    For a sampler whose batches look alike: beside a decoding step, what a call checks is cold and takes longer than a
    small row. `logits` says shape, strides, dtype and device; called with others: ValueError, nothing is written.
    """

    def __init__(self, logits: Tensor, entropy: Tensor, *, backend: str = "auto") -> None:
        call = checked_call(logits, None, 1.0, -100, None)
        _check_out("entropy", entropy, logits)
        self._run = choose("logprob_entropy", FORWARD, backend, call).run
        self._layout = (logits.shape, logits.stride(), logits.dtype, logits.device)
        self._entropy = entropy

    def __call__(self, logits: Tensor, temperature: float) -> None:
        layout = (logits.shape, logits.stride(), logits.dtype, logits.device)
        if layout != self._layout:
            raise ValueError(f"logits have (shape, strides, dtype, device) {layout}; expected {self._layout}")
        if not 1e-15 <= temperature <= 1e30:
            raise ValueError(f"temperature must be positive, in 1e-15 to 1e30, got {temperature}")
        self._run(LogitsCall(logits, None, None, None, temperature, -100), None, self._entropy, None)


def _check_out(name: str, out: Tensor, logits: Tensor) -> None:
    expected = (logits.shape[:-1], result_dtype(logits), logits.device)
    if (out.shape, out.dtype, out.device) != expected or not out.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {expected[1]} of shape {tuple(expected[0])} on {expected[2]}, "
            f"got {out.dtype} {tuple(out.shape)} with strides {out.stride()} on {out.device}"
        )


def _check_inplace(logits: Tensor) -> None:
    # A view of a leaf is none itself, yet its memory is the leaf's.
    owner = logits if logits._base is None else logits._base
    if owner.requires_grad and owner.is_leaf:
        raise ValueError("inplace_backward would overwrite a leaf that requires grad; expected logits some op computed")
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(logits.shape, logits.stride(), strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(
                f"inplace_backward needs logits whose elements do not overlap, got strides {logits.stride()}"
            )
        reach += (size - 1) * stride


_INPUTS = "Tensor? labels, Tensor? mask, Tensor? temperatures, float temperature, int ignore_index"
_UPSTREAM = "Tensor stats, Tensor? grad_logprob, Tensor? grad_entropy"
# The backward ops serve shards too; vocab_total 0: the logits are all columns.
_SHARD = "SymInt vocab_start=0, SymInt vocab_total=0"
torch.library.define(
    "arpo_ext::logprob_entropy_forward",
    f"(Tensor logits, {_INPUTS}, bool inplace_backward, str backend) -> (Tensor logprob, Tensor entropy, Tensor stats)",
)
torch.library.define(
    "arpo_ext::logprob_entropy_backward", f"(Tensor logits, {_INPUTS}, {_UPSTREAM}, str backend, {_SHARD}) -> Tensor"
)
torch.library.define(
    "arpo_ext::logprob_entropy_backward_", f"(Tensor(a!) logits, {_INPUTS}, {_UPSTREAM}, str backend, {_SHARD}) -> ()"
)


def _empty_results(logits: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = logits.shape[:-1], result_dtype(logits)
    logprob = logits.new_empty((0,) if labels is None else rows, dtype=dtype)
    return logprob, logits.new_empty(rows, dtype=dtype), logits.new_empty((3, *rows), dtype=dtype)


@torch.library.impl("arpo_ext::logprob_entropy_forward", "default")
def _forward(logits, labels, mask, temperatures, temperature, ignore_index, inplace_backward, backend):
    call = LogitsCall(logits, labels, mask, temperatures, temperature, ignore_index)
    logprob, entropy, stats = _empty_results(logits, labels)
    run = choose("logprob_entropy", FORWARD, backend, call).run
    run(call, None if labels is None else logprob, entropy, stats)
    return logprob, entropy, stats


@torch.library.register_fake("arpo_ext::logprob_entropy_forward")
def _forward_fake(logits, labels, mask, temperatures, temperature, ignore_index, inplace_backward, backend):
    return _empty_results(logits, labels)


def _shard_call(inputs: tuple[Any, ...], vocab_start: int = 0, vocab_total: int = 0) -> LogitsCall:
    return LogitsCall(*inputs, vocab_start, vocab_total or None)


@torch.library.impl("arpo_ext::logprob_entropy_backward", "default")
def _backward(*args):
    inputs, (stats, grad_logprob, grad_entropy, backend, *shard) = args[:6], args[6:]
    call = _shard_call(inputs, *shard)
    out = empty_result(call.logits.shape, call.logits)
    if call.logits.numel() == 0:
        return out
    choose("logprob_entropy", BACKWARD, backend, call).run(call, stats, grad_logprob, grad_entropy, out)
    return out


@torch.library.register_fake("arpo_ext::logprob_entropy_backward")
def _backward_fake(logits, *_):
    return logits.new_empty(logits.shape)


@torch.library.impl("arpo_ext::logprob_entropy_backward_", "default")
def _backward_inplace(*args):
    inputs, (stats, grad_logprob, grad_entropy, backend, *shard) = args[:6], args[6:]
    call = _shard_call(inputs, *shard)
    if call.logits.numel() == 0:
        return
    choose("logprob_entropy", BACKWARD, backend, call).run(call, stats, grad_logprob, grad_entropy, call.logits)
    # Native code writes behind torch's back; this is what makes other users of the logits raise.
    torch.autograd.graph.increment_version(call.logits)


@torch.library.register_fake("arpo_ext::logprob_entropy_backward_")
def _backward_inplace_fake(*_):
    return None


def _save(ctx, inputs, output):
    logits, labels, mask, temperatures, ctx.temperature, ctx.ignore_index, ctx.inplace, ctx.backend = inputs
    stats = output[2]
    ctx.save_for_backward(logits, labels, mask, temperatures, stats)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_logprob, grad_entropy, _grad_stats):
    nothing = (None,) * 7
    if grad_logprob is None and grad_entropy is None:
        return None, *nothing
    logits, labels, mask, temperatures, stats = ctx.saved_tensors
    args = (logits, labels, mask, temperatures, ctx.temperature, ctx.ignore_index)
    args = (*args, stats, grad_logprob if labels is not None else None, grad_entropy, ctx.backend)
    # With create_graph the functional op takes the call, and refuses it in words if it is differentiated.
    if ctx.inplace and not torch.is_grad_enabled():
        torch.ops.arpo_ext.logprob_entropy_backward_(*args)
        return logits.detach(), *nothing
    return torch.ops.arpo_ext.logprob_entropy_backward(*args), *nothing


def _refuse_second_derivative(ctx, *_):
    raise RuntimeError("logprob_entropy has no second derivative; expected backward() without create_graph=True")


torch.library.register_autograd("arpo_ext::logprob_entropy_forward", _differentiate, setup_context=_save)
torch.library.register_autograd("arpo_ext::logprob_entropy_backward", _refuse_second_derivative)
