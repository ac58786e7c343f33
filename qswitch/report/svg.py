"""Line charts as inline SVG: numbers in, markup out. Knows no run and no file.

Colours and dashes are CSS classes of the page (`s0`, `d1`, ...), so that they follow its light or dark scheme and its
print style.
A chart is drawn at about the size it is shown at, so that its text is as large as the text around it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 380, 210
RIGHT, TOP, BOTTOM = 14, 26, 38
COLOURS, DASHES = 6, 4
"""Classes of the page: s0 to s5 are colours; d1 to d3 dash a line, so that 24 series can be told apart."""
DIGIT_WIDTH = 6.4
"""Width of a character of a tick, of 11 px text."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line: points (x, y) in order of x."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False
    """Mark every point: for few and far between."""
    fill: bool = False
    """Colour the area down to the axis: for a share."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A range, and round numbers within it."""

    low: float
    high: float
    ticks: list[float]
    labels: list[str]

    @classmethod
    def around(cls, low: float, high: float, *, exact: bool = False, whole: bool = False, most: int = 5) -> Axis:
        """An axis for values from `low` to `high` with at most `most` + 1 ticks.

        Ticks are multiples of 1, 2 or 5 times a power of ten. The range ends at ticks, unless `exact`; `whole` asks for
        ticks at whole numbers, for steps and positions. A single value gets a range around it.
        """
        if high == low:
            around = 0.5 if whole else 0.1 * abs(low) or 0.5
            low, high = (low, high + 1) if whole else (low - around, high + around)
        if not exact and 0 <= low < 0.5 * high:
            low = 0.0
        power = 10.0 ** math.floor(math.log10((high - low) / most))
        step = next(power * m for m in (1, 2, 5, 10) if power * m * most >= (high - low) * (1 - 1e-9))
        step = max(step, 1.0) if whole else step
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if exact:
            first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        else:
            low, high = min(low, first * step), max(high, last * step)  # a value may lie past its tick by a rounding
        ticks = [i * step for i in range(first, last + 1)]
        return cls(low, high, ticks, [_label(tick, step) for tick in ticks])


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
) -> str:
    """An `<svg>` of the series on common axes, with a legend below where there are several; empty text where there is
    no finite point.

    `y_range` fixes the axis, for shares from 0 to 1. The horizontal axis counts something, steps or tokens.
    """
    # A series keeps its place, and so its colour, also where another one has no point.
    lines = [Series(s.name, _finite(s.points), s.dots, s.fill) for s in series]
    shown = [(place, s) for place, s in enumerate(lines) if s.points]
    if not shown:
        return ""
    xs = [x for _, s in shown for x, _ in s.points]
    ys = [y for _, s in shown for _, y in s.points]
    x_axis = Axis.around(min(xs), max(xs), exact=True, whole=True)
    y_axis = Axis.around(*y_range, exact=True) if y_range is not None else Axis.around(min(ys), max(ys))
    left = round(12 + DIGIT_WIDTH * max(len(label) for label in y_axis.labels))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        y = min(max(y, y_axis.low), y_axis.high)
        return (
            left + (x - x_axis.low) / (x_axis.high - x_axis.low) * (right - left),
            TOP + (y_axis.high - y) / (y_axis.high - y_axis.low) * (bottom - TOP),
        )

    title = escape(f"{y_label} by {x_label}: {', '.join(s.name for _, s in shown)}")
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">']
    for tick, label in zip(y_axis.ticks, y_axis.labels, strict=True):
        _, y = place(x_axis.low, tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for tick, label in zip(x_axis.ticks, x_axis.labels, strict=True):
        x, _ = place(tick, y_axis.low)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{label}</text>')
    middle = (left + right) / 2
    parts.append(f'<text class="label" x="2" y="12">{escape(y_label)}</text>')
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    for index, line in shown:
        look = _look(index)
        placed = [place(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        if line.fill:
            corners = f"{placed[0][0]:.1f},{bottom} {path} {placed[-1][0]:.1f},{bottom}"
            parts.append(f'<polygon class="area {look}" points="{corners}"/>')
        parts.append(f'<polyline class="line {look}" points="{path}"><title>{escape(line.name)}</title></polyline>')
        if line.dots or len(placed) == 1:
            for (x, y), (at, value) in zip(placed, line.points, strict=True):
                hint = f"{escape(line.name)}: {value:.4g} at {at:.4g}"
                parts.append(
                    f'<circle class="dot {look}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{hint}</title></circle>'
                )
    parts.append("</svg>")
    if len(shown) > 1:
        legend = "".join(f'<span><i class="key {_look(i)}"></i>{escape(line.name)}</span>' for i, line in shown)
        parts.append(f'<p class="legend">{legend}</p>')
    return "".join(parts)


def _look(index: int) -> str:
    """The classes of a series: its colour, and its dashes where all colours are taken."""
    dashes = index // COLOURS % DASHES
    return f"s{index % COLOURS}" + (f" d{dashes}" if dashes else "")


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in points if y is not None and math.isfinite(x) and math.isfinite(y)]


def _label(value: float, step: float) -> str:
    """A tick to as many places as its axis needs, without a minus before zero."""
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    if places > 4:
        return f"{value + 0.0:.3g}"
    return f"{round(value, places) + 0.0:,.{places}f}"
