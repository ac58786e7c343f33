"""Which charts a run has numbers for. Knows the lines of metrics.jsonl and rollouts.jsonl, and no file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qswitch.report.svg import Series, line_chart

SMOOTH_POINTS = 60
"""Above this many steps a curve is drawn as means of equal stretches."""
VALIDATED = {
    "kl_nats": "KL(teacher ‖ student) on held-out prompts",
    "response_loss_nats": "Loss on held-out responses",
}
"""What a run is validated by: the key of its lines, and its name."""

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Chart:
    """A titled chart with a sentence on what it shows."""

    title: str
    svg: str
    note: str = ""


def run_charts(lines: Rows, rollouts: Rows, summary: Mapping[str, Any]) -> list[Chart]:
    """Every chart that the run has numbers for."""
    steps = [line for line in lines if "loss" in line]

    def curve(key: str, rows: Rows = steps) -> list[tuple[float, float]]:
        return _smooth([(row["step"], row[key]) for row in rows if row.get(key) is not None])

    kinds = sorted({str(line["batch"]) for line in steps if line.get("batch")})
    losses = [Series(k.replace("_", " "), curve("loss", [x for x in steps if x.get("batch") == k])) for k in kinds]
    found = [
        Chart(
            title,
            line_chart([Series(title, validated(key, lines, summary), dots=True)], x_label="step", y_label="nats"),
        )
        for key, title in VALIDATED.items()
    ]
    found.append(
        Chart("Training loss", line_chart(losses or [Series("loss", curve("loss"))], x_label="step", y_label="nats"))
    )
    found += position_charts(rollouts)
    for title, key, name, unit, limits in (
        ("Share of tokens that the teacher wrote", "teacher_share", "teacher", "share", (0.0, 1.0)),
        ("Divergence of teacher and student in rollouts", "jsd_bits", "JSD", "bits", None),
        ("Rollout speed", "rollout_tokens_per_s", "speed", "tokens/s", None),
        ("Memory in use, highest so far", "peak_gib", "measured", "GiB", None),
    ):
        series = [Series(name, curve(key), fill=limits is not None)]
        found.append(Chart(title, line_chart(series, x_label="step", y_label=unit, y_range=limits)))
    return [chart for chart in found if chart.svg]


def validated(key: str, lines: Rows, summary: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(step, figure) of every validation, that before the first step among them where it is known."""
    points = [(line["step"], line[key]) for line in lines if "loss" not in line and line.get(key) is not None]
    before = summary.get(key.replace("_nats", "_before_nats"))
    return points if before is None else [(0, before), *points]


def validation_charts(runs: Sequence[tuple[str, Rows, Mapping[str, Any]]]) -> list[Chart]:
    """The validations of several runs (name, lines, summary), each kind of figure on one pair of axes."""
    found = []
    for key, title in VALIDATED.items():
        series = [Series(name, validated(key, lines, summary), dots=True) for name, lines, summary in runs]
        found.append(Chart(title, line_chart(series, x_label="step", y_label="nats")))
    return [chart for chart in found if chart.svg]


def position_charts(rollouts: Rows) -> list[Chart]:
    """Teacher share, divergence and threshold by position in the response, over the sampled rollouts."""
    share: dict[int, list[float]] = defaultdict(list)
    jsd: dict[int, list[float]] = defaultdict(list)
    tau: dict[int, list[float]] = defaultdict(list)
    for rollout in rollouts:
        for t, token in enumerate(rollout["tokens"]):
            share[t].append(token["writer"] == "teacher")
            if token.get("jsd") is not None:
                jsd[t].append(token["jsd"])
            if token.get("tau") is not None:
                tau[t].append(token["tau"])
    if not jsd:
        return []

    def mean(values: Mapping[int, list[float]]) -> list[tuple[float, float]]:
        # Positions that few rollouts reach say little; neighbours are averaged when there are many.
        return _smooth([(t, sum(v) / len(v)) for t, v in sorted(values.items())])

    note = f"Means over the {len(rollouts)} rollouts that the run kept as a sample."
    lines = [Series("JSD", mean(jsd))]
    if tau:
        lines.append(Series("threshold", mean(tau)))
    axes: dict[str, Any] = {"x_label": "response token", "y_range": (0.0, 1.0)}
    return [
        Chart(
            "Writers' share by position",
            line_chart([Series("teacher", mean(share), fill=True)], y_label="share of the teacher", **axes),
            note,
        ),
        Chart("Divergence and threshold by position", line_chart(lines, y_label="bits", **axes), note),
    ]


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // SMOOTH_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
