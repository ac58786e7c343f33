"""Writes docs/reference/: every command and every setting, read from the code. Run: python docs/make_reference.py

`tests/test_docs.py` fails while a page is not what this would write.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typer.models import ArgumentInfo

from qswitch import config
from qswitch.cli import app
from qswitch.layers import ALIASES, FROM_ELSEWHERE

FOLDER = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/make_reference.py from the code: change the code, then run it. -->\n"


def pages() -> dict[str, str]:
    """File name -> text of every page."""
    return {"commands.md": commands_page(), "settings.md": settings_page()}


def commands_page() -> str:
    """Every command with its options, as `--help` has them."""
    text = f"""# Commands

{NOTE}
Every command has `--help`. Exit codes: 0 done; 1 a bug of qswitch, with its traceback; 2 something that you can mend,
and the message says how; 3 the plan does not fit the memory; 130 interrupted, and a run can be resumed.
"""
    for path, command in _commands(app, ["qswitch"]):
        text += f"\n## {' '.join(path)}\n\n{_sentence(inspect.getdoc(command.callback))}\n"
        if command.epilog:
            text += f"\n    {command.epilog.removeprefix('Example: ')}\n"
        hints = get_type_hints(command.callback, include_extras=True)
        rows = [_parameter_row(p, hints[name]) for name, p in inspect.signature(command.callback).parameters.items()]
        if rows:
            text += "\n| argument or option | meaning | default |\n|---|---|---|\n" + "".join(rows)
    return text


def _commands(group: typer.Typer, path: list[str]) -> Iterator[tuple[list[str], Any]]:
    for command in group.registered_commands:
        assert command.callback is not None
        yield [*path, command.name or command.callback.__name__], command
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        named = [inner.name] if isinstance(inner.name, str) else []
        yield from _commands(inner.typer_instance, [*path, *named])


def _parameter_row(parameter: inspect.Parameter, hint: Any) -> str:
    if get_origin(hint) is not Annotated:  # on Python 3.10 a default of None makes the hint an Optional of it
        hint = get_args(hint)[0]
    kind, info = get_args(hint)[:2]
    if isinstance(info, ArgumentInfo):
        names = f"`{info.metavar or parameter.name.upper()}`"
    else:
        # In `Annotated` the first name stands where a default would.
        given = [n for n in (info.default, *(info.param_decls or ())) if isinstance(n, str) and n.startswith("-")]
        names = ", ".join(f"`{n}`" for n in given or ["--" + parameter.name.replace("_", "-")])
    words = _words(kind)
    among = f" One of {', '.join(f'`{w}`' for w in words)}." if words else ""
    default = parameter.default
    shown = "" if default in (None, False, parameter.empty) else f"`{default}`"
    return f"| {names} | {_cell(_sentence(info.help) + among)} | {shown} |\n"


def settings_page() -> str:
    """Every setting with type, default and description, section by section."""
    text = f"""# Settings

{NOTE}
A setting is written as `section.key=value` after `--set`, or in a YAML file under its section. `qswitch presets show
NAME` prints what a preset sets. A setting that has no effect in the chosen method is refused, and the message says why.
"""
    plain = [name for name, field in config.RunConfig.model_fields.items() if not _section_of(field.annotation)]
    text += "\n## At the top\n\n" + _table(config.RunConfig, "", plain)
    for name, field in config.RunConfig.model_fields.items():
        section = _section_of(field.annotation)
        if section is not None:
            text += _section_text(section, name)
    return text + _other_names()


def _other_names() -> str:
    """What is understood beside the settings' own names, and what is answered with advice."""
    short = sorted(name for name, setting in ALIASES.items() if setting.endswith(f".{name}"))
    named = [f"| `{name}` | `{setting}` |" for name, setting in ALIASES.items() if name not in short]
    advised = [
        f"| `{name}` | {_cell(_sentence(text[0].upper() + text[1:]))} |" for name, text in FROM_ELSEWHERE.items()
    ]
    alone = f"These settings need no section: {', '.join(f'`{name}`' for name in short)}."
    return "\n".join([
        "\n## Names from other tools\n",
        "In a file and after `--set` these names are understood too, inside their section or without one:\n",
        "| name | setting |\n|---|---|", *named,
        f"\n{textwrap.fill(alone, 120, break_on_hyphens=False)}\n",
        "These names of other trainers are no settings here, and the message says what to do instead:\n",
        "| name | instead |\n|---|---|", *advised, "",
    ])  # fmt: skip


def _section_text(section: type[BaseModel], name: str) -> str:
    inner = {key: _section_of(field.annotation) for key, field in section.model_fields.items()}
    own = [key for key, nested in inner.items() if nested is None]
    text = f"\n## {name}\n\n{inspect.cleandoc(section.__doc__ or '')}\n\n" + _table(section, f"{name}.", own)
    for key, nested in inner.items():
        if nested is not None:
            text += _section_text(nested, f"{name}.{key}")
    return text


def _table(section: type[BaseModel], prefix: str, names: list[str]) -> str:
    described = _descriptions(section)
    rows = "| setting | default | meaning |\n|---|---|---|\n"
    for name in names:
        field = section.model_fields[name]
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = "required" if default is PydanticUndefined else f"`{_written(default)}`"
        words = _words(field.annotation)
        among = f" One of {', '.join(f'`{w}`' for w in words)}." if words else ""
        rows += f"| `{prefix}{name}` | {shown} | {_cell(described.get(name, '') + among)} |\n"
    return rows


def _descriptions(section: type[BaseModel]) -> dict[str, str]:
    """Field -> the text below it in the source."""
    (definition,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(section))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = str(below.value.value)
    return found


def _section_of(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _words(kind: Any) -> list[str]:
    """The words that a value may be, where it is one of some; also of a list's members."""
    if get_origin(kind) is Literal:
        return [str(word) for word in get_args(kind)]
    return [word for part in get_args(kind) for word in _words(part)]


def _written(value: Any) -> str:
    """As YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return '""' if value == "" else str(value)


def _sentence(text: str | None) -> str:
    text = " ".join((text or "").split())
    return text if not text or text[-1] in ".!?" else text + "."


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
