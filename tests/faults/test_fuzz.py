"""A short form of the fuzzing: `python -m tests.faults --sections fuzz` draws thousands of each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults import fuzz
from tests.tiny import save_tiny_pair

SOUND: dict[str, Any] = {
    "teacher": {"model": "teacher", "precision": "fp32"},
    "student": {"model": "student", "precision": "fp32", "lora": {"r": 2}},
    "data": {"train": "data.jsonl", "num_validation": 1},
    "train": {"device": "cpu", "max_steps": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("fuzz")
    save_tiny_pair(made)
    (made / "data.jsonl").write_text('{"prompt": "why", "response": "so"}\n' * 4)
    return made


@pytest.mark.parametrize("kind", [kind for kind in fuzz.KINDS if kind != "state"])
def test_no_input_ends_in_a_traceback(kind, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fuzz.fuzz(kind, folder, 40, sound=SOUND, files={}, seed=1) >= 40
