"""The registered op under `policy_loss`: its backends, its gradient, and the short way there in eager code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch._C import _functorch as functorch

from arpo_ext.ops import _native
from arpo_ext.ops import policy_loss_reference as reference
from arpo_ext.ops._dispatch import CPU_BACKENDS, Backend, refuse_cuda, refuse_forward_mode, refuse_triton
from arpo_ext.ops._policy_loss import SCHEMA, TENSORS, PolicyLossCall

# Codes as in csrc/policy_loss.h.
_CLIPS = {"ppo": 0, "dual": 0, "gppo": 1, "cispo": 2, "sapo": 3}
_KLS = {None: 0, "k1": 1, "k2": 2, "k3": 3}
SUMS = 16

# loss, sums [SUMS] float64, and the gradients of the loss in logprob and in entropy where wanted
Results = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def _results(call: PolicyLossCall, want_gradient: bool, want_entropy_gradient: bool) -> Results:
    new = call.logprob.new_empty
    count = call.logprob.shape[0]
    gradient = new(count) if want_gradient else None
    entropy_gradient = new(count) if want_entropy_gradient else None
    return new(()), new(SUMS, dtype=torch.float64), gradient, entropy_gradient


# (place among a call's tensors, the first of the numbers that it holds)
_NUMBER_SLOTS = [
    (PolicyLossCall._fields.index(name), first)
    for name, first in (
        ("normalizer_tensor", 0),
        ("kl_coef_tensor", 1),
        ("entropy_coef_tensor", 2),
        ("clip_numbers", 3),
    )
]


def native_call(call: PolicyLossCall) -> tuple[object, list[Tensor | None]]:
    """The native description of a call, and the tensors that must outlive it."""
    kept = [tensor if tensor is None else tensor.contiguous() for tensor in call[:TENSORS]]
    numbers = [call.normalizer, call.kl_coef, call.entropy_coef, call.clip_low, call.clip_high]
    numbers += [torch.inf if call.dual_clip is None else call.dual_clip, call.tau_positive, call.tau_negative]
    for slot, first in _NUMBER_SLOTS:
        # A number in the host's memory is read here; one on the device is read by the kernel.
        tensor = kept[slot]
        if tensor is not None and _native.device_kind(tensor) == "cpu":
            numbers[first : first + tensor.numel()], kept[slot] = tensor.reshape(-1).tolist(), None
        elif tensor is not None:
            kept[slot] = tensor.to(torch.float64)
    native = _native.C.PolicyLoss(
        [0 if tensor is None else tensor.data_ptr() for tensor in kept],
        numbers,
        call.logprob.shape[0],
        call.advantage.ndim == 2,
        0 if call.ratio == "token" else 1 if call.parent is None else 2,
        call.group is not None and call.group.dtype is torch.int64,
        call.groups,
        call.ratio_gradient == "mean",
        0 if call.leaf_segment is None else call.leaf_segment.shape[0],
        _CLIPS[call.clip],
        _KLS[call.kl],
    )
    return native, kept


def _launch_cpu(isa: str, call: PolicyLossCall, want_gradient: bool, want_entropy_gradient: bool) -> Results:
    results = _results(call, want_gradient, want_entropy_gradient)
    native, kept = native_call(call)
    outputs = [0 if tensor is None else tensor.data_ptr() for tensor in results]
    _native.C.policy_loss_cpu(_native.ISA_CODES[isa], torch.get_num_threads(), native, *outputs)
    del kept
    return results


def _launch_cuda(call: PolicyLossCall, want_gradient: bool, want_entropy_gradient: bool) -> Results:
    results = _results(call, want_gradient, want_entropy_gradient)
    native, kept = native_call(call)
    workspace = call.logprob.new_empty(_native.C.policy_loss_workspace(native), dtype=torch.uint8)
    outputs = [0 if tensor is None else tensor.data_ptr() for tensor in results]
    _native.C.policy_loss_cuda(native, *outputs, workspace.data_ptr(), *_native.place(call.logprob))
    del kept
    return results


def _launch_triton(call: PolicyLossCall, want_gradient: bool, want_entropy_gradient: bool) -> Results:
    # Imported here: a machine without Triton imports this file too.
    from arpo_ext.ops import policy_loss_triton

    results = _results(call, want_gradient, want_entropy_gradient)
    policy_loss_triton.launch(call, (_CLIPS[call.clip], _KLS[call.kl]), results)
    return results


# backend -> what computes it; the arguments are a call and which gradients are wanted
LAUNCH: dict[str, Callable[[PolicyLossCall, bool, bool], Results]] = {
    **{name: partial(_launch_cpu, isa) for name, isa in CPU_BACKENDS.items()},
    "cuda": _launch_cuda,
    "triton": _launch_triton,
}


def _backward(ctx, grad_loss: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of logprob and entropy."""
    if torch.is_grad_enabled():
        raise RuntimeError("policy_loss cannot be differentiated twice; its reference backend can")
    if grad_loss is None:
        return None, None
    handed_on = _is_last_pass() and _is_one(grad_loss)
    first, second = (g if g is None or handed_on else g * grad_loss for g in ctx.saved_tensors)
    return first, second


# Whether the running backward pass keeps the graph for another one.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _is_last_pass() -> bool:
    """Whether the saved gradient may be given away: a leaf may take it for its .grad and add to it in place."""
    return not _keeps_graph()


def _is_one(grad_loss: Tensor) -> bool:
    """Whether the loss itself is back-propagated: then the product would only read and write the gradient again."""
    # Traced tensors are subclasses, and those under vmap hold several numbers.
    if type(grad_loss) is not Tensor or grad_loss.device.type != "cpu":
        return False
    if functorch.is_functorch_wrapped_tensor(grad_loss) or functorch.is_legacy_batchedtensor(grad_loss):
        return False
    return grad_loss.item() == 1.0


def _save(ctx, sums: Tensor, *gradients: Tensor | None) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(sums)
    ctx.save_for_backward(*gradients)


class _PolicyLoss(torch.autograd.Function):
    """What the registered op does, without the 40 us a call that its dispatch and its autograd wrapper cost."""

    @staticmethod
    def forward(ctx, logprob: Tensor, entropy: Tensor | None, call: PolicyLossCall, backend: str):
        loss, sums, *gradients = LAUNCH[backend](call, *ctx.needs_input_grad[:2])
        _save(ctx, sums, *gradients)
        return loss, sums

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, _: Tensor | None):
        return *_backward(ctx, grad_loss), None, None


def _plain(call: PolicyLossCall) -> bool:
    """Whether nobody watches or replaces torch's operations: no tracing, no mode, no subclass, no transform."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if functorch.maybe_current_level() is not None:
        return False
    return {type(tensor) for tensor in call[:TENSORS]} <= _PLAIN_TYPES


_PLAIN_TYPES = {Tensor, torch.nn.Parameter, type(None)}


def _run_op(backend: str, call: PolicyLossCall) -> tuple[Tensor, Tensor]:
    entropy = call.entropy
    refuse_forward_mode("policy_loss", call.logprob, entropy)
    wanted = (False, False)
    if torch.is_grad_enabled():
        wanted = (call.logprob.requires_grad, entropy is not None and entropy.requires_grad)
    if not _plain(call):
        return torch.ops.arpo_ext.policy_loss(*call, *wanted, backend)[:2]
    if any(wanted):
        return _PolicyLoss.apply(call.logprob, entropy, call, backend)
    return LAUNCH[backend](call, False, False)[:2]


torch.library.define(
    "arpo_ext::policy_loss",
    f"({SCHEMA}, bool want_gradient, bool want_entropy_gradient, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)


def _filled(call: PolicyLossCall, results: Results) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, sums, *gradients = results
    first, second = (call.logprob.new_empty(0) if g is None else g for g in gradients)
    return loss, sums, first, second


@torch.library.register_fake("arpo_ext::policy_loss")
def _policy_loss_fake(*arguments):
    *fields, want_gradient, want_entropy_gradient, _ = arguments
    call = PolicyLossCall(*fields)
    return _filled(call, _results(call, want_gradient, want_entropy_gradient))


@torch.library.impl("arpo_ext::policy_loss", "default")
def _policy_loss_impl(*arguments):
    *fields, want_gradient, want_entropy_gradient, backend = arguments
    call = PolicyLossCall(*fields)
    return _filled(call, LAUNCH[backend](call, want_gradient, want_entropy_gradient))


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _save(ctx, output[1], *(g if wanted else None for g, wanted in zip(output[2:], inputs[-3:-1], strict=True)))


def _op_backward(ctx, grad_loss: Tensor | None, *_: Tensor | None):
    gradients: list[Tensor | None] = [None] * (len(PolicyLossCall._fields) + 3)
    names = PolicyLossCall._fields
    gradients[names.index("logprob")], gradients[names.index("entropy")] = _backward(ctx, grad_loss)
    return tuple(gradients)


torch.library.register_autograd("arpo_ext::policy_loss", _op_backward, setup_context=_setup_context)


def _refuse_cpu(isa: str, call: PolicyLossCall) -> str | None:
    if _native.device_kind(call.logprob) != "cpu":
        return f"needs CPU tensors, got them on {call.logprob.device}"
    if call.logprob.dtype != torch.float32:
        return f"needs float32, got {call.logprob.dtype}"
    return _native.cpu_missing(isa)


def _refuse_cuda(call: PolicyLossCall) -> str | None:
    if call.logprob.dtype != torch.float32:
        return f"needs float32, got {call.logprob.dtype}"
    return refuse_cuda(call.logprob)


def _refuse_triton(call: PolicyLossCall) -> str | None:
    if call.logprob.dtype != torch.float32:
        return f"needs float32, got {call.logprob.dtype}"
    return refuse_triton(call.logprob)


def _check_indices(call: PolicyLossCall) -> None:
    """What the native code checks of indices on the CPU; elsewhere it would wait for the device."""
    if call.group is None or call.logprob.device.type != "cpu" or torch.compiler.is_compiling():
        return
    misplaced = (call.weight != 0) & ((call.group < 0) | (call.group >= call.groups))
    if misplaced.any():
        raise ValueError(
            f"policy_loss: got a segment or row out of range at token {int(misplaced.nonzero()[0])}; "
            f"expected 0 to {call.groups - 1}"
        )
    if call.parent is None:
        return
    segments = torch.arange(call.groups)
    for s in ((call.parent < -1) | (call.parent >= segments)).nonzero().flatten().tolist():
        raise ValueError(f"policy_loss: got parent {int(call.parent[s])} of segment {s}; expected -1 to {s - 1}")
    for i in ((call.leaf_segment < 0) | (call.leaf_segment >= call.groups)).nonzero().flatten().tolist():
        got = int(call.leaf_segment[i])
        raise ValueError(f"policy_loss: got leaf_segment {got} at {i}; expected 0 to {call.groups - 1}")


def _run_reference(call: PolicyLossCall) -> tuple[Tensor, Tensor]:
    _check_indices(call)
    arguments = call._asdict()
    for name, value in arguments.items():
        if isinstance(value, Tensor) and name not in ("logprob", "entropy"):
            arguments[name] = value.detach()
    for name in ("normalizer", "kl_coef", "entropy_coef"):
        tensor = arguments.pop(f"{name}_tensor")
        if tensor is not None:
            arguments[name] = tensor.to(call.logprob.device)
    clip_numbers = arguments.pop("clip_numbers")
    if clip_numbers is not None:
        names = ("clip_low", "clip_high", "dual_clip", "tau_positive", "tau_negative")
        given = zip(names, clip_numbers.unbind(), strict=True)
        arguments |= {name: number for name, number in given if arguments[name] is not None}
    loss, sums = reference.policy_loss(**arguments)
    return loss, sums.detach()


BACKENDS = {name: Backend(partial(_refuse_cpu, isa), partial(_run_op, name)) for name, isa in CPU_BACKENDS.items()}
BACKENDS["cuda"] = Backend(_refuse_cuda, partial(_run_op, "cuda"))
BACKENDS["triton"] = Backend(_refuse_triton, partial(_run_op, "triton"))
BACKENDS["reference"] = Backend(lambda call: None, _run_reference)
