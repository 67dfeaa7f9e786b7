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
from arpo_ext.render import Renderer
from arpo_ext.rollout.branching import path_key
from arpo_ext.rollout.paths import OpenPath
from arpo_ext.rollout.tree import GrowingTree
from arpo_ext.types import Branch


class TokenFork(NamedTuple):
    """A sibling that samples segment `segment` again from its token `token` on."""

    segment: int
    token: int
    branch: Branch


def expand_turns(
    tree: GrowingTree, turns: Mapping[int, OpenPath], *, config: RolloutConfig, renderer: Renderer, seed: int
) -> list[OpenPath]:
    """The paths that AT2PO starts in this round, their forks noted in the tree. Arguments as `choose_turns`."""
    paths = []
    for segment, branch in choose_turns(tree, turns, config=config, seed=seed).items():
        before = tree.segments[segment].branch
        tree.grant(segment, branch)
        # A turn chosen again has siblings already; each needs a name of its own.
        first = before.children if before else 0
        paths.extend(turns[segment].sibling(first + ordinal) for ordinal in range(branch.children))
    return paths


def expand_tokens(
    tree: GrowingTree, turns: Mapping[int, OpenPath], *, config: RolloutConfig, renderer: Renderer, seed: int
) -> list[OpenPath]:
    """The paths that APPO starts, their forks noted in the tree and its turns cut there. As `expand_turns`."""
    whole = {segment: tree.segments[segment].tokens for segment in turns}
    # The piece of a turn that its next fork cuts, and where in the turn that piece begins.
    rest = {segment: (segment, 0) for segment in turns}
    paths = []
    for segment, token, branch in sorted(choose_tokens(tree, turns, config=config, renderer=renderer)):
        path = turns[segment].sibling_at(token, whole[segment][:token])
        piece, begin = rest[segment]
        if token:
            path.tip = piece
            piece = tree.split(piece, token - begin, renderer.answer_text)
            rest[segment] = (piece, token)
        tree.grant(piece, branch)
        paths.append(path)
    return paths


def choose_turns(
    tree: GrowingTree, turns: Mapping[int, OpenPath], *, config: RolloutConfig, seed: int
) -> dict[int, Branch]:
    """Segment -> decision, for every turn: the best ones are granted one sibling each, from the turn's beginning.

    score = mean(-log p of the turn's tokens) - config.weight * (other turns that begin at the same place). The room of
    the round is what is left of `config.paths`, shared evenly by the rounds left. The published code leaves out the
    last turn of every path; here an answer may be sampled again, which costs no tool call.

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


def choose_tokens(
    tree: GrowingTree, turns: Mapping[int, OpenPath], *, config: RolloutConfig, renderer: Renderer
) -> list[TokenFork]:
    """The token positions with the highest entropy, at least `config.min_distance` apart within a turn.

    score = z(entropy), over all sampled tokens of the tree. APPO multiplies it by z(future value), which needs the
    trainer's log-probabilities of the same tokens; before any update they equal the sampler's but for rounding, so it
    is left out here (`ops.branch_tokens` and `ops.future_value` have it). The published code takes z by path, leaves
    out white space and punctuation, and keeps the chosen token; here it is drawn again, for its entropy is the choice.

    No position is taken that `Renderer.breaks_off` excludes.
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
    key = torch.tensor([path_key((*turns[s].lineage, turns[s].turn)) for s in chosen], dtype=torch.int64)
    candidate = torch.ones_like(mask)
    # Few positions are excluded and looking at one takes the tokenizer, so only those that were chosen are looked at.
    while True:
        found = ops.branch_tokens(
            entropy,
            mask,
            torch.zeros(len(chosen), dtype=torch.int64),
            torch.tensor([room], dtype=torch.int32),
            count=room,
            candidate=candidate,
            key=key,
            scope="tree",
            min_distance=config.min_distance,
        )
        columns = (found.row[0].tolist(), found.token[0].tolist(), found.score[0].tolist())
        places = [place for place in zip(*columns, strict=True) if place[0] >= 0]
        excluded = [(row, t) for row, t, _ in places if renderer.breaks_off(tree.segments[chosen[row]].tokens[:t])]
        if not excluded:
            break
        candidate[tuple(zip(*excluded, strict=True))] = False
    return [TokenFork(chosen[row], t, Branch(score=score, room=room, children=1)) for row, t, score in places]


def _surprise(tree: GrowingTree, segment: int) -> float:
    logprobs = tree.segments[segment].logprobs
    return -sum(logprobs) / len(logprobs)
