"""Every ratio level, clip and extra term of the policy loss, against the definition and against peers' losses."""

import pytest
import torch
from policy_loss_cases import CLIPS, RATIOS, TERMS, made_groups, made_terms, made_tokens, naive, run

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


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_packed_paths_equal_the_flat_rows(clip, seed):
    tree = made_tree(seed)
    new, old, advantage, weight = tree["tokens"]
    leaf_weight = tree["packed"]["leaf_weight"]
    rule = {"normalizer": 11.0, "ratio": "sequence", "backend": "reference", **clip}
    terms = made_terms(
        (new, old, advantage, weight), {"kl": "k3", "kl_coef": 0.1, "entropy": True, "entropy_coef": 0.2}
    )
    hidden = [torch.where(weight == 0, torch.nan, t) for t in (new, old)]
    loss, gradient, sums = run([*hidden, advantage, weight], **rule, **tree["packed"], **terms)

    index = torch.cat(tree["rows"])
    lengths = torch.tensor([len(row) for row in tree["rows"]])
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    flat = [new[index], old[index], advantage[row], leaf_weight[row] * tree["trained"][index]]
    flat_terms = {name: value[index] if isinstance(value, torch.Tensor) else value for name, value in terms.items()}
    flat_loss, flat_gradient, flat_sums = run(flat, **rule, row=row, **flat_terms)
    torch.testing.assert_close(loss, flat_loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient).index_add(1, index, flat_gradient))
    for name, value, expected in zip(sums._fields, sums, flat_sums, strict=True):
        if name != "tokens":
            torch.testing.assert_close(value, expected, msg=name)
