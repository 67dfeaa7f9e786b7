"""What every op over logits promises on every backend: hostile rows, errors no larger than naive torch, more than 2^31
elements, run-time temperatures under torch.compile, and opcheck of whatever is registered.

What one op alone promises stands in its own test file.
"""

import ast
import math
from pathlib import Path

import pytest
import torch
from backends import device_of, everywhere
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd

from arpo_ext import ops

INF = math.inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCAB = 4099  # prime; more than one group of a block


@pytest.fixture(autouse=True)
def _outputs(poisoned_outputs):
    """An output nobody wrote shows."""


@pytest.fixture(params=everywhere())
def backend(request):
    return request.param


def of_logits(logits, labels, temperature, backend):
    return ops.logprob_entropy(logits, labels, temperature=temperature, backend=backend)


def of_stats(logits, labels, temperature, backend):
    stats = ops.logits_stats(logits, labels, temperature=temperature, backend=backend)
    return stats.logprob, stats.entropy


def of_bias(logits, labels, temperature, backend):
    """The rows as a bias on no hidden state, one at a time: the products are 0."""
    rows = []
    for row, label in zip(logits, labels, strict=True):
        hidden, weight = row.new_zeros(1, 1), row.new_zeros(row.numel(), 1)
        rows.append(
            ops.linear_logprob_entropy(
                hidden, weight, label.view(1), row, temperature=temperature, backend=backend, chunk_tokens=1
            )
        )
    return tuple(torch.cat(part) for part in zip(*rows, strict=True))


OPS = {"logprob_entropy": of_logits, "logits_stats": of_stats, "linear_logprob_entropy": of_bias}


def exactly(logits, labels, temperature=1.0):
    """The definition in float64; -inf counts as probability 0."""
    log_p = (logits.double() / temperature).log_softmax(-1)
    p = log_p.exp()
    return log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -torch.where(p > 0, p * log_p, p).sum(-1)


def naively(logits, labels, temperature=1.0):
    """What trainers run, in the dtype of the logits."""
    scaled = logits / temperature
    log_z = scaled.logsumexp(-1)
    entropy = log_z - (scaled.softmax(-1) * scaled).sum(-1)
    return scaled.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - log_z, entropy


def base_row():
    return 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(3))


COLUMN = torch.arange(VOCAB)
# name -> row, label. Most made a peer's result NaN, infinite or percents wrong.
ROWS = {
    "all -inf but one": (torch.where(COLUMN == 2050, 2.0, -INF), 2050),
    "first block -inf": (torch.where(COLUMN < 4095, -INF, base_row()), 4097),
    "offset -120": (base_row() - 120, 7),
    "offset 1e4": (base_row() + 1e4, 7),
    "constant": (torch.full((VOCAB,), 7.5), 7),
    "one hot 60": (torch.where(COLUMN == VOCAB - 1, 60.0, 0.0), VOCAB - 1),
    "one hot -60": (torch.where(COLUMN == 0, -60.0, 0.0), 0),
    "one hot 60 among -60": (torch.where(COLUMN == 4096, 60.0, -60.0), 3),
    "overflow of float16": (torch.where(COLUMN % 2 == 0, 6e4, -6e4), 0),
    "overflow of float16 in the sum": (torch.full((VOCAB,), 6e4), 11),
    "smallest float16": (torch.where(COLUMN % 2 == 0, 6e-8, -6e-8), 5),
}


@pytest.mark.parametrize("temperature", [1.0, 1e-3, 1e3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_hostile_rows(backend, op, dtype, temperature):
    device = device_of(backend)
    logits = torch.stack([row for row, _ in ROWS.values()]).to(device, dtype)
    labels = torch.tensor([label for _, label in ROWS.values()], device=device)
    results = OPS[op](logits, labels, temperature, backend)
    for ours, exact in zip(results, exactly(logits, labels, temperature), strict=True):
        assert ours.dtype == torch.float32
        for name, a, e in zip(ROWS, ours.tolist(), exact.tolist(), strict=True):
            # Half a place of z = (x - max) / temperature, which is as large as 1e8, and of the log of a sum of V.
            assert a == pytest.approx(e, rel=3e-7, abs=1e-6), f"{name}: got {a}, expected {e}"
    assert results[1][list(ROWS).index("constant")].item() == pytest.approx(math.log(VOCAB), rel=1e-7)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("vocab", [2, 1009, 151_936])
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_entropy_of_a_row_of_probability_1_minus_1e_6(backend, op, vocab, spread):
    """Peers are percents off here: entropy = log z - mean of x cancels five digits."""
    others = spread * torch.randn(vocab - 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    largest = others.logsumexp(-1) + math.log(1e6 - 1)
    logits = torch.cat((others, largest.view(1))).float().view(1, vocab).to(device_of(backend))
    label = torch.tensor([vocab - 1], device=logits.device)
    d = (logits[0].double() - logits[0, -1])[:-1].cpu()
    s, a = d.exp().sum().item(), (d * d.exp()).sum().item()
    assert s == pytest.approx(1e-6, rel=1e-5)
    logprob, entropy = OPS[op](logits, label, 1.0, backend)
    assert entropy.item() == pytest.approx(math.log1p(s) - a / (1 + s), rel=1e-6, abs=0)
    assert logprob.item() == pytest.approx(-math.log1p(s), rel=1e-6, abs=0)


@pytest.mark.parametrize("op", OPS)
def test_one_column(backend, op):
    logits = torch.tensor([[3.0], [-1e4], [0.0]], device=device_of(backend))
    labels = torch.zeros(3, dtype=torch.int64, device=logits.device)
    for result in OPS[op](logits, labels, 0.5, backend):
        assert result.tolist() == [0, 0, 0]


@pytest.mark.parametrize("op", ["logprob_entropy", "logits_stats"])
def test_more_than_2_to_the_31_elements(backend, op):
    """4,200 rows of 2^19 columns in the memory of one row; all but three are masked, so that it takes no time."""
    if backend == "triton" and device_of(backend) == "cpu":
        pytest.skip("the interpreter copies the whole")
    rows, vocab = 4200, 2**19
    row = torch.randn(1, vocab, generator=torch.Generator().manual_seed(5)).to(device_of(backend))
    mask = torch.zeros(rows, dtype=torch.bool, device=row.device)
    mask[[0, 4095, 4199]] = True
    labels = torch.full((rows,), vocab - 1, device=row.device)
    assert rows * vocab > 2**31
    function = ops.logprob_entropy if op == "logprob_entropy" else ops.logits_stats
    if backend == "reference":
        pytest.skip("plain torch copies the whole")
    logprob, entropy = function(row.expand(rows, vocab), labels, mask=mask, backend=backend)[:2]
    for ours, exact in zip((logprob, entropy), exactly(row, labels[:1]), strict=True):
        torch.testing.assert_close(ours[mask].double(), exact.expand(3), rtol=1e-6, atol=1e-6)
        assert ours[~mask].count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_offsets_of_the_gradient_need_64_bits(backend, dtype):
    """Two rows 2^31 elements apart, so only their pages exist; the gradient goes to the same places."""
    if backend == "reference" or backend == "triton":
        pytest.skip("only native code writes a gradient in place of strided logits")
    torch.use_deterministic_algorithms(False)  # it would fill the 8 GiB
    far = torch.empty(2**31 + 100, dtype=dtype, device=device_of(backend)).as_strided((2, 100), (2**31, 1))
    near = torch.randn(2, 100, generator=torch.Generator().manual_seed(2)).to(far.device, dtype)
    gradients = []
    for memory in (far, near.clone()):
        leaf = near.clone().requires_grad_()
        logits = Placed.apply(leaf, memory)
        ops.entropy(logits, backend=backend)
        entropy = ops.logprob_entropy(logits, inplace_backward=True, backend=backend)[1]
        gradients.append(torch.autograd.grad(entropy.sum(), leaf)[0])
    assert gradients[0].stride() == (2**31, 1)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-3)


class Placed(torch.autograd.Function):
    """The values of `leaf` as a computed tensor in the given memory."""

    @staticmethod
    def forward(ctx, leaf, memory):
        memory.copy_(leaf)
        return memory

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@st.composite
def rows_of_logits(draw):
    rows, vocab = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 7, 31, 64, 513, 1031, 2052]))
    scale = draw(st.sampled_from([0.01, 1.0, 8.0, 60.0]))
    offset = draw(st.sampled_from([0.0, -120.0, 300.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    logits = scale * torch.randn(rows, vocab, generator=generator) + offset
    labels = torch.randint(vocab, (rows,), generator=generator)
    upstream = torch.randn(2, rows, generator=generator)
    return logits.to(draw(st.sampled_from(DTYPES))), labels, upstream, draw(st.sampled_from([1.0, 0.5, 1.7]))


@pytest.mark.parametrize("backend", everywhere())
@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=rows_of_logits())
def test_errors_are_no_larger_than_those_of_naive_torch(backend, case):
    """Forward and gradient, element by element, each against float64."""
    logits, labels, upstream, temperature = (t.to(device_of(backend)) if torch.is_tensor(t) else t for t in case)

    def run(function, logits):
        leaf = logits.detach().clone().requires_grad_()
        results = function(leaf, labels)
        loss = sum((result * w.to(result.dtype)).sum() for result, w in zip(results, upstream, strict=True))
        return [*(result.detach() for result in results), torch.autograd.grad(loss, leaf)[0]]

    ours = run(lambda x, y: ops.logprob_entropy(x, y, temperature=temperature, backend=backend), logits)
    naive = run(lambda x, y: naively(x, y, temperature), logits)
    exact = run(lambda x, y: exactly(x, y, temperature), logits.double())
    # z is rounded once, and so is a gradient to the dtype of the logits.
    size = [1.0, 1.0, upstream.abs().max().item() / temperature * 4]
    for a, b, e, scale in zip(ours, naive, exact, size, strict=True):
        last_place = torch.finfo(a.dtype).eps * e.abs() + 1e-6 * scale
        excess = (a.double() - e).abs() - (b.double() - e).abs() - last_place
        assert excess.max() <= 0, f"{excess.max()} more than naive torch's error"


@pytest.mark.parametrize("backend", everywhere())
@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=rows_of_logits(), ignored=st.integers(0, 3))
def test_every_op_tells_the_same_of_the_same_rows(backend, case, ignored):
    logits, labels, _, temperature = (t.to(device_of(backend)) if torch.is_tensor(t) else t for t in case)
    labels[ignored:] = -100
    first = of_logits(logits, labels, torch.tensor(temperature, device=logits.device), backend)
    assert first[0][ignored:].count_nonzero() == 0
    for op in OPS:
        for a, b in zip(first, OPS[op](logits, labels, temperature, backend), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)


LABELS = torch.tensor([3, 64, -100])
WITH_TEMPERATURE = {
    "logprob_entropy": lambda x, t: sum(part.sum() for part in ops.logprob_entropy(x, LABELS, temperature=t)),
    "entropy": lambda x, t: ops.entropy(x, temperature=t).sum(),
    "logprob": lambda x, t: ops.logprob(x, LABELS, temperature=t).sum(),
    "logits_stats": lambda x, t: x.sum() + ops.logits_stats(x, LABELS, temperature=t).entropy.sum(),
}


@pytest.mark.parametrize("op", WITH_TEMPERATURE)
@pytest.mark.parametrize(("form", "expected"), [("0-d", 1), ("per row", 1), ("number", 2)])
def test_a_new_temperature_compiles_nothing_anew(op, form, expected):
    """A number is a constant of the first graph and an input of the second, which serves all others."""
    torch._dynamo.reset()
    graphs = []

    def unchanged(graph, inputs):
        return make_boxed_func(graph)

    def count(graph, inputs):
        graphs.append(graph)
        return unchanged(graph, inputs)

    step = WITH_TEMPERATURE[op]
    compiled = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=count, bw_compiler=unchanged))
    logits = torch.randn(3, 65)
    for temperature in (0.5, 0.7, 1.0, 1.3, 2.0, 3.0, 0.9, 1.0, 5.0, 0.25, 4.0):
        given = {"0-d": torch.tensor(temperature), "per row": torch.full((3,), temperature)}.get(form, temperature)
        leaves = [logits.clone().requires_grad_() for _ in range(2)]
        results = [function(leaf, given) for function, leaf in zip((compiled, step), leaves, strict=True)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(r, x)[0] for r, x in zip(results, leaves, strict=True)))
    assert len(graphs) == expected


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_wrong_number_is_named_while_compiling_too(temperature):
    torch._dynamo.reset()
    compiled = torch.compile(WITH_TEMPERATURE["entropy"], backend="eager")
    with pytest.raises(ValueError, match="temperature must be positive"):
        compiled(torch.randn(3, 65), temperature)


def names_in_opchecks():
    """Attribute names in the test functions that speak of opcheck."""
    found = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and "opcheck" in node.name:
                found |= {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}
    return found


def test_every_registered_op_passes_opcheck_somewhere():
    registered = [name.removeprefix("arpo_ext::") for name in torch._C._dispatch_get_all_op_names()]
    registered = {name.partition(".")[0] for name in registered if "::" not in name}
    assert "logprob_entropy_forward" in registered
    assert not registered - names_in_opchecks()
