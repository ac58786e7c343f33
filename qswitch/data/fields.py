"""The columns of one row under the names of a record's fields, and the checks that every field goes through.

Knows which names a column usually has, and nothing of what the fields mean together.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Mapping
from typing import Any

from qswitch.config import DataSection
from qswitch.data.files import Row
from qswitch.errors import DataError

USUAL_NAMES = {
    "messages": ("messages",),
    "conversations": ("conversations", "conversation"),
    "instruction": ("instruction",),
    "prompt": ("prompt", "question", "text"),
    "input": ("input", "context"),
    "response": ("response", "completion", "output", "answer"),
    "system": ("system", "system_prompt"),
    "max_new_tokens": ("max_new_tokens",),
    "tools": ("tools",),
    "chat_template_kwargs": ("chat_template_kwargs",),
    "teacher_response": ("teacher_response",),
}
"""Field of a record -> names that its column usually has; `data.columns` decides first."""
MAPPABLE_FIELDS = (*USUAL_NAMES, "output")


class Fields:
    """The fields of one row under our names; knows the row's place for error messages, and what has been read."""

    def __init__(self, row: Row, columns: Mapping[str, str]) -> None:
        self.row = row
        self._columns = _columns_of(tuple(row.fields), tuple(columns.items()))
        self._read: set[str] = set()

    def column(self, field: str) -> str | None:
        """The row's column that holds `field`: the mapped one, else the first of the usual names."""
        return self._columns[field]

    def holds(self, field: str) -> bool:
        """Whether a column holds the field, and is not null; asking does not read it."""
        column = self.column(field)
        return column is not None and self.row.fields[column] is not None

    def raw(self, field: str) -> Any:
        """The value as the file has it; None where no column holds the field."""
        column = self.column(field)
        if column is None:
            return None
        self._read.add(column)
        return self.row.fields[column]

    def text(self, field: str) -> str | None:
        """The value as text.

        Raises:
            DataError: it is no text and no number.
        """
        value = self.raw(field)
        return None if value is None else self.as_text(value, str(self.column(field)))

    def as_text(self, value: Any, name: str) -> str:
        """`value` as text; `name` is its column, or where in the column it stands.

        Raises:
            DataError: it is no text and no number, or it holds half a character.
        """
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            raise self.error(f"{name} must be text, found {kind_of(value)}. Mend or delete this record")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            raise self.error(
                f"{name} holds half a character (U+{code:04X}). Mend the escape sequence in this record"
            ) from None
        return value

    def structure(self, value: Any, name: str) -> Any:
        """`value` as JSON values: of text what the JSON in it says.

        Raises:
            DataError: it is text, but no JSON.
        """
        try:
            return json.loads(value if isinstance(value, str) else json.dumps(value, default=str))
        except RecursionError:
            raise self.error(f"{name} is nested too deep. Mend or delete this record") from None
        except ValueError as error:
            raise self.error(f"{name} is text that is no JSON ({error}). Mend or delete this record") from None

    def unread(self) -> tuple[str, ...]:
        """Columns that hold something and have not been read so far."""
        return tuple(
            column
            for column, value in self.row.fields.items()
            if column not in self._read and value not in (None, "", [], {})
        )

    def error(self, reason: str) -> DataError:
        """What to raise for this row."""
        return DataError(f"{self.row.where}: {reason}.")


@functools.lru_cache(maxsize=256)  # rows of one file have few sets of columns
def _columns_of(names: tuple[str, ...], mapped: tuple[tuple[str, str], ...]) -> dict[str, str | None]:
    columns = {"response" if field == "output" else field: column for field, column in mapped}
    taken = set(columns.values())
    found: dict[str, str | None] = {}
    for field, usual in USUAL_NAMES.items():
        if field in columns:
            found[field] = columns[field] if columns[field] in names else None
        else:
            found[field] = next((n for n in usual if n in names and n not in taken), None)
    return found


def kind_of(value: Any) -> str:
    """What JSON calls the value, for messages."""
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null", str: "text", int: "a number"}
    return names.get(type(value), type(value).__name__)


def check_columns(data: DataSection) -> None:
    """Nothing, or an error for a key of data.columns that no record has.

    Raises:
        DataError: names the key and the nearest field.
    """
    unknown = [f for f in data.columns if f not in MAPPABLE_FIELDS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], MAPPABLE_FIELDS, n=1)
        hint = f"Did you mean data.columns.{near[0]}?" if near else f"Known: {', '.join(MAPPABLE_FIELDS)}."
        raise DataError(f"data.columns.{unknown[0]} is not a field that a record has. {hint}")


def unknown_column(ours: str, column: str, columns: Mapping[str, Any], where: str) -> str:
    """What to say where data.columns names a column that is not there."""
    near = difflib.get_close_matches(column, list(columns), n=1, cutoff=0.5)
    hint = f"Did you mean data.columns.{ours}={near[0]}?" if near else f"Set data.columns.{ours} to one of them."
    return f"{where}: data.columns.{ours} names the column {column}, but the columns are {', '.join(columns)}. {hint}"
