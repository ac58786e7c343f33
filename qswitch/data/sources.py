"""Which rows a data reference holds: files, folders, package files and hub data sets, as plain dictionaries.

Knows nothing of prompts or columns. Every row says where it came from (file and line), so that whoever finds a row
unusable can say so.
"""

from __future__ import annotations

import csv
import difflib
import importlib.util
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qswitch.errors import DataError

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TEXT_SUFFIXES = (".txt", ".md")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
_FIELD_LIMIT_CHARS = 2**27


@dataclass(frozen=True)
class Row:
    """One record as it stands in the file: column -> value, and where it stands, for example `p.jsonl line 3`."""

    fields: dict[str, Any]
    where: str


def iter_rows(reference: str | list[str], *, split: str = "train", text_files: bool = False) -> Iterator[Row]:
    """Rows of every file, folder or hub data set in `reference`, in order.

    A folder stands for its data files in name order. A hub id is `owner/name`, or `owner/name:configuration`.
    With `text_files`, .txt and .md files count too, each as one row `{"text": whole file}`.

    Raises:
        DataError: nothing there, nothing in it, or a line that cannot be read; names file, line, reason and remedy.
    """
    references = [reference] if isinstance(reference, str) else list(reference)
    if not references:
        raise DataError("No data file is named. Set data.train to a file, a folder or a hub id.")
    for one in references:
        rows = _rows_of(one, split, text_files)
        first = next(rows, None)
        if first is None:
            raise DataError(f"{one} holds no records. Put at least one into it, or name another file.")
        yield from itertools.chain([first], rows)


def _rows_of(reference: str, split: str, text_files: bool) -> Iterator[Row]:
    path = _package_path(reference) if reference.startswith("package:") else Path(reference).expanduser()
    suffixes = RECORD_SUFFIXES + (TEXT_SUFFIXES if text_files else ())
    if path.is_dir():
        files = sorted(
            f
            for f in path.rglob("*")
            if f.is_file() and f.suffix.lower() in suffixes and not f.relative_to(path).parts[0].startswith(".")
        )
        if not files:
            raise DataError(f"The folder {path} holds no data file. Files end in {', '.join(suffixes)}.")
        for file in files:
            yield from _rows_of_file(file, suffixes)
    elif path.exists():
        yield from _rows_of_file(path, suffixes)
    elif _HUB_ID.fullmatch(reference) and path.suffix.lower() not in suffixes:
        yield from _rows_of_hub(reference, split)
    else:
        raise DataError(f"{reference} does not exist.{_nearest_file(path, suffixes)}")


def _package_path(reference: str) -> Path:
    """`package:module/file` -> the file inside an installed package, found without importing it."""
    package, _, inner = reference.removeprefix("package:").partition("/")
    if not package or not inner:
        raise DataError(f"{reference}: write it as package:MODULE/FILE, MODULE being an installed package.")
    try:
        spec = importlib.util.find_spec(package) if "." not in package else None
    except ValueError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"{reference}: no package named {package} is installed. Install it, or name a file.")
    return Path(next(iter(spec.submodule_search_locations))) / inner


def _nearest_file(path: Path, suffixes: tuple[str, ...]) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" Neither does its folder {folder}. Paths start at the current folder, {Path.cwd()}."
    names = [f.name for f in folder.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if near:
        return f" Did you mean {folder / near[0]}?"
    files = sorted(n for n in names if Path(n).suffix.lower() in suffixes)[:5]
    held = f"holds {', '.join(files)}" if files else "holds no data file"
    return f" The folder {folder.resolve()} {held}. A hub data set is written owner/name."


def _rows_of_file(path: Path, suffixes: tuple[str, ...]) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        raise DataError(f"{path}: files that end in {suffix or 'nothing'} are not read. Use {', '.join(suffixes)}.")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty. Put at least one record into it, or name another file.")
        if suffix in (".jsonl", ".ndjson"):
            yield from _json_lines(path)
        elif suffix == ".json":
            yield from _json_file(path)
        elif suffix in (".csv", ".tsv"):
            yield from _csv_file(path, "\t" if suffix == ".tsv" else ",")
        elif suffix == ".parquet":
            yield from _parquet_file(path)
        else:
            yield Row({"text": _read_text(path)}, str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from None


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{path} line {line}: not UTF-8 text (byte 0x{error.object[error.start]:02x}). Save the file as UTF-8, "
        f"for example with `iconv -f WINDOWS-1252 -t UTF-8`."
    )


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, data.count(b"\n", 0, error.start) + 1, error) from None


def _parse_json(text: str) -> Any:
    """Numbers with a fraction stay as they are written: they end up as text."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_float=str, parse_constant=refuse)


def _as_row(value: Any, where: str) -> Row:
    if isinstance(value, str):
        return Row({"prompt": value}, where)
    if not isinstance(value, dict):
        raise DataError(f'{where}: expected an object such as {{"prompt": "..."}}, found {type(value).__name__}.')
    return Row(value, where)


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path} line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number, error) from None
            if not text.strip():
                continue
            try:
                value = _parse_json(text)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where}: not valid JSON: {error.msg} at column {error.colno}. Write one object a line; "
                    "mend or delete this line."
                ) from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not valid JSON: {error}. Mend or delete this line.") from None
            yield _as_row(value, where)


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
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        wrapped = len(value) == 1 and len(lists) == 1
        value = lists[0] if wrapped else [value]
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of objects, found {type(value).__name__}.")
    for number, item in enumerate(value, 1):
        yield _as_row(item, f"{path} record {number}")


def _csv_file(path: Path, delimiter: str) -> Iterator[Row]:
    """Every cell as text, so that 007 stays 007; a quoted cell may span lines."""
    csv.field_size_limit(_FIELD_LIMIT_CHARS)
    lines = _read_text(path).splitlines(keepends=True)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1
    try:
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


def _parquet_file(path: Path) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, fields in enumerate(rows, 1):
            yield Row(dict(fields), f"{path} record {number}")
    except DataError:
        raise
    except Exception as error:  # datasets and pyarrow raise many kinds; all mean that the file is no parquet
        raise DataError(f"{path}: not readable as parquet: {_first_line(error)}. Write the file anew.") from None


def _rows_of_hub(reference: str, split: str) -> Iterator[Row]:
    import datasets

    name, _, configuration = reference.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # network, missing data set, split, configuration or token: many kinds, one remedy
        raise DataError(
            f"{reference} is no file here, and the hub gave no data set (split {split}): {_first_line(error)}. "
            "Check the name, data.split, the network and HF_TOKEN; a configuration is written owner/name:configuration."
        ) from None
    for number, fields in enumerate(rows, 1):
        yield Row(dict(fields), f"{reference} {split} record {number}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
