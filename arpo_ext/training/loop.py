"""The training loop: collect -> score -> credit -> batch -> steps -> push weights -> log -> evaluate, save.

What it leaves out, on purpose: how trees are sampled, how they are scored, how weights reach the sampler and how a
model is evaluated are arguments; there is no learning-rate schedule and no replay of older trees. Every process draws
its own share of the prompts and owns a sampler; `accelerate` joins the gradients.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from arpo_ext.config import Config
from arpo_ext.data import append_trees, draw_order
from arpo_ext.errors import CheckpointError, DataError
from arpo_ext.tracking import Tracker
from arpo_ext.training import checkpoint
from arpo_ext.training.advantages import CREDIT_KEYS, credit_trees
from arpo_ext.training.batch import plan_updates
from arpo_ext.training.gather import Collected, gather_trees, has_spread
from arpo_ext.training.step import global_sum, policy_step, prepare
from arpo_ext.types import Prompt, RolloutTree


def train(
    config: Config,
    *,
    model: nn.Module,
    prompts: Sequence[Prompt],
    collect: Callable[[Sequence[Prompt], int, int], Collected],
    score: Callable[[Sequence[RolloutTree]], Sequence[RolloutTree]],
    push: Callable[[nn.Module], float],
    evaluate: Callable[[int], Mapping[str, float]],
    tracker: Tracker,
    tokenizer: Any,
) -> None:
    """Train `model` for `config.train.steps` steps and leave its folder in `config.output_dir / "model"`.

    collect(prompts, step, attempt) and evaluate(step) must take their randomness from their arguments or from the
    global generators: then a killed run that resumes equals one that was not killed. attempt is 0, or counts the times
    that `dynamic_sampling` filled up the step. push(model) returns its seconds. evaluate runs before the first step,
    after the last and every `eval_every` steps. A fresh run refuses a folder that holds checkpoints.
    """
    settings = config.train
    # Before a checkpoint is loaded: the policy that the KL term keeps to is the one the run began with.
    reference = copy.deepcopy(model).requires_grad_(False).eval() if settings.kl_coef > 0 else None
    accelerator, model, optimizer = prepare(model, settings)
    if reference is not None:
        reference = accelerator.prepare_model(reference, evaluation_mode=True)
    pad_token = tokenizer.pad_token_id or 0
    identity = {"seed": config.seed, "prompts": _digest(prompts)}
    parts = {"accelerator": accelerator, "model": model, "optimizer": optimizer}

    saved = _checkpoint_to_resume(config)
    state = checkpoint.load(saved, identity, **parts) if saved else checkpoint.RunState()
    tracker.rewind(state.step if saved else -1)
    # The sampler may have been started from other weights than these.
    push(accelerator.unwrap_model(model))
    if saved:
        checkpoint.load_rng(saved, accelerator)
    else:
        set_seed(config.seed, device_specific=True)
        tracker.log(0, "eval", evaluate(0))

    with tracker.progress(settings.steps, "steps", initial=state.step, leave=True) as bar:
        for step in range(state.step + 1, settings.steps + 1):
            gathered = gather_trees(
                accelerator,
                partial(_draw, prompts, config.seed, state.position),
                lambda own, attempt, step=step: collect(own, step, attempt),
                score,
                prompts=settings.prompts_per_step,
                tries=settings.dynamic_sampling,
            )
            credited = credit_trees(
                gathered.trees,
                **{name: getattr(settings, name) for name in CREDIT_KEYS},
                response_limit=config.rollout.max_response_tokens,
                global_sum=partial(global_sum, accelerator),
            )
            trees = [c.tree for c in credited]

            started = time.perf_counter()
            updates = plan_updates(credited, settings, seed=config.seed + step, pad_token=pad_token)
            metrics = policy_step(
                **parts,
                updates=updates,
                config=settings,
                temperature=config.rollout.temperature,
                pad_token=pad_token,
                reference=reference,
            )
            metrics["train/seconds"] = time.perf_counter() - started
            metrics["push/seconds"] = push(accelerator.unwrap_model(model))

            metrics = {**_reward_metrics(accelerator, gathered.scored), **gathered.metrics, **metrics}
            tracker.log(step, "train", metrics)
            if accelerator.is_main_process:
                kept = trees[: config.tracking.trees_per_step]
                stamped = [replace(tree, metadata={**tree.metadata, "step": step}) for tree in kept]
                append_trees(config.output_dir / "trees.jsonl", stamped)
            state = checkpoint.RunState(step, state.position + gathered.drawn)
            if step == settings.steps or _due(step, settings.eval_every):
                tracker.log(step, "eval", evaluate(step))
            if step == settings.steps or _due(step, settings.save_every):
                checkpoint.save(config.output_dir, state, identity, tokenizer=tokenizer, **parts)
            bar.set_postfix({"reward": f"{metrics['reward/mean']:.3f}"}, refresh=False)
            bar.update()
    checkpoint.save_model(config.output_dir / "model", accelerator=accelerator, model=model, tokenizer=tokenizer)


def _draw(prompts: Sequence[Prompt], seed: int, position: int, start: int, count: int) -> list[Prompt]:
    return [prompts[i] for i in draw_order(len(prompts), seed, position + start, count)]


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _checkpoint_to_resume(config: Config) -> Path | None:
    saved = checkpoint.latest(config.output_dir)
    if saved and not config.train.resume:
        raise CheckpointError(
            f"{config.output_dir} holds {saved.name} of a run; expected train.resume=true or another output_dir"
        )
    return saved


def _digest(prompts: Sequence[Prompt]) -> str:
    """Identity of the training data: the position of a checkpoint means nothing over other prompts."""
    if not prompts:
        raise DataError("got no prompts to train on; expected at least one")
    return hashlib.sha256("\n".join(prompt.id for prompt in prompts).encode()).hexdigest()[:16]


def _reward_metrics(accelerator: Accelerator, trees: Sequence[RolloutTree]) -> dict[str, float]:
    """Mean and population standard deviation of the reward, and mean accuracy, over all leaves of all ranks.

    `reward/flat_groups` is the share of trees whose leaves all have one reward and therefore no advantage.
    """
    reward = torch.tensor([leaf.reward for tree in trees for leaf in tree.leaves], dtype=torch.float64)
    accuracy = [math.nan if leaf.accuracy is None else leaf.accuracy for tree in trees for leaf in tree.leaves]
    flat = sum(not has_spread(tree) for tree in trees)
    count, total, squares, correct, flat, groups = global_sum(
        accelerator, [len(reward), float(reward.sum()), float(reward.square().sum()), sum(accuracy), flat, len(trees)]
    )
    mean = total / count
    return {
        "reward/mean": mean,
        "reward/accuracy": correct / count,
        "reward/std": math.sqrt(max(squares / count - mean**2, 0.0)),
        "reward/flat_groups": flat / groups,
    }
