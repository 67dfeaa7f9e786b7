"""Triton kernels where only Triton goes: pieces of rows, bases that are not aligned, the arithmetic they bring along.

Runs on a GPU, or interpreted in the process that test_triton.py starts.
"""

import math
from unittest import mock

import pytest
import torch
from backends import USABLE, device_of
from hypothesis import given, settings
from hypothesis import strategies as st

from arpo_ext import ops

if USABLE["triton"] is not None:
    pytest.skip(f"triton: {USABLE['triton']}", allow_module_level=True)

import triton
import triton.language as tl

from arpo_ext.ops import _triton, _triton_rows, linear_logprob_entropy_triton, logprob_entropy_triton
from arpo_ext.ops import linear_logprob_entropy_reference as linear_reference
from arpo_ext.ops._linear_tiles import LinearCall

DEVICE = device_of("triton")
INF = math.inf


@triton.jit
def _elementwise(x, log1p_out, expm1_out, size, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    value = tl.load(x + index, mask=index < size, other=0.0)
    tl.store(log1p_out + index, _triton.log1p(tl.abs(value)), mask=index < size)
    tl.store(expm1_out + index, _triton.expm1(-tl.abs(value)), mask=index < size)


def test_log1p_and_expm1_are_accurate_to_two_units_in_the_last_place():
    generator = torch.Generator().manual_seed(0)
    wide = 10 ** (torch.rand(4000, generator=generator) * 47 - 40)
    near = torch.rand(4000, generator=generator) * 4
    special = torch.tensor([0.0, INF, math.nan, 0.41, 0.5, 1.0, 2.0**24, 3e38, 1e-45])
    x = torch.cat((wide, near, special)).to(DEVICE)
    results = [torch.empty_like(x) for _ in range(2)]
    _elementwise[(1,)](x, *results, x.numel(), BLOCK=8192 * 2)
    for ours, exact in zip(results, (x.double().log1p(), (-x.double()).expm1()), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2.4e-7, atol=1.2e-38, equal_nan=True)


def oracle(logits, labels, temperature):
    log_p = torch.log_softmax(logits.double() / temperature, -1)
    p = log_p.exp()
    return log_p.gather(-1, labels.unsqueeze(-1))[..., 0], -torch.where(p > 0, p * log_p, p).sum(-1)


@pytest.mark.parametrize("vocab", [4096, 4099])
def test_a_row_cut_into_pieces(vocab, monkeypatch):
    rows = 2
    monkeypatch.setattr(_triton_rows, "processors", lambda device: 16)
    monkeypatch.setattr(_triton_rows, "_SHORTEST_PIECE", 512)
    assert _triton_rows.pieces_of(rows, vocab, torch.device(DEVICE))[0] > 5
    generator = torch.Generator().manual_seed(vocab)
    logits = 4 * torch.randn(rows, vocab, generator=generator)
    logits[0, 600:3000] = -INF  # whole pieces of -inf
    logits[-1, :2000] -= 500
    logits[-1, [5, 4000]] = 30.0  # the maximum twice, in two pieces
    labels = torch.randint(3000, vocab, (rows,), generator=generator)
    labels[-1] = 4000
    logits, labels = logits.to(DEVICE), labels.to(DEVICE)
    results = ops.logprob_entropy(logits, labels, temperature=0.7, backend="triton")
    for ours, exact in zip(results, oracle(logits, labels, 0.7), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
    stats = ops.logits_stats(logits, labels, temperature=0.7, backend="triton")
    p2 = (logits.double() / 0.7).softmax(-1).square().sum(-1)
    torch.testing.assert_close(stats.sum_p2.double(), p2, rtol=2e-6, atol=0)
    first = [int((row == row.max()).nonzero()[0]) for row in logits]
    assert stats.argmax.tolist() == first
    assert first[-1] == 5
    for ours, of_stats in zip(results, stats, strict=False):
        torch.testing.assert_close(ours, of_stats, rtol=1e-6, atol=1e-6)
    mask = torch.arange(rows, device=DEVICE) != 0
    masked = ops.logits_stats(logits, labels, temperature=0.7, mask=mask, backend="triton")
    assert [part[0].item() for part in masked] == [0, 0, 0, 0, -1, 0]
    assert all(torch.equal(a[mask], b[mask]) for a, b in zip(masked, stats, strict=True))
    logprob, entropy = ops.logprob_entropy(logits, labels, temperature=0.7, mask=mask, backend="triton")
    assert (logprob[0].item(), entropy[0].item()) == (0, 0)
    assert torch.equal(entropy[mask], results[1][mask])
    for bad in (math.nan, INF):
        spoiled = logits.clone()
        spoiled[0, 2500] = bad  # in a piece that is -inf otherwise
        assert ops.entropy(spoiled, backend="triton").isnan().tolist() == [True] + [False] * (rows - 1)
        assert ops.logits_stats(spoiled, backend="triton").argmax.tolist() == [-1, *first[1:]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_offset_of_a_row_from_its_alignment(dtype):
    """5 starts of logits against 3 starts of the gradient: head, vector body and tail of each kernel."""
    vocab = 4136
    memory = (3 * torch.randn(vocab + 64, generator=torch.Generator().manual_seed(1))).to(DEVICE, dtype)
    labels = torch.tensor([17], device=DEVICE)
    stats = torch.empty(3, 1, device=DEVICE)
    upstream = torch.tensor([0.6], device=DEVICE), torch.tensor([-0.8], device=DEVICE)
    for start in (0, 1, 7, 8, 15):
        logits = memory[start : start + vocab].view(1, vocab)
        fixed = (labels, None, None, 0.9, -100)
        logprob, entropy, stats = torch.ops.arpo_ext.logprob_entropy_forward(logits, *fixed, False, "triton")
        expected = torch.ops.arpo_ext.logprob_entropy_forward(logits, *fixed, False, "reference")
        for ours, theirs in zip((logprob, entropy), expected, strict=False):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        gradient = torch.ops.arpo_ext.logprob_entropy_backward(logits, *fixed, stats, *upstream, "reference")
        for out_start in (start, 0, 3):
            place = torch.full((vocab + 64,), math.nan, device=DEVICE, dtype=dtype)
            out = place[out_start : out_start + vocab].view(1, vocab)
            call = logprob_entropy_triton.LogitsCall(logits, *fixed)
            logprob_entropy_triton.backward(call, stats, *upstream, out)
            torch.testing.assert_close(out, gradient, rtol=torch.finfo(dtype).eps, atol=1e-7)
            assert place[:out_start].isnan().all(), "wrote before the row"
            assert place[out_start + vocab :].isnan().all(), "wrote after the row"


@pytest.mark.parametrize("label", [0, 511, 512, 2047, 2048, 4135])
def test_in_place_with_a_label_in_any_tile(label):
    logits = (3 * torch.randn(2, 4136, generator=torch.Generator().manual_seed(2))).to(DEVICE)
    labels = torch.tensor([label, 4135 - label], device=DEVICE)

    def gradient(inplace):
        leaf = logits.clone().requires_grad_()
        logprob, entropy = ops.logprob_entropy(leaf * 1, labels, inplace_backward=inplace, backend="triton")
        return torch.autograd.grad((logprob - 0.3 * entropy).sum(), leaf)[0]

    assert torch.equal(gradient(True), gradient(False))


def test_nearly_certain_16_bit_rows():
    """Exponentials of 16-bit logits skip one correction: 4e-6 relative is what the docstring of exp_scaled allows."""
    logits = torch.full((1, 1009), -20.0, device=DEVICE, dtype=torch.bfloat16)
    logits[0, 500] = 0
    s = 1008 * math.exp(-20)
    assert ops.entropy(logits, backend="triton").item() == pytest.approx(math.log1p(s) + 20 * s / (1 + s), rel=4e-6)


def test_auto_takes_triton_where_the_native_module_cannot_serve(monkeypatch):
    from arpo_ext.ops import _logits_backends, _native

    taken = []
    monkeypatch.setattr(_native, "C_MISSING", "not built")
    monkeypatch.setattr(_native, "C", None)
    run = _logits_backends._run_triton
    monkeypatch.setitem(
        _logits_backends.FORWARD,
        "triton",
        _logits_backends.Backend(
            _logits_backends._refuse_triton, lambda *args: taken.append(len(args)) or run("forward", *args)
        ),
    )
    logits = torch.zeros(1, 8, device=DEVICE)
    assert ops.entropy(logits).item() == pytest.approx(math.log(8))
    assert len(taken) == 1


@st.composite
def linear_calls(draw):
    """Operands of few small integers, so that products are exact in any order and maxima tie; biases of -inf."""
    rows, depth, vocab = draw(st.integers(1, 40)), draw(st.integers(1, 70)), draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    few = {"generator": generator, "low": -1, "high": 2}
    hidden, weight = (torch.randint(size=(size, depth), **few).to(DEVICE, dtype) for size in (rows, vocab))
    bias = torch.randint(size=(vocab,), **few).float()
    bias[draw(st.integers(0, vocab)) : draw(st.integers(0, vocab))] = -INF
    if draw(st.integers(0, 5)) == 0:
        bias[draw(st.integers(0, vocab - 1))] = draw(st.sampled_from([math.nan, INF]))
    start, total = draw(st.sampled_from([(0, vocab), (0, vocab + 50), (50, vocab + 50)]))
    labels = torch.randint(0, total, (rows,), generator=generator)
    labels[draw(st.integers(0, rows - 1))] = -100
    mask = torch.rand(rows, generator=generator) < draw(st.sampled_from([0.1, 0.7, 1.0]))
    temperatures = 0.5 + torch.rand(rows, generator=generator)
    return LinearCall(
        hidden,
        weight,
        bias.to(DEVICE, dtype) if draw(st.booleans()) else None,
        labels.to(DEVICE) if draw(st.booleans()) else None,
        mask.to(DEVICE) if draw(st.booleans()) else None,
        temperatures.to(DEVICE) if draw(st.booleans()) else None,
        draw(st.sampled_from([1.0, 0.6])),
        -100,
        draw(st.sampled_from([0.0, 4.0])),
        0,
        start,
        total,
    )


@settings(max_examples=25, deadline=None)
@given(linear_calls(), st.sampled_from([1, 3, 16]))
def test_products_and_sums_in_one_kernel(call, processors):
    with mock.patch.object(linear_logprob_entropy_triton, "processors", return_value=processors):
        running = linear_logprob_entropy_triton.fused_sums(call)
    expected = linear_reference.sums(*call[:7], call.softcap, call.vocab_start)
    if call.labels is not None:
        expected[call.labels == -100, 3] = math.nan
    spoiled = expected[:, :3].isnan().any(1)
    torch.testing.assert_close(running[~spoiled], expected[~spoiled], rtol=2e-6, atol=2e-5, equal_nan=True)
    assert running[spoiled, 0].isnan().all()


def test_products_in_one_kernel_skip_what_the_mask_leaves_out_and_count_invalid_labels():
    vocab = 300
    # 70 = a step of 64 and a rest: what lies beyond it in memory, the next row's NaN, is in no product.
    hidden = torch.ones(3, 70, dtype=torch.bfloat16, device=DEVICE)
    hidden[1] = math.nan
    weight = torch.zeros(vocab, 70, dtype=torch.bfloat16, device=DEVICE)
    mask = torch.tensor([True, False, True], device=DEVICE)
    labels = torch.tensor([vocab, vocab, 7], device=DEVICE)
    before = ops.invalid_labels(DEVICE)
    logprob, entropy = ops.linear_logprob_entropy(hidden, weight, labels, mask=mask, backend="triton")
    assert logprob.tolist() == pytest.approx([0, 0, -math.log(vocab)])
    assert entropy.tolist() == pytest.approx([math.log(vocab), 0, math.log(vocab)])
    assert ops.invalid_labels(DEVICE) == before + 1


def test_few_rows_of_16_bits_are_summed_in_one_kernel_and_others_tile_by_tile(monkeypatch):
    calls = []
    fused = linear_logprob_entropy_triton.fused_sums
    monkeypatch.setattr(linear_logprob_entropy_triton, "_FUSED_ROWS", 3)
    monkeypatch.setattr(
        linear_logprob_entropy_triton, "fused_sums", lambda call: calls.append(len(call.hidden)) or fused(call)
    )
    for dtype, rows in ((torch.bfloat16, 3), (torch.float32, 2), (torch.bfloat16, 4)):
        hidden, weight = (torch.zeros(size, 4, dtype=dtype, device=DEVICE) for size in (rows, 9))
        entropy = ops.linear_logprob_entropy(hidden, weight, backend="triton")[1]
        assert entropy.tolist() == pytest.approx([math.log(9)] * rows)
    assert calls == [3]
