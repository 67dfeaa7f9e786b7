"""The folder `checkpoints/` of a run: which of its checkpoints are whole, which stay, and whether there is room.

A checkpoint is written beside its place, flushed to the disk and renamed, so a folder named `step_*` is whole; the
sizes that its state.json lists are compared all the same, and what is not whole is passed over.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arpo_ext.errors import CheckpointError, ConfigError

FORMAT_VERSION = 3
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stored:
    """A whole checkpoint. metrics: finite ones of its step, by the names of metrics.jsonl."""

    path: Path
    step: int
    metrics: Mapping[str, float]


def place_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:06d}"


def stored(run_dir: Path) -> Iterator[Stored]:
    """The whole checkpoints, the latest first. Others are named in a warning."""
    for path in sorted((run_dir / "checkpoints").glob("step_*"), reverse=True):
        fault = _fault(path)
        if fault is None:
            row = read_state(path)
            yield Stored(path, row["step"], row["metrics"])
        else:
            _log.warning("checkpoint %s is incomplete (%s) and ignored", path, fault)


def latest(run_dir: Path) -> Path | None:
    """The whole checkpoint of the highest step, None if there is none."""
    return next((one.path for one in stored(run_dir)), None)


def best(run_dir: Path, metric: str) -> Path | None:
    """The whole checkpoint with the most of `metric`, the later of equal ones; None if it was measured at none."""
    measured = [one for one in stored(run_dir) if metric in one.metrics]
    return max(measured, key=lambda one: (one.metrics[metric], one.step)).path if measured else None


def prune(run_dir: Path, keep: int, metric: str) -> None:
    """Remove all checkpoints but the last `keep` and the best one."""
    whole = list(stored(run_dir))
    kept = {one.path for one in whole[:keep]} | {best(run_dir, metric)}
    for one in whole:
        if one.path not in kept:
            # Renamed first: a removal that is cut off must not leave half a checkpoint under a whole one's name.
            doomed = one.path.with_name(one.path.name + ".old")
            one.path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def write_state(folder: Path, row: dict[str, Any]) -> None:
    """`row` with the version and the size of every other file below `folder`, as its state.json."""
    sizes = {str(f.relative_to(folder)): f.stat().st_size for f in folder.rglob("*") if f.is_file()}
    text = json.dumps({"version": FORMAT_VERSION, **row, "files": sizes}, indent=1)
    (folder / "state.json").write_text(text, encoding="utf-8")


def replace_folder(temporary: Path, target: Path) -> None:
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


def check_room(run_dir: Path, size: int, keep: int) -> None:
    """ConfigError unless `run_dir` can be written and has room for the checkpoints a run keeps, of `size` bytes each.

    Those are the last `keep`, the best and the one being written, less those that are there already.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
        free = shutil.disk_usage(run_dir).free
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"output_dir {run_dir} cannot be written ({reason}); expected a writable folder") from None
    missing = max(1, keep + 2 - sum(1 for _ in stored(run_dir)))
    if free < missing * size:
        raise ConfigError(
            f"output_dir {run_dir} has {free / 1e9:.3g} GB free; expected {missing * size / 1e9:.3g} GB for "
            f"{missing} checkpoints of {size / 1e9:.3g} GB (train.keep_checkpoints={keep})"
        )


def unwritable(path: Path, error: Exception) -> CheckpointError:
    """What a failed write means for the run."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return CheckpointError(
        f"checkpoint {path} could not be written ({reason}); the run stands at the one before it and goes on from "
        "there with train.resume=true"
    )


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
        row = read_state(path)
    except (OSError, ValueError) as error:
        return f"state.json: {type(error).__name__}"
    if row.get("version") != FORMAT_VERSION:
        return f"format version {row.get('version')!r}, expected {FORMAT_VERSION}"
    for name, size in row["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or cut short"
    return None
