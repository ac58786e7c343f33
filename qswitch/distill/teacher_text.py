"""What a teacher writes for a student that reads other tokens: its responses as text, in files of records.

The files are made before the student is loaded, a part at a time, and a part is there whole or not at all; which
responses they hold is a function of the run's seed, so a run that was stopped goes on with the next part. A response
ends at the first of the teacher's end tokens, and is decoded without special tokens; what was cut off at
rollout.max_new_tokens is marked, so that the student learns no end there. Knows nothing of the student.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from qswitch.config import RunConfig
from qswitch.data.records import Record, iter_records
from qswitch.data.template import Prompt
from qswitch.distill.recovery import BatchRows
from qswitch.distill.stored_teacher import About, differs
from qswitch.distill.teaching import Item, about_run, items_of_a_run
from qswitch.distill.validation import VALIDATION_SEED
from qswitch.errors import RunDirError, TrainingError
from qswitch.manifest import MANIFEST, entry_of, find_damage, read_manifest, write_manifest
from qswitch.models.host_memory import release_memory
from qswitch.models.language_model import LanguageModel
from qswitch.models.load import load_teacher
from qswitch.models.pair import TokenizerPair
from qswitch.models.runtime import make_runtime
from qswitch.outside import read_json
from qswitch.preflight import Prepared
from qswitch.rollout.decode import RolloutRequest, rollout
from qswitch.rollout.policy import TeacherPolicy
from qswitch.run_dir import write_atomically
from qswitch.thinking import opened_thought

PART_RESPONSES = 128
"""Responses of a part: what a killed process loses at most."""
TRAINING, HELD_OUT = "train", "held_out"
_ABOUT = "about.json"


def text_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files with training records, and those with held-out ones; a part without any response has none."""
    found = [sorted(p for p in folder.glob(f"{kind}-*.jsonl") if p.stat().st_size) for kind in (TRAINING, HELD_OUT)]
    return found[0], found[1]


def write_text(
    folder: Path,
    config: RunConfig,
    prepared: Prepared,
    *,
    rows: int,
    say: Callable[[str], None],
    notify: Callable[[str, int, int | None], None],
) -> None:
    """Let the teacher write what is missing of a run's text, `rows` responses at a time; nothing where all is there.

    Args:
        config, prepared: the teacher's half of the run.
        notify: hears how far it is.

    Raises:
        RunDirError: the text there is of another teacher or of other data.
        ModelError: the teacher cannot be loaded.
        TrainingError: it wrote nothing that can be learnt.
    """
    pair, prompts = prepared.pair, prepared.prompts
    about = asdict(about_run(config, pair, prompts.train, prompts.held_out))
    folder.mkdir(exist_ok=True)
    _require_same(folder, about)
    _drop_damaged(folder, say)
    if not (folder / MANIFEST).is_file():
        write_atomically(folder / _ABOUT, json.dumps(about, indent=1) + "\n")
        _write_missing(folder, config, prepared, rows, say, notify)
        write_manifest(folder, pattern="*.jsonl")
    for kind, files in zip((TRAINING, HELD_OUT), text_files(folder), strict=True):
        if not files:
            which = "training prompts" if kind == TRAINING else "held-out prompts"
            raise TrainingError(
                f"Every response of the teacher to the {which} was empty, so there is nothing to learn. Check its chat "
                "template, its end tokens and data.end_tokens."
            )


def _require_same(folder: Path, about: dict[str, Any]) -> None:
    if not (folder / _ABOUT).is_file():
        return
    written = read_json(folder / _ABOUT, dict[str, Any])
    theirs: dict[str, Any] = {name: written.get(name) for name in about}
    difference = differs(About(**about), About(**theirs))
    if difference is not None:
        raise RunDirError(
            f"The teacher's text in {folder} is for another run: it has {difference}. Remove that folder to have it "
            "written again, or set back what was changed."
        )


def _drop_damaged(folder: Path, say: Callable[[str], None]) -> None:
    """Remove files that are not as they were written, and the manifest with them; they are written again."""
    if not (folder / MANIFEST).is_file() or find_damage(folder) is None:
        return
    for name, written in (read_manifest(folder) or {"files": {}})["files"].items():
        path = folder / name
        if not path.is_file() or entry_of(path) != written:
            say(f"{path} is not as it was written; the teacher writes it again")
            path.unlink(missing_ok=True)
    (folder / MANIFEST).unlink()


def _write_missing(
    folder: Path,
    config: RunConfig,
    prepared: Prepared,
    rows: int,
    say: Callable[[str], None],
    notify: Callable[[str, int, int | None], None],
) -> None:
    pair, prompts = prepared.pair, prepared.prompts
    training = [(prompt, visit) for _, prompt, visit in items_of_a_run(config, prompts.train)]
    held_out = [(prompt, 0) for prompt in prompts.held_out]
    records = {
        TRAINING: _records(config, {p.example_id for p, _ in training}),
        HELD_OUT: _held_out_records(config, {p.example_id for p, _ in held_out}),
    }
    runtime = make_runtime(config.train)
    say(
        f"the tokenizers differ: the teacher writes {len(training) + len(held_out):,} responses first, which the "
        f"student then reads as text ({folder})"
    )
    say(f"loading the teacher ({config.teacher.precision}) on {runtime.device}")
    teacher = load_teacher(config.teacher, runtime, vocab_size=pair.vocab_size)
    batch, done, total = BatchRows(rows, say=say), 0, len(training) + len(held_out)
    num_empty = 0
    for path, kind, items in _parts(folder, training, held_out):
        if not path.is_file():
            texts = _texts(items, kind, config, pair, teacher, batch)
            lines = [
                _line(records[kind][prompt.example_id], text, ended)
                for (prompt, _), (text, ended) in zip(items, texts, strict=True)
                if text.strip()
            ]
            num_empty += len(items) - len(lines)
            write_atomically(path, "".join(lines))
        done += len(items)
        notify("the teacher writes", done, total)
    if num_empty:
        say(f"{num_empty} of its responses were empty and are left out")
    del teacher
    release_memory(runtime.device)


def _parts(
    folder: Path, training: Sequence[Item], held_out: Sequence[Item]
) -> Iterator[tuple[Path, str, Sequence[Item]]]:
    """(file, what of, its prompts with their visits): held-out prompts first, so that a wrong teacher shows at once."""
    for kind, items in ((HELD_OUT, held_out), (TRAINING, training)):
        for number, start in enumerate(range(0, len(items), PART_RESPONSES)):
            yield folder / f"{kind}-{number:06d}.jsonl", kind, items[start : start + PART_RESPONSES]


def _texts(
    items: Sequence[Item], kind: str, config: RunConfig, pair: TokenizerPair, teacher: LanguageModel, batch: BatchRows
) -> list[tuple[str, bool]]:
    """The teacher's response to each prompt as text, and whether the teacher ended it."""
    limit = config.rollout.max_new_tokens
    requests = [RolloutRequest(p.example_id, visit, p.prompt_ids, p.max_new_tokens or limit) for p, visit in items]
    # As in a run with one tokenizer: held-out responses have a seed of their own, and are sampled.
    seed, temperature = config.seed, config.rollout.temperature
    if kind == HELD_OUT:
        seed, temperature = VALIDATION_SEED, 1.0
    written, _ = batch.attempt(
        teacher.device,
        partial(
            rollout,
            requests,
            teacher=teacher,
            student=None,
            policy=TeacherPolicy(),
            eos_ids=pair.eos_ids,
            pad_id=pair.pad_id,
            keep="nothing",
            seed=seed,
            temperature=temperature,
        ),
    )
    return [as_text(pair, p, one.response_ids) for (p, _), one in zip(items, written, strict=True)]


def as_text(pair: TokenizerPair, prompt: Prompt, response_ids: Sequence[int]) -> tuple[str, bool]:
    """A response as text without its special tokens, and whether it was ended; with the mark of a thought that its
    prompt opens, which the student's template may not write."""
    ended = bool(response_ids) and response_ids[-1] in pair.eos_ids
    ids = response_ids[:-1] if ended else response_ids
    text = pair.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    # A limit may fall inside a character of several tokens.
    if not ended:
        text = text.rstrip("\ufffd")
    return (opened_thought(prompt.text) + text if text.strip() else text), ended


def _records(config: RunConfig, wanted: set[int]) -> dict[int, Record]:
    """The training records of some example ids, which count on from one weighted set to the next."""
    data = config.data
    groups: list[str | list[str]] = [data.train] if data.weights is None else [*data.train]
    found: dict[int, Record] = {}
    first = 0
    for group in groups:
        count = 0
        for record in iter_records(data, group, limit=data.limit, split=data.split):
            if first + record.id in wanted:
                found[first + record.id] = record
            count += 1
        first += count
    return found


def _held_out_records(config: RunConfig, wanted: set[int]) -> dict[int, Record]:
    data = config.data
    if data.validation is None:
        return _records(config, wanted)
    split = data.validation_split or data.split
    return {r.id: r for r in iter_records(data, data.validation, split=split) if r.id in wanted}


def _line(record: Record, text: str, ended: bool) -> str:
    """A record with the teacher's response, as a line of JSON that `qswitch sft` reads as well."""
    if record.instruction is None:
        turns = [message.to_dict() for message in record.messages]
        row: dict[str, Any] = {"messages": [*turns, {"role": "assistant", "content": text}]}
    else:  # the Alpaca template lays the halves of an instruction out
        row = {"instruction": record.instruction, "input": record.input, "output": text}
        if record.messages[0].role == "system":
            row["system"] = record.messages[0].content
    if record.tools:
        row["tools"] = list(record.tools)
    if record.template_kwargs:
        row["chat_template_kwargs"] = dict(record.template_kwargs)
    row["teacher_response"] = "whole" if ended else "cut"
    return json.dumps(row, ensure_ascii=False) + "\n"
