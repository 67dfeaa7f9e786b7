"""Branch points: all backends against a loop in plain Python, to the bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arpo_ext import ops
from arpo_ext.ops import branch_points_reference as reference
from arpo_ext.ops.branch_points import POLICIES

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WORD = 2**64 - 1


pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def splitmix64(state):
    state = (state + 0x9E3779B97F4A7C15) & WORD
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
    return state ^ (state >> 31)


def naive_draw(seed, tree, key, turn):
    state = splitmix64(seed & WORD)
    for part in (tree, key, turn):
        state = splitmix64(state ^ (part & WORD))
    return np.float32(state >> 40) / np.float32(2**24)


def naive(paths, room, *, policy="paper", base=0.5, weight=0.2, threshold=0.5, width=1, seed=0):
    """Scores, wishes and children from the definition, one path at a time."""
    base, weight, threshold = np.float32(base), np.float32(weight), np.float32(threshold)
    scores, wishes = [], []
    for now, root, tree, key, turn in paths:
        if policy == "paper":
            score = base + weight * (np.float32(now) - np.float32(root))
            wish = width if score > threshold else 0
        elif policy == "random":
            draw = naive_draw(seed, tree, key, turn)
            score, wish = base - draw, width if draw < base else 0
        else:
            score, wish = np.float32(0), 0
        scores.append(score)
        wishes.append(wish)
    children = [0] * len(paths)
    left = [max(0, r) for r in room]
    wishing = [i for i, wish in enumerate(wishes) if wish]
    for i in sorted(wishing, key=lambda i: (-scores[i], paths[i][3], i)):
        tree = paths[i][2]
        children[i] = min(wishes[i], left[tree])
        left[tree] -= children[i]
    return scores, wishes, children


def tensors(paths, room, device="cpu"):
    now, root, tree, key, turn = zip(*paths, strict=True) if paths else ((),) * 5
    return (
        torch.tensor(now, dtype=torch.float32, device=device),
        torch.tensor(root, dtype=torch.float32, device=device),
        torch.tensor(tree, dtype=torch.int64, device=device),
        torch.tensor(room, dtype=torch.int32, device=device),
        torch.tensor(key, dtype=torch.int64, device=device),
        torch.tensor(turn, dtype=torch.int32, device=device),
    )


def assert_matches_definition(paths, room, device="cpu", **rule):
    scores, wishes, children = naive(paths, room, **rule)
    for backend in ("auto", device, "reference"):
        inputs = tensors(paths, room, device)
        score, wish = ops.branch_scores(*inputs, **rule, backend=backend)
        torch.testing.assert_close(
            score.cpu(), torch.tensor(np.array(scores, np.float32)), rtol=0, atol=0, equal_nan=True
        )
        assert wish.tolist() == wishes
        granted = ops.branch_points(*inputs, **rule, backend=backend)
        assert granted.dtype == torch.int32
        assert granted.tolist() == children


def made_paths(count, trees, seed, *, spread=3.0):
    rng = np.random.default_rng(seed)
    keys = rng.integers(-(2**63), 2**63, count)
    keys[::7] = 5  # ties, which the index breaks
    now = np.round(rng.uniform(0, spread, count), 1).astype(np.float32)  # coarse, so that scores tie too
    root = np.round(rng.uniform(0, spread, count), 1).astype(np.float32)
    now[::11] = np.nan
    columns = now, root, rng.integers(0, trees, count), keys, rng.integers(0, 6, count)
    return [tuple(c[i].item() for c in columns) for i in range(count)]


entropy = st.one_of(st.floats(0, 12, width=32), st.just(float("nan")), st.sampled_from([0.0, 1.0, 1.5]))
int64 = st.integers(-(2**63), 2**63 - 1)


@st.composite
def cases(draw):
    trees = draw(st.integers(1, 4))
    path = st.tuples(
        entropy,
        entropy,
        st.integers(0, trees - 1),
        st.one_of(int64, st.integers(0, 3)),
        st.integers(-(2**31), 2**31 - 1),
    )
    room = draw(st.lists(st.integers(-1, 9), min_size=trees, max_size=trees))
    rule = {
        "policy": draw(st.sampled_from(sorted(POLICIES))),
        "base": draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])),
        "weight": draw(st.sampled_from([0.0, 0.2, -1.7])),
        "threshold": draw(st.sampled_from([0.5, 0.1, float("-inf")])),
        "width": draw(st.integers(0, 3)),
        "seed": draw(int64),
    }
    return draw(st.lists(path, max_size=24)), room, rule


@settings(deadline=None, max_examples=150)
@given(cases())
def test_every_backend_follows_the_definition(case):
    paths, room, rule = case
    assert_matches_definition(paths, room, **rule)


@settings(deadline=None, max_examples=100)
@given(cases(), st.randoms(use_true_random=False))
def test_wishes_do_not_depend_on_the_batch(case, random):
    paths, room, rule = case
    order = list(range(len(paths)))
    random.shuffle(order)
    kept = order[: len(order) // 2 + 1]
    score, wish = ops.branch_scores(*tensors(paths, room), **rule)
    some_score, some_wish = ops.branch_scores(*tensors([paths[i] for i in kept], room), **rule)
    torch.testing.assert_close(some_score, score[kept], rtol=0, atol=0, equal_nan=True)
    assert some_wish.tolist() == wish[kept].tolist()


@settings(deadline=None, max_examples=100)
@given(cases(), st.randoms(use_true_random=False))
def test_shares_stay_within_room_and_follow_their_paths(case, random):
    paths, room, rule = case
    paths = [(now, root, tree, index, turn) for index, (now, root, tree, _, turn) in enumerate(paths)]
    children = ops.branch_points(*tensors(paths, room), **rule)
    wish = ops.branch_scores(*tensors(paths, room), **rule)[1]
    for tree, available in enumerate(room):
        mine = [i for i, path in enumerate(paths) if path[2] == tree]
        assert children[mine].sum() == min(max(available, 0), int(wish[mine].sum()))
    order = list(range(len(paths)))
    random.shuffle(order)
    shuffled = ops.branch_points(*tensors([paths[i] for i in order], room), **rule)
    assert shuffled.tolist() == children[order].tolist()


# 3000 in one tree passes the list that the CUDA kernel keeps of a tree; 1 and 33 straddle a warp.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("count", "trees"), [(1, 1), (33, 2), (400, 31), (3000, 1), (3000, 2000)])
def test_sizes(device, policy, count, trees):
    paths = made_paths(count, trees, seed=count + trees)
    room = [3 + 100 * (count // trees > 64)] * trees
    assert_matches_definition(paths, room, device, policy=policy, width=2, seed=11)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("room", [[], [2]])
def test_no_paths(device, room):
    assert_matches_definition([], room, device)


def test_scarce_room_goes_by_score_then_key_then_index_and_the_last_gets_part():
    # Scores 0.7, 0.9, 0.7, 0.7: the second first, then keys 3, 4, 4 with the lower index first.
    paths = [(2.0, 1.0, 0, 4, 1), (3.0, 1.0, 0, 9, 1), (2.0, 1.0, 0, 3, 1), (2.0, 1.0, 0, 4, 1)]
    assert ops.branch_points(*tensors(paths, [6]), width=2).tolist() == [2, 2, 2, 0]
    assert ops.branch_points(*tensors(paths, [5]), width=2).tolist() == [1, 2, 2, 0]
    assert ops.branch_points(*tensors(paths, [3]), width=2).tolist() == [0, 2, 1, 0]


def test_equal_alpha_and_tau_leave_the_sign_of_the_entropy_change():
    paths = [(1.0, 1.0, 0, 0, 1), (1.0 + 1e-3, 1.0, 0, 1, 1), (0.9, 1.0, 0, 2, 1)]
    for weight in (0.2, 5.0):
        assert ops.branch_points(*tensors(paths, [9]), weight=weight).tolist() == [0, 1, 0]


def test_the_generator_is_splitmix64():
    first = reference._mix(torch.tensor(0) + reference._GOLDEN)
    assert int(first) % 2**64 == 0xE220A8397B1DCDAF  # first output for seed 0 in the authors' C code


def test_draws_are_uniform_and_independent_of_their_neighbours():
    key = torch.arange(100_000)
    draw = reference.uniform(3, torch.zeros_like(key), key, torch.zeros_like(key, dtype=torch.int32))
    assert draw.min() >= 0
    assert draw.max() < 1
    assert abs(draw.mean() - 0.5) < 0.005
    histogram = torch.histc(draw, bins=20, min=0, max=1)
    assert ((histogram - 5000).abs() < 350).all()  # five standard deviations
    assert abs(torch.corrcoef(torch.stack([draw[:-1], draw[1:]]))[0, 1]) < 0.02


def test_decisions_of_a_seed_are_the_same_in_every_release():
    key = torch.arange(32)
    zeros = torch.zeros(32)
    inputs = zeros, zeros, torch.zeros_like(key), torch.tensor([32], dtype=torch.int32), key, torch.ones(32).int()
    wish = ops.branch_scores(*inputs, policy="random", seed=2507)[1]
    assert "".join(map(str, wish.tolist())) == "10110000110100011110010101111111"


def test_strided_inputs():
    paths, room = made_paths(40, 3, seed=1), [2, 2, 2]
    inputs = tensors(paths, room)
    spread = [torch.stack([t, t.flip(0)], dim=1)[:, 0] for t in inputs]
    assert not spread[0].is_contiguous()
    assert ops.branch_points(*spread, backend="cpu").tolist() == naive(paths, room)[2]


def changed(position, value):
    inputs = list(tensors(made_paths(4, 2, seed=0), [1, 1]))
    inputs[position] = value
    return inputs


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(4, dtype=torch.float64), "got entropy_now of torch.float64; expected torch.float32"),
        (1, torch.zeros(3), r"got entropy_root of shape \[3\]; expected \[4\]"),
        (2, torch.zeros(4, dtype=torch.int32), "got tree of torch.int32; expected torch.int64"),
        (3, torch.zeros(2, 1, dtype=torch.int32), r"got room of shape \[2, 1\]; expected \[T\]"),
        (5, torch.zeros(4, dtype=torch.int64), "got turn of torch.int64; expected torch.int32"),
    ],
)
def test_wrong_tensors_are_named(position, value, message):
    with pytest.raises(ValueError, match=message):
        ops.branch_points(*changed(position, value))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("index", [-1, 2])
def test_a_tree_index_out_of_range_is_named(backend, index):
    with pytest.raises(ValueError, match=f"got tree index {index}; expected 0 to 1"):
        ops.branch_points(*changed(2, torch.tensor([0, 1, index, 0])), backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_on_a_gpu_a_path_of_no_tree_gets_no_children(backend):
    inputs = [t.cuda() for t in changed(2, torch.tensor([0, 1, -1, 2]))]
    children = ops.branch_points(*inputs, threshold=float("-inf"), backend=backend)
    assert children.tolist()[2:] == [0, 0]


@pytest.mark.gpu
def test_it_is_captured_in_a_cuda_graph():
    inputs = tensors(made_paths(64, 4, seed=5), [3] * 4, "cuda")
    eager = ops.branch_points(*inputs, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.branch_points(*inputs, backend="cuda")
    graph.replay()
    assert captured.tolist() == eager.tolist()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"policy": "papre"}, "got policy 'papre'; expected paper, random, chain"),
        ({"width": -1}, "got width -1; expected 0 to"),
        ({"seed": 2**63}, "got seed 9223372036854775808; expected a signed 64-bit number"),
    ],
)
def test_wrong_rules_are_named(rule, message):
    for op in (ops.branch_points, ops.branch_scores):
        with pytest.raises(ValueError, match=message):
            op(*tensors(made_paths(4, 2, seed=0), [1, 1]), **rule)


def test_a_backend_that_cannot_serve_says_why():
    with pytest.raises(ops.BackendError, match="needs a CUDA tensor"):
        ops.branch_points(*tensors(made_paths(4, 2, seed=0), [1, 1]), backend="cuda")
    with pytest.raises(ops.BackendError, match="no backend 'triton'"):
        ops.branch_points(*tensors(made_paths(4, 2, seed=0), [1, 1]), backend="triton")


@pytest.mark.parametrize("policy", POLICIES.values())
def test_the_registered_ops_pass_opcheck(policy):
    now, root, tree, room, key, turn = tensors(made_paths(20, 3, seed=2), [2, 2, 2])
    now = now.nan_to_num()  # opcheck compares without regard for NaN
    rule = (policy, 0.5, 0.2, 0.5, 1, 7)
    torch.library.opcheck(torch.ops.arpo_ext.branch_points.default, (now, root, tree, room, key, turn, *rule))
    torch.library.opcheck(torch.ops.arpo_ext.branch_scores.default, (now, root, tree, key, turn, *rule))


def test_it_compiles_into_one_graph():
    inputs = tensors(made_paths(20, 3, seed=2), [2, 2, 2])
    compiled = torch.compile(ops.branch_points, fullgraph=True, backend="aot_eager")
    assert compiled(*inputs).tolist() == ops.branch_points(*inputs).tolist()


def test_the_benchmark_checks_itself(capsys):
    from benchmarks import bench_branch_points

    assert bench_branch_points.main(["--smoke", "--rounds", "1"]) == 0
    assert "Python loop" in capsys.readouterr().out
