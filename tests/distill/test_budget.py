"""Budgets of steps, tokens and seconds, and the learning rate that follows them."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import get_scheduler

from qswitch.config import TrainSection
from qswitch.distill.budget import learning_rate_factor, spent_shares
from qswitch.distill.optimizer import Schedule
from qswitch.distill.progress import Progress, total_steps
from qswitch.distill.replay import ReplayBuffer, ReplayEntry, split_step
from qswitch.distill.sequence import TrainingSequence
from qswitch.distill.supply import ground_truth_coin
from qswitch.layers import build_config

MINIMAL = {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "x.jsonl"}}


def test_each_limit_has_a_share():
    train = TrainSection(max_steps=10, max_tokens=100, max_seconds=50.0)
    assert spent_shares(train, step=6, tokens=30, seconds=60.0) == {
        "max_steps": 0.6, "max_tokens": 0.3, "max_seconds": 1.2
    }  # fmt: skip
    assert spent_shares(TrainSection(max_steps=10), step=5, tokens=10**9, seconds=1e9) == {"max_steps": 0.5}


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.2])
@pytest.mark.parametrize("budget", ["max_steps", "max_tokens"])
def test_where_every_step_spends_the_same_it_is_the_schedule_of_transformers(shape: str, warmup: float, budget: str):
    spent = [0.0]
    optimizers = [torch.optim.SGD([torch.zeros(1)], lr=1.0) for _ in range(2)]
    train = TrainSection(**{budget: 20}, warmup_steps=warmup, lr_scheduler_type=shape, learning_rate=1.0)
    ours = Schedule(train, optimizers[0], lambda: spent[0])
    name = "constant_with_warmup" if shape == "constant" else shape
    theirs = get_scheduler(name, optimizers[1], num_warmup_steps=int(20 * warmup), num_training_steps=20)
    for step in range(1, 21):
        assert ours.learning_rate == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), step
        spent[0] = step / 20
        for moved in (*optimizers, ours, theirs):
            moved.step()
    if shape != "constant":
        assert learning_rate_factor(train, share=1.0) == 0 == learning_rate_factor(train, share=1.3)


def test_runs_that_spend_a_budget_of_tokens_in_other_steps_learn_at_like_rates():
    """In the mean over 7 steps, or 40; by a warm-up of 50 steps the means were 0.06 and 0.39."""
    train = TrainSection(max_tokens=20_000, warmup_steps=0.05)
    for num in (7, 40):
        mean = sum(learning_rate_factor(train, share=step / num) for step in range(num)) / num
        assert mean == pytest.approx(0.5, abs=0.06), num


@pytest.mark.parametrize(
    ("warmup", "steps"),
    [(0, 0), (0.05, 50), (0.0505, 50), (0.29, 290), (1, 1), (50, 50)],
)
def test_warm_up_is_a_share_below_1_and_a_number_of_steps_from_1_on(warmup: float, steps: int):
    assert TrainSection(max_steps=1000, warmup_steps=warmup).num_warmup_steps == steps
    with pytest.raises(ValueError, match="whole steps"):
        TrainSection(warmup_steps=1.5)


def test_a_budget_that_is_written_alone_has_no_limit_of_steps():
    for limit in ({"max_tokens": 1000}, {"max_seconds": 60.0}):
        assert TrainSection(**limit).step_limit is None
        assert TrainSection(**limit, max_steps=7).step_limit == 7
        assert TrainSection(**limit, num_epochs=2).max_steps == TrainSection().max_steps, "the run counts its epochs"
    assert TrainSection().step_limit == 200


def test_progress_tells_the_time_left_by_the_share_of_the_budget(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("qswitch.distill.progress.time.monotonic", lambda: now[0])
    train = TrainSection(max_tokens=1000)
    out = io.StringIO()
    progress = Progress(total_steps(train), Console(file=out, width=200))
    metrics = {"loss": 1.0, "teacher_share": None, "rollout_tokens_per_s": None}
    with progress:
        now[0] = 20.0
        progress.stepped(metrics | {"step": 1, "spent": 0.25})
    assert "step 1 " in out.getvalue() and "about 60 s left" in out.getvalue() and "1000000" not in out.getvalue()
    assert total_steps(TrainSection(max_steps=7)) == 7


@pytest.mark.parametrize(
    ("epochs", "num_prompts", "settings", "steps"),
    [
        (1, 16, {}, 2),
        (2, 17, {}, 5),
        (0.5, 16, {}, 1),
        (1, 16, {"rollout.reuse": 4}, 8),
        (1, 16, {"method": "sft"}, 2),
    ],
)
def test_epochs_are_counted_in_sequences(epochs: float, num_prompts: int, settings: dict[str, Any], steps: int):
    size = {"train.per_device_train_batch_size": 4, "train.gradient_accumulation_steps": 2}
    assert build_config(MINIMAL, size, settings).steps_of_epochs(epochs, num_prompts) == steps


@pytest.mark.parametrize("mix", [0.0, 0.25, 0.5])
@pytest.mark.parametrize(("reuse", "batch", "accumulation"), [(1, 4, 4), (4, 4, 4), (8, 4, 4), (4, 3, 2), (16, 4, 4)])
def test_an_epoch_takes_every_prompt_once_whatever_is_ground_truth_or_trained_again(mix, reuse, batch, accumulation):
    """Counted by drawing: a step of ground truth takes all its prompts fresh, one of rollouts those of `split_step`."""
    config = build_config(MINIMAL, {
        "method": "gkd", "data.ground_truth_mix": mix, "rollout.reuse": reuse,
        "train.per_device_train_batch_size": batch, "train.gradient_accumulation_steps": accumulation,
    })  # fmt: skip
    total, num_prompts = batch * accumulation, 20_000
    buffer, drawn = ReplayBuffer(10_000, 1000, seed=0), 0
    for step in range(config.steps_of_epochs(1, num_prompts)):
        if ground_truth_coin(config.seed, step) < mix:
            drawn += total
            continue
        fresh, replayed = split_step(total, reuse, len(buffer))
        buffer.draw(replayed, step)
        new = (TrainingSequence(drawn + i, 0, [5], [7], [0]) for i in range(fresh))
        buffer.add(ReplayEntry(sequence, step, reuse - 1) for sequence in new)
        buffer.expire(step + 1)
        drawn += fresh
    assert drawn == pytest.approx(num_prompts, rel=0.04)
