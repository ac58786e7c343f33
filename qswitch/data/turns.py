"""The turns of a conversation as chat templates read them, from the shapes in which data sets have them.

Turns of OpenAI's shape ({role, content, tool_calls, ...}) and of ShareGPT's ({from, value}). Further keys of a turn
stay with it: which of them matter, the template decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qswitch.data.fields import Fields, kind_of
from qswitch.errors import DataError

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
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Message:
    """One turn; role is system, user, assistant or tool."""

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What else the turn holds, under the data's names: tool_calls, reasoning_content, name, tool_call_id, ..."""

    def to_dict(self) -> dict[str, Any]:
        """As `apply_chat_template` takes it."""
        return {"role": self.role, "content": self.content, **self.extra}


def read_turns(fields: Fields, value: Any, column: str) -> list[Message]:
    """A list of {role, content} or {from, value} turns; in CSV the list is JSON text.

    Raises:
        DataError: it is no such list; names the turn, the reason and the remedy.
    """
    if isinstance(value, str):
        try:
            value = fields.structure(value, column)
        except DataError:
            raise fields.error(f"{column} must be a list of turns, found text. Use the column name prompt") from None
    if not isinstance(value, list):
        raise fields.error(f"{column} must be a list of turns, found {kind_of(value)}. Mend this record")
    return [_turn(fields, turn, f"{column} turn {number}") for number, turn in enumerate(value, 1)]


def _turn(fields: Fields, turn: Any, place: str) -> Message:
    if not isinstance(turn, dict):
        raise fields.error(f"{place} must be an object with role and content, found {kind_of(turn)}")
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    extra = {k: v for k, v in turn.items() if k not in ("role", "from", "content", "value") and v not in (None, [], "")}
    if role is None or (content is None and "tool_calls" not in extra):
        raise fields.error(
            f"{place} needs role and content (or from and value), found {', '.join(turn) or 'nothing'}. "
            "Mend this record"
        )
    known = _ROLES.get(str(role).lower())
    if known is None:
        raise fields.error(f"{place} has the role {role!r}. Use system, user, assistant or tool")
    if str(role).lower() == "function_call":
        content, extra = "", {**extra, "tool_calls": content}
    if "tool_calls" in extra:
        if known != "assistant":
            raise fields.error(f"{place} holds tool_calls in a turn of the {known}. Only the assistant calls tools")
        extra["tool_calls"] = _tool_calls(fields, extra["tool_calls"], place)
    plain = {
        key: fields.structure(v, f"{place} {key}") if isinstance(v, (list, dict)) else v for key, v in extra.items()
    }
    for key, text in plain.items():
        if isinstance(text, str):
            fields.as_text(text, f"{place} {key}")
    return Message(known, _content(fields, "" if content is None else content, place), plain)


def _content(fields: Fields, content: Any, place: str) -> str:
    if not isinstance(content, list):
        return fields.as_text(content, place)
    parts = []
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text"):
            raise fields.error(f"{place} holds something that is not text (an image?). Keep text only")
        parts.append(fields.as_text(part.get("text"), place))
    return "".join(parts)


def _tool_calls(fields: Fields, value: Any, place: str) -> list[dict[str, Any]]:
    """Calls with their arguments as objects, which is what chat templates expect; OpenAI's logs have them as text."""
    calls = fields.structure(value, f"{place} tool_calls")
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise fields.error(f"{place} tool_calls must be a list of calls, found {kind_of(calls)}. Mend this record")
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise fields.error(f"{place} holds a tool call without the name of a function. Mend this record")
        arguments = fields.structure(function.get("arguments") or {}, f"{place} arguments of {function['name']}")
        if not isinstance(arguments, dict):
            raise fields.error(
                f"{place} calls {function['name']} with {kind_of(arguments)}; arguments must be an object. "
                "Mend this record"
            )
        function["arguments"] = arguments
    return calls


def read_tools(fields: Fields) -> list[dict[str, Any]]:
    """The tools that the model may call: JSON schemas, or JSON text of them; empty where the row has none.

    Raises:
        DataError: they are no list of objects with a name.
    """
    value = fields.raw("tools")
    if value in (None, "", []):
        return []
    column = str(fields.column("tools"))
    tools = fields.structure(value, column)
    if not isinstance(tools, list):
        raise fields.error(f"{column} must be a list of tools (JSON schemas), found {kind_of(tools)}. Mend this record")
    for number, tool in enumerate(tools, 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise fields.error(f"{column} entry {number} is no tool: it needs a name. Mend this record")
    return tools
