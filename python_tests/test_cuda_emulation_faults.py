"""Kernels with one fault each (cuda_emulation/faults.cu): what the emulation must find, in any order of the threads."""

import os
import re

import cuda_emulation
import pytest
import torch

pytestmark = [
    pytest.mark.skipif(cuda_emulation.missing() is not None, reason=str(cuda_emulation.missing())),
    pytest.mark.skipif("ARPO_SANITIZED" in os.environ, reason="the address sanitizer watches instead"),
]

FAULTS = [
    ("none", ""),
    ("missing_barrier", "to shared memory against a (store|load) of thread|that no thread of the block has written"),
    ("missing_second_barrier", "races .* to shared memory against a (load|store) of thread"),
    ("missing_warp_barrier", "races .* to shared memory|that no thread of the block has written"),
    ("two_blocks_write", "races .* to global memory against a store of thread \\d+ of another block"),
    ("store_beside_atomic", "races .* to global memory"),
    ("unwritten_shared", "thread 7 .* reads shared memory that no thread of the block has written"),
    ("past_shared", "thread 63 .* touches shared memory outside every variable"),
    ("past_tensor", "thread 0 .* touches memory outside its tensor"),
    ("another_stack", "touches another thread's local memory"),
    ("misaligned", "loads from a misaligned address"),
    ("barrier_in_branch", "deadlock, 32 threads wait at __syncthreads|threads that have finished"),
    ("barrier_and_shuffle", "deadlock, 40 threads wait at __syncthreads, 24 in a warp collective, 0 have finished"),
    ("shuffle_of_some", "a lane that has finished|18 in a warp collective, 46 have finished"),
    ("lane_outside_mask", "mask leaves it out"),
    ("different_collectives", "in another warp collective"),
    ("too_many_threads", "launch: invalid configuration argument"),
]


@pytest.mark.parametrize("order", cuda_emulation.ORDERS)
@pytest.mark.parametrize(
    ("kernel", "expected"),
    FAULTS,
    ids=[name for name, _ in FAULTS],
)
def test_the_emulation_finds(kernel, expected, order):
    cuda_emulation.schedule(order)
    data = cuda_emulation.fenced(torch.arange(128.0))
    said = cuda_emulation.fault(kernel, data)
    if expected:
        assert re.search(expected, said), said
    else:
        assert said == ""
        assert data[:65].tolist() == [2017.0] * 64 + [64.0 + 128]
