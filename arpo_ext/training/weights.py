"""The weights of a model under training, as a sampler wants them pushed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, copy) of every weight, under the names of the Hugging Face checkpoint.

    The copy is detached: an engine may keep it while training goes on. A tied weight comes once, under the name of the
    tensor it is tied to (no `lm_head.weight` beside tied embeddings), because engines that tie refuse the second name.
    Wrappers of accelerate, DDP and torch.compile are looked through. Sharded tensors are gathered: all ranks must call.
    """
    model = extract_model_from_parallel(model)
    seen: set[tuple[object, ...]] = set()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            identity = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape)
            if identity in seen:
                continue
            seen.add(identity)
            gathered = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            yield name, gathered.detach().clone()
