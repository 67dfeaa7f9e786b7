"""The policy loss: the reference against loops and gradcheck in float64, every backend against the reference."""

import math
from itertools import pairwise

import pytest
import torch
from backends import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_loss_cases import CPU, FAST, checked, made_tokens, naive, run

from arpo_ext import ops

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

BACKENDS = [*FAST, "reference"]
RULES = [
    {},
    {"clip_low": 0.2, "clip_high": 0.28},
    {"clip": "dual", "dual_clip": 3.0},
    {"clip": "dual", "dual_clip": 1.5, "clip_low": 0.0, "clip_high": 0.0},
]
MAXIMA = ("ratio_max", "log_ratio_max")


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("spread", [0.5, 12.0])
def test_the_reference_follows_the_definition(pair, rule, spread):
    tokens = made_tokens(200, pair=pair, spread=spread, dtype=torch.float64)
    loss, gradient, sums = run(tokens, normalizer=37.0, **rule)
    expected_loss, expected_gradient, expected_sums = naive(tokens, normalizer=37.0, **rule)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-15)
    assert {name: value.item() for name, value in sums._asdict().items()} == pytest.approx(expected_sums, rel=1e-12)


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("rule", RULES[:3])
def test_the_reference_passes_gradcheck(pair, rule):
    tokens = made_tokens(60, seed=2, pair=pair, dtype=torch.float64)
    logprob = tokens[0].nan_to_num(0.0).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ops.policy_loss(x, *tokens[1:], normalizer=3.0, backend="reference", **rule)[0], (logprob,)
    )


# 16 tokens fill a vector, 1024 a block, 64 blocks the parts; 1, 17, 1031 and 70001 end in the middle of one.
@pytest.mark.parametrize("count", [1, 16, 17, 1031, 70_001])
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_every_backend_is_as_close_to_float64_as_plain_torch(count, pair, rule):
    tokens = made_tokens(count, seed=count, pair=pair)
    true_loss, true_gradient, true_sums = run([t.double() for t in tokens], normalizer=count, **rule)
    plain_loss, plain_gradient, _ = run(tokens, "reference", normalizer=count, **rule)
    # A ratio within rounding of a bound may fall on either side of it.
    ratio = (tokens[0].double() - tokens[1].double()).exp()
    bounds = [1 - rule.get("clip_low", 0.2), 1 + rule.get("clip_high", 0.2), rule.get("dual_clip", 0.0)]
    sure = torch.stack([(ratio - bound).abs() > 1e-5 for bound in bounds]).all(dim=0)
    unsure = int((~sure).sum())
    assert unsure <= count // 3 + 2 + count // 100
    magnitude = ratio * (tokens[2].abs().sum(1) if pair else (tokens[2] * tokens[3]).abs()) / count
    magnitude = magnitude.nan_to_num()
    for backend in CPU:
        loss, gradient, sums = run(tokens, backend, normalizer=count, **rule)
        assert abs(loss - true_loss) <= abs(plain_loss - true_loss) + 1e-6 * true_gradient.abs().sum() + 1e-9
        error, plain_error = (gradient - true_gradient).abs(), (plain_gradient - true_gradient).abs()
        bound = plain_error + 5e-7 * magnitude
        assert (error <= bound)[sure].all()
        for name, value, true in zip(sums._fields, sums, true_sums, strict=True):
            slack = 1e-2 if "clipped" in name else 0.0
            assert abs(value - true) <= 2e-6 * abs(true) + 1e-6 * (name == "kl_k1") * sums.weight + slack, name


@pytest.mark.parametrize("backend", FAST)
def test_the_third_kl_estimate_keeps_its_digits_near_zero(backend):
    old = torch.zeros(4096)
    new = torch.full((4096,), 1e-4)
    sums = run([new, old, old, torch.ones(4096)], backend, normalizer=1.0)[2]
    x = new[0].double()
    assert (sums.kl_k3 / 4096).item() == pytest.approx((x.expm1() - x).item(), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pair", [False, True])
@settings(deadline=None, max_examples=examples(25))
@given(st.integers(1, 300), st.lists(st.integers(0, 300), max_size=6), st.integers(0, 99))
def test_any_split_into_micro_batches_gives_the_same_step(backend, pair, count, cuts, seed):
    tokens = made_tokens(count, seed=seed, pair=pair)
    rule = {"normalizer": 50.0, "clip": "dual", "dual_clip": 3.0, "backend": backend}
    loss, gradient, sums = run(tokens, **rule)
    edges = sorted({0, count, *(min(cut, count) for cut in cuts)})
    pieces = [run([t[begin:end] for t in tokens], **rule) for begin, end in pairwise(edges)]
    torch.testing.assert_close(sum(piece[0] for piece in pieces), loss, rtol=1e-5, atol=1e-6)
    assert torch.cat([piece[1] for piece in pieces]).equal(gradient)
    for name, total, *parts in zip(sums._fields, sums, *(piece[2] for piece in pieces), strict=True):
        joined = max(parts) if name in MAXIMA else sum(parts)
        torch.testing.assert_close(joined, total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_numbers_per_shared_token_equal_the_sum_over_its_rows(backend):
    rows, count = 4, 300
    new, old, _, _ = made_tokens(count, seed=5)
    new, old = new.nan_to_num(-1.0), old.nan_to_num(-1.3)
    advantage, weight = torch.randn(rows, count), torch.rand(rows, 1).expand(rows, count)
    pair = torch.stack([(weight * advantage.clamp(min=0)).sum(0), (weight * advantage.clamp(max=0)).sum(0)], dim=1)
    rule = {"normalizer": 10.0, "clip": "dual", "dual_clip": 2.0, "backend": backend}
    flat = [t.reshape(-1) for t in (new.expand(rows, count), old.expand(rows, count), advantage, weight)]
    loss, gradient, _ = run(flat, **rule)
    packed_loss, packed_gradient, _ = run([new, old, pair, weight.sum(0)], **rule)
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed_gradient, gradient.reshape(rows, count).sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pair", [False, True])
def test_ratios_beyond_the_guard(backend, pair):
    """exp(100) would overflow; the ratio stops at exp(20) and the gradient is 0 there."""
    x = torch.tensor([100.0, -100.0, 20.0, -20.0, math.inf, -math.inf, 20.5])
    advantage = torch.tensor([[0.5, -1.0]] * 7) if pair else -torch.ones(7)
    loss, gradient, sums = run([x, torch.zeros(7), advantage, torch.ones(7)], backend, normalizer=1.0, clip_low=1.0)
    limit = math.exp(20.0)
    assert sums.ratio_max.item() == pytest.approx(limit, rel=1e-6)
    assert sums.log_ratio_max == math.inf
    assert loss.item() == pytest.approx(4 * limit, rel=1e-5)
    assert gradient.nonzero().flatten().tolist() == [2, 3]
    assert gradient[2].item() == pytest.approx(limit, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_nan_in_a_trained_token_shows(backend, which):
    tokens = [torch.rand(100) + 0.1 for _ in range(4)]
    tokens[which][63] = math.nan
    loss, gradient, sums = run(tokens, backend, normalizer=1.0)
    assert loss.isnan()
    assert gradient[:63].isfinite().all()
    assert gradient[64:].isfinite().all()
    if which < 2:
        assert sums.ratio_max.isnan()
        assert sums.kl_k3.isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pair", [False, True])
def test_no_tokens_or_only_tokens_of_weight_zero(backend, pair):
    for count in (0, 40):
        inputs = [torch.full((count,), math.nan) for _ in range(2)]
        inputs += [torch.full((count, 2) if pair else (count,), math.nan), torch.zeros(count)]
        loss, gradient, sums = run(inputs, backend, normalizer=5.0)
        assert loss == 0
        assert gradient.tolist() == [0.0] * count
        assert [value.item() for value in sums] == [0.0] * len(sums)


@pytest.mark.parametrize("backend", BACKENDS)
def test_normalizer_may_be_a_tensor(backend):
    tokens = made_tokens(100)
    expected = run(tokens, backend, normalizer=7.0)
    for normalizer in (torch.tensor(7.0), torch.tensor(7), torch.tensor(7.0, dtype=torch.float64)):
        loss, gradient, _ = run(tokens, backend, normalizer=normalizer)
        torch.testing.assert_close(loss, expected[0])
        torch.testing.assert_close(gradient, expected[1])


@pytest.mark.parametrize("backend", CPU)
def test_the_number_of_threads_does_not_show(backend):
    tokens = made_tokens(200_000)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(tokens, backend, normalizer=9.0))
    torch.set_num_threads(before)
    for loss, gradient, sums in results[1:]:
        assert loss.equal(results[0][0])
        assert gradient.equal(results[0][1])
        assert sums == results[0][2]


@pytest.mark.parametrize("backend", FAST)
def test_strided_inputs(backend):
    tokens = made_tokens(64, pair=True)
    spread = [torch.stack([t, t.flip(0)], dim=-1)[..., 0] for t in tokens]
    assert not spread[2].is_contiguous()
    for got, expected in zip(
        run(spread, backend, normalizer=1.0)[:2], run(tokens, backend, normalizer=1.0)[:2], strict=True
    ):
        assert got.equal(expected)


ONES = torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logprob": torch.ones(3, 1)}, r"got logprob of shape \[3, 1\]; expected \[N\]"),
        ({"logprob": torch.ones(3, dtype=torch.bfloat16)}, "got logprob of torch.bfloat16; expected torch.float32"),
        ({"old_logprob": torch.ones(4)}, r"got old_logprob of shape \[4\]; expected \[3\]"),
        ({"advantage": torch.ones(3, 3)}, r"got advantage of shape \[3, 3\]; expected \[3\] or \[3, 2\]"),
        ({"weight": torch.ones(3, dtype=torch.bool)}, "got weight of torch.bool; expected torch.float32, as logprob"),
        ({"normalizer": 0.0}, "got normalizer 0.0; expected a number above 0"),
        ({"normalizer": torch.ones(1)}, r"got normalizer of shape \[1\]; expected a 0-d tensor"),
        ({"clip_low": 1.2}, "got clip_low 1.2; expected 0 to 1"),
        ({"clip_high": -0.1}, "got clip_high -0.1; expected at least 0"),
        ({"clip": "dual"}, "got dual_clip None with clip 'dual'"),
        ({"dual_clip": 3.0}, "got dual_clip 3.0 with clip 'ppo'"),
        ({"clip": "dual", "dual_clip": 1.0}, "got dual_clip 1.0; expected a number above 1"),
        ({"clip": "cisop"}, "got clip 'cisop'; expected ppo, dual, gppo, cispo, sapo"),
        ({"ratio": "turn"}, "got none of segment, row and parent with ratio 'turn'; expected segment"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    inputs = {"logprob": ONES, "old_logprob": ONES, "advantage": ONES, "weight": ONES, "normalizer": 1.0}
    with pytest.raises(ValueError, match=message):
        ops.policy_loss(**{**inputs, **arguments})


def test_a_backend_that_cannot_serve_says_why():
    tokens = made_tokens(5, dtype=torch.float64)
    with pytest.raises(ops.BackendError, match=r"needs float32, got torch\.float64"):
        ops.policy_loss(*tokens, normalizer=1.0, backend="cpu")
    with pytest.raises(ops.BackendError, match="backend 'cuda' cannot serve this call: needs float32"):
        ops.policy_loss(*tokens, normalizer=1.0, backend="cuda")


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("normalizer", [5.0, torch.tensor(5.0)])
@pytest.mark.parametrize("rule", RULES[1:3])
def test_the_registered_op_passes_opcheck(pair, normalizer, rule):
    tokens = [t.nan_to_num() for t in made_tokens(40, pair=pair)]
    for needs in (True, False):
        call = checked(tokens[0].clone().requires_grad_(needs), *tokens[1:], normalizer=normalizer, **rule)
        torch.library.opcheck(torch.ops.arpo_ext.policy_loss.default, (*call, needs, False, "cpu"))


def test_it_compiles_into_one_graph():
    tokens = made_tokens(100)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(logprob, *rest):
        loss, sums = ops.policy_loss(logprob * 1.0, *rest, normalizer=2.0)
        return loss, sums.kl_k1

    logprob = tokens[0].nan_to_num().requires_grad_()
    loss, k1 = step(logprob, *tokens[1:])
    loss.backward()
    expected_loss, expected_gradient, expected_sums = run(tokens, normalizer=2.0)
    assert loss.equal(expected_loss)
    assert k1.equal(expected_sums.kl_k1)
    assert logprob.grad.equal(expected_gradient)


def test_the_benchmark_checks_itself(capsys):
    from benchmarks import bench_policy_loss

    assert bench_policy_loss.main(["--smoke", "--rounds", "1"]) == 0
    assert "torch eager" in capsys.readouterr().out
