"""Which implementation of an op serves a call: an ordered table per op, and a refusal in words.

An op lists its implementations fastest first as `{"cpu": Backend(refuse, run), ...}`. `refuse(*args)` returns None if
`run` can serve these arguments, else one clause that says why not. `backend="auto"` takes the first that does not
refuse; a named backend that refuses raises `BackendError` with its reason.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from arpo_ext.ops import _native

# Every name a caller may pass as `backend`, beside "auto". "cpu" picks the best instruction set of the processor; the
# longer names ask for one.
ISA_BACKENDS = {"cpu-avx512": "avx512", "cpu-avx2": "avx2", "cpu-portable": "portable"}
CPU_BACKENDS = {"cpu": "best", **ISA_BACKENDS}
TRITON_DEVICES = ("cuda", "xpu")


class BackendError(RuntimeError):
    """The backend asked for by name cannot serve this call, or does not exist."""


class Backend(NamedTuple):
    refuse: Callable[..., str | None]
    run: Callable[..., Any]


def choose(op: str, table: Mapping[str, Backend], backend: str, *args: Any) -> Backend:
    """The implementation that serves `args`. Raises BackendError naming every reason."""
    if backend != "auto":
        if backend not in table:
            raise BackendError(f"{op} has no backend {backend!r}; expected auto, {', '.join(table)}")
        reason = table[backend].refuse(*args)
        if reason is not None:
            raise BackendError(f"{op}: backend {backend!r} cannot serve this call: {reason}")
        return table[backend]
    reasons = []
    for name, candidate in table.items():
        reason = candidate.refuse(*args)
        if reason is None:
            return candidate
        reasons.append(f"{name}: {reason}")
    raise BackendError(f"{op}: no backend can serve this call: {'; '.join(reasons)}")


def refuse_forward_mode(op: str, *tensors: torch.Tensor | None) -> None:
    """RuntimeError where a tensor carries a tangent: a registered op drops it, and the derivative would be 0."""
    if forward_ad._current_level < 0:  # No tensor has one outside of this level, which torch.func.jvp enters too.
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(f"{op} has no forward-mode derivative (torch.func.jvp, jacfwd); expected reverse mode")


def refuse_cpu(tensor: torch.Tensor, isa: str = "best") -> str | None:
    """Reason why CPU kernels cannot read `tensor`: no native module, other device, other dtype."""
    reason = _native.cpu_missing(isa)
    if reason is None and tensor.device.type != "cpu":
        reason = f"needs a CPU tensor, got one on {tensor.device}"
    if reason is None and tensor.dtype not in _native.DTYPE_CODES:
        reason = f"needs float32, bfloat16 or float16, got {tensor.dtype}"
    return reason


def refuse_cuda(tensor: torch.Tensor) -> str | None:
    """Reason why CUDA kernels cannot read `tensor`: other device, no native module, no driver, other dtype."""
    if _native.device_kind(tensor) != "cuda":
        return f"needs a CUDA tensor, got one on {tensor.device}"
    reason = _native.cuda_missing()
    if reason is None and tensor.dtype not in _native.DTYPE_CODES:
        reason = f"needs float32, bfloat16 or float16, got {tensor.dtype}"
    return reason


@_native.constant_in_graphs
def triton_interprets() -> bool:
    """Whether Triton kernels run in its interpreter, which takes CPU tensors; Triton decides so when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "on", "yes", "true")


@_native.constant_in_graphs
def triton_missing() -> str | None:
    """Why Triton kernels cannot run on this machine; None if they can. Does not import triton."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not triton_interprets() and not torch.cuda.is_available() and not torch.xpu.is_available():
        return "there is no GPU that torch can use (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


def refuse_triton(tensor: torch.Tensor) -> str | None:
    """Reason why Triton kernels cannot read `tensor`: no triton, other device, other dtype."""
    reason = triton_missing()
    devices = ("cpu", *TRITON_DEVICES) if triton_interprets() else TRITON_DEVICES
    if reason is None and tensor.device.type not in devices:
        reason = f"needs a tensor on {' or '.join(devices)}, got one on {tensor.device}"
    if reason is None and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reason = f"needs float32, bfloat16 or float16, got {tensor.dtype}"
    return reason


def available_backends() -> dict[str, str | None]:
    """Backend name -> None if this machine can run it, else the reason. `reference` is plain torch and always runs."""
    found = {name: _native.cpu_missing(isa) for name, isa in CPU_BACKENDS.items()}
    return {**found, "cuda": _native.cuda_missing(), "triton": triton_missing(), "reference": None}


def build_info() -> dict[str, str | None]:
    """How the native module was built: `compiler`, `cuda` (None: without), `cuda_architectures`; {} if it was not."""
    return {} if _native.C is None else _native.C.build_info()
