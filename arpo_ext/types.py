"""The vocabulary that every layer shares: plain frozen data, no torch.

A rollout is a tree of segments. A segment holds only the tokens it adds and the index of its parent, so a shared
prefix is stored once and a tool ran once for all leaves below its result. The tokens of a leaf's path, concatenated,
are exactly what the model saw: model output is never tokenised again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

TREE_FORMAT_VERSION = 1


class StopReason(StrEnum):
    """Why a sampled segment, or a path, ended."""

    TOOL = "tool"  # the closing tag of a tool call was sampled
    EOS = "eos"  # the model ended its answer
    LENGTH = "length"  # the path's token budget was used up
    TIMEOUT = "timeout"  # forced: the path's time was over
    CANCELLED = "cancelled"  # forced: the collection ended before the path did

    @property
    def is_forced(self) -> bool:
        """Whether the path was cut from outside. What it holds is no answer of the model, so it is never trained."""
        return self in (StopReason.TIMEOUT, StopReason.CANCELLED)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question: chat messages in, accepted answers out."""

    id: str
    messages: tuple[Mapping[str, str], ...]
    answers: tuple[str, ...]
    source: str = ""

    def __post_init__(self) -> None:
        if not self.messages:
            raise ValueError(f"prompt {self.id!r} has no messages; expected at least one")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """What the model asked of a tool: `text` is what stood between its tags.

    history: texts of the good calls of the same path to the same tool before this one, oldest first; for tools that
    keep state along a path.
    """

    name: str
    text: str
    history: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool answered. A failure is a result with `ok=False` and a text the model can read."""

    name: str
    text: str
    ok: bool
    seconds: float = 0.0
    cached: bool = False


@dataclass(frozen=True, slots=True)
class Document:
    """What a search finds. `title` and `text` are searched, `text` is what the model gets to read."""

    text: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Branch:
    """A branch decision: the policy's score, the room left in the tree when it was taken, the children granted."""

    score: float
    room: int
    children: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens with one origin: the prompt, one turn of the model, or one tool result.

    A path that was cut from outside ends in a segment without tokens whose stop reason says so.

    parent: index of the parent segment, -1 for the root (the prompt); always smaller than the segment's own index.
    logprobs: natural-log probability of each sampled token at the sampling temperature; empty if not sampled.
    entropies: entropy in nats at the leading tokens of a sampled segment; as long as was recorded.
    probe_entropy: mean of the first k entropies where the segment was probed.
    tool: for a tool-result segment, the result it holds.
    """

    parent: int
    tokens: tuple[int, ...]
    sampled: bool
    text: str = ""
    logprobs: tuple[float, ...] = ()
    entropies: tuple[float, ...] = ()
    stop_reason: StopReason | None = None
    probe_entropy: float | None = None
    branch: Branch | None = None
    tool: ToolResult | None = None

    def __post_init__(self) -> None:
        if self.logprobs and len(self.logprobs) != len(self.tokens):
            raise ValueError(f"got {len(self.logprobs)} logprobs for {len(self.tokens)} tokens; expected one each")
        if len(self.entropies) > len(self.tokens):
            raise ValueError(
                f"got {len(self.entropies)} entropies for {len(self.tokens)} tokens; expected at most one each"
            )
        if not self.sampled and (self.logprobs or self.entropies):
            raise ValueError("a segment that was not sampled cannot hold logprobs or entropies")


@dataclass(frozen=True, slots=True)
class Leaf:
    """The end of one complete path. `reward` and `advantage` are filled in after scoring."""

    segment: int
    end: StopReason
    reward: float | None = None
    accuracy: float | None = None
    advantage: float | None = None


@dataclass(frozen=True, slots=True)
class RolloutTree:
    """All paths sampled for one prompt. Segment 0 is the prompt; every other segment follows its parent."""

    prompt_id: str
    prompt: str
    answers: tuple[str, ...]
    policy: str
    seed: int
    segments: tuple[Segment, ...]
    leaves: tuple[Leaf, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for index, segment in enumerate(self.segments):
            if not -1 <= segment.parent < index or (segment.parent == -1) != (index == 0):
                raise ValueError(
                    f"segment {index} has parent {segment.parent}; expected -1 at segment 0, else a smaller index"
                )
        for leaf in self.leaves:
            if not 0 <= leaf.segment < len(self.segments):
                raise ValueError(f"leaf names segment {leaf.segment}; expected 0 to {len(self.segments) - 1}")

    def path(self, segment: int) -> list[int]:
        """Indices of the segments from the root to `segment`, both included."""
        indices: list[int] = []
        while segment >= 0:
            indices.append(segment)
            segment = self.segments[segment].parent
        return indices[::-1]

    def path_tokens(self, segment: int) -> list[int]:
        """The token ids the model saw up to the end of `segment`, prompt included."""
        return [token for index in self.path(segment) for token in self.segments[index].tokens]

    def response_segments(self, leaf: Leaf) -> Iterator[Segment]:
        """The segments of a leaf's path after the prompt."""
        return (self.segments[index] for index in self.path(leaf.segment)[1:])

    @property
    def is_complete(self) -> bool:
        """Whether no path was cancelled. One whose own time was over has ended for good."""
        return not any(leaf.end is StopReason.CANCELLED for leaf in self.leaves)

    @property
    def counts(self) -> dict[str, int]:
        """Work done for this tree; a shared prefix or tool call counts once."""
        return {
            "sampled_tokens": sum(len(s.tokens) for s in self.segments if s.sampled),
            "tool_calls": sum(s.tool is not None for s in self.segments),
            "forks": sum(s.branch.children for s in self.segments if s.branch is not None),
        }

    def to_json(self) -> dict[str, Any]:
        """The tree as one line of `trees.jsonl`."""
        return {
            "version": TREE_FORMAT_VERSION,
            "prompt_id": self.prompt_id,
            "prompt": self.prompt,
            "answer": list(self.answers),
            "policy": self.policy,
            "seed": self.seed,
            "segments": [_segment_to_json(s) for s in self.segments],
            "leaves": [asdict(leaf) for leaf in self.leaves],
            "counts": self.counts,
            "metadata": dict(self.metadata),
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> RolloutTree:
        """Inverse of `to_json`. ValueError on another version."""
        if row.get("version") != TREE_FORMAT_VERSION:
            raise ValueError(f"tree has format version {row.get('version')!r}; expected {TREE_FORMAT_VERSION}")
        return cls(
            prompt_id=row["prompt_id"],
            prompt=row["prompt"],
            answers=tuple(row["answer"]),
            policy=row["policy"],
            seed=row["seed"],
            segments=tuple(_segment_from_json(s) for s in row["segments"]),
            leaves=tuple(Leaf(**{**leaf, "end": StopReason(leaf["end"])}) for leaf in row["leaves"]),
            metadata=row.get("metadata", {}),
        )


def _segment_to_json(segment: Segment) -> dict[str, Any]:
    row = asdict(segment)
    if segment.tool is not None:
        # The text of the result is the segment's text already.
        row["tool"].pop("text")
    return row


def _segment_from_json(row: Mapping[str, Any]) -> Segment:
    tool = row["tool"]
    return Segment(
        parent=row["parent"],
        tokens=tuple(row["tokens"]),
        sampled=row["sampled"],
        text=row["text"],
        logprobs=tuple(row["logprobs"]),
        entropies=tuple(row["entropies"]),
        stop_reason=None if row["stop_reason"] is None else StopReason(row["stop_reason"]),
        probe_entropy=row["probe_entropy"],
        branch=None if row["branch"] is None else Branch(**row["branch"]),
        tool=None if tool is None else ToolResult(text=row["text"], **tool),
    )
