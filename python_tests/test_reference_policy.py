"""The policy `reference`: the decisions of ARPO's published code, each of its faults shown with and without."""

import itertools
import math

import pytest
from recorded import ANSWER, CALL, RESULT, VOCAB, decisions
from test_branch_points import naive_draw

from arpo_ext.config import RolloutConfig
from arpo_ext.errors import SamplerError
from arpo_ext.render import Renderer
from arpo_ext.rollout import Completion
from arpo_ext.rollout.branching import Brancher, Window, draw_seed, path_key
from arpo_ext.types import StopReason

FAULTS = ("stale_baseline", "own_baseline", "window_before_call", "top_logprobs_sum")
FIRST = path_key((0,))


@pytest.fixture(scope="module")
def renderer(tag_tokenizer):
    return Renderer(tag_tokenizer, ["search"])


def _config(*repaired, **values):
    defaults = {"paths": 32, "initial_paths": 1, "probe_tokens": 4, "max_tool_calls": 4, "max_response_tokens": 400}
    faults = dict.fromkeys(repaired, False)
    return RolloutConfig(**{**defaults, "policy": "reference", "reference": faults, **values})


def _spread(entropy_sum):
    """Ten log-probabilities whose -p log p add up to a quarter of `entropy_sum` * ln V: four tokens make a window."""
    goal, low, high = entropy_sum * math.log(VOCAB) / 4, 1e-9, 0.099
    for _ in range(200):
        p = (low + high) / 2
        low, high = (p, high) if -10 * p * math.log(p) < goal else (low, p)
    return (math.log(p),) * 10


def _scripted(*windows):
    """A path that calls after each turn but the last; windows of its turns, alike for forks."""

    def turn(request):
        number = request.tokens.count(RESULT)
        return (CALL if number + 1 < len(windows) else ANSWER), 0.25, _spread(windows[number])

    return turn


@pytest.mark.parametrize(
    ("likely", "known", "published"),
    # Uniform over n tokens: the ten reported ones give 10 / n ln n, which falls where uncertainty rises.
    [(10, 10, 2.302585), (50, 10, 0.782405), (100, 10, 0.460517), (50, 11, 0.860645)],
)
def test_the_published_entropy_sees_ten_tokens(likely, known, published):
    event = Completion(0, (1,), (0.0,), (math.log(likely),), StopReason.EOS, ((-math.log(likely),) * known,))
    assert Brancher(_config(), VOCAB, 0).measure(event) == pytest.approx(published / math.log(VOCAB), abs=1e-6)
    exact = Brancher(_config("top_logprobs_sum"), VOCAB, 0).measure(event)
    assert exact == pytest.approx(math.log(likely) / math.log(VOCAB))


def test_the_published_entropy_is_a_sum_that_longer_turns_win():
    # p = 1/2, 1/4, 1/8: ln 2 (1/2 + 2/4 + 3/8) = 1.375 ln 2 a token.
    row = (math.log(0.5), math.log(0.25), math.log(0.125), -math.inf)
    for tokens in (1, 3, 4, 6):
        event = Completion(0, (1,) * tokens, (0.0,) * tokens, (1.2,) * tokens, StopReason.EOS, (row,) * tokens)
        expected = min(tokens, 4) * 1.375 * math.log(2) / math.log(VOCAB)
        assert Brancher(_config(), VOCAB, 0).measure(event) == pytest.approx(expected)
        assert Brancher(_config("top_logprobs_sum"), VOCAB, 0).measure(event) == pytest.approx(1.2 / math.log(VOCAB))


def test_a_sampler_that_reports_no_logprobs_is_an_error():
    event = Completion(0, (1,), (0.0,), (1.0,), StopReason.EOS)
    with pytest.raises(SamplerError, match="reported no logprobs beside the sampled ones; expected 10"):
        Brancher(_config(), VOCAB, 0).measure(event)


def test_the_coin_on_recorded_windows_and_draws():
    """x = clip(u - 0.2 dH, 0, 1) against 0.5, worked by hand."""
    recorded = [  # key, draw, window, baseline, x, whether it forks
        (1, 0.1111, 1.0, 1.0, 0.1111, True),
        (2, 0.7180, 1.0, 1.0, 0.7180, False),
        (3, 0.7268, 1.7, 0.5, 0.4868, True),
        (9, 0.5997, 1.4, 1.0, 0.5197, False),
        (9, 0.5997, 1.6, 1.0, 0.4797, True),
        (8, 0.4121, 0.3, 0.8, 0.5121, False),
        (5, 0.2217, 2.5, 0.5, 0.0, True),
        (10, 0.9558, 0.5, 1.5, 1.0, False),
    ]
    windows = [Window(0, key, 1, now, root) for key, _, now, root, _, _ in recorded]
    assert [naive_draw(3, 0, key, 1) for key, *_ in recorded] == pytest.approx([r[1] for r in recorded], abs=5e-5)
    branches = Brancher(_config(), VOCAB, 3).decide(windows, [99])
    assert [b.score for b in branches] == pytest.approx([0.5 - r[4] for r in recorded], abs=1e-4)
    assert [b.children for b in branches] == [int(r[5]) for r in recorded]


def test_every_sibling_has_a_coin_of_its_own():
    brancher = Brancher(_config(branch_width=3), VOCAB, 3)
    windows = [Window(0, key, 1, 1.0, 1.0) for key in range(200)]
    branches = brancher.decide(windows, [999])
    for window, branch in zip(windows, branches, strict=True):
        draws = [naive_draw(3, 0, key, 1) for key in (window.key, path_key((window.key, 1)), path_key((window.key, 2)))]
        assert branch.children == sum(draw <= 0.5 for draw in draws)
        assert branch.score == pytest.approx(0.5 - min(draws))
    # Three coins, not one coin for three siblings.
    assert {branch.children for branch in branches} == {0, 1, 2, 3}
    assert sum(b.children for b in brancher.decide(windows, [7])) == 7


def test_the_window_is_that_before_the_call(monkeypatch, renderer):
    config = {"paths": 1, "base": -1.0}
    turn = _scripted(0.2, 0.6, 0.9)
    published = decisions(monkeypatch, renderer, turn, _config(**config)).taken
    repaired = decisions(monkeypatch, renderer, turn, _config("window_before_call", **config)).taken
    # At the first call the published code compares a window with itself.
    assert published == {(0, FIRST, 1): _approx(0.2, 0.2, 0), (0, FIRST, 2): _approx(0.6, 0.2, 0)}
    assert repaired == {(0, FIRST, 1): _approx(0.6, 0.2, 0), (0, FIRST, 2): _approx(0.9, 0.2, 0)}


def test_a_fork_is_compared_with_its_own_first_window(monkeypatch, renderer):
    turn, fork = _scripted(0.2, 0.6, 0.9), path_key((0, 1, 0))
    call = decisions(monkeypatch, renderer, turn, _config(base=1.0))
    published, (tree,) = call.taken, call.trees
    assert published[0, FIRST, 1] == _approx(0.2, 0.2, 1)
    assert published[0, fork, 2] == _approx(0.6, 0.6, 1)
    repaired = decisions(monkeypatch, renderer, turn, _config("own_baseline", base=1.0)).taken
    assert repaired[0, fork, 2] == _approx(0.6, 0.2, 1)
    # Two forks at the first result and at each second one, one sibling each.
    assert tree.counts["forks"] == 3
    for segment in tree.segments:
        assert segment.branch is None or tree.segments[segment.parent].tool is not None


def test_baselines_are_those_of_an_earlier_batch(monkeypatch, renderer):
    early, late = _scripted(0.2, 0.6, 0.9), _scripted(0.5, 0.7, 0.8)
    config, memory = {"paths": 1, "base": -1.0}, {}
    decisions(monkeypatch, renderer, early, _config(**config), baselines=memory)
    assert memory == {(0, 0): pytest.approx(0.2)}
    published = decisions(monkeypatch, renderer, late, _config(**config), baselines=memory).taken
    assert published == {(0, FIRST, 1): _approx(0.5, 0.2, 0), (0, FIRST, 2): _approx(0.7, 0.2, 0)}
    first_batch = decisions(monkeypatch, renderer, late, _config(**config)).taken
    repaired = decisions(monkeypatch, renderer, late, _config("stale_baseline", **config), baselines=memory).taken
    assert first_batch == repaired == {(0, FIRST, 1): _approx(0.5, 0.5, 0), (0, FIRST, 2): _approx(0.7, 0.5, 0)}


def test_windows_are_sums_over_ten_tokens_or_exact(monkeypatch, renderer):
    config, turn = {"paths": 1, "base": -1.0}, _scripted(0.2, 0.6)
    published = decisions(monkeypatch, renderer, turn, _config("window_before_call", **config)).taken
    assert published == {(0, FIRST, 1): _approx(0.6, 0.2, 0)}
    exact = decisions(monkeypatch, renderer, turn, _config("window_before_call", "top_logprobs_sum", **config)).taken
    assert exact == {(0, FIRST, 1): _approx(0.25 / math.log(VOCAB), 0.25 / math.log(VOCAB), 0)}


def _approx(window, baseline, children):
    return (pytest.approx(window, abs=1e-6), pytest.approx(baseline, abs=1e-6), children)


@pytest.mark.parametrize("repaired", [r for n in range(5) for r in itertools.combinations(FAULTS, n)])
def test_every_mixture_of_faults_decides_as_a_walk_through_the_paths(monkeypatch, renderer, repaired):
    """Three calls that share one memory, against the decisions of `_walk`, which knows no events."""
    config = _config(*repaired, paths=64, initial_paths=2, base=0.4, weight=1.5)
    memory, expected_memory = {}, {}
    for batch, seed in enumerate((11, 12, 13)):
        world = _World(seed)
        call = decisions(monkeypatch, renderer, world.turn, config, prompts=2, seed=seed, baselines=memory)
        expected = {}
        for tree, initial in itertools.product(range(2), range(2)):
            _walk(world, set(FAULTS) - set(repaired), expected_memory, tree, (initial,), 0, None, expected)
        assert all(tree.counts["forks"] < 50 for tree in call.trees)
        fresh = {path_key((ordinal,)) for ordinal in range(2, 64)}
        assert all(
            place[1] in fresh and not decided[2] for place, decided in call.taken.items() if place not in expected
        )
        assert {place: call.taken[place] for place in expected} == {
            place: _approx(*e) for place, e in expected.items()
        }, batch
        assert len({decided[2] for decided in expected.values()}) == 2


class _World:
    """What a path's turn is, by the seed of its draws: its windows, and whether it calls."""

    def __init__(self, seed):
        self.seed = seed

    def turn(self, request):
        entropy_sum, exact, calls = self.look(request.seed, request.tokens.count(RESULT))
        return (CALL if calls else ANSWER), exact, _spread(entropy_sum)

    def look(self, draws, turn):
        return 0.1 + draws % 1000 / 1250, draws // 1000 % 1000 / 300, turn < 3 and draws // 10**6 % 4 > 0


def _walk(world, faults, memory, tree, lineage, turn, baseline, decided, forked=False):
    """One path from its first turn to its end, then the forks it left, depth first."""
    key = path_key(lineage)
    while True:
        entropy_sum, exact, calls = world.look(draw_seed(world.seed, tree, key, turn), turn)
        window = entropy_sum if "top_logprobs_sum" in faults else exact / math.log(VOCAB)
        asks = turn > 0 and not forked and "window_before_call" not in faults
        if baseline is None:
            baseline = memory.setdefault((tree, *lineage), window) if "stale_baseline" in faults else window
            asks = False
        if calls and "window_before_call" in faults:
            asks = True
        if asks:
            at = turn + ("window_before_call" in faults)
            x = min(max(naive_draw(world.seed, tree, key, at) - 1.5 * (window - baseline), 0), 1)
            decided[tree, key, at] = (window, baseline, int(x <= 0.4))
            if x <= 0.4:
                inherited = None if "own_baseline" in faults else baseline
                _walk(world, faults, memory, tree, (*lineage, at, 0), at, inherited, decided, forked=True)
        if not calls:
            return
        turn, forked = turn + 1, False


def test_a_running_mean_is_refused():
    with pytest.raises(
        ValueError, match="policy reference has a baseline of its own, got 'post_tool'; expected 'root'"
    ):
        _config(baseline="post_tool")
