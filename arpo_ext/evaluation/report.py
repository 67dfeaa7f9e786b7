"""Write `report.html`: everything a run folder tells, on one page that needs no network and no other file.

What stands in it came partly from a model and from tools, so it is treated as hostile: the template escapes every
value, the tree viewer sets text and never markup, and the page's content policy runs only the script it was written
with.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from arpo_ext.evaluation.report_data import Run, read_run
from arpo_ext.evaluation.report_plots import entropy_panel, panels
from arpo_ext.evaluation.report_table import MEASURES, eval_rows, final_table, number, steps_done, totals, with_error
from arpo_ext.evaluation.report_trees import POSITIONS, Forest, add_tools, read_forest
from arpo_ext.evaluation.report_view import shade_limit, views

__all__ = ["final_table", "write_report"]

REPORT = "report.html"
HEAD = (
    *("model.path", "rollout.policy", "rollout.paths", "rollout.initial_paths", "rollout.probe_tokens"),
    *("train.estimator", "train.credit", "train.lr", "seed"),
)
SETTINGS = {
    "Model": ("model.path", "model.dtype", "seed"),
    "Data": ("data.train", "data.eval", "tools"),
    "Rollout": (
        *("rollout.policy", "rollout.paths", "rollout.initial_paths", "rollout.branch_width"),
        *("rollout.probe_tokens", "rollout.base", "rollout.weight", "rollout.threshold", "rollout.baseline"),
        *("rollout.temperature", "rollout.max_tool_calls", "rollout.max_response_tokens"),
    ),
    "Training": (
        *("train.steps", "train.prompts_per_step", "train.updates_per_step", "train.lr", "train.estimator"),
        *("train.credit", "train.loss_scale", "train.clip_low", "train.clip_high", "train.old_logprob"),
    ),
    "Supervised start": ("sft.data", "sft.steps", "sft.batch_size", "sft.lr"),
}


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run folder, from its config.yaml, metrics.jsonl and trees.jsonl, and return its path.

    Each of the three may be missing; the page then says what it cannot show. The file appears at once and whole.
    DataError if `run_dir` is no run folder.
    """
    run = read_run(run_dir)
    page = render(run, read_forest(run.path))
    target = run.path / REPORT
    draft = target.with_suffix(".html.part")
    draft.write_text(page, encoding="utf-8", errors="replace")
    os.replace(draft, target)
    return target


def render(run: Run, forest: Forest) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("arpo_ext.evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(number=number, count=lambda value: f"{value:,.0f}")
    environment.globals["with_error"] = with_error
    script = "".join(_source(environment, name) for name in ("report_charts.js", "report_tree.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shown = views(forest)
    entropy, entropy_table = entropy_panel(forest)
    return environment.get_template("report.html.j2").render(
        run=run,
        notes=[*run.notes, *forest.notes],
        style=Markup(_source(environment, "report.css")),
        script=Markup(script),
        script_hash=digest,
        head=_named(run, HEAD),
        settings={section: named for section, keys in SETTINGS.items() if (named := _named(run, keys))},
        tiles=_tiles(run),
        measures=MEASURES,
        evaluations=eval_rows(run),
        panels=panels(run),
        entropy=entropy,
        entropy_table=entropy_table,
        positions=POSITIONS,
        tools=_tool_rows(forest),
        stored=len(forest.trees),
        views=shown,
        shade_limit=shade_limit(shown),
        metrics=_metric_rows(run),
    )


def _source(environment: Environment, name: str) -> str:
    """A packaged file as it stands, not as a template."""
    return environment.loader.get_source(environment, name)[0]


def _named(run: Run, keys: Sequence[str]) -> list[tuple[str, str]]:
    """Those of the settings that the run has, each under its key."""
    return [(key, _setting_text(run.setting(key))) for key in keys if run.setting(key) is not None]


def _setting_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(str(key) for key, inner in value.items() if inner is not None) or "none"
    return str(value)


def _tiles(run: Run) -> list[tuple[str, str]]:
    """The run's figures for the head of the page: a number and what it counts."""
    steps = [(f"{n:,}", f"{kind} {'step' if n == 1 else 'steps'}") for kind, n in steps_done(run).items()]
    return steps + [(text, label) for label, text in totals(run).items()]


def _tool_rows(forest: Forest) -> list[dict[str, Any]]:
    rows = []
    for name, facts in add_tools(forest.trees).items():
        seconds = sorted(facts.seconds)
        rows.append(
            {
                "name": name,
                "calls": facts.calls,
                "failed": facts.failed,
                "cached": facts.cached,
                "mean": sum(seconds) / len(seconds) if seconds else None,
                "p95": seconds[math.ceil(0.95 * len(seconds)) - 1] if seconds else None,
            }
        )
    return rows


def _metric_rows(run: Run) -> list[dict[str, Any]]:
    """Every metric that was logged, with the ends and the range of its finite values."""
    rows = []
    for key in sorted(run.series):
        finite = run.series[key].finite
        texts = [f"{value:.5g}" for value in (finite[0], finite[-1], min(finite), max(finite))] if finite else ["-"] * 4
        rows.append({"name": key, "points": len(run.series[key].steps), "texts": texts})
    return rows
