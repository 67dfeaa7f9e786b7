"""Rollout trees of the shapes that published branching policies make, filled with random tokens.

A path is a prompt and turns of the model with a tool result between each two. Lengths vary by 30 %. Log-probabilities
of the sampler are those of a uniform model with noise, so that against an untrained model some ratios are clipped.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from arpo_ext.rollout.tree import split
from arpo_ext.types import Leaf, RolloutTree, Segment, StopReason


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a prompt, a turn and a tool result, and the turns of a path."""

    prompt: int = 100
    turn: int = 60
    result: int = 40
    turns: int = 3


def arpo_like(paths: int, lengths: Lengths, vocab: int, seed: int) -> RolloutTree:
    """Half of the paths from the prompt, the others forked behind a tool result of any path before."""
    tree = _Grown(lengths, vocab, seed)
    for _ in range((paths + 1) // 2):
        tree.path(0, 0)
    for _ in range(paths // 2):
        tree.path(*tree.random.choice(tree.results))
    return tree.done("arpo-like")


def at2po_like(paths: int, lengths: Lengths, vocab: int, seed: int) -> RolloutTree:
    """A quarter of the paths complete from the prompt, then two rounds of siblings of whole turns, any turn."""
    tree = _Grown(lengths, vocab, seed)
    complete = max(1, paths // 4)
    for _ in range(complete):
        tree.path(0, 0)
    for forks in ((paths - complete) // 2, paths - complete - (paths - complete) // 2):
        turns = [(0, 0)] * len(tree.leaves) + tree.results
        for _ in range(forks):
            tree.path(*tree.random.choice(turns))
    return tree.done("at2po-like")


def appo_like(paths: int, lengths: Lengths, vocab: int, seed: int) -> RolloutTree:
    """Half of the paths from the prompt, the others forked at any token of any turn."""
    tree = _Grown(lengths, vocab, seed)
    for _ in range((paths + 1) // 2):
        tree.path(0, 0)
    whole = tree.done("appo-like")
    for _ in range(paths // 2):
        turns = [i for i, s in enumerate(whole.segments) if s.sampled and len(s.tokens) > 1]
        turn = tree.random.choice(turns)
        whole = split(whole, turn, tree.random.randrange(1, len(whole.segments[turn].tokens)), lambda _: "")
        begun = sum(not whole.segments[i].sampled for i in whole.path(turn)) - 1
        tree.segments, tree.leaves = list(whole.segments), [leaf.segment for leaf in whole.leaves]
        tree.path(turn, begun)
        whole = tree.done("appo-like")
    return whole


SHAPES: Mapping[str, Callable[[int, Lengths, int, int], RolloutTree]] = {
    "arpo-like": arpo_like,
    "at2po-like": at2po_like,
    "appo-like": appo_like,
}


def token_counts(trees: Sequence[RolloutTree]) -> tuple[int, int]:
    """Tokens of the trees, each once, and of all their paths."""
    unique = sum(len(segment.tokens) for tree in trees for segment in tree.segments)
    return unique, sum(len(tree.path_tokens(leaf.segment)) for tree in trees for leaf in tree.leaves)


class _Grown:
    """results: (segment, turns before it ends) of every tool result."""

    def __init__(self, lengths: Lengths, vocab: int, seed: int) -> None:
        self.lengths, self.vocab, self.seed = lengths, vocab, seed
        self.random = random.Random(seed)
        self.segments: list[Segment] = [Segment(-1, self._tokens(lengths.prompt), sampled=False)]
        self.leaves: list[int] = []
        self.results: list[tuple[int, int]] = []

    def _tokens(self, mean: int) -> tuple[int, ...]:
        count = max(1, round(mean * self.random.uniform(0.7, 1.3)))
        return tuple(self.random.randrange(3, self.vocab) for _ in range(count))

    def path(self, parent: int, begun: int) -> None:
        """A path on from a segment behind which `begun` turns have ended."""
        for turn in range(begun, self.lengths.turns):
            tokens = self._tokens(self.lengths.turn)
            logprobs = tuple(-math.log(self.vocab) + self.random.gauss(0, 0.15) for _ in tokens)
            self.segments.append(Segment(parent, tokens, sampled=True, logprobs=logprobs))
            parent = len(self.segments) - 1
            if turn < self.lengths.turns - 1:
                self.segments.append(Segment(parent, self._tokens(self.lengths.result), sampled=False))
                parent = len(self.segments) - 1
                self.results.append((parent, turn + 1))
        self.leaves.append(parent)

    def done(self, name: str) -> RolloutTree:
        """Rewards 0, 0.5 and 1 in turn."""
        leaves = (Leaf(segment, StopReason.EOS, reward=(i % 3) / 2) for i, segment in enumerate(self.leaves))
        return replace(
            RolloutTree(f"{name} {self.seed}", "", (), name, self.seed, tuple(self.segments)), leaves=tuple(leaves)
        )
