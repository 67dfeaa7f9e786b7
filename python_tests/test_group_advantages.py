"""Group and tree advantages: all backends against loops in plain Python."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arpo_ext import ops
from arpo_ext.ops.group_advantages import ESTIMATORS

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def naive(reward, tree, estimator, eps=1e-6):
    groups = {}
    for r, t in zip(reward, tree, strict=True):
        groups.setdefault(t, []).append(r)
    advantages = []
    for r, t in zip(reward, tree, strict=True):
        group = groups[t]
        n, total = len(group), math.fsum(group)
        if estimator == "none":
            advantages.append(r)
        elif n == 1 or max(group) == min(group):
            advantages.append(0.0)
        elif estimator == "grpo":
            advantages.append((r - total / n) / (statistics.stdev(group) + eps))
        elif estimator == "dr_grpo":
            advantages.append(r - total / n)
        else:
            advantages.append(r - (total - r) / (n - 1))
    return advantages


def naive_segments(advantage, parent, leaf_segment, weight=None):
    weight = weight or [1.0] * len(advantage)
    below = [[] for _ in parent]
    for a, w, s in zip(advantage, weight, leaf_segment, strict=True):
        while s >= 0:
            below[s].append((a, w))
            s = parent[s]
    mean = [math.fsum(a for a, _ in pairs) / len(pairs) if pairs else 0.0 for pairs in below]
    pair = [
        [math.fsum(w * max(a, 0.0) for a, w in pairs), math.fsum(w * min(a, 0.0) for a, w in pairs)] for pairs in below
    ]
    return mean, pair


def float32(values):
    return torch.tensor(values, dtype=torch.float32)


def close(got, expected, scale=1.0):
    torch.testing.assert_close(got.cpu(), float32(expected), rtol=2e-6, atol=2e-6 * scale, equal_nan=True)


def made_forest(leaves, trees, seed, *, shuffled=True):
    """Rewards, tree ids, parents and leaf segments of a random forest whose leaves come in random order."""
    generator = torch.Generator().manual_seed(seed)
    tree = torch.randint(trees, (leaves,), generator=generator)
    if not shuffled:
        tree = tree.sort().values
    reward = torch.randint(-1, 3, (leaves,), generator=generator) / 2
    parent, ends = [-1] * trees, []
    for t in tree.tolist():
        segment = t
        for _ in range(int(torch.randint(1, 6, (), generator=generator))):
            parent.append(segment)
            segment = len(parent) - 1
        ends.append(segment)
    return reward, tree, torch.tensor(parent), torch.tensor(ends)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
# One group larger than a block, many small ones, ids with gaps, leaves of a tree together and scattered.
@pytest.mark.parametrize(
    ("leaves", "trees", "shuffled"), [(1, 1, True), (700, 1, True), (640, 40, False), (513, 400, True)]
)
def test_every_backend_follows_the_definition(device, estimator, leaves, trees, shuffled):
    reward, tree, parent, ends = made_forest(leaves, trees, seed=leaves, shuffled=shuffled)
    weight = torch.rand(leaves)
    for backend in ("auto", device, "reference"):
        arguments = {"parent": parent, "leaf_segment": ends, "leaf_weight": weight}
        arguments = {name: tensor.to(device) for name, tensor in arguments.items()}
        got = ops.group_advantages(
            reward.to(device), tree.to(device), estimator=estimator, backend=backend, **arguments
        )
        expected = naive(reward.tolist(), tree.tolist(), estimator)
        close(got.leaf, expected)
        mean, pair = naive_segments(expected, parent.tolist(), ends.tolist(), weight.tolist())
        close(got.segment, mean)
        close(got.segment_pair, pair, scale=leaves)


@st.composite
def groups(draw):
    reward = st.one_of(st.floats(-1e3, 1e3, width=32), st.sampled_from([0.0, 1.0, -1.0]))
    rewards = draw(st.lists(reward, max_size=20))
    ids = st.integers(0, max(len(rewards) - 1, 0))
    return rewards, draw(st.lists(ids, min_size=len(rewards), max_size=len(rewards)))


@settings(deadline=None, max_examples=150)
@given(groups(), st.sampled_from(sorted(ESTIMATORS)), st.sampled_from(["cpu", "reference"]))
def test_random_groups(case, estimator, backend):
    rewards, tree = case
    got = ops.group_advantages(
        float32(rewards), torch.tensor(tree, dtype=torch.int64), estimator=estimator, backend=backend
    )
    close(got.leaf, naive(rewards, tree, estimator), scale=max([1.0, *map(abs, rewards)]))


@settings(deadline=None, max_examples=100)
@given(groups(), st.randoms(use_true_random=False))
def test_advantages_follow_their_leaves_and_sum_to_zero(case, random):
    rewards, tree = case
    reward, tree = float32(rewards), torch.tensor(tree, dtype=torch.int64)
    advantage = ops.group_advantages(reward, tree).leaf
    order = list(range(len(rewards)))
    random.shuffle(order)
    torch.testing.assert_close(ops.group_advantages(reward[order], tree[order]).leaf, advantage[order])
    for t in tree.unique():
        mine = advantage[tree == t]
        assert abs(mine.double().sum()) < 1e-5 * len(mine)
        if mine.any() and len(mine) > 1:
            spread = reward[tree == t].double().std()
            assert abs(mine.double().std() - spread / (spread + 1e-6)) < 1e-4


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_a_group_that_teaches_nothing_gets_zeros(backend, estimator):
    # 0.1 is not a binary fraction: a mean of sums would leave 1e-9 / eps.
    reward, tree = float32([0.1] * 7 + [3.0]), torch.tensor([4] * 7 + [0])
    assert ops.group_advantages(reward, tree, estimator=estimator, eps=0.0, backend=backend).leaf.tolist() == [0.0] * 8


@pytest.mark.parametrize("device", DEVICES)
def test_a_common_offset_costs_no_accuracy(device):
    reward, tree = torch.rand(64).mul(1024).round() / 1024, torch.arange(64) % 4
    plain = ops.group_advantages(reward.to(device), tree.to(device)).leaf
    moved = ops.group_advantages((reward + 4096).to(device), tree.to(device)).leaf
    torch.testing.assert_close(moved, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("bad", [[math.nan, 1.0], [1.0, math.nan], [math.inf, 1.0], [1.0, -math.inf], [math.nan]])
def test_a_bad_reward_stays_in_its_tree(device, backend, estimator, bad):
    reward = float32([*bad, 0.0, 1.0]).to(device)
    tree = torch.tensor([0] * len(bad) + [1, 1], device=device)
    parent, ends = torch.tensor([-1, -1, 0], device=device), torch.tensor([2] * len(bad) + [1, 1], device=device)
    got = ops.group_advantages(reward, tree, estimator=estimator, parent=parent, leaf_segment=ends, backend=backend)
    assert got.leaf[: len(bad)].isnan().all()
    assert got.segment.isnan().tolist() == [True, False, True]
    assert got.segment_pair.isnan().tolist() == [[True] * 2, [False] * 2, [True] * 2]
    close(got.leaf[len(bad) :], naive([0.0, 1.0], [1, 1], estimator))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_segments_without_leaves_get_zeros(backend):
    parent = torch.tensor([-1, 0, 0, 1, -1])
    got = ops.group_advantages(
        float32([0.0, 1.0]),
        torch.tensor([0, 0]),
        parent=parent,
        leaf_segment=torch.tensor([1, 2]),
        estimator="dr_grpo",
        backend=backend,
    )
    assert got.segment.tolist() == [0.0, -0.5, 0.5, 0.0, 0.0]
    assert got.segment_pair.tolist() == [[0.5, -0.5], [0.0, -0.5], [0.5, 0.0], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_deep_chain(backend):
    parent = torch.arange(-1, 2000)
    got = ops.group_advantages(
        float32([0.0, 1.0]),
        torch.tensor([0, 0]),
        parent=parent,
        leaf_segment=torch.tensor([1000, 2000]),
        estimator="none",
        backend=backend,
    )
    assert got.segment[:1001].eq(0.5).all()
    assert got.segment[1001:].eq(1.0).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing(backend):
    none = torch.empty(0, dtype=torch.int64)
    got = ops.group_advantages(torch.empty(0), none, parent=none, leaf_segment=none, backend=backend)
    assert [tuple(t.shape) for t in got] == [(0,), (0,), (0, 2)]
    got = ops.group_advantages(torch.empty(0), none, parent=torch.tensor([-1]), leaf_segment=none, backend=backend)
    assert got.segment.tolist() == [0.0]
    assert ops.group_advantages(float32([1.0]), torch.tensor([0]), backend=backend).segment is None


def test_float64_is_computed_in_float64():
    reward, tree = torch.rand(12, dtype=torch.float64), torch.arange(12) % 3
    got = ops.group_advantages(reward, tree).leaf
    expected = torch.tensor(naive(reward.tolist(), tree.tolist(), "grpo"), dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ops.BackendError, match=r"needs float32, got torch\.float64"):
        ops.group_advantages(reward, tree, backend="cpu")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("tree", "parent", "ends", "message"),
    [
        ([0, 2], [-1], [0, 0], "got tree index 2 at leaf 1; expected 0 to 1"),
        ([-1, 0], [-1], [0, 0], "got tree index -1 at leaf 0; expected 0 to 1"),
        ([0, 0], [-1, 1], [0, 0], "got parent 1 of segment 1; expected -1 to 0"),
        ([0, 0], [-2], [0, 0], "got parent -2 of segment 0; expected -1 to -1"),
        ([0, 0], [-1, 0], [0, 2], "got segment 2 of leaf 1; expected 0 to 1"),
        ([0, 0], [-1, 0], [-1, 0], "got segment -1 of leaf 0; expected 0 to 1"),
    ],
)
def test_wrong_indices_are_named(backend, tree, parent, ends, message):
    with pytest.raises(ValueError, match=message):
        ops.group_advantages(
            float32([0.0, 1.0]),
            torch.tensor(tree),
            parent=torch.tensor(parent),
            leaf_segment=torch.tensor(ends),
            backend=backend,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_on_a_gpu_wrong_indices_count_for_nothing(backend):
    tensors = [torch.tensor(t, device="cuda") for t in ([0, 0, -1, 7], [-1, 0, 2], [1, 9, -1, 2])]
    got = ops.group_advantages(
        float32([0.0, 1.0, 5.0, 5.0]).cuda(),
        tensors[0],
        parent=tensors[1],
        leaf_segment=tensors[2],
        estimator="dr_grpo",
        backend=backend,
    )
    assert got.leaf.tolist() == [-0.5, 0.5, 0.0, 0.0]
    assert got.segment.tolist() == [-0.5, -0.5, 0.0]


@pytest.mark.gpu
def test_it_is_captured_in_a_cuda_graph():
    reward, tree, parent, ends = (t.cuda() for t in made_forest(64, 4, seed=1))
    eager = ops.group_advantages(reward, tree, parent=parent, leaf_segment=ends, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.group_advantages(reward, tree, parent=parent, leaf_segment=ends, backend="cuda")
    graph.replay()
    for got, expected in zip(captured, eager, strict=True):
        assert got.equal(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimator": "gpro"}, "got estimator 'gpro'; expected grpo, dr_grpo, rloo, none"),
        ({"parent": torch.tensor([-1])}, "got no leaf_segment; expected parent and leaf_segment, or neither"),
        ({"eps": -1.0}, "got eps -1.0; expected at least 0"),
        ({"reward": torch.zeros(2, dtype=torch.int64)}, "got reward of torch.int64; expected torch.float32"),
        ({"tree": torch.zeros(3, dtype=torch.int64)}, r"got tree of shape \[3\]; expected \[2\]"),
        ({"tree": torch.zeros(2)}, "got tree of torch.float32; expected torch.int64"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.group_advantages(**{"reward": torch.zeros(2), "tree": torch.zeros(2, dtype=torch.int64), **arguments})


@pytest.mark.parametrize("estimator", ESTIMATORS.values())
def test_the_registered_ops_pass_opcheck(estimator):
    reward, tree, parent, ends = made_forest(20, 4, seed=3)
    torch.library.opcheck(torch.ops.arpo_ext.group_advantages.default, (reward, tree, estimator, 1e-6))
    for weight in (None, torch.rand(20)):
        torch.library.opcheck(torch.ops.arpo_ext.segment_advantages.default, (reward, parent, ends, weight))


def test_it_compiles_into_one_graph():
    reward, tree, parent, ends = made_forest(20, 4, seed=3)
    compiled = torch.compile(ops.group_advantages, fullgraph=True, backend="aot_eager")
    got = compiled(reward, tree, parent=parent, leaf_segment=ends)
    for one, other in zip(got, ops.group_advantages(reward, tree, parent=parent, leaf_segment=ends), strict=True):
        assert one.equal(other)


def test_the_benchmark_checks_itself(capsys):
    from benchmarks import bench_group_advantages

    assert bench_group_advantages.main(["--smoke", "--rounds", "1"]) == 0
    assert "Python loop" in capsys.readouterr().out
