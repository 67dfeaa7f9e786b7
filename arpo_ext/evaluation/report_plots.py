"""Which metrics become which charts, by the names that runs log. A chart without metrics is named, not drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from markupsafe import Markup

from arpo_ext.evaluation.report_charts import Line, line_chart, stacked_chart
from arpo_ext.evaluation.report_data import Run, Series
from arpo_ext.evaluation.report_trees import AFTER_PROMPT, ELSEWHERE, Forest, add_entropy, early_and_late

COLOURS = 6  # classes c0 to c5 of report.css


@dataclass(frozen=True, slots=True)
class Plot:
    """One chart of metrics over steps: `keys` maps a metric's name to its name in the legend."""

    title: str
    y_label: str
    keys: Mapping[str, str]
    log: bool = False
    stacked: bool = False
    from_zero: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """A row of charts on the page; `missing` names the charts for which nothing was logged."""

    title: str
    charts: tuple[Markup, ...] = ()
    missing: tuple[str, ...] = ()
    about: str = ""


PLOTS: Mapping[str, tuple[Plot, ...]] = {
    "Learning": (
        Plot("Reward of the rollouts", "reward", {"reward/mean": "mean", "reward/std": "standard deviation"}),
        Plot("Accuracy of the rollouts", "share correct", {"reward/accuracy": "accuracy"}),
    ),
    "Rollouts": (
        Plot("Tool calls per step", "calls", {"rollout/tool_calls": "tool calls"}, from_zero=True),
        Plot(
            "Tool calls per path",
            "calls per path",
            {"rollout/tool_calls_per_path": "tool calls per path"},
            from_zero=True,
        ),
        Plot("Sampled tokens per step", "tokens", {"rollout/sampled_tokens": "sampled tokens"}, from_zero=True),
        Plot(
            "Forks per step",
            "paths",
            {"rollout/forks": "forks", "rollout/fresh_paths": "started from the prompt"},
            from_zero=True,
        ),
    ),
    "Optimiser": (
        Plot("Policy loss", "loss", {"train/loss": "loss"}),
        Plot("Gradient norm", "L2 norm, before clipping", {"train/grad_norm": "gradient norm"}),
        Plot("Token entropy", "nats per token", {"train/entropy": "entropy"}),
        Plot(
            "Log-probability gap, sampler to trainer",
            "nats, log scale",
            {"train/logprob_gap_mean": "mean", "train/logprob_gap_max": "largest"},
            log=True,
        ),
        Plot("Clipped tokens", "share of tokens", {"train/clip_fraction": "clipped"}),
        Plot("Largest probability ratio", "new / old", {"train/ratio_max": "largest ratio"}),
    ),
    "Time": (
        Plot(
            "Time per step",
            "seconds",
            {"rollout/seconds": "rollouts", "train/seconds": "training", "push/seconds": "weight push"},
            stacked=True,
        ),
        Plot(
            "Inside the rollouts",
            "seconds",
            {"rollout/decode_seconds": "decoding", "rollout/tool_wait_seconds": "waiting for tools"},
            from_zero=True,
        ),
    ),
    "Supervised start": (
        Plot("Loss of the supervised start", "nats per token", {"sft/loss": "loss"}),
        Plot("Learning rate", "learning rate", {"sft/lr": "learning rate"}),
        Plot("Speed", "tokens per second", {"sft/tokens_per_s": "tokens per second"}),
    ),
}


def panels(run: Run) -> list[Panel]:
    """All metric charts of the page, evaluation accuracy first."""
    drawn = []
    for title, plots in PLOTS.items():
        charts = [chart for plot in plots if (chart := _draw(run, plot)) is not None]
        missing = [plot.title for plot in plots if not any(key in run.series for key in plot.keys)]
        if title == "Learning":
            accuracy = _eval_chart(run)
            charts[:0] = [accuracy] if accuracy is not None else []
            missing[:0] = ["Accuracy on held-out questions"] if accuracy is None else []
        drawn.append(Panel(title, tuple(charts), tuple(missing)))
    return drawn


def _draw(run: Run, plot: Plot) -> Markup | None:
    found = [(run.series[key], name) for key, name in plot.keys.items() if key in run.series]
    if not found:
        return None
    lines = [_line(name, series, index) for index, (series, name) in enumerate(found)]
    if plot.stacked:
        return stacked_chart(plot.title, lines, y_label=plot.y_label)
    return line_chart(plot.title, lines, y_label=plot.y_label, log=plot.log, y_low=0.0 if plot.from_zero else None)


def _line(name: str, series: Series, colour: int, dashed: bool = False) -> Line:
    few = len(series.steps) <= 12
    return Line(name, series.steps, series.values, colour % COLOURS, dashed=dashed, marks=few)


def _eval_chart(run: Run) -> Markup | None:
    """Accuracy of every evaluation set: one colour a set, dashed where decoding was greedy."""
    lines, colours = [], {}
    for key, series in run.series.items():
        parts = key.split("/")
        if parts[0] == "eval" and parts[-1] == "accuracy" and len(parts) >= 4:
            name, mode = "/".join(parts[1:-2]), parts[-2]
            colour = colours.setdefault(name, len(colours))
            lines.append(_line(f"{name}, {mode}", series, colour, dashed=mode == "greedy"))
    if not lines:
        return None
    return line_chart("Accuracy on held-out questions", lines, y_label="share correct", y_low=0.0, y_high=1.0)


@dataclass(frozen=True, slots=True)
class EntropyTable:
    """Mean entropy after the prompt and after each tool: rows of (group, then per phase the mean and the count)."""

    phases: tuple[str, ...] = ()
    rows: tuple[tuple[str, tuple[tuple[float | None, int], ...]], ...] = field(default=())


def entropy_panel(forest: Forest) -> tuple[Panel, EntropyTable]:
    """Mean token entropy by position after the prompt and after each tool result, for early and for late steps."""
    phases = [(name, add_entropy(trees)) for name, trees in early_and_late(forest)]
    if not any(groups for _, groups in phases):
        return Panel("Entropy around tool calls"), EntropyTable()
    names = list(dict.fromkeys(group for _, groups in phases for group in groups))
    names.sort(key=lambda name: (name == ELSEWHERE, name != AFTER_PROMPT, name))
    top = max(mean for _, groups in phases for cells in groups.values() for mean, _ in cells.values())
    charts = [_entropy_chart(phase, groups, names, top) for phase, groups in phases]
    rows = tuple((name, tuple(_total(groups.get(name, {})) for _, groups in phases)) for name in names)
    return Panel("Entropy around tool calls", tuple(charts)), EntropyTable(tuple(name for name, _ in phases), rows)


def _entropy_chart(
    phase: str, groups: Mapping[str, Mapping[int, tuple[float, int]]], names: list[str], top: float
) -> Markup:
    last = max((position for cells in groups.values() for position in cells), default=1)
    lines = []
    for name, cells in groups.items():
        colour = names.index(name) % COLOURS
        if name == ELSEWHERE:
            mean, _ = cells[0]
            lines.append(Line(name, (1.0, float(max(last, 2))), (mean, mean), colour, dashed=True))
        else:
            positions = tuple(cells)
            lines.append(Line(name, positions, tuple(cells[at][0] for at in positions), colour, marks=True))
    title = phase[:1].upper() + phase[1:]
    return line_chart(title, lines, x_label="token after the boundary", y_label="nats", y_low=0.0, y_high=top)


def _total(cells: Mapping[int, tuple[float, int]]) -> tuple[float | None, int]:
    count = sum(n for _, n in cells.values())
    return (sum(mean * n for mean, n in cells.values()) / count if count else None), count
