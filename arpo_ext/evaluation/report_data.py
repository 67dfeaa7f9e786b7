"""Read a run folder: its settings and its metric series. Plain data out; no page, no chart.

A run may be killed at any moment and resumed later, so a broken line is counted, not fatal, and of a step that was
logged twice the later line counts. Whole values are kept: a NaN stays a NaN and is named in `Run.notes`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from arpo_ext.errors import DataError

CONFIG, METRICS, TREES = "config.yaml", "metrics.jsonl", "trees.jsonl"


@dataclass(frozen=True, slots=True)
class Series:
    """One metric over the steps at which it was logged, in increasing order; values may be NaN or infinite."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def finite(self) -> tuple[float, ...]:
        return tuple(value for value in self.values if math.isfinite(value))


@dataclass(frozen=True, slots=True)
class Run:
    """What `config.yaml` and `metrics.jsonl` of a run folder say.

    wall_s: seconds from the start of the run to its last record. notes: faults a reader should know of.
    """

    path: Path
    config: Mapping[str, Any]
    config_text: str
    series: Mapping[str, Series]
    wall_s: float
    notes: tuple[str, ...]

    def setting(self, key: str) -> Any:
        """The value at a dotted key of the configuration, None where it is missing."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def total(self, key: str) -> float | None:
        """Sum of a metric over all steps, None where it was never logged with a finite value."""
        series = self.series.get(key)
        return sum(series.finite) if series is not None and series.finite else None

    def steps(self, prefix: str) -> tuple[int, ...]:
        """The steps at which any metric whose name starts with `prefix` was logged."""
        found = {step for key, series in self.series.items() if key.startswith(prefix) for step in series.steps}
        return tuple(sorted(found))


@dataclass(slots=True)
class JsonLines:
    """The JSON objects of a file with the byte offset of each; `broken` counts the unreadable lines passed over.

    A last line without its line feed that does not parse is still being written and counts as no line at all.
    """

    path: Path
    broken: int = 0

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        offset = 0
        with self.path.open("rb") as file:
            for line in file:
                row = parse_object(line)
                if row is not None:
                    yield offset, row
                elif line.endswith(b"\n") and line.strip():
                    self.broken += 1
                offset += len(line)

    def note(self) -> list[str]:
        if not self.broken:
            return []
        return [f"{self.path.name}: {self.broken} unreadable {'line' if self.broken == 1 else 'lines'} passed over"]


def parse_object(line: bytes) -> dict[str, Any] | None:
    """The JSON object on a line, None if it holds anything else."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def read_run(run_dir: str | Path) -> Run:
    """Read the settings and metrics of a run folder. DataError if the folder is none."""
    path = Path(run_dir)
    if not path.is_dir():
        raise DataError(f"run folder {path} does not exist; expected a folder that a run wrote")
    if not any((path / name).is_file() for name in (CONFIG, METRICS, TREES)):
        raise DataError(f"folder {path} is no run folder; expected {CONFIG}, {METRICS} or {TREES} in it")
    config, config_text, notes = _read_config(path / CONFIG)
    series: dict[str, Series] = {}
    wall_s = 0.0
    if (path / METRICS).is_file():
        lines = JsonLines(path / METRICS)
        series, wall_s = _read_metrics(lines)
        notes += lines.note()
    else:
        notes.append(f"{METRICS} is missing: no curves and no results")
    notes += _not_finite(series)
    return Run(path.resolve(), config, config_text, series, wall_s, tuple(notes))


def _read_config(path: Path) -> tuple[dict[str, Any], str, list[str]]:
    """Settings, their text and notes. Not checked against today's keys: the report of an older run still works."""
    if not path.is_file():
        return {}, "", [f"{CONFIG} is missing: the settings of this run are unknown"]
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}, text, [f"{CONFIG} is not YAML: the settings of this run cannot be listed"]
    if not isinstance(config, dict):
        return {}, text, [f"{CONFIG} holds no mapping of sections: the settings of this run cannot be listed"]
    return config, text, []


def _read_metrics(lines: JsonLines) -> tuple[dict[str, Series], float]:
    """The series by metric name, and the greatest `time_s`."""
    values: dict[str, dict[int, float]] = {}
    wall_s = 0.0
    for _, row in lines:
        step = row.get("step")
        if not isinstance(step, int):
            lines.broken += 1
            continue
        if isinstance(row.get("time_s"), int | float):
            wall_s = max(wall_s, row["time_s"])
        for key, value in row.items():
            if key in ("step", "kind", "time_s") or isinstance(value, bool):
                continue
            if value is None or isinstance(value, int | float):
                values.setdefault(key, {})[step] = math.nan if value is None else float(value)
    series = {
        key: Series(steps=tuple(sorted(by_step)), values=tuple(by_step[step] for step in sorted(by_step)))
        for key, by_step in values.items()
    }
    return series, wall_s


def _not_finite(series: Mapping[str, Series]) -> list[str]:
    """One note for all metrics that lack a finite value at the same steps, as those of an empty update do."""
    keys: dict[tuple[int, ...], list[str]] = {}
    for key, one in series.items():
        steps = tuple(step for step, value in zip(one.steps, one.values, strict=True) if not math.isfinite(value))
        if steps:
            keys.setdefault(steps, []).append(key)
    return [
        f"no finite value at {f'step {steps[0]}' if len(steps) == 1 else f'{len(steps)} steps, first {steps[0]}'}: "
        + ", ".join(names)
        for steps, names in keys.items()
    ]
