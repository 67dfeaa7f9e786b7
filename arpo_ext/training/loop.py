"""The training loop: collect -> score -> credit -> batch -> steps -> push weights -> log -> evaluate, save.

What it leaves out, on purpose: how trees are sampled, how they are scored, how weights reach the sampler and how a
model is evaluated are arguments; there is no replay of older trees. Every process draws its own share of the prompts
and owns a sampler; `accelerate` joins the gradients.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from arpo_ext.config import Config
from arpo_ext.data import append_trees, draw_order
from arpo_ext.errors import ModelError
from arpo_ext.tracking import Tracker
from arpo_ext.training.advantages import CREDIT_KEYS, credit_trees
from arpo_ext.training.balance import balance
from arpo_ext.training.batch import plan_updates
from arpo_ext.training.checkpoint import RunState, save_model
from arpo_ext.training.gather import Collected, Gathered, gather_trees
from arpo_ext.training.keeper import Keeper
from arpo_ext.training.metrics import memory_metrics, tree_metrics
from arpo_ext.training.prepare import prepare, prepare_reference
from arpo_ext.training.schedule import set_learning_rate
from arpo_ext.training.step import global_max, global_sum, policy_step
from arpo_ext.training.termination import Terminated, Termination
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

    Terminated after a SIGTERM, once the last whole step is saved; one process stops sampling for that, several end the
    step. ModelError if a gradient is not finite: the step's trees are kept in the file that it names.
    """
    settings = config.train
    reference, identity = None, {}
    if settings.kl_coef > 0:
        # Before a checkpoint is loaded: the KL term keeps to the policy that the run began with.
        reference = copy.deepcopy(model).requires_grad_(False).eval()
        identity["reference"] = _fingerprint(reference)
    accelerator, model, optimizer = prepare(model, settings)
    if reference is not None:
        reference = prepare_reference(accelerator, reference, settings)
    pad_token = tokenizer.pad_token_id or 0
    parts = {"accelerator": accelerator, "model": model, "optimizer": optimizer}
    alone = accelerator.num_processes == 1
    keeper = Keeper(config, prompts, {**parts, "tokenizer": tokenizer}, identity)
    state = keeper.state
    tracker.rewind(state.step if keeper.resumed else -1, kinds=("train",))
    tracker.rewind(state.step if state.evaluated else state.step - 1, kinds=("eval",))
    # The sampler may have been started from other weights than these.
    push(accelerator.unwrap_model(model))
    keeper.restore_generators()

    def sampled(step: int) -> Gathered:
        return gather_trees(
            accelerator,
            partial(_draw, prompts, config.seed, state.position),
            lambda own, attempt: collect(own, step, attempt),
            score,
            prompts=settings.prompts_per_step,
            tries=settings.dynamic_sampling,
        )

    def updated(step: int, gathered: Gathered) -> tuple[list[RolloutTree], dict[str, float]]:
        """The trees with their advantages, and the metrics of the step."""
        credited = credit_trees(
            gathered.trees,
            **{name: getattr(settings, name) for name in CREDIT_KEYS},
            response_limit=config.rollout.max_response_tokens,
            global_sum=partial(global_sum, accelerator),
        )
        trees = [c.tree for c in credited]
        started = time.perf_counter()
        dealt, imbalance = balance(accelerator, credited, settings)
        rate = set_learning_rate(optimizer, step, settings)
        with _keeping_trees(
            config.output_dir / f"failed_step_{step:06d}_rank_{accelerator.process_index}.jsonl", trees
        ):
            metrics = policy_step(
                **parts,
                updates=plan_updates(dealt, settings, seed=config.seed + step, pad_token=pad_token),
                config=settings,
                temperature=config.rollout.temperature,
                pad_token=pad_token,
                reference=reference,
            )
        if not alone:
            metrics["train/rank_imbalance"] = imbalance
        metrics |= {"train/lr": rate, "train/seconds": time.perf_counter() - started}
        metrics["push/seconds"] = push(accelerator.unwrap_model(model))
        metrics |= memory_metrics(accelerator.device)
        return trees, {**tree_metrics(accelerator, gathered.scored), **gathered.metrics, **metrics}

    def evaluated() -> RunState:
        with termination.at_once(alone):
            values = evaluate(state.step)
        tracker.log(state.step, "eval", values)
        done = replace(state, evaluated=True)
        keeper.stands_at(done, values)
        return done

    with Termination() as termination, tracker.progress(settings.steps, "steps", initial=state.step, leave=True) as bar:
        try:
            if not state.evaluated:
                state = evaluated()
            for step in range(state.step + 1, settings.steps + 1):
                with termination.at_once(alone):
                    gathered = sampled(step)
                trees, metrics = updated(step, gathered)
                tracker.log(step, "train", metrics)
                if accelerator.is_main_process:
                    kept = trees[: config.tracking.trees_per_step]
                    stamped = [replace(tree, metadata={**tree.metadata, "step": step}) for tree in kept]
                    append_trees(config.output_dir / "trees.jsonl", stamped)
                last = step == settings.steps
                evaluation_due = last or _due(step, settings.eval_every)
                state = RunState(step, state.position + gathered.drawn, evaluated=not evaluation_due)
                keeper.stands_at(state, metrics)
                if evaluation_due:
                    state = evaluated()
                if last or _due(step, settings.save_every):
                    keeper.save()
                bar.set_postfix({"reward": f"{metrics['reward/mean']:.3f}"}, refresh=False)
                bar.update()
                if not alone and global_max(accelerator, [float(termination.requested)])[0]:
                    raise Terminated
        except Terminated:
            keeper.save()
            raise
    save_model(config.output_dir / "model", accelerator=accelerator, model=model, tokenizer=tokenizer)


@contextlib.contextmanager
def _keeping_trees(path: Path, trees: Sequence[RolloutTree]) -> Iterator[None]:
    """Write `trees` to `path` if the model fails on them, and name the file in the error."""
    try:
        yield
    except ModelError as error:
        path.unlink(missing_ok=True)
        append_trees(path, trees)
        raise ModelError(f"{error}; the trees of the step are in {path}") from None


def _draw(prompts: Sequence[Prompt], seed: int, position: int, start: int, count: int) -> list[Prompt]:
    return [prompts[i] for i in draw_order(len(prompts), seed, position + start, count)]


def _fingerprint(model: nn.Module) -> str:
    """Changes with any weight but costs one read of them, where a hash of the bytes would cost minutes."""
    sums = [float(parameter.detach().double().sum()) for parameter in model.parameters()]
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:16]


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
