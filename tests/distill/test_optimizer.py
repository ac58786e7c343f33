"""Trackers know which run they follow and how it is set."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from qswitch.distill.optimizer import make_accelerator
from qswitch.layers import build_config
from qswitch.run_dir import RunDir


def test_a_tracker_gets_every_setting_by_its_dotted_name(tmp_path: Path):
    pytest.importorskip("tensorboard")
    given = {"teacher": {"model": ["a", "b"]}, "student": {"model": "s"}, "data": {"train": "x.jsonl"}}
    config = build_config({**given, "train": {"report_to": ["tensorboard"], "learning_rate": 3e-4}})
    run_dir = RunDir.create(tmp_path / "my-run", config)
    student = SimpleNamespace(device=torch.device("cpu"), compute_dtype=torch.float32)
    make_accelerator(config, run_dir, student).end_training()
    (path,) = run_dir.path.rglob("hparams.yml")
    stored = yaml.safe_load(path.read_text())
    assert stored["train.learning_rate"] == 3e-4 and stored["teacher.model"] == "['a', 'b']"
    assert stored["student.lora.r"] == config.student.lora.r
