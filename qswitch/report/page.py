"""One offline HTML page about a run: what came out, how it went, who wrote what, and whether the plan held.

Reads the run directory only; no model is loaded and nothing is fetched. The page holds everything it shows.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qswitch.report.svg import Series, line_chart
from qswitch.run_dir import RunDir, write_atomically

MAX_ROLLOUTS = 12
"""Sample rollouts shown, evenly over the run."""
SMOOTH_POINTS = 60
"""Above this many steps a curve is drawn as means of equal stretches."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number before and after training."""

    label: str
    before: str
    after: str
    change: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A titled chart with a sentence on what it shows."""

    title: str
    svg: str
    note: str = ""


def write_report(run_path: Path | str) -> Path:
    """Write RUN/report.html and return its path.

    Raises:
        RunDirError: run_path is no run directory.
    """
    run_dir = RunDir.open(Path(run_path))
    path = run_dir.report_path
    write_atomically(path, render_page(run_dir))
    return path


def render_page(run_dir: RunDir) -> str:
    """The page as text; a run that has not finished gives what there is."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("qswitch.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    lines = run_dir.read_metrics()
    summary = _read_json(run_dir.summary_path) or {}
    rollouts = run_dir.read_rollouts()
    return environment.get_template("report.html").render(
        name=run_dir.path.resolve().name,
        config=run_dir.config,
        method=getattr(run_dir.config, "method", run_dir.config.rollout.policy),
        teacher=_reference(run_dir.config.teacher.model),
        student=_reference(run_dir.config.student.model),
        finished=bool(summary),
        figures=figures(summary),
        facts=facts(summary, lines, run_dir),
        charts=charts(lines, rollouts, summary),
        memory=memory_rows(_read_json(run_dir.path / "plan.json") or {}, lines, summary),
        rollouts=[_shown(r) for r in _spread(rollouts, MAX_ROLLOUTS)],
        total_rollouts=len(rollouts),
        evaluations=[*evaluations(run_dir), *fidelity_tables(run_dir)],
        configuration=yaml.safe_dump(run_dir.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        versions=summary.get("versions", {}),
        commit=summary.get("commit"),
    )


# ------------------------------------------------------------------------------------------------------------ figures


def figures(summary: Mapping[str, Any]) -> list[Figure]:
    """Validation figures before and after, of those that the run measured."""
    found = []
    labels = {
        "kl": "KL(teacher ‖ student), nats per token, held-out prompts, teacher-written responses",
        "response_loss": "Loss on the held-out responses, nats per token",
    }
    for key, label in labels.items():
        before, after = summary.get(f"{key}_before_nats"), summary.get(f"{key}_after_nats")
        if before is not None and after is not None:
            change = f"{(after - before) / before:+.0%}" if before else ""
            found.append(Figure(label, f"{before:.3f}", f"{after:.3f}", change))
    return found


def facts(summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], run_dir: RunDir) -> list[tuple[str, str]]:
    """Short statements beside the figures."""
    steps = [line for line in lines if "loss" in line]
    found = [("steps", f"{len(steps)} of {run_dir.config.train.max_steps}")]
    written = sum(line.get("rollout_tokens") or 0 for line in steps)
    if written:
        found.append(("rollout tokens", f"{written:,}"))
    trained = sum(line.get("loss_tokens") or 0 for line in steps)
    if trained:
        found.append(("trained tokens", f"{trained:,}"))
    shares = [line["teacher_share"] for line in steps if line.get("teacher_share") is not None]
    if shares:
        found.append(("written by the teacher", f"{sum(shares) / len(shares):.0%}"))
    seconds: dict[str, float] = defaultdict(float)
    for line in steps:
        for name, value in line.get("seconds", {}).items():
            seconds[name] += value
    total = sum(seconds.values())
    if total:
        longest = sorted(seconds.items(), key=lambda item: -item[1])[:3]
        shown = ", ".join(f"{name} {value / total:.0%}" for name, value in longest if value / total >= 0.01)
        found.append(("time", f"{_duration(total)} ({shown})"))
    skipped = summary.get("steps_without_loss")
    if skipped:
        found.append(("steps without an intervention", str(skipped)))
    if summary.get("device"):
        found.append(("device", str(summary["device"])))
    return found


def evaluations(run_dir: RunDir) -> list[dict[str, Any]]:
    """Results of `qswitch eval` in RUN/eval, one table a set."""
    from qswitch.evaluate.metrics import COLUMNS
    from qswitch.evaluate.score_table import estimate

    tables = []
    for path in sorted(run_dir.path.glob("eval/*/results.json")):
        results = _read_json(path) or {}
        for set_name, one in results.get("sets", {}).items():
            present = [m for m in COLUMNS if any(m in v["metrics"] for v in one["models"].values())]
            rows = [
                [model, *(estimate(values["metrics"].get(m, {}).get("all")) for m in present),
                 f"{values['response_tokens']:.0f}"]
                for model, values in one["models"].items()
            ]  # fmt: skip
            tables.append(
                {
                    "title": f"{set_name}, protocol {results['protocol']['name']}, {one['records']} records",
                    "departures": results.get("departures", []),
                    "notes": [],
                    "header": ["model", *(COLUMNS[m] for m in present), "tokens"],
                    "rows": rows,
                }
            )
    return tables


def fidelity_tables(run_dir: RunDir) -> list[dict[str, Any]]:
    """RUN/fidelity.json as a table, where `qswitch fidelity` was run."""
    from qswitch.evaluate.score_table import estimate

    result = _read_json(run_dir.path / "fidelity.json")
    if result is None:
        return []
    rows = [
        [
            one["precision"],
            f"{one['weights_gib']:.2f}",
            estimate(one["kl_nats"]),
            estimate(one["top1_agreement"]),
            f"{one['reference_intervention_share']:.1%} → {one['intervention_share']:.1%}",
            f"{one['changed_decisions']['mean']:.1%}",
        ]
        for one in result["precisions"]
    ]
    title = f"The teacher quantised, against {result['reference']['precision']}, {result['prompts']} held-out prompts"
    header = ["", "GiB", "KL, nats/token", "top-1 agreement", "interventions", "changed writers"]
    note = [result["origin"]] if result["origin"] else []
    return [{"title": title, "departures": [], "notes": note, "header": header, "rows": rows}]


# ------------------------------------------------------------------------------------------------------------- charts


def charts(
    lines: Sequence[Mapping[str, Any]], rollouts: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> list[Chart]:
    """Every chart that the run has numbers for."""
    steps = [line for line in lines if "loss" in line]
    validated = [line for line in lines if "loss" not in line]

    def curve(key: str, rows: Sequence[Mapping[str, Any]] = steps) -> list[tuple[float, float]]:
        return _smooth([(row["step"], row[key]) for row in rows if row.get(key) is not None])

    found = []
    kinds = sorted({str(line["batch"]) for line in steps if line.get("batch")})
    by_kind = [Series(k.replace("_", " "), curve("loss", [x for x in steps if x.get("batch") == k])) for k in kinds]
    found.append(
        Chart("Training loss", line_chart(by_kind or [Series("loss", curve("loss"))], x_label="step", y_label="nats"))
    )
    names = [key for key in ("kl_nats", "response_loss_nats") if any(line.get(key) is not None for line in validated)]
    for key in names:
        points = [(line["step"], line[key]) for line in validated if line.get(key) is not None]
        before = summary.get(key.replace("_nats", "_before_nats"))
        if before is not None:
            points.insert(0, (0, before))
        title = "KL from the teacher on held-out prompts" if key == "kl_nats" else "Loss on held-out responses"
        found.append(Chart(title, line_chart([Series(title, points, dots=True)], x_label="step", y_label="nats")))
    found.append(
        Chart(
            "Share of tokens that the teacher wrote",
            line_chart([Series("teacher", curve("teacher_share"))], x_label="step", y_label="share", y_range=(0, 1)),
        )
    )
    found.append(
        Chart(
            "Divergence of teacher and student in rollouts",
            line_chart([Series("JSD", curve("jsd_bits"))], x_label="step", y_label="bits"),
        )
    )
    found += position_charts(rollouts)
    found.append(
        Chart(
            "Rollout speed",
            line_chart([Series("speed", curve("rollout_tokens_per_s"))], x_label="step", y_label="tokens/s"),
        )
    )
    return [chart for chart in found if chart.svg]


def position_charts(rollouts: Sequence[Mapping[str, Any]]) -> list[Chart]:
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
            "Teacher's share by position",
            line_chart([Series("teacher", mean(share))], y_label="share", **axes),
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


# ------------------------------------------------------------------------------------------------ memory and rollouts


def memory_rows(
    plan: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> dict[str, Any]:
    """Plan and measured peak, GiB, with the parts of the plan from large to small."""
    peaks = [line["peak_gib"] for line in lines if line.get("peak_gib") is not None]
    measured = summary.get("peak_gib") or (max(peaks) if peaks else None)
    planned = plan.get("total_gib")
    parts = sorted((plan.get("parts") or {}).items(), key=lambda item: -item[1])
    return {
        "planned": planned,
        "measured": measured,
        "budget": plan.get("budget_gib"),
        "parts": [(name.replace("_", " "), size, size / planned if planned else 0) for name, size in parts if size],
        "phases": sorted((plan.get("phases") or {}).items(), key=lambda item: -item[1]),
        "notes": plan.get("notes") or [],
        "on_cpu": summary.get("device") == "cpu",
    }


def _shown(rollout: Mapping[str, Any]) -> dict[str, Any]:
    """A rollout for the template: neighbours of one writer joined, so that the page stays small."""
    runs: list[dict[str, Any]] = []
    for token in rollout["tokens"]:
        if runs and runs[-1]["writer"] == token["writer"] and len(runs[-1]["hints"]) < 40:
            runs[-1]["text"] += token["text"]
            runs[-1]["hints"].append(_hint(token))
        else:
            runs.append({"writer": token["writer"], "text": token["text"], "hints": [_hint(token)]})
    share = sum(t["writer"] == "teacher" for t in rollout["tokens"]) / max(1, len(rollout["tokens"]))
    return {
        "step": rollout["step"],
        "prompt": rollout["prompt"],
        "share": share,
        "tokens": len(rollout["tokens"]),
        "runs": [
            {"writer": run["writer"], "text": run["text"], "hint": " · ".join(h for h in run["hints"] if h)}
            for run in runs
        ],
    }


def _hint(token: Mapping[str, Any]) -> str:
    return "" if token.get("jsd") is None else f"{token['text'].strip()} {token['jsd']:.2f}"


def _spread(items: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """`count` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _reference(reference: str | list[str]) -> str:
    """A model for people: of a local folder the last part only."""
    names = [reference] if isinstance(reference, str) else reference
    return " or ".join(Path(n).name if Path(n).expanduser().is_dir() else n for n in names)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
