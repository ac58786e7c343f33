"""Which records an evaluation asks, and what counts as a good answer to each. Knows no model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qswitch.config import DataSection
from qswitch.data.records import Record, load_records
from qswitch.data.sources import iter_rows
from qswitch.data.template import Prompt, PromptEncoder
from qswitch.errors import DataError

BUCKETS = (("1-10", 1, 10), ("11-50", 11, 50), ("51+", 51, None))
"""Reference lengths in tokens, as the SWITCH paper groups them."""


@dataclass(frozen=True, slots=True)
class TestRecord:
    """One prompt and the answers that count as right."""

    __test__ = False  # the name is no test class of pytest

    record: Record
    references: tuple[str, ...]
    """Empty for a prompt without an answer: it is written and measured against the teacher, not scored."""


@dataclass(frozen=True, slots=True)
class TestSet:
    """A named set of records."""

    __test__ = False

    name: str
    reference: str
    """What the user named: a file, a folder, a hub id."""
    records: tuple[TestRecord, ...]

    @property
    def fingerprint(self) -> str:
        """Changes whenever a prompt or a reference does."""
        digest = hashlib.sha256()
        for item in self.records:
            digest.update(repr((item.record.id, item.record.text, item.references)).encode())
        return digest.hexdigest()[:16]


def load_test_set(data: DataSection, reference: str, *, limit: int | None = None) -> TestSet:
    """The first `limit` records of `reference` with their references: the list `references`, else the response.

    Raises:
        DataError: as `load_records`; or `references` is no list of texts.
    """
    records = load_records(data, reference, sample=limit)
    rows = list(islice(iter_rows(reference, split=data.split), records[-1].id + 1))
    items = []
    for record in records:
        references = _references(rows[record.id].fields.get("references"), record)
        items.append(TestRecord(record, references))
    return TestSet(_name(reference), reference, tuple(items))


def _references(value: Any, record: Record) -> tuple[str, ...]:
    if value is None or value == []:
        return (record.response,) if record.response is not None and record.response.strip() else ()
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise DataError(f"{record.source}: references must be a list of texts. Mend or delete this record.")
    return tuple(value)


def _name(reference: str) -> str:
    name = Path(reference).name
    for ending in (".gz", ".zst", ".xz", ".bz2", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"):
        name = name.removesuffix(ending)
    return name.replace(":", "-") or "set"


def clash_of_names(references: Sequence[str]) -> str | None:
    """Why sets cannot be evaluated together, whose files are named after them; None where they can."""
    names = {_name(reference) for reference in references}
    if any(f"{name}.{own}" in names for name in names for own in ("teacher", "own")):
        return "One set's file name is another's with .teacher or .own, which name our files. Rename one."
    if len(names) < len(references):
        return "Two of the sets have the same file name. Evaluate them one after the other."
    return None


def encode_test_set(
    test_set: TestSet, encoder: PromptEncoder, *, max_prompt_tokens: int
) -> tuple[dict[int, Prompt], int]:
    """Record id -> its prompt, and how many records were left out because theirs is longer than the limit.

    Raises:
        DataError: every prompt is longer.
    """
    encoded = encoder.encode_batch([item.record for item in test_set.records])
    kept = {p.example_id: p for p in encoded if len(p.prompt_ids) <= max_prompt_tokens}
    if not kept:
        shortest = min(len(p.prompt_ids) for p in encoded)
        raise DataError(
            f"{test_set.reference}: every prompt is longer than {max_prompt_tokens} tokens, the least of "
            f"--max-prompt-tokens and what --max-new-tokens leaves of the context (the shortest has {shortest}). Raise "
            "the one or lower the other."
        )
    return kept, len(encoded) - len(kept)


def bucket_of(num_tokens: int) -> str:
    """The bucket of a reference length in tokens; an empty reference counts as the shortest."""
    for name, _, last in BUCKETS:
        if last is None or num_tokens <= last:
            return name
    raise AssertionError(num_tokens)
