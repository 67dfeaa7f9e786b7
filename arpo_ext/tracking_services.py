"""Trackers outside the run folder: Weights & Biases and Trackio, whose interfaces are alike.

What a resumed run logs again is dropped by the service: its steps only rise. `metrics.jsonl` is the record.
"""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arpo_ext.config import TrackingConfig
from arpo_ext.errors import ConfigError


class Services:
    """One run in every service that the config names. A run folder that is continued continues its runs there."""

    def __init__(self, folder: Path, config: TrackingConfig, settings: Mapping[str, Any]) -> None:
        """settings: the run's configuration, as plain values. ConfigError if a service is not installed."""
        name = folder.resolve().name
        self._runs = []
        if config.wandb:
            own = {"id": _run_id(folder), "dir": str(folder), "resume": "allow"}
            self._runs.append(_package("wandb").init(project=config.wandb, name=name, config=dict(settings), **own))
        if config.trackio:
            package = _package("trackio")
            # By its id, so that another folder of the same name is another run.
            name = f"{name}-{_run_id(folder)}"
            self._runs.append(package.init(project=config.trackio, name=name, config=dict(settings), resume="allow"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for run in self._runs:
            run.log(dict(values), step=step)

    def close(self) -> None:
        for run in self._runs:
            run.finish()
        self._runs = []


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f"tracking.{name} is set, but the package is not installed; expected pip install {name}"
        ) from None


def _run_id(folder: Path) -> str:
    """Made once for a run folder."""
    path = folder / "tracking_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
