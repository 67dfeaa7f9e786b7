"""Where complete paths are sampled again: turns (AT2PO, arXiv 2601.04767) or tokens (APPO, arXiv 2606.12384).

A turn is what the model wrote between the prompt or a tool result and the next call or its end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch

from arpo_ext import ops
from arpo_ext.config import RolloutConfig
from arpo_ext.rollout.branching import path_key
from arpo_ext.rollout.paths import OpenPath
from arpo_ext.rollout.tree import GrowingTree
from arpo_ext.types import Branch


class TokenFork(NamedTuple):
    """A sibling that samples segment `segment` again from its token `token` on."""

    segment: int
    token: int
    branch: Branch


def choose_turns(
    tree: GrowingTree, turns: Mapping[int, OpenPath], *, config: RolloutConfig, seed: int
) -> dict[int, Branch]:
    """Segment -> decision, for every turn: the best ones are granted one sibling each, from the turn's beginning.

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


def choose_tokens(tree: GrowingTree, turns: Mapping[int, OpenPath], *, config: RolloutConfig) -> list[TokenFork]:
    """The token positions with the highest entropy, at least `config.min_distance` apart within a turn.

    score = z(entropy), over all sampled tokens of the tree. APPO multiplies it by z(future value), which needs the
    trainer's log-probabilities of the same tokens; before any update they equal the sampler's but for rounding, so it
    is left out here (`ops.branch_tokens` and `ops.future_value` have it).
    """
    chosen = sorted(turns)
    room = config.paths - tree.started
    width = max(len(tree.segments[segment].entropies) for segment in chosen)
    entropy = torch.zeros(len(chosen), width)
    mask = torch.zeros(len(chosen), width, dtype=torch.bool)
    for row, segment in enumerate(chosen):
        entropies = torch.tensor(tree.segments[segment].entropies)
        entropy[row, : len(entropies)] = entropies
        mask[row, : len(entropies)] = True
    found = ops.branch_tokens(
        entropy,
        mask,
        torch.zeros(len(chosen), dtype=torch.int64),
        torch.tensor([room], dtype=torch.int32),
        count=room,
        key=torch.tensor([path_key((*turns[s].lineage, turns[s].turn)) for s in chosen], dtype=torch.int64),
        scope="tree",
        min_distance=config.min_distance,
    )
    columns = (found.row[0].tolist(), found.token[0].tolist(), found.score[0].tolist())
    return [
        TokenFork(chosen[row], token, Branch(score=score, room=room, children=1))
        for row, token, score in zip(*columns, strict=True)
        if row >= 0
    ]


def _surprise(tree: GrowingTree, segment: int) -> float:
    logprobs = tree.segments[segment].logprobs
    return -sum(logprobs) / len(logprobs)
