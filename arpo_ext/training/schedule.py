"""The learning rate of a step: a function of the step alone, so that a resumed run needs no state for it."""

from __future__ import annotations

from typing import Protocol

import torch


class Schedule(Protocol):
    """The part of a config section that says how the rate moves."""

    lr: float
    steps: int
    warmup_steps: int
    decay_fraction: float


def learning_rate(step: int, settings: Schedule) -> float:
    """Rate of step 1 to `steps`: up linearly over `warmup_steps`, level, down linearly over the last part."""
    decay_steps = settings.decay_fraction * settings.steps
    up = step / settings.warmup_steps if settings.warmup_steps else 1.0
    down = (settings.steps - step + 1) / decay_steps if decay_steps else 1.0
    return settings.lr * min(1.0, up, down)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, settings: Schedule) -> float:
    """Give `optimizer` the rate of `step`, and return it."""
    rate = learning_rate(step, settings)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
