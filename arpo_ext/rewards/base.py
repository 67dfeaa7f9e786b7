"""The hierarchical reward (paper, Eq. 8) of one response, and of the leaves of a rollout tree."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from arpo_ext.config import RewardConfig
from arpo_ext.rewards import format as response_format
from arpo_ext.rewards.exact import exact
from arpo_ext.rewards.math_equal import is_mathematical, math_equal
from arpo_ext.rewards.token_f1 import published_token_f1, token_f1
from arpo_ext.types import RolloutTree

TOOL_BONUS = 0.1
_BONUS_TOOLS = ("search", "python")


@dataclass(frozen=True, slots=True)
class RewardResult:
    """score: Eq. 8, in {-1} or [0, 1.1]. accuracy: Acc in [0, 1]; 0 where the format is bad. reason: what is wrong
    with the format, empty if nothing is."""

    score: float
    accuracy: float
    format_ok: bool
    reason: str = ""


def math_or_f1(prediction: str, gold: str) -> float:
    """1 or 0 by mathematical equality where the gold is a mathematical expression, else the token F1."""
    return float(math_equal(prediction, gold)) if is_mathematical(gold) else token_f1(prediction, gold)


_ACCURACIES: dict[tuple[str, str], Callable[[str, str], float]] = {
    ("strict", "math_or_f1"): math_or_f1,
    ("strict", "token_f1"): token_f1,
    ("strict", "exact"): exact,
    ("published", "math_or_f1"): math_or_f1,
    ("published", "token_f1"): published_token_f1,
    ("published", "exact"): exact,
}


def hierarchical_reward(
    response: str,
    answers: Sequence[str],
    *,
    accuracy: Literal["math_or_f1", "token_f1", "exact"] = "math_or_f1",
    rules: Literal["strict", "published"] = "strict",
    tools_run: Collection[str] = (),
    sampled: Sequence[tuple[int, int]] | None = None,
) -> RewardResult:
    """The paper's Eq. 8: `Acc + r_M` if the format is good and Acc > 0; 0 if it is good and Acc = 0; -1 otherwise.

    Acc is the best accuracy over `answers`; r_M is 0.1 if both search and python were used.

    response: everything after the prompt, tool results included.
    accuracy: math_or_f1 compares as mathematics where the accepted answer is mathematical, else by token F1.
    rules: strict (see `format.strict_answer`), or published: with accuracy="token_f1" the score of the published
        code, faults included; it ignores `tools_run` and `sampled`.
    tools_run: names of the tools that really answered a call; under strict rules only they earn r_M.
    sampled: [start, end) character spans of `response` that the model wrote, in order; None = all of it.

    ValueError: no accepted answer, an unknown rule or accuracy, or spans that are not in order within the response.
    """
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers is {answers!r}; expected a non-empty list of strings")
    score_answer = _ACCURACIES.get((rules, accuracy))
    if score_answer is None:
        raise ValueError(
            f"got rules={rules!r} and accuracy={accuracy!r}; "
            "expected strict or published, and math_or_f1, token_f1 or exact"
        )
    try:
        if rules == "published":
            prediction = response_format.published_answer(response)
            bonus = all(f"</{tool}>" in response for tool in _BONUS_TOOLS)
        else:
            prediction = response_format.strict_answer(response, sampled, tools_run)
            bonus = all(tool in tools_run for tool in _BONUS_TOOLS)
    except response_format.FormatFault as fault:
        return RewardResult(-1.0, 0.0, False, str(fault))
    best = max(score_answer(prediction, gold) for gold in answers)
    return RewardResult(best + TOOL_BONUS * bonus if best > 0 else 0.0, best, True)


def score_tree(tree: RolloutTree, config: RewardConfig) -> RolloutTree:
    """`tree` with `reward` and `accuracy` of every leaf. The response of a leaf is the text of its path's segments
    after the prompt; a tool counts as run if one of its results on the path is ok."""
    leaves = []
    for leaf in tree.leaves:
        response, spans, tools_run = "", [], set()
        for segment in tree.response_segments(leaf):
            start, response = len(response), response + segment.text
            if segment.sampled:
                spans.append((start, len(response)))
            if segment.tool is not None and segment.tool.ok:
                tools_run.add(segment.tool.name)
        result = hierarchical_reward(
            response, tree.answers, accuracy=config.accuracy, rules=config.rules, tools_run=tools_run, sampled=spans
        )
        leaves.append(replace(leaf, reward=result.score, accuracy=result.accuracy))
    return replace(tree, leaves=tuple(leaves))
