"""The prompts of a data set as an Arrow table on disk: tokenised once, mapped into memory, kept for the next run.

`datasets` writes the table, maps it, locks it against a second process and never shows one that a kill cut off. What
this file adds is a key that covers everything the token ids depend on, so that a table is used again exactly while
none of it has changed, and a bound on the space that kept tables take. Knows nothing of order, held-out prompts or
models.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from qswitch import __version__
from qswitch.config import DataSection
from qswitch.data.records import iter_records
from qswitch.data.sources import Notify, source_stamp
from qswitch.data.template import Prompt, PromptEncoder, fit_prompt
from qswitch.models.gguf_cache import cache_folder
from qswitch.units import GIB

KEPT_BYTES = 20 * GIB
"""Tables used longest ago leave the cache where all together take more than this."""
ABANDONED_AFTER_S = 24 * 3600
"""A table that is not whole and was not written to for this long was left by a process that ended."""
_VERSION = 4
"""Of what a table holds; raised when a column changes its meaning, or a record may become other ids."""
_BATCH_RECORDS = 1024


class PromptTable(Sequence[Prompt]):
    """Prompts of a table within the limits of a run, each read from disk when it is asked for.

    Args:
        dataset: as `prompt_table` makes it.
        max_prompt_tokens: rows with a longer prompt are no prompts of the run.
        max_response_tokens: longer responses are cut.
        first_id: example id of the table's first row.
    """

    def __init__(self, dataset: Any, *, max_prompt_tokens: int, max_response_tokens: int, first_id: int = 0) -> None:
        self._dataset = dataset
        self._max_prompt_tokens, self._max_response_tokens = max_prompt_tokens, max_response_tokens
        self.first_id = first_id
        self.prompt_tokens = self._column("prompt_tokens")
        """Lengths of all rows' prompts, int32 [rows], too long ones included."""
        self.rows = np.flatnonzero(self.prompt_tokens <= max_prompt_tokens)
        """Rows of the table that are prompts, int64 [len(self)]."""

    def _column(self, name: str) -> np.ndarray:
        return self._dataset.data.column(name).to_numpy()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = int(self.rows[index])
        found = self._dataset[row]
        prompt = Prompt(
            example_id=self.first_id + row,
            prompt_ids=found["prompt_ids"],
            response_ids=found["response_ids"],
            text=found["text"],
            max_new_tokens=found["max_new_tokens"],
            earlier_turns=tuple((start, end) for start, end in found["earlier_turns"]),
        )
        fitting = fit_prompt(prompt, self._max_prompt_tokens, self._max_response_tokens)
        assert fitting is not None  # self.rows holds no longer ones
        return fitting

    @property
    def num_rows(self) -> int:
        """Records of the table, those with too long a prompt included."""
        return len(self._dataset)

    @property
    def fingerprint(self) -> int:
        """A checksum of which prompts these are and of their token ids, for telling other data."""
        which = repr((self.first_id, self._max_response_tokens)).encode() + self.rows.tobytes()
        return zlib.crc32(which + self.column("digest").tobytes())

    def digests(self) -> np.ndarray:
        """64 bits of every row's prompt and response, int64 [num_rows]; equal for duplicates. Among two million
        rows two different ones collide with probability 1e-7."""
        return self._column("digest")

    def column(self, name: str) -> np.ndarray:
        """A column of numbers of the rows that are prompts: [len(self)]."""
        return self._column(name)[self.rows]

    def unused_fields(self) -> dict[str, int]:
        """Columns and fields of turns that neither a record nor the template read -> in how many rows."""
        names = (self._dataset.data.column("unused").combine_chunks()).flatten()
        return {str(v["values"]): int(v["counts"]) for v in names.value_counts().to_pylist()}

    def text_ranks(self, rank: Callable[[str], int]) -> np.ndarray:
        """`rank` of every prompt's text, uint64 [len(self)]; texts are read a batch at a time."""
        ranks = np.empty(self.num_rows, np.uint64)
        start = 0
        for chunk in self._dataset.data.column("text").chunks:
            ranks[start : start + len(chunk)] = [rank(text) for text in chunk.to_pylist()]
            start += len(chunk)
        return ranks[self.rows]

    def select(self, kept: np.ndarray) -> PromptTable:
        """The same prompts where `kept`, bool [len(self)], holds."""
        selected = PromptTable(
            self._dataset,
            max_prompt_tokens=self._max_prompt_tokens,
            max_response_tokens=self._max_response_tokens,
            first_id=self.first_id,
        )
        selected.rows = self.rows[kept]
        return selected


def prompt_table(
    reference: str | list[str],
    data: DataSection,
    encoder: PromptEncoder,
    *,
    split: str,
    limit: int | None = None,
    notify: Notify | None = None,
) -> Any:
    """The records of `reference` as token ids, a `datasets.Dataset`: from the cache, or read and tokenised now.

    `notify` hears how many records are done.

    Raises:
        DataError: as `iter_records`, or the template refuses a record.
    """
    import datasets

    settings = data.model_dump(include={"columns", "system_prompt"})
    versions = [__version__, *(version(name) for name in ("transformers", "tokenizers"))]
    key = [_VERSION, versions, source_stamp(reference, split), settings, limit, encoder.fingerprint]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    folder = cache_folder() / "data" / digest
    _sweep(folder.parent, kept=folder)
    ids = datasets.List(datasets.Value("int32"))
    features = {
        "prompt_ids": ids,
        "prompt_tokens": datasets.Value("int32"),
        "response_ids": ids,
        "response_tokens": datasets.Value("int32"),
        "blank_response": datasets.Value("bool"),
        "max_new_tokens": datasets.Value("int32"),
        "earlier_turns": datasets.List(ids),
        "text": datasets.Value("string"),
        "unused": datasets.List(datasets.Value("string")),
        "digest": datasets.Value("int64"),
    }
    with _no_progress_bars():
        try:
            table = datasets.Dataset.from_generator(
                lambda: _rows(reference, data, encoder, split, limit, notify),
                features=datasets.Features(features),
                cache_dir=str(folder),
                fingerprint=digest,
            )
        except datasets.exceptions.DatasetGenerationError as error:
            if error.__cause__ is None:
                raise
            raise error.__cause__ from None
    os.utime(folder)
    return table


def _rows(
    reference: str | list[str],
    data: DataSection,
    encoder: PromptEncoder,
    split: str,
    limit: int | None,
    notify: Notify | None,
) -> Iterator[dict[str, Any]]:
    """Reads twice: what cannot be read is found in the first pass, which takes a fortieth of the tokenising."""
    total = 0
    for _ in iter_records(data, reference, limit=limit, split=split):
        total += 1
        if notify is not None and total % _BATCH_RECORDS == 0:
            notify(f"reading {reference}", total, None)
    records, done = iter_records(data, reference, limit=limit, split=split), 0
    while batch := list(itertools.islice(records, _BATCH_RECORDS)):
        for record, prompt in zip(batch, encoder.encode_batch(batch), strict=True):
            response = prompt.response_ids
            content = repr((prompt.prompt_ids, response)).encode()
            yield {
                "prompt_ids": prompt.prompt_ids,
                "prompt_tokens": len(prompt.prompt_ids),
                "response_ids": response,
                "response_tokens": -1 if response is None else len(response),
                "blank_response": record.response is not None and response is None,
                "max_new_tokens": prompt.max_new_tokens,
                "earlier_turns": [list(turn) for turn in prompt.earlier_turns],
                "text": prompt.text,
                "unused": [*record.unused, *prompt.left_out],
                "digest": int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True),
            }
        done += len(batch)
        if notify is not None:
            notify("tokenising", done, total)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """`notify` says how far it is; a second bar would write over it."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _sweep(folder: Path, *, kept: Path) -> None:
    """Makes room in `folder`: tables that a killed process left unfinished go, and those used longest ago.

    A table that another process has mapped stays readable to it where the system lets it be removed at all.
    """
    if not folder.is_dir():
        return
    found = []
    for table in folder.iterdir():
        files = [f.stat() for f in table.rglob("*") if f.is_file()]
        last_used = max((s.st_mtime for s in (*files, table.stat())), default=0.0)
        whole = any(table.rglob("dataset_info.json")) and not any(table.rglob("*.incomplete"))
        if whole or table == kept or time.time() - last_used < ABANDONED_AFTER_S:
            found.append((table == kept, last_used, sum(s.st_size for s in files), table))
        else:
            shutil.rmtree(table, ignore_errors=True)
    size = 0
    for _, _, table_bytes, table in sorted(found, reverse=True):
        size += table_bytes
        if size > KEPT_BYTES and table != kept:
            shutil.rmtree(table, ignore_errors=True)
