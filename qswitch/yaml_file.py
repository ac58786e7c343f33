"""How a YAML file becomes plain values, which line is to blame where it does not, and what a value was meant to be.

Cold: not even pydantic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from qswitch.errors import ConfigError, FileError
from qswitch.outside import read_text

MAX_BYTES = 2**20
"""Of a YAML file; the longest preset has a hundredth of it."""
MAX_DEPTH = 50
"""Levels of lists and mappings inside each other: libyaml's constructor ends the process where there are many."""
MAX_NODES = 100_000
"""Values after every alias (`*name`) is written out: nine lines of aliases can stand for a billion."""


def parse_yaml(text: str) -> Any:
    """Plain values of a YAML text.

    Raises:
        ValueError: the text is no YAML, says a key twice, is nested too deep, or too much once its aliases are written
            out; says where.
    """
    import yaml

    # libyaml reads a preset about ten times as fast; PyYAML's wheels have it, a build without a compiler does not.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check(yaml.parse(text, Loader=loader))
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{line}not valid YAML: {getattr(error, 'problem', error)}") from None


@dataclass
class _Open:
    """A list or mapping of which the end has not come yet."""

    anchor: str | None
    before: int
    """Nodes before it."""
    keys: dict[str, int] | None
    """Of a mapping: the line of each key so far."""
    members: int = 0
    """Keys and values so far."""


def _check(events: Iterator[Any]) -> None:
    """Nothing, or an error for what would not end well as values: the events come one by one, whatever they stand for.

    Raises:
        ValueError: too deep, too many nodes with every alias written out, or a key twice, of which YAML's readers take
            the last without a word.
    """
    import yaml

    open_nodes: list[_Open] = []
    sizes: dict[str, int] = {}
    nodes = 0
    for event in events:
        number = event.start_mark.line + 1
        if isinstance(event, yaml.NodeEvent) and open_nodes:
            _count_member(open_nodes[-1], event, number)
        if isinstance(event, yaml.AliasEvent):
            if any(node.anchor == event.anchor for node in open_nodes):
                raise ValueError(f"line {number}: *{event.anchor} stands inside itself")
            nodes += sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            keys: dict[str, int] | None = {} if isinstance(event, yaml.MappingStartEvent) else None
            open_nodes.append(_Open(event.anchor, nodes, keys))
            nodes += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            ended = open_nodes.pop()
            if ended.anchor is not None:
                sizes[ended.anchor] = nodes - ended.before
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
        if len(open_nodes) > MAX_DEPTH:
            raise ValueError(f"line {number}: nested deeper than {MAX_DEPTH} levels")
        if nodes > MAX_NODES:
            raise ValueError(f"line {number}: more than {MAX_NODES:,} values, with what its aliases (*name) stand for")


def _count_member(inside: _Open, event: Any, number: int) -> None:
    """In a mapping keys and values take turns; a key is remembered with its line."""
    inside.members += 1
    key = getattr(event, "value", None)  # an alias or a collection as a key is left to the reader
    if inside.keys is None or inside.members % 2 == 0 or key is None or key == "<<":
        return
    if key in inside.keys:
        raise ValueError(
            f"line {number}: {key} is set a second time, first in line {inside.keys[key]}. Keep one of them"
        )
    inside.keys[key] = number


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, no YAML, or no mapping; names the line.
    """
    try:
        values = parse_yaml(read_text(path, max_bytes=MAX_BYTES))
    except FileError as error:
        raise ConfigError(str(error)) from None
    except ValueError as error:
        raise ConfigError(f"{path}, {error}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected settings (key: value), found {type(values).__name__}.")
    return values


def as_written(kind: Any, value: Any) -> Any:
    """What a boolean or text stands for in a field of this type; text that pydantic refuses where it is nothing.

    YAML 1.1 reads `off` as a boolean and `1e-4` as text, and people write one name where a list is meant.
    """
    if not isinstance(value, (bool, str)):
        return value
    kinds = list(_alternatives(kind))
    if isinstance(value, bool):
        word = "on" if value else "off"
        if bool not in kinds and word in _words(kinds):
            return word
        return value if bool in kinds or not {int, float} & set(kinds) else str(value).lower()
    if str in kinds or value in _words(kinds):
        return value
    if int in kinds or float in kinds:
        return _number(value)
    members = [member for kind in kinds if get_origin(kind) is list for member in get_args(kind)]
    if members:
        return [] if value == "none" and "none" not in _words(members) and str not in members else [value]
    return value


def _alternatives(kind: Any) -> Iterator[Any]:
    """What a field may hold: the members of a union, without what is written beside a type in `Annotated`."""
    if get_origin(kind) in (Union, UnionType):
        for member in get_args(kind):
            yield from _alternatives(member)
    else:
        yield get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _words(kinds: list[Any]) -> list[Any]:
    return [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]


def _number(text: str) -> int | float | str:
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else number
