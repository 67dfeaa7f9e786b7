"""Token positions to branch at and the future value: all backends against loops in plain Python."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arpo_ext import ops
from arpo_ext.ops.branch_tokens import SCOPES, checked_call

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NAN, INF = float("nan"), float("inf")

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def naive_z(values, eps):
    """z-scores of a list of numbers, summed exactly."""
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / len(values)) + eps
    return [(x - mean) / deviation if deviation > 0 else 0.0 for x in values]


def naive_scores(entropy, counted, tree, value, scope, eps):
    """{(row, t): (z of entropy, z of value)} of the counted positions."""
    groups = {}
    for row, t in zip(*np.nonzero(counted), strict=True):
        groups.setdefault({"row": row, "tree": -1 - tree[row], "none": (row, t)}[scope], []).append((row, t))
    found = {}
    for positions in groups.values():
        columns = []
        for x in (entropy, value):
            numbers = [1.0] * len(positions) if x is None else [float(x[p]) for p in positions]
            scored = x is not None and scope != "none"
            columns.append(naive_z(numbers, eps) if scored else numbers)
        found.update(zip(positions, zip(*columns, strict=True), strict=True))
    return found


def naive_choice(case, count, scope="row", min_distance=1, fallback=True, eps=1e-6):
    """Chosen (row, t, score) of each tree, from the definition."""
    entropy, mask, tree, room, value, candidate, key = (None if t is None else t.numpy() for t in case.values())
    counted = np.isfinite(entropy) & (True if value is None else np.isfinite(value))
    counted &= True if mask is None else mask
    ranked = []
    for (row, t), (z_entropy, z_value) in naive_scores(entropy, counted, tree, value, scope, eps).items():
        score = float(np.float32(z_entropy) * np.float32(z_value))
        strict = z_entropy > 0 and z_value > 0 and score > 0
        if (strict or fallback) and math.isfinite(score) and (candidate is None or candidate[row, t]):
            ranked.append((not strict, -score, row if key is None else key[row], row, t))
    chosen = [[] for _ in room]
    for _, score, _, row, t in sorted(ranked):
        mine = chosen[tree[row]]
        far = all(row != other or abs(t - at) >= min_distance for other, at, _ in mine)
        if far and len(mine) < min(room[tree[row]], count):
            mine.append((int(row), int(t), -score))
    return chosen


def made_case(rows, tokens, trees, seed, *, value=True, device="cpu"):
    """Continuous scores, so that positions are apart by more than rounding; everything optional is there."""
    rng = np.random.default_rng(seed)
    entropy = rng.gamma(0.5, 1.0, (rows, tokens)).astype(np.float32)
    entropy[rng.random((rows, tokens)) < 0.02] = NAN
    second = np.clip(rng.normal(1, 0.2, (rows, tokens)), 0.5, 1.5).astype(np.float32)
    case = {
        "entropy": entropy,
        "mask": rng.random((rows, tokens)) < 0.8,
        "tree": rng.integers(0, max(trees, 1), rows),
        "room": rng.integers(-1, 12, trees).astype(np.int32),
        "value": second if value else None,
        "candidate": rng.random((rows, tokens)) < 0.9,
        "key": rng.integers(-(2**63), 2**63, rows),
    }
    return {name: None if x is None else torch.from_numpy(x).to(device) for name, x in case.items()}


def places(chosen, count):
    """The result that the choice of each tree stands for."""
    rows = [[at[0] for at in mine] + [-1] * (count - len(mine)) for mine in chosen]
    tokens = [[at[1] for at in mine] + [-1] * (count - len(mine)) for mine in chosen]
    scores = [[at[2] for at in mine] + [0.0] * (count - len(mine)) for mine in chosen]
    return rows, tokens, scores


def assert_same(results):
    """To the bit."""
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert one.tolist() == two.tolist()


def assert_matches_definition(case, count, device="cpu", **rule):
    rows, tokens, scores = places(naive_choice(case, count, **rule), count)
    on_device = {name: None if t is None else t.to(device) for name, t in case.items()}
    results = [ops.branch_tokens(**on_device, count=count, **rule, backend=b) for b in ("auto", device, "reference")]
    assert_same(results)
    found = results[0]
    assert (found.row.dtype, found.token.dtype, found.score.dtype) == (torch.int64, torch.int64, torch.float32)
    assert found.row.tolist() == rows
    assert found.token.tolist() == tokens
    assert found.score.cpu().numpy() == pytest.approx(np.array(scores).reshape(found.score.shape), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(
    ("rows", "tokens", "trees", "count"),
    [(1, 1, 1, 1), (5, 31, 2, 3), (7, 65, 3, 9), (16, 300, 1, 12), (24, 64, 13, 2), (9, 1000, 4, 5)],
)
def test_sizes(device, scope, value, rows, tokens, trees, count):
    case = made_case(rows, tokens, trees, seed=rows, value=value)
    for min_distance in (1, 4, 10**6):
        assert_matches_definition(case, count, device, scope=scope, min_distance=min_distance)
    assert_matches_definition(case, count, device, scope=scope, fallback=False)
    plain = {**case, "mask": None, "candidate": None, "key": None}
    assert_matches_definition(plain, count, device, scope=scope)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "tokens", "trees"), [(0, 5, 2), (3, 0, 2), (0, 0, 0), (0, 7, 0)])
def test_nothing_to_choose_from(device, rows, tokens, trees):
    case = made_case(rows, tokens, trees, seed=0)
    assert_matches_definition(case, 3, device)
    assert_matches_definition(case, 0, device)


coarse = st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0, 4.0, -1.0, NAN, INF, -INF])


@st.composite
def tied_cases(draw):
    """Few values, so that scores tie; special numbers; trees without rows."""
    rows, tokens, trees = draw(st.integers(0, 5)), draw(st.integers(1, 12)), draw(st.integers(1, 3))

    def matrix(element, dtype):
        flat = draw(st.lists(element, min_size=rows * tokens, max_size=rows * tokens))
        return torch.tensor(flat, dtype=dtype).reshape(rows, tokens)

    int64 = st.integers(-(2**63), 2**63 - 1)
    case = {
        "entropy": matrix(coarse, torch.float32),
        "mask": matrix(st.booleans(), torch.bool) if draw(st.booleans()) else None,
        "tree": torch.tensor(draw(st.lists(st.integers(0, trees - 1), min_size=rows, max_size=rows))).long(),
        "room": torch.tensor(draw(st.lists(st.integers(-1, 9), min_size=trees, max_size=trees))).int(),
        "value": matrix(coarse, torch.float32) if draw(st.booleans()) else None,
        "candidate": matrix(st.booleans(), torch.bool) if draw(st.booleans()) else None,
        "key": torch.tensor(draw(st.lists(int64, min_size=rows, max_size=rows, unique=True))).long(),
    }
    rule = {
        "count": draw(st.integers(0, 8)),
        "scope": draw(st.sampled_from(sorted(SCOPES))),
        "min_distance": draw(st.integers(1, 5)),
        "fallback": draw(st.booleans()),
        "eps": draw(st.sampled_from([1e-6, 0.0])),
    }
    return case, rule


@settings(deadline=None, max_examples=150)
@given(tied_cases())
def test_backends_agree_to_the_bit_and_keep_every_promise(drawn):
    case, rule = drawn
    found = ops.branch_tokens(**case, **rule, backend="cpu")
    assert_same([found, ops.branch_tokens(**case, **rule, backend="reference")])
    for tree, room in enumerate(case["room"].tolist()):
        picks = [(r, t) for r, t in zip(found.row[tree].tolist(), found.token[tree].tolist(), strict=True) if r >= 0]
        assert len(picks) <= min(max(room, 0), rule["count"])
        assert found.row[tree, len(picks) :].tolist() == [-1] * (rule["count"] - len(picks))
        assert len(set(picks)) == len(picks)
        for place, (row, t) in enumerate(picks):
            assert case["tree"][row] == tree
            assert case["entropy"][row, t].isfinite()
            assert all(given is None or given[row, t] for given in (case["mask"], case["candidate"]))
            assert all(row != r or abs(t - at) >= rule["min_distance"] for r, at in picks[:place])


@settings(deadline=None, max_examples=100)
@given(tied_cases(), st.randoms(use_true_random=False))
def test_a_choice_does_not_depend_on_the_batch(drawn, random):
    """Rows in another order, and each tree alone: the same positions, for keys that tell the rows apart."""
    case, rule = drawn
    found = ops.branch_tokens(**case, **rule)
    by_row = ("entropy", "mask", "tree", "value", "candidate", "key")
    order = list(range(len(case["tree"])))
    random.shuffle(order)
    for kept in [order] + [[r for r in order if case["tree"][r] == tree] for tree in range(len(case["room"]))]:
        some = {name: case[name] if case[name] is None else case[name][kept] for name in by_row}
        again = ops.branch_tokens(**some, room=case["room"], **rule)
        trees = range(len(case["room"])) if len(kept) == len(order) else {int(case["tree"][r]) for r in kept}
        for tree in trees:
            assert [kept[r] if r >= 0 else -1 for r in again.row[tree].tolist()] == found.row[tree].tolist()
            assert again.token[tree].tolist() == found.token[tree].tolist()
            assert again.score[tree].tolist() == found.score[tree].tolist()


def rowwise(entropy, **given):
    entropy = torch.tensor(entropy, dtype=torch.float32)
    rows = len(entropy)
    made = {"mask": None, "tree": torch.zeros(rows, dtype=torch.int64), "room": torch.tensor([9], dtype=torch.int32)}
    return {"entropy": entropy, **made, **given}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_appo_worked_by_hand(backend):
    """z of (0, 0, 1, 3): -0.8165, -0.8165, 0, 1.633; of (2, 0, 1, 1): 1.414, -1.414, 0, 0."""
    value = torch.tensor([[2.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 2.0]])
    case = rowwise([[0.0, 0.0, 1.0, 3.0], [0.0, 0.0, 1.0, 3.0]], value=value)
    found = ops.branch_tokens(**case, count=4, eps=0.0, backend=backend)
    # Only the last position of row 1 has both above 0. The two negative ones of row 0 come second, though their product
    # is above 0 too; equal zeros follow in their order.
    assert found.row.tolist() == [[1, 0, 0, 0]]
    assert found.token.tolist() == [[3, 1, 2, 3]]
    assert found.score[0].tolist() == pytest.approx([1.633 * 1.4142, 0.8165 * 1.4142, 0, 0], abs=1e-3)
    strict = ops.branch_tokens(**case, count=4, eps=0.0, fallback=False, backend=backend)
    assert strict.row.tolist() == [[1, -1, -1, -1]]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_strict_positions_come_before_higher_products_of_two_negatives(backend):
    case = rowwise([[-3.0, 1.0, 2.0]], value=torch.tensor([[-3.0, 1.0, 0.5]]))
    found = ops.branch_tokens(**case, count=3, scope="none", backend=backend)
    assert found.token.tolist() == [[1, 2, 0]]  # both strict ones are 1.0: the first position first; then 9.0
    assert found.score.tolist() == [[1.0, 1.0, 9.0]]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_masked_position_counts_nowhere_and_a_mere_non_candidate_in_the_z_scores(backend):
    entropy = [[1.0, 2.0, 4.0, 100.0]]
    last = torch.tensor([[True, True, True, False]])
    masked = ops.branch_tokens(**rowwise(entropy, mask=last), count=1, eps=0.0, backend=backend)
    barred = ops.branch_tokens(**rowwise(entropy, candidate=last), count=1, eps=0.0, backend=backend)
    assert masked.token.tolist() == barred.token.tolist() == [[2]]
    assert masked.score.item() == pytest.approx((4 - 7 / 3) / math.sqrt(14 / 9))
    assert barred.score.item() < 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_scope_tree_lets_an_uncertain_row_win_every_place(backend):
    case = rowwise([[0.1, 0.2, 0.3, 0.1], [5.0, 6.0, 7.0, 5.0]])
    by_row = ops.branch_tokens(**case, count=2, scope="row", eps=0.0, backend=backend)
    by_tree = ops.branch_tokens(**case, count=2, scope="tree", eps=0.0, backend=backend)
    assert by_row.row.sort().values.tolist() == [[0, 1]]
    assert by_tree.row.tolist() == [[1, 1]]
    assert by_tree.token.tolist() == [[2, 1]]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("number", [0.0, 0.1, 3e38, 1e-45])
def test_equal_entropies_have_no_score(backend, number):
    """A constant row is 0 exactly, whatever its number: a rounded mean over an eps of 0 would be noise."""
    found = ops.branch_tokens(**rowwise([[number] * 77]), count=2, eps=0.0, backend=backend)
    assert found.score.tolist() == [[0.0, 0.0]]
    assert found.token.tolist() == [[0, 1]]
    assert ops.branch_tokens(**rowwise([[number] * 77]), count=1, fallback=False, backend=backend).row.item() == -1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_chosen_positions_keep_their_distance_within_a_row_only(backend):
    case = rowwise([[9.0, 8.0, 7.0, 1.0, 6.0], [9.0, 0.0, 0.0, 0.0, 0.0]])
    found = ops.branch_tokens(**case, count=9, scope="none", min_distance=3, backend=backend)
    assert list(zip(found.row[0].tolist(), found.token[0].tolist(), strict=True))[:4] == [
        (0, 0),
        (1, 0),
        (0, 4),
        (1, 3),
    ]
    assert found.row[0, 4:].tolist() == [-1] * 5


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_zeros_of_both_signs_tie_and_a_score_beyond_float32_is_none(backend):
    case = rowwise([[-0.0, 0.0, 3e38, 1.0]], value=torch.tensor([[1.0, 1.0, 3e38, -1.0]]))
    found = ops.branch_tokens(**case, count=4, scope="none", backend=backend)
    assert found.token.tolist() == [[0, 1, 3, -1]]
    assert found.score.tolist() == [[0.0, 0.0, -1.0, 0.0]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scope", ["row", "tree"])
def test_sums_go_in_the_order_of_the_definition(device, scope):
    """Numbers, or the sums of rows, cancel to what their order rounds away, and that is the score of the small ones."""
    generator = torch.Generator().manual_seed(8)
    numbers = torch.randn(4, 40, generator=generator) * 10.0 ** torch.randint(-20, 20, (4, 40), generator=generator)
    if scope == "row":
        entropy = torch.cat([numbers, -numbers], 1)[:, torch.randperm(80, generator=generator)]
    else:
        entropy = torch.cat([numbers, -numbers])[torch.randperm(8, generator=generator)]
    tree = torch.zeros(8, dtype=torch.int64, device=device)[: len(entropy)]
    room = torch.tensor([2000], dtype=torch.int32, device=device)
    inputs = {"entropy": entropy.to(device), "mask": None, "tree": tree, "room": room, "count": 320, "scope": scope}
    found = ops.branch_tokens(**inputs, backend=device)
    assert_same([found, ops.branch_tokens(**inputs, backend="reference")])


def test_threads_choose_alike():
    case = made_case(96, 2048, 7, seed=5)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            ratio = case["value"] - 1
            value = ops.future_value(ratio, case["mask"], gamma=0.99)
            results.append((*ops.branch_tokens(**{**case, "value": value}, count=8), value))
        assert_same(results)
    finally:
        torch.set_num_threads(before)


def naive_future(log_ratio, mask, gamma, clip):
    value = torch.empty_like(log_ratio)
    for row in range(len(log_ratio)):
        running = 0.0
        for t in reversed(range(log_ratio.shape[1])):
            own = float(log_ratio[row, t]) if mask is None or mask[row, t] else 0.0
            running = own + gamma * running
            number = math.exp(min(max(running, -20.0), 20.0))
            value[row, t] = min(max(number, 1 - clip), 1 + clip) if clip > 0 else number
    return value


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("clip", [0.2, 0.0])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (3, 31), (2, 33), (5, 257), (0, 4), (4, 0)])
def test_future_value(device, gamma, clip, rows, tokens):
    generator = torch.Generator().manual_seed(rows)
    log_ratio = torch.randn(rows, tokens, generator=generator)
    mask = torch.rand(rows, tokens, generator=generator) < 0.7
    log_ratio[~mask] = NAN  # not read
    for given_mask in (mask, None):
        ratio = log_ratio if given_mask is not None else log_ratio.nan_to_num()
        expected = naive_future(ratio, given_mask, gamma, clip)
        on_device = ratio.to(device), None if given_mask is None else given_mask.to(device)
        for backend in ("auto", device, "reference"):
            value = ops.future_value(*on_device, gamma=gamma, clip=clip, backend=backend)
            torch.testing.assert_close(value.cpu(), expected, rtol=1.3e-7, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_future_value_of_special_numbers(backend):
    ratio = torch.tensor([[1.0, NAN, 2.0], [0.0, INF, 0.0], [0.0, -INF, 0.0], [30.0, -90.0, 30.0]])
    value = ops.future_value(ratio, clip=0.0, backend=backend)
    big, small = math.exp(20), math.exp(-20)
    expected = torch.tensor([[NAN, NAN, math.exp(2)], [big, big, 1.0], [small, small, 1.0], [small, small, big]])
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0, equal_nan=True)
    clipped = ops.future_value(ratio, backend=backend)
    assert clipped[1:].tolist() == torch.tensor([[1.2, 1.2, 1], [0.8, 0.8, 1], [0.8, 0.8, 1.2]]).tolist()
    assert clipped[0].isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("device", DEVICES)
def test_an_infinite_ratio_outlasts_its_discount(device):
    """Also where the discount over a lane of the row is 0 in float64."""
    ratio = torch.zeros(1, 4000, device=device)
    ratio[0, -1] = -INF
    for backend in (device, "reference"):
        assert (ops.future_value(ratio, gamma=1e-3, backend=backend) == torch.tensor(0.8, device=device)).all()


@pytest.mark.parametrize("device", DEVICES)
def test_future_values_are_the_same_bits_on_every_device_and_in_every_release(device):
    ratio = torch.arange(-3000, 3000).remainder(997).sub(498).mul(1e-4).reshape(6, 1000).to(device)
    found = []
    for gamma in (1.0, 0.99, 0.3):
        bits = ops.future_value(ratio, gamma=gamma, clip=0.0).view(torch.int32).long().flatten().cpu()
        found.append(int((bits * torch.arange(1, 6001)).sum()))
    assert found == [20913957441430955, 19294547367761006, 19177893850032397]


def test_future_value_is_accurate_over_its_whole_range():
    """Float32's nearest, against numpy's exp in float64."""
    total = torch.linspace(-20, 20, 40_001)[:, None]
    value = ops.future_value(total, clip=0.0, backend="cpu")[:, 0].numpy()
    assert (value == np.exp(total[:, 0].numpy().astype(np.float64)).astype(np.float32)).all()


@pytest.mark.parametrize("gamma", [1.0, 0.97])
def test_a_chain_of_both_ops_selects_alike_on_all_backends(gamma):
    """The value differs by a unit in the last place between backends; what is chosen does not."""
    case = made_case(16, 700, 4, seed=3, value=False)
    ratio = torch.randn(16, 700, generator=torch.Generator().manual_seed(1)) * 0.02
    chosen = []
    for backend in ("cpu", "reference"):
        value = ops.future_value(ratio, case["mask"], gamma=gamma, backend=backend)
        chosen.append(ops.branch_tokens(**{**case, "value": value}, count=8, backend=backend)[:2])
    assert_same(chosen)


def test_inputs_may_be_strided_and_need_gradients():
    case = made_case(6, 50, 2, seed=2)
    expected = ops.branch_tokens(**case, count=4)
    wide = {name: torch.cat([t, t], 1)[:, :50] for name, t in case.items() if t.ndim == 2}
    assert not wide["entropy"].is_contiguous()
    spread = {name: torch.stack([t, t], 1)[:, 0] for name, t in case.items() if t.ndim == 1}
    for name in ("entropy", "value"):
        wide[name].requires_grad_()
    found = ops.branch_tokens(**wide, **spread, count=4, backend="cpu")
    assert_same([expected, found])
    assert not found.score.requires_grad
    ratio = (case["value"] - 1).T.contiguous().T.requires_grad_()
    value = ops.future_value(ratio, backend="cpu")
    assert not value.requires_grad
    assert value.tolist() == ops.future_value(ratio.detach().contiguous()).tolist()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"entropy": torch.zeros(4, 6, dtype=torch.float64)}, "got entropy of torch.float64; expected torch.float32"),
        ({"entropy": torch.zeros(4)}, r"got entropy of shape \[4\]; expected \[B, T\]"),
        ({"mask": torch.ones(4, 6)}, "got mask of torch.float32; expected torch.bool"),
        ({"value": torch.zeros(4, 5)}, r"got value of shape \[4, 5\]; expected \[4, 6\]"),
        ({"candidate": torch.ones(4, 6, dtype=torch.bool, device="meta")}, "got candidate on meta; expected cpu"),
        ({"tree": torch.zeros(3, dtype=torch.int64)}, r"got tree of shape \[3\]; expected \[4\]"),
        ({"room": torch.zeros(2)}, "got room of torch.float32; expected torch.int32"),
        ({"key": torch.zeros(4, dtype=torch.int32)}, "got key of torch.int32; expected torch.int64"),
        ({"tree": torch.tensor([0, 1, 2, 0])}, "got tree index 2; expected 0 to 1"),
        ({"tree": torch.tensor([0, -1, 1, 0])}, "got tree index -1; expected 0 to 1"),
        ({"scope": "batch"}, "got scope 'batch'; expected row, tree, none"),
        ({"count": -1}, "got count -1 and min_distance 1; expected 0 to"),
        ({"min_distance": 0}, "got count 2 and min_distance 0; expected 0 to"),
        ({"eps": NAN}, "got eps nan; expected a finite number of at least 0"),
    ],
)
def test_mistakes_are_named(changed, message):
    case = {**made_case(4, 6, 2, seed=0), "count": 2}
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match=f"branch_tokens: {message}"):
            ops.branch_tokens(**{**case, **changed}, backend=backend)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"log_ratio": torch.zeros(3)}, r"got log_ratio of shape \[3\]; expected \[B, T\]"),
        ({"mask": torch.zeros(2, 3)}, "got mask of torch.float32; expected torch.bool"),
        ({"gamma": 1.1}, "got gamma 1.1; expected 0 to 1"),
        ({"gamma": NAN}, "got gamma nan; expected 0 to 1"),
        ({"clip": INF}, "got clip inf; expected a finite number"),
    ],
)
def test_mistakes_in_future_value_are_named(given, message):
    with pytest.raises(ValueError, match=f"future_value: {message}"):
        ops.future_value(**{"log_ratio": torch.zeros(2, 3), **given})


def test_a_backend_that_cannot_serve_says_why():
    with pytest.raises(ops.BackendError, match="needs a CUDA tensor"):
        ops.branch_tokens(**made_case(2, 3, 1, seed=0), count=1, backend="cuda")
    with pytest.raises(ops.BackendError, match="no backend 'triton'"):
        ops.future_value(torch.zeros(1, 1), backend="triton")


@pytest.mark.parametrize("scope", SCOPES)
def test_the_registered_ops_pass_opcheck(scope):
    case = made_case(5, 40, 2, seed=1)
    case["entropy"].nan_to_num_()
    for inputs in (case, {**case, "mask": None, "value": None, "candidate": None, "key": None}):
        call = checked_call(**inputs, count=3, scope=scope, min_distance=2, fallback=True, eps=1e-6)
        torch.library.opcheck(torch.ops.arpo_ext.branch_tokens.default, tuple(call))
    for mask in (case["mask"], None):
        torch.library.opcheck(torch.ops.arpo_ext.future_value.default, (case["value"], mask, 0.9, 0.2))


def test_they_compile_into_one_graph():
    case = made_case(6, 50, 2, seed=2)

    def chain(case, ratio):
        value = ops.future_value(ratio, case["mask"])
        return ops.branch_tokens(**{**case, "value": value}, count=3, min_distance=2)

    ratio = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 0.1
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    assert_same([compiled(case, ratio), chain(case, ratio)])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_on_a_gpu_a_row_of_no_tree_is_left_out(backend):
    case = made_case(4, 30, 2, seed=0, device="cuda")
    outside = torch.tensor([-1, 0, 2, 1], device="cuda")
    found = ops.branch_tokens(**{**case, "tree": outside, "room": torch.full_like(case["room"], 30)}, count=40)
    assert set(found.row.flatten().tolist()) == {-1, 1, 3}


@pytest.mark.gpu
def test_they_are_captured_in_a_cuda_graph():
    case = made_case(24, 500, 4, seed=4, device="cuda")
    ratio = case["value"] - 1

    def chain():
        value = ops.future_value(ratio, case["mask"], backend="cuda")
        return ops.branch_tokens(**{**case, "value": value}, count=6, backend="cuda")

    eager = chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    graph.replay()
    assert_same([captured, eager])


@pytest.mark.gpu
def test_cpu_and_gpu_agree_to_the_bit():
    for scope in SCOPES:
        case = made_case(50, 3000, 5, seed=6)
        value = ops.future_value(case["value"] - 1, case["mask"], gamma=0.999)
        on_gpu = {name: t.cuda() for name, t in case.items()}
        value_on_gpu = ops.future_value(on_gpu["value"] - 1, on_gpu["mask"], gamma=0.999)
        assert value_on_gpu.cpu().tolist() == value.tolist()
        found = ops.branch_tokens(**{**case, "value": value}, count=16, scope=scope, min_distance=3)
        again = ops.branch_tokens(**{**on_gpu, "value": value_on_gpu}, count=16, scope=scope, min_distance=3)
        assert_same([found, again])
