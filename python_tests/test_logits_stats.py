"""logits_stats on every backend against float64 torch and closed forms, on rows that break other implementations."""

import math

import pytest
import torch
from backends import device_of, everywhere
from hypothesis import given, settings
from hypothesis import strategies as st

from arpo_ext import ops

INF = math.inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FIELDS = ops.LogitsStats._fields
HERE = [name for name in ("cpu-avx512", "cpu-avx2", "cpu-portable", "reference") if not ops.available_backends()[name]]


@pytest.fixture(autouse=True)
def _outputs(poisoned_outputs):
    """An output nobody wrote shows."""


@pytest.fixture(params=everywhere())
def backend(request):
    return request.param


def random_logits(*shape, dtype=torch.float32, scale=3.0, seed=0, backend="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(device_of(backend), dtype)


def random_labels(logits, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator).to(logits.device)


def first_argmax(logits):
    columns = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(logits == logits.amax(-1, keepdim=True), columns, logits.shape[-1]).amin(-1)


def exact(logits, labels, temperature=1.0):
    """The definition in float64; -inf counts as probability 0."""
    scaled = logits.double() / temperature
    log_p = scaled.log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, p).sum(-1)
    logprob = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return ops.LogitsStats(
        logprob, entropy, scaled.logsumexp(-1), p.square().sum(-1), first_argmax(logits), log_p.amax(-1)
    )


def assert_equal(results, expected, rtol=3e-7, atol=1e-6):
    for name, ours, want in zip(FIELDS, results, expected, strict=True):
        if name == "argmax":
            assert torch.equal(ours, want)
        else:
            # A sum of squares as small as 1 / V has to be right, not only close to 0.
            tolerance = {"rtol": 2e-6, "atol": 0} if name == "sum_p2" else {"rtol": rtol, "atol": atol}
            torch.testing.assert_close(
                ours.double(), want.double(), **tolerance, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 31, 32, 33, 1009, 8209, 151_936])
def test_random_rows(backend, dtype, vocab):
    logits = random_logits(3, vocab, dtype=dtype, backend=backend)
    labels = random_labels(logits)
    results = ops.logits_stats(logits, labels, backend=backend)
    assert all(
        result.dtype == (torch.int64 if name == "argmax" else torch.float32)
        for name, result in zip(FIELDS, results, strict=True)
    )
    assert_equal(results, exact(logits, labels), rtol=1e-6)


def hostile_rows(vocab):
    base = random_logits(vocab, seed=3)
    column = torch.arange(vocab)
    return {
        "one finite logit": torch.where(column == vocab // 2, 2.0, -INF),
        "first block all -inf": torch.where(column < 4100, -INF, base),
        "last block all -inf": torch.where(column > 4100, -INF, base),
        "every other -inf": torch.where(column % 2 == 0, -INF, base),
        "offset -120": base - 120,
        "offset 1e4": base + 1e4,
        "constant": torch.full((vocab,), 7.5),
        "tied maximum": base.clamp(max=1.0),
        "ties far apart": torch.where((column == 4095) | (column == 4096) | (column == vocab - 1), 20.0, base),
        "zeros of both signs": torch.where(column == 17, -0.0, torch.where(column == 40, 0.0, -base.abs() - 1)),
        "rising": torch.linspace(-80, 80, vocab),
        "falling": torch.linspace(80, -80, vocab),
        "one hot 60": torch.where(column == vocab - 1, 60.0, 0.0),
        "largest floats": torch.where(column % 3 == 0, 3e38, -3e38),
    }


@pytest.mark.parametrize("name", hostile_rows(8209))
def test_hostile_rows(backend, name):
    logits = hostile_rows(8209)[name].to(device_of(backend)).expand(3, -1).contiguous()
    labels = torch.tensor([0, 4098, 8208], device=logits.device)
    results = ops.logits_stats(logits, labels, backend=backend)
    expected = exact(logits, labels)
    assert_equal(results, expected)


@pytest.mark.parametrize("gap", [5.0, 20.0, 40.0, 80.0])
def test_nearly_certain_and_uniform_rows(backend, gap):
    vocab = 1009
    logits = torch.full((1, vocab), -gap, device=device_of(backend))
    logits[0, 17] = 0
    s = (vocab - 1) * math.exp(-gap)
    result = ops.logits_stats(logits, backend=backend)
    assert result.logprob is None
    assert result.argmax.item() == 17
    assert result.argmax_logprob.item() == pytest.approx(-math.log1p(s), rel=1e-6, abs=0)
    assert result.logsumexp.item() == pytest.approx(math.log1p(s), rel=1e-6, abs=0)
    assert result.entropy.item() == pytest.approx(math.log1p(s) + gap * s / (1 + s), rel=1e-6, abs=0)
    assert result.sum_p2.item() == pytest.approx((1 + s * math.exp(-gap)) / (1 + s) ** 2, rel=1e-6, abs=0)
    uniform = ops.logits_stats(torch.full((1, 151_936), -3.0, device=logits.device), backend=backend)
    assert uniform.sum_p2.item() == pytest.approx(1 / 151_936, rel=1e-6, abs=0)
    assert uniform.argmax.item() == 0


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("column", [0, 31, 32, 4097, 8208])
def test_nan_or_infinity_spoils_its_own_row_only(backend, bad, column):
    logits = random_logits(4, 8209, backend=backend)
    labels = random_labels(logits)
    before = ops.logits_stats(logits, labels, backend=backend)
    logits[1, column] = bad
    logits[2] = -INF
    results = ops.logits_stats(logits, labels, backend=backend)
    for name, ours, expected in zip(FIELDS, results, before, strict=True):
        assert torch.equal(ours[::3], expected[::3])
        assert ours[1:3].tolist() == [-1, -1] if name == "argmax" else ours[1:3].isnan().all()


@pytest.mark.parametrize("form", ["number", "0-d", "per row"])
@pytest.mark.parametrize("temperature", [1e-3, 0.7, 1e3])
def test_temperature(backend, temperature, form):
    logits = random_logits(4, 1009, backend=backend)
    labels = random_labels(logits)
    value = torch.full((4,), temperature, device=logits.device)
    given = {"number": temperature, "0-d": value[0], "per row": value}[form]
    results = ops.logits_stats(logits, labels, temperature=given, backend=backend)
    # The tensor forms hold the temperature in float32.
    expected = exact(logits, labels, temperature if form == "number" else value.double().unsqueeze(-1))
    assert_equal(results, expected, rtol=1e-6)


def test_ignored_labels_and_masked_rows(backend):
    logits = random_logits(4, 65, backend=backend)
    logits[3] = math.nan
    labels = torch.tensor([5, -7, 64, 10**9], device=logits.device)
    mask = torch.tensor([True, True, True, False], device=logits.device)
    results = ops.logits_stats(logits, labels, ignore_index=-7, mask=mask, backend=backend)
    expected = exact(logits[:3], labels[:3].clamp(min=0))
    expected.logprob[1] = 0
    assert_equal([result[:3] for result in results], expected)
    assert [result[3].item() for result in results] == [0, 0, 0, 0, -1, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_are_read_in_place(backend, dtype):
    whole = random_logits(3, 5, 70, dtype=dtype, backend=backend)
    for view in (whole[:, :-1], whole[..., 3:68], whole[::2, ::2, :33], whole[1, 2]):
        labels = random_labels(view)
        assert_equal(ops.logits_stats(view, labels, backend=backend), exact(view, labels), rtol=1e-6)


@st.composite
def rows_of_few_values(draw):
    """Few values, so that maxima tie; -inf anywhere; sometimes NaN or +inf."""
    vocab = draw(st.integers(1, 200))
    values = st.sampled_from([-INF, -200.0, -1.5, -0.0, 0.0, 0.5, 3.0, 90.0])
    palette = torch.tensor(draw(st.lists(values, min_size=1, max_size=5)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    logits = palette[torch.randint(len(palette), (2, vocab), generator=generator)]
    if draw(st.booleans()):
        logits[0, draw(st.integers(0, vocab - 1))] = draw(st.sampled_from([math.nan, INF]))
    return logits + draw(st.sampled_from([0.0, 1e4, -120.0])), draw(st.integers(0, vocab - 1))


@pytest.mark.parametrize("backend", everywhere())
@settings(max_examples=60, deadline=None)
@given(rows_of_few_values())
def test_any_row(backend, drawn):
    logits, label = drawn
    logits = logits.to(device_of(backend))
    labels = torch.full((2,), label, device=logits.device)
    results = ops.logits_stats(logits, labels, backend=backend)
    usable = logits.amax(-1).isfinite()
    assert_equal([result[usable] for result in results], exact(logits[usable], labels[usable]))
    for name, result in zip(FIELDS, results, strict=True):
        assert (result[~usable] == -1 if name == "argmax" else result[~usable].isnan()).all()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, 40])
def test_threads_share_rows_and_pieces_of_rows(backend, rows, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    logits = random_logits(rows, 100_003)
    logits[0, 30_000:70_000] = -INF
    logits[0, [20_000, 70_001, 100_002]] = 30.0  # the same maximum in the piece of every thread
    labels = random_labels(logits)
    results = ops.logits_stats(logits, labels, backend=backend)
    assert_equal(results, exact(logits, labels), rtol=1e-6)
    assert results.argmax[0] == 20_000


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (7,)])
def test_shapes_of_the_results(backend, shape):
    logits = random_logits(*shape, backend=backend)
    results = ops.logits_stats(logits, random_labels(logits), backend=backend)
    assert {result.shape for result in results} == {torch.Size(shape[:-1])}


def test_float64_is_served_by_the_reference_in_float64():
    logits = random_logits(2, 65).double()
    labels = random_labels(logits)
    for ours, expected in zip(ops.logits_stats(logits, labels), exact(logits, labels), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)


def test_no_result_requires_a_gradient(backend):
    leaf = random_logits(2, 65, backend=backend).requires_grad_()
    assert not any(result.requires_grad for result in ops.logits_stats(leaf, random_labels(leaf), backend=backend))


def test_opcheck():
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs, NaN in unused parts included
    logits = random_logits(2, 3, 9)
    labels, mask, temperatures = random_labels(logits), torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3)
    for backend in ("auto", "reference"):
        for extra in ((labels, None, None, 0.7, -100), (None, mask, temperatures, 1.0, -100)):
            for leaf in (logits, logits.clone().requires_grad_()):
                torch.library.opcheck(torch.ops.arpo_ext.logits_stats.default, (leaf, *extra, backend))


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    logits = random_logits(3, 65)
    labels, temperature = random_labels(logits), torch.full((3,), 0.7)

    def call(logits):
        return ops.logits_stats(logits * 2, labels, temperature=temperature)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(logits)
    assert type(compiled) is ops.LogitsStats
    torch.testing.assert_close(compiled, call(logits))


def test_wrong_arguments_are_named():
    logits = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="labels must be in 0 to 4 or equal ignore_index -100, got 5"):
        ops.logits_stats(logits, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"temperature must be positive.*got -2"):
        ops.logits_stats(logits, temperature=torch.tensor([1.0, -2.0]))
    with pytest.raises(ops.BackendError, match=r"got torch\.float64"):
        ops.logits_stats(logits.double(), backend="cpu")
    with pytest.raises(ops.BackendError, match="no backend 'gpu'"):
        ops.logits_stats(logits, backend="gpu")
