"""Checkpoints: everything a killed run needs to go on as if nothing had happened.

    checkpoints/step_000040/
      model/           Hugging Face folder (config, safetensors, tokenizer): usable by itself
      optimizer.pt     optimiser state
      rng.pt           python, numpy and torch generator states, one entry per rank
      state.json       step, data position, identity of the run, and the size of every file above

A checkpoint is written beside its place, flushed to the disk and renamed, so a folder of this name is whole; `latest`
checks the sizes all the same and passes over what is not. What this leaves out: sharded optimiser states (FSDP,
DeepSpeed), and deleting old checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers.utils import logging as transformers_logging

from arpo_ext.errors import CheckpointError

FORMAT_VERSION = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunState:
    """Where a run stands: optimiser steps done and prompts drawn."""

    step: int = 0
    position: int = 0


def save(
    run_dir: Path,
    state: RunState,
    identity: Mapping[str, Any],
    *,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokenizer: Any,
) -> Path:
    """Write the checkpoint of `state`; call it on every rank. identity: plain values that a resumed run must match."""
    target = run_dir / "checkpoints" / f"step_{state.step:06d}"
    temporary = target.with_name(target.name + ".tmp")
    rng = gather_object([_rng_state()])
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        _write_model(temporary / "model", accelerator.unwrap_model(model), weights, tokenizer)
        torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
        torch.save(rng, temporary / "rng.pt")
        sizes = {str(f.relative_to(temporary)): f.stat().st_size for f in temporary.rglob("*") if f.is_file()}
        row = {"version": FORMAT_VERSION, **asdict(state), "identity": dict(identity), "files": sizes}
        (temporary / "state.json").write_text(json.dumps(row, indent=1))
        _replace_folder(temporary, target)
    accelerator.wait_for_everyone()
    return target


def save_model(folder: Path, *, accelerator: Accelerator, model: nn.Module, tokenizer: Any) -> None:
    """Write a Hugging Face folder, replacing what is there only once the new one is whole. Call it on every rank."""
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        _write_model(temporary, accelerator.unwrap_model(model), weights, tokenizer)
        _replace_folder(temporary, folder)
    accelerator.wait_for_everyone()


def latest(run_dir: Path) -> Path | None:
    """The complete checkpoint of the highest step, None if there is none. Incomplete ones are named in a warning."""
    found = sorted((run_dir / "checkpoints").glob("step_*"), reverse=True)
    for path in found:
        fault = _fault(path)
        if fault is None:
            return path
        _log.warning("checkpoint %s is incomplete (%s) and ignored", path, fault)
    return None


def load(
    path: Path,
    identity: Mapping[str, Any],
    *,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> RunState:
    """Put weights and optimiser state back. CheckpointError if the checkpoint is of a run with another identity.

    Learning rate, betas and weight decay stay those of `optimizer`: a resumed run may change them.
    """
    row = json.loads((path / "state.json").read_text())
    for name, value in identity.items():
        if row["identity"].get(name) != value:
            raise CheckpointError(
                f"checkpoint {path} was made with {name} {row['identity'].get(name)!r}; this run has {value!r}"
            )
    plain = accelerator.unwrap_model(model)
    with _no_bars():
        saved = type(plain).from_pretrained(path / "model", dtype=plain.dtype)
    try:
        plain.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"checkpoint {path} holds another model ({reason}); expected the run's own") from None
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True))
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    return RunState(step=row["step"], position=row["position"])


def load_rng(path: Path, accelerator: Accelerator) -> None:
    """Put the generators back; the last thing before the loop goes on, for whatever runs between may draw from them."""
    states = torch.load(path / "rng.pt", map_location="cpu", weights_only=True)
    if len(states) != accelerator.num_processes:
        raise CheckpointError(
            f"checkpoint {path} is of {len(states)} processes; this run has {accelerator.num_processes}"
        )
    state = states[accelerator.process_index]
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _rng_state() -> dict[str, Any]:
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


def _replace_folder(temporary: Path, target: Path) -> None:
    """Flush every file of `temporary` to the disk and give it the name `target`."""
    for path in [*temporary.rglob("*"), temporary]:
        _fsync(path)
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    _fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fault(path: Path) -> str | None:
    """Why a folder is no complete checkpoint, None if it is one."""
    if path.suffix:
        return "its writing was cut off"
    try:
        row = json.loads((path / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        return f"state.json: {type(error).__name__}"
    if row.get("version") != FORMAT_VERSION:
        return f"format version {row.get('version')!r}, expected {FORMAT_VERSION}"
    for name, size in row["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or cut short"
    return None
