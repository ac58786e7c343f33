"""How much of a run's budget is spent, and the learning rate that follows it. Pure: numbers in, numbers out."""

from __future__ import annotations

import math

from qswitch.config import TrainSection


def spent_shares(train: TrainSection, *, step: int, tokens: int, seconds: float) -> dict[str, float]:
    """Limit of the train section -> the share of it that is spent; the run ends where one is 1."""
    shares = {"max_steps": step / train.max_steps}
    if train.max_tokens is not None:
        shares["max_tokens"] = tokens / train.max_tokens
    if train.max_seconds is not None:
        shares["max_seconds"] = seconds / train.max_seconds
    return shares


def learning_rate_factor(train: TrainSection, *, share: float) -> float:
    """What train.learning_rate is multiplied with where `share` of a budget of tokens or seconds is spent.

    The warm-up and the shape behind it are those of transformers' schedules, with a share in the place of steps.
    """
    warmup = train.warmup_steps
    if share < warmup:
        return share / warmup
    left = max(0.0, 1.0 - share) / (1.0 - warmup)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * (1 - left))), "linear": left, "constant": 1.0}
    return shape[train.lr_scheduler_type]
