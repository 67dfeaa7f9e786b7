"""Every ratio level, clip and extra term of the policy loss, against the definition and against peers' losses."""

import pytest
import torch
from backends import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_loss_cases import (
    CLIPS,
    FAST,
    RATIOS,
    TERMS,
    assert_as_close_as_plain_torch,
    checked,
    far_from_bounds,
    group_ratios,
    in_double,
    made_groups,
    made_terms,
    made_tokens,
    naive,
    run,
)
from torch._dynamo.testing import CompileCounter

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
@settings(deadline=None, max_examples=examples(40))
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


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("ratio", ["turn", "sequence"])
@settings(deadline=None, max_examples=examples(15))
@given(st.integers(1, 200), st.lists(st.integers(0, 40), max_size=4), st.integers(0, 99))
def test_a_split_between_groups_gives_the_same_step(backend, ratio, count, cuts, seed):
    tokens = made_tokens(count, seed=seed)
    (name, index), (_, groups) = made_groups(count, ratio, seed, sizes=(3, 10)).items()
    rule = {"normalizer": 50.0, "ratio": ratio, "groups": groups, "backend": backend}
    loss, gradient, sums = run(tokens, **rule, **{name: index})
    whole = torch.repeat_interleave(torch.arange(count), torch.tensor([3, 10]).repeat(count)[:count])[:count]
    parts = [torch.isin(whole, torch.tensor(cuts, dtype=torch.int64))]
    parts.append(~parts[0])
    pieces = [run([t[part] for t in tokens], **rule, **{name: index[part]}) for part in parts if part.any()]
    torch.testing.assert_close(sum(piece[0] for piece in pieces), loss, rtol=1e-5, atol=1e-6)
    for part, piece in zip([part for part in parts if part.any()], pieces, strict=True):
        torch.testing.assert_close(piece[1], gradient[part], rtol=1e-5, atol=1e-7)
    for name, total, *shares in zip(sums._fields, sums, *(piece[2] for piece in pieces), strict=True):
        joined = max(shares) if name.endswith("_max") else sum(shares)
        torch.testing.assert_close(joined, total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", FAST)
def test_many_blocks_of_tokens_and_leaves(backend):
    tokens = made_tokens(40_000, seed=1)
    arguments = {"normalizer": 9.0, "ratio": "turn", "clip": "gppo"} | made_groups(40_000, "turn", sizes=(300, 9000))
    assert_as_close_as_plain_torch(tokens, backend, **arguments)
    tree = made_tree(3, segments=70, leaves=300, dtype=torch.float32)
    rule = {"normalizer": 5.0, "ratio": "sequence", **tree["packed"]}
    expected = run([t.double() for t in tree["tokens"]], "reference", **in_double(rule))
    for got, wanted in zip(run(tree["tokens"], backend, **rule)[:2], expected[:2], strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_equal_calls_give_equal_bits(backend, ratio):
    tokens = made_tokens(5000, pair=True)
    arguments = {"normalizer": 9.0, "ratio": ratio} | made_groups(5000, ratio, sizes=(700,), shuffle=True)
    first, second = (run(tokens, backend, **arguments) for _ in range(2))
    assert first[0].equal(second[0])
    assert first[1].equal(second[1])
    assert first[2] == second[2]


@pytest.mark.parametrize("backend", FAST)
def test_numbers_may_be_tensors(backend):
    tokens = made_tokens(300)
    terms = made_terms(tokens, {"kl": "k3", "kl_coef": 0.3, "entropy": True, "entropy_coef": 0.2})
    expected = run(tokens, backend, normalizer=7.0, **terms)
    for dtype in (torch.float32, torch.float64):
        numbers = {"kl_coef": torch.tensor(0.3, dtype=dtype), "entropy_coef": torch.tensor(0.2, dtype=dtype)}
        got = run(tokens, backend, normalizer=torch.tensor(7.0, dtype=dtype), **{**terms, **numbers})
        torch.testing.assert_close(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1])


def test_the_entropy_aware_advantage_is_the_callers_one_line():
    """AEPO, equation of the advantage: A * (1 + a * z(H)), z with the statistics of the whole step."""
    new, old, advantage, weight = (t.nan_to_num() for t in made_tokens(50, dtype=torch.float64))
    entropy = torch.rand(50, dtype=torch.float64, requires_grad=True)
    mean, std = entropy.mean().item(), entropy.std().item()
    scaled = advantage * (1 + 0.2 * (entropy.detach() - mean) / std)
    loss, _ = ops.policy_loss(new, old, scaled, weight, normalizer=1.0, clip="gppo", backend="reference")
    r = (new - old).exp()
    objective = torch.minimum(scaled * r, scaled * r.clamp(0.8, 1.2))
    torch.testing.assert_close(loss, -(weight * objective).sum())


OPCHECKED = [
    {"clip": "gppo", "kl": "k3", "kl_coef": 0.1},
    {"ratio": "turn", "ratio_gradient": "token", "clip": "cispo", "importance": True},
    {"ratio": "sequence", "clip": "sapo", "entropy": True, "entropy_coef": torch.tensor(0.2)},
]


@pytest.mark.parametrize("arguments", OPCHECKED, ids=range(3))
def test_the_registered_op_passes_opcheck(arguments):
    tokens = [t.nan_to_num() for t in made_tokens(40)]
    arguments = made_groups(40, arguments.get("ratio", "token")) | made_terms(tokens, arguments)
    arguments = {
        n: v.nan_to_num() if n in ("importance", "ref_logprob", "entropy") else v for n, v in arguments.items()
    }
    wants = "entropy" in arguments
    if wants:
        arguments["entropy"].requires_grad_()
    call = checked(tokens[0].requires_grad_(), *tokens[1:], normalizer=5.0, **arguments)
    torch.library.opcheck(torch.ops.arpo_ext.policy_loss.default, (*call, True, wants, "cpu"))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("form", "clip"), [("token", "ppo"), ("turn", "gppo"), ("sequence", "cispo"), ("paths", "sapo")]
)
def test_it_compiles_into_one_graph(backend, form, clip):
    tree = made_tree(1, dtype=torch.float32)
    tokens, packed = tree["tokens"], tree["packed"]
    arguments = {"ratio": "sequence", **packed} if form == "paths" else {"ratio": form}
    if form != "paths":
        tokens = (tokens[0], tokens[1], torch.randn(len(tokens[0])), tokens[3])
        arguments |= {"token": {}, "turn": {"segment": packed["segment"]}, "sequence": {"row": packed["segment"]}}[form]
    arguments |= {"clip": clip, "ref_logprob": tokens[1], "kl": "k3", "backend": backend}
    entropy = torch.rand(len(tokens[0]), requires_grad=True)
    logprob = tokens[0].clone().requires_grad_()

    def step(logprob, entropy, normalizer, kl_coef, **rest):
        loss, sums = ops.policy_loss(
            logprob * 1.0,
            *tokens[1:],
            entropy=entropy,
            entropy_coef=0.1,
            normalizer=normalizer,
            kl_coef=kl_coef,
            **rest,
        )
        return loss, sums.kl_k1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for normalizer, kl_coef in ((2.0, 0.1), (3.0, 0.2)):
        numbers = torch.tensor(normalizer), torch.tensor(kl_coef)
        got = compiled(logprob, entropy, *numbers, **arguments)
        expected = step(logprob, entropy, *numbers, **arguments)
        torch.testing.assert_close(got, expected)
        for one, other in zip(*(torch.autograd.grad(r[0], (logprob, entropy)) for r in (got, expected)), strict=True):
            torch.testing.assert_close(one, other)


def test_tensors_do_not_make_it_compile_again_and_every_clip_value_counts():
    counter = CompileCounter()
    logprob = torch.randn(20, requires_grad=True)

    def step(logprob, normalizer, kl_coef, clip_high):
        rest = {"ref_logprob": torch.zeros(20), "kl": "k3", "kl_coef": kl_coef, "clip_high": clip_high}
        return ops.policy_loss(logprob, *[torch.ones(20)] * 3, normalizer=normalizer, **rest)[0]

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for i in range(4):
        numbers = torch.tensor(i + 1.0), torch.tensor(0.1 * i)
        torch.testing.assert_close(compiled(logprob, *numbers, 0.2), step(logprob, *numbers, 0.2))
    assert counter.frame_count == 1
    # torch takes a number for an op as a constant of the graph.
    for clip_high in (0.0, 0.1, 0.3):
        numbers = torch.tensor(2.0), torch.tensor(0.1), clip_high
        torch.testing.assert_close(compiled(logprob, *numbers), step(logprob, *numbers))
