"""Which turns of complete paths are sampled again: AT2PO (arXiv 2601.04767).

A turn is what the model wrote between the prompt or a tool result and the next call or its end. A sibling samples it
again from its beginning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from arpo_ext import ops
from arpo_ext.config import RolloutConfig
from arpo_ext.rollout.paths import OpenPath
from arpo_ext.rollout.tree import GrowingTree
from arpo_ext.types import Branch


def choose_turns(
    tree: GrowingTree, turns: Mapping[int, OpenPath], *, config: RolloutConfig, seed: int
) -> dict[int, Branch]:
    """Segment -> decision, for every turn: the best ones are granted one sibling each.

    score = mean(-log p of the turn's tokens) - config.weight * (other turns that begin at the same place). The room of
    the round is what is left of `config.paths`, shared evenly by the rounds left.

    turns: first segment of each turn -> its path as it was when the turn began.
    """
    left = config.paths - tree.started
    rounds_left = max(config.rounds - tree.rounds, 1)
    room = -(-left // rounds_left)
    chosen = sorted(turns)
    beginnings = Counter(tree.segments[segment].parent for segment in chosen)
    surprise = [_surprise(tree, segment) for segment in chosen]
    count = len(chosen)
    inputs = (
        torch.tensor(surprise, dtype=torch.float32),
        torch.zeros(count),
        torch.zeros(count, dtype=torch.int64),
        torch.tensor([room], dtype=torch.int32),
        torch.tensor([turns[segment].key for segment in chosen], dtype=torch.int64),
        torch.tensor([turns[segment].turn for segment in chosen], dtype=torch.int32),
    )
    siblings = torch.tensor([beginnings[tree.segments[s].parent] - 1 for s in chosen], dtype=torch.int32)
    rule = {"policy": "at2po", "weight": config.weight, "width": 1, "seed": seed, "siblings": siblings}
    scores = ops.branch_scores(*inputs, **rule)[0].tolist()
    granted = ops.branch_points(*inputs, **rule).tolist()
    return {
        segment: Branch(score=score, room=room, children=children)
        for segment, score, children in zip(chosen, scores, granted, strict=True)
    }


def _surprise(tree: GrowingTree, segment: int) -> float:
    logprobs = tree.segments[segment].logprobs
    return -sum(logprobs) / len(logprobs)
