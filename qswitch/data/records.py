"""What the user's rows say: prompt turns, and a response where there is one.

Detects the format of every row from its columns (`data.columns` decides first). Knows nothing of templates or tokens.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qswitch.config import DataSection
from qswitch.data.sources import Row, iter_rows
from qswitch.errors import DataError

MAPPABLE_FIELDS = (
    "prompt",
    "response",
    "system",
    "instruction",
    "input",
    "output",
    "messages",
    "conversations",
    "max_new_tokens",
)
_FIELD_NAMES = {
    "messages": ("messages",),
    "conversations": ("conversations", "conversation"),
    "instruction": ("instruction",),
    "prompt": ("prompt", "question", "text"),
    "input": ("input", "context"),
    "response": ("response", "completion", "output", "answer"),
    "system": ("system", "system_prompt"),
    "max_new_tokens": ("max_new_tokens",),
}
_FORMATS = ("messages", "conversations", "instruction", "prompt")
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True)
class Message:
    """One turn; role is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """One prompt, whose last turn is the user's, and the ground-truth response if the data has one.

    `instruction` and `input` hold the two halves of the last user turn when the data keeps them apart; the Alpaca
    template lays them out separately.
    """

    id: int
    """Position in the data, before any limit or split; keys the rollout noise."""
    messages: tuple[Message, ...]
    response: str | None
    source: str
    """File and line, for messages to the user."""
    max_new_tokens: int | None = None
    """Response limit of this record, tokens; None: the run's."""
    instruction: str | None = None
    input: str = ""

    @property
    def text(self) -> str:
        """The whole prompt as one text, for telling equal prompts."""
        return "\n".join(f"{m.role}: {m.content.strip()}" for m in self.messages)


def iter_records(
    data: DataSection, reference: str | list[str], *, limit: int | None = None, split: str | None = None
) -> Iterator[Record]:
    """Records of `reference` (data.train, data.validation or an evaluation file), at most `limit`, ids from 0.

    `split` defaults to data.split.

    Raises:
        DataError: nothing there, a line that cannot be read, no known format, a wrong type, an empty prompt; names
            file, line, reason and remedy. After the last record: a column of data.columns that no row had.
    """
    check_columns(data)
    columns: dict[str, None] = {}
    for index, row in enumerate(itertools.islice(iter_rows(reference, split=split or data.split), limit)):
        columns.update(dict.fromkeys(row.fields))
        yield record_of_row(row, index, data)
    for ours, column in data.columns.items():
        if column not in columns:
            raise DataError(_unknown_column(ours, column, columns, str(reference)))


def load_records(
    data: DataSection, reference: str | list[str], *, limit: int | None = None, split: str | None = None
) -> list[Record]:
    """The records of `iter_records` as a list."""
    return list(iter_records(data, reference, limit=limit, split=split))


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


def _unknown_column(ours: str, column: str, columns: Mapping[str, Any], where: str) -> str:
    near = difflib.get_close_matches(column, list(columns), n=1, cutoff=0.5)
    hint = f"Did you mean data.columns.{ours}={near[0]}?" if near else f"Set data.columns.{ours} to one of them."
    return f"{where}: data.columns.{ours} names the column {column}, but the columns are {', '.join(columns)}. {hint}"


@functools.lru_cache(maxsize=256)  # rows of one file have few sets of columns
def _columns_of(names: tuple[str, ...], mapped: tuple[tuple[str, str], ...]) -> dict[str, str | None]:
    columns = {"response" if field == "output" else field: column for field, column in mapped}
    taken = set(columns.values())
    found: dict[str, str | None] = {}
    for field, usual in _FIELD_NAMES.items():
        if field in columns:
            found[field] = columns[field] if columns[field] in names else None
        else:
            found[field] = next((n for n in usual if n in names and n not in taken), None)
    return found


class _Fields:
    """The fields of one row under our names; knows the row's place for error messages."""

    def __init__(self, row: Row, columns: Mapping[str, str]) -> None:
        self.row = row
        self._columns = _columns_of(tuple(row.fields), tuple(columns.items()))

    def column(self, field: str) -> str | None:
        """The row's column that holds `field`: the mapped one, else the first of the usual names."""
        return self._columns[field]

    def raw(self, field: str) -> Any:
        column = self.column(field)
        return None if column is None else self.row.fields[column]

    def text(self, field: str) -> str | None:
        value = self.raw(field)
        return None if value is None else self.as_text(value, str(self.column(field)))

    def as_text(self, value: Any, name: str) -> str:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            raise self.error(f"{name} must be text, found {_kind(value)}. Mend or delete this record")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            raise self.error(
                f"{name} holds half a character (U+{code:04X}). Mend the escape sequence in this record"
            ) from None
        return value

    def error(self, reason: str) -> DataError:
        return DataError(f"{self.row.where}: {reason}.")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null", str: "text", int: "a number"}
    return names.get(type(value), type(value).__name__)


def record_of_row(row: Row, index: int, data: DataSection) -> Record:
    """What one row says; `index` becomes its id.

    Raises:
        DataError: no known format, a wrong type, an empty prompt; names file, line, reason and remedy.
    """
    fields = _Fields(row, data.columns)
    present = [name for name in _FORMATS if fields.column(name) is not None and fields.raw(name) is not None]
    if not present:
        raise DataError(_no_format(row, data.columns))
    chosen = sorted(present, key=lambda name: name not in data.columns)[0]
    read = _READERS[chosen]
    messages, response, instruction, extra = read(fields)

    system = fields.text("system") or data.system_prompt
    if system and messages[0].role != "system":
        messages = [Message("system", system), *messages]
    _check_turns(fields, messages)
    return Record(
        id=index,
        messages=tuple(messages),
        response=response,
        source=row.where,
        max_new_tokens=_max_new_tokens(fields),
        instruction=instruction,
        input=extra,
    )


def _no_format(row: Row, columns: Mapping[str, str]) -> str:
    for ours in _FORMATS:
        if ours in columns and columns[ours] not in row.fields:
            return _unknown_column(ours, columns[ours], row.fields, row.where)
    known = [name for ours in _FORMATS for name in _FIELD_NAMES[ours]]
    empty = [c for c in row.fields if c in known]
    if empty:
        return f"{row.where}: the prompt is empty ({empty[0]} is null). Fill it in or delete this record."
    near = next((m for c in row.fields for m in difflib.get_close_matches(c, known, n=1, cutoff=0.6)), None)
    found = ", ".join(row.fields) or "none"
    meant = f" Nearest: {near}." if near else ""
    example = next(iter(row.fields), "COLUMN")
    return (
        f"{row.where}: no prompt found. Columns: {found}; one of {', '.join(known)} is needed.{meant} "
        f"Say which column it is, for example --set data.columns.prompt={example}"
    )


_Read = tuple[list[Message], str | None, str | None, str]


def _read_conversation(fields: _Fields, name: str) -> _Read:
    column = str(fields.column(name))
    turns = _turns(fields, fields.raw(name), column)
    response = None
    if turns and turns[-1].role == "assistant":
        response = turns.pop().content
    if not turns:
        raise fields.error(f"{column} holds no user turn. Add the question, or delete this record")
    return turns, response, None, ""


def _read_instruction(fields: _Fields) -> _Read:
    instruction, extra = fields.text("instruction") or "", fields.text("input") or ""
    if not instruction.strip():
        instruction, extra = extra, ""
    if not extra.strip():
        return [Message("user", instruction)], _response(fields), instruction, ""
    return [Message("user", f"{instruction}\n\n{extra}")], _response(fields), instruction, extra


def _read_prompt(fields: _Fields) -> _Read:
    if isinstance(fields.raw("prompt"), list):  # turns under the name prompt, as TRL has them
        turns, response, _, _ = _read_conversation(fields, "prompt")
        return turns, response if response is not None else _response(fields), None, ""
    return [Message("user", fields.text("prompt") or "")], _response(fields), None, ""


_READERS: dict[str, Callable[[_Fields], _Read]] = {
    "messages": lambda fields: _read_conversation(fields, "messages"),
    "conversations": lambda fields: _read_conversation(fields, "conversations"),
    "instruction": _read_instruction,
    "prompt": _read_prompt,
}


def _response(fields: _Fields) -> str | None:
    value = fields.raw("response")
    if isinstance(value, list):
        turns = _turns(fields, value, str(fields.column("response")))
        if len(turns) != 1 or turns[0].role != "assistant":
            raise fields.error(f"{fields.column('response')} must be text or one assistant turn. Mend this record")
        return turns[0].content
    return fields.text("response")


def _turns(fields: _Fields, value: Any, column: str) -> list[Message]:
    """A list of {role, content} or {from, value} turns; in CSV the list is JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise fields.error(f"{column} must be a list of turns, found text. Use the column name prompt") from None
    if not isinstance(value, list):
        raise fields.error(f"{column} must be a list of turns, found {_kind(value)}. Mend this record")
    turns = []
    for number, turn in enumerate(value, 1):
        place = f"{column} turn {number}"
        if not isinstance(turn, dict):
            raise fields.error(f"{place} must be an object with role and content, found {_kind(turn)}")
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if role is None or content is None:
            raise fields.error(
                f"{place} needs role and content (or from and value), found {', '.join(turn) or 'nothing'}. "
                "Mend this record"
            )
        if str(role).lower() not in _ROLES:
            raise fields.error(f"{place} has the role {role!r}. Use system, user or assistant")
        turns.append(Message(_ROLES[str(role).lower()], _content(fields, content, place)))
    return turns


def _content(fields: _Fields, content: Any, place: str) -> str:
    if not isinstance(content, list):
        return fields.as_text(content, place)
    parts = []
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text"):
            raise fields.error(f"{place} holds something that is not text (an image?). Keep text only")
        parts.append(fields.as_text(part.get("text"), place))
    return "".join(parts)


def _check_turns(fields: _Fields, messages: list[Message]) -> None:
    if messages[-1].role != "user":
        raise fields.error(f"the prompt ends with a turn of the {messages[-1].role}. It must end with the user's")
    if not messages[-1].content.strip():
        raise fields.error("the prompt is empty. Fill it in or delete this record")


def _max_new_tokens(fields: _Fields) -> int | None:
    value = fields.raw("max_new_tokens")
    if value is None or value == "":
        return None
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or isinstance(value, bool):
        raise fields.error(f"max_new_tokens must be a whole number from 1, found {value!r}")
    return number
