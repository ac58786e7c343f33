"""Budgets of steps, tokens and seconds, and the learning rate that follows them."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from transformers import get_scheduler

from qswitch.config import TrainSection
from qswitch.distill.budget import learning_rate_factor, spent_share
from qswitch.distill.progress import Progress, total_steps


def test_the_budget_that_is_spent_most_decides():
    train = TrainSection(max_steps=10, max_tokens=100, max_seconds=50.0)
    assert spent_share(train, step=1, tokens=30, seconds=5.0) == 0.3
    assert spent_share(train, step=6, tokens=30, seconds=5.0) == 0.6
    assert spent_share(train, step=1, tokens=30, seconds=60.0) == 1.2
    assert spent_share(TrainSection(max_steps=10), step=5, tokens=10**9, seconds=1e9) == 0.5


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_by_steps_it_is_the_schedule_of_transformers(shape: str, warmup: int):
    """But that transformers stretches cosine and linear over the steps behind the warm-up."""
    train = TrainSection(max_steps=20, warmup_steps=warmup, lr_scheduler_type=shape)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    name = "constant_with_warmup" if shape == "constant" else shape
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    for step in range(20):
        ours = learning_rate_factor(train, step=step, share=step / 20)
        if warmup == 0 or step < warmup or shape == "constant":
            assert ours == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        assert 0 <= ours <= 1
        optimizer.step()
        scheduler.step()
    if shape != "constant":
        assert learning_rate_factor(train, step=20, share=1.0) == 0 == learning_rate_factor(train, step=9, share=1.3)


def test_progress_tells_the_time_left_by_the_share_of_the_budget(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("qswitch.distill.progress.time.monotonic", lambda: now[0])
    train = TrainSection(max_steps=1_000_000, max_tokens=1000)
    out = io.StringIO()
    progress = Progress(total_steps(train), Console(file=out, width=200))
    metrics = {"loss": 1.0, "teacher_share": None, "rollout_tokens_per_s": None}
    with progress:
        now[0] = 20.0
        progress.stepped(metrics | {"step": 1, "spent": 0.25})
    assert "step 1 " in out.getvalue() and "about 60 s left" in out.getvalue() and "1000000" not in out.getvalue()
    assert total_steps(TrainSection(max_steps=7)) == 7


@pytest.mark.parametrize(
    ("epochs", "num_prompts", "reuse", "steps"),
    [(1, 16, 1, 2), (2, 17, 1, 5), (0.5, 16, 1, 1), (1, 16, 4, 8)],
)
def test_epochs_are_counted_in_sequences(epochs: float, num_prompts: int, reuse: int, steps: int):
    train = TrainSection(num_epochs=epochs, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert train.steps_of_epochs(num_prompts, reuse=reuse) == steps
