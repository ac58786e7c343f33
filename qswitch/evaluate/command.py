"""From the words of `qswitch eval` to an evaluation: which models, which teacher, which protocol, which folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qswitch.errors import ConfigError
from qswitch.evaluate.evaluate import EvaluationSettings, evaluate
from qswitch.evaluate.protocol import Protocol, make_protocol
from qswitch.evaluate.score_table import render
from qswitch.evaluate.store import EvaluationDir
from qswitch.evaluate.subjects import Subject, find_subject
from qswitch.run_dir import locked, write_atomically

PRECISIONS = ("auto", "nf4", "int8", "bf16", "fp32")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRequest:
    """The command line, unchecked."""

    models: list[str]
    data: list[str]
    protocol: str = "greedy"
    teacher: str | None = None
    teacher_precision: str = "nf4"
    no_teacher: bool = False
    template: str | None = None
    seeds: str | None = None
    temperature: float | None = None
    max_new_tokens: int | None = None
    max_prompt_tokens: int | None = None
    limit: int | None = None
    columns: list[str]
    split: str = "test"
    batch_size: int = 16
    precision: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    lm_eval: str | None = None
    output_dir: Path | None = None


def run_eval(request: EvalRequest, *, say: Callable[[str], None]) -> tuple[dict[str, Any], Path]:
    """Evaluate and return (results, folder).

    Raises:
        ConfigError: the words contradict each other.
        DataError, ModelError, RunDirError: as their messages say.
    """
    for name, value in (("precision", request.precision), ("teacher-precision", request.teacher_precision)):
        if value not in PRECISIONS:
            raise ConfigError(f"--{name} {value}: choose one of {', '.join(PRECISIONS)}.")
    protocol, departures = _protocol(request)
    columns = _columns(request.columns)
    subjects = [
        find_subject(m, precision=request.precision, trust_remote_code=request.trust_remote_code)
        for m in request.models
    ]
    _warn_of_template(protocol, subjects, say)
    teacher = _teacher(request, subjects, say)
    folder = request.output_dir or _default_folder(subjects[0], protocol.name)
    settings = EvaluationSettings(
        subjects=subjects,
        sets=request.data,
        protocol=protocol,
        departures=departures,
        teacher=teacher,
        columns=columns,
        split=request.split,
        limit=request.limit,
        batch_size=request.batch_size,
        device=request.device,
    )
    if request.lm_eval is not None:
        from qswitch.evaluate.harness import require_harness

        require_harness()  # before the hours of the rest
    results = evaluate(settings, folder, say=say)
    if request.lm_eval is not None:
        tasks = [t.strip() for t in request.lm_eval.split(",") if t.strip()]
        with locked(folder):
            results["lm_eval"] = {s.name: _lm_eval(request, folder, s, tasks, say) for s in subjects}
            write_atomically(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
            write_atomically(folder / "results.md", render(results))
    return results, folder


def _lm_eval(
    request: EvalRequest, folder: Path, subject: Subject, tasks: list[str], say: Callable[[str], None]
) -> dict[str, Any]:
    """Scores of the harness, from an earlier call where it asked the same of the same weights."""
    from qswitch.evaluate.harness import run_tasks

    stored = EvaluationDir(folder).harness_scores(subject.name, subject.fingerprint)
    key = (",".join(sorted(tasks)), request.limit)
    if key not in stored:
        say(f"lm-eval: {subject.name}: {key[0]}")
        found = run_tasks(subject, tasks, limit=request.limit, batch_size=request.batch_size, device=request.device)
        stored.add([{"tasks": key[0], "limit": key[1], "results": found}])
    return stored.rows[key]["results"]


def _protocol(request: EvalRequest) -> tuple[Protocol, list[str]]:
    seeds = None
    if request.seeds is not None:
        try:
            seeds = tuple(int(s) for s in request.seeds.split(","))
        except ValueError:
            raise ConfigError(f"--seeds {request.seeds}: write whole numbers, for example 10,20,30.") from None
    template = None if request.template == "own" else request.template
    protocol, departures = make_protocol(
        request.protocol,
        seeds=seeds,
        temperature=request.temperature,
        max_new_tokens=request.max_new_tokens,
        max_prompt_tokens=request.max_prompt_tokens,
        template=template,
    )
    if request.template == "own" and protocol.template is not None:
        departures.append(f"template is that of the first model instead of {protocol.template}")
        protocol = replace(protocol, template=None)
    return protocol, departures


def _warn_of_template(protocol: Protocol, subjects: list[Subject], say: Callable[[str], None]) -> None:
    """Says where a run is asked in another template than it was trained in: it looks worse than it is."""
    run = next((subject for subject in subjects if subject.run_dir is not None), None)
    if run is None or run.run_dir is None or protocol.template is None:
        return
    trained = run.run_dir.config.data.template
    if trained != protocol.template:
        say(
            f"{run.name} was trained in the template {trained} (data.template) and is asked in {protocol.template}, "
            "which may make it look worse than it is. --template own asks as it was trained."
        )


def _columns(pairs: list[str]) -> dict[str, str]:
    columns = {}
    for pair in pairs:
        field, separator, column = pair.partition("=")
        if not separator or not field or not column:
            raise ConfigError(f"--column {pair}: write it as field=column, for example response=answer.")
        columns[field] = column
    return columns


def _teacher(request: EvalRequest, subjects: list[Subject], say: Callable[[str], None]) -> Subject | None:
    if request.no_teacher:
        if request.teacher is not None:
            raise ConfigError("--teacher and --no-teacher contradict each other; keep one.")
        return None
    if request.teacher is not None:
        return find_subject(
            request.teacher, precision=request.teacher_precision, trust_remote_code=request.trust_remote_code
        )
    run_dir = next((s.run_dir for s in subjects if s.run_dir is not None), None)
    if run_dir is not None and run_dir.config.passes_text:
        say("The teacher has another tokenizer than the student, so the distance from it (KL) is left out.")
        return None
    return None if run_dir is None else find_subject(f"{run_dir.path.resolve()}:teacher")


def _default_folder(first: Subject, protocol: str) -> Path:
    if first.run_dir is not None and first.part == "student":
        return first.run_dir.path / "eval" / protocol
    # Adapters and checkpoints of different runs often have one name.
    digest = hashlib.blake2b(first.reference.encode(), digest_size=4).hexdigest()
    return Path("evals") / f"{first.name}-{digest}-{protocol}"
