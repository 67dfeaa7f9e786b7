"""The only importer of the native module.

`C` is the module, or None where it was not built; `C_MISSING` then says why. torch is imported first: both need an
OpenMP runtime, and the first one loaded serves the whole process.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import torch

Result = TypeVar("Result")

C: ModuleType | None
C_MISSING: str | None
try:
    from arpo_ext import _C as C
except ImportError as error:
    C = None
    C_MISSING = (
        f"the native module arpo_ext._C cannot be imported ({error}); build it with `make native` or `pip install .`"
    )
    ISA_CODES: dict[str, int] = {}
    DTYPE_CODES: dict[torch.dtype, int] = {}
else:
    C_MISSING = None
    # Instruction sets that run on this processor; -1 asks for the best of them.
    ISA_CODES = {"best": -1, **C.instruction_sets()}
    DTYPE_CODES = {getattr(torch, name): code for name, code in C.DTYPES.items()}


def cpu_missing(isa: str = "best") -> str | None:
    """Why the CPU kernels of an instruction set cannot run on this machine; None if they can."""
    if C is None:
        return C_MISSING
    if isa not in ISA_CODES:
        return f"this processor does not run {isa} (it runs {', '.join(list(ISA_CODES)[1:])})"
    return None


def constant_in_graphs(function: Callable[[], Result]) -> Callable[[], Result]:
    """Marks what the compiler cannot look into: it takes the answer for a constant.

    This is all that torch.compiler.assume_constant_result does, but that imports the compiler, which takes a second.
    """
    function._dynamo_marked_constant = True
    return function


@constant_in_graphs
def cuda_missing() -> str | None:
    """Why the CUDA kernels cannot run on this machine; None if they can."""
    if C is None:
        return C_MISSING
    return C.cuda_unusable()


def device_kind(tensor: torch.Tensor) -> str:
    """Which native functions take the tensor's memory: "cpu" or "cuda". Tests replace it to emulate a GPU."""
    return tensor.device.type


def cuda_stream(tensor: torch.Tensor) -> int:
    """Handle of the stream torch runs on, for the tensor's device."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


def pointer(tensor: torch.Tensor | None) -> int:
    """Address of the first element; 0 for None, which native functions take as absent."""
    if tensor is None:
        return 0
    address = tensor.data_ptr()
    if address == 0 and tensor.numel():
        raise ValueError(f"expected a tensor with memory of its own, got {type(tensor).__name__}, which wraps another")
    return address


def place(tensor: torch.Tensor) -> tuple[int, ...]:
    """Where a native function on the tensor's device runs: (device index, stream) on a GPU, nothing on the CPU."""
    return () if device_kind(tensor) == "cpu" else (tensor.device.index or 0, cuda_stream(tensor))
