"""Which backends a test of an op runs on, where their tensors live, and what torch.compile made of it.

Triton decides when it is imported whether its kernels run on a GPU or in its interpreter, and other tests of the same
process (vLLM's, inductor's) need the former: test_triton.py runs the op tests once more, interpreted, in a process of
its own.
"""

import pytest
import torch

from arpo_ext import ops
from arpo_ext.ops._dispatch import triton_interprets

USABLE = ops.available_backends()
ON_CPU = ["cpu-avx512", "cpu-avx2", "cpu-portable", "reference", *(["triton"] if triton_interprets() else [])]
ON_GPU = ["cuda", *([] if triton_interprets() else ["triton"])]


def device_of(backend: str) -> str:
    return "cuda" if backend in ON_GPU else "cpu"


def examples(count: int) -> int:
    """How many examples of a property to draw: the interpreter takes milliseconds for every program of a kernel."""
    return min(count, 6) if triton_interprets() else count


def everywhere(*only: str) -> list:
    """Parameters for all backends, or for `only` those; one that cannot run here is skipped with the reason."""
    on_cpu = [
        pytest.param(name, marks=[] if USABLE[name] is None else pytest.mark.skip(reason=f"{name}: {USABLE[name]}"))
        for name in ON_CPU
    ]
    found = [*on_cpu, *(pytest.param(name, marks=pytest.mark.gpu) for name in ON_GPU)]
    return [param for param in found if not only or param.values[0] in only]


def counting(compiler):
    """(a list of the graphs compiled so far, the torch.compile backend that fills it)."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(compiler)(graph, inputs)

    return graphs, count
