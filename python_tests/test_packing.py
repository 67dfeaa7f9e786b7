"""Packs of rows against their definition: who is whose ancestor, and who may see whom."""

import random

import pytest
import torch

from arpo_ext.training import attention
from arpo_ext.training.attention import attention_forward, tree_attention
from arpo_ext.training.packing import pack, split


def random_rows(seed, *, most=12, length=60):
    """Rows that often begin as another does, over three tokens, so that some share more by chance."""
    generator = random.Random(seed)
    rows = []
    for _ in range(generator.randint(1, most)):
        prefix = generator.choice(rows)[: generator.randint(0, 40)] if rows and generator.random() < 0.8 else []
        fresh = [generator.randrange(3) for _ in range(generator.randint(0 if prefix else 1, length))]
        rows.append(prefix + fresh)
    return [torch.tensor(row) for row in rows]


def ancestors(packed):
    """bool [T, T] from the parents alone: who stands on the way to whom."""
    size = len(packed.tokens)
    seen = torch.zeros(size, size, dtype=torch.bool)
    for token, parent in enumerate(packed.parent.tolist()):
        if parent >= 0:
            seen[token] = seen[parent]
        seen[token, token] = True
    return seen


@pytest.mark.parametrize("seed", range(40))
def test_every_distinct_prefix_stands_once(seed):
    rows = random_rows(seed)
    packed = pack(rows)
    prefixes = {tuple(row[: n + 1].tolist()) for row in rows for n in range(len(row))}
    assert len(packed.tokens) == len(prefixes)
    for row, place in zip(rows, packed.rows, strict=True):
        assert torch.equal(packed.tokens[place], row)
        assert torch.equal(packed.depth[place], torch.arange(len(row)))
        assert packed.parent[place].tolist() == [-1, *place.tolist()][: len(row)]
    size = torch.arange(len(packed.tokens))
    assert torch.equal((size <= size[:, None]) & (size[:, None] < packed.ends), ancestors(packed))


def test_a_pack_worked_by_hand():
    # 5 6 7 8   and its fork 9 behind the 6, its own beginning 5 6, and a row apart.
    rows = [torch.tensor(row) for row in ([5, 6, 9], [7], [5, 6], [5, 6, 7, 8])]
    packed = pack(rows)
    assert packed.tokens.tolist() == [5, 6, 7, 8, 9, 7]
    assert packed.depth.tolist() == [0, 1, 2, 3, 2, 0]
    assert packed.parent.tolist() == [-1, 0, 1, 2, 1, -1]
    assert packed.ends.tolist() == [5, 5, 4, 4, 5, 6]
    assert [place.tolist() for place in packed.rows] == [[0, 1, 4], [5], [0, 1], [0, 1, 2, 3]]
    assert pack([]).tokens.tolist() == []


@pytest.mark.parametrize("budget", [1, 20, 70, 200, 10**6])
def test_packs_hold_every_row_once_within_the_budget(budget):
    for seed in range(20):
        rows = random_rows(seed)
        packs = split(rows, budget)
        assert sorted(i for numbers in packs for i in numbers) == list(range(len(rows)))
        for numbers in packs:
            assert len(numbers) == 1 or len(pack([rows[i] for i in numbers]).tokens) <= budget
        if budget == 10**6:
            assert len(packs) == 1


def test_a_cut_goes_between_trees_where_it_can():
    trees = [[first] * 10 + [leaf] * 10 for first in (1, 2, 3) for leaf in (4, 5, 6)]
    rows = [torch.tensor(trees[i]) for i in (3, 0, 6, 4, 1, 7, 5, 2, 8)]
    # A tree is 40 tokens; 65 would hold one and a half.
    assert [sorted(int(rows[i][0]) for i in numbers) for numbers in split(rows, 65)] == [[1] * 3, [2] * 3, [3] * 3]


@pytest.mark.parametrize("call_pairs", [130, 400, 2048, 10**9])
def test_blocks_cover_the_pairs_that_may_attend_once(call_pairs, monkeypatch):
    monkeypatch.setattr(attention, "CALL_PAIRS", call_pairs)
    kinds = set()
    for seed in range(40):
        packed = pack(random_rows(seed, length=150))
        tree = tree_attention(packed)
        size = len(packed.tokens)
        seen = torch.zeros(size, size, dtype=torch.int64)
        in_square = torch.zeros(size, dtype=torch.int64)
        for first, last, key_first, key_last, kind in tree.blocks:
            kinds.add(kind)
            pairs = seen[first:last, key_first:key_last]
            if kind == "full":
                assert in_square[first:last].all(), "a rectangle is added to what a square has begun"
                pairs += 1
            else:
                assert (first, last) == (key_first, key_last)
                in_square[first:last] += 1
                pairs += tree.mask(first, last) if kind == "masked" else torch.ones_like(pairs).tril()
        assert torch.equal(seen, ancestors(packed).long())
        assert torch.equal(in_square, torch.ones_like(in_square))
        assert torch.equal(tree.dense_mask()[0, 0], ancestors(packed))
    assert kinds == ({"masked", "causal"} if call_pairs == 10**9 else {"full", "masked", "causal"})


def test_a_large_pack_makes_no_large_mask():
    rows = [torch.tensor([0] * 300 + [leaf] * 300) for leaf in range(1, 17)]
    tree = tree_attention(pack(rows))
    assert max((b.last - b.first for b in tree.blocks if b.kind != "full"), default=0) <= 128
    assert len(tree.blocks) < 200


class Layer(torch.nn.Module):
    """What the attention functions of transformers ask of their module."""

    is_causal = True
    num_key_value_groups = 2


def operands(packed, dtype, *, heads=4, requires_grad=True):
    torch.manual_seed(0)
    size = len(packed.tokens)
    shapes = ((heads, 16), (heads // 2, 16), (heads // 2, 16))
    made = [torch.randn(1, size, h, d, dtype=dtype).transpose(1, 2) for h, d in shapes]
    return [operand.requires_grad_(requires_grad) for operand in made]


def dense_attention(query, key, value, mask, scale):
    """softmax(scores) @ value from the definition, in float64."""
    key, value = (operand.repeat_interleave(2, dim=1) for operand in (key, value))
    scores = (query.double() @ key.double().transpose(2, 3) * scale).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value.double()).transpose(1, 2)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 5e-2)], ids=str
)
@pytest.mark.parametrize("seed", range(6))
def test_attention_in_blocks_equals_its_definition(seed, dtype, bound, monkeypatch):
    monkeypatch.setattr(attention, "CALL_PAIRS", (130, 400, 2048)[seed % 3])
    packed = pack(random_rows(seed, length=150))
    tree, values = tree_attention(packed), operands(packed, dtype)
    got, weights = attention_forward(Layer(), *values, None, scaling=0.3, tree=tree)
    expected = dense_attention(*values, ancestors(packed), 0.3)
    assert weights is None
    assert got.dtype == dtype
    assert (got - expected).abs().max() <= bound
    upstream = torch.randn_like(got)
    for mine, true in zip(
        torch.autograd.grad(got, values, upstream),
        torch.autograd.grad(expected, values, upstream.double()),
        strict=True,
    ):
        assert (mine - true).abs().max() <= bound * max(1.0, float(true.abs().max()))


def test_one_dense_mask_serves_other_head_sizes_and_dropout():
    packed = pack(random_rows(3))
    tree = tree_attention(packed)
    query, key, value = operands(packed, torch.float64)
    narrow = value[..., :8]
    got, _ = attention_forward(Layer(), query, key, narrow, None, scaling=0.3, tree=tree)
    assert (got - dense_attention(query, key, narrow, ancestors(packed), 0.3)).abs().max() < 1e-12
    dropped, _ = attention_forward(Layer(), query, key, value, None, dropout=0.5, scaling=0.3, tree=tree)
    assert (dropped == 0).sum() < dropped.numel() / 2


def test_without_a_pack_the_attention_is_that_of_torch():
    query, key, value = operands(pack([torch.arange(20)]), torch.float64)
    got, _ = attention_forward(Layer(), query, key, value, None, scaling=0.3)
    assert (got - dense_attention(query, key, value, torch.ones(20, 20).tril().bool(), 0.3)).abs().max() < 1e-12


def test_autocast_lowers_the_operands():
    packed = pack(random_rows(1))
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = attention_forward(Layer(), *operands(packed, torch.float32), None, tree=tree_attention(packed))
    assert got.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_block_mask_of_flex_attention_is_the_same_mask():
    """Forward only: on the CPU FlexAttention has no gradient."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    packed = pack(random_rows(5, length=200))
    tree = tree_attention(packed)
    query, key, value = operands(packed, torch.float32, requires_grad=False)
    with torch.no_grad():
        got = flex.flex_attention(query, key, value, block_mask=tree.block_mask(), scale=0.3, enable_gqa=True)
    expected = dense_attention(query, key, value, ancestors(packed), 0.3)
    assert (got.transpose(1, 2) - expected).abs().max() < 2e-6
