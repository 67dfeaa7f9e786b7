"""AEPO's two rules over whole rollouts: cases worked by hand from its formulas."""

import math

import pytest
from recorded import ANSWER, CALL, RESULT, VOCAB, decisions

from arpo_ext.config import RolloutConfig
from arpo_ext.render import Renderer
from arpo_ext.rollout.branching import path_key

NAT = math.log(VOCAB)


@pytest.fixture(scope="module")
def renderer(tag_tokenizer):
    return Renderer(tag_tokenizer, ["search"])


def _config(**values):
    defaults = {"paths": 10, "initial_paths": 1, "probe_tokens": 4, "max_tool_calls": 9, "max_response_tokens": 400}
    return RolloutConfig(**{**defaults, "policy": "aepo", **values})


def _scripted(*windows):
    """A call after each turn but the last; windows of the turns in units of ln V, which are the normalised ones."""

    def turn(request):
        number = request.tokens.count(RESULT)
        return (CALL if number + 1 < len(windows) else ANSWER), windows[number] * NAT, ()

    return turn


@pytest.mark.parametrize(
    ("windows", "slope", "initial"),
    [
        # Mean behind the tools 0.2 + 0.6 + 0.1 over 3 = 0.3: 10 sigmoid(2 (0.5 - 0.3)) = 5.99.
        ((0.5, 0.2, 0.6, 0.1), 2.0, 6),
        # The root does not count among them: with it the mean were 0.7 and 10 sigmoid(0.6) = 6.
        ((1.0, 0.4, 0.7), 2.0, 7),
        # One call, much more uncertain behind it: 10 sigmoid(-3) = 0.47, and one path is always there.
        ((0.1, 0.7), 5.0, 1),
        # 10 sigmoid(3) = 9.53.
        ((0.7, 0.1), 5.0, 10),
    ],
)
def test_the_split_by_one_monitored_path(monkeypatch, renderer, windows, slope, initial):
    config = _config(split_slope=slope, base=0.0, weight=0.0, threshold=0.1)
    call = decisions(monkeypatch, renderer, _scripted(*windows), config)
    assert call.metrics["rollout/fresh_paths"] == 10 - initial
    # The monitored path only measures; all others ask at each of their results.
    assert {key for _, key, _ in call.taken} == {path_key((ordinal,)) for ordinal in range(1, 10)}
    assert len(call.taken) == 9 * (len(windows) - 1)


def test_the_penalty_counts_consecutive_wishes_of_a_path(monkeypatch, renderer):
    """(0.5 + dH) (1 - 0.2 l) over 0.6 or not, dH = 0.4, 0.4, 0, 0.4, 0.4: a turn without a wish ends the count l."""
    config = _config(paths=2, base=0.5, weight=1.0, threshold=0.6, penalty=0.2, split_slope=99.0)
    call = decisions(monkeypatch, renderer, _scripted(0.1, 0.5, 0.5, 0.1, 0.5, 0.5), config)
    (second,) = {key for _, key, _ in call.taken}
    scores = [call.scores[0, second, turn] for turn in range(1, 6)]
    assert scores == pytest.approx([0.9, 0.9 * 0.8, 0.5 * 0.6, 0.9, 0.9 * 0.8])


def test_room_changes_no_score(monkeypatch, renderer):
    """Path 1 forks at its first result; at the second both wish, one gets the last room, and both have l = 2 next."""
    config = _config(paths=4, base=0.5, weight=1.0, threshold=0.6, penalty=0.2, split_slope=0.0)
    call = decisions(monkeypatch, renderer, _scripted(0.1, 0.5, 0.5, 0.1), config)
    first, fork = path_key((1,)), path_key((1, 1, 0))
    assert call.taken[0, first, 1][2] == 1
    assert call.taken[0, first, 2][2] + call.taken[0, fork, 2][2] == 1
    for key in (first, fork):
        assert [call.scores[0, key, turn] for turn in (2, 3)] == pytest.approx([0.9 * 0.8, 0.5 * 0.6])
