"""A folder with a tiny pair, data and configurations; and what must be the same after a fault, a run's signature."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.faults.forked import Ended, Events, command, kill_here
from tests.tiny import save_tiny_pair

TIMES = ("seconds", "rollout_tokens_per_s", "train_tokens_per_s", "peak_gib", "phases_gib", "planned_gib",
         "planned_seconds", "commit")  # fmt: skip
"""Figures that differ from call to call, and the commit, which may change under a long harness."""


@dataclass(frozen=True)
class Workplace:
    """The folder; commands run in it."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, *, steps: int = 4) -> Workplace:
        """Two random models, a byte-sized data set, a run of `steps` steps and a comparison of two steps."""
        folder.mkdir(parents=True, exist_ok=True)
        teacher, student = save_tiny_pair(folder, teacher_layers=2, student_layers=1)
        records = [{"prompt": f"say {i} {'abc'[i % 3] * (i % 7)}", "response": f"it is {i}"} for i in range(16)]
        for name, rows in (("data.jsonl", records), ("eval.jsonl", records[:3])):
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        values: dict[str, Any] = {
            "teacher": {"model": str(teacher), "precision": "fp32"},
            "student": {"model": str(student), "precision": "fp32", "lora": {"r": 2, "alpha": 4, "dropout": 0.1}},
            "data": {"train": str(folder / "data.jsonl"), "num_validation": 2},
            "rollout": {"max_new_tokens": 5, "batch_size": 4, "reuse": 2, "decay_rate": 0.5, "block_tokens": 1},
            "train": {"device": "cpu", "compute_dtype": "fp32", "max_steps": steps, "per_device_train_batch_size": 2,
                      "gradient_accumulation_steps": 1, "eval_steps": 2, "save_steps": 1, "learning_rate": 0.01},
        }  # fmt: skip
        (folder / "run.yaml").write_text(yaml.safe_dump(values))
        study = {
            "run": "run.yaml", "budget": {"unit": "steps", "amount": 1}, "seeds": [1], "cells": {"switch": {}},
            "evaluate": {"data": ["eval.jsonl"], "max_new_tokens": 4},
        }  # fmt: skip
        (folder / "study.yaml").write_text(yaml.safe_dump(study))
        return cls(folder)

    def call(self, *arguments: str, **how: Any) -> Ended:
        """A command in this folder, its cache here too."""
        environment = {"QSWITCH_CACHE": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1", **how.pop("environment", {})}
        return command(arguments, cwd=self.folder, environment=environment, **how)

    def start(self, run: str, **how: Any) -> Ended:
        return self.call("distill", "--config", "run.yaml", "--output-dir", run, **how)

    def go_on(self, run: str, **how: Any) -> Ended:
        """What a user does after a stop: resume where there is something to resume, else start again."""
        if (self.folder / run / "config.yaml").is_file():
            return self.call("distill", "--resume", run, **how)
        return self.start(run, **how)

    def whole_run(self) -> None:
        """The undisturbed run, `whole`."""
        ended = self.start("whole")
        assert ended.code == 0, ended.output

    def is_whole(self, run: str) -> bool:
        """Whether a run has learnt and logged what the undisturbed one has."""
        return signature(self.folder / run) == signature(self.folder / "whole")

    def stopped_run(self, run: str, *, before: str) -> None:
        """A run that was killed as it began to write a folder whose name holds `before`, such as `step-000004`."""

        def fault() -> None:
            import sys

            def hear(event: str, arguments: tuple[object, ...]) -> None:
                if event == "os.mkdir" and before in str(arguments[0]):
                    kill_here()

            sys.addaudithook(hear)

        ended = self.start(run, fault=fault)
        assert ended.code == -9, ended.output

    def count(self, act: Callable[..., Ended]) -> int:
        """How many file events a command has, below this folder."""
        events = Events(self.folder)
        ended = act(fault=events.watch)
        assert ended.code == 0, ended.output
        return events.count

    def copy(self, source: str, target: str) -> Path:
        """A fresh copy of a folder."""
        shutil.rmtree(self.folder / target, ignore_errors=True)
        return Path(shutil.copytree(self.folder / source, self.folder / target))

    def remove(self, *names: str) -> None:
        for name in names:
            shutil.rmtree(self.folder / name, ignore_errors=True)


def signature(run: Path) -> dict[str, Any]:
    """All that a run has learnt and logged, times and memory apart."""

    def lines(name: str, *, whole: bool = False) -> list[Any] | None:
        if not (run / name).exists():
            return None
        text = (run / name).read_text(encoding="utf-8")
        return [_timeless(json.loads(line)) for line in ([text] if whole else text.split("\n")) if line]

    return {
        "adapter": hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "metrics": lines("metrics.jsonl"),
        "rollouts": lines("rollouts.jsonl"),
        "held_out": lines("held_out.json", whole=True),
        "summary": lines("summary.json", whole=True),
    }


def _timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in TIMES}
