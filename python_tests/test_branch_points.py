"""Branch points: all backends against a loop in plain Python, to the bit."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arpo_ext import ops
from arpo_ext.ops import branch_points_reference as reference
from arpo_ext.ops._branch import NEEDED, POLICIES, BranchCall, checked_call

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


class Path(NamedTuple):
    now: float
    root: float = 0.0
    tree: int = 0
    key: int = 0
    turn: int = 1
    streak: int = 0
    siblings: int = 0
    value: float = 1.0


RULE = {"base": 0.5, "weight": 0.2, "threshold": 0.5, "penalty": 0.05, "width": 1, "seed": 0}


def naive_score(path, policy, base, weight, threshold, penalty, seed):
    """Score and whether it wishes, by the definition; numpy rounds each float32 operation."""
    now, root, value = np.float32(path.now), np.float32(path.root), np.float32(path.value)
    draw = naive_draw(seed, path.tree, path.key, path.turn)
    if policy == "paper":
        score = base + weight * (now - root)
        return score, score > threshold
    if policy == "reference":
        x = np.clip(draw - weight * (now - root), np.float32(0), np.float32(1))
        return base - x, x <= base
    if policy == "aepo":
        kept = np.float32(1) - np.clip(penalty * np.float32(path.streak), np.float32(0), np.float32(1))
        score = (base + weight * (now - root)) * kept
        return score, score > threshold
    if policy == "at2po":
        score = now - weight * np.float32(path.siblings)
        return score, np.isfinite(score)
    if policy == "appo":
        return now * value, now > 0 and value > 0 and now * value > 0
    if policy == "random":
        return base - draw, draw < base
    return np.float32(0), False


def naive(paths, room, *, policy="paper", **changed):
    """Scores, wishes and children from the definition, one path at a time."""
    rule = {**RULE, **changed}
    width, seed = rule.pop("width"), rule.pop("seed")
    numbers = {name: np.float32(number) for name, number in rule.items()}
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        scored = [naive_score(path, policy, seed=seed, **numbers) for path in paths]
    scores = [score for score, _ in scored]
    wishes = [width if wishes else 0 for _, wishes in scored]
    children = [0] * len(paths)
    left = [max(0, r) for r in room]
    wishing = [i for i, wish in enumerate(wishes) if wish]
    for i in sorted(wishing, key=lambda i: (-scores[i], paths[i].key, i)):
        tree = paths[i].tree
        children[i] = min(wishes[i], left[tree])
        left[tree] -= children[i]
    return scores, wishes, children


def tensors(paths, room, device="cpu"):
    """Keyword arguments of the ops."""
    columns = zip(*paths, strict=True) if paths else [()] * len(Path._fields)
    column = dict(zip(Path._fields, columns, strict=True))
    dtypes = dict.fromkeys(Path._fields, torch.int32) | dict.fromkeys(("now", "root", "value"), torch.float32)
    dtypes |= dict.fromkeys(("tree", "key"), torch.int64)
    names = {"now": "entropy_now", "root": "entropy_root"}
    made = {
        names.get(name, name): torch.tensor(column[name], dtype=dtype, device=device) for name, dtype in dtypes.items()
    }
    return {**made, "room": torch.tensor(room, dtype=torch.int32, device=device)}


def assert_matches_definition(paths, room, device="cpu", **rule):
    scores, wishes, children = naive(paths, room, **rule)
    for backend in ("auto", device, "reference"):
        inputs = tensors(paths, room, device)
        score, wish = ops.branch_scores(**inputs, **rule, backend=backend)
        torch.testing.assert_close(
            score.cpu(), torch.tensor(np.array(scores, np.float32)), rtol=0, atol=0, equal_nan=True
        )
        assert wish.tolist() == wishes
        granted = ops.branch_points(**inputs, **rule, backend=backend)
        assert granted.dtype == torch.int32
        assert granted.tolist() == children


def made_paths(count, trees, seed, *, spread=3.0):
    rng = np.random.default_rng(seed)
    keys = rng.integers(-(2**63), 2**63, count)
    keys[::7] = 5  # ties, which the index breaks
    now = np.round(rng.uniform(0, spread, count), 1).astype(np.float32)  # coarse, so that scores tie too
    root = np.round(rng.uniform(0, spread, count), 1).astype(np.float32)
    now[::11] = np.nan
    value = np.round(rng.normal(0, 1, count), 1).astype(np.float32)
    small = rng.integers(0, 6, (3, count))
    columns = now, root, rng.integers(0, trees, count), keys, *small, value
    return [Path(*(c[i].item() for c in columns)) for i in range(count)]


SPECIAL = [0.0, -0.0, 1.0, 1.5, float("inf"), float("-inf"), float("nan"), 1e-45, 3e38]
entropy = st.one_of(st.floats(0, 12, width=32), st.sampled_from(SPECIAL))
int64 = st.integers(-(2**63), 2**63 - 1)


@st.composite
def cases(draw):
    trees = draw(st.integers(1, 4))
    int32 = st.integers(-(2**31), 2**31 - 1)
    path = st.builds(
        Path,
        now=entropy,
        root=entropy,
        tree=st.integers(0, trees - 1),
        key=st.one_of(int64, st.integers(0, 3)),
        turn=int32,
        streak=st.one_of(st.integers(0, 25), int32),
        siblings=st.one_of(st.integers(0, 5), int32),
        value=st.one_of(entropy, st.floats(-3, 3, width=32)),
    )
    room = draw(st.lists(st.integers(-1, 9), min_size=trees, max_size=trees))
    rule = {
        "policy": draw(st.sampled_from(sorted(POLICIES))),
        "base": draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])),
        "weight": draw(st.sampled_from([0.0, 0.2, -1.7])),
        "threshold": draw(st.sampled_from([0.5, 0.1, float("-inf")])),
        "penalty": draw(st.sampled_from([0.05, 0.3, 0.0, -1.0])),
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
    score, wish = ops.branch_scores(**tensors(paths, room), **rule)
    some_score, some_wish = ops.branch_scores(**tensors([paths[i] for i in kept], room), **rule)
    torch.testing.assert_close(some_score, score[kept], rtol=0, atol=0, equal_nan=True)
    assert some_wish.tolist() == wish[kept].tolist()


@settings(deadline=None, max_examples=100)
@given(cases(), st.randoms(use_true_random=False))
def test_shares_stay_within_room_and_follow_their_paths(case, random):
    paths, room, rule = case
    paths = [path._replace(key=index) for index, path in enumerate(paths)]
    children = ops.branch_points(**tensors(paths, room), **rule)
    wish = ops.branch_scores(**tensors(paths, room), **rule)[1]
    for tree, available in enumerate(room):
        mine = [i for i, path in enumerate(paths) if path.tree == tree]
        assert children[mine].sum() == min(max(available, 0), int(wish[mine].sum()))
    order = list(range(len(paths)))
    random.shuffle(order)
    shuffled = ops.branch_points(**tensors([paths[i] for i in order], room), **rule)
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
def test_crowded_trees_beside_empty_ones(device):
    """A block of the CUDA kernel takes several of 600 trees, with more wishes than it lists; one has room for all."""
    paths = [path._replace(tree=(0, 1, 2, 599)[path.tree]) for path in made_paths(2000, 4, seed=9)]
    assert_matches_definition(paths, [7, 2000, 300] + [1] * 597, device, policy="random", base=0.9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("room", [[], [2]])
def test_no_paths(device, room):
    assert_matches_definition([], room, device)


def test_scarce_room_goes_by_score_then_key_then_index_and_the_last_gets_part():
    # Scores 0.7, 0.9, 0.7, 0.7: the second first, then keys 3, 4, 4 with the lower index first.
    paths = [Path(2.0, 1.0, key=4), Path(3.0, 1.0, key=9), Path(2.0, 1.0, key=3), Path(2.0, 1.0, key=4)]
    assert ops.branch_points(**tensors(paths, [6]), width=2).tolist() == [2, 2, 2, 0]
    assert ops.branch_points(**tensors(paths, [5]), width=2).tolist() == [1, 2, 2, 0]
    assert ops.branch_points(**tensors(paths, [3]), width=2).tolist() == [0, 2, 1, 0]


def test_equal_alpha_and_tau_leave_the_sign_of_the_entropy_change():
    paths = [Path(1.0, 1.0), Path(1.0 + 1e-3, 1.0), Path(0.9, 1.0)]
    for weight in (0.2, 5.0):
        assert ops.branch_points(**tensors(paths, [9]), weight=weight).tolist() == [0, 1, 0]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_published_coin_worked_by_hand(backend):
    """With u known, x = clip(u - 0.2 dH, 0, 1) against 0.5: the change of entropy moves the coin by 0.2 a nat."""
    draw = float(naive_draw(7, 0, 7, 1))
    assert 0.2 < draw < 0.5  # so that the coin says branch at dH = 0
    edge = (draw - 0.5) / 0.2  # dH at which x is the base itself: about -1 nat
    changes = [0.0, 2.0, edge + 0.01, edge - 0.01, -50.0, 50.0, float("nan")]
    paths = [Path(4.0 + change, 4.0, key=7) for change in changes]
    rule = {"policy": "reference", "base": 0.5, "weight": 0.2, "seed": 7, "backend": backend}
    score, wish = ops.branch_scores(**tensors(paths, [9]), **rule)
    assert wish.tolist() == [1, 1, 1, 0, 0, 1, 0]
    expected = [0.5 - x for x in (draw, max(draw - 0.4, 0), 0.5 - 0.002, 0.5 + 0.002, 1.0, 0.0)]
    assert score[:6].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_at_no_change_the_published_coin_is_the_random_control(backend):
    inputs = tensors([path._replace(now=1.0, root=1.0) for path in made_paths(500, 3, seed=4)], [9] * 3)
    coin = ops.branch_scores(**inputs, policy="reference", base=0.3, seed=5, backend=backend)
    control = ops.branch_scores(**inputs, policy="random", base=0.3, seed=5, backend=backend)
    assert coin[0].tolist() == control[0].tolist()
    assert coin[1].tolist() == control[1].tolist()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_penalty_of_consecutive_branches_worked_by_hand(backend):
    """(0.5 + 0.2 * 1) * (1 - 0.1 l): 0.7, 0.63, 0.56, 0.49, and nothing is left from ten on."""
    paths = [Path(2.0, 1.0, key=count, streak=count) for count in (0, 1, 2, 3, 10, 11)]
    rule = {"policy": "aepo", "penalty": 0.1, "backend": backend}
    score, wish = ops.branch_scores(**tensors(paths, [9]), **rule)
    assert score.tolist() == pytest.approx([0.7, 0.63, 0.56, 0.49, 0.0, 0.0], abs=1e-6)
    assert wish.tolist() == [1, 1, 1, 0, 0, 0]
    unpenalised = ops.branch_scores(**tensors(paths, [9]), policy="aepo", penalty=0.0, backend=backend)
    paper = ops.branch_scores(**tensors(paths, [9]), policy="paper", backend=backend)
    assert unpenalised[0].tolist() == paper[0].tolist()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_scarce_room_leaves_the_best_turns_of_each_tree(backend):
    """AT2PO by hand: H - 0.5 siblings is 2.0, 1.5, 1.5, 0.0, -0.5; equal ones go by key; NaN is no turn."""
    entropies = [(3.0, 2), (2.0, 1), (1.5, 0), (1.0, 2), (0.0, 1), (float("nan"), 0), (float("inf"), 0)]
    paths = [Path(now, key=9 - i, siblings=siblings) for i, (now, siblings) in enumerate(entropies)]
    paths += [path._replace(tree=1, key=-path.key) for path in paths]
    rule = {"policy": "at2po", "weight": 0.5, "backend": backend}
    for k, first, second in (
        (1, [0], [0]),
        (2, [0, 2], [0, 1]),
        (3, [0, 1, 2], [0, 1, 2]),
        (9, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
    ):
        children = ops.branch_points(**tensors(paths, [k, k]), **rule)
        assert children.nonzero().flatten().tolist() == first + [7 + i for i in second]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_both_z_scores_must_be_positive(backend):
    paths = [Path(2.0, value=1.5), Path(-2.0, value=-1.5), Path(2.0, value=-1.0), Path(0.0, value=3.0), Path(1e-30)]
    paths += [Path(1e-30, value=1e-30), Path(1.0, value=float("nan"))]
    score, wish = ops.branch_scores(**tensors(paths, [9]), policy="appo", backend=backend)
    assert wish.tolist() == [1, 0, 0, 0, 1, 0, 0]
    assert score.tolist()[:4] == [3.0, 3.0, -2.0, 0.0]


def test_the_split_of_the_budget_before_the_rollout():
    """16 * sigmoid(0.5 gap): 8 at 0, 11.7 at 2, 4.3 at -2; never none, never more than all."""
    gap = torch.tensor([0.0, 2.0, -2.0, -100.0, 100.0, float("nan"), float("inf")])
    for entropy_tool in (torch.zeros(7), torch.zeros(7, dtype=torch.float64)):
        split = ops.aepo_initial_paths(gap, entropy_tool, paths=16)
        assert split.dtype == torch.int32
        assert split.tolist() == [8, 12, 4, 1, 16, 16, 16]
    assert ops.aepo_initial_paths(gap[:2], gap[:2], paths=1).tolist() == [1, 1]
    assert ops.aepo_initial_paths(gap[:0], gap[:0], paths=4).tolist() == []
    compiled = torch.compile(ops.aepo_initial_paths, fullgraph=True, backend="aot_eager")
    assert compiled(gap, torch.zeros(7), paths=16).tolist() == [8, 12, 4, 1, 16, 16, 16]
    with pytest.raises(ValueError, match="got paths 0; expected at least 1"):
        ops.aepo_initial_paths(gap, gap, paths=0)
    with pytest.raises(ValueError, match=r"of shape \[7\] .* and entropy_tool of shape \[6\]"):
        ops.aepo_initial_paths(gap, gap[:6], paths=4)


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
    spread = {name: torch.stack([t, t.flip(0)], dim=1)[:, 0] for name, t in tensors(paths, room).items()}
    assert not spread["tree"].is_contiguous()
    for policy in POLICIES:
        rule = {"policy": policy, "threshold": 0.2}
        assert ops.branch_points(**spread, **rule, backend="cpu").tolist() == naive(paths, room, **rule)[2]


def test_gradients_stop_here():
    inputs = tensors(made_paths(10, 2, seed=1), [2, 2])
    for name in ("entropy_now", "entropy_root", "value"):
        inputs[name].requires_grad_()
    for backend in ("cpu", "reference"):
        score, _ = ops.branch_scores(**inputs, policy="appo", backend=backend)
        assert not score.requires_grad


def changed(**values):
    return {**tensors(made_paths(4, 2, seed=0), [1, 1]), **values}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("entropy_now", torch.zeros(4, dtype=torch.float64), "of torch.float64; expected torch.float32"),
        ("entropy_root", torch.zeros(3), r"of shape \[3\]; expected \[4\]"),
        ("tree", torch.zeros(4, dtype=torch.int32), "of torch.int32; expected torch.int64"),
        ("room", torch.zeros(2, 1, dtype=torch.int32), r"of shape \[2, 1\]; expected \[T\]"),
        ("turn", torch.zeros(4, dtype=torch.int64), "of torch.int64; expected torch.int32"),
        ("streak", torch.zeros(4), "of torch.float32; expected torch.int32"),
        ("siblings", torch.zeros(5, dtype=torch.int32), r"of shape \[5\]; expected \[4\]"),
        ("value", torch.zeros(4, device="meta"), "on meta; expected cpu, where tree is"),
    ],
)
def test_wrong_tensors_are_named(name, value, message):
    for op in (ops.branch_points, ops.branch_scores):
        with pytest.raises(ValueError, match=f"got {name} {message}"):
            op(**changed(**{name: value}))


@pytest.mark.parametrize("policy", NEEDED)
def test_what_a_policy_reads_must_be_there(policy):
    with pytest.raises(ValueError, match=f"got no {NEEDED[policy]}; expected .* which policy '{policy}' reads"):
        ops.branch_points(**changed(**{NEEDED[policy]: None}), policy=policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_policy_does_not_read_may_be_absent(policy):
    unread = {name: None for other, name in NEEDED.items() if other != policy}
    expected = ops.branch_scores(**changed(), policy=policy)
    for one, other in zip(ops.branch_scores(**changed(**unread), policy=policy), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("index", [-1, 2])
def test_a_tree_index_out_of_range_is_named(backend, index):
    with pytest.raises(ValueError, match=f"got tree index {index}; expected 0 to 1"):
        ops.branch_points(**changed(tree=torch.tensor([0, 1, index, 0])), backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_on_a_gpu_a_path_of_no_tree_gets_no_children(backend):
    inputs = {name: t.cuda() for name, t in changed(tree=torch.tensor([0, 1, -1, 2])).items()}
    children = ops.branch_points(**inputs, threshold=float("-inf"), backend=backend)
    assert children.tolist()[2:] == [0, 0]


@pytest.mark.gpu
def test_it_is_captured_in_a_cuda_graph():
    inputs = tensors(made_paths(64, 4, seed=5), [3] * 4, "cuda")
    eager = ops.branch_points(**inputs, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.branch_points(**inputs, backend="cuda")
    graph.replay()
    assert captured.tolist() == eager.tolist()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"policy": "papre"}, "got policy 'papre'; expected paper, random, chain, reference, aepo, at2po, appo"),
        ({"width": -1}, "got width -1; expected 0 to"),
        ({"seed": 2**63}, "got seed 9223372036854775808; expected a signed 64-bit number"),
    ],
)
def test_wrong_rules_are_named(rule, message):
    for op in (ops.branch_points, ops.branch_scores):
        with pytest.raises(ValueError, match=message):
            op(**tensors(made_paths(4, 2, seed=0), [1, 1]), **rule)


def test_a_backend_that_cannot_serve_says_why():
    with pytest.raises(ops.BackendError, match="needs a CUDA tensor"):
        ops.branch_points(**tensors(made_paths(4, 2, seed=0), [1, 1]), backend="cuda")
    with pytest.raises(ops.BackendError, match="no backend 'triton'"):
        ops.branch_points(**tensors(made_paths(4, 2, seed=0), [1, 1]), backend="triton")


@pytest.mark.parametrize("policy", POLICIES)
def test_the_registered_ops_pass_opcheck(policy):
    inputs = tensors(made_paths(20, 3, seed=2), [2, 2, 2])
    inputs["entropy_now"].nan_to_num_()  # opcheck compares without regard for NaN
    call = checked_call("branch_points", *BranchCall(**inputs, policy=policy, **RULE))
    torch.library.opcheck(torch.ops.arpo_ext.branch_points.default, tuple(call))
    torch.library.opcheck(torch.ops.arpo_ext.branch_scores.default, tuple(call))


@pytest.mark.parametrize("policy", ["paper", "appo"])
def test_it_compiles_into_one_graph(policy):
    inputs = tensors(made_paths(20, 3, seed=2), [2, 2, 2])
    compiled = torch.compile(ops.branch_points, fullgraph=True, backend="aot_eager")
    assert compiled(**inputs, policy=policy).tolist() == ops.branch_points(**inputs, policy=policy).tolist()


def test_the_benchmark_checks_itself(capsys):
    from benchmarks import bench_branch_points

    assert bench_branch_points.main(["--smoke", "--rounds", "1"]) == 0
    assert "Python loop" in capsys.readouterr().out
