"""One advantage a token out of one a leaf: all backends against one torch expression."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arpo_ext import ops
from arpo_ext.ops._dispatch import CPU_BACKENDS

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MASKS = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


def backends(device):
    here = [name for name in CPU_BACKENDS if ops.available_backends()[name] is None]
    return ["auto", "reference", *(here if device == "cpu" else [device])]


def expected(leaf, mask):
    rows = leaf.unsqueeze(1).expand(mask.shape)
    return torch.where(mask != 0, rows * mask.to(leaf.dtype) if mask.is_floating_point() else rows, 0.0)


def made(rows, columns, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    leaf = torch.randn(rows, generator=generator)
    mask = torch.randint(0, 2, (rows, columns), generator=generator)
    if dtype.is_floating_point:
        mask = mask * torch.randint(1, 9, (rows, columns), generator=generator) / 4
    return leaf, mask.to(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", MASKS, ids=str)
# Around the width of a vector, more than a block's piece of a row, nothing.
@pytest.mark.parametrize(("rows", "columns"), [(3, 1), (5, 37), (2, 4104), (3, 2051), (0, 5), (4, 0)])
def test_rows_follow_the_definition(device, dtype, rows, columns):
    leaf, mask = (t.to(device) for t in made(rows, columns, dtype))
    for backend in backends(device):
        assert ops.expand_advantages(leaf, mask, backend=backend).equal(expected(leaf, mask)), backend


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_gradient_flows_through(backend):
    leaf, mask = torch.randn(2, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    assert not ops.expand_advantages(leaf, mask, backend=backend).requires_grad
    assert not ops.expand_advantages(leaf, length=torch.tensor([1, 2]), backend=backend).requires_grad


def test_lengths_beyond_64_bits_are_refused():
    with pytest.raises(ValueError, match="more than"):
        ops.expand_advantages(
            torch.ones(4), length=torch.tensor([2**62, 2**62, 2**62, 2**62 + 1]), total=1, backend="cpu"
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_rows_may_lie_anywhere(device, dtype):
    leaf, mask = (t.to(device) for t in made(6, 90, dtype))
    spread = torch.stack([leaf, -leaf], dim=1)[:, 0]
    for view in (mask[:, 7:83], mask[::2, 1:], mask[:, ::3], mask.T[:6, :6], mask[:1].expand(6, 90)):
        short = spread[: view.shape[0]]
        for backend in backends(device):
            got = ops.expand_advantages(short, view, backend=backend)
            assert got.equal(expected(short, view))
            assert got.is_contiguous()


# Written past the caches from 4 to 32 MiB; by several threads; rows that start anywhere in a line.
@pytest.mark.parametrize(("rows", "columns"), [(1031, 1025), (300, 4096)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_large_results(rows, columns, dtype):
    leaf, mask = made(rows, columns, dtype)
    threads = torch.get_num_threads()
    for backend in backends("cpu"):
        for count in (1, 3):
            torch.set_num_threads(count)
            try:
                got = ops.expand_advantages(leaf, mask, backend=backend)
            finally:
                torch.set_num_threads(threads)
            assert got.equal(expected(leaf, mask)), backend


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32], ids=str)
def test_a_masked_token_is_zero_even_of_a_bad_row(device, dtype):
    leaf = torch.tensor([math.nan, math.inf, -1.0], device=device)
    mask = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 1]], device=device).to(dtype)
    for backend in backends(device):
        got = ops.expand_advantages(leaf, mask, backend=backend).tolist()
        assert got[1:] == [[0.0, math.inf, 0.0], [0.0, 0.0, -1.0]]
        assert math.isnan(got[0][0])
        assert got[0][1] == 0.0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [[3, 0, 5, 1], [0, 0], [1], [], [0, 700, 0, 3, 1500], [1] * 300])
def test_packed_follows_the_definition(device, lengths):
    length = torch.tensor(lengths, dtype=torch.int64)
    leaf = torch.randn(len(lengths))
    wanted = torch.repeat_interleave(leaf, length)
    for backend in backends(device):
        total = len(wanted)
        got = ops.expand_advantages(leaf.to(device), length=length.to(device), total=total, backend=backend)
        assert got.cpu().equal(wanted)
    if device == "cpu":
        assert ops.expand_advantages(leaf, length=length).equal(wanted)


def test_a_large_packed_result_on_several_threads():
    length = torch.randint(0, 3000, (300,))
    leaf = torch.randn(300)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        got = ops.expand_advantages(leaf, length=length)
    finally:
        torch.set_num_threads(threads)
    assert got.equal(torch.repeat_interleave(leaf, length))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_on_a_gpu_wrong_lengths_count_for_nothing(backend):
    leaf, length = torch.tensor([1.0, 2.0, 3.0], device="cuda"), torch.tensor([2, -7, 1], device="cuda")
    run = ops.expand_advantages
    assert run(leaf, length=length, total=5, backend=backend).tolist() == [1.0, 1.0, 3.0, 0.0, 0.0]
    assert run(leaf, length=length, total=2, backend=backend).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="got no total; expected the sum of length"):
        run(leaf, length=length, backend=backend)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=2), max_size=12))
def test_names_become_the_positions_where_they_first_occur(names):
    assert ops.first_occurrences(names).tolist() == [names.index(name) for name in names]


def test_float64_is_computed_in_float64():
    leaf, mask = torch.rand(4, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
    assert ops.expand_advantages(leaf, mask).equal(leaf[:, None] * mask)
    with pytest.raises(ops.BackendError, match=r"needs float32, got torch\.float64"):
        ops.expand_advantages(leaf, mask, backend="cpu")


LEAF = torch.zeros(2)
LENGTH = torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "got neither of mask and length; expected one of them"),
        ({"mask": torch.ones(2, 3), "length": LENGTH}, "got both of mask and length; expected one of them"),
        ({"mask": torch.ones(3, 2)}, r"got mask of shape \[3, 2\]; expected \[2, T\]"),
        ({"mask": torch.ones(2)}, r"got mask of shape \[2\]; expected \[2, T\]"),
        ({"mask": torch.ones(2, 1, dtype=torch.complex64)}, "got mask of torch.complex64; expected bool, integer or"),
        (
            {"leaf": torch.zeros(2, dtype=torch.int64), "length": LENGTH},
            "got leaf of torch.int64; expected torch.float32",
        ),
        ({"leaf": torch.zeros(2, 1), "length": LENGTH}, r"got leaf of shape \[2, 1\]; expected one dimension"),
        ({"length": LENGTH[:1]}, r"got length of torch.int64 and shape \[1\]; expected torch.int64 and \[2\]"),
        ({"length": LENGTH, "total": 4}, "got total 4; expected 3, the sum of the lengths"),
        ({"length": LENGTH, "total": -1}, "got total -1; expected at least 0"),
        ({"length": torch.tensor([4, -1])}, "got length -1 of leaf 1; expected at least 0"),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_wrong_arguments_are_named(backend, arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.expand_advantages(**{"leaf": LEAF, **arguments, "backend": backend})


def test_the_registered_ops_pass_opcheck():
    for dtype in (torch.bool, torch.float32):
        torch.library.opcheck(torch.ops.arpo_ext.expand_advantages.default, (*made(3, 5, dtype), -1))
    packed = torch.ops.arpo_ext.expand_packed_advantages.default
    torch.library.opcheck(packed, (LEAF, LENGTH, 3, -1))


def test_it_compiles_into_one_graph():
    def tokens(leaf, mask, length):
        return ops.expand_advantages(leaf, mask), ops.expand_advantages(leaf, length=length, total=6)

    leaf, mask = made(3, 5, torch.bool)
    inputs = leaf, mask, torch.tensor([1, 2, 3])
    compiled = torch.compile(tokens, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(*inputs), tokens(*inputs), strict=True):
        assert one.equal(other)


@pytest.mark.gpu
def test_it_is_captured_in_a_cuda_graph():
    leaf, mask = (t.cuda() for t in made(30, 64, torch.bool))
    length = torch.randint(0, 9, (30,), device="cuda")
    total = int(length.sum())
    wanted = ops.expand_advantages(leaf, mask), ops.expand_advantages(leaf, length=length, total=total)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.expand_advantages(leaf, mask), ops.expand_advantages(leaf, length=length, total=total)
    graph.replay()
    for one, other in zip(got, wanted, strict=True):
        assert one.equal(other)
