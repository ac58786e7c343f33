"""Which rows a data reference holds: files, folders, package files and hub data sets, as plain dictionaries.

Knows nothing of prompts or columns. Every row says where it came from (file and line), so that whoever finds a row
unusable can say so.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import itertools
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qswitch.data.compression import data_suffix
from qswitch.data.files import RECORD_SUFFIXES, TEXT_SUFFIXES, Row, first_line, from_arrow, rows_of_file
from qswitch.errors import DataError, is_out_of_memory
from qswitch.outside import user_path

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
_METADATA = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
"""What the hub's data sets have beside their records."""
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in a file's name that say which split it belongs to, as the hub's data sets use them."""


Notify = Callable[[str, int, "int | None"], None]
"""Hears how far loading is: what is being done, how much of it, of how much (None: unknown)."""


def iter_rows(
    reference: str | list[str], *, split: str = "train", text_files: bool = False, stream_hub: bool = False
) -> Iterator[Row]:
    """Rows of every file, folder or hub data set in `reference`, in order.

    A folder stands for its data files in name order; where their names tell splits apart (train, validation, test),
    for those of `split` (`data_files`). It may also be one that `datasets` saved. A hub id is `owner/name`, or
    `owner/name:configuration`. Files may be compressed (.gz, .bz2, .xz, .zst). With `text_files`, .txt and .md files
    count too, each as one row `{"text": whole file}`. With `stream_hub`, a hub data set is read as it arrives, for a
    caller that stops early; else it is downloaded whole, and kept.

    Raises:
        DataError: nothing there, nothing in it, or a line that cannot be read; names file, line, reason and remedy.
    """
    references = [reference] if isinstance(reference, str) else list(reference)
    if not references:
        raise DataError("No data file is named. Set data.train to a file, a folder or a hub id.")
    for one in references:
        rows = _rows_of(one, split, text_files, stream_hub)
        first = next(rows, None)
        if first is None:
            raise DataError(f"{one} holds no records. Put at least one into it, or name another file.")
        yield from itertools.chain([first], rows)


def _rows_of(reference: str, split: str, text_files: bool, stream_hub: bool) -> Iterator[Row]:
    suffixes = RECORD_SUFFIXES + (TEXT_SUFFIXES if text_files else ())
    path = reference_path(reference, suffixes)
    if path is None:
        yield from _rows_of_hub(reference, split, stream_hub)
    elif is_saved_dataset(path):
        yield from _rows_of_saved(path, split)
    else:
        for file in data_files(path, split, suffixes):
            yield from rows_of_file(file, suffixes)


def source_stamp(reference: str | list[str], split: str) -> list[Any]:
    """What changes, as JSON, when the data behind a reference does: its files with their sizes and times.

    Raises:
        DataError: nothing there.
    """
    stamp: list[Any] = []
    for one in [reference] if isinstance(reference, str) else reference:
        files = local_files(one, split)
        if files is None:
            files = [Path(file["filename"]) for file in _hub_dataset(one, split).cache_files]
        stamp.append([one, split, *([str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files)])
    return stamp


def local_files(reference: str, split: str, *, text_files: bool = False) -> list[Path] | None:
    """The files behind one reference as `iter_rows` reads it, in order; None for a hub data set.

    Raises:
        DataError: nothing there.
    """
    suffixes = RECORD_SUFFIXES + (TEXT_SUFFIXES if text_files else ())
    path = reference_path(reference, suffixes)
    if path is None:
        return None
    return (
        sorted(filter(Path.is_file, path.rglob("*"))) if is_saved_dataset(path) else data_files(path, split, suffixes)
    )


def reference_path(reference: str, suffixes: tuple[str, ...] = RECORD_SUFFIXES) -> Path | None:
    """The file or folder of a reference; None for a hub id.

    Raises:
        DataError: neither is there, nor is it a hub id.
    """
    if not reference.strip():
        raise DataError("the name of a file is empty. Name a file, a folder or a hub id.")
    path = _package_path(reference) if reference.startswith("package:") else user_path(reference)
    if path.exists():
        return path
    if _HUB_ID.fullmatch(reference) and data_suffix(path) not in suffixes:
        return None
    raise DataError(f"{reference} does not exist.{_nearest_file(path, suffixes)}")


def data_files(path: Path, split: str, suffixes: tuple[str, ...] = RECORD_SUFFIXES) -> list[Path]:
    """The data files of a path: itself, or those in a folder, of one split where their names tell splits apart.

    Beside a file whose name says a split, one whose name says none is training data. A folder that has files of a
    single split, and no others, is read whole whatever `split` is, since there is nothing to choose from.

    Raises:
        DataError: the folder holds none, or none of the split.
    """
    if not path.is_dir():
        return [path]
    files = sorted(
        f
        for f in path.rglob("*")
        if f.is_file()
        and data_suffix(f) in suffixes
        and f.name not in _METADATA
        and not any(part.startswith(".") for part in f.relative_to(path).parts)
    )
    if not files:
        endings = ", ".join(suffixes)
        raise DataError(f"The folder {path} holds no data file. Files end in {endings}, plain or compressed.")
    # Text files are documents of a corpus, whose names mean nothing.
    said = {f: _split_of(f.relative_to(path)) for f in files if data_suffix(f) in RECORD_SUFFIXES}
    if len(set(said.values())) < 2:
        if other := set(said.values()) - {split, None}:
            _warn_once(f"{path}: by their names its files are of the split {other.pop()}; they are read as {split}.")
        return files
    splits = {f: name or "train" for f, name in said.items()}
    chosen = [f for f in files if splits.get(f, split) == split]
    if not chosen:
        named = ", ".join(sorted(set(splits.values())))
        raise DataError(
            f"The folder {path} has files of the splits {named}, but none of {split}. Set data.split to one of them, "
            "or name the files."
        )
    if len(chosen) < len(files):
        _warn_once(f"{path}: read {len(chosen)} of its {len(files)} files, those of the split {split}.")
    return chosen


@functools.lru_cache(maxsize=64)
def _warn_once(text: str) -> None:
    """A data set is opened several times on the way to its prompts."""
    logger.warning(text)


def _split_of(inner: Path) -> str | None:
    """The split that a file's name, or the nearest folder it lies in, says it belongs to."""
    for part in reversed(inner.parts):
        words = set(re.split(r"[^a-z]+", part.lower()))
        for split, names in _SPLIT_NAMES.items():
            if words & set(names):
                return split
    return None


def is_saved_dataset(path: Path) -> bool:
    """Whether `save_to_disk` of the datasets library wrote this folder."""
    return path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _rows_of_saved(path: Path, split: str) -> Iterator[Row]:
    """Rows of a folder that `save_to_disk` of the datasets library wrote."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets and pyarrow raise many kinds; all mean that the folder is not whole
        raise DataError(f"{path}: not readable as a saved data set: {first_line(error)}. Save it anew.") from None
    if isinstance(saved, dict):
        if split not in saved:
            raise DataError(
                f"{path} has the splits {', '.join(saved)}, but not {split}. Set data.split to one of them."
            )
        saved = saved[split]
    for number, fields in enumerate(saved, 1):
        yield Row(from_arrow(fields), f"{path} record {number}")


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


def _rows_of_hub(reference: str, split: str, stream: bool) -> Iterator[Row]:
    rows = iter(_hub_dataset(reference, split, stream))
    for number in itertools.count(1):
        try:
            fields = next(rows, None)
        except Exception as error:  # a stream ends in whatever its connection, its decompressor or its parser raises
            if is_out_of_memory(error):  # which the same reading would meet again
                raise
            raise DataError(
                f"{reference} could not be read beyond record {number - 1} of {split}: {first_line(error)}. Run it "
                "again; where that does not help, save the records as a jsonl file and name that."
            ) from None
        if fields is None:
            return
        yield Row(from_arrow(fields), f"{reference} {split} record {number}")


def _hub_dataset(reference: str, split: str, stream: bool = False) -> Any:
    import datasets

    name, _, configuration = reference.partition(":")
    options: dict[str, Any] = {"split": split} | ({"streaming": True} if stream else {})
    try:
        try:
            return datasets.load_dataset(name, configuration or None, **options)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # An old data set that Python code reads. The hub keeps a conversion of its own beside it.
            return datasets.load_dataset(name, configuration or None, **options, revision="refs/convert/parquet")
    except Exception as error:  # network, missing data set, split, configuration or token: many kinds, one remedy
        if is_out_of_memory(error):
            raise
        raise DataError(
            f"{reference} is no file here, and the hub gave no data set (split {split}): {first_line(error)}. "
            "Check the name, data.split, the network and HF_TOKEN; a configuration is written owner/name:configuration."
        ) from None
