"""Line charts as inline SVG: numbers in, markup out. Knows no run and no file.

Colours are CSS classes of the page (`s0`, `s1`, ...), so that they follow its light or dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 40
TICKS = 4


@dataclass(frozen=True, slots=True)
class Series:
    """One line: points (x, y) in order of x."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False
    """Mark every point: for few and far between."""


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
) -> str:
    """An `<svg>` of the series on common axes; empty text where there is no finite point.

    `y_range` fixes the axis, for shares from 0 to 1.
    """
    lines = [Series(s.name, _finite(s.points), s.dots) for s in series]
    lines = [s for s in lines if s.points]
    if not lines:
        return ""
    xs = [x for s in lines for x, _ in s.points]
    ys = [y for s in lines for _, y in s.points]
    x_low, x_high = min(xs), max(xs)
    if x_high == x_low:
        x_high = x_low + 1
    y_low, y_high = y_range if y_range is not None else _nice_range(min(ys), max(ys))
    plot_width, plot_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_low) / (x_high - x_low) * plot_width,
            TOP + (y_high - min(max(y, y_low), y_high)) / (y_high - y_low) * plot_height,
        )

    title = escape(f"{y_label} by {x_label}")
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">']
    for i in range(TICKS + 1):
        value = y_low + (y_high - y_low) * i / TICKS
        _, y = place(x_low, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    for i in range(TICKS + 1):
        value = x_low + (x_high - x_low) * i / TICKS
        x, _ = place(value, y_low)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_number(value)}</text>'
        )
    middle = LEFT + plot_width / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    middle = TOP + plot_height / 2
    parts.append(
        f'<text class="label" x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">'
        f"{escape(y_label)}</text>"
    )
    for index, line in enumerate(lines):
        placed = [place(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline class="line s{index}" points="{path}"><title>{escape(line.name)}</title></polyline>')
        if line.dots or len(placed) == 1:
            for (x, y), (at, value) in zip(placed, line.points, strict=True):
                hint = f"{escape(line.name)}: {_number(value)} at {_number(at)}"
                parts.append(
                    f'<circle class="dot s{index}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{hint}</title></circle>'
                )
    parts.append("</svg>")
    if len(lines) > 1:
        legend = "".join(f'<span><i class="key s{i}"></i>{escape(line.name)}</span>' for i, line in enumerate(lines))
        parts.append(f'<p class="legend">{legend}</p>')
    return "".join(parts)


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in points if y is not None and math.isfinite(x) and math.isfinite(y)]


def _nice_range(low: float, high: float) -> tuple[float, float]:
    """A range of round numbers around the data, from zero where the data is close to it."""
    if low >= 0 and low < 0.5 * high:
        low = 0.0
    span = high - low or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / TICKS))
    step = next(step * m for m in (1, 2, 2.5, 5, 10) if step * m * TICKS >= span)
    bottom = math.floor(low / step) * step
    top = bottom + TICKS * step
    while top < high - 1e-12 * span:
        top += TICKS * step
    return bottom, top


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
