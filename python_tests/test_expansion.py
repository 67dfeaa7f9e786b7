"""Which turns AT2PO and which tokens APPO samples again: cases worked by hand from their formulas."""

import math

import pytest

from arpo_ext.config import RolloutConfig
from arpo_ext.render import Renderer
from arpo_ext.rollout.expansion import choose_tokens, choose_turns, expand_turns
from arpo_ext.rollout.paths import OpenPath
from arpo_ext.rollout.tree import GrowingTree
from arpo_ext.types import Prompt, Segment, StopReason, ToolResult

PROMPT, RESULT = (20, 21), (9, 36, 10)


@pytest.fixture(scope="module")
def renderer(tag_tokenizer):
    return Renderer(tag_tokenizer, ["search"])


def _turn(parent, surprises, entropies=None, *, calls=False):
    tokens = tuple(range(40, 40 + len(surprises)))
    return Segment(
        parent,
        tokens,
        True,
        logprobs=tuple(-s for s in surprises),
        entropies=tuple(entropies or [0.5] * len(tokens)),
        stop_reason=StopReason.TOOL if calls else StopReason.EOS,
    )


def _two_chains():
    """0 prompt - 1 [2.0] - 2 result - 3 [0.4]
    - 4 [1.0] - 5 result - 6 [1.2]       the mean of -log p of each turn in brackets"""
    result = ToolResult("search", "7", True)
    tree = GrowingTree(
        Prompt("p", ({"role": "user", "content": "?"},), ()),
        [
            Segment(-1, PROMPT, False),
            _turn(0, [1.0, 3.0], calls=True),
            Segment(1, RESULT, False, tool=result),
            _turn(2, [0.5, 0.5, 0.2]),
            _turn(0, [0.1, 0.9, 2.0], calls=True),
            Segment(4, RESULT, False, tool=result),
            _turn(5, [1.2]),
        ],
        started=2,
    )
    for leaf in (3, 6):
        tree.end(leaf, StopReason.EOS)
    turns = {
        1: OpenPath(0, (0,), tip=0, tokens=PROMPT),
        3: OpenPath(0, (0,), tip=2, tokens=(*PROMPT, *tree.segments[1].tokens, *RESULT), turn=1),
        4: OpenPath(0, (1,), tip=0, tokens=PROMPT),
        6: OpenPath(0, (1,), tip=5, tokens=(*PROMPT, *tree.segments[4].tokens, *RESULT), turn=1),
    }
    return tree, turns


def _granted(chosen):
    return {segment for segment, branch in chosen.items() if branch.children}


def test_at2po_by_hand():
    """Turns 1 and 4 begin at the same place and pay 0.5 for each other: 1.5, 0.4, 0.5 and 1.2."""
    tree, turns = _two_chains()
    config = RolloutConfig(policy="at2po", paths=6, initial_paths=2, rounds=2, weight=0.5)
    chosen = choose_turns(tree, turns, config=config, seed=0)
    assert {segment: branch.score for segment, branch in chosen.items()} == pytest.approx(
        {1: 1.5, 3: 0.4, 4: 0.5, 6: 1.2}
    )
    # Four more paths in two rounds: the two best turns now.
    assert _granted(chosen) == {1, 6}
    assert {branch.room for branch in chosen.values()} == {2}


@pytest.mark.parametrize(
    ("paths", "rounds", "done", "room"),
    [(6, 1, 0, 4), (7, 2, 0, 3), (7, 2, 1, 5), (7, 3, 0, 2), (3, 4, 0, 1), (6, 2, 5, 4)],
)
def test_at2po_shares_its_room_over_the_rounds_left(paths, rounds, done, room):
    tree, turns = _two_chains()
    tree.rounds = done
    config = RolloutConfig(policy="at2po", paths=paths, initial_paths=2, rounds=rounds, weight=0.5)
    chosen = choose_turns(tree, turns, config=config, seed=0)
    assert {branch.room for branch in chosen.values()} == {room}
    assert len(_granted(chosen)) == min(room, 4)


def test_at2po_counts_the_siblings_of_earlier_rounds(renderer):
    """After a sibling [0.8] of turn 1, three turns begin at the prompt: 2.0 - 1, 1.0 - 1 and 0.8 - 1."""
    tree, turns = _two_chains()
    config = RolloutConfig(policy="at2po", paths=4, initial_paths=2, rounds=2, weight=0.5)
    (path,) = expand_turns(tree, turns, config=config, renderer=renderer, seed=0)
    assert (path.tip, path.lineage, path.tokens) == (0, (0, 0, 0), PROMPT)
    tree.started, tree.rounds = 3, 1
    index = tree.add(_turn(0, [0.8]))
    tree.end(index, StopReason.EOS)
    chosen = choose_turns(tree, {**turns, index: path}, config=config, seed=0)
    expected = {1: 1.0, 3: 0.4, 4: 0.0, 6: 1.2, index: -0.2}
    assert {segment: branch.score for segment, branch in chosen.items()} == pytest.approx(expected)
    assert _granted(chosen) == {6}


def _with_entropies(one, two):
    tree = GrowingTree(
        Prompt("p", ({"role": "user", "content": "?"},), ()),
        [Segment(-1, PROMPT, False), _turn(0, [0.1] * len(one), one), _turn(0, [0.1] * len(two), two)],
        started=2,
    )
    turns = {1: OpenPath(0, (0,), tip=0, tokens=PROMPT), 2: OpenPath(0, (1,), tip=0, tokens=PROMPT)}
    return tree, turns


def test_appo_by_hand(renderer):
    """Mean 1 and variance 8 / 7 of all seven tokens: z is 2, 1, 0 and -1 times sqrt(7 / 8)."""
    tree, turns = _with_entropies([1.0, 0.0, 3.0, 0.0], [2.0, 1.0, 0.0])
    config = RolloutConfig(policy="appo", paths=4, initial_paths=2)
    chosen = choose_tokens(tree, turns, config=config, renderer=renderer)
    unit = math.sqrt(7 / 8)
    assert {(fork.segment, fork.token): fork.branch.score for fork in chosen} == pytest.approx(
        {(1, 2): 2 * unit, (2, 0): unit}, rel=1e-5
    )
    assert {(fork.branch.room, fork.branch.children) for fork in chosen} == {(2, 1)}


def test_appo_keeps_the_forks_of_a_turn_apart_by_hand(renderer):
    """At least three tokens apart: 4 at token 2 excludes 3 at token 4, so 2 at the other turn's start is next."""
    tree, turns = _with_entropies([0.0, 0.0, 4.0, 0.0, 3.0, 0.5], [2.0, 0.0])
    for distance, expected in ((2, {(1, 2), (1, 4)}), (3, {(1, 2), (2, 0)})):
        config = RolloutConfig(policy="appo", paths=4, initial_paths=2, min_distance=distance)
        chosen = choose_tokens(tree, turns, config=config, renderer=renderer)
        assert {(fork.segment, fork.token) for fork in chosen} == expected
