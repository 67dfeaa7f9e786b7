"""Operations on rollout trees: grow, split, check, read."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from arpo_ext.errors import DataError
from arpo_ext.types import Branch, Leaf, Prompt, RolloutTree, Segment, StopReason


@dataclass
class GrowingTree:
    """A tree while it is collected.

    started: paths that began (initial, forked and fresh); each ends in exactly one leaf. rounds: expansions so far.
    calls: tool calls so far. spare: tokens that no path was given yet; None: as many as they need.
    """

    prompt: Prompt
    segments: list[Segment]
    leaves: list[Leaf] = field(default_factory=list)
    started: int = 0
    rounds: int = 0
    calls: int = 0
    spare: int | None = None

    @property
    def open(self) -> int:
        return self.started - len(self.leaves)

    def add(self, segment: Segment) -> int:
        """Append a segment; its index."""
        self.segments.append(segment)
        return len(self.segments) - 1

    def grant(self, segment: int, branch: Branch) -> None:
        """Note a decision about the turn that `segment` begins; siblings granted before add up."""
        before = self.segments[segment].branch
        children = branch.children + (0 if before is None else before.children)
        self.segments[segment] = replace(self.segments[segment], branch=replace(branch, children=children))

    def end(self, segment: int, reason: StopReason) -> None:
        self.leaves.append(Leaf(segment, reason))

    def cut(self, segment: int, reason: StopReason, **decision: Any) -> None:
        """End a path at `segment` from outside. decision: probe and branch of the turn that it had begun."""
        self.end(self.add(Segment(parent=segment, tokens=(), sampled=False, stop_reason=reason, **decision)), reason)

    def split(self, segment: int, at: int, decode: Callable[[Sequence[int]], str]) -> int:
        """Cut a sampled segment before its token `at`; the index of the tail, which takes over children and leaf.

        Unlike the function `split` it leaves every other index as it is: the tail comes last, and `freeze` puts it
        where it belongs.
        """
        head, tail = _cut(self.segments, segment, at, decode)
        index = len(self.segments)
        self.segments = [replace(s, parent=index) if s.parent == segment else s for s in self.segments]
        self.segments[segment] = head
        self.segments.append(tail)
        self.leaves = [replace(leaf, segment=index) if leaf.segment == segment else leaf for leaf in self.leaves]
        return index

    def freeze(self, *, policy: str, seed: int) -> RolloutTree:
        order = self._parents_first()
        place = {old: new for new, old in enumerate(order)} | {-1: -1}
        segments = (self.segments[old] for old in order)
        return RolloutTree(
            prompt_id=self.prompt.id,
            prompt=self.segments[0].text,
            answers=self.prompt.answers,
            policy=policy,
            seed=seed,
            segments=tuple(replace(segment, parent=place[segment.parent]) for segment in segments),
            leaves=tuple(replace(leaf, segment=place[leaf.segment]) for leaf in self.leaves),
        )

    def _parents_first(self) -> list[int]:
        """Indices of the segments in the order they came, but for tails, which go before what hangs from them."""
        children: dict[int, list[int]] = {}
        for index, segment in enumerate(self.segments):
            children.setdefault(segment.parent, []).append(index)
        order: list[int] = []
        ready = [0]
        while ready:
            order.append(heapq.heappop(ready))
            for child in children.get(order[-1], ()):
                heapq.heappush(ready, child)
        return order


def split(tree: RolloutTree, segment: int, at: int, decode: Callable[[Sequence[int]], str]) -> RolloutTree:
    """Cut sampled segment `segment` before its token `at`, so that new children can hang from its first `at` tokens.

    The head keeps its index, the tail becomes segment + 1 and takes over the children and the leaf of the segment;
    segments behind it move up by one, because a parent always precedes its children. Every leaf's path keeps its
    tokens. Probe and branch decision belong to the window at the start, so they stay with the head; the stop reason
    goes with the tail.
    """
    head, tail = _cut(tree.segments, segment, at, decode)
    # A child of the whole is a child of the tail, which sits one behind it, so one shift serves every index.
    rest = (replace(s, parent=s.parent + (s.parent >= segment)) for s in tree.segments[segment + 1 :])
    leaves = tuple(replace(leaf, segment=leaf.segment + (leaf.segment >= segment)) for leaf in tree.leaves)
    return replace(tree, segments=(*tree.segments[:segment], head, tail, *rest), leaves=leaves)


def _cut(
    segments: Sequence[Segment], segment: int, at: int, decode: Callable[[Sequence[int]], str]
) -> tuple[Segment, Segment]:
    if not 0 <= segment < len(segments):
        raise ValueError(f"got segment {segment}; expected 0 to {len(segments) - 1}")
    whole = segments[segment]
    if not whole.sampled:
        raise ValueError(f"segment {segment} was not sampled; only sampled segments can be split")
    if not 0 < at < len(whole.tokens):
        raise ValueError(f"got split position {at}; expected 1 to {len(whole.tokens) - 1} inside segment {segment}")
    head = replace(
        whole,
        tokens=whole.tokens[:at],
        text=decode(whole.tokens[:at]),
        logprobs=whole.logprobs[:at],
        entropies=whole.entropies[:at],
        stop_reason=None,
    )
    tail = Segment(
        parent=segment,
        tokens=whole.tokens[at:],
        sampled=True,
        text=decode(whole.tokens[at:]),
        logprobs=whole.logprobs[at:],
        entropies=whole.entropies[at:],
        stop_reason=whole.stop_reason,
    )
    return head, tail


def match_finished(
    finished: Sequence[RolloutTree], trees: Sequence[GrowingTree], *, policy: str, seed: int, paths: int
) -> dict[int, RolloutTree]:
    """Position of a tree -> the complete tree that an earlier call collected in its place.

    Trees that share an identity (two prompts with one id) are matched in their order. Incomplete ones match nothing.
    DataError for a tree of another prompt, seed, policy or number of paths.
    """
    places: dict[str, list[int]] = {}
    for index, tree in enumerate(trees):
        places.setdefault(tree.prompt.id, []).append(index)
    matched = {}
    for tree in finished:
        index = next(iter(places.get(tree.prompt_id, [])), None)
        if index is None:
            raise DataError(
                f"a finished tree answers prompt {tree.prompt_id!r}; expected one of the prompts, each once"
            )
        places[tree.prompt_id].pop(0)
        got = (tree.policy, tree.seed, len(tree.leaves), tree.segments[0].tokens)
        if got != (policy, seed, paths, trees[index].segments[0].tokens):
            raise DataError(
                f"the finished tree of prompt {tree.prompt_id!r} has policy {tree.policy}, seed {tree.seed} and "
                f"{len(tree.leaves)} leaves; expected {policy}, {seed} and {paths} from the same prompt tokens"
            )
        if tree.is_complete:
            matched[index] = tree
    return matched


def check_tree(
    tree: RolloutTree,
    paths: int,
    initial_paths: int,
    *,
    max_tool_calls: int | None = None,
    max_response_tokens: int | None = None,
    probe_tokens: int | None = None,
) -> None:
    """Raise ValueError with the first broken promise of a collected tree; see DESIGN section 5.

    Exactly `paths` leaves, each the childless end of its own path; at most `paths - initial_paths` forks, all
    accounted for by a branch decision; tool results never sampled; a logprob for every sampled token, entropies for the
    first `probe_tokens` of them; call and token budgets of every path. A path cut from outside ends in a segment of no
    tokens; nothing else has none.
    """
    children: list[list[int]] = [[] for _ in tree.segments]
    for index, segment in enumerate(tree.segments[1:], start=1):
        children[segment.parent].append(index)
        _check_segment(tree, index, probe_tokens)
    if len(tree.leaves) != paths:
        raise ValueError(f"tree {tree.prompt_id!r} has {len(tree.leaves)} leaves; expected exactly {paths}")
    ends = {leaf.segment for leaf in tree.leaves}
    if len(ends) != len(tree.leaves):
        raise ValueError(f"tree {tree.prompt_id!r} has two leaves on one segment; expected each its own end")
    childless = {index for index, below in enumerate(children) if not below}
    if ends != childless:
        odd = min(ends ^ childless)
        raise ValueError(f"segment {odd} is a leaf or childless but not both; expected the leaves to be the ends")
    forks = tree.counts["forks"]
    if forks > paths - initial_paths:
        raise ValueError(f"tree has {forks} forks; expected at most M - N = {paths - initial_paths}")
    granted = [sum(tree.segments[i].branch.children for i in below if tree.segments[i].branch) for below in children]
    for index, below in enumerate(children):
        if index and below and len(below) != 1 + granted[index]:
            what = "segment" if tree.segments[index].sampled else "tool result"
            raise ValueError(
                f"{what} {index} has {len(below)} children but decisions granted {granted[index]} siblings"
            )
    own = len(children[0]) - granted[0]
    if own + forks != paths:
        raise ValueError(f"{own} paths of their own from the prompt and {forks} forks do not make {paths} leaves")
    for leaf in tree.leaves:
        _check_path(tree, leaf, max_tool_calls, max_response_tokens)


def _check_segment(tree: RolloutTree, index: int, probe_tokens: int | None) -> None:
    segment, parent = tree.segments[index], tree.segments[tree.segments[index].parent]
    if segment.stop_reason is not None and segment.stop_reason.is_forced:
        if segment.tokens or segment.sampled or segment.tool is not None:
            raise ValueError(f"segment {index} was cut from outside but holds tokens; expected none")
        return
    if not segment.tokens:
        raise ValueError(f"segment {index} adds no tokens; expected at least one")
    if not segment.sampled:
        if segment.tool is None:
            raise ValueError(f"segment {index} was not sampled and holds no tool result; expected one or the other")
        if not parent.sampled or parent.stop_reason is not StopReason.TOOL:
            raise ValueError(f"tool result {index} follows segment {segment.parent}, which does not end in a call")
        return
    if segment.tool is not None:
        raise ValueError(f"segment {index} is a tool result marked as sampled; its tokens must never be trained")
    if parent.sampled and parent.stop_reason is not None:
        raise ValueError(f"sampled segment {index} follows segment {segment.parent}, which had ended")
    if len(segment.logprobs) != len(segment.tokens) or not all(p <= 1e-6 for p in segment.logprobs):
        raise ValueError(f"sampled segment {index} lacks a log-probability (at most 0) for each of its tokens")
    if not all(h >= -1e-6 and math.isfinite(h) for h in segment.entropies):
        raise ValueError(f"segment {index} has an entropy below 0 or not finite; expected nats")
    wanted = min(probe_tokens or 0, len(segment.tokens)) if not parent.sampled else 0
    if len(segment.entropies) < wanted:
        raise ValueError(f"segment {index} has {len(segment.entropies)} entropies; expected the first {wanted}")


def _check_path(tree: RolloutTree, leaf: Leaf, max_tool_calls: int | None, max_response_tokens: int | None) -> None:
    end = tree.segments[leaf.segment].stop_reason
    if leaf.end.is_forced != (end is not None and end.is_forced):
        raise ValueError(f"leaf {leaf.end.value!r} at segment {leaf.segment}, which ended as {end}; expected the same")
    if not tree.segments[leaf.segment].sampled and not leaf.end.is_forced:
        raise ValueError(f"leaf at segment {leaf.segment} ends in a tool result; expected a sampled segment")
    segments = list(tree.response_segments(leaf))
    ran = sum(s.tool is not None for s in segments)
    # One result past the limit is the message that says so.
    if max_tool_calls is not None and ran > max_tool_calls + 1:
        raise ValueError(
            f"the path to segment {leaf.segment} has {ran} tool results; expected at most {max_tool_calls} + 1"
        )
    length = sum(len(s.tokens) for s in segments)
    if max_response_tokens is not None and length > max_response_tokens:
        raise ValueError(
            f"the path to segment {leaf.segment} has {length} response tokens; expected at most {max_response_tokens}"
        )


def read_trees(path: str | Path) -> list[RolloutTree]:
    """The trees of a file that `data.append_trees` wrote. DataError names the line that is not one."""
    try:
        # Not splitlines: JSON leaves U+2028 and U+0085 inside strings as they are.
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"tree file {path} cannot be read ({error.strerror}); expected one JSON tree a line") from None
    trees = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            tree = RolloutTree.from_json(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} line {number} is not a rollout tree: {error}") from None
        if row.get("counts") != tree.counts:
            raise DataError(f"{path} line {number} says counts {row.get('counts')}; its segments give {tree.counts}")
        trees.append(tree)
    return trees
