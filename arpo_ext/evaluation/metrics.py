"""Accuracy, reward and cost of a model on a set of questions, answered in chains without branching."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from arpo_ext.config import Config
from arpo_ext.rewards import score_tree
from arpo_ext.rollout.collect import collect
from arpo_ext.types import Prompt, RolloutTree

if TYPE_CHECKING:
    from arpo_ext.render import Renderer
    from arpo_ext.rollout.sampler import Sampler
    from arpo_ext.tools import ToolPool

Mode = Literal["sampled", "greedy"]
METRICS = (
    *("accuracy", "accuracy_se", "reward", "reward_se", "format_ok"),
    *("tool_calls_per_question", "sampled_tokens", "questions"),
)


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Means over the answers to `questions` questions, `samples` answers each.

    accuracy, format_ok: shares in [0, 1]. reward: mean reward. accuracy_se, reward_se: standard error of that mean over
    the questions, whose answers are averaged first because they are not independent; NaN for a single question.
    tool_calls_per_question: tool calls per answer. sampled_tokens: tokens the model sampled in the whole evaluation.
    trees: what was collected, scored.
    """

    mode: Mode
    questions: int
    samples: int
    accuracy: float
    accuracy_se: float
    reward: float
    reward_se: float
    format_ok: float
    tool_calls_per_question: float
    sampled_tokens: float
    trees: tuple[RolloutTree, ...] = ()

    def as_metrics(self, prefix: str = "") -> dict[str, float]:
        """The numbers under their metric names, after `prefix` and a slash where a prefix is given; no NaN."""
        start = f"{prefix.rstrip('/')}/" if prefix else ""
        values = {f"{start}{name}": float(getattr(self, name)) for name in METRICS}
        return {name: value for name, value in values.items() if not math.isnan(value)}


def evaluate(
    prompts: Sequence[Prompt],
    *,
    sampler: Sampler,
    tools: ToolPool,
    renderer: Renderer,
    config: Config,
    mode: Mode,
    seed: int,
    progress: Callable[[int], object] | None = None,
) -> EvalResult:
    """Answer each prompt in chains, score with `config.reward`, return the means.

    mode: "sampled" draws `config.eval.samples_per_prompt` answers a prompt at `config.rollout.temperature`; "greedy"
    takes the most probable token and one answer, since more would be equal. The other settings of `config.rollout`
    (tool calls, tokens) hold as in training. seed: of every draw; the same seed, weights and tool answers give the same
    result. progress: as for `rollout.collect`. ValueError without prompts or for an unknown mode.
    """
    if not prompts:
        raise ValueError("got no prompts to evaluate; expected at least one")
    options = {"sampler": sampler, "tools": tools, "renderer": renderer, "config": config, "progress": progress}
    return summarize(answer(prompts, mode=mode, seed=seed, **options), mode)


def answer(
    prompts: Sequence[Prompt],
    *,
    sampler: Sampler,
    tools: ToolPool,
    renderer: Renderer,
    config: Config,
    mode: Mode,
    seed: int,
    progress: Callable[[int], object] | None = None,
) -> list[RolloutTree]:
    """The scored trees of `evaluate`, one a prompt; several processes can share the prompts and summarize together."""
    if mode not in ("sampled", "greedy"):
        raise ValueError(f"mode is {mode!r}; expected 'sampled' or 'greedy'")
    samples = config.eval.samples_per_prompt if mode == "sampled" else 1
    chains = {"policy": "chain", "paths": samples, "initial_paths": samples, "entropies": "probe"}
    # Limits that make answers depend on one another, or on how busy the machine is.
    chains |= dict.fromkeys(("max_tree_tool_calls", "max_tree_tokens", "collect_timeout_s"))
    collected = collect(
        prompts,
        sampler=sampler,
        tools=tools,
        renderer=renderer,
        config=config.rollout.model_copy(update=chains),
        seed=seed,
        greedy=mode == "greedy",
        progress=progress,
    )
    return [score_tree(tree, config.reward) for tree in collected.trees]


def summarize(trees: Sequence[RolloutTree], mode: Mode) -> EvalResult:
    """The result that scored trees of chains amount to, one tree a question.

    A tree counts with the mean of its leaves. Equation 8 of the paper gives -1 to a broken format and to nothing else,
    so `format_ok` is the share of rewards of at least 0.
    """
    accuracies = [_mean([leaf.accuracy for leaf in tree.leaves]) for tree in trees]
    rewards = [_mean([leaf.reward for leaf in tree.leaves]) for tree in trees]
    answers = sum(len(tree.leaves) for tree in trees)
    return EvalResult(
        mode=mode,
        questions=len(trees),
        samples=len(trees[0].leaves),
        accuracy=_mean(accuracies),
        accuracy_se=_standard_error(accuracies),
        reward=_mean(rewards),
        reward_se=_standard_error(rewards),
        format_ok=_mean([float(leaf.reward >= 0) for tree in trees for leaf in tree.leaves]),
        tool_calls_per_question=sum(tree.counts["tool_calls"] for tree in trees) / answers,
        sampled_tokens=float(sum(tree.counts["sampled_tokens"] for tree in trees)),
        trees=tuple(trees),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float:
    """Standard deviation of the mean, from the unbiased variance; NaN for one value."""
    if len(values) < 2:
        return math.nan
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
