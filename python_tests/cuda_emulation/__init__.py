"""Runs csrc/*_cuda.cu on the CPU: g++ compiles them against the headers in include/, and fibers run the threads.

    with cuda_emulation.serving_cpu_tensors():               # every .cu file in csrc/ is built, when it has changed
        ops.logprob_entropy(logits, labels, backend="cuda")  # on CPU tensors; races, bad addresses and deadlocks raise

An op joins by asking `_native.device_kind(tensor)` where it would ask `tensor.device.type`; its tests that have a
parameter marked `gpu` join in test_cuda_emulation.py. A header, function or instruction that is missing in include/
shows as a compile error and is a few lines there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from arpo_ext.ops import _native
from cuda_emulation.build import build, missing

__all__ = ["fault", "fenced", "load", "missing", "schedule", "serving_cpu_tensors"]

ORDERS = ("forward", "reverse", "shuffled")
FENCE = 4096


@functools.cache
def _built() -> Path | RuntimeError:
    try:
        return build(sanitize=bool(os.environ.get("ARPO_SANITIZED")))
    except RuntimeError as error:  # kept, so that not every test compiles again
        return error


@functools.cache
def load() -> tuple[ModuleType, ctypes.CDLL]:
    """The native module whose `*_cuda` functions are emulated, and its switches."""
    path = _built()
    if isinstance(path, RuntimeError):
        raise path
    spec = importlib.util.spec_from_file_location("cuda_emulation._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    switches = ctypes.CDLL(str(path))
    switches.cuda_emulation_configure.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
    switches.cuda_emulation_fence.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    switches.cuda_emulation_fault.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    switches.cuda_emulation_fault.restype = ctypes.c_char_p
    return module, switches


def schedule(order: str = "forward", *, seed: int = 0, multiprocessors: int = 132) -> None:
    """In which order blocks, and threads between two barriers, run; and how large the device says it is."""
    load()[1].cuda_emulation_configure(ORDERS.index(order), seed, multiprocessors)


@contextlib.contextmanager
def serving_cpu_tensors() -> Iterator[None]:
    """Inside, `backend="cuda"` takes CPU tensors."""
    module, _ = load()
    names = ("C", "device_kind", "cuda_stream", "DTYPE_CODES")
    saved = {name: getattr(_native, name) for name in names}
    codes = {getattr(torch, name): code for name, code in module.DTYPES.items()}
    emulated = {
        "C": module,
        "device_kind": lambda tensor: "cuda",
        "cuda_stream": lambda tensor: 0,
        "DTYPE_CODES": codes,
    }
    for name in names:
        setattr(_native, name, emulated[name])
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(_native, name, value)


def fault(name: str, data: torch.Tensor) -> str:
    """What the emulation says of a kernel in faults.cu; empty: nothing."""
    return load()[1].cuda_emulation_fault(name.encode(), data.data_ptr()).decode()


class _Fences:
    """The zones beside a tensor's memory, given back with it."""

    def __init__(self, *begins: int):
        self.begins = begins
        for begin in begins:
            load()[1].cuda_emulation_fence(begin, FENCE)

    def __del__(self):
        for begin in self.begins:
            load()[1].cuda_emulation_fence(begin, 0)


def fenced(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides; a kernel that leaves it by less than 4 KiB is reported."""
    size = tensor.element_size()
    used = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    used = used * size if tensor.numel() else 0
    whole = torch.zeros(used + 2 * FENCE + 64, dtype=torch.uint8)
    begin = FENCE + -(whole.data_ptr() + FENCE) % 64 + tensor.storage_offset() * size % 16
    copy = whole[begin : begin + used].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
    copy.copy_(tensor)
    copy.fences = _Fences(whole.data_ptr() + begin - FENCE, whole.data_ptr() + begin + used)
    return copy
