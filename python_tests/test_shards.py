"""A vocabulary read shard by shard gives what one read gives: whatever the cuts, the rows and the backend."""

import math
from itertools import pairwise

import pytest
import torch
from backends import ON_CPU, USABLE, device_of, everywhere, examples
from hypothesis import given, settings
from hypothesis import strategies as st

from arpo_ext import ops
from arpo_ext.ops._logits import LogitsCall
from arpo_ext.ops._shards import new_running, shard_backward, shard_finish, shard_forward

INF = math.inf
BACKENDS = [name for name in ON_CPU if USABLE[name] is None]
EVERYWHERE = pytest.mark.parametrize("backend", everywhere())


def shards(logits, labels, cuts, *, mask=None, temperature=1.0, ignore_index=-100):
    edges = [0, *cuts, logits.shape[-1]]
    given = torch.is_tensor(temperature)
    options = (labels, mask, temperature if given else None, 1.0 if given else temperature, ignore_index)
    return [LogitsCall(logits[..., begin:end], *options, begin, logits.shape[-1]) for begin, end in pairwise(edges)]


def forward(calls, backend):
    running = new_running(calls[0].logits)
    for call in calls:
        shard_forward(call, running, backend)
    return running, *shard_finish(running, calls[0])


def backward(calls, stats, grad_logprob, grad_entropy, backend):
    parts = [torch.full_like(call.logits, math.nan) for call in calls]
    for call, out in zip(calls, parts, strict=True):
        shard_backward(call, stats, grad_logprob, grad_entropy, out, backend)
    return torch.cat(parts, -1)


def whole(logits, labels, weights, backend, **options):
    leaf = logits.detach().clone().requires_grad_()
    logprob, entropy = ops.logprob_entropy(leaf, labels, backend=backend, **options)
    total = (entropy * weights[1]).sum() + (0 if logprob is None else (logprob * weights[0]).sum())
    return logprob, entropy, torch.autograd.grad(total, leaf)[0]


def assert_shards_equal_whole(logits, labels, cuts, backend, **options):
    calls = shards(logits, labels, cuts, **options)
    weights = torch.tensor([[0.7], [-1.3]], device=logits.device).expand(2, logits.shape[:-1].numel())
    weights = weights.reshape(2, *logits.shape[:-1])
    logprob, entropy, gradient = whole(logits, labels, weights, backend, **options)
    running, *results, stats = forward(calls, backend)
    for ours, expected in zip(results, (logprob, entropy), strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected.detach(), rtol=1e-6, atol=1e-7, equal_nan=True)
    ours = backward(calls, stats, *weights, backend)
    eps = torch.finfo(logits.dtype).eps
    torch.testing.assert_close(ours, gradient, rtol=max(eps, 2e-6), atol=2e-7, equal_nan=True)
    return running


@st.composite
def rows_and_cuts(draw):
    """Rows of few values, so that maxima tie across tiles; tiles of -inf; sometimes NaN or +inf; any label."""
    vocab = draw(st.integers(1, 150))
    cuts = sorted(draw(st.sets(st.integers(1, vocab - 1), max_size=6))) if vocab > 1 else []
    values = st.sampled_from([-INF, -200.0, -1.5, 0.0, 0.5, 3.0, 3.0, 90.0])
    rows = draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**31 - 1))
    palette = torch.tensor(draw(st.lists(values, min_size=1, max_size=5)))
    generator = torch.Generator().manual_seed(seed)
    logits = palette[torch.randint(len(palette), (rows, vocab), generator=generator)]
    edges = [0, *cuts, vocab]
    for tile in draw(st.sets(st.integers(0, len(edges) - 2), max_size=3)):
        logits[:, edges[tile] : edges[tile + 1]] = -INF
    if draw(st.booleans()):
        logits[0, draw(st.integers(0, vocab - 1))] = draw(st.sampled_from([math.nan, INF]))
    logits += draw(st.sampled_from([0.0, 1e4, -120.0]))
    label = st.one_of(st.integers(0, vocab - 1), st.just(0), st.just(vocab - 1), st.just(-100))
    labels = torch.tensor(draw(st.lists(label, min_size=rows, max_size=rows)))
    return logits, labels, cuts, draw(st.sampled_from([1.0, 0.3, 2.5]))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=examples(60), deadline=None)
@given(rows_and_cuts())
def test_any_cuts_give_what_one_read_gives(backend, drawn):
    logits, labels, cuts, temperature = drawn
    assert_shards_equal_whole(logits, labels, cuts, backend, temperature=temperature)


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("threads", [1, 4])
def test_large_tiles(backend, dtype, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    device = device_of(backend)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(3, 2, 50_001, generator=generator)).to(device, dtype)
    labels = torch.tensor([[0, 50_000], [33_000, -100], [7, 20_001]], device=device)
    mask = torch.tensor([[True, True], [True, True], [False, True]], device=device)
    temperature = torch.linspace(0.5, 2, 6, device=device).view(3, 2)
    options = {"mask": mask, "temperature": temperature}
    assert_shards_equal_whole(logits, labels, [8, 20_001, 40_000], backend, **options)
    assert_shards_equal_whole(logits, None, [33_333], backend)


@EVERYWHERE
def test_nearly_certain_rows_keep_relative_accuracy(backend):
    device = device_of(backend)
    logits = torch.full((2, 1009), -20.0, device=device)
    logits[0, 3] = logits[1, 1005] = 0
    s = 1008 * math.exp(-20)
    labels = torch.tensor([3, 1005], device=device)
    _, logprob, entropy, _ = forward(shards(logits, labels, [100, 500, 1000]), backend)
    assert logprob.tolist() == pytest.approx([-math.log1p(s)] * 2, rel=1e-6, abs=0)
    assert entropy.tolist() == pytest.approx([math.log1p(s) + 20 * s / (1 + s)] * 2, rel=1e-6, abs=0)


def test_running_holds_what_its_definition_says():
    logits = torch.tensor([[1.0, 3.0, -INF, 2.0, 3.0]], dtype=torch.float64)
    for backend in BACKENDS:
        given = logits if backend == "reference" else logits.float()
        first, second = shards(given, torch.tensor([3]), [2], temperature=0.5)
        running = new_running(given)
        shard_forward(first, running, backend)
        s = math.exp(-4)
        assert running[0, :3].tolist() == pytest.approx([3, s, -2 * s], rel=1e-6)
        assert running[0, 3].isnan()
        shard_forward(second, running, backend)
        s = math.exp(-4) + math.exp(-2) + 1
        expected = [3, s, -2 * math.exp(-4) - math.exp(-2), 2]
        assert running[0].tolist() == pytest.approx(expected, rel=1e-6)
        for bad in (math.nan, INF):
            spoilt = new_running(given)
            for part in (first, second):
                shard_forward(part._replace(logits=torch.tensor([[bad, 9.0]]).to(given)), spoilt, backend)
                assert spoilt[0, 0].isnan()


@EVERYWHERE
def test_masked_rows_are_neither_read_nor_touched(backend):
    device = device_of(backend)
    logits = torch.tensor([[1.0, 2.0, 3.0], [math.nan] * 3], device=device)
    mask = torch.tensor([True, False], device=device)
    labels = torch.tensor([1, 10**9], device=device)
    running = new_running(logits)
    running[1] = torch.tensor([5.0, 6.0, 7.0, 8.0])
    calls = shards(logits, labels, [1], mask=mask)
    for call in calls:
        shard_forward(call, running, backend)
    assert running[1].tolist() == [5, 6, 7, 8]
    logprob, entropy, stats = shard_finish(running, calls[0])
    assert (logprob[1].item(), entropy[1].item(), stats[:, 1].tolist()) == (0, 0, [0, 0, 0])
    gradient = backward(calls, stats, torch.ones_like(entropy), torch.ones_like(entropy), backend)
    assert gradient[1].tolist() == [0, 0, 0]


@EVERYWHERE
def test_a_gradient_may_take_the_place_of_its_shard(backend):
    device = device_of(backend)
    logits = torch.randn(3, 1009, generator=torch.Generator().manual_seed(2)).to(device)
    labels = torch.tensor([0, 600, 1008], device=device)
    calls = shards(logits, labels, [500])
    *_, stats = forward(calls, backend)
    upstream = torch.ones(3, device=device)
    expected = backward(calls, stats, upstream, upstream, backend)
    for call in calls:
        shard_backward(call, stats, upstream, upstream, call.logits, backend)
    assert torch.equal(logits, expected)


def test_float64_on_the_reference_is_float64():
    logits = torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([0, 49, 20])
    _, logprob, entropy, stats = forward(shards(logits, labels, [7, 30]), "auto")
    expected = ops.logprob_entropy(logits, labels)
    torch.testing.assert_close((logprob, entropy), expected, rtol=1e-13, atol=1e-13)
    assert stats.dtype == torch.float64


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_a_label_outside_the_whole_vocabulary_is_an_error_on_the_cpu(backend):
    for wrong in (10, -1):
        call = shards(torch.zeros(1, 10), torch.tensor([wrong]), [5])[1]
        with pytest.raises(ValueError, match=rf"labels must be in 0 to 9 .*got {wrong}"):
            shard_forward(call, new_running(call.logits), backend)


@pytest.mark.parametrize("backend", everywhere("cuda", "triton"))
def test_an_invalid_label_is_counted_once_where_the_kernel_cannot_raise(backend):
    device = device_of(backend)
    calls = shards(torch.zeros(2, 10, device=device), torch.tensor([10, 3], device=device), [5])
    for served_by in (backend, *(["reference"] if device == "cuda" else [])):
        before = ops.invalid_labels(device)
        _, logprob, *_ = forward(calls, served_by)
        assert logprob[0].item() == 0
        assert ops.invalid_labels(device) == before + 1
