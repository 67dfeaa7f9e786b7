"""What a run records: `metrics.jsonl`, TensorBoard events, what services get, and progress bars.

`metrics.jsonl` holds one flat object a line: {"step", "kind", "time_s", **values}. It is flushed line by line, so a
killed run keeps every finished step, and `rewind` drops what lies beyond the checkpoint a run resumes from.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from arpo_ext.config import TrackingConfig
from arpo_ext.tracking_services import Services

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

Kind = Literal["sft", "train", "eval", "rollout"]
KINDS = get_args(Kind)


class Tracker:
    """Writer of a run folder's metrics. A context manager; `close` may be called twice.

    Only rank 0 of a distributed run (environment variable RANK) writes and shows anything.
    """

    def __init__(
        self, output_dir: str | Path, config: TrackingConfig, settings: Mapping[str, Any] | None = None
    ) -> None:
        """settings: the run's whole configuration as plain values, shown by the services."""
        self.output_dir = Path(output_dir)
        self.config = config
        self.main = os.environ.get("RANK", "0") == "0"
        self._started_s = time.monotonic()
        self._writers: dict[str, SummaryWriter] = {}
        self._purge_step: dict[str, int] = {}
        if self.main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self._services = Services(self.output_dir, config, settings or {})
            self._metrics = open(self.output_dir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def log(self, step: int, kind: Kind, values: Mapping[str, float]) -> None:
        """Record `values` at `step`. A value that is not finite is written as null and left out of TensorBoard."""
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
        if not self.main:
            return
        finite = {name: _finite(value) for name, value in values.items()}
        row = {"step": step, "kind": kind, "time_s": round(time.monotonic() - self._started_s, 3), **finite}
        self._metrics.write(json.dumps(row, allow_nan=False) + "\n")
        self._metrics.flush()
        if self.config.tensorboard:
            writer = self._writer(kind)
            for name, value in finite.items():
                if value is not None:
                    writer.add_scalar(name, value, step)
            writer.flush()
        self._services.log(step, {name: value for name, value in finite.items() if value is not None})

    def rewind(self, step: int, kinds: tuple[Kind, ...] = ("train", "eval")) -> None:
        """Forget what `kinds` recorded beyond `step` (-1: everything), so that a run can write those steps again.

        The trees of `trees.jsonl` whose metadata names a later step go too, and `time_s` continues from the last line
        that is kept. Half a line, left by a kill, is dropped. Call it before the first `log`.
        """
        if not self.main:
            return
        self._metrics.close()
        path = self.output_dir / "metrics.jsonl"
        times_s = [0.0]

        def keep(row: dict[str, Any]) -> bool:
            kept = row["kind"] not in kinds or row["step"] <= step
            times_s.append(row["time_s"] if kept else 0.0)
            return kept

        _keep_lines(path, keep)
        self._metrics = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._started_s = time.monotonic() - max(times_s)
        self._purge_step.update(dict.fromkeys(kinds, step + 1))
        trees = self.output_dir / "trees.jsonl"
        if "train" in kinds and trees.exists():
            _keep_lines(trees, lambda row: row.get("metadata", {}).get("step", step) <= step)

    def progress(self, total: int | None, label: str, *, initial: int = 0, leave: bool = False) -> tqdm:
        """A tqdm bar with rate and, where `total` is known, the time left. Silent if the config or the rank says so."""
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        return tqdm(
            total=total,
            desc=label,
            initial=initial,
            leave=leave,
            disable=not (self.config.progress and self.main),
            dynamic_ncols=terminal,
            # A log file gets a new line for every refresh.
            mininterval=0.2 if terminal else 10.0,
        )

    def close(self) -> None:
        if self.main:
            self._metrics.close()
            self._services.close()
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _writer(self, kind: Kind) -> SummaryWriter:
        """One TensorBoard run per kind: purging after a resume works per run, and sft counts its own steps."""
        if kind not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            self._writers[kind] = SummaryWriter(
                str(self.output_dir / "tensorboard" / kind), purge_step=self._purge_step.get(kind)
            )
        return self._writers[kind]


def _finite(value: float) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a JSONL file with the rows `keep` accepts; an unfinished line is dropped."""
    temporary = path.with_name(path.name + ".tmp")
    with open(path, "rb") as source, open(temporary, "wb") as target:
        for line in source:
            try:
                row = json.loads(line)
            except ValueError:  # half a line, perhaps cut inside a character
                continue
            if keep(row):
                target.write(line if line.endswith(b"\n") else line + b"\n")
        target.flush()
        os.fsync(target.fileno())
    os.replace(temporary, path)
