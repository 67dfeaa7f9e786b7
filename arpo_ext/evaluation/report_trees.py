"""Read `trees.jsonl`: what the stored trees say about entropy around tool calls and about the tools.

The file is read once, line by line, keeping only sums of each tree; the few trees that the page shows are read again
by their offset. So a file of many gigabytes costs time, not memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arpo_ext.evaluation.report_data import TREES, JsonLines, parse_object
from arpo_ext.types import RolloutTree

POSITIONS = 16  # tokens after the prompt or a tool result that are shown one by one
AFTER_PROMPT, ELSEWHERE = "after the prompt", "elsewhere"


@dataclass(slots=True)
class ToolFacts:
    """Calls of one tool in the stored trees; `seconds` has one value for each call that was not answered from cache."""

    calls: int = 0
    failed: int = 0
    cached: int = 0
    seconds: list[float] = field(default_factory=list)


@dataclass(slots=True)
class TreeFacts:
    """One stored tree: where it lies in the file, and its sums.

    entropy: (group, position) -> [sum in nats, number of tokens]; position counts from 1, 0 for `ELSEWHERE`.
    """

    offset: int
    step: int | None
    entropy: dict[tuple[str, int], list[float]]
    tools: dict[str, ToolFacts]


@dataclass(frozen=True, slots=True)
class Forest:
    """All stored trees of a run, in the order of the file, and notes about lines that could not be read."""

    path: Path
    trees: tuple[TreeFacts, ...]
    notes: tuple[str, ...]

    @property
    def steps(self) -> list[int | None]:
        """The steps that have trees, increasing; trees that name no step stand first, under None."""
        return sorted({tree.step for tree in self.trees}, key=lambda step: -1 if step is None else step)


def read_forest(run_dir: Path) -> Forest:
    """Scan `trees.jsonl` of a run folder; an absent file is a forest of no trees."""
    path = run_dir / TREES
    if not path.is_file():
        return Forest(path, (), (f"{TREES} is missing: no rollout trees",))
    found: list[TreeFacts] = []
    lines = JsonLines(path)
    for offset, row in lines:
        tree = tree_of(row)
        if tree is None:
            lines.broken += 1
            continue
        found.append(TreeFacts(offset, _step(tree), entropy_sums(tree), _tool_facts(tree)))
    return Forest(path, tuple(found), tuple(lines.note()))


def tree_of(row: dict[str, Any]) -> RolloutTree | None:
    """The tree on a line, None if the line is of another version or lacks parts."""
    try:
        return RolloutTree.from_json(row)
    except (ValueError, KeyError, TypeError):
        return None


def read_tree(forest: Forest, facts: TreeFacts) -> RolloutTree | None:
    """The whole of one stored tree, None if the file changed meanwhile."""
    with forest.path.open("rb") as file:
        file.seek(facts.offset)
        row = parse_object(file.readline())
    return None if row is None else tree_of(row)


def _step(tree: RolloutTree) -> int | None:
    step = tree.metadata.get("step")
    return step if isinstance(step, int) else None


def entropy_sums(tree: RolloutTree) -> dict[tuple[str, int], list[float]]:
    """Sums and counts of token entropies (nats) by position after the prompt or after each tool's result.

    The first POSITIONS sampled tokens after a prompt or tool result are counted one by one, all later ones as
    ELSEWHERE. A segment below a sampled segment continues its turn, so a fork inside a turn moves no position. A
    shared segment counts once.
    """
    sums: dict[tuple[str, int], list[float]] = {}
    turns: list[tuple[str, int]] = []  # of each segment: group of its turn, tokens of the turn up to its end
    for segment in tree.segments:
        group, start = turns[segment.parent] if segment.parent >= 0 else (AFTER_PROMPT, 0)
        if not segment.sampled:
            turns.append((f"after {segment.tool.name}" if segment.tool is not None else AFTER_PROMPT, 0))
            continue
        for position, entropy in enumerate(segment.entropies, start=start + 1):
            if math.isfinite(entropy):
                key = (group, position) if position <= POSITIONS else (ELSEWHERE, 0)
                cell = sums.setdefault(key, [0.0, 0])
                cell[0] += entropy
                cell[1] += 1
        turns.append((group, start + len(segment.tokens)))
    return sums


def add_entropy(trees: Iterable[TreeFacts]) -> dict[str, dict[int, tuple[float, int]]]:
    """Group -> position -> (mean entropy in nats, number of tokens) over some trees; groups in a stable order."""
    sums: dict[tuple[str, int], list[float]] = {}
    for tree in trees:
        for key, (total, count) in tree.entropy.items():
            cell = sums.setdefault(key, [0.0, 0])
            cell[0] += total
            cell[1] += count
    groups: dict[str, dict[int, tuple[float, int]]] = {}
    for group, position in sorted(sums, key=lambda key: (key[0] == ELSEWHERE, key[0] != AFTER_PROMPT, key)):
        total, count = sums[group, position]
        groups.setdefault(group, {})[position] = (total / count, int(count))
    return groups


def early_and_late(forest: Forest) -> list[tuple[str, list[TreeFacts]]]:
    """The trees of the first and of the last third of the steps, each with its name; of one step, all as one."""
    steps = forest.steps
    if len(steps) < 2:
        return [("all steps", list(forest.trees))] if forest.trees else []
    third = max(1, len(steps) // 3)
    phases = []
    for name, part in (("early", steps[:third]), ("late", steps[-third:])):
        named = [step for step in part if step is not None]
        span = f"{named[0]}" if len(named) == 1 else f"{named[0]} to {named[-1]}" if named else "unknown"
        phases.append((f"{name}: step {span}", [tree for tree in forest.trees if tree.step in part]))
    return phases


def _tool_facts(tree: RolloutTree) -> dict[str, ToolFacts]:
    facts: dict[str, ToolFacts] = {}
    for segment in tree.segments:
        if segment.tool is not None:
            one = facts.setdefault(segment.tool.name, ToolFacts())
            one.calls += 1
            one.failed += not segment.tool.ok
            one.cached += segment.tool.cached
            if not segment.tool.cached:
                one.seconds.append(segment.tool.seconds)
    return facts


def add_tools(trees: Iterable[TreeFacts]) -> dict[str, ToolFacts]:
    """Tool name -> its calls over some trees, in alphabetical order."""
    added: dict[str, ToolFacts] = {}
    for tree in trees:
        for name, one in tree.tools.items():
            total = added.setdefault(name, ToolFacts())
            total.calls += one.calls
            total.failed += one.failed
            total.cached += one.cached
            total.seconds += one.seconds
    return dict(sorted(added.items()))
