"""What one read of the logits tells of each row's distribution, for monitoring and baselines: no gradient.

    log_p = (logits / temperature).log_softmax(-1)
    logprob = log_p.gather(-1, labels[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)          # in nats; a logit of -inf is probability 0 and adds 0
    logsumexp = (logits / temperature).logsumexp(-1)
    sum_p2 = log_p.exp().square().sum(-1)             # collision probability: 1 if certain, 1 / V if uniform
    argmax = logits.argmax(-1)                        # the lowest index among equal ones
    argmax_logprob = log_p.amax(-1)

With m the row's maximum, z = (logits - m) / temperature, and over all but the arg-max s = sum of e^z, q = sum of e^2z,

    logsumexp = m / temperature + log1p(s)     sum_p2 = (1 + q) / (1 + s)^2     argmax_logprob = -log1p(s)

in float32 whatever the dtype of the logits, so that nearly certain rows keep their relative accuracy; logprob and
entropy as in `logprob_entropy`. The sum of p^2 is what optimal token baselines weigh with (verl's
`calculate_sum_pi_squared_from_logits`); argmax == labels tells whether a sampler took the likeliest token.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from arpo_ext.ops import _native
from arpo_ext.ops import logits_stats_reference as reference
from arpo_ext.ops._dispatch import CPU_BACKENDS, Backend, choose, refuse_cpu, refuse_cuda, refuse_triton
from arpo_ext.ops._invalid_labels import invalid_label_counter
from arpo_ext.ops._logits import (
    LogitsCall,
    check_temperatures,
    checked_call,
    native_inputs,
    refuse_layout,
    result_dtype,
    without_invalid_labels,
)


class LogitsStats(NamedTuple):
    """One value per row: [...], float32 (float64 for float64 logits), `argmax` int64; no gradient."""

    logprob: Tensor | None
    entropy: Tensor
    logsumexp: Tensor
    sum_p2: Tensor
    argmax: Tensor
    argmax_logprob: Tensor


def logits_stats(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> LogitsStats:
    """`LogitsStats` of each row; `logprob` is None without labels. Not differentiable: no result requires a gradient.

    logits: [..., V], float32, bfloat16, float16 or float64; rows may be strided (`logits[:, :-1]`), columns adjacent.
    labels: [...] integers in 0 to V-1. `ignore_index` gives logprob 0 (everything else is still computed).
    temperature: a number, or a tensor that is 0-d or [...]; positive.
    mask: [...] bool; where False argmax is -1, everything else 0, and the row is not read.
    backend: "auto", "cpu", "cuda", "triton", "reference", or one instruction set: "cpu-avx512", "cpu-avx2",
        "cpu-portable".

    A row that holds NaN or +inf, or only -inf, gives NaN, and argmax -1, in that row alone. A label on a logit of -inf
    gives logprob -inf. Errors and labels out of range as in `logprob_entropy`.
    """
    call = checked_call(logits, labels, temperature, ignore_index, mask)
    logprob, *others = torch.ops.arpo_ext.logits_stats(*call.inputs, backend)
    return LogitsStats(None if labels is None else logprob, *others)


def _native_call(call: LogitsCall, out: LogitsStats) -> tuple[object, object, list[Tensor]]:
    inputs, kept = native_inputs(call)
    return inputs, _native.C.LogitsStatsOutputs(*map(_native.pointer, out)), kept


def _run_cpu(isa: str, call: LogitsCall, out: LogitsStats) -> None:
    inputs, outputs, _kept = _native_call(call, out)
    _native.C.logits_stats(_native.ISA_CODES[isa], torch.get_num_threads(), inputs, outputs)


def _run_cuda(call: LogitsCall, out: LogitsStats) -> None:
    inputs, outputs, _kept = _native_call(call, out)
    device, stream = _native.place(call.logits)
    partials = call.logits.new_empty(_native.C.logits_stats_partials(inputs, device), dtype=torch.float32)
    counter = None if call.labels is None else invalid_label_counter(call.logits.device)
    _native.C.logits_stats_cuda(inputs, outputs, *map(_native.pointer, (partials, counter)), device, stream)


def _run_triton(call: LogitsCall, out: LogitsStats) -> None:
    # Imported here: a machine without Triton imports this file too.
    from arpo_ext.ops import logits_stats_triton

    logits_stats_triton.launch(call, out._asdict())


def _run_reference(call: LogitsCall, out: LogitsStats) -> None:
    check_temperatures(call)
    for to, result in zip(out, reference.forward(*without_invalid_labels(call).inputs), strict=True):
        if to is not None:
            to.copy_(result)


def _refuse_cpu(isa: str, call: LogitsCall) -> str | None:
    return refuse_cpu(call.logits, isa) or refuse_layout(call)


def _refuse_cuda(call: LogitsCall) -> str | None:
    return refuse_cuda(call.logits) or refuse_layout(call)


def _refuse_triton(call: LogitsCall) -> str | None:
    return refuse_triton(call.logits) or refuse_layout(call)


def _serves(*_: object) -> None:
    return None


_BACKENDS = {
    **{name: Backend(partial(_refuse_cpu, isa), partial(_run_cpu, isa)) for name, isa in CPU_BACKENDS.items()},
    "cuda": Backend(_refuse_cuda, _run_cuda),
    "triton": Backend(_refuse_triton, _run_triton),
    "reference": Backend(_serves, _run_reference),
}

torch.library.define(
    "arpo_ext::logits_stats",
    "(Tensor logits, Tensor? labels, Tensor? mask, Tensor? temperatures, float temperature, int ignore_index, "
    "str backend) -> (Tensor logprob, Tensor entropy, Tensor logsumexp, Tensor sum_p2, Tensor argmax, "
    "Tensor argmax_logprob)",
)


def _empty_results(logits: Tensor, labels: Tensor | None) -> LogitsStats:
    rows, dtype = logits.shape[:-1], result_dtype(logits)
    logprob = logits.new_empty((0,) if labels is None else rows, dtype=dtype)
    entropy, logsumexp, sum_p2, argmax_logprob = (logits.new_empty(rows, dtype=dtype) for _ in range(4))
    argmax = logits.new_empty(rows, dtype=torch.int64)
    return LogitsStats(logprob, entropy, logsumexp, sum_p2, argmax, argmax_logprob)


@torch.library.impl("arpo_ext::logits_stats", "default")
def _logits_stats(*args):
    *inputs, backend = args
    call = LogitsCall(*inputs)
    out = _empty_results(call.logits, call.labels)
    wanted = out if call.labels is not None else out._replace(logprob=None)
    choose("logits_stats", _BACKENDS, backend, call).run(call, wanted)
    return tuple(out)


@torch.library.register_fake("arpo_ext::logits_stats")
def _logits_stats_fake(logits, labels, *_):
    return tuple(_empty_results(logits, labels))


def _mark_results(ctx, inputs, output):
    ctx.mark_non_differentiable(*output)


def _no_gradient(ctx, *_):
    return (None,) * 7


torch.library.register_autograd("arpo_ext::logits_stats", _no_gradient, setup_context=_mark_results)
