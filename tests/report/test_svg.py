"""Charts: points where they belong, round numbers on the axes, markup that is well formed."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qswitch.report.charts import position_charts
from qswitch.report.svg import BOTTOM, HEIGHT, RIGHT, TOP, WIDTH, Axis, Series, line_chart

BELOW = HEIGHT - BOTTOM


def points(svg: str) -> list[tuple[float, float]]:
    found = re.search(r'class="line s0" points="([^"]*)"', svg)
    assert found
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found[1].split())]


def test_a_chart_puts_points_where_they_belong():
    svg = line_chart([Series("a", [(0, 0.0), (5, 0.5), (10, 1.0)])], x_label="x", y_label="y", y_range=(0, 1))
    (left, bottom), middle, end = points(svg)
    assert 0 < left < 60 and bottom == BELOW and end == (WIDTH - RIGHT, TOP)
    assert middle == (pytest.approx((left + WIDTH - RIGHT) / 2), (TOP + BELOW) / 2)


@pytest.mark.parametrize(
    "values", [[3.0], [5.0, 5.0], [0.0, 0.0], [-2.0, 7.5], [1e-9, 2e-9], [1234567.0, 1234568.0], [0.93, 1.07]]
)
def test_every_point_is_inside_the_axes_and_the_markup_is_well_formed(values):
    series = Series('<"&>', list(enumerate(values)), dots=True)
    svg = line_chart([series, Series("b", [(0, values[0])])], x_label="<x>", y_label="y & z")
    for x, y in points(svg):
        assert 0 < x <= WIDTH - RIGHT and TOP - 0.1 <= y <= BELOW + 0.1
    ElementTree.fromstring(f"<div>{svg}</div>")


def test_no_finite_point_gives_no_chart():
    assert line_chart([Series("a", [(0, math.nan), (1, math.inf)])], x_label="x", y_label="y") == ""


def test_shares_by_position_are_means_over_the_rollouts_that_reach_it():
    def rollout(writers: str) -> dict:
        return {"tokens": [{"text": "a", "writer": {"s": "student", "t": "teacher"}[w], "jsd": 0.5} for w in writers]}

    share, divergence = position_charts([rollout("st"), rollout("tt"), rollout("t")])
    (_, first), (_, second) = points(share.svg)
    assert first == pytest.approx(BELOW - (BELOW - TOP) * 2 / 3, abs=0.1) and second == pytest.approx(TOP)
    assert "3 rollouts" in share.note and "threshold" not in divergence.svg
    assert position_charts([{"tokens": [{"text": "a", "writer": "teacher", "jsd": None}]}]) == []


FINITE = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 4))


@given(FINITE, FINITE, st.booleans(), st.booleans())
@example(0.0001, -250001.0, False, False)
def test_ticks_are_round_distinct_and_evenly_spaced(a, b, exact, whole):
    low, high = min(a, b), max(a, b)
    if whole:
        low, high = float(math.floor(low)), float(math.ceil(high))
    axis = Axis.around(low, high, exact=exact, whole=whole)
    assert axis.low <= low and high <= axis.high
    assert 1 <= len(axis.ticks) <= 7 and len(set(axis.labels)) == len(axis.labels)
    slack = 1e-8 * (axis.high - axis.low) + 4 * math.ulp(max(abs(axis.low), abs(axis.high)))
    assert all(axis.low - slack <= tick <= axis.high + slack for tick in axis.ticks)
    for tick, label in zip(axis.ticks, axis.labels, strict=True):
        assert float(label.replace(",", "")) == pytest.approx(tick, rel=1e-3, abs=1e-9), "a label says its tick"
        assert not label.startswith("-") or tick < 0, "no minus before zero"
    if len(axis.ticks) > 1:
        step = axis.ticks[1] - axis.ticks[0]
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-3
    if whole:
        assert all(tick == round(tick) for tick in axis.ticks)


def test_the_axes_of_a_short_run_read_well():
    assert Axis.around(0, 12, exact=True, whole=True).labels == ["0", "5", "10"]
    assert Axis.around(1, 2, exact=True, whole=True).labels == ["1", "2"]
    assert Axis.around(1.113, 1.53).labels == ["1.1", "1.2", "1.3", "1.4", "1.5", "1.6"]
    assert Axis.around(1.36, 1.36).labels == ["1.2", "1.3", "1.4", "1.5"]
    assert Axis.around(0, 1, exact=True).labels == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
