"""Axes of the report's charts: from values to pixels, with round ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 420, 240  # of a chart's view box
LEFT, RIGHT, TOP, BOTTOM = 60, 12, 10, 40  # margins around its plot


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear or logarithmic map from values to pixels, with round ticks."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        if self.log:
            low, high = round(math.log10(self.low)), round(math.log10(self.high))
            return [10.0**power for power in range(low, high + 1, max(1, math.ceil((high - low) / 5)))]
        step = nice_step(self.high - self.low)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def nice_step(span: float, ticks: int = 5) -> float:
    """The smallest of 1, 2, 5 times a power of ten that divides `span` into at most `ticks` parts."""
    power = 10.0 ** math.floor(math.log10(span / ticks))
    return next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= ticks + 1e-9)


def short(value: float) -> str:
    """A tick label of few characters: 1.5M for 1,500,000, 20k for 20,000, 1e-5 for 0.00001."""
    for size, unit, least in ((1e9, "G", 1e9), (1e6, "M", 1e6), (1e3, "k", 1e4)):
        if abs(value) >= least:
            return f"{value / size:.4g}{unit}"
    if abs(value) < 1e-12:
        return "0"
    if abs(value) < 1e-3:
        digits, _, power = f"{value:e}".partition("e")
        return f"{float(digits):.3g}e{int(power)}"
    return f"{value:.4g}"


def x_axis(values: Iterable[float], pad: float = 0.0) -> Axis:
    """The x axis over `values`, `pad` wider at both ends."""
    values = list(values)
    low, high = min(values), max(values)
    if low == high and not pad:
        pad = 0.5
    return Axis(low - pad, high + pad, LEFT, WIDTH - RIGHT)


def y_axis(values: Sequence[float], log: bool) -> Axis:
    """The y axis over `values`, ending at round numbers; from zero where zero is near."""
    low, high = min(values), max(values)
    if log:
        low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
        return Axis(low, high if high > low else low * 10, HEIGHT - BOTTOM, TOP, log=True)
    if 0 < low < 0.5 * high:
        low = 0.0
    if high - low < 1e-9 * max(abs(high), 1e-3):
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    step = nice_step(high - low)
    return Axis(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, HEIGHT - BOTTOM, TOP)
