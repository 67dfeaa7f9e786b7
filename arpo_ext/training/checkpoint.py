"""Checkpoints: everything a killed run needs to go on as if nothing had happened.

    checkpoints/step_000040/
      model/           Hugging Face folder (config, safetensors, tokenizer): usable by itself
      optimizer.pt     optimiser state by parameter name, {} before the first step; under DeepSpeed deepspeed/ instead
      rng.pt           python, numpy and torch generator states, one entry per rank
      state.json       step, data position, identity, configuration and metrics, and the size of every file above

Tensors are whole, so that another number of processes can go on, sharded or not (`full_state`). Which checkpoints are
whole, and which stay, is in `checkpoint_folder`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from arpo_ext.errors import CheckpointError
from arpo_ext.training.checkpoint_folder import place_of, read_state, replace_folder, unwritable, write_state
from arpo_ext.training.full_state import (
    difference,
    gathered_moments,
    gathered_weights,
    is_deepspeed,
    scatter_moments,
    scatter_weights,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunState:
    """Where a run stands: optimiser steps done, prompts drawn, and whether an evaluation due at that step was done."""

    step: int = 0
    position: int = 0
    evaluated: bool = True


def save(
    run_dir: Path,
    state: RunState,
    identity: Mapping[str, Any],
    *,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokenizer: Any,
    config: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    rng: Mapping[str, Any] | None = None,
) -> Path:
    """Write the checkpoint of `state`; call it on every rank. CheckpointError on all of them if it cannot be written.

    identity: plain values that a resumed run must match. config: plain values, nested by section, whose changes a
    resumed run reports. metrics: of the step; those that are not finite are left out. rng: this rank's generators as
    `rng_state` gave them, None: as they are now.
    """
    target = place_of(run_dir, state.step)
    states = gather_object([rng_state() if rng is None else rng])
    weights = gathered_weights(accelerator, model)
    moments = None if is_deepspeed(accelerator) else gathered_moments(accelerator, model, optimizer)

    def write_together(folder: Path) -> None:
        if moments is None:
            model.save_checkpoint(str(folder / "deepspeed"), tag="state", save_latest=False)

    def write(folder: Path) -> None:
        _write_model(folder / "model", accelerator.unwrap_model(model), weights, tokenizer)
        if moments is not None:
            torch.save(moments, folder / "optimizer.pt")
        torch.save(states, folder / "rng.pt")
        finite = {name: value for name, value in (metrics or {}).items() if math.isfinite(value)}
        known = {"identity": dict(identity), "config": dict(config or {}), "metrics": finite}
        write_state(folder, {**asdict(state), **known})

    _write_whole(accelerator, target, write, write_together)
    return target


def save_model(folder: Path, *, accelerator: Accelerator, model: nn.Module, tokenizer: Any) -> None:
    """Write a Hugging Face folder, replacing what is there only once the new one is whole. Call it on every rank."""
    weights = gathered_weights(accelerator, model)

    def write(temporary: Path) -> None:
        _write_model(temporary, accelerator.unwrap_model(model), weights, tokenizer)

    _write_whole(accelerator, folder, write)


def _write_whole(
    accelerator: Accelerator,
    target: Path,
    write: Callable[[Path], None],
    write_together: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Let all ranks write beside `target`, then the main process, and rename. Every rank learns of a fault."""
    temporary = target.with_name(target.name + ".tmp")

    def make() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def finish() -> None:
        write(temporary)
        replace_folder(temporary, target)

    everybody, main = True, accelerator.is_main_process
    for acts, action in ((main, make), (everybody, lambda: write_together(temporary)), (main, finish)):
        fault = None
        if acts:
            try:
                action()
            except Exception as error:  # noqa: BLE001  each library has errors of its own for a full disk
                fault = unwritable(target, error)
        # Told to all, lest those that can write wait for one that cannot.
        faults = [own for own in gather_object([fault]) if own is not None]
        if faults:
            if main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise faults[0]


def load(
    path: Path,
    identity: Mapping[str, Any],
    *,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Mapping[str, Any] | None = None,
) -> RunState:
    """Put weights and optimiser state back; call it on every rank, rank 0 reads the files.

    CheckpointError if the checkpoint is of a run with another identity, or of another model.

    Learning rate, betas and weight decay stay those of `optimizer`: a resumed run may change them. Every key of
    `config` that differs from the checkpoint's is named in a warning.
    """
    row = read_state(path)
    for name, value in identity.items():
        if row["identity"].get(name) != value:
            raise CheckpointError(
                f"checkpoint {path} was made with {name} {row['identity'].get(name)!r}; this run has {value!r}"
            )
    for key, before, now in changed_keys(row["config"], config or row["config"]):
        _log.warning("%s was made with %s=%r; this run has %r", path.name, key, before, now)
    found: list[Any] = [None, False]
    weights, moments = {}, {}
    if accelerator.is_main_process:
        try:
            weights, moments = _read(path, accelerator, model)
            found[1] = bool(moments)
        except CheckpointError as error:
            found[0] = error
    # Told to all, lest the others wait for weights that do not come.
    fault, stepped = broadcast_object_list(found)
    if fault is not None:
        raise fault
    if is_deepspeed(accelerator):
        model.load_checkpoint(str(path / "deepspeed"), tag="state")
    else:
        scatter_weights(accelerator, model, weights)
    if stepped:
        scatter_moments(accelerator, model, optimizer, moments)
    return RunState(step=row["step"], position=row["position"], evaluated=row["evaluated"])


def _read(path: Path, accelerator: Accelerator, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and optimiser state of a checkpoint for this model, both empty where DeepSpeed reads its own."""
    own = (path / "deepspeed").is_dir()
    if own != is_deepspeed(accelerator):
        got, expected = ("DeepSpeed", "the same") if own else ("DDP or FSDP2", "either, not DeepSpeed")
        raise CheckpointError(f"checkpoint {path} is of a run under {got}; expected this run to be under {expected}")
    if own:
        return {}, {}
    plain = accelerator.unwrap_model(model)
    with _no_bars():
        weights = AutoModelForCausalLM.from_pretrained(path / "model", dtype=plain.dtype).state_dict()
    reason = difference(plain, weights)
    if reason is not None:
        raise CheckpointError(f"checkpoint {path} holds another model ({reason}); expected the run's own")
    return weights, torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)


def changed_keys(before: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, earlier value, value now) of every leaf that differs; a missing one is None."""
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        if before != now:
            yield prefix, before, now
        return
    for key in [*before, *(key for key in now if key not in before)]:
        yield from changed_keys(before.get(key), now.get(key), f"{prefix}.{key}" if prefix else str(key))


def load_rng(path: Path, accelerator: Accelerator) -> bool:
    """Put the generators back; the last thing before the loop goes on, for whatever runs between may draw from them.

    False, and nothing is put back, if the checkpoint is of another number of processes.
    """
    states = torch.load(path / "rng.pt", map_location="cpu", weights_only=True)
    if len(states) != accelerator.num_processes:
        return False
    state = states[accelerator.process_index]
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    return True


def rng_state() -> dict[str, Any]:
    """The generators of this process, as `load_rng` puts them back."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        # Plain numbers, so that the file loads without unpickling arbitrary objects.
        "numpy": (str(name), keys.tolist(), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _write_model(folder: Path, model: nn.Module, weights: dict[str, torch.Tensor], tokenizer: Any) -> None:
    with _no_bars():
        model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the library's own progress bars out of the run's."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
