"""The rows of a run as a picture: for every case the time of each provider, beside the time that memory alone takes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SUFFIXES = (".svg", ".png")


def checked_path(text: str) -> str:
    """The path, if a plot can be written there: asked before a long run, not after it."""
    if Path(text).suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"--plot writes {' or '.join(SUFFIXES)}, got {text!r}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise argparse.ArgumentTypeError("--plot needs matplotlib: pip install matplotlib") from error
    return text


def case_name(row: Mapping[str, Any]) -> str:
    """The columns before the provider's name, without the op."""
    names = list(row)
    return " ".join(f"{name}={row[name]}" for name in names[1 : names.index("provider")])


def write_plot(path: str, result: Mapping[str, Any]) -> None:
    """A panel an op, a line a case, a dot a provider at its median with its 20th to 80th percentile."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if "reason" not in row]
    panels = {op: [row for row in rows if row["op"] == op] for op in dict.fromkeys(row["op"] for row in rows)}
    cases = {op: list(dict.fromkeys(map(case_name, panel))) for op, panel in panels.items()}
    heights = [0.34 * len(names) + 1.6 for names in cases.values()]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (op, panel) in zip(axes, panels.items(), strict=True):
        _draw(axis, op, panel, cases[op])
    machine = result["machine"]
    where = machine.get("gpu", machine["cpu"])
    figure.suptitle(f"{where}, torch {machine['torch']}, {machine.get('date', '')}", fontsize=10)
    figure.savefig(path)


def _draw(axis: Any, op: str, panel: list[Mapping[str, Any]], cases: list[str]) -> None:
    place = {name: index for index, name in enumerate(cases)}
    for provider in dict.fromkeys(row["provider"] for row in panel):
        mine = [row for row in panel if row["provider"] == provider]
        middle = [row["p50_ms"] for row in mine]
        spread = [[row["p50_ms"] - row["p20_ms"] for row in mine], [row["p80_ms"] - row["p50_ms"] for row in mine]]
        ours = provider == "arpo-ext"
        style = {"color": "black", "zorder": 3, "markersize": 7} if ours else {"alpha": 0.8, "markersize": 5}
        height = [place[case_name(row)] for row in mine]
        axis.errorbar(middle, height, xerr=spread, fmt="o", label=provider, linewidth=1, **style)
    bounds = {case_name(row): row["counted_mb"] / row[f"{row['limit']}_gbs"] for row in panel}
    height = [place[name] for name in bounds]
    axis.scatter(list(bounds.values()), height, marker="|", s=160, color="tab:red", label="memory limit", zorder=4)
    axis.set_xscale("log")
    axis.set_yticks(range(len(cases)), cases, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("ms a call")
    axis.set_title(op, loc="left", fontsize=10)
    axis.grid(axis="x", which="both", alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
