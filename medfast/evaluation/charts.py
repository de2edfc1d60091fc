"""Line charts as inline SVG that takes its colours from the page, so light and dark both work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from matplotlib.ticker import MaxNLocator

__all__ = ["Level", "Line", "chart", "moving_mean"]

NORMAL, SMALL = (520, 250), (350, 200)  # width and height: text keeps its size where a chart gets less room
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 12, 34
MOST_POINTS = 500  # per line; longer runs are averaged in bins


@dataclass(frozen=True)
class Line:
    """A series. style: "raw" (thin, behind), "smooth" (strong) or "dots" (validation)."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "smooth"


@dataclass(frozen=True)
class Level:
    """A horizontal reference. tone: "bad", "random" or "plain"."""

    label: str
    y: float
    tone: str = "plain"


@dataclass(frozen=True)
class _Axes:
    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]
    ticks: tuple[Sequence[float], Sequence[float]] = field(default=((), ()))

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (self.right - LEFT), self.base - up * (self.base - TOP)

    @property
    def right(self) -> int:
        return self.width - RIGHT

    @property
    def base(self) -> int:
        return self.height - BOTTOM


def moving_mean(y: Sequence[float], width: int) -> list[float]:
    """Centred mean over ``width`` values, fewer at the ends; values that are not finite are left out."""
    values = np.asarray(y, dtype=float)
    good = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(good)])
    start = np.maximum(np.arange(len(values)) - width // 2, 0)
    stop = np.minimum(np.arange(len(values)) + width // 2 + 1, len(values))
    many = count[stop] - count[start]
    return np.where(many > 0, (total[stop] - total[start]) / np.maximum(many, 1), np.nan).tolist()


def chart(
    title: str, lines: Sequence[Line], levels: Sequence[Level] = (), zero: bool = False, small: bool = False
) -> str:
    """An SVG figure of ``lines`` against optimizer steps, "" where there is nothing to draw. zero: y starts at 0."""
    lines = [thin for line in lines if (thin := _thinned(line)).x]
    if not lines:
        return ""
    axes = _axes(lines, levels, zero, SMALL if small else NORMAL)
    parts = [_frame(axes)]
    parts += [_level(axes, level) for level in levels]
    parts += [_draw(axes, line) for line in sorted(lines, key=lambda line: line.style != "raw")]
    described = f"{title}: from {lines[0].y[0]:.4g} to {lines[0].y[-1]:.4g}"
    body = "".join(parts)
    return (
        f'<svg viewBox="0 0 {axes.width} {axes.height}" role="img" aria-label="{escape(described)}">'
        f"<title>{escape(described)}</title>{body}</svg>"
    )


def _thinned(line: Line) -> Line:
    keep = [(float(x), float(y)) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    if len(keep) > MOST_POINTS:
        keep = [tuple(np.mean(part, axis=0)) for part in np.array_split(np.array(keep), MOST_POINTS)]
    return Line(line.label, [x for x, _ in keep], [y for _, y in keep], line.style)


def _axes(lines: Sequence[Line], levels: Sequence[Level], zero: bool, size: tuple[int, int]) -> _Axes:
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for y in line.y]
    low, high = np.percentile(ys, [0.2, 99.8])  # one spike must not flatten the curve
    low, high = min([low, *(level.y for level in levels)]), max([high, *(level.y for level in levels)])
    low = min(low, 0.0) if zero else low
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    y = (low if zero and low == 0 else low - pad, high + pad)
    x = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 0.5, min(xs) + 0.5)
    return _Axes(*size, x, y, (_ticks(x, size[0] // 85, integer=True), _ticks(y, size[1] // 50)))


def _ticks(span: tuple[float, float], count: int, integer: bool = False) -> list[float]:
    ticks = MaxNLocator(count, integer=integer, steps=[1, 2, 2.5, 5, 10]).tick_values(*span)
    return [float(t) for t in ticks if span[0] <= t <= span[1]]


def _frame(axes: _Axes) -> str:
    parts = []
    step = abs(axes.ticks[1][1] - axes.ticks[1][0]) if len(axes.ticks[1]) > 1 else 1.0
    for y in axes.ticks[1]:
        _, at = axes.at(axes.x[0], y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{axes.right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_number(y, step)}</text>')
    for x in axes.ticks[0]:
        at, _ = axes.at(x, axes.y[0])
        parts.append(f'<text x="{at:.1f}" y="{axes.base + 17}" text-anchor="middle">{x:,.0f}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{axes.right}" y1="{axes.base}" y2="{axes.base}"/>')
    parts.append(f'<text class="unit" x="{axes.right}" y="{axes.height - 3}" text-anchor="end">optimizer step</text>')
    return "".join(parts)


def _number(value: float, step: float) -> str:
    """``value`` with as many digits as tell it from its neighbour ``step`` away."""
    value = 0.0 if abs(value) < step * 1e-6 else value
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step, digits) != step and round(step, digits) != round(step, digits + 1):
        digits += 1
    return f"{value:.{digits}f}"


def _level(axes: _Axes, level: Level) -> str:
    x, y = axes.at(axes.x[1], level.y)
    lower = y < TOP + 16
    return (
        f'<g class="level {level.tone}"><line x1="{LEFT}" x2="{x:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{x:.1f}" y="{y + (14 if lower else -5):.1f}" text-anchor="end">{escape(level.label)}</text></g>'
    )


def _draw(axes: _Axes, line: Line) -> str:
    points = [axes.at(x, min(max(y, axes.y[0]), axes.y[1])) for x, y in zip(line.x, line.y, strict=True)]
    if line.style == "dots" or len(points) == 1:
        marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in points)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        return f'<g class="{line.style}"><polyline points="{path}"/>{marks}</g>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{line.style}" points="{path}"/>'
