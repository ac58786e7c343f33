"""Every command, option and setting that a text of ours names exists: in the pages, the notebook, the image, presets,
and in what the program itself says, where a remedy that is not there would be found by somebody in trouble."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_origin

from typer.main import get_command

from qswitch.cli import app
from qswitch.config import RunConfig, known_keys, section_at
from tests.source_strings import strings_of

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("qswitch", "presets", "tests", "docs", "benchmarks", "notebooks", ".ci", ".github")
FILES = re.compile(r"\.(csv|gz|json|jsonl|md|py|txt|yaml)$")
"""`data.json` is a file, not a setting."""
REMOVED = {"data.streaming", "rollout.round_steps", "loss.lm_block_tokens"}
"""Settings that CHANGELOG.md names because they are no more."""
OF_OTHER_PROGRAMS = {
    "pip": "--index-url --no-deps --no-index --only-binary --platform --python-version --quiet --target "
    "--force-reinstall",
    "docker, buildah": "--build-arg --gpus --rm --user",
    "accelerate, torchrun": "--config_file --main_process_port --master-port --multi_gpu --nproc-per-node "
    "--num_processes",
    "llama.cpp's converter": "--model-name --outfile --outtype",
    "nvidia-smi": "--format --id --query-gpu",
    "ruff": "--check",
    "uv, pytest-xdist": "--dist --resolution",
    "benchmarks/study/prepare.py": "--eval --selfinst --train --vicuna",  # by a loop, so not seen below
}
"""Each is named in some text, or is to be taken away here."""


@cache
def options() -> dict[str, set[str]]:
    """A command by its words -> its options."""
    found: dict[str, set[str]] = {}

    def walk(command: Any, words: tuple[str, ...]) -> None:
        named = {name for p in command.params for name in [*p.opts, *p.secondary_opts] if name.startswith("-")}
        found[" ".join(words)] = named | {"--help"}
        for word, inner in getattr(command, "commands", {}).items():
            walk(inner, (*words, word))

    walk(get_command(app), ())
    return found


@cache
def other_options() -> set[str]:
    """What no command of qswitch takes: other programs' and those of our own scripts beside the package."""
    scripts = [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tests/faults").glob("*.py")]
    ours = {m for path in scripts for m in re.findall(r'add_argument\("(--[\w-]+)"', path.read_text(encoding="utf-8"))}
    return ours.union(*map(str.split, OF_OTHER_PROGRAMS.values()))


def options_named(text: str) -> list[str]:
    return re.findall(r"(?<![\w-])--[a-z][\w-]+", text)


def unknown_commands(text: str) -> list[str]:
    """Commands that do not exist, and options that theirs does not have."""
    found, text = [], re.sub(r"\\\n[ #]*", " ", text)
    for start in re.finditer(r"(`|-m |!)?\bqswitch ([a-z][a-z-]*)(?: ([a-z]+))?", text):
        before, first, second = start.groups(default="")
        verb = next((v for v in (f"{first} {second}", first) if v in options()), None)
        if verb is None:
            found += [f"qswitch {first}"] if before else []  # without a sign of a command it may be a sentence
            continue
        rest = re.split(r"[\n`|;&]| qswitch ", text[start.end() :], maxsplit=1)[0]
        found += [f"qswitch {verb} {name}" for name in options_named(rest) if name not in options()[verb]]
    return found


def unknown_options(text: str) -> list[str]:
    """Options that neither a command of ours nor another program has."""
    known = set().union(*options().values()) | other_options()
    return [name for name in options_named(text) if name not in known]


def unknown_settings(text: str) -> list[str]:
    """Dotted names that begin with a section, and are neither a setting, nor a section, nor a key of a mapping."""
    sections = "|".join(name for name in RunConfig.model_fields if section_at(name))
    names = re.findall(rf"(?<![\w./{{-])(?:{sections})(?:\.[a-z_0-9]+)+(?![\w(])", text)
    return [name for name in names if not is_setting(name) and not FILES.search(name)]


def is_setting(name: str) -> bool:
    if name in known_keys() or section_at(name):
        return True
    above, _, _ = name.rpartition(".")
    section = section_at(above.rpartition(".")[0])
    field = section.model_fields.get(above.rpartition(".")[2]) if section is not None and above else None
    return field is not None and get_origin(field.annotation) is dict


def texts() -> Iterator[tuple[str, str]]:
    """Where, and what is written there; of the package every string, with {} for the values in it."""
    paths = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*")) if p.is_file()]
    paths += [p for p in sorted(ROOT.iterdir()) if p.is_file()]
    for path in paths:
        where = path.relative_to(ROOT).as_posix()
        if where.startswith("qswitch/") and path.suffix == ".py":
            for line, text in strings_of(path):
                yield f"{where}:{line}", text
        elif path.suffix == ".ipynb":
            for i, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
                yield f"{where}, cell {i}", "".join(cell["source"])
        elif path.suffix in (".md", ".yaml", ".yml") or path.name == "Dockerfile" or path.parent.name == ".ci":
            yield where, path.read_text(encoding="utf-8")


def test_every_command_option_and_setting_that_is_named_exists():
    wrong, named, seen = [], set(), []
    for where, text in texts():
        removed = REMOVED if where == "CHANGELOG.md" else set()
        found = {*unknown_commands(text), *unknown_settings(text)} - removed
        if not where.startswith("."):  # CI's scripts and configurations are other programs' for the greater part
            found |= set(unknown_options(text))
        wrong += [f"{where}: {name}" for name in sorted(found)]
        named |= set(options_named(text))
        seen.append(where)
    assert wrong == []
    assert {"README.md", "CHANGELOG.md", "Dockerfile", "compose.yaml", "docs/scale.md", ".ci/container"} <= set(seen)
    assert len(seen) > 1000 and sum(where.startswith("notebooks/") for where in seen) > 5
    assert set().union(*map(str.split, OF_OTHER_PROGRAMS.values())) - named == set()
    assert REMOVED.isdisjoint(known_keys())


def test_what_does_not_exist_is_found():
    assert unknown_commands("    torchrun --nproc-per-node 2 -m qswitch distill --preset x --invented 3") == [
        "qswitch distill --invented"
    ]
    assert unknown_commands("`qswitch presets show x --verbos`") == ["qswitch presets show --verbos"]
    assert unknown_commands("!qswitch destill --preset x") == ["qswitch destill"]
    assert unknown_commands("docker run \\\n    qswitch plan --vrams 3 | qswitch eval --plot") == [
        "qswitch plan --vrams", "qswitch eval --plot"
    ]  # fmt: skip
    assert unknown_options("try it with --invented={}") == ["--invented"]
    assert unknown_settings("set train.steps=3, train.max_steps=4 or data.columns.prompt; see data.json") == [
        "train.steps"
    ]
