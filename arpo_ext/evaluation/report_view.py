"""The stored trees as the page's viewer reads them: bounded in size, rounded, with nothing but finite numbers."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from arpo_ext.evaluation.report_trees import Forest, TreeFacts, read_tree
from arpo_ext.types import Leaf, Segment

VIEW_BYTES = 8_000_000
TEXT_CHARS = 8000
BARS = 240  # most bars in the entropy strip of one segment


def views(forest: Forest, limit_bytes: int = VIEW_BYTES) -> list[dict[str, Any]]:
    """The trees for the viewer in the order of their steps: `limit_bytes` of JSON at most, but at least one tree.

    Steps are taken first, last, then by halving the gaps, so that a limit thins them evenly.
    """
    steps, used = forest.steps, 0
    chosen: list[tuple[int, dict[str, Any]]] = []
    for index in _spread(len(steps)):
        for facts in forest.trees:
            if facts.step != steps[index]:
                continue
            view = tree_view(forest, facts)
            if view is None:
                continue
            used += len(json.dumps(view))
            if chosen and used > limit_bytes:
                return _in_order(chosen)
            chosen.append((index, view))
    return _in_order(chosen)


def shade_limit(views: Sequence[dict[str, Any]]) -> float:
    """The mean entropy (nats) that gets the darkest shade: the 95th percentile over all segments shown."""
    means = sorted(s["mean"] for view in views for s in view["segments"] if s["mean"] is not None)
    return max(means[int(0.95 * (len(means) - 1))], 1e-3) if means else 1.0


def tree_view(forest: Forest, facts: TreeFacts) -> dict[str, Any] | None:
    """One tree as JSON values: the question, what it cost, its segments and its leaves."""
    tree = read_tree(forest, facts)
    if tree is None or not tree.segments:
        return None
    return {
        "step": facts.step,
        "label": tree.prompt_id,
        "prompt": _cut(tree.prompt),
        "answers": [_cut(answer) for answer in tree.answers],
        "policy": tree.policy,
        "seed": tree.seed,
        "counts": tree.counts,
        "segments": [_segment_view(segment) for segment in tree.segments],
        "leaves": [_leaf_view(leaf) for leaf in tree.leaves],
    }


def _segment_view(segment: Segment) -> dict[str, Any]:
    entropies = [entropy for entropy in segment.entropies if math.isfinite(entropy)]
    bars, per_bar = _bars(segment.entropies)
    branch, tool = segment.branch, segment.tool
    return {
        "parent": segment.parent,
        "tokens": len(segment.tokens),
        "sampled": segment.sampled,
        "text": _cut(segment.text),
        "mean": _round(sum(entropies) / len(entropies)) if entropies else None,
        "bars": bars,
        "per_bar": per_bar,
        "stop": segment.stop_reason and segment.stop_reason.value,
        "probe": _round(segment.probe_entropy),
        "branch": branch and {"score": _round(branch.score), "room": branch.room, "children": branch.children},
        "tool": tool and {"name": tool.name, "ok": tool.ok, "seconds": _round(tool.seconds), "cached": tool.cached},
    }


def _leaf_view(leaf: Leaf) -> dict[str, Any]:
    return {
        "segment": leaf.segment,
        "end": leaf.end.value,
        "reward": _round(leaf.reward),
        "accuracy": _round(leaf.accuracy),
        "advantage": _round(leaf.advantage),
    }


def _bars(entropies: Sequence[float]) -> tuple[list[float | None], int]:
    """Entropies for the strip and how many tokens one bar averages: one, unless there are more tokens than BARS."""
    per_bar = max(1, math.ceil(len(entropies) / BARS))
    groups = [entropies[start : start + per_bar] for start in range(0, len(entropies), per_bar)]
    return [_round(sum(group) / len(group)) for group in groups], per_bar


def _round(value: float | None) -> float | None:
    """Four decimals are what the page prints; JSON has no NaN."""
    return round(value, 4) if value is not None and math.isfinite(value) else None


def _cut(text: str) -> str:
    if len(text) <= TEXT_CHARS:
        return text
    return f"{text[:TEXT_CHARS]} … ({len(text) - TEXT_CHARS:,} more characters)"


def _spread(count: int) -> list[int]:
    """The indices below `count` so that any leading part of them lies evenly, ends first: 5 -> 0, 4, 2, 1, 3."""
    order = [0, count - 1] if count else []
    stride = 1 << count.bit_length()
    while stride:
        order += range(0, count, stride)
        stride //= 2
    return list(dict.fromkeys(order))


def _in_order(chosen: list[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    views = [view for _, view in sorted(chosen, key=lambda pair: pair[0])]
    seen: Counter[tuple[int | None, str]] = Counter()
    for view in views:
        key = (view["step"], view["label"])
        seen[key] += 1
        if seen[key] > 1:
            view["label"] += f" (tree {seen[key]})"
    return views
