"""linear_logprob_entropy on every backend against float64 torch on all logits, and against naive torch per dtype."""

import math
from functools import partial

import pytest
import torch
from backends import ON_CPU, counting, device_of, everywhere
from hypothesis import given, settings
from hypothesis import strategies as st

from arpo_ext import ops
from arpo_ext.ops import _linear_tiles as tiles
from benchmarks import _measure

INF = math.inf
USABLE = [name for name in ON_CPU if ops.available_backends()[name] is None]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _poison_new_tensors():
    """torch.empty is filled with NaN, so that an output or a workspace read before it was written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=everywhere())
def backend(request):
    return request.param


def make_small_tiles(monkeypatch):
    """Several tiles of several sizes from operands of a test's size."""
    monkeypatch.setattr(tiles, "_tile_shape", lambda call, *, backward: (min(call.chunk_tokens or 4, 4), 7 - backward))


@pytest.fixture
def small_tiles(monkeypatch):
    make_small_tiles(monkeypatch)


def product_on_a_gpu(a, b, out, *, add=False):
    """What `_multiply` does there: operands of low precision, sums and result in float32."""
    product = a.float() @ b.float()
    out.copy_(out + product if add else product)


def operands(count, depth, vocab, *, dtype=torch.float32, backend="cpu", seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    device = device_of(backend)
    hidden = torch.randn(count, depth, generator=generator)
    weight = torch.randn(vocab, depth, generator=generator) * scale / math.sqrt(depth)
    bias = torch.randn(vocab, generator=generator)
    labels = torch.randint(vocab, (count,), generator=generator)
    return (*(t.to(device, dtype) for t in (hidden, weight, bias)), labels.to(device))


def naive(hidden, weight, bias, labels, temperature=1.0, softcap=None):
    """What trainers run, in the dtype of the operands; -inf counts as probability 0."""
    logits = hidden @ weight.t()
    logits = logits if bias is None else logits + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return of_logits(logits, labels, temperature)


def of_logits(logits, labels, temperature=1.0):
    temperature = temperature.unsqueeze(-1) if torch.is_tensor(temperature) and temperature.dim() else temperature
    log_p = torch.log_softmax(logits / temperature, -1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, p).sum(-1)
    return log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy


def with_gradients(function, tensors, labels, upstream, **options):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    logprob, entropy = function(leaves[0], leaves[1], labels, leaves[2], **options)
    kept = [leaf for leaf in leaves if leaf is not None]
    loss = (entropy * upstream[1].to(entropy.dtype)).sum()
    if logprob is not None:
        loss = loss + (logprob * upstream[0].to(entropy.dtype)).sum()
    return [None if logprob is None else logprob.detach(), entropy.detach(), *torch.autograd.grad(loss, kept)]


def exactly(tensors, labels, upstream, **options):
    wide = [None if t is None else t.double() for t in tensors]
    return with_gradients(lambda h, w, y, b, **o: naive(h, w, b, y, **o), wide, labels, upstream, **options)


def weights_for(count, device="cpu"):
    return torch.randn(2, count, generator=torch.Generator().manual_seed(9)).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (5, 3, 2), (300, 16, 1031), (7, 33, 20_011)],
    ids=["one", "few", "large_tiles_of_rows", "large_tiles_of_columns"],
)
def test_error_is_no_larger_than_that_of_naive_torch(backend, dtype, shape):
    *tensors, labels = operands(*shape, dtype=dtype, backend=backend)
    upstream = weights_for(shape[0], labels.device)
    ours = with_gradients(ops.linear_logprob_entropy, tensors, labels, upstream, backend=backend)
    theirs = with_gradients(lambda h, w, y, b: naive(h, w, b, y), tensors, labels, upstream)
    exact = exactly(tensors, labels, upstream)
    assert [t.dtype for t in ours] == [torch.float32] * 2 + [dtype] * 3
    for index, (a, b, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        # The outputs are float32; a gradient is rounded once to the dtype of its operand. Sums in another order than
        # naive torch's may lose a little more on one element, so the largest errors are compared.
        last_place = torch.finfo(a.dtype if index < 2 else dtype).eps * e.abs().max()
        allowed = (b.double() - e).abs().max() + 2 * last_place + 1e-6
        assert (a.double() - e).abs().max() <= allowed


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_tokens", [None, 3])
@pytest.mark.usefixtures("small_tiles")
def test_tiles_make_up_the_whole(backend, softcap, with_bias, chunk_tokens):
    hidden, weight, bias, labels = operands(11, 5, 23, backend=backend)
    tensors = [hidden, weight, bias if with_bias else None]
    upstream = weights_for(11, labels.device)
    options = {"temperature": 0.7, "softcap": softcap}
    ours = with_gradients(
        ops.linear_logprob_entropy, tensors, labels, upstream, chunk_tokens=chunk_tokens, backend=backend, **options
    )
    for a, e in zip(ours, exactly(tensors, labels, upstream, **options), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=2e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    data=st.data(),
    count=st.integers(0, 9),
    depth=st.integers(1, 6),
    vocab=st.integers(1, 40),
    tile=st.tuples(st.integers(1, 5), st.integers(1, 41)),
    dtype=st.sampled_from(DTYPES),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    with_bias=st.booleans(),
    form=st.sampled_from(["number", "0-d", "per row"]),
    backend=st.sampled_from(USABLE),
)
def test_any_shape_tile_mask_and_temperature(data, count, depth, vocab, tile, dtype, softcap, with_bias, form, backend):
    hidden, weight, bias, labels = operands(count, depth, vocab, dtype=dtype, seed=data.draw(st.integers(0, 99)))
    flags = torch.tensor(data.draw(st.lists(st.booleans(), min_size=2 * count, max_size=2 * count)), dtype=torch.bool)
    mask, ignored = flags.view(2, count)
    temperature = torch.linspace(0.5, 2, count) if form == "per row" else torch.tensor(0.6)
    given = 0.6 if form == "number" else temperature
    tensors = [hidden, weight, bias if with_bias else None]
    upstream = weights_for(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_tile_shape", lambda call, *, backward: tile)
        ours = with_gradients(
            ops.linear_logprob_entropy,
            tensors,
            labels.masked_fill(ignored, -100),
            upstream,
            temperature=given,
            mask=mask,
            softcap=softcap,
            backend=backend,
        )
    kept = upstream * mask
    kept[0] *= ~ignored
    exact = exactly(tensors, labels, kept, temperature=temperature.double(), softcap=softcap)
    exact[0] = exact[0] * (mask & ~ignored)
    exact[1] = exact[1] * mask
    for index, (a, e) in enumerate(zip(ours, exact, strict=True)):
        eps = torch.finfo(torch.float32 if index < 2 else dtype).eps
        torch.testing.assert_close(
            a.double(), e, rtol=8 * eps, atol=8 * eps * (1 + e.abs().max().item() if count else 0) + 2e-6
        )


@pytest.mark.usefixtures("small_tiles")
def test_masked_rows_are_not_read_even_if_they_hold_nan(backend):
    hidden, weight, bias, labels = operands(9, 5, 23, backend=backend)
    mask = torch.arange(9, device=labels.device) % 3 != 1
    upstream = weights_for(9, labels.device)
    spoilt = hidden.masked_fill(~mask.unsqueeze(1), math.nan)
    ours = with_gradients(
        ops.linear_logprob_entropy,
        (spoilt, weight, bias),
        labels.masked_fill(~mask, 10**9),
        upstream,
        mask=mask,
        backend=backend,
    )
    exact = exactly((hidden, weight, bias), labels, upstream * mask)
    for a, e in zip(ours, [exact[0] * mask, exact[1] * mask, *exact[2:]], strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("keep", [[], [2]])
def test_hardly_any_row_kept(backend, keep):
    hidden, weight, bias, labels = operands(4, 5, 23, backend=backend)
    mask = torch.zeros(4, dtype=torch.bool, device=labels.device)
    mask[keep] = True
    upstream = weights_for(4, labels.device)
    ours = with_gradients(
        ops.linear_logprob_entropy, (hidden, weight, bias), labels, upstream, mask=mask, backend=backend
    )
    exact = exactly((hidden, weight, bias), labels, upstream * mask)
    for a, e in zip(ours, [exact[0] * mask, exact[1] * mask, *exact[2:]], strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=2e-6)


@pytest.mark.usefixtures("small_tiles")
def test_hostile_logits_from_the_bias(backend):
    """Padded vocabulary, an offset that cancels in float32, one certain column, a row that holds NaN."""
    hidden, weight, _, labels = operands(6, 5, 23, backend=backend)
    for bias in (
        torch.where(torch.arange(23) < 14, -INF, 0.0),
        torch.where(torch.arange(23) > 9, -INF, 0.0),
        torch.full((23,), -120.0),
        torch.where(torch.arange(23) == 8, 0.0, -60.0),
    ):
        bias = bias.to(labels.device)
        finite = torch.where(bias.isfinite())[0]
        y = finite[labels % len(finite)]
        ours = ops.linear_logprob_entropy(hidden, weight, y, bias, backend=backend)
        logits = hidden @ weight.t() + bias  # rounded as the tiles are, so that only the sums differ
        for a, e in zip(ours, of_logits(logits.double(), y), strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5 if bias.min() == -120 else 2e-6)
    spoilt = hidden.clone()
    spoilt[2, 1] = math.nan
    for a in ops.linear_logprob_entropy(spoilt, weight, labels, backend=backend):
        assert a.isnan().nonzero().flatten().tolist() == [2]
    nowhere = torch.full((23,), -INF, device=labels.device)
    assert ops.linear_logprob_entropy(hidden, weight, None, nowhere, backend=backend)[1].isnan().all()


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("used", ["logprob", "entropy"])
def test_only_the_gradients_asked_for(backend, needs, used):
    *tensors, labels = operands(6, 5, 23, backend=backend)
    leaves = [t.clone().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    logprob, entropy = ops.linear_logprob_entropy(leaves[0], leaves[1], labels, leaves[2], backend=backend)
    (logprob if used == "logprob" else entropy).sum().backward()
    upstream = torch.tensor([[1.0], [0.0]] if used == "logprob" else [[0.0], [1.0]], device=labels.device).expand(2, 6)
    for leaf, need, e in zip(leaves, needs, exactly(tensors, labels, upstream)[2:], strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad.double(), e, rtol=1e-5, atol=2e-6)


def test_rows_without_upstream_gradient_cost_no_product(monkeypatch):
    hidden, weight, _, labels = operands(8, 5, 23)
    rows = []
    original = tiles._multiply
    monkeypatch.setattr(tiles, "_multiply", lambda a, b, out, **kw: rows.append(len(a)) or original(a, b, out, **kw))
    labels[5] = -100
    leaf = hidden.requires_grad_()
    logprob, _ = ops.linear_logprob_entropy(leaf, weight, labels)
    rows.clear()
    upstream = torch.tensor([0.0, 1, 0, 0, 2, 3, 0, 0])
    (gradient,) = torch.autograd.grad(logprob, leaf, upstream)
    assert rows == [2, 2]
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == [1, 4]


def test_leading_dimensions_strides_and_weight_layout(backend):
    hidden, weight, bias, labels = operands(12, 5, 23, backend=backend)
    expected = ops.linear_logprob_entropy(hidden, weight, labels, bias, backend=backend)
    shaped = hidden.view(3, 4, 5)
    column_major = weight.t().contiguous().t()
    temperature = torch.ones(3, 4, device=labels.device)
    for h, y, w in (
        (shaped, labels.view(3, 4), column_major),
        (torch.cat((shaped, shaped), 1)[:, 4:], labels.view(3, 4).t().contiguous().t(), weight),
    ):
        ours = ops.linear_logprob_entropy(h, w, y, bias, temperature=temperature, mask=y >= 0, backend=backend)
        for a, e in zip(ours, expected, strict=True):
            assert a.shape == (3, 4)
            torch.testing.assert_close(a.flatten(), e)
    one = ops.linear_logprob_entropy(hidden[0], weight, labels[0], bias, temperature=torch.tensor(1.0), backend=backend)
    assert [t.shape for t in one] == [(), ()]
    torch.testing.assert_close(one[0], expected[0][0])


def test_no_rows_and_no_labels(backend):
    hidden, weight, _, _ = operands(0, 5, 23, backend=backend)
    leaf = weight.requires_grad_()
    logprob, entropy = ops.linear_logprob_entropy(hidden, leaf, backend=backend)
    assert logprob is None
    assert entropy.shape == (0,)
    (gradient,) = torch.autograd.grad(entropy.sum(), leaf)
    assert gradient.count_nonzero() == 0


def test_equals_logprob_entropy_of_the_logits(backend):
    hidden, weight, bias, labels = operands(20, 8, 3001, backend=backend)
    ours = ops.linear_logprob_entropy(hidden, weight, labels, bias, temperature=0.8, backend=backend)
    for a, e in zip(
        ours, ops.logprob_entropy(hidden @ weight.t() + bias, labels, temperature=0.8, backend=backend), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_tiles_of_low_precision_operands_with_a_float32_result(monkeypatch):
    """The products a GPU runs, their operands widened here: choice by dtype, accumulation, rounding at the end."""

    monkeypatch.setattr(tiles, "_multiply", product_on_a_gpu)
    monkeypatch.setattr(tiles, "_converts", lambda call: False)
    monkeypatch.setattr(tiles, "_tile_shape", lambda call, *, backward: (4, 7))
    *tensors, labels = operands(11, 5, 23, dtype=torch.bfloat16)
    upstream = weights_for(11)
    ours = with_gradients(ops.linear_logprob_entropy, tensors, labels, upstream)
    for a, e in zip(ours, exactly(tensors, labels, upstream), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2e-2, atol=2e-2)


def test_float64_is_served_by_the_reference_in_float64():
    *tensors, labels = (t.double() if t.is_floating_point() else t for t in operands(5, 4, 9))
    with pytest.raises(ops.BackendError, match=r"needs float32, bfloat16 or float16, got torch.float64"):
        ops.linear_logprob_entropy(*tensors[:2], labels, backend="cpu")
    upstream = weights_for(5)
    ours = with_gradients(ops.linear_logprob_entropy, tensors, labels, upstream)
    for a, e in zip(ours, exactly(tensors, labels, upstream), strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


def test_gradcheck_of_the_reference():
    hidden, weight, bias = (t.double().requires_grad_() for t in operands(4, 3, 6)[:3])
    options = {
        "temperature": torch.tensor([0.5, 1.0, 2.0, 1.0], dtype=torch.float64),
        "mask": torch.tensor([True, True, True, False]),
        "softcap": 3.0,
        "backend": "reference",
    }
    labels = torch.tensor([0, 5, -100, 2])
    assert torch.autograd.gradcheck(
        lambda h, w, b: ops.linear_logprob_entropy(h, w, labels, b, **options), (hidden, weight, bias)
    )


def test_second_derivative_is_refused(backend):
    hidden, weight, _, _ = operands(2, 3, 9, backend=backend)
    leaf = hidden.requires_grad_()
    entropy = ops.linear_logprob_entropy(leaf, weight, backend=backend)[1]
    (gradient,) = torch.autograd.grad(entropy.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", ["auto", *everywhere("reference", "cuda", "triton")])
def test_opcheck(backend):
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs, NaN in unused parts included
    hidden, weight, bias, labels = operands(3, 4, 9, backend=backend)
    mask, temperatures = torch.ones_like(labels, dtype=torch.bool), torch.ones(3, device=labels.device)
    arpo = torch.ops.arpo_ext
    for extra in (
        (None, labels, None, None, 0.7, -100, 2.0, 2, 0, 9),
        (bias, None, mask, temperatures, 1.0, 0, 0.0, 0, 0, 9),
    ):
        for grad in (False, True):
            inputs = (hidden.clone().requires_grad_(grad), weight.clone().requires_grad_(grad), *extra)
            # Without labels their logits are NaN, which opcheck takes for a difference.
            with_labels = (*inputs[:3], labels, *inputs[4:])
            torch.library.opcheck(arpo.linear_logprob_entropy_sums.default, (*with_labels, backend))
            running = arpo.linear_logprob_entropy_sums(*inputs, backend).detach()
            torch.library.opcheck(arpo.linear_logprob_entropy_combine.default, (*inputs, running, "", backend))
        stats = arpo.linear_logprob_entropy_combine(*inputs, running, "", backend)[2]
        ones = torch.ones_like(stats[0])
        upstream = (stats, ones if extra[1] is not None else None, ones)
        for flags in ((True, True, extra[0] is not None, False), (False, True, False, True)):
            torch.library.opcheck(
                arpo.linear_logprob_entropy_backward.default,
                (hidden, weight, *extra, *upstream, *flags, backend),
            )


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph_for_all_temperatures(compiler):
    torch._dynamo.reset()
    hidden, weight, bias, labels = operands(6, 5, 23)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    graphs, count = counting(compiler)

    def loss(hidden, weight, bias, temperature):
        logprob, entropy = ops.linear_logprob_entropy(
            hidden * 2, weight, labels, bias, temperature=temperature, mask=labels > 3, softcap=5.0
        )
        return logprob.sum() - 0.1 * entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, backend=count)
    for value in (0.5, 1.0, 1.7):
        for temperature in (torch.tensor(value), torch.full((6,), value)):
            ours, expected = compiled(*leaves, temperature), loss(*leaves, temperature)
            torch.testing.assert_close(ours, expected)
            gradients = zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves), strict=True)
            for a, e in gradients:
                torch.testing.assert_close(a, e)
    assert len(graphs) == 2  # one for each shape of the temperature


def test_compiles_twice_for_all_temperatures_given_as_numbers():
    """Once for the first, and once for any."""
    torch._dynamo.reset()
    hidden, weight, _, labels = operands(6, 5, 23)
    graphs, count = counting("aot_eager")
    compiled = torch.compile(ops.linear_logprob_entropy, fullgraph=True, backend=count)
    for temperature in (0.3, 0.5, 0.7, 1.0, 1.2, 2.0):
        ours = compiled(hidden, weight, labels, temperature=temperature)
        for a, e in zip(ours, ops.linear_logprob_entropy(hidden, weight, labels, temperature=temperature), strict=True):
            torch.testing.assert_close(a, e)
    assert len(graphs) == 2


def test_compiles_once_for_all_sizes():
    torch._dynamo.reset()
    graphs, count = counting("aot_eager")
    compiled = torch.compile(ops.linear_logprob_entropy, fullgraph=True, backend=count)
    for rows, vocab in ((6, 23), (7, 29), (9, 64)):
        hidden, weight, bias, labels = operands(rows, 5, vocab)
        for tensor in (hidden, weight, bias, labels):
            torch._dynamo.mark_dynamic(tensor, 0)
        ours = compiled(hidden.requires_grad_(), weight, labels, bias)
        for a, e in zip(ours, ops.linear_logprob_entropy(hidden, weight, labels, bias), strict=True):
            torch.testing.assert_close(a, e)
    assert len(graphs) == 1


@pytest.mark.parametrize("rows", [(12,), (3, 4), ()])
def test_results_are_no_views(backend, rows):
    """FSDP warns of a module that returns one: a write into it would lose the hook that gathers the weights."""
    hidden, weight, _, labels = operands(12, 5, 23, backend=backend)
    hidden, labels = (hidden.view(*rows, 5), labels.view(rows)) if rows else (hidden[0], labels[0])
    for result in ops.linear_logprob_entropy(hidden.requires_grad_(), weight, labels, backend=backend):
        assert result.shape == rows
        assert not result._is_view()


def test_shapes_of_tensors_without_memory():
    hidden, weight, bias, labels = (t.to("meta") for t in operands(6, 5, 23))
    for result in ops.linear_logprob_entropy(hidden.view(2, 3, 5), weight, labels.view(2, 3), bias):
        assert (result.shape, result.device.type) == ((2, 3), "meta")


def test_autocast_leaves_float64_alone():
    *tensors, labels = (t.double() if t.is_floating_point() else t for t in operands(5, 4, 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = ops.linear_logprob_entropy(*tensors[:2], labels, tensors[2])
    for a, e in zip(ours, naive(*tensors, labels), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_casts_all_operands(backend):
    hidden, weight, bias, labels = operands(6, 5, 23)
    low = (hidden.bfloat16(), weight.bfloat16(), labels, bias.bfloat16())
    expected = ops.linear_logprob_entropy(*low, backend=backend)
    leaf = weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = ops.linear_logprob_entropy(hidden.bfloat16(), leaf, labels, bias, backend=backend)
    for a, e in zip(ours, expected, strict=True):
        assert torch.equal(a, e)
    ours[0].sum().backward()
    assert leaf.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_does_not_reach_the_products_inside(backend):
    hidden, weight, _, labels = operands(40, 64, 2000)
    leaf = hidden.requires_grad_()
    logprob = ops.linear_logprob_entropy(leaf, weight, labels, backend=backend)[0].sum()
    (expected,) = torch.autograd.grad(logprob, leaf, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(torch.autograd.grad(logprob, leaf)[0], expected)


def test_a_dtensor_is_refused():
    class DTensor(torch.Tensor):
        pass

    hidden, weight, _, labels = operands(2, 3, 9)
    with pytest.raises(ValueError, match=r"weight is a DTensor.*inside the model's forward, where FSDP has gathered"):
        ops.linear_logprob_entropy(hidden, weight.as_subclass(DTensor), labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weight": torch.zeros(9, 4)},
            r"hidden must be \[..., D\] and weight \[V, D\].*got hidden \(2, 3\) and weight",
        ),
        ({"weight": torch.zeros(0, 3)}, r"with V >= 1"),
        (
            {"weight": torch.zeros(9, 3).bfloat16()},
            r"weight must have the dtype and device of hidden, torch.float32 on cpu",
        ),
        ({"weight": torch.zeros(9, 3, device="meta")}, r"got torch.float32 on meta"),
        ({"bias": torch.zeros(3)}, r"bias must be of shape \(9,\), got \(3,\)"),
        ({"bias": torch.zeros(9).double()}, r"bias must have the dtype and device of hidden"),
        (
            {"hidden": torch.zeros(2, 3, dtype=torch.int64), "weight": torch.zeros(9, 3, dtype=torch.int64)},
            r"hidden must be \[..., D\] .*, got torch.int64",
        ),
        ({"labels": torch.tensor([0])}, r"labels must be integers of shape \(2,\)"),
        ({"labels": torch.tensor([0, 9])}, r"labels must be in 0 to 8 or equal ignore_index -100, got 9"),
        ({"labels": torch.tensor([-1, 0])}, r"got -1"),
        ({"mask": torch.zeros(2)}, "mask must be bool"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": torch.tensor([1.0, -1.0])}, "temperature must be positive, in 1e-15 to 1e30, got -1"),
        ({"softcap": 0.0}, "softcap must be positive, in 1e-30 to 1e30, or None, got 0.0"),
        ({"softcap": 1e39}, "softcap must be positive, in 1e-30 to 1e30, or None, got 1e\\+39"),
        ({"hidden": torch.zeros(2, 0), "weight": torch.zeros(9, 0)}, r"hidden must be \[..., D\] with D >= 1"),
        ({"softcap": -3.0}, "got -3.0"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, or None, got 0"),
        ({"vocab_start": 3}, "vocab_start and vocab_total go together, and with a group"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_wrong_arguments_are_named(change, message, backend):
    arguments = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(9, 3), "labels": torch.tensor([0, 8])}
    with pytest.raises(ValueError, match=message):
        ops.linear_logprob_entropy(**{**arguments, **change}, backend=backend)


def forward_and_backward(hidden, weight, labels):
    logprob, entropy = ops.linear_logprob_entropy(hidden, weight, labels)
    return torch.autograd.grad((logprob + entropy).sum(), (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_above_the_results_does_not_grow_with_the_rows(dtype):
    """All logits of the largest call would take 128 MiB."""
    torch.use_deterministic_algorithms(False)
    meter = _measure.Meter("cpu", smoke=True)
    depth, vocab, above = 64, 8192, []
    for count in (256, 256, 1024, 4096):  # the first call pays for what torch and the compiler's run-time keep
        hidden, weight, _, labels = operands(count, depth, vocab, dtype=dtype)
        leaves = hidden.requires_grad_(), weight.requires_grad_()

        _, peak = meter.peak_mb(partial(forward_and_backward, *leaves, labels))
        if peak is None:
            pytest.skip("this system does not tell a process's peak memory")
        results = (count + vocab) * depth * dtype.itemsize / 2**20
        accumulator = 0 if dtype == torch.float32 else count * depth * 4 / 2**20
        above.append(peak - results - accumulator)
    assert max(above[1:]) < 6
    assert above[3] - above[1] < 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_invalid_labels_are_counted_once_on_the_gpu():
    hidden, weight, _, _ = operands(4, 5, 5000, backend="cuda")
    before = ops.invalid_labels("cuda")
    logprob, _ = ops.linear_logprob_entropy(hidden, weight, torch.tensor([5000, -1, -100, 3]).cuda())
    assert logprob[:3].tolist() == [0, 0, 0]
    assert ops.invalid_labels("cuda") == before + 2
