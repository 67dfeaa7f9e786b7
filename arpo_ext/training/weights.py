"""The weights of a model under training, as a sampler wants them pushed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, copy) of every weight, under the names of the Hugging Face checkpoint.

    The copy is detached: an engine may keep it while training goes on. A tied weight comes once, under the name of the
    tensor it is tied to (no `lm_head.weight` beside tied embeddings), because engines that tie refuse the second name.
    Wrappers of accelerate, DDP and torch.compile are looked through. Sharded weights (FSDP2, ZeRO-3) are gathered one
    at a time, as they are asked for: all ranks must go through all of them.
    """
    model = extract_model_from_parallel(model)
    seen: set[int] = set()
    # Parameters themselves, not views: the same on every rank, where a share may be empty and have no address.
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        with torch.no_grad(), _gathered(tensor):
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def _gathered(tensor: Tensor) -> contextlib.AbstractContextManager:
    """While inside, a weight that ZeRO-3 has dealt to the ranks is whole."""
    if not hasattr(tensor, "ds_id"):
        return contextlib.nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters([tensor])
