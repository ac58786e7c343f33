"""Comparisons of a tiny pair, for the tests of `qswitch compare`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qswitch import cli
from tests.evaluate.runs import WORDS, write_test_set
from tests.tiny import save_tiny_pair


def write_comparison(folder: Path, name: str = "study", **changes: Any) -> Path:
    """`name`.yaml with a base configuration, data and a tiny pair beside it."""
    if not (folder / "pair").exists():
        save_tiny_pair(folder / "pair")
        lines = [{"prompt": f"tell {w} {i}", "response": f"{w} is it"} for i, w in enumerate(WORDS)]
        (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_test_set(folder / "questions.jsonl")
    base = {
        "teacher": {"model": str(folder / "pair/teacher"), "precision": "fp32"},
        "student": {"model": str(folder / "pair/student"), "precision": "fp32", "lora": {"r": 4, "alpha": 8}},
        "data": {"train": str(folder / "train.jsonl"), "num_validation": 3},
        "rollout": {"max_new_tokens": 8, "batch_size": 4},
        "train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 5e-3,
                  "eval_steps": 100, "save_steps": 1, "device": "cpu", "compute_dtype": "fp32"},
    }  # fmt: skip
    (folder / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    values: dict[str, Any] = {
        "run": "base.yaml",
        "budget": {"unit": "steps", "amount": 2},
        "seeds": [1],
        "cells": {"switch": {}, "gkd": {"settings": {"method": "gkd"}}},
        "evaluate": {"data": [str(folder / "questions.jsonl")], "max_new_tokens": 8, "limit": 5},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False), encoding="utf-8")
    return path


class Launcher:
    """Runs commands in this process and remembers them; stops as Ctrl-C would before the n-th."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.commands: list[list[str]] = []
        self.stop_at = stop_at

    def __call__(self, arguments: Sequence[str]) -> int:
        if len(self.commands) == self.stop_at:
            raise KeyboardInterrupt
        self.commands.append(list(arguments))
        return cli.run(list(arguments))

    def kinds(self) -> list[str]:
        return [f"{c[0]} {Path(c[1].partition('=')[2] or c[1]).name}" for c in self.commands]


def swap_two_tokens(file: Path) -> None:
    """Let two ids of a tokenizer.json mean each other's token, so that it is another one."""
    values = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(values), encoding="utf-8")
