"""The final table of a run: each evaluation before and after training, and what the training cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from arpo_ext.evaluation.report_data import Run, Series, read_run

MEASURES = {
    "accuracy": "accuracy",
    "reward": "reward",
    "tool_calls_per_question": "tool calls per question",
    "sampled_tokens": "sampled tokens",
    "format_ok": "format ok",
}
TOTALS = {
    "rollout/tool_calls": "tool calls",
    "rollout/sampled_tokens": "sampled tokens",
    "rollout/forks": "forks",
    "rollout/fresh_paths": "fresh paths",
}
SECONDS = {
    "rollout/seconds": "time of rollouts",
    "train/seconds": "time of training",
    "push/seconds": "time of weight pushes",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """A measure at the first and at the last evaluation; `before` is None where there was only one."""

    before: float | None
    after: float | None
    before_error: float | None = None
    after_error: float | None = None


@dataclass(frozen=True, slots=True)
class EvalRow:
    """One evaluation set in one mode: the steps compared and a cell for each of MEASURES."""

    name: str
    mode: str
    first_step: int
    last_step: int
    cells: Mapping[str, Cell]


def eval_rows(run: Run) -> list[EvalRow]:
    """One row for each `eval/<set>/<mode>/...` in the metrics, in the order in which they were first logged."""
    groups: dict[tuple[str, str], dict[str, Series]] = {}
    for key, series in run.series.items():
        parts = key.split("/")
        if len(parts) >= 4 and parts[0] == "eval":
            groups.setdefault(("/".join(parts[1:-2]), parts[-2]), {})[parts[-1]] = series
    return [_eval_row(name, mode, measures) for (name, mode), measures in groups.items()]


def _eval_row(name: str, mode: str, measures: Mapping[str, Series]) -> EvalRow:
    steps = sorted({step for series in measures.values() for step in series.steps})
    first, last = steps[0], steps[-1]
    cells = {}
    for measure in MEASURES:
        before, after = (_at(measures.get(measure), step) for step in (first, last))
        before_error, after_error = (_at(measures.get(f"{measure}_se"), step) for step in (first, last))
        if first == last:
            before = before_error = None
        cells[measure] = Cell(before, after, before_error, after_error)
    return EvalRow(name=name, mode=mode, first_step=first, last_step=last, cells=cells)


def _at(series: Series | None, step: int) -> float | None:
    if series is None or step not in series.steps:
        return None
    value = series.values[series.steps.index(step)]
    return value if math.isfinite(value) else None


def steps_done(run: Run) -> dict[str, int]:
    """How many steps of each kind the run logged, the kinds it did not do left out."""
    train, rollout, sft = (run.steps(prefix) for prefix in ("train/", "rollout/", "sft/"))
    # Training logs rollout metrics of its own; without training they are a bare rollout.
    counts = {"training": len(train), "rollout": 0 if train else len(rollout), "supervised": sft[-1] if sft else 0}
    return {kind: count for kind, count in counts.items() if count}


def totals(run: Run) -> dict[str, str]:
    """What all steps together did and took, as text by label; what was never logged is left out.

    Labels are the values of TOTALS (counts) and of SECONDS (durations, "12.3 s"), and "wall time".
    """
    texts = {}
    for key, label in {**TOTALS, **SECONDS}.items():
        value = run.total(key)
        if value is not None:
            texts[label] = f"{value:,.1f} s" if key in SECONDS else f"{value:,.0f}"
    return {**texts, "wall time": f"{run.wall_s:,.1f} s"} if run.wall_s else texts


def number(value: float | None) -> str:
    """A value as the tables print it: three decimals below 100, whole with separators from 1000 on."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == int(value) and abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"


def with_error(value: float | None, error: float | None) -> str:
    """A value and, where known, its standard error."""
    return number(value) if value is None or error is None else f"{number(value)} ±{number(error)}"


def final_table(run_dir: str | Path) -> str:
    """The results of a run as plain text: one line per evaluation set and mode, then the work and its cost.

    `a -> b` is the first and the last evaluation; `±` is one standard error. DataError if `run_dir` is no run folder.
    """
    run = read_run(run_dir)
    rows = eval_rows(run)
    lines = _eval_lines(rows) if rows else ["no evaluation in this run"]
    for kind, count in steps_done(run).items():
        lines.append(f"{kind}: {count:,} {'step' if count == 1 else 'steps'}")
    lines += [f"{label}: {text}" for label, text in totals(run).items()]
    loss = run.series.get("sft/loss")
    if loss is not None and loss.finite:
        lines.append(f"loss of the supervised start: {number(loss.finite[0])} -> {number(loss.finite[-1])}")
    return "\n".join(lines)


def _eval_lines(rows: list[EvalRow]) -> list[str]:
    table = [["set", "mode", "steps", *MEASURES.values()]]
    for row in rows:
        steps = str(row.last_step) if row.first_step == row.last_step else f"{row.first_step} -> {row.last_step}"
        table.append([row.name, row.mode, steps, *(_cell_text(row.cells[measure]) for measure in MEASURES)])
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in table]
    return [line.rstrip() for line in [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]]


def _cell_text(cell: Cell) -> str:
    after = with_error(cell.after, cell.after_error)
    return after if cell.before is None else f"{with_error(cell.before, cell.before_error)} -> {after}"
