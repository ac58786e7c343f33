"""What the user's rows say: prompt turns, and a response where there is one.

Detects the format of every row from its columns (`data.columns` decides first). Knows nothing of templates or tokens.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qswitch.config import RESERVED_TEMPLATE_KWARGS, DataSection
from qswitch.data.fields import USUAL_NAMES, Fields, check_columns, kind_of, unknown_column
from qswitch.data.files import Row
from qswitch.data.sources import iter_rows
from qswitch.data.turns import Message, read_tools, read_turns
from qswitch.errors import DataError
from qswitch.thinking import THOUGHT_MARK

_FORMATS = ("messages", "conversations", "instruction", "prompt")
"""Fields that say which format a row is of; of several the first."""


@dataclass(frozen=True)
class Record:
    """One prompt, whose last turn is the user's or a tool's, and the ground-truth response if the data has one.

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
    response_extra: Mapping[str, Any] = field(default_factory=dict)
    """What the response's turn holds beside its text: tool_calls, reasoning_content, ..."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the tools that may be called."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What this row tells the chat template, over data.template_kwargs."""
    teacher_response: Literal["whole", "cut"] | None = None
    """The response is what a teacher wrote, to its end or up to a limit: it alone is learnt, a cut one without an end
    token. None: it is the data's, and earlier turns of the assistant are learnt with it."""
    unused: tuple[str, ...] = ()
    """Columns of the row that hold something and are not read."""

    @property
    def text(self) -> str:
        """The whole prompt as one text, for telling equal prompts."""
        turns = (f"{m.role}: {m.content.strip()}{m.extra or ''}" for m in self.messages)
        return "\n".join([*turns, *map(str, self.tools)])

    @property
    def has_response(self) -> bool:
        """Whether there is a response to learn from: text, or calls of tools."""
        return bool((self.response or "").strip()) or "tool_calls" in self.response_extra

    @property
    def shows_thinking(self) -> bool:
        """Whether the response holds what was thought before it."""
        return THOUGHT_MARK in (self.response or "") or bool(self.response_extra.get("reasoning_content"))


def iter_records(
    data: DataSection,
    reference: str | list[str],
    *,
    limit: int | None = None,
    sample: int | None = None,
    is_part: bool = False,
    split: str | None = None,
) -> Iterator[Record]:
    """Records of `reference` (data.train, data.validation or an evaluation file), at most `limit`, ids from 0.

    `sample` ends the reading of what has more records, and `is_part` says that others belong to it: a column that is
    not there may come later, since JSON lines leave out what is empty. `split` defaults to data.split.

    Raises:
        DataError: nothing there, a line that cannot be read, no known format, a wrong type, an empty prompt; names
            file, line, reason and remedy. After the last record of all: a column of data.columns that no row had.
    """
    check_columns(data)
    columns: dict[str, None] = {}
    most = min((number for number in (limit, sample) if number is not None), default=None)
    number = 0
    for number, row in enumerate(itertools.islice(iter_rows(reference, split=split or data.split), most), start=1):
        columns.update(dict.fromkeys(row.fields))
        yield record_of_row(row, number - 1, data)
    if is_part or (number == sample and sample != limit):
        return
    for ours, column in data.columns.items():
        if column not in columns:
            raise DataError(unknown_column(ours, column, columns, str(reference)))


def load_records(data: DataSection, reference: str | list[str], **which: Any) -> list[Record]:
    """The records of `iter_records` as a list."""
    return list(iter_records(data, reference, **which))


def training_records(data: DataSection) -> Iterator[Record]:
    """The records that a run trains on or holds out: of each set of data.train the first data.limit, ids from 0.

    Raises:
        DataError: as `iter_records`.
    """
    for reference in data.train_sets:
        yield from iter_records(data, reference, limit=data.limit)


def record_of_row(row: Row, index: int, data: DataSection) -> Record:
    """What one row says; `index` becomes its id.

    Raises:
        DataError: no known format, a wrong type, an empty prompt; names file, line, reason and remedy.
    """
    fields = Fields(row, data.columns)
    present = [name for name in _FORMATS if fields.holds(name)]
    _refuse_preferences(fields, data.columns)
    if not present:
        raise DataError(_no_format(row, data.columns))
    chosen = sorted(present, key=lambda name: name not in data.columns)[0]
    messages, response, instruction, extra = _READERS[chosen](fields)

    if messages[0].role != "system" and (system := fields.text("system") or data.system_prompt):
        messages = [Message("system", system), *messages]
    _check_turns(fields, messages)
    return Record(
        id=index,
        messages=tuple(messages),
        response=None if response is None else response.content,
        source=row.where,
        max_new_tokens=_max_new_tokens(fields),
        instruction=instruction,
        input=extra,
        response_extra={} if response is None else response.extra,
        tools=tuple(read_tools(fields)),
        template_kwargs=_template_kwargs(fields),
        teacher_response=_teacher_response(fields),
        unused=fields.unread(),  # last, when everything that is read has been
    )


def _refuse_preferences(fields: Fields, columns: Mapping[str, str]) -> None:
    """Rows that say which of two answers is the better one teach something else than their prompts do."""
    names = fields.row.fields
    if "response" in columns or "output" in columns or "messages" in columns or "conversations" in columns:
        return  # somebody has said what to learn
    if "chosen" in names and "rejected" in names:
        whole = isinstance(names["chosen"], list) and len(names["chosen"]) > 1
        remedy = "data.columns.messages=chosen" if whole else "data.columns.response=chosen"
        raise fields.error(
            "a pair of a chosen and a rejected answer. qswitch learns from no preferences; to learn the chosen "
            f"answer, set {remedy}"
        )
    if isinstance(names.get("label"), bool) and "completion" in names:
        raise fields.error(
            "a completion with a label that is true or false. qswitch learns from no preferences; keep the records "
            "whose label is true, and say that their answer is meant with data.columns.response=completion"
        )


def _no_format(row: Row, columns: Mapping[str, str]) -> str:
    for ours in _FORMATS:
        if ours in columns and columns[ours] not in row.fields:
            return unknown_column(ours, columns[ours], row.fields, row.where)
    known = [name for ours in _FORMATS for name in USUAL_NAMES[ours]]
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


_Read = tuple[list[Message], Message | None, str | None, str]
"""Turns of the prompt, the response, and the two halves of an instruction."""


def _read_conversation(fields: Fields, name: str) -> _Read:
    column = str(fields.column(name))
    turns = read_turns(fields, fields.raw(name), column)
    response = None
    if turns and turns[-1].role == "assistant":
        response = turns.pop()
    if not any(turn.role in ("user", "system") for turn in turns):
        raise fields.error(f"{column} holds no user turn. Add the question, or delete this record")
    return turns, response, None, ""


def _read_instruction(fields: Fields) -> _Read:
    instruction, extra = fields.text("instruction") or "", fields.text("input") or ""
    if not instruction.strip():
        instruction, extra = extra, ""
    if not extra.strip():
        return [Message("user", instruction)], _response(fields), instruction, ""
    return [Message("user", f"{instruction}\n\n{extra}")], _response(fields), instruction, extra


def _read_prompt(fields: Fields) -> _Read:
    if isinstance(fields.raw("prompt"), list):  # turns under the name prompt, as TRL has them
        turns, response, _, _ = _read_conversation(fields, "prompt")
        return turns, response if response is not None else _response(fields), None, ""
    return [Message("user", fields.text("prompt") or "")], _response(fields), None, ""


_READERS: dict[str, Callable[[Fields], _Read]] = {
    "messages": lambda fields: _read_conversation(fields, "messages"),
    "conversations": lambda fields: _read_conversation(fields, "conversations"),
    "instruction": _read_instruction,
    "prompt": _read_prompt,
}


def _response(fields: Fields) -> Message | None:
    value = fields.raw("response")
    if isinstance(value, list):
        column = str(fields.column("response"))
        turns = read_turns(fields, value, column)
        if len(turns) != 1 or turns[0].role != "assistant":
            raise fields.error(
                f"{column} must be text or one assistant turn, found {len(turns)} turns. Where it holds the whole "
                f"conversation, set data.columns.messages={column}"
            )
        return turns[0]
    text = fields.text("response")
    return None if text is None else Message("assistant", text)


def _template_kwargs(fields: Fields) -> dict[str, Any]:
    value = fields.raw("chat_template_kwargs")
    if value in (None, "", {}):
        return {}
    column = str(fields.column("chat_template_kwargs"))
    found = fields.structure(value, column)
    if not isinstance(found, dict):
        raise fields.error(f'{column} must be an object such as {{"enable_thinking": false}}, found {kind_of(found)}')
    reserved = [key for key in found if key in RESERVED_TEMPLATE_KWARGS or not key.isidentifier()]
    if reserved:
        raise fields.error(f"{column} holds {reserved[0]}, which is not for the data to say. Remove it")
    return {key: value for key, value in found.items() if value is not None}


def _teacher_response(fields: Fields) -> Any:
    value = fields.raw("teacher_response")
    if value not in (None, "", "whole", "cut"):
        raise fields.error(
            f"{fields.column('teacher_response')} says whether the response is one that a teacher wrote: whole or cut, "
            f"found {str(value)[:40]!r}. Rename or remove the column if it means something else"
        )
    return value or None


def _check_turns(fields: Fields, messages: list[Message]) -> None:
    if messages[-1].role not in ("user", "tool"):
        raise fields.error(f"the prompt ends with a turn of the {messages[-1].role}. It must end with the user's")
    if messages[-1].role == "user" and not messages[-1].content.strip():
        raise fields.error("the prompt is empty. Fill it in or delete this record")


def _max_new_tokens(fields: Fields) -> int | None:
    value = fields.raw("max_new_tokens")
    if value is None or value == "":
        return None
    try:
        number = int(str(value))
    except (TypeError, ValueError):
        number = 0
    if number < 1 or isinstance(value, bool):
        raise fields.error(f"max_new_tokens must be a whole number from 1, found {value!r}")
    return number
