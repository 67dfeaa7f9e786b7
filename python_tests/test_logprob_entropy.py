"""logprob_entropy on every backend against float64 torch, closed forms, and the error of naive torch in each dtype."""

import math

import pytest
import torch
from backends import counting, device_of, everywhere

from arpo_ext import ops
from arpo_ext.ops import logprob_entropy_reference as reference

INF = math.inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _poison_new_tensors():
    """torch.empty is filled with NaN, so that an output nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=everywhere())
def backend(request):
    return request.param


def random_logits(*shape, dtype=torch.float32, scale=3.0, seed=0, backend="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(device_of(backend), dtype)


def random_labels(logits, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator).to(logits.device)


def oracle(logits, labels, temperature=1.0):
    """Textbook formula in float64; -inf counts as probability 0."""
    log_p = torch.log_softmax(logits.double() / temperature, -1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, p).sum(-1)
    return log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy


def naive(logits, labels):
    """What trainers run, in the dtype of the logits."""
    log_z = torch.logsumexp(logits, -1)
    entropy = log_z - (torch.softmax(logits, -1) * logits).sum(-1)
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - log_z, entropy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 31, 32, 33, 1009, 4096, 8209, 151_936, 262_144])
def test_error_is_no_larger_than_that_of_naive_torch(backend, dtype, vocab):
    logits = random_logits(3, vocab, dtype=dtype, backend=backend)
    labels = random_labels(logits)
    results = ops.logprob_entropy(logits, labels, backend=backend)
    for ours, theirs, exact in zip(results, naive(logits, labels), oracle(logits, labels), strict=True):
        assert ours.dtype == torch.float32
        allowed = (theirs.double() - exact).abs() + 1e-6 * exact.abs().clamp(min=1)
        assert ((ours.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 33, 1009, 8209])
def test_gradient_error_is_no_larger_than_that_of_naive_torch(backend, dtype, vocab):
    leaf = random_logits(4, vocab, dtype=dtype, backend=backend).requires_grad_()
    labels = random_labels(leaf)
    w = random_logits(2, 4, seed=7, backend=backend)

    def gradient(function, leaf):
        logprob, entropy = function(leaf, labels)
        return torch.autograd.grad((logprob * w[0] + entropy * w[1]).sum(), leaf)[0]

    exact = gradient(oracle, leaf.detach().double().requires_grad_())
    ours = gradient(lambda x, y: ops.logprob_entropy(x, y, backend=backend), leaf)
    assert ours.dtype == dtype
    last_place = torch.finfo(dtype).eps * exact.abs() + 1e-7
    allowed = (gradient(naive, leaf).double() - exact).abs() + last_place
    assert ((ours.double() - exact).abs() <= allowed).all()


def hostile_rows(vocab):
    """Finite-answer rows that broke other implementations, as name -> row."""
    base = random_logits(vocab, seed=3)
    rows = {
        "one finite logit": torch.full((vocab,), -INF).index_fill(0, torch.tensor([vocab // 2]), 2.0),
        "first block all -inf": torch.where(torch.arange(vocab) < 4100, -INF, base),
        "last block all -inf": torch.where(torch.arange(vocab) > 4100, -INF, base),
        "every other -inf": torch.where(torch.arange(vocab) % 2 == 0, -INF, base),
        "offset -120": base - 120,
        "offset 1e4": base + 1e4,
        "offset -1e30": torch.where(torch.arange(vocab) == 5, 0.0, -1e30),
        "constant": torch.full((vocab,), 7.5),
        "tied maximum": base.clamp(max=1.0),
        "rising": torch.linspace(-80, 80, vocab),
        "falling": torch.linspace(80, -80, vocab),
        "one hot 60": torch.zeros(vocab).index_fill(0, torch.tensor([vocab - 1]), 60.0),
        "largest floats": torch.where(torch.arange(vocab) % 3 == 0, 3e38, -3e38),
        "denormal": base * 1e-40,
    }
    return rows


@pytest.mark.parametrize("name", hostile_rows(8209))
def test_hostile_row(backend, name):
    row = hostile_rows(8209)[name].to(device_of(backend))
    logits = row.expand(3, -1).contiguous()
    labels = torch.tensor([0, int(row.argmax()), 8208], device=row.device)
    logprob, entropy = ops.logprob_entropy(logits, labels, backend=backend)
    for ours, exact in zip((logprob, entropy), oracle(logits, labels), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=3e-7, atol=1e-6)
    leaf = logits.clone().requires_grad_()
    logprob, entropy = ops.logprob_entropy(leaf, labels, backend=backend)
    (gradient,) = torch.autograd.grad(logprob.sum() + entropy.sum(), leaf)
    p = torch.log_softmax(logits.double(), -1).exp()
    log_p = torch.where(p > 0, torch.log_softmax(logits.double(), -1), 0)
    one_hot = torch.nn.functional.one_hot(labels, 8209)
    exact = one_hot - p - p * (log_p + oracle(logits, labels)[1].unsqueeze(-1))
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("column", [0, 31, 32, 4097, 8192, 8208])
def test_nan_or_infinity_spoils_its_own_row_only(backend, bad, column):
    logits = random_logits(3, 8209, backend=backend)
    labels = random_labels(logits)
    expected = ops.logprob_entropy(logits, labels, backend=backend)
    logits[1, column] = bad
    leaf = logits.requires_grad_()
    results = ops.logprob_entropy(leaf, labels, backend=backend)
    (gradient,) = torch.autograd.grad(results[0].sum() + results[1].sum(), leaf)
    for ours, before in zip(results, expected, strict=True):
        assert ours.isnan().tolist() == [False, True, False]
        assert torch.equal(ours[::2], before[::2])
    assert gradient[1].isnan().all()
    assert gradient[::2].isfinite().all()


def test_row_of_minus_infinity_is_nan_and_nan_among_them_is_found(backend):
    logits = torch.full((2, 8209), -INF, device=device_of(backend))
    logits[1, 2] = math.nan
    logits[1, 4097:] = 0.0
    assert ops.entropy(logits, backend=backend).isnan().all()


def test_label_on_minus_infinity_has_finite_gradient(backend):
    leaf = torch.tensor([[0.0, 1.0, -INF]], device=device_of(backend)).requires_grad_()
    logprob = ops.logprob(leaf, torch.tensor([2], device=leaf.device), backend=backend)
    assert logprob.item() == -INF
    (gradient,) = torch.autograd.grad(logprob.sum(), leaf)
    torch.testing.assert_close(gradient.cpu(), torch.tensor([[-0.26894143, -0.73105858, 1.0]]))


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.25])
@pytest.mark.parametrize("gap", [5.0, 12.0, 20.0, 40.0, 80.0])
def test_nearly_certain_rows_keep_relative_accuracy(backend, gap, temperature):
    vocab = 1009
    logits = torch.full((1, vocab), -gap * temperature, device=device_of(backend))
    logits[0, 17] = 0
    gap = -logits[0, 0].item() / temperature
    s = (vocab - 1) * math.exp(-gap)
    labels = torch.tensor([17], device=logits.device)
    logprob, entropy = ops.logprob_entropy(logits, labels, temperature=temperature, backend=backend)
    assert logprob.item() == pytest.approx(-math.log1p(s), rel=1e-6, abs=0)
    assert entropy.item() == pytest.approx(math.log1p(s) + gap * s / (1 + s), rel=1e-6, abs=0)


def test_closed_forms(backend):
    device = device_of(backend)
    uniform = ops.entropy(torch.zeros(2, 1000, device=device), backend=backend)
    assert uniform.tolist() == pytest.approx([math.log(1000)] * 2, rel=1e-7)
    certain = torch.full((1, 300_000), -INF, device=device)
    certain[0, 299_999] = -5.0
    logprob, entropy = ops.logprob_entropy(certain, torch.tensor([299_999], device=device), backend=backend)
    assert logprob.item() == 0
    assert entropy.item() == 0


@pytest.mark.parametrize("temperature", [1e-3, 0.7, 1.0, 1e3])
@pytest.mark.parametrize("form", ["number", "0-d", "per row"])
def test_temperature(backend, temperature, form):
    leaf = random_logits(4, 1009, backend=backend).requires_grad_()
    labels = random_labels(leaf)
    value = torch.full((4,), temperature, device=leaf.device)
    given = {"number": temperature, "0-d": torch.tensor(temperature, device=leaf.device), "per row": value}[form]
    results = ops.logprob_entropy(leaf, labels, temperature=given, backend=backend)
    exact_leaf = leaf.detach().double().requires_grad_()
    # The tensor forms hold the temperature in float32.
    exact = oracle(exact_leaf, labels, temperature if form == "number" else value.double().unsqueeze(-1))
    for ours, expected in zip(results, exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(results[0].sum() + results[1].sum(), leaf)
    (expected,) = torch.autograd.grad(exact[0].sum() + exact[1].sum(), exact_leaf)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6 / min(temperature, 1))


def test_different_temperature_in_every_row(backend):
    logits = random_logits(2, 3, 65, backend=backend)
    labels = random_labels(logits)
    temperature = torch.linspace(0.5, 2, 6, device=logits.device).view(2, 3)
    results = ops.logprob_entropy(logits, labels, temperature=temperature, backend=backend)
    for ours, expected in zip(results, oracle(logits, labels, temperature.unsqueeze(-1)), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-6)


def test_ignored_labels_and_masked_rows(backend):
    leaf = random_logits(4, 65, backend=backend)
    leaf[3] = math.nan  # masked, so never read
    leaf = leaf.requires_grad_()
    labels = torch.tensor([5, -7, 64, 10**9], device=leaf.device)
    mask = torch.tensor([True, True, True, False], device=leaf.device)
    logprob, entropy = ops.logprob_entropy(leaf, labels, ignore_index=-7, mask=mask, backend=backend)
    exact = oracle(leaf[:3].detach(), torch.tensor([5, 0, 64], device=leaf.device))
    torch.testing.assert_close(logprob[[0, 2]].double(), exact[0][[0, 2]])
    assert logprob[1].item() == 0
    torch.testing.assert_close(entropy[:3].double(), exact[1])
    assert (logprob[3].item(), entropy[3].item()) == (0, 0)
    (gradient,) = torch.autograd.grad(logprob.sum(), leaf, retain_graph=True)
    assert gradient[1].count_nonzero() == 0
    assert gradient[3].count_nonzero() == 0
    (gradient,) = torch.autograd.grad(entropy.sum(), leaf)
    assert gradient[1].count_nonzero() == 65
    assert gradient[3].count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_are_read_in_place(backend, dtype):
    whole = random_logits(3, 5, 70, dtype=dtype, backend=backend)
    for view in (
        whole[:, :-1],
        whole[:, 1:],
        whole[..., 3:68],
        whole[::2, ::2, :33],
        whole[1, 2],
        whole[:, 2].expand(3, 70),
    ):
        labels = random_labels(view)
        leaf, copy = view.detach().requires_grad_(), view.clone().requires_grad_()
        results = ops.logprob_entropy(leaf, labels, backend=backend)
        expected = ops.logprob_entropy(copy, labels, backend=backend)
        gradient = torch.autograd.grad(results[0].sum() + results[1].sum(), leaf)[0]
        expected_gradient = torch.autograd.grad(expected[0].sum() + expected[1].sum(), copy)[0]
        # On the GPU the order of summation follows the alignment of the row.
        exact = backend not in ("cuda", "triton")
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": torch.finfo(dtype).eps, "atol": 1e-6}
        for a, b in zip((*results, gradient), (*expected, expected_gradient), strict=True):
            torch.testing.assert_close(a, b, **tolerance)


def test_row_offsets_need_64_bits():
    # Only the two rows are ever touched, so the 4 GiB stay virtual.
    torch.use_deterministic_algorithms(False)
    far = torch.empty(2**31 + 100, dtype=torch.bfloat16).as_strided((2, 100), (2**31, 1))
    far.copy_(random_logits(2, 100))
    assert torch.equal(ops.entropy(far), ops.entropy(far.clone()))


def test_columns_apart_are_refused_by_name_and_served_by_the_reference():
    logits = random_logits(65, 4).t()
    with pytest.raises(ops.BackendError, match=r"adjacent columns.*strides \(1, 4\)"):
        ops.entropy(logits, backend="cpu")
    torch.testing.assert_close(ops.entropy(logits), ops.entropy(logits.contiguous()))


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7)])
def test_no_rows(backend, shape):
    leaf = torch.empty(shape, device=device_of(backend)).requires_grad_()
    labels = torch.empty(shape[:-1], dtype=torch.int64, device=leaf.device)
    logprob, entropy = ops.logprob_entropy(leaf, labels, backend=backend)
    assert logprob.shape == entropy.shape == shape[:-1]
    (gradient,) = torch.autograd.grad(logprob.sum() + entropy.sum(), leaf)
    assert gradient.shape == shape


def test_outputs_given_by_the_caller(backend):
    logits = random_logits(3, 65, backend=backend)
    labels = random_labels(logits)
    mask = torch.tensor([True, False, True], device=logits.device)
    logprob, entropy = (torch.full((3,), math.nan, device=logits.device) for _ in range(2))
    options = {"temperature": 0.7, "mask": mask, "backend": backend}
    ops.logprob_entropy_into(logits, labels=labels, logprob=logprob, entropy=entropy, **options)
    for ours, expected in zip((logprob, entropy), ops.logprob_entropy(logits, labels, **options), strict=True):
        assert torch.equal(ours, expected)
    only = torch.full((3,), math.nan, device=logits.device)
    ops.logprob_entropy_into(logits, entropy=only, **options)
    assert torch.equal(only, entropy)
    with pytest.raises(
        ValueError, match=r"entropy must be contiguous torch.float32 of shape \(3,\) on \w+, got torch.float64"
    ):
        ops.logprob_entropy_into(logits, entropy=only.double())
    with pytest.raises(ValueError, match="go together"):
        ops.logprob_entropy_into(logits, entropy=only, labels=labels)


def test_a_writer_serves_every_call_of_its_layout_and_no_other(backend):
    logits = [random_logits(3, 65, backend=backend) for _ in range(2)]
    entropy = torch.full((3,), math.nan, device=logits[0].device)
    write = ops.EntropyWriter(logits[0], entropy, backend=backend)
    for rows, temperature in zip(logits, (0.7, 1.3), strict=True):
        write(rows, temperature)
        assert torch.equal(entropy, ops.entropy(rows, temperature=temperature, backend=backend))
    before = entropy.clone()
    others = (logits[0][:2], logits[0].double(), random_logits(6, 65, backend=backend)[::2])
    for other in others:
        with pytest.raises(ValueError, match=r"logits have \(shape, strides, dtype, device\).*; expected"):
            write(other, 1.0)
    with pytest.raises(ValueError, match="temperature must be positive, in 1e-15 to 1e30, got 0"):
        write(logits[0], 0.0)
    assert torch.equal(entropy, before)
    with pytest.raises(ValueError, match="entropy must be contiguous"):
        ops.EntropyWriter(logits[0], entropy[:2], backend=backend)


def test_float64_is_served_by_the_reference_in_float64():
    logits = random_logits(2, 65).double()
    with pytest.raises(ops.BackendError, match=r"needs float32, bfloat16 or float16, got torch.float64"):
        ops.entropy(logits, backend="cpu")
    labels = random_labels(logits)
    for ours, exact in zip(ops.logprob_entropy(logits, labels), oracle(logits, labels), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_gradcheck_of_the_reference():
    leaf = random_logits(4, 6).double().requires_grad_()
    labels = torch.tensor([0, 5, -100, 2])
    mask = torch.tensor([True, True, True, False])
    temperature = torch.tensor([0.5, 1.0, 2.0, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: ops.logprob_entropy(x, labels, temperature=temperature, mask=mask, backend="reference"), leaf
    )


@pytest.mark.parametrize("used", ["logprob", "entropy"])
def test_a_missing_gradient_is_not_made(backend, used, monkeypatch):
    leaf = random_logits(3, 65, backend=backend).requires_grad_()
    results = dict(
        zip(("logprob", "entropy"), ops.logprob_entropy(leaf, random_labels(leaf), backend=backend), strict=True)
    )
    seen = {}
    original = reference.backward

    def spy(*args, **options):
        seen["logprob"], seen["entropy"] = args[-2:]
        return original(*args, **options)

    monkeypatch.setattr(reference, "backward", spy)
    (gradient,) = torch.autograd.grad(results[used].sum(), leaf)
    exact_leaf = leaf.detach().double().requires_grad_()
    exact = dict(zip(("logprob", "entropy"), oracle(exact_leaf, random_labels(leaf)), strict=True))
    torch.testing.assert_close(
        gradient.double(), torch.autograd.grad(exact[used].sum(), exact_leaf)[0], rtol=1e-5, atol=1e-6
    )
    if backend == "reference":
        assert {name for name, upstream in seen.items() if upstream is not None} == {used}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_backward(backend, dtype):
    leaf = random_logits(3, 1009, dtype=dtype, backend=backend).requires_grad_()
    labels = random_labels(leaf)

    def loss(logits, inplace):
        logprob, entropy = ops.logprob_entropy(logits, labels, inplace_backward=inplace, backend=backend)
        return logprob.sum() - 0.1 * entropy.sum()

    logits = leaf * 1
    results = []
    logits.register_hook(lambda gradient: results.append(gradient.data_ptr()))
    (ours,) = torch.autograd.grad(loss(logits, True), leaf)
    assert results == [logits.data_ptr()]
    (expected,) = torch.autograd.grad(loss(leaf * 1, False), leaf)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "view", [lambda x: x.view(-1, 7), lambda x: x[:, :-1], lambda x: x.unsqueeze(0)], ids=["view", "slice", "unsqueeze"]
)
def test_inplace_backward_refuses_a_view_of_a_leaf(view):
    leaf = torch.randn(2, 3, 7, requires_grad=True)
    with pytest.raises(ValueError, match="would overwrite a leaf"):
        ops.logprob_entropy(view(leaf), inplace_backward=True)


def test_inplace_backward_refuses_overlapping_rows():
    logits = (torch.randn(20, requires_grad=True) * 1.0).unfold(0, 8, 1)
    with pytest.raises(ValueError, match="do not overlap"):
        ops.logprob_entropy(logits, inplace_backward=True)


class Wrapper(torch.Tensor):
    """Keeps its elements in another tensor, as DTensor and the results of asynchronous collectives do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*(a.inner if isinstance(a, Wrapper) else a for a in args), **(kwargs or {}))


def test_tensors_without_memory_of_their_own():
    logits, out = random_logits(4, 9), torch.empty(4)
    for result, expected in zip(
        ops.logprob_entropy(Wrapper(logits), random_labels(logits)),
        ops.logprob_entropy(logits, random_labels(logits)),
        strict=True,
    ):
        assert torch.equal(result, expected)
    for arguments in (
        {"logits": Wrapper(logits), "entropy": out},
        {"logits": logits, "entropy": Wrapper(out)},
        {"logits": logits, "entropy": out, "logprob": Wrapper(out), "labels": random_labels(logits)},
    ):
        with pytest.raises(ValueError, match="expected a tensor with memory of its own, got Wrapper, which wraps"):
            ops.logprob_entropy_into(**arguments, backend="cpu")


def test_direct_outputs_must_be_on_the_device_of_the_logits():
    with pytest.raises(ValueError, match=r"on cpu, got .* on meta"):
        ops.logprob_entropy_into(torch.randn(4, 9), entropy=torch.empty(4, device="meta"))


@pytest.mark.parametrize("temperature", [1e-15, 1e30])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e30])
def test_the_bounds_of_the_temperature_are_inside_as_number_and_as_tensor(backend, temperature, scale):
    leaf = (random_logits(2, 9, backend=backend) * scale).requires_grad_()
    exact = leaf.detach().double().requires_grad_()
    expected = oracle(exact, random_labels(leaf), temperature)[1]
    (wanted,) = torch.autograd.grad(expected.sum(), exact)
    for given in (temperature, torch.tensor(temperature, device=leaf.device)):
        entropy = ops.entropy(leaf, temperature=given, backend=backend)
        torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-5)
        (gradient,) = torch.autograd.grad(entropy.sum(), leaf)
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item() + 1e-30)


def test_inplace_backward_refuses_what_it_would_corrupt():
    leaf = random_logits(3, 65).requires_grad_()
    with pytest.raises(ValueError, match="leaf that requires grad"):
        ops.logprob_entropy(leaf, inplace_backward=True)
    with pytest.raises(ValueError, match="do not overlap"):
        ops.logprob_entropy((leaf * 1)[0].expand(3, 65), inplace_backward=True)
    logits = leaf * 1
    squares = logits.pow(2).sum()
    entropy = ops.logprob_entropy(logits, inplace_backward=True)[1].sum()
    entropy.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        entropy.backward()


@pytest.mark.parametrize("inplace", [False, True])
def test_second_derivative_is_refused(backend, inplace):
    leaf = random_logits(2, 9, backend=backend).requires_grad_()
    entropy = ops.logprob_entropy(leaf * 1, inplace_backward=inplace, backend=backend)[1]
    (gradient,) = torch.autograd.grad(entropy.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", ["auto", *everywhere("reference", "cuda", "triton")])
def test_opcheck(backend):
    logits = random_logits(2, 3, 9, backend=backend)
    labels, mask = random_labels(logits), torch.ones(2, 3, dtype=torch.bool, device=logits.device)
    temperatures = torch.ones(2, 3, device=logits.device)
    inputs = [(labels, None, None, 0.7, -100), (None, mask, temperatures, 1.0, -100)]
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs, NaN in unused parts included
    for extra in inputs:
        for leaf in (logits, logits.clone().requires_grad_()):
            forward = torch.ops.arpo_ext.logprob_entropy_forward.default
            torch.library.opcheck(forward, (leaf, *extra, False, backend))
        stats = torch.ops.arpo_ext.logprob_entropy_forward(logits, *extra, False, backend)[2]
        upstream = (stats, torch.ones_like(stats[0]), None)
        torch.library.opcheck(torch.ops.arpo_ext.logprob_entropy_backward.default, (logits, *extra, *upstream, backend))
        inplace = torch.ops.arpo_ext.logprob_entropy_backward_.default
        torch.library.opcheck(inplace, (logits.clone(), *extra, *upstream, backend))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_twice_for_all_temperatures_given_as_numbers(compiler):
    """Once for the first, and once for any."""
    torch._dynamo.reset()
    leaf = random_logits(3, 65).requires_grad_()
    labels, (graphs, count) = random_labels(leaf), counting(compiler)
    compiled = torch.compile(ops.logprob_entropy, fullgraph=True, backend=count)
    for temperature in (0.3, 0.5, 0.7, 1.0, 1.2, 2.0):
        ours, expected = (f(leaf, labels, temperature=temperature) for f in (compiled, ops.logprob_entropy))
        torch.testing.assert_close(ours, expected)
        gradients = (torch.autograd.grad(logprob.sum() + entropy.sum(), leaf) for logprob, entropy in (ours, expected))
        torch.testing.assert_close(*gradients)
    assert len(graphs) == 2


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(compiler):
    torch._dynamo.reset()
    leaf = random_logits(3, 65).requires_grad_()
    labels = random_labels(leaf)
    temperature = torch.full((3,), 0.7)

    def loss(leaf):
        logprob, entropy = ops.logprob_entropy(leaf * 2, labels, temperature=temperature, inplace_backward=True)
        return logprob.sum() + ops.entropy(leaf, temperature=0.5).sum() + entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)(leaf)
    torch.testing.assert_close(compiled, loss(leaf))
    expected = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaf), expected)


def test_no_labels_gives_no_logprob(backend):
    logits = random_logits(3, 65, backend=backend)
    logprob, entropy = ops.logprob_entropy(logits, backend=backend)
    assert logprob is None
    assert torch.equal(entropy, ops.entropy(logits, backend=backend))
    labels = random_labels(logits)
    assert torch.equal(
        ops.logprob(logits, labels, backend=backend), ops.logprob_entropy(logits, labels, backend=backend)[0]
    )


LOGITS = torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        (torch.tensor(1.0), {}, r"logits must be \[..., V\] with V >= 1 .* got torch.float32 of shape \(\)"),
        (torch.zeros(2, 0), {}, r"got torch.float32 of shape \(2, 0\)"),
        (torch.zeros(2, 5, dtype=torch.int64), {}, "got torch.int64"),
        (LOGITS, {"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must be integers of shape \(2,\)"),
        (LOGITS, {"labels": torch.zeros(2)}, "got torch.float32"),
        (LOGITS, {"mask": torch.zeros(2)}, r"mask must be bool of shape \(2,\), got torch.float32"),
        (LOGITS, {"temperature": 0}, "temperature must be positive.*got 0"),
        (LOGITS, {"temperature": -1.0}, "got -1.0"),
        (LOGITS, {"temperature": math.nan}, "got nan"),
        (LOGITS, {"temperature": torch.ones(3)}, r"temperature must be a number or a tensor of shape \(\) or \(2,\)"),
        (LOGITS, {"temperature": torch.ones((), requires_grad=True)}, "needs no gradient"),
        (
            LOGITS,
            {"labels": torch.zeros(2, dtype=torch.int64, device="meta")},
            "labels must be on the device of logits, cpu, got meta",
        ),
    ],
)
def test_wrong_arguments_are_named(logits, options, message):
    with pytest.raises(ValueError, match=message):
        ops.logprob_entropy(logits, **options)


def test_wrong_rows_are_named(backend):
    if backend in ("cuda", "triton"):
        pytest.skip("counted there, see test_invalid_labels_are_counted_where_the_kernel_cannot_raise")
    for label in (5, -1, -(2**63)):
        with pytest.raises(ValueError, match=rf"labels must be in 0 to 4 or equal ignore_index -100, got {label}"):
            ops.logprob_entropy(LOGITS, torch.tensor([0, label]), backend=backend)
    with pytest.raises(ValueError, match="temperature must be positive, in 1e-15 to 1e30, got -2"):
        ops.entropy(LOGITS, temperature=torch.tensor([1.0, -2.0]), backend=backend)


def test_unknown_backend():
    with pytest.raises(ops.BackendError, match=r"no backend 'gpu'; expected auto, cpu"):
        ops.entropy(LOGITS, backend="gpu")


@pytest.mark.parametrize("backend", everywhere("cuda", "triton"))
def test_invalid_labels_are_counted_where_the_kernel_cannot_raise(backend):
    device = device_of(backend)
    logits = random_logits(4, 65, backend=backend)
    for served_by in (backend, *(["reference"] if device == "cuda" else [])):
        before = ops.invalid_labels(device)
        logprob, entropy = ops.logprob_entropy(
            logits, torch.tensor([65, -1, -100, 3], device=device), backend=served_by
        )
        assert logprob[:3].tolist() == [0, 0, 0]
        assert entropy.isfinite().all()
        assert ops.invalid_labels(device) == before + 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rows", [3, 600])
def test_it_is_captured_in_a_cuda_graph_and_counts_at_every_replay(rows):
    leaf = random_logits(rows, 40_001, backend="cuda").requires_grad_()
    labels = random_labels(leaf)
    labels[1] = 40_001

    def everything():
        logprob, entropy = ops.logprob_entropy(leaf, labels, temperature=0.7, backend="cuda")
        stats = ops.logits_stats(leaf, labels, backend="cuda")
        return *torch.autograd.grad(logprob.sum() + entropy.sum(), leaf), logprob, entropy, *stats

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        everything()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    for seed in (1, 2):
        leaf.data.copy_(random_logits(rows, 40_001, seed=seed))
        before = ops.invalid_labels("cuda")
        graph.replay()
        assert ops.invalid_labels("cuda") == before + 2
        torch.testing.assert_close(captured, everything(), rtol=0, atol=0)
