"""How a small file that somebody else wrote, or may have changed, is read: configurations, templates, states, records.

One reader, so that every such file has the same limits: it is a regular file (a pipe would wait for ever), not larger
than `max_bytes`, UTF-8, and of the shape that its reader names. JSON that is nested too deep ends in a RecursionError
of Python's own, which becomes a message here; YAML has limits of its own (`yaml_file.py`). Cold. Data sets have readers
of their own (`data/files.py`), because they may be of any size.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import stat
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar, cast

from qswitch.errors import FileError, storage_problem

MAX_BYTES = 64 * 2**20
"""Of a file that is read as a whole. The largest that exist, a tokenizer's and a safetensors index, take a fraction."""

T = TypeVar("T")


def user_path(text: str | Path) -> Path:
    """A path as a user writes it, `~` expanded; where it names a home that nobody has, the text as it is.

    Raises:
        FileError: it holds a null byte, which no file's name can.
    """
    if "\0" in str(text):
        raise FileError(f"{str(text)!r} holds a null byte, which no file's name can. Remove it.")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def read_text(path: Path, *, max_bytes: int = MAX_BYTES) -> str:
    """The text of a file.

    Raises:
        FileError: it is not there, no file, not readable, too large, or not UTF-8; says which.
    """
    try:
        return read_bytes(path, max_bytes=max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None


def read_bytes(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a file.

    Raises:
        FileError: it is not there, no file, not readable, or too large; says which.
    """
    try:
        # Not to wait for the writer of a pipe; of a file the flag changes nothing.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            mode, size = os.fstat(handle).st_mode, os.fstat(handle).st_size
            if not stat.S_ISREG(mode):
                raise FileError(f"{path} is a pipe or a device, not a file. Copy what it holds into a file.")
            if size > max_bytes:
                raise FileError(f"{path} has {size:,} bytes; at most {max_bytes:,} are read. It is another file.")
            return file.read(max_bytes + 1)
    except FileNotFoundError:
        raise FileError(f"{path} does not exist.{instead_of(path)}") from None
    except IsADirectoryError:
        raise FileError(f"{path} is a folder, not a file.") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise FileError(f"{path} cannot be read: {storage_problem(error) or error}") from None


def instead_of(path: Path) -> str:
    """What to say after the name of a file that is not there: one that is called alike, or where it was looked for."""
    try:
        names = [file.name for file in path.parent.iterdir()]
    except OSError:
        return f" Neither does its folder, {path.parent}."
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)
    return f" Did you mean {path.parent / near[0]}?" if near else f" It was looked for in {path.parent.absolute()}."


def read_json(path: Path, kind: type[T], *, max_bytes: int = MAX_BYTES) -> T:
    """The value in a JSON file, of `kind`: a type, a dataclass or a TypedDict as pydantic understands them.

    The value is returned as it stands in the file; what a TypedDict does not name is kept.

    Raises:
        FileError: as `read_text`; or it is no JSON, nested too deep, or not of `kind`; names the entry.
    """
    return json_value(read_text(path, max_bytes=max_bytes), kind, str(path))


def json_value(text: str, kind: type[T], where: str) -> T:
    """The value of a JSON text that stands at `where`.

    Raises:
        FileError: it is no JSON, nested too deep, or not of `kind`; names the entry.
    """
    from pydantic import ValidationError

    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where} is not valid JSON ({error}). Restore it from a copy, or remove it.") from None
    try:
        _adapter(cast(Hashable, kind)).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        entry = ".".join(map(str, first["loc"])) or "its content"
        raise FileError(
            f"{where} is not what belongs there: {entry}: {first['msg']}. Restore it from a copy, or remove it."
        ) from None
    return cast(T, value)


def is_kind(value: Any, kind: type[Any]) -> bool:
    """Whether a value of a JSON text is of `kind`, as `read_json` takes it."""
    from pydantic import ValidationError

    try:
        _adapter(cast(Hashable, kind)).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


@functools.cache
def _adapter(kind: Hashable) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cast(Any, kind))
