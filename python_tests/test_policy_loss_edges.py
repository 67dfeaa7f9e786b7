"""Edges of the policy loss: infinities, NaN, nothing at all, odd strides, and arguments that are wrong."""

import math

import pytest
import torch
from backends import everywhere
from policy_loss_cases import CLIPS, CPU, FAST, in_double, made_groups, made_terms, made_tokens, run

from arpo_ext import ops

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

BACKENDS = [*FAST, "reference"]
ONES = torch.ones(3)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("ratio", ["token", "turn"])
def test_log_ratios_beyond_the_guard(backend, clip, ratio):
    """No gradient there, but for cispo; a reference policy as far away has none from k3 either."""
    x = torch.tensor([25.0, -25.0, 100.0, -100.0, 3.0, -3.0, 20.0, -20.0])
    advantage = torch.tensor([1.0, -1.0]).repeat_interleave(8)
    tokens = [torch.cat([x, x]), torch.zeros(16), advantage, torch.ones(16)]
    arguments = {"normalizer": 4.0, "ratio": ratio, "ref_logprob": torch.zeros(16), "kl": "k3", "kl_coef": 1e-3, **clip}
    if ratio == "turn":
        arguments["segment"] = torch.arange(16)
    loss, gradient, sums = run(tokens, backend, **arguments)
    true_loss, true_gradient, true_sums = run([t.double() for t in tokens], "reference", **in_double(arguments))
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-5, atol=1e-7)
    assert (gradient[:4] == 0).all() == (clip.get("clip") != "cispo")
    for name, value, true in zip(sums._fields, sums, true_sums, strict=True):
        torch.testing.assert_close(value, true, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("pair", [False, True])
def test_unaligned_strided_and_expanded_inputs(backend, pair):
    count = 333
    tokens = [t.nan_to_num() for t in made_tokens(count, pair=pair)]
    arguments = {"normalizer": 9.0, "ratio": "sequence"} | made_groups(count, "sequence")
    terms = made_terms(tokens, {"kl": "k2", "kl_coef": 0.1, "entropy": True, "entropy_coef": 0.3})
    expected = run(tokens, backend, **arguments, **terms)
    shifted = [torch.cat([t[:1], t])[1:] for t in tokens]
    strided = [torch.stack([t, t.flip(0)], dim=-1)[..., 0] for t in tokens]
    assert shifted[0].data_ptr() % 16 != 0
    for others in (shifted, strided):
        for got, wanted in zip(run(others, backend, **arguments, **terms)[:2], expected[:2], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)
    flat = [tokens[0], tokens[1], torch.ones(1).expand(count), torch.ones(1).expand(count)]
    solid = [t.contiguous() for t in flat]
    assert run(flat, backend, normalizer=1.0)[1].equal(run(solid, backend, normalizer=1.0)[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", ["ppo", "gppo", "cispo", "sapo"])
@pytest.mark.parametrize("ratio", ["token", "turn", "sequence"])
def test_nan_in_a_trained_token_shows(backend, clip, ratio):
    """In the loss and in the gradient, which is what an optimizer sees; of a shared ratio, in all that share it."""
    for which in range(4):
        tokens = [torch.rand(100) + 0.1 for _ in range(4)]
        tokens[which][63] = math.nan
        groups = {} if ratio == "token" else {"segment" if ratio == "turn" else "row": torch.arange(100) // 10}
        loss, gradient, _ = run(tokens, backend, normalizer=1.0, clip=clip, ratio=ratio, **groups)
        assert loss.isnan()
        assert gradient[:60].isfinite().all()
        assert gradient[70:].isfinite().all()
        shared = ratio != "token" and (which < 2 or clip != "cispo")
        assert gradient[60:70].isnan().tolist() == [shared or token == 63 for token in range(60, 70)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("x", [0.5, 25.0])
@pytest.mark.parametrize("name", ["advantage", "ref_logprob"])
def test_nan_shows_in_the_gradient_beyond_the_guard_too(backend, x, name):
    tokens = [torch.full((40,), x), torch.zeros(40), torch.ones(40), torch.ones(40)]
    ref = torch.zeros(40)
    (tokens[2] if name == "advantage" else ref)[3] = math.nan
    gradient = run(tokens, backend, normalizer=1.0, ref_logprob=ref, kl="k3", kl_coef=0.1, clip="gppo")[1]
    assert gradient.isnan().tolist() == [token == 3 for token in range(40)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_packed_path_shows_in_all_its_tokens(backend):
    """Segments 0 - 1, 0 - 2: what only the other path has is untouched."""
    tokens = [torch.zeros(9), torch.zeros(9), torch.ones(2), torch.tensor([2.0, 2, 2, 1, 1, 1, 1, 1, 1])]
    tokens[0][4] = math.nan
    tree = {"segment": torch.arange(9) // 3, "parent": torch.tensor([-1, 0, 0]), "leaf_segment": torch.tensor([1, 2])}
    loss, gradient, _ = run(tokens, backend, normalizer=1.0, ratio="sequence", **tree)
    assert loss.isnan()
    assert gradient.isnan().tolist() == [True] * 6 + [False] * 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("terms", [{}, {"kl": "k3", "kl_coef": 0.1, "entropy": True, "entropy_coef": 0.2}])
def test_trees_without_tokens_segments_or_leaves(backend, terms):
    """Arrays without elements have no address; the ratio is that of the paths nevertheless."""
    index = torch.empty(0, dtype=torch.int64)
    rule = {"normalizer": 5.0, "ratio": "sequence"}
    for count in (0, 3):
        weight = torch.zeros(count)
        tokens = [torch.full((count,), math.nan), torch.full((count,), math.nan), torch.empty(0), weight]
        more = made_terms(tokens, terms)
        group = torch.full((count,), -1)
        for parent, leaf_segment in ((index, index), (torch.tensor([-1]), index), (torch.tensor([-1]), index + 1)):
            packed = {"segment": group, "parent": parent, "leaf_segment": leaf_segment}
            loss, gradient, sums = run(tokens, backend, **rule, **packed, **more)
            assert loss == 0
            assert (gradient == 0).all()
            assert [value.item() for value in sums] == [0.0] * len(sums)
    leaves = {"parent": torch.tensor([-1, 0]), "leaf_segment": torch.tensor([0, 1]), "segment": index}
    loss, _, sums = run([torch.empty(0), torch.empty(0), torch.ones(2), torch.empty(0)], backend, **rule, **leaves)
    assert loss == 0
    assert [value.item() for value in sums] == [0.0] * len(sums)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio_gradient", ["mean", "token"])
@pytest.mark.parametrize("ratio", ["token", "turn"])
@pytest.mark.parametrize("normalizer", [0.0, math.nan])
def test_a_token_of_weight_zero_has_gradient_zero_whatever_the_rest_is(backend, ratio, ratio_gradient, normalizer):
    """Zero times a scale or a ratio that is not finite would be NaN."""
    tokens = [torch.zeros(40) for _ in range(2)] + [torch.ones(40), torch.arange(40) % 2.0]
    tokens[0][39] = math.nan
    terms = {"ref_logprob": torch.ones(40), "kl": "k3", "kl_coef": 0.1}
    terms |= {"entropy": torch.ones(40), "entropy_coef": 0.1, "normalizer": torch.tensor(normalizer)}
    if ratio == "turn":
        terms["segment"] = torch.arange(40) // 20
    _, gradient, _ = run(tokens, backend, ratio=ratio, ratio_gradient=ratio_gradient, **terms)
    assert (gradient[:, ::2] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio_gradient", ["mean", "token"])
def test_log_ratios_of_both_infinities_in_a_group_show(backend, ratio_gradient):
    tokens = [torch.zeros(40) for _ in range(2)] + [torch.ones(40)] * 2
    tokens[0][3], tokens[0][5] = math.inf, -math.inf
    rule = {"normalizer": 1.0, "ratio": "turn", "ratio_gradient": ratio_gradient}
    loss, gradient, sums = run(tokens, backend, segment=torch.arange(40) // 20, **rule)
    assert loss.isnan()
    assert sums.ratio_max.isnan()
    assert sums.ratio_sum.isnan()
    assert sums.log_ratio_max == math.inf
    assert (gradient[20:] == -1).all()


@pytest.mark.parametrize("name", ["normalizer", "kl_coef", "entropy_coef"])
def test_a_number_on_a_third_device_is_named(name):
    """Its address would be read where it means something else."""
    numbers = {"normalizer": 1.0, name: torch.empty((), device="meta")}
    terms = {"kl": "k1", "ref_logprob": ONES, "entropy": ONES}
    with pytest.raises(ValueError, match=f"got {name} on meta; expected it on the CPU or on cpu, as logprob"):
        ops.policy_loss(ONES, ONES, ONES, ONES, **terms, **numbers)


SMALL = {"row": torch.tensor([0, 0, 1]), "ratio": "sequence"}
TREE = {
    "segment": torch.tensor([0, 1, 1]),
    "parent": torch.tensor([-1, 0]),
    "leaf_segment": torch.tensor([1, 1, 0]),
    "ratio": "sequence",
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"segment": SMALL["row"]}, "got segment of segment, row and parent with ratio 'token'; expected none"),
        ({**SMALL, "ratio": "turn"}, "got row of segment, row and parent with ratio 'turn'; expected segment"),
        ({**SMALL, "parent": TREE["parent"]}, "got only one of parent and leaf_segment; expected both or neither"),
        ({**SMALL, "row": torch.zeros(4, dtype=torch.int64)}, r"got row of shape \[4\]; expected \[3\]"),
        ({**SMALL, "row": torch.zeros(3)}, r"got row of torch.float32; expected torch.int32 or torch.int64"),
        ({**SMALL, "groups": 0}, "got groups 0; expected at least 1, or None"),
        ({**SMALL, "ratio_gradient": "own"}, "got ratio_gradient 'own'; expected mean, token"),
        ({**SMALL, "leaf_weight": torch.ones(3)}, "got leaf_weight without parent; expected it for packed paths only"),
        ({**TREE, "advantage": torch.ones(3, 2)}, r"got advantage of shape \[3, 2\]; expected \[3\]"),
        ({**TREE, "leaf_weight": torch.ones(2)}, r"got leaf_weight of shape \[2\]; expected \[3\]"),
        ({**TREE, "importance": torch.ones(3)}, "got importance with parent; expected it inside leaf_weight"),
        ({"importance": torch.ones(3, 1)}, r"got importance of shape \[3, 1\]; expected \[3\]"),
        ({"kl": "k4", "ref_logprob": torch.ones(3)}, "got kl 'k4'; expected None, k1, k2, k3"),
        ({"kl": "k3"}, "got kl 'k3' without ref_logprob; expected both or neither"),
        ({"kl_coef": 0.1}, "got kl_coef 0.1 without kl; expected kl k1, k2, k3"),
        ({"entropy_coef": 0.1}, "got entropy_coef 0.1 without entropy; expected both or neither"),
        ({"entropy": torch.ones(3), "entropy_coef": torch.ones(1)}, r"got entropy_coef of shape \[1\]; expected a 0-d"),
        ({"clip": "sapo", "tau_negative": 0.0}, "got tau_positive 1.0 and tau_negative 0.0; expected numbers above 0"),
        ({"clip": "cispo", "dual_clip": 3.0}, "got dual_clip 3.0 with clip 'cispo'; expected it with 'dual'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    inputs = {name: torch.ones(3) for name in ("logprob", "old_logprob", "advantage", "weight")}
    with pytest.raises(ValueError, match=message):
        ops.policy_loss(**{**inputs, "normalizer": 1.0, **arguments})


OUT_OF_RANGE = pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({**SMALL, "row": torch.tensor([0, 3, 1])}, "got a segment or row out of range at token 1; expected 0 to 2"),
        ({**SMALL, "groups": 1}, "got a segment or row out of range at token 2; expected 0 to 0"),
        (
            {**TREE, "segment": torch.tensor([0, -1, 1])},
            "got a segment or row out of range at token 1; expected 0 to 1",
        ),
        ({**TREE, "parent": torch.tensor([-1, 1])}, "got parent 1 of segment 1; expected -1 to 0"),
        ({**TREE, "parent": torch.tensor([-1, 7]), "leaf_segment": torch.zeros(3, dtype=torch.int64)}, "got parent 7"),
        ({**TREE, "leaf_segment": torch.tensor([0, 2, 1])}, "got leaf_segment 2 at 1; expected 0 to 1"),
        ({**TREE, **{name: torch.empty(0, dtype=torch.int64) for name in ("parent", "leaf_segment")}}, "at token 0"),
    ],
)


def ones_for(arguments):
    """logprob, old_logprob, advantage and weight."""
    return [ONES, ONES, torch.ones(len(arguments.get("leaf_segment", ONES))), ONES]


@pytest.mark.parametrize("backend", [*CPU, "reference"])
def test_a_token_of_weight_zero_is_not_the_one_out_of_range(backend):
    arguments = {"ratio": "sequence", "row": torch.full((3,), 9), "backend": backend, "normalizer": 1.0}
    with pytest.raises(ValueError, match="out of range at token 1; expected 0 to 2"):
        ops.policy_loss(ONES, ONES, ONES, torch.tensor([0.0, 1.0, 1.0]), **arguments)


@pytest.mark.parametrize("backend", [*CPU, "reference"])
@OUT_OF_RANGE
def test_indices_out_of_range_are_named_on_the_cpu(backend, arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.policy_loss(*ones_for(arguments), normalizer=1.0, backend=backend, **arguments)


@pytest.mark.parametrize("backend", everywhere("cuda", "triton"))
@OUT_OF_RANGE
def test_indices_out_of_range_elsewhere_make_the_loss_nan(backend, arguments, message):
    loss, _, _ = run(ones_for(arguments), backend, normalizer=1.0, **arguments)
    assert loss.isnan(), message
