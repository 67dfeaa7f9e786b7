"""The shared vocabulary: a tree's paths and counts, its JSON form, and what a segment refuses."""

import json

import pytest

from arpo_ext.types import Branch, Leaf, RolloutTree, Segment, StopReason, ToolResult


def small_tree() -> RolloutTree:
    """prompt - turn - tool result - two turns, the first of which was probed and forked the second."""
    tool = ToolResult("search", "a : 1", ok=True, seconds=0.5)
    turn = Segment(0, (3,), sampled=True, logprobs=(-0.5,), entropies=(0.1,), stop_reason=StopReason.TOOL)
    probed = Segment(2, (6,), sampled=True, logprobs=(-0.1,), stop_reason=StopReason.EOS, branch=Branch(0.6, 1, 1))
    sibling = Segment(2, (7, 8), sampled=True, logprobs=(-0.2, -0.3), stop_reason=StopReason.LENGTH)
    return RolloutTree(
        prompt_id="p0",
        prompt="q",
        answers=("1",),
        policy="paper",
        seed=7,
        segments=(
            Segment(-1, (1, 2), sampled=False, text="q"),
            turn,
            Segment(1, (4, 5), sampled=False, text="a : 1", tool=tool),
            probed,
            sibling,
        ),
        leaves=(Leaf(3, StopReason.EOS, reward=1.0), Leaf(4, StopReason.LENGTH)),
    )


def test_a_path_concatenates_to_what_the_model_saw():
    tree = small_tree()
    assert tree.path(4) == [0, 1, 2, 4]
    assert tree.path_tokens(4) == [1, 2, 3, 4, 5, 7, 8]
    assert [s.tokens for s in tree.response_segments(tree.leaves[0])] == [(3,), (4, 5), (6,)]


def test_counts_see_shared_work_once():
    assert small_tree().counts == {"sampled_tokens": 4, "tool_calls": 1, "forks": 1}


def test_json_reads_back():
    tree = small_tree()
    row = json.loads(json.dumps(tree.to_json()))
    assert row["segments"][2]["tool"] == {"name": "search", "ok": True, "seconds": 0.5, "cached": False}
    assert RolloutTree.from_json(row) == tree


def test_another_format_version_is_refused():
    with pytest.raises(ValueError, match="format version 99; expected 1"):
        RolloutTree.from_json({**small_tree().to_json(), "version": 99})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": (1, 2), "sampled": True, "logprobs": (0.0,)}, "got 1 logprobs for 2 tokens"),
        ({"tokens": (1,), "sampled": True, "entropies": (0.0, 0.0)}, "got 2 entropies for 1 tokens"),
        ({"tokens": (1,), "sampled": False, "entropies": (0.0,)}, "not sampled"),
    ],
)
def test_a_segment_refuses_misaligned_numbers(fields, message):
    with pytest.raises(ValueError, match=message):
        Segment(-1, **fields)


@pytest.mark.parametrize("parents", [(0,), (-1, -1), (-1, 1), (-1, 0, 5)])
def test_parents_come_before_their_children(parents):
    segments = tuple(Segment(parent, (1,), sampled=False) for parent in parents)
    with pytest.raises(ValueError, match="expected -1 at segment 0"):
        RolloutTree("p", "q", (), "chain", 0, segments)


def test_a_leaf_must_name_a_segment():
    with pytest.raises(ValueError, match="leaf names segment 1; expected 0 to 0"):
        RolloutTree("p", "q", (), "chain", 0, (Segment(-1, (1,), sampled=False),), (Leaf(1, StopReason.EOS),))
