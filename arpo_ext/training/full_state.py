"""Weights and optimiser states as whole tensors on rank 0 and back, however the ranks share them.

What one number of processes has gathered, any other can scatter. The exception is the optimiser under DeepSpeed, which
only DeepSpeed itself can write and read, in files of every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor


def gathered_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the unwrapped model, whole on rank 0; other ranks may get nothing. Call it on every rank.

    Shards are joined one tensor at a time and kept in the memory of the CPU; weights that are whole are not copied.
    """
    if is_deepspeed(accelerator):
        return accelerator.get_state_dict(model)
    plain = accelerator.unwrap_model(model)
    return get_model_state_dict(plain, options=_gathering(plain))


def gathered_moments(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """{"state": {parameter: {name: value}}, "param_groups": [...]}, as `gathered_weights`; {} before the first step.

    Parameters have their names in the unwrapped model.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    # torch would fill in a state with one step done.
    if not optimizer.state:
        return {}
    plain = accelerator.unwrap_model(model)
    return get_optimizer_state_dict(plain, optimizer, options=_gathering(plain))


def scatter_weights(accelerator: Accelerator, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put what rank 0 has in `weights` into the model of every rank; the same names and shapes, see `difference`."""
    plain = accelerator.unwrap_model(model)
    set_model_state_dict(plain, dict(weights), options=_scattering(accelerator))


def scatter_moments(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, Any]
) -> None:
    """Put what rank 0 has in `moments` into the optimiser of every rank; learning rates and the like stay."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    plain = accelerator.unwrap_model(model)
    set_optimizer_state_dict(plain, optimizer, dict(moments), options=_scattering(accelerator))
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def difference(model: nn.Module, weights: Mapping[str, Tensor]) -> str | None:
    """The first way in which `weights` are not those of the unwrapped `model`, None if they are."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in [*own, *weights]:
        if name not in weights:
            return f"it lacks {name}"
        if name not in own:
            return f"it has {name}"
        if own[name] != tuple(weights[name].shape):
            return f"{name} is {list(weights[name].shape)}, expected {list(own[name])}"
    return None


def is_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type is DistributedType.DEEPSPEED


def _gathering(plain: nn.Module) -> StateDictOptions:
    sharded = any(isinstance(parameter, DTensor) for parameter in plain.parameters())
    return StateDictOptions(full_state_dict=True, cpu_offload=sharded)


def _scattering(accelerator: Accelerator) -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=accelerator.num_processes > 1)
