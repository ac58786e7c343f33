"""What the page says about one run, read from its directory: answers, figures, tables, rollouts.

Loads no model. A run that has not finished, or an older one, gives what there is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qswitch.evaluate.intervals import mean_interval
from qswitch.evaluate.marks import TrainedWeights, weights_text
from qswitch.evaluate.score_table import COLUMNS, estimate, overlap_notes, records_text
from qswitch.outside import read_json, user_path
from qswitch.report.charts import Chart, run_charts
from qswitch.run_dir import RunDir, teacher_share
from qswitch.state_files import FidelityFile, HeldOutFile, PlanFile, ResultsFile, SummaryFile
from qswitch.units import bits_per_byte

MAX_ROLLOUTS = 24
"""Sample rollouts shown, evenly over the run."""
ANSWERS_SHOWN = 3
"""Held-out prompts whose answers lead the page; the others are folded away below them."""
FIGURES = {
    "kl_nats": (
        "KL(teacher ‖ student)",
        "KL(teacher ‖ student), nats per token, on what the teacher wrote to {prompts} held-out prompts",
    ),
    "response_loss_nats": (
        "loss on the data's responses",
        "Loss on the responses of {prompts} held-out prompts, nats per token",
    ),
}
"""What a run is validated by -> its kind in a word, and what it is."""
TEACHER_TEXT = (
    "loss on the teacher's text",
    "Loss on what the teacher wrote to {prompts} held-out prompts, nats per token of the student's",
)
UNMARKED = "An earlier version wrote this, which did not keep which weights it measured."


@dataclass(frozen=True, slots=True)
class Figure:
    """A number before and after training; intervals as text, empty where the run did not keep what they need."""

    kind: str
    """What is measured, in a word: figures of different kinds are not comparable."""
    label: str
    before: str
    after: str
    change: str
    lower_is_better: bool = True
    """False: it is good where it is as the teacher's, so that neither more nor less is better."""
    before_interval: str = ""
    after_interval: str = ""
    change_interval: str = ""

    @property
    def judgement(self) -> str:
        """`better` or `worse` than before training; nothing where the figure cannot say it, or no change is seen."""
        percent = float(self.change.rstrip("%") or 0) if self.lower_is_better else 0
        return "better" if percent < 0 else "worse" if percent > 0 else ""


@dataclass(frozen=True, slots=True)
class RunView:
    """One run, ready for the template."""

    name: str
    lead: str
    finished: bool
    answers: list[dict[str, Any]]
    reference: str
    """Who wrote the third answer of each prompt."""
    figures: list[Figure]
    facts: list[tuple[str, str]]
    evaluations: list[dict[str, Any]]
    charts: list[Chart]
    phases: list[tuple[str, float, float]]
    """(phase, seconds, share of all) of the steps, longest first."""
    memory: dict[str, Any]
    rollouts: list[dict[str, Any]]
    total_rollouts: int
    configuration: str
    versions: dict[str, str]
    commit: str | None
    lines: list[dict[str, Any]]
    summary: dict[str, Any]


def names_of(run_dirs: Sequence[RunDir]) -> list[str]:
    """A name for every run: its folder's, with so many of the folders above as tell it apart from the others.

    The runs lie in different folders.
    """
    parts = [run_dir.path.resolve().parts for run_dir in run_dirs]

    def name(own: tuple[str, ...]) -> str:
        lengths = range(1, len(own) + 1)
        alone = next(n for n in lengths if sum(other[-n:] == own[-n:] for other in parts) == 1)
        return str(Path(*own[-alone:]))

    return [name(own) for own in parts]


def view(run_dir: RunDir, name: str) -> RunView:
    """All that the page shows of a run, which it calls `name`."""
    lines, rollouts = run_dir.read_metrics(), run_dir.read_rollouts()
    summary = _optional(run_dir.summary_path, SummaryFile) or {}
    held_out = _optional(run_dir.held_out_path, HeldOutFile) or {}
    phases = seconds_by_phase(lines)
    return RunView(
        name=name,
        lead=lead(run_dir),
        finished=bool(summary),
        answers=held_out.get("answers", []),
        reference={"teacher": "the teacher", "data": "the data"}[held_out.get("reference", "teacher")],
        figures=figures(summary, held_out),
        facts=facts(summary, lines, run_dir),
        evaluations=[*evaluations(run_dir), *fidelity_tables(run_dir)],
        charts=run_charts(lines, rollouts, summary),
        phases=phases,
        memory=memory_rows(_optional(run_dir.path / "plan.json", PlanFile) or {}, lines, summary),
        rollouts=[_shown(r) for r in _spread(rollouts, MAX_ROLLOUTS)],
        total_rollouts=len(rollouts),
        configuration=yaml.safe_dump(run_dir.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        versions=summary.get("versions", {}),
        commit=summary.get("commit"),
        lines=lines,
        summary=summary,
    )


def lead(run_dir: RunDir) -> str:
    """One sentence: who teaches whom, by which method."""
    config = run_dir.config
    teacher, student = _reference(config.teacher.model), _reference(config.student.model)
    if student == teacher and config.student.shrink_to_layers:
        student = "a copy of itself"
    if config.student.shrink_to_layers:
        student += f", cut to {config.student.shrink_to_layers} layers"
    if not config.learns_from_teacher:
        return f"{config.method}: {student} is fine-tuned."
    taught = f"{config.method}: {teacher} ({config.teacher.precision}) teaches {student}"
    if config.passes_text:
        return f"{taught} through text, since their tokenizers differ; so there is no KL between them."
    return f"{taught}."


# ------------------------------------------------------------------------------------------------------------ figures


def figures(summary: Mapping[str, Any], held_out: Mapping[str, Any]) -> list[Figure]:
    """Validation figures before and after, of those that the run measured, with intervals over the prompts."""
    found = []
    for key, named in FIGURES.items():
        stem = key.removesuffix("_nats")
        before, after = summary.get(f"{stem}_before_nats"), summary.get(f"{stem}_after_nats")
        if before is None or after is None:
            continue
        change = f"{(after - before) / before:+.0%}" if before else ""
        prompts = summary.get("validation_prompts", "the")
        of_teacher = key == "response_loss_nats" and held_out.get("reference") == "teacher"
        kind, label = TEACHER_TEXT if of_teacher else named
        label = label.format(prompts=prompts)
        found.append(Figure(kind, label, f"{before:.3f}", f"{after:.3f}", change, True, *_intervals(key, held_out)))
        if of_teacher:
            tokens, size = summary.get("validation_tokens"), summary.get("validation_bytes")
            bits = [bits_per_byte(nats, tokens, size) for nats in (before, after)]
            if bits[0] is not None and bits[1] is not None:
                label = "The same, bits per byte of that text: comparable between students with different tokenizers"
                found.append(Figure(f"{kind}, a byte", label, f"{bits[0]:.3f}", f"{bits[1]:.3f}", change))
    return found + own_figures(summary)


def own_figures(summary: Mapping[str, Any]) -> list[Figure]:
    """What the teacher made of the student's own responses, before and after; without intervals, they are few."""
    before, after = summary.get("own_before"), summary.get("own_after")
    if not before or not after:
        return []
    whose = f"the student's own responses to {after['responses']} of the prompts"
    nats = [one["reverse_kl_nats"] for one in (before, after)]
    change = f"{(nats[1] - nats[0]) / nats[0]:+.0%}" if nats[0] else ""
    kind = "KL(student ‖ teacher) on own text"
    label = f"KL(student ‖ teacher), nats per token, on {whose}"
    found = [Figure(kind, label, f"{nats[0]:.3f}", f"{nats[1]:.3f}", change)]
    for key, label in (
        ("length_ratio", "Length, of the teacher's"),
        ("ended_share", "Ended before the limit"),
        ("repeated_4grams", "Repeated 4-grams"),
    ):
        shares = [f"{one[key]:.0%}" for one in (before, after)]
        found.append(Figure(label, f"{label}, of {whose}", shares[0], shares[1], "", lower_is_better=False))
    return found


def _intervals(key: str, held_out: Mapping[str, Any]) -> tuple[str, ...]:
    """Intervals of before, after and the relative change; empty where the run did not keep the prompts' figures."""
    before, after, tokens = (held_out.get(name) for name in ("before_nats", "after_nats", "tokens"))
    if held_out.get("figure") != key or not before or not after or not tokens or len(tokens) < 2:
        return ()
    found = [mean_interval(values, tokens) for values in (before, after)]
    texts = [f"{one.low:.3f} to {one.high:.3f}" for one in found]
    weights = [b * t for b, t in zip(before, tokens, strict=True)]
    if min(weights) > 0:
        # The ratio of the sums, resampled by prompt: what the change would be for other prompts of this kind.
        ratio = mean_interval([a / b for a, b in zip(after, before, strict=True)], weights)
        assert ratio.low is not None and ratio.high is not None
        texts.append(f"{ratio.low - 1:+.0%} to {ratio.high - 1:+.0%}")
    return tuple(texts)


def facts(summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], run_dir: RunDir) -> list[tuple[str, str]]:
    """Short statements beside the figures."""
    steps = [line for line in lines if "loss" in line]
    train = run_dir.config.train
    limits = [
        *([] if train.max_tokens is None else [f"{train.max_tokens:,} response tokens"]),
        *([] if train.max_seconds is None else [duration(train.max_seconds)]),
    ]
    most = train.step_limit
    found = [("steps", str(len(steps)) if most is None else f"{len(steps)} of {most}")]
    if limits:
        found.append(("budget", " or ".join(limits)))
    if summary.get("best_step"):
        found.append(("best validation", f"after step {summary['best_step']}"))
    written = sum(line.get("rollout_tokens") or 0 for line in steps)
    if written:
        found.append(("rollout tokens", f"{written:,}"))
    trained = sum(line.get("loss_tokens") or 0 for line in steps)
    if trained:
        found.append(("trained tokens", f"{trained:,}"))
    share = teacher_share(lines)
    if share is not None:
        found.append(("written by the teacher", f"{share:.0%}"))
    total = sum(seconds for _, seconds, _ in seconds_by_phase(lines))
    if total:
        found.append(("time of the steps", duration(total)))
    skipped = summary.get("steps_without_loss")
    if skipped:
        found.append(("steps without an intervention", str(skipped)))
    if summary.get("device"):
        by = f", {summary['processes']} processes" if summary.get("processes", 1) > 1 else ""
        found.append(("device", f"{summary['device']}{by}"))
    return found


def seconds_by_phase(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """(phase, seconds, share of all) over the steps, longest first."""
    seconds: dict[str, float] = defaultdict(float)
    for line in lines:
        for name, value in line.get("seconds", {}).items():
            seconds[name] += value
    total = sum(seconds.values())
    return [(name, value, value / total) for name, value in sorted(seconds.items(), key=lambda i: -i[1]) if value]


def memory_rows(
    plan: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> dict[str, Any]:
    """Plan and measured peak, GiB; parts of the plan with their shares of it, from large to small; phases with what was
    planned and measured, by kind of figure."""
    peaks = [line["peak_gib"] for line in lines if line.get("peak_gib") is not None]
    planned = plan.get("total_gib")

    def shares(sizes: Mapping[str, float] | None) -> list[tuple[str, float, float]]:
        ordered = sorted((sizes or {}).items(), key=lambda item: -item[1])
        return [
            (name.replace("_", " "), size, min(size / planned, 1) if planned else 0) for name, size in ordered if size
        ]

    phases: dict[str, dict[str, float]] = {}
    for found in [*(line.get("phases_gib", {}) for line in lines), summary.get("phases_gib", {})]:
        for phase, figures in found.items():
            mine = phases.setdefault(phase, {})
            mine.update({kind: max(size, mine.get(kind, size)) for kind, size in figures.items()})
    for phase, size in (plan.get("phases") or {}).items():
        phases.setdefault(phase, {})["planned"] = size
    return {
        "planned": planned,
        "measured": summary.get("peak_gib") or (max(peaks) if peaks else None),
        "budget": plan.get("budget_gib"),
        "parts": shares(plan.get("parts")),
        "phases": sorted(phases.items(), key=lambda item: -item[1].get("planned", 0.0)),
        "kinds": [k for k in ("planned", "allocated", "reserved", "resident") if any(k in f for f in phases.values())],
        "notes": plan.get("notes") or [],
        "on_cpu": summary.get("device") == "cpu",
    }


# ------------------------------------------------------------------------------------------------------------- tables


def evaluations(run_dir: RunDir) -> list[dict[str, Any]]:
    """Results of `qswitch eval` in RUN/eval, one table a set."""
    tables = []
    for path in sorted(run_dir.path.glob("eval/*/results.json")):
        results = read_json(path, ResultsFile)
        measured = {name: one["trained"] for name, one in results.get("weights", {}).items() if one["trained"]}
        warning = _other_weights(run_dir, measured)
        for set_name, one in results.get("sets", {}).items():
            present = [m for m in COLUMNS if any(m in v["metrics"] for v in one["models"].values())]
            rows = [
                [model, *(estimate(values["metrics"].get(m, {}).get("all")) for m in present),
                 f"{values['response_tokens']:.0f}"]
                for model, values in one["models"].items()
            ]  # fmt: skip
            seen = results.get("overlaps_with_training", {}).get(set_name, {})
            tables.append(
                {
                    "title": f"{set_name}, protocol {results['protocol']['name']}, {records_text(one)}",
                    "warning": warning,
                    "departures": results.get("departures", []),
                    "notes": overlap_notes(one["records"], seen) + ([] if "weights" in results else [UNMARKED]),
                    "header": ["model", *(COLUMNS[m] for m in present), "tokens"],
                    "rows": rows,
                }
            )
    return tables


def fidelity_tables(run_dir: RunDir) -> list[dict[str, Any]]:
    """RUN/fidelity.json as a table, where `qswitch fidelity` was run."""
    result = _optional(run_dir.path / "fidelity.json", FidelityFile)
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
    doubt = result.get("doubt")
    prompts = f"{result['prompts']} {'prompts' if doubt else 'held-out prompts'}"
    title = f"The teacher quantised, against {result['reference']['precision']}, {prompts}"
    header = ["", "GiB", "KL, nats/token", "top-1 agreement", "interventions", "changed writers"]
    notes = [note for note in (doubt, result["origin"]) if note]
    if "weights_counted" in result:
        notes.append(f"Weights are counted {result['weights_counted']}.")
    elif result.get("device") == "cpu":
        notes.append("An earlier version counted these GiB as a CPU holds them, with what is not quantised in fp32.")
    student = result.get("student_weights")
    warning = _other_weights(run_dir, {"the student": student} if student else {})
    if "student_weights" not in result:
        notes.append(UNMARKED)
    table = {"title": title, "warning": warning, "departures": [], "notes": notes, "header": header, "rows": rows}
    return [table]


def _other_weights(run_dir: RunDir, students: Mapping[str, Mapping[str, Any]]) -> str:
    """What to say where trained students were measured (name -> weights), and none of them as the run has it now."""
    present = TrainedWeights.present(run_dir) if students else None
    if present is None or any(one["mark"] == present.mark for one in students.values()):
        return ""
    texts = "; ".join(f"{name}: {weights_text(one)}" for name, one in students.items())
    now = weights_text(present.to_dict())
    return f"Measured on other weights than the run has now ({texts}). Now it has {now}. Repeat the command."


# ----------------------------------------------------------------------------------------------------------- rollouts


def _shown(rollout: Mapping[str, Any]) -> dict[str, Any]:
    """A rollout for the template: its tokens with numbers as text, None where the run did not measure."""
    tokens = rollout["tokens"]
    return {
        "step": rollout["step"],
        "prompt": rollout["prompt"],
        "share": sum(t["writer"] == "teacher" for t in tokens) / max(1, len(tokens)),
        "tokens": [
            {
                "text": token["text"],
                "writer": token["writer"],
                "jsd": _bits(token.get("jsd")),
                "threshold": _bits(token.get("tau")),
                "student": token.get("student"),
                "teacher": token.get("teacher"),
            }
            for token in tokens
        ],
    }


def _bits(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _spread(items: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """`count` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _optional(path: Path, kind: type[Any]) -> dict[str, Any] | None:
    return read_json(path, kind) if path.is_file() else None


def _reference(reference: str | list[str]) -> str:
    """A model for people: the first of its names, of a file or local folder the last part only."""
    name = reference if isinstance(reference, str) else reference[0]
    return Path(name).name if name.startswith("package:") or user_path(name).exists() else name


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
