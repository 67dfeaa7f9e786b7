"""Rollout trees: splitting, checking, files."""

from dataclasses import replace

import pytest

from arpo_ext.data import append_trees
from arpo_ext.errors import DataError
from arpo_ext.rollout.tree import check_tree, read_trees, split
from arpo_ext.types import Branch, Leaf, RolloutTree, Segment, StopReason, ToolResult


def _sampled(parent, length, stop, **more):
    tokens = tuple(range(10 * parent + 10, 10 * parent + 10 + length))
    return Segment(
        parent, tokens, True, text=_decode(tokens), logprobs=(-0.5,) * length, entropies=(0.25,) * length,
        stop_reason=stop, **more,
    )  # fmt: skip


def _decode(tokens):
    return "".join(f"[{token}]" for token in tokens)


@pytest.fixture
def tree():
    """M = 3, N = 2: two paths, the first calls a tool and forks once behind it."""
    segments = (
        Segment(-1, (1, 2, 3), False, text="q\u2028"),
        _sampled(0, 5, StopReason.TOOL, probe_entropy=0.25),
        Segment(1, (7, 8), False, text="r", tool=ToolResult("search", "r", True, 0.1)),
        _sampled(2, 4, StopReason.EOS, probe_entropy=0.25, branch=Branch(0.7, 1, 1)),
        _sampled(0, 3, StopReason.LENGTH, probe_entropy=0.25),
        _sampled(2, 2, StopReason.EOS, probe_entropy=0.25),
    )
    leaves = (Leaf(3, StopReason.EOS), Leaf(4, StopReason.LENGTH), Leaf(5, StopReason.EOS, reward=1.0))
    return RolloutTree("p", "q\u2028", ("a",), "paper", 3, segments, leaves, {"step": 1})


def test_a_good_tree_passes(tree):
    check_tree(tree, 3, 2, max_tool_calls=1, max_response_tokens=11, probe_tokens=3)


def _with(tree, index, **changes):
    return replace(
        tree, segments=tuple(replace(s, **changes) if i == index else s for i, s in enumerate(tree.segments))
    )


BROKEN = {
    "leaf missing": (lambda t: replace(t, leaves=t.leaves[:2]), "2 leaves; expected exactly 3"),
    "leaf twice": (lambda t: replace(t, leaves=(*t.leaves[:2], t.leaves[0])), "two leaves on one segment"),
    "leaf inside": (lambda t: replace(t, leaves=(*t.leaves[:2], Leaf(1, StopReason.TOOL))), "leaf or childless"),
    "no decision": (lambda t: _with(t, 3, branch=None), "tool result 2 has 2 children but decisions granted 0"),
    "too many forks": (lambda t: _with(t, 3, branch=Branch(0.7, 1, 2)), "2 forks; expected at most M - N = 1"),
    "fork elsewhere": (
        lambda t: _with(_with(t, 3, branch=None), 4, branch=Branch(0.7, 1, 1)),
        "tool result 2 has 2 children but decisions granted 0",
    ),
    "no logprobs": (lambda t: _with(t, 3, logprobs=()), "lacks a log-probability"),
    "positive logprob": (lambda t: _with(t, 3, logprobs=(0.5,) * 4), "lacks a log-probability"),
    "nan logprob": (lambda t: _with(t, 3, logprobs=(float("nan"),) * 4), "lacks a log-probability"),
    "negative entropy": (lambda t: _with(t, 3, entropies=(-1.0,)), "entropy below 0"),
    "few entropies": (lambda t: _with(t, 3, entropies=(0.1,)), "has 1 entropies; expected the first 3"),
    "tool sampled": (lambda t: _with(t, 2, sampled=True), "marked as sampled"),
    "tool without call": (lambda t: _with(t, 1, stop_reason=StopReason.EOS), "does not end in a call"),
    "no origin": (lambda t: _with(t, 2, tool=None), "holds no tool result"),
    "after the end": (lambda t: _with(t, 5, parent=3), "which had ended"),
    "empty": (lambda t: _with(t, 5, tokens=(), logprobs=(), entropies=()), "adds no tokens"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_tree_is_named(tree, name):
    damage, sentence = BROKEN[name]
    with pytest.raises(ValueError, match=sentence):
        check_tree(damage(tree), 3, 2, probe_tokens=3)


def test_budgets_of_a_path_are_checked(tree):
    with pytest.raises(ValueError, match="11 response tokens; expected at most 10"):
        check_tree(tree, 3, 2, max_response_tokens=10)
    with pytest.raises(ValueError, match="1 tool results; expected at most -1"):
        check_tree(tree, 3, 2, max_tool_calls=-1)


@pytest.mark.parametrize(("segment", "at"), [(1, 2), (3, 1), (5, 1), (4, 2)])
def test_split_keeps_every_path_and_its_measurements(tree, segment, at):
    after = split(tree, segment, at, _decode)
    assert len(after.segments) == len(tree.segments) + 1
    for old, new in zip(tree.leaves, after.leaves, strict=True):
        assert after.path_tokens(new.segment) == tree.path_tokens(old.segment)
        assert (new.end, new.reward) == (old.end, old.reward)
        for name in ("logprobs", "entropies"):
            measured = [[x for s in t.response_segments(leaf) for x in getattr(s, name)] for t, leaf in
                        ((tree, old), (after, new))]  # fmt: skip
            assert measured[0] == measured[1]
    head, tail = after.segments[segment], after.segments[segment + 1]
    assert head.tokens == tree.segments[segment].tokens[:at]
    assert head.text + tail.text == tree.segments[segment].text
    assert (head.stop_reason, tail.stop_reason) == (None, tree.segments[segment].stop_reason)
    assert (head.branch, head.probe_entropy) == (tree.segments[segment].branch, tree.segments[segment].probe_entropy)
    assert tail.parent == segment
    assert after.counts == tree.counts
    # The head can now take a second child.
    grown = replace(after, segments=(*after.segments, _sampled(segment, 2, StopReason.EOS)))
    assert grown.path_tokens(len(grown.segments) - 1)[:-2] == after.path_tokens(segment)


def test_a_split_tree_is_still_checked(tree):
    check_tree(split(tree, 1, 2, _decode), 3, 2, probe_tokens=3)


def test_split_of_a_short_entropy_record(tree):
    after = split(_with(tree, 3, entropies=(0.1, 0.2)), 3, 3, _decode)
    assert (after.segments[3].entropies, after.segments[4].entropies) == ((0.1, 0.2), ())


@pytest.mark.parametrize(
    ("segment", "at", "sentence"),
    [
        (9, 1, "got segment 9; expected 0 to 5"),
        (2, 1, "segment 2 was not sampled"),
        (3, 0, "got split position 0; expected 1 to 3"),
        (3, 4, "got split position 4; expected 1 to 3"),
    ],
)
def test_split_refuses(tree, segment, at, sentence):
    with pytest.raises(ValueError, match=sentence):
        split(tree, segment, at, _decode)


def test_files_append_and_round_trip(tree, tmp_path):
    path = tmp_path / "trees.jsonl"
    append_trees(path, [tree])
    append_trees(path, [tree, replace(tree, prompt_id="r")])
    assert read_trees(path) == [tree, tree, replace(tree, prompt_id="r")]
    assert path.read_text(encoding="utf-8").count("\n") == 3


def test_a_bad_line_is_named(tree, tmp_path):
    path = tmp_path / "trees.jsonl"
    append_trees(path, [tree])
    good = path.read_text(encoding="utf-8")
    path.write_text(good + good[:50] + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 2 is not a rollout tree"):
        read_trees(path)
    path.write_text(good.replace('"forks":1', '"forks":2'), encoding="utf-8")
    with pytest.raises(DataError, match="line 1 says counts"):
        read_trees(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_trees(tmp_path / "none.jsonl")
