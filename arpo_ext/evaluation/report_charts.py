"""Charts as inline SVG: lines over steps, stacked bars over steps. All text is escaped by `Markup.format`.

The picture stands without script; report_charts.js reads `data-hover` to show the values under the pointer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from arpo_ext.evaluation.report_axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, short, x_axis, y_axis

MAX_POINTS = 400


@dataclass(frozen=True, slots=True)
class Line:
    """One named curve. `colour` picks a class of report.css; `marks` draws a dot at each point."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    colour: int = 0
    dashed: bool = False
    marks: bool = False


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str = "step",
    y_label: str,
    log: bool = False,
    y_low: float | None = None,
    y_high: float | None = None,
) -> Markup:
    """Curves over a shared x axis. Points that are not finite (or not positive on a log axis) leave a gap.

    y_low, y_high: widen the y axis to hold these values. A chart without any point says so.
    """
    lines = [_thin(line) for line in lines]
    kept = [v for line in lines for v in line.y if math.isfinite(v) and (v > 0 or not log)]
    if not kept:
        return _figure(title, Markup('<p class="missing">No values were logged.</p>'), [])
    up = y_axis([*kept, *(v for v in (y_low, y_high) if v is not None)], log)
    across = x_axis([x for line in lines for x in line.x])
    parts = [_grid(across, up, x_label, y_label)]
    for line in lines:
        drawable = [math.isfinite(y) and (y > 0 or not log) for y in line.y]
        points = [(across.at(x), up.at(y)) if ok else None for x, y, ok in zip(line.x, line.y, drawable, strict=True)]
        parts.append(_curve(line, points))
    hover = _hover(lines, across, x_label)
    legend = [(line.name, line.colour, line.dashed) for line in lines] if len(lines) > 1 else []
    return _figure(title, _svg(parts, hover), legend)


def stacked_chart(title: str, lines: Sequence[Line], *, x_label: str = "step", y_label: str) -> Markup:
    """Bars of several parts at each x, stacked from zero; a part that is missing at an x counts as zero."""
    lines = [_thin(line) for line in lines]
    columns: dict[float, list[float]] = {}
    for index, line in enumerate(lines):
        for x, y in zip(line.x, line.y, strict=True):
            columns.setdefault(x, [0.0] * len(lines))[index] = y if math.isfinite(y) and y > 0 else 0.0
    if not columns:
        return _figure(title, Markup('<p class="missing">No values were logged.</p>'), [])
    up = y_axis([0.0, *(sum(parts) for parts in columns.values())], log=False)
    across = x_axis(columns, pad=0.5)
    gaps = [b - a for a, b in zip(sorted(columns), sorted(columns)[1:], strict=False)]
    width = max(1.0, 0.8 * (across.at(min(gaps, default=1.0)) - across.at(0.0)))
    parts = [_grid(across, up, x_label, y_label)]
    for x, values in sorted(columns.items()):
        low = 0.0
        for line, value in zip(lines, values, strict=True):
            top, bottom = up.at(low + value), up.at(low)
            low += value
            if bottom > top:
                parts.append(
                    Markup('<rect class="fill c{}" x="{}" y="{}" width="{}" height="{}"/>').format(
                        line.colour, round(across.at(x) - width / 2, 1), top, round(width, 1), round(bottom - top, 1)
                    )
                )
    legend = [(line.name, line.colour, False) for line in lines]
    return _figure(title, _svg(parts, _hover(lines, across, x_label)), legend)


def _thin(line: Line) -> Line:
    """At most MAX_POINTS points: means over runs of neighbouring steps, placed at the last step of each run."""
    size = math.ceil(len(line.x) / MAX_POINTS)
    if size <= 1:
        return line
    starts = range(0, len(line.x), size)
    means = tuple(sum(line.y[i : i + size]) / len(line.y[i : i + size]) for i in starts)
    return Line(line.name, tuple(line.x[i : i + size][-1] for i in starts), means, line.colour, line.dashed, line.marks)


def _grid(across: Axis, up: Axis, x_label: str, y_label: str) -> Markup:
    parts = []
    for value in up.ticks():
        y = up.at(value)
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDTH - RIGHT, y, y))
        parts.append(Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(LEFT - 6, y + 4, short(value)))
    for value in across.ticks():
        if value == int(value):
            place = (across.at(value), HEIGHT - BOTTOM + 16, short(value))
            parts.append(Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(*place))
    middle = ((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label)
    parts.append(Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(*middle))
    turned = ((TOP + HEIGHT - BOTTOM) / 2, y_label)
    parts.append(
        Markup('<text class="axis" transform="translate(12 {}) rotate(-90)" text-anchor="middle">{}</text>').format(
            *turned
        )
    )
    return Markup("").join(parts)


def _curve(line: Line, points: Sequence[tuple[float, float] | None]) -> Markup:
    """The path through the points, broken where one is None; a point without neighbours is drawn as a dot."""
    path, marks = [], []
    for index, point in enumerate(points):
        if point is None:
            continue
        before = points[index - 1] if index else None
        after = points[index + 1] if index + 1 < len(points) else None
        path.append(f"{'M' if before is None else 'L'}{point[0]} {point[1]}")
        if line.marks or (before is None and after is None):
            marks.append(Markup('<circle class="fill c{}" cx="{}" cy="{}" r="3"/>').format(line.colour, *point))
    style = " dashed" if line.dashed else ""
    curve = Markup('<path class="line c{}{}" d="{}"/>').format(line.colour, style, "".join(path))
    return curve + Markup("").join(marks)


def _hover(lines: Sequence[Line], across: Axis, x_label: str) -> str:
    """JSON for report_charts.js: the x values, where they lie, and what each line shows there."""
    tables = [dict(zip(line.x, line.y, strict=True)) for line in lines]
    places = sorted({x for line in lines for x in line.x})
    rows = []
    for line, table in zip(lines, tables, strict=True):
        values = [table.get(x) for x in places]
        rows.append({"name": line.name, "colour": line.colour, "y": [_hover_value(value) for value in values]})
    return json.dumps({"label": x_label, "x": places, "at": [across.at(x) for x in places], "lines": rows})


def _hover_value(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _svg(parts: Sequence[Markup], hover: str) -> Markup:
    cursor = Markup('<line class="cursor" y1="{}" y2="{}" x1="0" x2="0"/>').format(TOP, HEIGHT - BOTTOM)
    opening = Markup('<svg viewBox="0 0 {} {}" role="img" data-hover="{}">').format(WIDTH, HEIGHT, hover)
    return opening + Markup("").join(parts) + cursor + Markup("</svg>")


def _figure(title: str, body: Markup, legend: Sequence[tuple[str, int, bool]]) -> Markup:
    keys = Markup("").join(
        Markup('<span class="key{}"><i class="swatch c{}"></i>{}</span>').format(
            " dashed" if dashed else "", colour, name
        )
        for name, colour, dashed in legend
    )
    keys = Markup('<div class="legend">{}</div>').format(keys) if legend else Markup("")
    return Markup('<figure class="chart"><figcaption>{}</figcaption>{}{}</figure>').format(title, keys, body)
