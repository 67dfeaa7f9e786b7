"""The processes that were launched, and the model over them. What the model becomes:

    python, one process                             itself
    torchrun or accelerate launch                   DDP
    the same with sharding=fsdp2                    FSDP2: every layer and the whole through `fully_shard`
    accelerate launch --use_fsdp --fsdp_version 2   the same on a CPU; on a GPU as accelerate's plugin says
    accelerate launch --use_deepspeed               DeepSpeed's engine, ZeRO as its configuration says

On a CPU accelerate turns FSDP into DDP without a word, and takes torchrun's processes for separate runs. What needs a
GPU, accelerate's own FSDP2 and DeepSpeed, is not yet measured.

Wrappers gather weights and reduce gradients in hooks of the model's own forward: call `model(...)`, never a part of it.
All ranks must run equally many forwards, else those with more wait for ever: fill up with `batch.weightless_batch`.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from arpo_ext.config import SftConfig, TrainConfig
from arpo_ext.errors import ConfigError, ModelError
from arpo_ext.training.forward import prepare_model

# A rank that has its trees waits for the slowest rollout of all; one that died is noticed by the launcher, not by this.
RANK_TIMEOUT = timedelta(hours=12)

Batch = TypeVar("Batch")


def start_processes() -> Accelerator:
    """Join the processes that were launched, if it is not done yet.

    Before a vLLM engine starts in any of them: the engine makes a group of its own process alone where it finds none,
    which the trainer would then take for all there is.
    """
    cpu = not torch.accelerator.is_available()
    group = {"timeout": RANK_TIMEOUT}
    if cpu and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        # accelerate knows DeepSpeed only beside its own choice of a backend for a GPU.
        cpu, group["backend"] = False, "gloo"
    return Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(**group)])


def prepare(
    model: nn.Module, settings: TrainConfig | SftConfig
) -> tuple[Accelerator, nn.Module, torch.optim.Optimizer]:
    """Accelerator, and the model and its AdamW wrapped for however many processes were launched.

    ModelError if the settings want trees packed that the model cannot read, ConfigError if launch and settings want
    different wrappers.
    """
    model.train()
    prepare_model(model, packed=isinstance(settings, TrainConfig) and settings.packing == "tree")
    accelerator = start_processes()
    own_sharding = _shards_itself(accelerator, settings)
    if own_sharding:
        _shard(accelerator, model)
    # After sharding, which puts other parameters into the model.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    if own_sharding:
        return accelerator, model, optimizer
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        # What DeepSpeed would read off a data loader, and does itself while it steps.
        known = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": settings.grad_clip}
        accelerator.state.deepspeed_plugin.deepspeed_config.update(known)
    return accelerator, *accelerator.prepare(model, optimizer)


def prepare_reference(accelerator: Accelerator, reference: nn.Module, settings: TrainConfig) -> nn.Module:
    """The reference model, in evaluation mode, where the policy is: sharded if that is."""
    prepare_model(reference, packed=settings.packing == "tree")
    if _shards_itself(accelerator, settings):
        _shard(accelerator, reference)
        return reference
    return accelerator.prepare_model(reference, evaluation_mode=True)


def until_synchronised(accelerator: Accelerator, model: nn.Module, batches: Sequence[Batch]) -> Iterator[Batch]:
    """The batches of one update, in a context where gradients cross ranks with the last of them only.

    Run forward and `backward_sum` inside the loop. Every rank must bring the same number of batches. Until the last one
    FSDP2 holds the gradients of all weights, not of its share.
    """
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        # DeepSpeed steps inside the backward for which this is set.
        accelerator.sync_gradients = last
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
            yield batch
        else:
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                yield batch


def backward_sum(accelerator: Accelerator, loss: Tensor) -> None:
    """Add the gradient of the sum of `loss` over the ranks; all wrappers take the mean, hence the factor."""
    accelerator.backward(loss * accelerator.num_processes)


def apply_gradients(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, grad_clip: float
) -> float:
    """Clip, step, clear. Returns the norm before clipping, over all ranks.

    ModelError if it is not finite; the weights are untouched then, but with DeepSpeed, which has stepped already.
    """
    norm = accelerator.clip_grad_norm_(model.parameters(), grad_clip)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not math.isfinite(norm):
        raise ModelError(
            f"the gradient norm is {norm}; expected a finite one (lower the learning rate or check the data)"
        )
    optimizer.step()
    optimizer.zero_grad()
    return norm


def _shards_itself(accelerator: Accelerator, settings: TrainConfig | SftConfig) -> bool:
    """Whether the model goes through `fully_shard` here."""
    asked = settings.sharding == "fsdp2"
    kind = accelerator.distributed_type
    if kind is DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ConfigError("accelerate was launched with FSDP version 1; expected --fsdp_version 2")
    if asked and kind is DistributedType.DEEPSPEED:
        raise ConfigError("sharding is 'fsdp2' and accelerate was launched with DeepSpeed; expected one of the two")
    # On a CPU accelerate drops the launcher's wish.
    asked |= os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return asked and accelerator.num_processes > 1 and kind is not DistributedType.FSDP


def _shard(accelerator: Accelerator, model: nn.Module) -> None:
    """Every layer by itself, so that one at a time is whole, and what is left, such as the embedding, together."""
    options = {"mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,))}
    if accelerator.mixed_precision == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    layers = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, **options)
    fully_shard(model, **options)
