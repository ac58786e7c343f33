"""Prompts of data larger than memory: records are read and tokenised when their turn comes.

One pass beforehand finds where every line begins, proves that every record can be read, counts what is odd, and picks
the held-out prompts. What it found is kept in an index on disk, 8 bytes a line, so that any record is one seek away and
the order of the run is as exact, and as resumable, as in memory. Data that is not plain JSON lines is written out as
such first. Knows nothing of models.
"""

from __future__ import annotations

import array
import hashlib
import heapq
import json
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from qswitch.config import DataSection
from qswitch.data.compression import compression_of, data_suffix
from qswitch.data.loader import held_out_rank
from qswitch.data.records import Record, record_of_row
from qswitch.data.sources import Notify, data_files, iter_rows, parse_json_line, reference_path
from qswitch.data.template import Prompt, PromptEncoder, fit_prompt
from qswitch.errors import DataError

_LINES_PER_NOTE = 20_000
_VERSION = 1
"""Of the index; raised when its content changes its meaning."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What the pass over an entry of data.train found, in records."""

    lines: int
    records: int
    duplicates: int
    """Records whose prompt and response both occurred before."""
    empty_responses: int
    without_response: int
    """With no response to learn from, the empty ones included."""
    checksum: int


@dataclass(frozen=True, slots=True)
class Index:
    """Where the lines of one JSON-lines file begin, and what the pass over it found."""

    path: Path
    offsets: Any
    """int64 [lines + 1] on disk: where each line begins, and where the last one ends."""
    counts: Counts
    lowest: list[tuple[str, int]]
    """(held-out rank, line) of the distinct prompts with the lowest ranks, in order."""


def build_index(
    path: Path, data: DataSection, *, seed: int, num_lowest: int, folder: Path, notify: Notify | None = None
) -> Index:
    """The index of a JSON-lines file, from `folder` where the same file was indexed before.

    Memory is constant but for 8 bytes a record while duplicates are counted.

    Raises:
        DataError: a line that cannot be read as a record; names file, line, reason and remedy.
    """
    stat = path.stat()
    settings = [_VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns, sorted(data.columns.items()),
                data.system_prompt, data.limit, seed, num_lowest]  # fmt: skip
    target = folder / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    if not (target / "index.json").is_file():
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            found = _scan(path, data, seed, num_lowest, partial, notify)
            (partial / "index.json").write_text(json.dumps(found), encoding="utf-8")
            try:
                os.replace(partial, target)
            except OSError:  # another process was first
                if not (target / "index.json").is_file():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    found = json.loads((target / "index.json").read_text(encoding="utf-8"))
    return Index(
        path=path,
        offsets=np.memmap(target / "offsets.bin", dtype=np.int64, mode="r"),
        counts=Counts(**found["counts"]),
        lowest=[(rank, line) for rank, line in found["lowest"]],
    )


def _scan(
    path: Path, data: DataSection, seed: int, num_lowest: int, folder: Path, notify: Notify | None
) -> dict[str, Any]:
    offsets, digests = array.array("q"), array.array("Q")
    lines = records = empty = without = checksum = position = 0
    lowest: list[tuple[int, int]] = []  # a heap of (-rank, line), the highest of the kept ranks on top
    kept: set[int] = set()
    size = path.stat().st_size
    with (
        path.open("rb") as source,
        (folder / "offsets.bin").open("wb") as offset_file,
        (folder / "digests.bin").open("wb") as digest_file,
    ):
        for line in source:
            if data.limit is not None and records == data.limit:
                break
            offsets.append(position)
            position += len(line)
            lines += 1
            checksum = zlib.crc32(line, checksum)
            if lines % _LINES_PER_NOTE == 0:
                offsets.tofile(offset_file)
                digests.tofile(digest_file)
                del offsets[:], digests[:]
                if notify is not None:
                    notify(f"indexing {path.name}", position, size)
            row = parse_json_line(line, path, lines)
            if row is None:
                continue
            record = record_of_row(row, lines - 1, data)
            records += 1
            blank = record.response is None or not record.response.strip()
            without += blank
            empty += blank and record.response is not None
            digests.append(content_digest(record))
            rank = int.from_bytes(held_out_rank(record.text, seed), "big")
            if rank in kept or (len(lowest) == num_lowest and (not lowest or rank >= -lowest[0][0])):
                continue
            kept.add(rank)
            heapq.heappush(lowest, (-rank, lines - 1))
            if len(lowest) > num_lowest:
                kept.discard(-heapq.heappop(lowest)[0])
        offsets.append(position)
        offsets.tofile(offset_file)
        digests.tofile(digest_file)
    if not records:
        raise DataError(f"{path} holds no records. Put at least one into it, or name another file.")
    seen = np.fromfile(folder / "digests.bin", dtype=np.uint64)
    seen.sort()
    duplicates = int((seen[1:] == seen[:-1]).sum())
    (folder / "digests.bin").unlink()
    counts = {"lines": lines, "records": records, "duplicates": duplicates, "empty_responses": empty,
              "without_response": without, "checksum": checksum}  # fmt: skip
    ordered = sorted((-negative, line) for negative, line in lowest)
    return {"counts": counts, "lowest": [[f"{rank:032x}", line] for rank, line in ordered]}


def content_digest(record: Record) -> int:
    """64 bits of a record's prompt and response, for telling duplicates; among 2 million records two collide with
    probability 1e-7."""
    content = f"{record.text}\0{record.response or ''}"
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big")


def json_lines_files(reference: str, split: str, folder: Path, notify: Notify | None = None) -> list[Path]:
    """The JSON-lines files of a reference; whatever else it names is written out as one such file in `folder`, once.

    Raises:
        DataError: nothing there, or a record that cannot be read.
    """
    path = reference_path(reference)
    files = data_files(path, split) if path is not None and not (path / "state.json").exists() else []
    if files and all(data_suffix(f) in (".jsonl", ".ndjson") and not compression_of(f) for f in files):
        return files
    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    name = hashlib.sha256(json.dumps([_VERSION, reference, split, stamps]).encode()).hexdigest()[:16]
    target = folder / f"{name}.jsonl"
    # Without files of its own (a hub id, a saved data set) nothing tells whether it changed, so it is written anew.
    if target.is_file() and files:
        return [target]
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as out:
            for number, row in enumerate(iter_rows(reference, split=split), 1):
                out.write(json.dumps(row.fields, ensure_ascii=False, default=str) + "\n")
                if notify is not None and number % _LINES_PER_NOTE == 0:
                    notify(f"writing {reference} out as JSON lines", number, None)
        os.replace(partial, target)
    except UnicodeEncodeError as error:
        raise DataError(f"{reference}: a record holds half a character ({error.reason}). Mend it.") from None
    finally:
        partial.unlink(missing_ok=True)
    return [target]


class StreamedPrompts:
    """The prompts of indexed files by line, made when asked for; None for lines that are no prompt of the run.

    Args:
        indices: the files, in order; their lines are numbered through.
        first_id: example id of the first line.
        held_out: ranks (hex) of prompts that belong to the validation.
        held_out_texts: texts of prompts that belong to it, where it has a file of its own.
    """

    def __init__(
        self,
        indices: Sequence[Index],
        encoder: PromptEncoder,
        data: DataSection,
        *,
        seed: int,
        max_response_tokens: int,
        first_id: int = 0,
        held_out: frozenset[str] = frozenset(),
        held_out_texts: frozenset[str] = frozenset(),
    ) -> None:
        self.indices, self._encoder, self._data = list(indices), encoder, data
        self._seed, self._max_response_tokens, self._first_id = seed, max_response_tokens, first_id
        self._held_out, self._held_out_texts = held_out, held_out_texts
        self._ends = np.cumsum([index.counts.lines for index in self.indices])
        self._files: dict[int, IO[bytes]] = {}
        self.fingerprint = zlib.crc32(repr([index.counts.checksum for index in self.indices]).encode())

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Prompt | None:
        record = self.record(index)
        if record is None or record.text in self._held_out_texts:
            return None
        if self._held_out and held_out_rank(record.text, self._seed).hex() in self._held_out:
            return None
        return self.encode(record)

    def encode(self, record: Record) -> Prompt | None:
        """The record as a prompt of the run; None where it is longer than data.max_prompt_tokens."""
        return fit_prompt(self._encoder.encode(record), self._data.max_prompt_tokens, self._max_response_tokens)

    def record(self, index: int) -> Record | None:
        """The record on a line, None for a blank one.

        Raises:
            DataError: the file changed since it was indexed.
        """
        which = int(np.searchsorted(self._ends, index, side="right"))
        found = self.indices[which]
        line = index - (int(self._ends[which - 1]) if which else 0)
        if which not in self._files:
            self._files[which] = found.path.open("rb")
        start, end = int(found.offsets[line]), int(found.offsets[line + 1])
        file = self._files[which]
        file.seek(start)
        row = parse_json_line(file.read(end - start), found.path, line + 1)
        return None if row is None else replace(record_of_row(row, line, self._data), id=self._first_id + index)
