"""Group and tree advantages: all backends against loops in plain Python."""

import math

import pytest
import torch
from advantage_cases import (
    close,
    extras,
    float32,
    forests,
    groups,
    int64,
    made_forest,
    naive,
    naive_prefix,
    naive_segments,
    naive_turn,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from arpo_ext import ops
from arpo_ext.ops.group_advantages import ESTIMATORS

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TEACHING = sorted(set(ESTIMATORS) - {"none"})


def expected_segments(estimator, advantage, parent, ends, more):
    weight = more["leaf_weight"].tolist()
    if estimator == "at2po":
        return naive_turn(advantage, parent, ends, more["segment_entropy"].tolist(), weight)
    if estimator == "appo":
        return naive_prefix(advantage, parent, ends, more["subgroup"].tolist(), weight)
    return naive_segments(advantage, parent, ends, weight)


def assert_follows_the_definition(estimator, backend, device, reward, tree, parent, ends, more):
    arguments = {"parent": parent, "leaf_segment": ends, **more}
    arguments = {name: tensor.to(device) for name, tensor in arguments.items()}
    got = ops.group_advantages(reward.to(device), tree.to(device), estimator=estimator, backend=backend, **arguments)
    length, subgroup = more["length"].tolist(), more["subgroup"].tolist()
    expected = naive(reward.tolist(), tree.tolist(), estimator, length=length, subgroup=subgroup)
    close(got.leaf, expected)
    segment, pair = expected_segments(estimator, expected, parent.tolist(), ends.tolist(), more)
    close(got.segment, segment)
    close(got.segment_pair, pair if pair else torch.empty(0, 2).tolist(), scale=max(reward.numel(), 1))


def assert_every_backend_follows(device, estimator, leaves, trees, shuffled):
    reward, tree, parent, ends = made_forest(leaves, trees, seed=leaves, shuffled=shuffled)
    more = extras(leaves, parent.numel(), seed=leaves)
    for backend in ("auto", device, "reference"):
        assert_follows_the_definition(estimator, backend, device, reward, tree, parent, ends, more)


# One group larger than a block, leaves of a tree together and scattered, ids with gaps.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("leaves", "trees", "shuffled"), [(1, 1, True), (270, 1, True), (60, 7, False), (40, 30, True)]
)
def test_every_backend_follows_the_definition(device, estimator, leaves, trees, shuffled):
    assert_every_backend_follows(device, estimator, leaves, trees, shuffled)


LARGE = [(5000, 1, True), (2000, 90, False), (900, 700, True)]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("leaves", "trees", "shuffled"), LARGE)
def test_large_forests(estimator, leaves, trees, shuffled):
    assert_every_backend_follows("cpu", estimator, leaves, trees, shuffled)


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("leaves", "trees", "shuffled"), LARGE)
def test_large_forests_on_a_gpu(estimator, leaves, trees, shuffled):
    assert_every_backend_follows("cuda", estimator, leaves, trees, shuffled)


def interleaved_trees(segments, leaves):
    """Two trees whose segments alternate, each too large for the GPU's shared memory from 1,030 segments on."""
    generator = torch.Generator().manual_seed(segments)
    back = 2 * torch.randint(1, 11, (segments,), generator=generator)
    own = torch.arange(segments)
    parent = torch.where(own < 2, -1, torch.maximum(own - back, own % 2))
    ends = torch.randint(segments, (leaves,), generator=generator)
    reward = torch.randint(-1, 3, (leaves,), generator=generator) / 2
    return reward, ends % 2, parent, ends


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("estimator", ["grpo", "at2po", "appo"])
@pytest.mark.parametrize("segments", [300, 1200])
def test_trees_of_many_segments(device, estimator, segments):
    inputs = interleaved_trees(segments, leaves=30)
    more = extras(30, segments, seed=segments)
    for backend in (device, "reference"):
        assert_follows_the_definition(estimator, backend, device, *inputs, more)


def one_deep_tree(segments, leaves):
    """A chain that every eighth segment leaves for a side branch of up to seven."""
    own = torch.arange(segments)
    parent = torch.where(own % 8 == 0, own - 8, own - 1).clamp(min=-1)
    parent[own % 64 == 5] -= 3
    generator = torch.Generator().manual_seed(segments)
    ends = torch.randint(segments, (leaves,), generator=generator)
    ends[-1] = segments - 1
    return torch.randn(leaves, generator=generator), torch.zeros(leaves, dtype=torch.int64), parent, ends


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("estimator", ["grpo", "at2po", "appo"])
def test_a_path_of_4096_segments(device, estimator):
    """In 3 seconds of the emulation; 30 where every segment walks up to its root."""
    reward, tree, parent, ends = one_deep_tree(8 * 4096, leaves=300)
    weight, entropy = torch.rand(300), torch.rand(parent.numel())
    more = {"leaf_weight": weight, "segment_entropy": entropy, "subgroup": torch.arange(300) % 3}
    arguments = {"parent": parent, "leaf_segment": ends, **more}
    want = ops.group_advantages(reward, tree, estimator=estimator, backend="reference", **arguments)
    arguments = {name: tensor.to(device) for name, tensor in arguments.items()}
    got = ops.group_advantages(reward.to(device), tree.to(device), estimator=estimator, **arguments, backend=device)
    torch.testing.assert_close(got.segment.cpu(), want.segment, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.segment_pair.cpu(), want.segment_pair, rtol=1e-5, atol=1e-4)


# Several threads from 32,768 leaves on.
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shuffled", [True, False])
def test_threads_change_nothing(estimator, shuffled):
    reward, tree, *_ = made_forest(70_000, 3000, seed=8, shuffled=shuffled)
    more = {"length": torch.arange(70_000) % 7, "subgroup": torch.arange(70_000) % 3, "estimator": estimator}
    if estimator == "at2po":
        more["estimator"] = "grpo"
    one = ops.group_advantages(reward, tree, **more).leaf
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert ops.group_advantages(reward, tree, **more).leaf.equal(one)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(one, ops.group_advantages(reward, tree, backend="reference", **more).leaf)


@settings(deadline=None, max_examples=150)
@given(forests(), st.sampled_from(sorted(ESTIMATORS)), st.sampled_from(["cpu", "reference"]), st.integers(0, 99))
def test_random_forests(case, estimator, backend, seed):
    rewards, tree, parent, ends = case
    more = extras(len(rewards), len(parent), seed) if rewards else extras(1, len(parent), seed)
    if not rewards:
        more = {name: t if name == "segment_entropy" else t[:0] for name, t in more.items()}
    inputs = float32(rewards), int64(tree), int64(parent), int64(ends)
    assert_follows_the_definition(estimator, backend, "cpu", *inputs, more)


@settings(deadline=None, max_examples=250)
@given(groups(), st.sampled_from(sorted(ESTIMATORS)), st.sampled_from(["cpu", "reference"]))
def test_random_groups(case, estimator, backend):
    rewards, tree, subgroup, length = case
    more = {"length": int64(length), "subgroup": int64(subgroup)}
    if estimator == "at2po":
        estimator = "grpo"
    got = ops.group_advantages(float32(rewards), int64(tree), estimator=estimator, backend=backend, **more)
    rewards = float32(rewards).tolist()
    expected = naive(rewards, tree, estimator, length=length, subgroup=subgroup)
    close(got.leaf, expected, scale=max([1.0, *map(abs, rewards)]))


@settings(deadline=None, max_examples=60)
@given(groups(), st.sampled_from(TEACHING), st.randoms(use_true_random=False))
def test_advantages_follow_their_leaves(case, estimator, random):
    rewards, *indices = case
    reward, (tree, subgroup, length) = float32(rewards), map(int64, indices)
    order = list(range(len(rewards)))
    random.shuffle(order)
    estimator = "grpo" if estimator == "at2po" else estimator

    def run(pick):
        more = {"subgroup": subgroup[pick], "length": length[pick]}
        return ops.group_advantages(reward[pick], tree[pick], estimator=estimator, **more).leaf

    straight, shuffled = run(slice(None))[order], run(order)
    if estimator == "grpo_passk":  # equal best rewards: the first leaf of them, with advantage 0, has the others' value
        straight, shuffled = straight.abs(), shuffled.abs()
    torch.testing.assert_close(shuffled, straight, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=100)
@given(groups())
def test_advantages_sum_to_zero(case):
    rewards, tree, *_ = case
    reward, tree = float32(rewards), int64(tree)
    advantage = ops.group_advantages(reward, tree).leaf
    for t in tree.unique():
        mine = advantage[tree == t]
        assert abs(mine.double().sum()) < 1e-5 * len(mine)
        if mine.any() and len(mine) > 1:
            spread = reward[tree == t].double().std()
            assert abs(mine.double().std() - spread / (spread + 1e-6)) < 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("estimator", TEACHING)
def test_a_group_that_teaches_nothing_gets_zeros(device, estimator):
    # 0.1 is not a binary fraction: a mean of sums would leave 1e-9 / eps. The last tree moves the mean of the batch.
    reward, tree = float32([0.1] * 7 + [3.0] + [0.0, 1.0]).to(device), int64([4] * 7 + [0] + [1, 1]).to(device)
    more = {"length": int64([3] * 8 + [1, 5]).to(device), "subgroup": int64([0, 1] * 5).to(device)}
    more |= {"parent": int64([-1]).to(device), "leaf_segment": int64([0] * 10).to(device)}
    more["segment_entropy"] = torch.ones(1, device=device)
    for backend in (device, "reference"):
        got = ops.group_advantages(reward, tree, estimator=estimator, eps=0.0, backend=backend, **more)
        assert got.leaf[:8].tolist() == [0.0] * 8


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("estimator", TEACHING)
@pytest.mark.parametrize("offset", [4096.0, 1e6])
def test_a_common_offset_costs_no_accuracy(device, estimator, offset):
    reward, tree = torch.rand(64).mul(16).round() / 16, torch.arange(64) % 4
    more = {"length": torch.arange(64) % 5, "subgroup": torch.arange(64) // 4 % 3}
    inputs = [t.to(device) for t in (reward, tree)]
    more = {name: t.to(device) for name, t in more.items()} | {
        "estimator": "grpo" if estimator == "at2po" else estimator
    }
    plain = ops.group_advantages(*inputs, **more).leaf
    for backend in (device, "reference"):
        moved = ops.group_advantages(inputs[0] + offset, inputs[1], backend=backend, **more).leaf
        torch.testing.assert_close(moved, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_a_narrow_subgroup_far_from_the_mean_of_its_tree(device):
    reward, subgroup = torch.tensor([1.0, 1.0 + 2.0**-23, 1e6, -3e6]), torch.tensor([0, 0, 1, 1])
    arguments = {"estimator": "tree_grpo_sum", "subgroup": subgroup.to(device)}
    leaf = ops.group_advantages(reward.to(device), torch.zeros(4, dtype=torch.int64, device=device), **arguments).leaf
    expected = naive(reward.tolist(), [0] * 4, "tree_grpo_sum", subgroup=subgroup.tolist())
    torch.testing.assert_close(leaf.cpu(), torch.tensor(expected), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("estimator", ["grpo", "at2po", "appo"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_gradient_flows_through(estimator, backend):
    reward, weight, entropy = (torch.rand(2, requires_grad=True) for _ in range(3))
    index = torch.tensor([0, 1])
    arguments = {"parent": torch.tensor([-1, 0]), "leaf_segment": index, "subgroup": index, "leaf_weight": weight}
    arguments |= {"segment_entropy": entropy, "estimator": estimator, "backend": backend}
    assert not any(x.requires_grad for x in ops.group_advantages(reward, torch.zeros_like(index), **arguments))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("estimator", TEACHING)
@pytest.mark.parametrize("bad", [[math.nan, 1.0], [1.0, math.nan], [math.inf, 1.0], [1.0, -math.inf], [math.nan]])
def test_a_bad_reward_stays_in_its_tree(device, backend, estimator, bad):
    n = len(bad)
    tree, subgroup = [0] * n + [1, 1, 1], [0] * (n + 3)
    good = naive([0.0, 1.0, 0.5], [1] * 3, estimator, subgroup=[0] * 3)
    parent, ends = int64([-1, -1, 0]).to(device), int64([2] * n + [1] * 3).to(device)
    got = ops.group_advantages(
        float32([*bad, 0.0, 1.0, 0.5]).to(device),
        int64(tree).to(device),
        estimator=estimator,
        parent=parent,
        leaf_segment=ends,
        subgroup=int64(subgroup).to(device),
        length=torch.ones(n + 3, dtype=torch.int64, device=device),
        segment_entropy=torch.ones(3, device=device),
        backend=backend,
    )
    assert got.leaf[:n].isnan().all()
    assert got.segment.isnan().tolist() == [True, False, True]
    assert got.segment_pair.isnan().tolist() == [[True] * 2, [False] * 2, [True] * 2]
    close(got.leaf[n:], good)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_bad_reward_spoils_all_subgroups_of_its_tree_unless_they_stand_alone(device, backend):
    reward = float32([math.nan, 1.0, 0.0, 1.0, 2.0, 0.0, 1.0]).to(device)
    tree, subgroup = int64([0] * 5 + [1] * 2).to(device), int64([0, 0, 1, 1, 2, 0, 0]).to(device)
    for estimator, spoilt in (("tree_grpo", 5), ("tree_grpo_sum", 5), ("appo", 2)):
        got = ops.group_advantages(reward, tree, subgroup=subgroup, estimator=estimator, backend=backend).leaf
        assert got.isnan().tolist() == [True] * spoilt + [False] * (7 - spoilt)


def test_a_segment_without_entropy_spoils_what_is_above_it_alone():
    forest = {"parent": int64([-1, 0, 0, -1]), "leaf_segment": int64([1, 2, 3, 3])}
    entropy = float32([math.nan, math.nan, 1.0, 1.0])
    reward, tree = float32([0.0, 1.0, 0.0, 1.0]), int64([0, 0, 1, 1])
    for backend in ("cpu", "reference"):
        got = ops.group_advantages(
            reward, tree, estimator="at2po", segment_entropy=entropy, backend=backend, **forest
        ).segment
        assert got.isnan().tolist() == [True, True, False, False]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("credit", "own"), [("mean", "grpo"), ("turn", "at2po"), ("prefix", "appo")])
@pytest.mark.parametrize("estimator", ["none", "rloo", "at2po", "appo"])
def test_any_credit_goes_with_any_estimator(estimator, credit, own, backend):
    reward, tree, parent, ends = made_forest(30, 4, seed=5)
    more = extras(30, parent.numel(), seed=5)
    forest = {"parent": parent, "leaf_segment": ends, **more}
    got = ops.group_advantages(reward, tree, estimator=estimator, credit=credit, backend=backend, **forest)
    leaf = naive(reward.tolist(), tree.tolist(), estimator, subgroup=more["subgroup"].tolist())
    close(got.leaf, leaf)
    segment, pair = expected_segments(own, leaf, parent.tolist(), ends.tolist(), more)
    close(got.segment, segment)
    close(got.segment_pair, pair, scale=30)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_any_entropies_weigh_turns(backend):
    """Weights are relative to the largest: e^2000 is no number in float64."""
    forest = {"parent": int64([-1, 0, 0, 0]), "leaf_segment": int64([1, 2, 3])}
    entropy = float32([0.0, 2000.0, 0.0, 2000.0 + math.log(3)])
    got = ops.group_advantages(
        float32([0.0, 1.0, 2.0]), int64([0] * 3), estimator="at2po", segment_entropy=entropy, backend=backend, **forest
    )
    close(got.segment, [0.5, -1.0, 0.0, 1.0], scale=100)


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
        ({"estimator": "gpro"}, "got estimator 'gpro'; expected grpo, dr_grpo, rloo, none, opo"),
        ({"parent": torch.tensor([-1])}, "got no leaf_segment; expected parent and leaf_segment, or neither"),
        ({"eps": -1.0}, "got eps -1.0; expected at least 0"),
        ({"reward": torch.zeros(2, dtype=torch.int64)}, "got reward of torch.int64; expected torch.float32"),
        ({"tree": torch.zeros(3, dtype=torch.int64)}, r"got tree of shape \[3\]; expected \[2\]"),
        ({"tree": torch.zeros(2)}, "got tree of torch.float32; expected torch.int64"),
        ({"estimator": "opo"}, "got no length; estimator 'opo' expects it"),
        ({"estimator": "tree_grpo"}, "got no subgroup; estimator 'tree_grpo' expects it"),
        ({"estimator": "at2po"}, "got no segment_entropy; estimator 'at2po' expects it"),
        ({"estimator": "at2po", "segment_entropy": torch.zeros(1)}, "got no parent; estimator 'at2po' expects it"),
        ({"credit": "turns"}, "got credit 'turns'; expected mean, turn, prefix or None"),
        ({"credit": "prefix"}, "got no subgroup; credit 'prefix' expects it"),
        ({"credit": "turn"}, "got no segment_entropy; credit 'turn' expects it"),
        ({"credit": "turn", "segment_entropy": torch.zeros(1)}, "got no parent; credit 'turn' expects it"),
        ({"estimator": "opo", "length": torch.ones(2)}, "got length of torch.float32; expected torch.int64"),
        ({"estimator": "appo", "subgroup": int64([0])}, r"got subgroup of shape \[1\]; expected \[2\]"),
        ({"estimator": "appo", "subgroup": int64([0, 2])}, "got subgroup index 2 at leaf 1; expected 0 to 1"),
        ({"estimator": "opo", "length": int64([0, -2])}, "got length -2 of leaf 1; expected at least 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.group_advantages(**{"reward": torch.zeros(2), "tree": torch.zeros(2, dtype=torch.int64), **arguments})


@pytest.mark.parametrize("estimator", ESTIMATORS.values())
def test_the_registered_ops_pass_opcheck(estimator):
    reward, tree, parent, ends = made_forest(20, 4, seed=3)
    more = extras(20, parent.numel(), seed=3)
    leaf_op, segment_op = torch.ops.arpo_ext.group_advantages.default, torch.ops.arpo_ext.segment_advantages.default
    torch.library.opcheck(leaf_op, (reward, tree, more["subgroup"], more["length"], estimator, 1e-6))
    if estimator < 3:
        entropy, subgroup = more["segment_entropy"], more["subgroup"]
        for weight in (None, more["leaf_weight"]):
            torch.library.opcheck(segment_op, (reward, parent, ends, weight, entropy, subgroup, estimator))


@pytest.mark.parametrize("estimator", ["grpo", "reinforce_pp_baseline", "appo", "at2po"])
def test_it_compiles_into_one_graph(estimator):
    reward, tree, parent, ends = made_forest(20, 4, seed=3)
    arguments = {"parent": parent, "leaf_segment": ends, "estimator": estimator, **extras(20, parent.numel(), seed=3)}
    compiled = torch.compile(ops.group_advantages, fullgraph=True, backend="aot_eager")
    got = compiled(reward, tree, **arguments)
    for one, other in zip(got, ops.group_advantages(reward, tree, **arguments), strict=True):
        assert one.equal(other)


def test_the_benchmark_checks_itself(capsys):
    from benchmarks import bench_group_advantages

    assert bench_group_advantages.main(["--smoke", "--rounds", "1"]) == 0
    assert "Python loop" in capsys.readouterr().out
