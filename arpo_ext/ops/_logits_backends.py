"""What runs logprob_entropy: its backends as functions over a checked call, in the tables `_dispatch.choose` reads."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from arpo_ext.ops import _native
from arpo_ext.ops import logprob_entropy_reference as reference
from arpo_ext.ops._dispatch import CPU_BACKENDS, Backend, refuse_cpu, refuse_cuda, refuse_triton
from arpo_ext.ops._invalid_labels import invalid_label_counter
from arpo_ext.ops._logits import (
    LogitsCall,
    check_temperatures,
    native_inputs,
    refuse_layout,
    row_layout,
    without_invalid_labels,
)


def _forward_cpu(isa: str, call: LogitsCall, logprob: Tensor | None, entropy: Tensor, stats: Tensor | None) -> None:
    inputs, _kept = native_inputs(call)
    _native.C.logprob_entropy_forward(
        _native.ISA_CODES[isa],
        torch.get_num_threads(),
        inputs,
        _native.pointer(logprob),
        _native.pointer(entropy),
        _native.pointer(stats),
    )


def _shard_cpu(isa: str, call: LogitsCall, running: Tensor) -> None:
    inputs, _kept = native_inputs(call)
    _native.C.logprob_entropy_shard(_native.ISA_CODES[isa], torch.get_num_threads(), inputs, running.data_ptr())


def _backward_cpu(
    isa: str, call: LogitsCall, stats: Tensor, grad_logprob: Tensor | None, grad_entropy: Tensor | None, out: Tensor
) -> None:
    inputs, _kept = native_inputs(call)
    upstream = [None if grad is None else grad.contiguous() for grad in (grad_logprob, grad_entropy)]
    out_layout = row_layout(out)
    assert out_layout is not None
    _native.C.logprob_entropy_backward(
        _native.ISA_CODES[isa],
        torch.get_num_threads(),
        inputs,
        stats.data_ptr(),
        *map(_native.pointer, upstream),
        out.data_ptr(),
        *out_layout,
    )


def _scratch_cuda(call: LogitsCall, inputs: object, device: int) -> tuple[Tensor, Tensor | None]:
    partials = call.logits.new_empty(_native.C.logprob_entropy_partials(inputs, device), dtype=torch.float32)
    return partials, None if call.labels is None else invalid_label_counter(call.logits.device)


def _forward_cuda(call: LogitsCall, logprob: Tensor | None, entropy: Tensor, stats: Tensor | None) -> None:
    inputs, _kept = native_inputs(call)
    device, stream = _native.place(call.logits)
    scratch = _scratch_cuda(call, inputs, device)
    _native.C.logprob_entropy_forward_cuda(
        inputs, *map(_native.pointer, (logprob, entropy, stats, *scratch)), device, stream
    )


def _shard_cuda(call: LogitsCall, running: Tensor) -> None:
    inputs, _kept = native_inputs(call)
    device, stream = _native.place(call.logits)
    scratch = _scratch_cuda(call, inputs, device)
    _native.C.logprob_entropy_shard_cuda(inputs, *map(_native.pointer, (running, *scratch)), device, stream)


def _backward_cuda(
    call: LogitsCall, stats: Tensor, grad_logprob: Tensor | None, grad_entropy: Tensor | None, out: Tensor
) -> None:
    inputs, _kept = native_inputs(call)
    upstream = [None if grad is None else grad.contiguous() for grad in (grad_logprob, grad_entropy)]
    out_layout = row_layout(out)
    assert out_layout is not None
    rows = stats.new_empty((stats[0].numel(), _native.C.logprob_entropy_row_bytes()), dtype=torch.uint8)
    given = (stats, *upstream, out)
    _native.C.logprob_entropy_backward_cuda(
        inputs, *map(_native.pointer, given), *out_layout, rows.data_ptr(), *_native.place(out)
    )


def _run_triton(pass_name: str, *args: object) -> None:
    # Imported here: a machine without Triton imports this file too.
    from arpo_ext.ops import logprob_entropy_triton

    getattr(logprob_entropy_triton, pass_name)(*args)


def _refuse_cpu(isa: str, call: LogitsCall, *_: object) -> str | None:
    return refuse_cpu(call.logits, isa) or refuse_layout(call)


def _refuse_cuda(call: LogitsCall, *_: object) -> str | None:
    return refuse_cuda(call.logits) or refuse_layout(call)


def _refuse_triton(call: LogitsCall, *_: object) -> str | None:
    return refuse_triton(call.logits) or refuse_layout(call)


def _forward_reference(call: LogitsCall, logprob: Tensor | None, entropy: Tensor, stats: Tensor | None) -> None:
    check_temperatures(call)
    results = reference.forward(*without_invalid_labels(call).inputs)
    for out, result in zip((logprob, entropy, stats), results, strict=True):
        if out is not None:
            out.copy_(result)


def _shard_reference(call: LogitsCall, running: Tensor) -> None:
    check_temperatures(call)
    running.copy_(reference.shard_forward(*without_invalid_labels(call).inputs, running, vocab_start=call.vocab_start))


def _backward_reference(
    call: LogitsCall, stats: Tensor, grad_logprob: Tensor | None, grad_entropy: Tensor | None, out: Tensor
) -> None:
    # The forward pass has counted the invalid labels.
    call = without_invalid_labels(call, count=False)
    out.copy_(reference.backward(*call.inputs, stats, grad_logprob, grad_entropy, vocab_start=call.vocab_start))


def _serves(*_: object) -> None:
    return None


# Arguments of the functions: see _forward_cpu, _shard_cpu and _backward_cpu.
FORWARD = {
    **{name: Backend(partial(_refuse_cpu, isa), partial(_forward_cpu, isa)) for name, isa in CPU_BACKENDS.items()},
    "cuda": Backend(_refuse_cuda, _forward_cuda),
    "triton": Backend(_refuse_triton, partial(_run_triton, "forward")),
    "reference": Backend(_serves, _forward_reference),
}
SHARD_FORWARD = {
    **{name: Backend(partial(_refuse_cpu, isa), partial(_shard_cpu, isa)) for name, isa in CPU_BACKENDS.items()},
    "cuda": Backend(_refuse_cuda, _shard_cuda),
    "triton": Backend(_refuse_triton, partial(_run_triton, "shard_forward")),
    "reference": Backend(_serves, _shard_reference),
}
BACKWARD = {
    **{name: Backend(partial(_refuse_cpu, isa), partial(_backward_cpu, isa)) for name, isa in CPU_BACKENDS.items()},
    "cuda": Backend(_refuse_cuda, _backward_cuda),
    "triton": Backend(_refuse_triton, partial(_run_triton, "backward")),
    "reference": Backend(_serves, _backward_reference),
}
