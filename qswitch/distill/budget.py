"""How much of a run's budget is spent, and the learning rate that follows it. Pure: numbers in, numbers out."""

from __future__ import annotations

import math

from qswitch.config import TrainSection


def spent_share(train: TrainSection, *, step: int, tokens: int, seconds: float) -> float:
    """The largest of the shares spent of steps, response tokens and seconds; the run ends at 1."""
    shares = [step / train.max_steps]
    if train.max_tokens is not None:
        shares.append(tokens / train.max_tokens)
    if train.max_seconds is not None:
        shares.append(seconds / train.max_seconds)
    return max(shares)


def learning_rate_factor(train: TrainSection, *, step: int, share: float) -> float:
    """What train.learning_rate is multiplied with after `step` steps: warm-up by steps, then the shape by the share."""
    if step < train.warmup_steps:
        return step / train.warmup_steps
    left = max(0.0, 1.0 - share)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * (1 - left))), "linear": left, "constant": 1.0}
    return shape[train.lr_scheduler_type]
