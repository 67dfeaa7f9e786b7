"""Every ratio level, clip and extra term of the policy loss, against the definition and against peers' losses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_loss_cases import (
    CLIPS,
    FAST,
    RATIOS,
    TERMS,
    assert_as_close_as_plain_torch,
    far_from_bounds,
    group_ratios,
    in_double,
    made_groups,
    made_terms,
    made_tokens,
    naive,
    run,
)

from arpo_ext import ops

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.mark.parametrize("ratio", RATIOS, ids="-".join)
@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize(
    ("pair", "terms", "spread"), [(False, 0, 0.5), (True, 1, 1.0), (False, 5, 12.0), (True, 6, 0.5)]
)
def test_the_reference_follows_the_definition(ratio, clip, pair, terms, spread):
    tokens = made_tokens(200, seed=terms, pair=pair, spread=spread, dtype=torch.float64)
    arguments = {"normalizer": 37.0, "ratio": ratio[0], "ratio_gradient": ratio[1], **clip}
    arguments |= made_groups(200, ratio[0], shuffle=pair) | made_terms(tokens, TERMS[terms])
    loss, gradient, sums = run(tokens, "reference", **arguments)
    expected_loss, expected_gradient, expected_sums = naive(tokens, **arguments)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-15)
    assert {name: value.item() for name, value in sums._asdict().items()} == pytest.approx(expected_sums, rel=1e-12)


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_every_term_of_the_reference_follows_the_definition(terms):
    tokens = made_tokens(200, spread=3.0, dtype=torch.float64)
    arguments = {"normalizer": 3.0, **made_terms(tokens, terms)}
    loss, gradient, sums = run(tokens, "reference", **arguments)
    expected_loss, expected_gradient, expected_sums = naive(tokens, **arguments)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-15)
    assert {name: value.item() for name, value in sums._asdict().items()} == pytest.approx(expected_sums, rel=1e-12)


@pytest.mark.parametrize("clip", [c for c in CLIPS if c.get("clip") not in ("gppo", "cispo")], ids=str)
@pytest.mark.parametrize("ratio", ["token", "turn", "sequence"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_the_reference_passes_gradcheck(clip, ratio, kl):
    tokens = [t.nan_to_num(0.0) for t in made_tokens(40, seed=2, dtype=torch.float64)]
    arguments = made_terms(tokens, {"kl": kl, "kl_coef": 0.5, "entropy": True, "entropy_coef": 0.2})
    entropy = arguments.pop("entropy").nan_to_num(0.0).requires_grad_()
    arguments |= {"normalizer": 3.0, "ratio": ratio, **clip, **made_groups(40, ratio)}
    assert torch.autograd.gradcheck(
        lambda x, h: ops.policy_loss(x, *tokens[1:], entropy=h, backend="reference", **arguments)[0],
        (tokens[0].requires_grad_(), entropy),
    )


# 16 tokens fill a vector and 1024 a block.
@pytest.mark.parametrize("backend", FAST[1:])
@pytest.mark.parametrize("ratio", RATIOS, ids="-".join)
@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize(("count", "pair", "terms"), [(2049, False, 6), (3000, True, 3)])
def test_every_form_is_as_close_to_float64_as_plain_torch(backend, ratio, clip, count, pair, terms):
    tokens = made_tokens(count, seed=count, pair=pair)
    dtype = torch.int32 if pair else torch.int64
    arguments = {"normalizer": count, "ratio": ratio[0], "ratio_gradient": ratio[1], **clip}
    arguments |= made_groups(count, ratio[0], sizes=(1, 5, 1100, 16), dtype=dtype) | made_terms(tokens, TERMS[terms])
    assert_as_close_as_plain_torch(tokens, backend, **arguments)


@pytest.mark.parametrize("backend", FAST)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_combination_of_arguments_agrees(backend, data):
    count = data.draw(st.integers(1, 400))
    ratio, ratio_gradient = data.draw(st.sampled_from(RATIOS))
    pair, seed = data.draw(st.booleans()), data.draw(st.integers(0, 99))
    tokens = made_tokens(count, seed, pair=pair, spread=data.draw(st.sampled_from([0.01, 0.5, 3.0])))
    sizes, shuffle = data.draw(st.sampled_from([(1,), (3, 50), (400,)])), data.draw(st.booleans())
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    terms = {
        "importance": data.draw(st.booleans()),
        "ref_logprob": True,
        "kl": data.draw(st.sampled_from(["k1", "k2", "k3"])),
    }
    terms = {name: value for name, value in terms.items() if value} | {"kl_coef": 0.1, "entropy": True}
    arguments = made_groups(count, ratio, seed, sizes=sizes, shuffle=shuffle, dtype=dtype) | made_terms(tokens, terms)
    arguments |= {"normalizer": 7.0, "ratio": ratio, "ratio_gradient": ratio_gradient, "entropy_coef": 0.1}
    arguments |= data.draw(st.sampled_from(CLIPS)) | {"clip_low": data.draw(st.floats(0, 1, width=32))}
    loss, gradient, sums = run(tokens, backend, **arguments)
    expected = run([t.double() for t in tokens], "reference", **in_double(arguments))
    sure = far_from_bounds(group_ratios(tokens, **arguments), **arguments)
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(gradient.double()[:, sure], expected[1][:, sure], rtol=1e-4, atol=1e-5)
    for name, value, true in zip(sums._fields, sums, expected[2], strict=True):
        if "clipped" not in name or sure.all():
            torch.testing.assert_close(value, true, rtol=1e-4, atol=1e-4, msg=name)


def made_tree(seed, *, segments=12, leaves=9, dtype=torch.float64):
    """A random segment tree with its tokens, once each, and the flat rows that share them."""
    generator = torch.Generator().manual_seed(seed)
    parent = torch.tensor([-1] + [int(torch.randint(s, (), generator=generator)) for s in range(1, segments)])
    leaf_segment = torch.randint(segments, (leaves,), generator=generator)
    lengths = torch.randint(1, 9, (segments,), generator=generator)
    segment = torch.repeat_interleave(torch.randperm(segments, generator=generator), lengths)
    count = len(segment)
    old = -torch.randn(count, generator=generator, dtype=dtype).abs()
    new = old + 0.4 * torch.randn(count, generator=generator, dtype=dtype)
    trained = torch.rand(count, generator=generator) > 0.3
    advantage = torch.randn(leaves, generator=generator, dtype=dtype)
    leaf_weight = torch.rand(leaves, generator=generator, dtype=dtype)
    rows = []
    for leaf in leaf_segment.tolist():
        path = []
        while leaf >= 0:
            path.append(leaf)
            leaf = int(parent[leaf])
        rows.append(torch.isin(segment, torch.tensor(path)).nonzero().flatten())
    weight = torch.zeros(count, dtype=dtype)
    for row, share in zip(rows, leaf_weight, strict=True):
        weight[row] += share
    return {
        "tokens": (new, old, advantage, weight * trained),
        "packed": {"segment": segment, "parent": parent, "leaf_segment": leaf_segment, "leaf_weight": leaf_weight},
        "rows": rows,
        "trained": trained,
    }


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_packed_paths_equal_the_flat_rows(backend, clip, seed):
    fast = backend != "reference"
    close = {"rtol": 1e-5, "atol": 1e-5} if fast else {"rtol": 1e-12, "atol": 1e-14}
    tree = made_tree(seed, dtype=torch.float32 if fast else torch.float64, leaves=20 if fast else 9)
    new, old, advantage, weight = tree["tokens"]
    leaf_weight = tree["packed"]["leaf_weight"]
    rule = {"normalizer": 11.0, "ratio": "sequence", **clip}
    terms = made_terms(
        (new, old, advantage, weight), {"kl": "k3", "kl_coef": 0.1, "entropy": True, "entropy_coef": 0.2}
    )
    hidden = [torch.where(weight == 0, torch.nan, t) for t in (new, old)]
    loss, gradient, sums = run([*hidden, advantage, weight], backend, **rule, **tree["packed"], **terms)

    index = torch.cat(tree["rows"])
    lengths = torch.tensor([len(row) for row in tree["rows"]])
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    flat = [new[index], old[index], advantage[row], leaf_weight[row] * tree["trained"][index]]
    flat_terms = {name: value[index] if isinstance(value, torch.Tensor) else value for name, value in terms.items()}
    flat_loss, flat_gradient, flat_sums = run(flat, "reference", **rule, row=row, **flat_terms)
    torch.testing.assert_close(loss, flat_loss, **close)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient).index_add(1, index, flat_gradient), **close)
    for name, value, expected in zip(sums._fields, sums, flat_sums, strict=True):
        if name != "tokens":
            torch.testing.assert_close(value, expected, msg=name, **close)


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


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({**SMALL, "row": torch.tensor([0, 3, 1])}, "got a segment or row out of range at token 1; expected 0 to 2"),
        ({**SMALL, "groups": 1}, "got a segment or row out of range at token 2; expected 0 to 0"),
        (
            {**TREE, "segment": torch.tensor([0, -1, 1])},
            "got a segment or row out of range at token 1; expected 0 to 1",
        ),
        ({**TREE, "parent": torch.tensor([-1, 1])}, "got parent 1 of segment 1; expected -1 to 0"),
        ({**TREE, "leaf_segment": torch.tensor([0, 2, 1])}, "got leaf_segment 2 at 1; expected 0 to 1"),
    ],
)
def test_indices_out_of_range_are_named_on_the_cpu(backend, arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.policy_loss(*[torch.ones(3)] * 4, normalizer=1.0, backend=backend, **arguments)
