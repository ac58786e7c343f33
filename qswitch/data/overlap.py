"""Which prompts of one data set are also in another, so that nobody scores a model on what it was trained on.

Knows no models. Reads record by record, so the training data may be larger than memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from qswitch.config import DataSection
from qswitch.data.records import Record, training_records


def prompt_digest(record: Record) -> bytes:
    """Equal for prompts that differ in case and spacing at most; system turns do not count."""
    turns = (f"{m.role}: {' '.join(m.content.split()).casefold()}" for m in record.messages if m.role != "system")
    return hashlib.blake2b("\n".join(turns).encode(), digest_size=16).digest()


def seen_in_training(data: DataSection, records: Iterable[Record]) -> set[int]:
    """Ids of those `records` whose prompt is also one that a run with these settings trains on or holds out.

    Raises:
        DataError: data.train cannot be read any more.
    """
    wanted: dict[bytes, set[int]] = {}
    for record in records:
        wanted.setdefault(prompt_digest(record), set()).add(record.id)
    found: set[int] = set()
    for record in training_records(data):
        found |= wanted.get(prompt_digest(record), set())
    return found
