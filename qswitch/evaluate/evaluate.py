"""Let models answer test sets and score the answers: what `qswitch eval` calls. Reads top to bottom.

Every response is a function of the weights, the record and the seed, so an evaluation that was stopped goes on where it
was and ends with the same figures. Models are loaded one after the other; the teacher, where there is one, first.
"""

from __future__ import annotations

import gc
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qswitch.config import DataSection
from qswitch.data.overlap import seen_in_training
from qswitch.data.template import Prompt, PromptEncoder, template_source
from qswitch.distill.recovery import BatchRows
from qswitch.errors import ConfigError, DataError
from qswitch.evaluate.protocol import Protocol
from qswitch.evaluate.rouge import rouge_l
from qswitch.evaluate.score_table import render
from qswitch.evaluate.scores import SetScores, compare_scores, score_set
from qswitch.evaluate.store import EvaluationDir, Lines
from qswitch.evaluate.subjects import LoadedSubject, Subject
from qswitch.evaluate.teacher_distance import TeacherView, distances, view_of_teacher
from qswitch.evaluate.testset import TestSet, encode_test_set, load_test_set
from qswitch.evaluate.versions import versions
from qswitch.models.language_model import output_rows
from qswitch.models.vocab import check_tokenizers
from qswitch.rollout.decode import RolloutRequest, rollout
from qswitch.rollout.policy import Policy, StudentPolicy, TeacherPolicy
from qswitch.run_dir import locked

logger = logging.getLogger(__name__)

TEACHER_SEED = 20_250_429
"""Seed of the teacher's own responses, temperature 1: the same for every protocol."""
CHUNK_ROWS = 8
"""Responses written between two saves, in batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSettings:
    """What to measure, and how."""

    subjects: list[Subject]
    """The first is the one the others are compared with."""
    sets: list[str]
    """Files, folders or hub ids."""
    protocol: Protocol
    departures: list[str] = field(default_factory=list)
    """Where the protocol differs from the one whose name it has."""
    teacher: Subject | None = None
    columns: dict[str, str] = field(default_factory=dict)
    """As data.columns."""
    split: str = "test"
    """Of a hub data set."""
    limit: int | None = None
    """Use the first records of each set only."""
    batch_size: int = 16
    """To start with: halved when memory runs out."""
    device: str | None = None

    def to_dict(self, sets: Sequence[TestSet], template: str, template_content: str) -> dict[str, Any]:
        """What decides the figures, for eval.json; batch size and device are not among it."""
        return {
            "protocol": asdict(self.protocol) | {"template": template, "seeds": list(self.protocol.seeds)},
            "sets": {s.name: {"reference": s.reference, "content": s.fingerprint} for s in sets},
            "template_content": hashlib.sha256(template_content.encode()).hexdigest()[:16],
            "limit": self.limit,
            "teacher": None if self.teacher is None else self.teacher.identity,
        }


def evaluate(
    settings: EvaluationSettings, output_dir: Path, *, say: Callable[[str], None] = logger.info
) -> dict[str, Any]:
    """Write what is missing, score everything, and return the content of results.json.

    Raises:
        DataError, ModelError: as their messages say.
        RunDirError: output_dir belongs to another evaluation.
    """
    if len({s.name for s in settings.subjects}) < len(settings.subjects):
        raise ConfigError("Two of the models have the same name. Name them apart: NAME=reference.")
    sets = _load_sets(settings)
    overlaps = _overlaps(settings, sets, say)
    first = settings.subjects[0]
    template = settings.protocol.template or first.template
    content = template_source(PromptEncoder(first.tokenizer(template), template))
    folder = EvaluationDir.open(output_dir, settings.to_dict(sets, template, content))
    with locked(output_dir):
        return _evaluate(settings, folder, sets, overlaps, template, say)


def _evaluate(
    settings: EvaluationSettings,
    folder: EvaluationDir,
    sets: Sequence[TestSet],
    overlaps: Mapping[str, Mapping[str, int | None]],
    template: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    first = settings.subjects[0]
    prompts = {s.name: _encode(settings, first, s, template, say) for s in sets}
    for name, one in prompts.items():
        folder.write_set(name, {"ids": list(one.prompts), "reference_tokens": one.reference_tokens})

    rows = BatchRows(settings.batch_size, say=say)
    views = _teacher_views(settings, folder, sets, prompts, rows, say) if settings.teacher is not None else {}
    for subject in settings.subjects:
        _answer(settings, folder, subject, sets, prompts, views, template, rows, say)
    results = _results(settings, folder, sets, prompts, template)
    results["overlaps_with_training"] = overlaps
    folder.write(results, render(results))
    return results


# ---------------------------------------------------------------------------------------------------------- questions


@dataclass(frozen=True, slots=True)
class EncodedSet:
    """The prompts of a set as the models read them."""

    prompts: dict[int, Prompt]
    left_out: int
    reference_tokens: dict[int, int]
    """Length of the first reference in tokens of the first model's tokenizer; it decides the bucket."""


def _load_sets(settings: EvaluationSettings) -> list[TestSet]:
    sets = []
    for reference in settings.sets:
        data = DataSection(
            train=reference,
            columns=settings.columns,
            split=settings.split,
            system_prompt=settings.subjects[0].system_prompt,
        )
        sets.append(load_test_set(data, reference, limit=settings.limit))
    names = {s.name for s in sets}
    if any(f"{name}.teacher" in names for name in names):
        raise ConfigError("One set's file name is another's with .teacher, which names our own files. Rename one.")
    if len(names) < len(sets):
        raise ConfigError("Two of the sets have the same file name. Evaluate them one after the other.")
    return sets


def _overlaps(
    settings: EvaluationSettings, sets: Sequence[TestSet], say: Callable[[str], None]
) -> dict[str, dict[str, int | None]]:
    """Set -> run -> number of records whose prompt the run was trained on; None where its data cannot be read."""
    found: dict[str, dict[str, int | None]] = {s.name: {} for s in sets}
    for subject in settings.subjects:
        if subject.run_dir is None or subject.part != "student":
            continue
        for test_set in sets:
            records = [item.record for item in test_set.records]
            try:
                num: int | None = len(seen_in_training(subject.run_dir.config.data, records))
            except DataError as error:
                num = None
                say(f"{subject.name}: whether its training data overlaps {test_set.name} is not known. {error}")
            found[test_set.name][subject.name] = num
            if num:
                say(
                    f"{test_set.name}: {num} of {len(records)} prompts are also in the training data of "
                    f"{subject.name}; its scores on them say little."
                )
    return found


def _encode(
    settings: EvaluationSettings, subject: Subject, test_set: TestSet, template: str, say: Callable[[str], None]
) -> EncodedSet:
    tokenizer = subject.tokenizer(template)
    encoder = PromptEncoder(tokenizer, template)
    prompts, left_out = encode_test_set(test_set, encoder, max_prompt_tokens=settings.protocol.max_prompt_tokens)
    if left_out:
        say(f"{test_set.name}: left out {left_out} records whose prompt has more than "
            f"{settings.protocol.max_prompt_tokens} tokens")  # fmt: skip
    first = [(t.record.id, t.references[0]) for t in test_set.records if t.references and t.record.id in prompts]
    ids = tokenizer([text for _, text in first], add_special_tokens=False)["input_ids"] if first else []
    lengths = {record_id: len(row) for (record_id, _), row in zip(first, ids, strict=True)}
    return EncodedSet(prompts, left_out, lengths)


# ------------------------------------------------------------------------------------------------------------ teacher


def _teacher_views(
    settings: EvaluationSettings,
    folder: EvaluationDir,
    sets: Sequence[TestSet],
    encoded: Mapping[str, EncodedSet],
    rows: BatchRows,
    say: Callable[[str], None],
) -> dict[str, TeacherView]:
    """The teacher's own responses, written where they are missing, and its outputs on them."""
    teacher = settings.teacher
    assert teacher is not None
    stores = {s.name: folder.teacher_responses(s.name, teacher.fingerprint) for s in sets}
    done = {s.name: all((i,) in stores[s.name] for i in encoded[s.name].prompts) for s in sets}
    measured = all(
        (i,) in folder.distances(subject.name, s.name, subject.fingerprint, teacher.fingerprint)
        for s in sets
        for subject in settings.subjects
        for i in encoded[s.name].prompts
    )
    if all(done.values()) and measured:
        return {}
    say(f"loading the teacher {teacher.identity}")
    loaded = teacher.load(settings.device)
    for subject in settings.subjects:
        _check_vocabulary(teacher, loaded, subject)
    views = {}
    for test_set in sets:
        store, prompts = stores[test_set.name], encoded[test_set.name].prompts
        missing = [(p, TEACHER_SEED) for i, p in prompts.items() if (i,) not in store]
        _write(settings, loaded, missing, store, rows, say, f"{test_set.name}: teacher", teacher=True)
        sequences = [(prompts[i].prompt_ids, store.rows[(i,)]["response_ids"]) for i in prompts]
        views[test_set.name] = rows.attempt(
            loaded.model.device, partial(view_of_teacher, loaded.model, sequences, pad_id=loaded.pad_id)
        )
    del loaded
    _free()
    return views


def _check_vocabulary(teacher: Subject, loaded: LoadedSubject, subject: Subject) -> None:
    rows = output_rows(loaded.model.head.linear)
    check_tokenizers(loaded.tokenizer, subject.tokenizer("teacher"), teacher_rows=rows, student_rows=rows)


# ------------------------------------------------------------------------------------------------------------ answers


def _answer(
    settings: EvaluationSettings,
    folder: EvaluationDir,
    subject: Subject,
    sets: Sequence[TestSet],
    encoded: Mapping[str, EncodedSet],
    views: Mapping[str, TeacherView],
    template: str,
    rows: BatchRows,
    say: Callable[[str], None],
) -> None:
    """Responses and distances of one model; it is loaded only if something is missing."""
    jobs = []
    for test_set in sets:
        responses = folder.responses(subject.name, test_set.name, subject.fingerprint)
        measured = _distances(settings, folder, subject, test_set)
        ids = encoded[test_set.name].prompts
        unwritten = [(i, seed) for seed in settings.protocol.seeds for i in ids if (i, seed) not in responses]
        unmeasured = measured is not None and any((i,) not in measured for i in ids)
        jobs.append((test_set, responses, measured, unwritten, unmeasured))
    if not any(unwritten or unmeasured for *_, unwritten, unmeasured in jobs):
        return
    say(f"loading {subject.name}")
    loaded = subject.load(settings.device)
    for test_set, responses, measured, unwritten, unmeasured in jobs:
        prompts = _own_prompts(settings, subject, test_set, encoded[test_set.name], template)
        references = {t.record.id: t.references for t in test_set.records}
        _write(
            settings, loaded, [(prompts[i], seed) for i, seed in unwritten], responses, rows, say,
            f"{test_set.name}: {subject.name}", references=references,
        )  # fmt: skip
        if measured is not None and unmeasured:
            measure = partial(distances, views[test_set.name], loaded.model, pad_id=loaded.pad_id)
            found = rows.attempt(loaded.model.device, measure)
            lines = [{"id": i} | asdict(d) for i, d in zip(encoded[test_set.name].prompts, found, strict=True)]
            measured.add([line for line in lines if (line["id"],) not in measured])
    del loaded
    _free()


def _distances(
    settings: EvaluationSettings, folder: EvaluationDir, subject: Subject, test_set: TestSet
) -> Lines | None:
    """The stored distances of a model; None where no teacher is measured against."""
    if settings.teacher is None:
        return None
    return folder.distances(subject.name, test_set.name, subject.fingerprint, settings.teacher.fingerprint)


def _own_prompts(
    settings: EvaluationSettings, subject: Subject, test_set: TestSet, encoded: EncodedSet, template: str
) -> dict[int, Prompt]:
    """The records that the first model answers, in the ids of this one's tokenizer.

    In the same template; a model of another family has its own chat template, where that is what is asked for.
    """
    first = settings.subjects[0]
    if subject is first:
        return encoded.prompts
    tokenizer, yardstick = subject.tokenizer(template), first.tokenizer(template)
    if template in ("teacher", "student") and tokenizer.get_vocab() == yardstick.get_vocab():
        # One family: the same text for all. Another family would read the first one's special tokens as letters.
        tokenizer.chat_template = yardstick.chat_template
    encoder = PromptEncoder(tokenizer, template)
    records = [t.record for t in test_set.records if t.record.id in encoded.prompts]
    return {p.example_id: p for p in encoder.encode_batch(records)}


def _write(
    settings: EvaluationSettings,
    loaded: LoadedSubject,
    missing: Sequence[tuple[Prompt, int]],
    store: Lines,
    rows: BatchRows,
    say: Callable[[str], None],
    what: str,
    *,
    references: Mapping[int, Sequence[str]] | None = None,
    teacher: bool = False,
) -> None:
    """Write responses chunk by chunk, so that an interruption loses one chunk at most."""
    protocol = settings.protocol
    size = CHUNK_ROWS * settings.batch_size
    policy: Policy = TeacherPolicy() if teacher else StudentPolicy()
    for seed in dict.fromkeys(seed for _, seed in missing):
        # Long prompts first: a set that does not fit the memory says so at once.
        prompts = sorted((p for p, s in missing if s == seed), key=lambda p: (-len(p.prompt_ids), p.example_id))
        for start in range(0, len(prompts), size):
            chunk = prompts[start : start + size]
            write = partial(
                rollout,
                [RolloutRequest(p.example_id, 0, p.prompt_ids, protocol.max_new_tokens) for p in chunk],
                teacher=loaded.model if teacher else None,
                student=None if teacher else loaded.model,
                policy=policy,
                seed=seed,
                temperature=1.0 if teacher else protocol.temperature,
                eos_ids=loaded.eos_ids,
                pad_id=loaded.pad_id,
                keep="nothing",
                no_repeat_ngram_size=0 if teacher else protocol.no_repeat_ngram_size,
            )
            written, stats = rows.attempt(loaded.model.device, write)
            lines = []
            for r in written:
                text = loaded.tokenizer.decode(r.response_ids, skip_special_tokens=True).strip()
                row = {"id": r.example_id, "seed": seed, "response": text, "tokens": len(r.response_ids),
                       "ended": r.ended}  # fmt: skip
                if teacher:
                    row["response_ids"] = r.response_ids
                elif references is not None and references[r.example_id]:
                    row["rouge_l"] = rouge_l(text, references[r.example_id])
                lines.append(row)
            store.add(lines)
            speed = stats.tokens / stats.seconds if stats.seconds else 0.0
            say(f"{what}: {start + len(chunk)}/{len(prompts)} responses, seed {seed}, {speed:.0f} tokens/s")


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------- scores


def _results(
    settings: EvaluationSettings,
    folder: EvaluationDir,
    sets: Sequence[TestSet],
    encoded: Mapping[str, EncodedSet],
    template: str,
) -> dict[str, Any]:
    results: dict[str, Any] = {
        "protocol": asdict(settings.protocol) | {"template": template, "seeds": list(settings.protocol.seeds)},
        "departures": list(settings.departures),
        "teacher": None if settings.teacher is None else settings.teacher.identity,
        "models": {s.name: s.reference for s in settings.subjects},
        "sets": {},
        "versions": versions(),
    }
    for test_set in sets:
        one = encoded[test_set.name]
        teacher_texts = {}
        if settings.teacher is not None:
            stored = folder.teacher_responses(test_set.name, settings.teacher.fingerprint).rows
            teacher_texts = {key[0]: row["response"] for key, row in stored.items()}
        scores: dict[str, SetScores] = {}
        for subject in settings.subjects:
            rows = folder.responses(subject.name, test_set.name, subject.fingerprint).rows.values()
            distant = _distances(settings, folder, subject, test_set)
            measured = [] if distant is None else distant.rows.values()
            scores[subject.name] = score_set(
                [r for r in rows if r["id"] in one.prompts and r["seed"] in settings.protocol.seeds],
                [r for r in measured if r["id"] in one.prompts],
                reference_tokens=one.reference_tokens,
                teacher_texts=teacher_texts,
            )
        first = settings.subjects[0].name
        results["sets"][test_set.name] = {
            "reference": test_set.reference,
            "records": len(one.prompts),
            "left_out": one.left_out,
            "models": {name: s.to_dict() for name, s in scores.items()},
            "differences": {name: compare_scores(s, scores[first]) for name, s in scores.items() if name != first},
        }
    return results
