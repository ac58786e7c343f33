"""Let models answer test sets and score the answers: what `qswitch eval` calls. Reads top to bottom.

Every response is a function of the weights, the record and the seed, so an evaluation that was stopped goes on where it
was and ends with the same figures. Models are loaded one after the other; the teacher, where there is one, first.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qswitch.config import DataSection
from qswitch.data.overlap import seen_in_training
from qswitch.data.template import Prompt, PromptEncoder, template_source
from qswitch.distill.recovery import BatchRows
from qswitch.distill.teacher_distance import ModelView, detached_head, distances, view_of
from qswitch.errors import ConfigError, DataError, TokenizerMismatchError
from qswitch.evaluate.own import OwnView, held_bytes, read_by_teacher
from qswitch.evaluate.protocol import Protocol
from qswitch.evaluate.score_table import overlap_notes, render
from qswitch.evaluate.scores import SetScores, compare_positions, compare_scores, score_set
from qswitch.evaluate.store import EvaluationDir, Lines
from qswitch.evaluate.subjects import Subject
from qswitch.evaluate.testset import TestSet, clash_of_names, encode_test_set, load_test_set
from qswitch.evaluate.versions import versions
from qswitch.evaluate.write import YARDSTICK_SEED, write_responses
from qswitch.models.host_memory import release_memory
from qswitch.models.language_model import Head, output_rows
from qswitch.models.vocab import check_head, difference, ids_with_other_names
from qswitch.run_dir import locked
from qswitch.units import GIB

logger = logging.getLogger(__name__)

VIEWS_HELD_BYTES = 2 * GIB
"""Hidden states of models' own responses, and heads, that wait in host memory before the teacher is loaded to read
them."""


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
        TokenizerMismatchError: a model reads other tokens than the teacher that it is to be measured against.
        RunDirError: output_dir belongs to another evaluation.
    """
    if len({s.name for s in settings.subjects}) < len(settings.subjects):
        raise ConfigError("Two of the models have the same name. Name them apart: NAME=reference.")
    longest = _longest_prompt(settings)
    sets = _load_sets(settings)
    _require_one_tokenizer(settings)
    first = settings.subjects[0]
    template = settings.protocol.template or first.template
    encoder = PromptEncoder(first.tokenizer(template), template, template_kwargs=first.template_kwargs(template))
    content = template_source(encoder)
    folder = EvaluationDir.open(output_dir, settings.to_dict(sets, template, content))
    with locked(output_dir):
        return _evaluate(settings, folder, sets, template, longest, say)


def _evaluate(
    settings: EvaluationSettings,
    folder: EvaluationDir,
    sets: Sequence[TestSet],
    template: str,
    longest: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    first = settings.subjects[0]
    prompts = {s.name: _encode(settings, first, s, template, longest, say) for s in sets}
    overlaps = _overlaps(settings, sets, prompts, say)
    for name, one in prompts.items():
        folder.write_set(
            name,
            {"ids": list(one.prompts), "reference_tokens": one.reference_tokens, "left_out": one.left_out},
            overlaps[name],
        )

    rows = BatchRows(settings.batch_size, say=say)
    views = _teacher_views(settings, folder, sets, prompts, rows, say) if settings.teacher is not None else {}
    waiting: list[OwnView] = []
    for subject in settings.subjects:
        waiting += _answer(settings, folder, subject, sets, prompts, views, template, rows, say)
        if held_bytes(waiting) > VIEWS_HELD_BYTES:
            read_by_teacher(settings.teacher, settings.device, waiting, rows, say)
            waiting.clear()
    read_by_teacher(settings.teacher, settings.device, waiting, rows, say)
    results = _results(settings, folder, sets, prompts, template) | {"overlaps_with_training": overlaps}
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


def _longest_prompt(settings: EvaluationSettings) -> int:
    """The protocol's limit, or what the response leaves of the shortest context: all models read the same prompts.

    Raises:
        ConfigError: the response leaves nothing.
    """
    protocol = settings.protocol
    models = [*settings.subjects, *([settings.teacher] if settings.teacher is not None else [])]
    context, name = min((model.context_tokens(), model.name) for model in models)
    if protocol.max_new_tokens >= context:
        raise ConfigError(
            f"--max-new-tokens {protocol.max_new_tokens}: the context of {name} is {context} tokens, the prompt "
            "included. Give less."
        )
    return min(protocol.max_prompt_tokens, context - protocol.max_new_tokens)


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
    clash = clash_of_names(settings.sets)
    if clash is not None:
        raise ConfigError(clash)
    return sets


def _require_one_tokenizer(settings: EvaluationSettings) -> None:
    """See beforehand that the teacher can say something of every model: its weights may take minutes to load."""
    teacher = settings.teacher
    if teacher is None:
        return
    tokenizer = teacher.tokenizer("teacher")
    for subject in settings.subjects:
        different = difference(tokenizer, subject.tokenizer("teacher"))
        if different is not None:
            raise TokenizerMismatchError(
                f"The distance of {subject.name} from the teacher {teacher.identity} cannot be measured, because they "
                f"read different tokens. {different.what} Leave {subject.name} out, or add --no-teacher, which "
                "measures no distance."
            )


def _overlaps(
    settings: EvaluationSettings,
    sets: Sequence[TestSet],
    encoded: Mapping[str, EncodedSet],
    say: Callable[[str], None],
) -> dict[str, dict[str, int | None]]:
    """Set -> run -> number of asked records whose prompt the run was trained on; None where its data cannot be read."""
    found: dict[str, dict[str, int | None]] = {s.name: {} for s in sets}
    for subject in settings.subjects:
        if subject.run_dir is None or subject.part != "student":
            continue
        for test_set in sets:
            records = [t.record for t in test_set.records if t.record.id in encoded[test_set.name].prompts]
            try:
                num: int | None = len(seen_in_training(subject.run_dir.config.data, records))
            except DataError as error:
                num = None
                say(f"{subject.name}: whether its training data overlaps {test_set.name} is not known. {error}")
            found[test_set.name][subject.name] = num
            if num:
                for note in overlap_notes(len(records), {subject.name: num}):
                    say(f"{test_set.name}: {note}")
    return found


def _encode(
    settings: EvaluationSettings,
    subject: Subject,
    test_set: TestSet,
    template: str,
    longest: int,
    say: Callable[[str], None],
) -> EncodedSet:
    tokenizer = subject.tokenizer(template)
    encoder = PromptEncoder(tokenizer, template, template_kwargs=subject.template_kwargs(template))
    prompts, left_out = encode_test_set(test_set, encoder, max_prompt_tokens=longest)
    if left_out:
        limit = f"{longest} tokens"
        if longest < settings.protocol.max_prompt_tokens:
            limit += ", since the shortest context of the models has no place for more beside the response"
        say(f"{test_set.name}: left out {left_out} records whose prompt has more than {limit}")
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
) -> dict[str, ModelView]:
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
    check_head("teacher", loaded.tokenizer.get_vocab(), output_rows(loaded.model.head.linear))
    views = {}
    head = detached_head(loaded.model.head)
    for test_set in sets:
        store, prompts = stores[test_set.name], encoded[test_set.name].prompts
        missing = [(p, YARDSTICK_SEED) for i, p in prompts.items() if (i,) not in store]
        write_responses(
            loaded, missing, store, rows, settings.protocol, f"{test_set.name}: teacher", role="teacher", say=say
        )
        sequences = [(prompts[i].prompt_ids, store.rows[(i,)]["response_ids"]) for i in prompts]
        views[test_set.name] = rows.attempt(
            loaded.model.device, partial(view_of, loaded.model, head, sequences, pad_id=loaded.pad_id)
        )
    place = loaded.model.device
    del loaded
    release_memory(place)
    return views


# ------------------------------------------------------------------------------------------------------------ answers


def _answer(
    settings: EvaluationSettings,
    folder: EvaluationDir,
    subject: Subject,
    sets: Sequence[TestSet],
    encoded: Mapping[str, EncodedSet],
    views: Mapping[str, ModelView],
    template: str,
    rows: BatchRows,
    say: Callable[[str], None],
) -> list[OwnView]:
    """Responses and distances of one model, which is loaded only if something is missing.

    Returns what the teacher has yet to read: the model's own responses of the sets where that distance is missing.
    """
    jobs = []
    for test_set in sets:
        responses = folder.responses(subject.name, test_set.name, subject.fingerprint)
        measured, own_measured = _distances(settings, folder, subject, test_set)
        ids = encoded[test_set.name].prompts
        unwritten = [(i, seed) for seed in settings.protocol.seeds for i in ids if (i, seed) not in responses]
        unmeasured = measured is not None and any((i,) not in measured for i in ids)
        unread = own_measured is not None and any((i,) not in own_measured for i in ids)
        jobs.append((test_set, responses, measured, own_measured, unwritten, unmeasured, unread))
    if not any(unwritten or unmeasured or unread for *_, unwritten, unmeasured, unread in jobs):
        return []
    say(f"loading {subject.name}")
    loaded = subject.load(settings.device)
    head: Head | None = None
    waiting = []
    for test_set, responses, measured, own_measured, unwritten, unmeasured, unread in jobs:
        what = f"{test_set.name}: {subject.name}"
        prompts = _own_prompts(settings, subject, test_set, encoded[test_set.name], template)
        references = {t.record.id: t.references for t in test_set.records}
        write_responses(
            loaded, [(prompts[i], seed) for i, seed in unwritten], responses, rows, settings.protocol, what,
            references=references, say=say,
        )  # fmt: skip
        if measured is not None and unmeasured:
            measure = partial(distances, views[test_set.name], loaded.model, pad_id=loaded.pad_id)
            found = rows.attempt(loaded.model.device, measure)
            lines = [{"id": i} | asdict(d) for i, d in zip(encoded[test_set.name].prompts, found, strict=True)]
            measured.add([line for line in lines if (line["id"],) not in measured])
        if own_measured is not None and unread:
            own = folder.own_responses(subject.name, test_set.name, subject.fingerprint)
            missing = [(p, YARDSTICK_SEED) for i, p in prompts.items() if (i,) not in own]
            write_responses(
                loaded, missing, own, rows, settings.protocol, f"{what}, own responses", role="own", say=say
            )
            unread_ids = [i for i in prompts if (i,) not in own_measured]
            sequences = [(prompts[i].prompt_ids, own.rows[(i,)]["response_ids"]) for i in unread_ids]
            head = head or detached_head(loaded.model.head)
            read = partial(view_of, loaded.model, head, sequences, pad_id=loaded.pad_id)
            view = rows.attempt(loaded.model.device, read)
            waiting.append(OwnView(what, unread_ids, view, loaded.pad_id, own_measured))
    place = loaded.model.device
    del loaded
    release_memory(place)
    return waiting


def _distances(
    settings: EvaluationSettings, folder: EvaluationDir, subject: Subject, test_set: TestSet
) -> tuple[Lines, Lines] | tuple[None, None]:
    """The stored distances of a model, on the teacher's responses and on its own; None where there is no teacher."""
    if settings.teacher is None:
        return None, None
    which = (subject.name, test_set.name, subject.fingerprint, settings.teacher.fingerprint)
    return folder.distances(*which), folder.own_distances(*which)


def _own_prompts(
    settings: EvaluationSettings, subject: Subject, test_set: TestSet, encoded: EncodedSet, template: str
) -> dict[int, Prompt]:
    """The records that the first model answers, in the ids of this one's tokenizer.

    In the same template, where its tokens are the same ids to both. To a model of another family, or one that has not
    all names of the first one's special tokens, they would be letters: it has its own chat template, where that is what
    is asked for.
    """
    first = settings.subjects[0]
    if subject is first:
        return encoded.prompts
    records = [t.record for t in test_set.records if t.record.id in encoded.prompts]

    def read(tokenizer: Any, told: Subject) -> dict[int, Prompt]:
        encoder = PromptEncoder(tokenizer, template, template_kwargs=told.template_kwargs(template))
        return {p.example_id: p for p in encoder.encode_batch(records)}

    tokenizer, yardstick = subject.tokenizer(template), first.tokenizer(template)
    if template in ("teacher", "student") and ids_with_other_names(tokenizer, yardstick) is not None:
        own_template, tokenizer.chat_template = tokenizer.chat_template, yardstick.chat_template
        prompts = read(tokenizer, first)
        if all(p.prompt_ids == encoded.prompts[i].prompt_ids for i, p in prompts.items()):
            return prompts
        tokenizer.chat_template = own_template
    return read(tokenizer, subject)


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
        "weights": {
            s.name: {"fingerprint": s.fingerprint, "trained": None if s.trained is None else s.trained.to_dict()}
            for s in settings.subjects
        },
        "limit": settings.limit,
        "sets": {},
        "versions": versions(),
    }
    for test_set in sets:
        one = encoded[test_set.name]
        teacher_rows: dict[int, Any] = {}
        if settings.teacher is not None:
            stored = folder.teacher_responses(test_set.name, settings.teacher.fingerprint).rows
            teacher_rows = {key[0]: row for key, row in stored.items()}
        scores: dict[str, SetScores] = {}
        for subject in settings.subjects:
            answers = folder.responses(subject.name, test_set.name, subject.fingerprint)
            measured, own_measured = _distances(settings, folder, subject, test_set)
            own = folder.own_responses(subject.name, test_set.name, subject.fingerprint)

            def asked(lines: Lines | None, ids: Mapping[int, Prompt] = one.prompts) -> list[dict[str, Any]]:
                return [] if lines is None else [row for row in lines.rows.values() if row["id"] in ids]

            scores[subject.name] = score_set(
                [row for row in asked(answers) if row["seed"] in settings.protocol.seeds],
                asked(measured),
                reference_tokens=one.reference_tokens,
                teacher_responses=teacher_rows,
                own_responses=asked(own),
                own_distances=asked(own_measured),
            )
        first = settings.subjects[0].name
        results["sets"][test_set.name] = {
            "reference": test_set.reference,
            "records": len(one.prompts),
            "left_out": one.left_out,
            "models": {name: s.to_dict() for name, s in scores.items()},
            "differences": {name: compare_scores(s, scores[first]) for name, s in scores.items() if name != first},
            "position_differences": {
                name: compare_positions(s, scores[first]) for name, s in scores.items() if name != first
            },
        }
    return results
