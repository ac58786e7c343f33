"""Which rows one data file holds: JSON, JSON lines, csv, parquet or text, as plain dictionaries.

Every row says where it stands (file and line), so that whoever finds it unusable can say so. Knows nothing of folders,
the hub, prompts or columns.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qswitch.data.compression import COMPRESSIONS, compression_of, data_suffix, open_bytes
from qswitch.errors import DataError

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TEXT_SUFFIXES = (".txt", ".md")
_FIELD_LIMIT_CHARS = 2**27
_DELIMITERS = (";", "\t", "|", ",")


@dataclass(frozen=True)
class Row:
    """One record as it stands in the file: column -> value, and where it stands, for example `p.jsonl line 3`."""

    fields: dict[str, Any]
    where: str


def rows_of_file(path: Path, suffixes: tuple[str, ...]) -> Iterator[Row]:
    """The rows of a file whose ending, but for a compression's, is one of `suffixes`.

    Raises:
        DataError: another ending, or a line that cannot be read; names file, line, reason and remedy.
    """
    suffix = data_suffix(path)
    if suffix not in suffixes:
        raise DataError(
            f"{path}: files that end in {path.suffix.lower() or 'nothing'} are not read. Use {', '.join(suffixes)}, "
            f"plain or compressed ({', '.join(COMPRESSIONS)})."
        )
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty. Put at least one record into it, or name another file.")
        if suffix in (".jsonl", ".ndjson"):
            yield from _json_lines(path)
        elif suffix == ".json":
            yield from _json_file(path)
        elif suffix in (".csv", ".tsv"):
            yield from _csv_file(path, _delimiter(path, "\t" if suffix == ".tsv" else ","))
        elif suffix == ".parquet":
            yield from _parquet_file(path)
        else:
            yield Row({"text": _read_text(path)}, str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from None


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> DataError:
    with open_bytes(path) as file:
        is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return DataError(
        f"{path} line {line}: not UTF-8 text (byte 0x{error.object[error.start]:02x}). Save the file as UTF-8, "
        f"for example with `iconv -f {'UTF-16' if is_utf16 else 'WINDOWS-1252'} -t UTF-8`."
    )


def _first_line_not_utf8(path: Path) -> DataError:
    """Reads the file again, line by line, to say where the decoder of the whole file gave up."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return _not_utf8(path, number, error)
    raise AssertionError(f"{path} decodes line by line, but not as a whole")


def _read_text(path: Path) -> str:
    with open_bytes(path) as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _first_line_not_utf8(path) from None


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


class _AsWritten(float):
    """A number with a fraction that prints as it was written: 0.10 as an answer stays 0.10."""

    def __new__(cls, text: str) -> _AsWritten:
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __str__(self) -> str:
        return self.text


_DECODER = json.JSONDecoder(parse_float=_AsWritten, parse_constant=_refuse_constant)


def _parse_json(text: str) -> Any:
    return _DECODER.decode(text)


def from_arrow(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A row without the nulls inside its values: Arrow gives every object of a column the keys of all of them."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: cleaned(v) for k, v in value.items() if v is not None}
        return [cleaned(v) for v in value] if isinstance(value, list) else value

    return {name: cleaned(value) for name, value in fields.items()}


def _as_row(value: Any, where: str) -> Row:
    if isinstance(value, str):
        return Row({"prompt": value}, where)
    if not isinstance(value, dict):
        raise DataError(f'{where}: expected an object such as {{"prompt": "..."}}, found {type(value).__name__}.')
    return Row(value, where)


def _json_lines(path: Path) -> Iterator[Row]:
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            row = parse_json_line(line, path, number)
            if row is not None:
                yield row


def parse_json_line(line: bytes, path: Path, number: int) -> Row | None:
    """The row on line `number` (from 1) of a JSON-lines file; None for a blank line.

    Raises:
        DataError: the line is not UTF-8, no JSON, or no object.
    """
    where = f"{path} line {number}"
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, error) from None
    if not text.strip():
        return None
    try:
        value = _parse_json(text)
    except json.JSONDecodeError as error:
        if number == 1 and text.lstrip().startswith("["):
            raise _an_array(path) from None
        raise DataError(
            f"{where}: not valid JSON: {error.msg} at column {error.colno}. Write one object a line; "
            "mend or delete this line."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}. Mend or delete this line.") from None
    if number == 1 and isinstance(value, list) and any(isinstance(item, dict) for item in value):
        raise _an_array(path)
    return _as_row(value, where)


def _an_array(path: Path) -> DataError:
    return DataError(
        f"{path} line 1: the file holds one JSON array, not an object a line. Rename it to end in .json, or write one "
        "object a line."
    )


def _json_file(path: Path) -> Iterator[Row]:
    text = _read_text(path)
    try:
        value = _parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under the name .json, as the hub often has them
            yield from _json_lines(path)
            return
        raise DataError(
            f"{path} line {error.lineno}: not valid JSON: {error.msg} at column {error.colno}. Mend the file."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}. Mend the file.") from None
    if isinstance(value, dict):
        # {"data": [...], "version": 1} is a wrapper around records.
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        value = lists[0] if len(lists) == 1 and not _is_record(value) else [value]
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of objects, found {type(value).__name__}.")
    for number, item in enumerate(value, 1):
        yield _as_row(item, f"{path} record {number}")


def _is_record(value: dict[str, Any]) -> bool:
    """Whether an object has a prompt of its own: as text, or as turns, which have a speaker and content."""

    def is_conversation(entry: Any) -> bool:
        first = entry[0] if isinstance(entry, list) and entry else None
        keys = first.keys() if isinstance(first, dict) else set()
        return bool(keys & {"role", "from"}) and bool(keys & {"content", "value", "tool_calls"})

    has_text = any(isinstance(value.get(k), str) for k in ("prompt", "instruction", "question", "text"))
    is_named = bool(value.keys() & {"messages", "conversations", "conversation"})
    return has_text or is_named or any(map(is_conversation, value.values()))


def _delimiter(path: Path, usual: str) -> str:
    """What separates the cells: `usual`, or another of `; tab | ,` where that parts the header into more cells."""
    with open_bytes(path) as file:
        header = re.split("[\r\n]", file.readline().decode("utf-8-sig", errors="replace"), maxsplit=1)[0]

    def cells(delimiter: str) -> int:
        try:
            found = next(csv.reader([header], delimiter=delimiter), [])
        except csv.Error:  # said, with its line, where the rows are read
            return 0
        # A cell that begins with a blank is text in which the delimiter is punctuation: "response, if any".
        return 0 if any(cell.startswith(" ") for cell in found) else len(found)

    most = max(map(cells, _DELIMITERS))
    return usual if cells(usual) == most else max(_DELIMITERS, key=cells)


def _csv_file(path: Path, delimiter: str) -> Iterator[Row]:
    """Every cell as text, so that 007 stays 007; a quoted cell may span lines. Read row by row."""
    csv.field_size_limit(_FIELD_LIMIT_CHARS)
    header: list[str] | None = None
    start = 1
    try:
        with open_bytes(path) as file:
            lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            for cells in reader:
                where = f"{path} line {start}"
                start = reader.line_num + 1
                if not cells:
                    continue
                if header is None:
                    header = [name.strip() for name in cells]
                    if len(set(header)) != len(header):
                        raise DataError(f"{where}: two columns have the same name ({', '.join(header)}). Rename one.")
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{where}: {len(cells)} cells, but the header has {len(header)} ({', '.join(header)}). "
                        "Put text that holds a delimiter into double quotes."
                    )
                yield Row(dict(zip(header, cells, strict=True)), where)
    except csv.Error as error:
        raise DataError(f"{path} line {start}: not valid CSV: {error}. Check the quotes.") from None
    except UnicodeDecodeError:
        raise _first_line_not_utf8(path) from None


def _parquet_file(path: Path) -> Iterator[Row]:
    if compression_of(path):
        raise DataError(f"{path}: parquet compresses by itself and is not read from a compressed file. Unpack it.")
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(from_arrow(fields), f"{path} record {number}")
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not readable as parquet: {first_line(error)}. Write the file anew.") from None


def first_line(error: Exception) -> str:
    """The first line of an exception's message, without its full stop."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
