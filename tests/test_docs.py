"""The documentation says what the code does: its reference is generated, its commands run, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from qswitch.cli import run
from qswitch.presets import load_run_config
from tests.source_strings import strings_of
from tests.tiny import save_tiny_pair

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
README = ROOT / "README.md"
HOME = "https://github.com/qswitch/qswitch"


def lines(path: Path) -> Iterator[str]:
    """Lines of text and code; tables cannot be wrapped, and neither can the targets of links, which are left out."""
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line.startswith(("|", "[")):
            yield re.sub(r"\]\([^)]*\)|: https://\S+$", "]()", line)


OTHERS = [
    *(
        ROOT / name
        for name in ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "compose.yaml", "mkdocs.yml")
    ),
    *sorted((ROOT / "presets").rglob("*.yaml")),
    *sorted((ROOT / "benchmarks").rglob("*.yaml")),
]


@pytest.mark.parametrize("path", [README, *OTHERS, *PAGES], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_line_is_longer_than_120_characters(path):
    """Those of docstrings are held by ruff."""
    assert [line for line in lines(path) if len(line) > 120] == []


def test_hosted_ci_runs_what_a_checkout_runs():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert {".ci/run", "make lint", ".ci/wheel"} <= set(steps)
    for step in steps:
        program, *words = step.split()
        assert set(words) <= targets if program == "make" else (ROOT / program).is_file() and not words, step
    tested = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    named = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert tested == named


def test_the_reference_is_what_the_code_says():
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, text in module.pages().items():
        current = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
        assert current == text, f"docs/reference/{name} is not current: python docs/make_reference.py"


@pytest.mark.parametrize("path", [README, *PAGES], ids=lambda p: p.name)
def test_links_lead_to_a_file_of_ours(path):
    text = path.read_text(encoding="utf-8")
    for target in [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r"^\[[^\]]+\]: (\S+)", text, re.M)]:
        target = target.partition("#")[0]
        if target.startswith(HOME + "/blob/main/"):
            assert (ROOT / target.removeprefix(HOME + "/blob/main/")).exists(), target
        elif target and not target.startswith("http"):
            assert path != README, f"README is read on PyPI too, where {target} leads nowhere"
            assert (path.parent / target).exists(), target


def test_the_readme_is_short_and_every_reference_of_it_is_defined():
    text = README.read_text(encoding="utf-8")
    assert len(text.split("\n")) <= 150
    assert set(re.findall(r"\]\[([^\]]+)\]", text)) == set(re.findall(r"^\[([^\]]+)\]: ", text, re.M))


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": (\S+\.md)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(listed) == [str(page.relative_to(ROOT / "docs")) for page in PAGES]


def test_a_term_is_explained_once():
    terms = re.findall(r"^\*\*(.+?)\.\*\*", (ROOT / "docs/glossary.md").read_text(encoding="utf-8"), re.M)
    assert len(terms) > 10 and len(set(terms)) == len(terms) and terms == sorted(terms, key=str.lower)


def messages() -> str:
    """All text in the package, values left out."""
    return "\n".join(text for path in sorted((ROOT / "qswitch").rglob("*.py")) for _, text in strings_of(path))


def test_troubleshooting_quotes_messages_that_exist():
    text = messages()
    quoted = re.findall(r"^### (.+)$", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.M)
    assert len(quoted) > 20 and [words for words in quoted if words not in text] == []


# ---------------------------------------------------------------------------------------------------------- commands


def commands() -> list[str]:
    """Every command of the README and of the pages, continued lines joined; the reference has the code's own."""
    found = []
    for path in [README, *(p for p in PAGES if p.parent.name != "reference")]:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        found += re.findall(r"^    (qswitch .+)$", text, re.M)
    return sorted({" ".join(shlex.split(command, comments=True)[1:]): command for command in found}.values())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with what the commands name: data, a configuration of two tiny models, and a finished run of it."""
    folder = tmp_path_factory.mktemp("docs")
    teacher, student = save_tiny_pair(folder / "pair")
    records = [
        {"prompt": f"tell me about {'abcdefghij'[i % 10] * (1 + i % 7)}", "response": f"it is {i}"} for i in range(30)
    ]
    for name in (
        "my_prompts.jsonl",
        "my_answers.jsonl",
        "questions.jsonl",
        "dolly_eval.jsonl",
        "vicuna_eval.jsonl",
        "task.jsonl",
    ):
        (folder / name).write_text(
            "".join(json.dumps(r) + "\n" for r in (records if "eval" not in name else records[:3]))
        )
    (folder / "faq.csv").write_text("frage,antwort\n" + "".join(f"why {i},because {i}\n" for i in range(30)))
    (folder / "questions.txt").write_text("why is it so\nwhat is that\n")
    config = {
        "teacher": {"model": str(teacher), "precision": "nf4"},
        "student": {"model": str(student), "lora": {"r": 4}},
        "data": {"train": str(folder / "my_prompts.jsonl"), "num_validation": 3},
        "rollout": {"max_new_tokens": 4, "batch_size": 4},
        "train": {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "device": "cpu"},
    }
    (folder / "my.yaml").write_text(yaml.safe_dump(config))
    study = {
        "run": "my.yaml", "budget": {"unit": "steps", "amount": 1}, "seeds": [1],
        "cells": {"switch": {}, "gkd": {"settings": {"method": "gkd"}}},
        "evaluate": {"data": [str(folder / "questions.jsonl")], "max_new_tokens": 4},
    }  # fmt: skip
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    (folder / "merged-a").symlink_to(student)
    (folder / "merged-b").symlink_to(student)
    settings = ["--config", str(folder / "my.yaml"), "--output-dir"]
    assert run(["distill", *settings, str(folder / "RUN")]) == 0
    for role in ("teacher", "student"):
        assert run(["sft", *settings, str(folder / "warm" / role), "--model", role]) == 0
    return folder


def small(command: str) -> list[str]:
    """The command on the tiny pair: it loads nothing from a hub, needs no GPU and no other program."""
    verb, *rest = shlex.split(command, comments=True)[1:]
    for i, word in enumerate(rest):
        if word == "--preset":
            load_run_config(rest[i + 1])  # named in the documentation, so it must exist
        if re.fullmatch(r"runs/(my-run|first|second)(:\w+)?", word):
            rest[i] = re.sub(r"^runs/[\w-]+", "RUN", word)
    line = " ".join([verb, *map(shlex.quote, rest)])
    if verb == "distill":  # from the results of the page's qswitch sft
        line = re.sub(r"_adapter=runs/|\.adapter=runs/", lambda m: m.group().replace("runs", "warm"), line)
    if verb in ("distill", "sft"):
        line = re.sub(r"--preset \S+", "--config my.yaml", line)
    replaced = {
        r"Qwen/Qwen2.5-7B-Instruct": "pair/teacher",
        r"Qwen/Qwen2.5-0.5B-Instruct": "pair/student",
        r"(--data my_prompts.jsonl)$": r"\1 --set train.device=cpu --dry-run" if verb == "distill" else r"\1",
        r"^shrink \S+ --layers \d+": "shrink pair/teacher --layers 1",
        r"benchmarks/study/\w+.yaml": "study.yaml",  # its data is not in the repository
        r"^(eval .*)": r"\1 --max-new-tokens 4 --limit 2",
        r"^(plan (?!.*(--vram|--gpu|--all)).*)": r"\1 --vram 24GiB",
        r"^presets copy (\S+) my.yaml": r"presets copy \1 copied.yaml",
        r" --gguf \S+": "",  # needs llama.cpp; tests/export has it
        r"^(push (?!.*--dry-run).*)": r"\1 --dry-run",
        r"^(compare .*)": r"\1 --dry-run",
    }
    for pattern, new in replaced.items():
        line = re.sub(pattern, new, line)
    return shlex.split(line)


@pytest.mark.parametrize("command", sorted({shlex.join(small(command)) for command in commands()}))
def test_every_command_runs(command, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    shutil.rmtree(workplace / "RUN" / "eval", ignore_errors=True)  # of another command, which scored other sets
    if command.startswith("push"):
        assert run(["merge", "RUN"]) == 0  # an earlier one is left as it is
    code = run(shlex.split(command))
    assert code == 0, f"{command}: {capsys.readouterr().err}"


def test_the_example_in_python_runs(workplace, monkeypatch, capsys):
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    example = text[text.index("    import qswitch\n") : text.index("\n`import qswitch`")]
    small_one = textwrap.dedent(example).replace('"qwen2.5-7b-to-1.5b"', '"my.yaml"').replace("250", "1")
    assert 'configure("my.yaml"' in small_one and '"train.max_steps": 1}' in small_one
    monkeypatch.chdir(workplace)
    exec(small_one, {})
    assert " -> " in capsys.readouterr().out and (workplace / "runs/mine/merged/config.json").is_file()
