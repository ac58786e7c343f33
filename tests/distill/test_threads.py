"""A CPU run repeats after a resume with several threads, too; every other test has one (`tests/conftest.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from qswitch.distill.trainer import Trainer
from qswitch.errors import Interrupted
from qswitch.run import distill, resume
from tests.distill.test_trainer import adapter_bytes, settings
from tests.tiny import save_tiny_pair

THREADS = 2


def main(folder: Path) -> None:
    """A run as a whole, and one that stops after its first step; wide enough that torch divides its operations."""
    assert torch.get_num_threads() == THREADS
    teacher, student = save_tiny_pair(folder, hidden_size=128, intermediate_size=512)
    data = folder / "data.jsonl"
    lines = [{"prompt": "tell me " * 4 + "abcdefghij"[i % 10], "response": f"it is {i}"} for i in range(20)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = settings(
        (teacher, student, data), loss__scope="all", train__max_steps=2, train__per_device_train_batch_size=4,
        train__gradient_accumulation_steps=1, train__eval_own_prompts=0, rollout__max_new_tokens=6,
        data__num_validation=2,
    )  # fmt: skip
    distill(config, folder / "whole")
    original = Trainer.train_step

    def stop_at_one(trainer: Trainer) -> Any:
        trainer.stop_requested = trainer.stop_requested or trainer.step == 0
        return original(trainer)

    try:
        with mock.patch.object(Trainer, "train_step", stop_at_one):
            distill(config, folder / "halves")
    except Interrupted:
        resume(folder / "halves")


def test_a_resumed_run_repeats_with_two_threads(tmp_path):
    # Passive: on busy cores a thread that spins while it waits takes the time that the other needs.
    threads = {"OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "PASSIVE"}
    environment = {**os.environ, **threads}
    command = [sys.executable, "-m", "tests.distill.test_threads", str(tmp_path)]
    root = Path(__file__).parents[2]
    child = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert "resumed from step 1" in child.stderr
    assert adapter_bytes(tmp_path / "halves") == adapter_bytes(tmp_path / "whole")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
