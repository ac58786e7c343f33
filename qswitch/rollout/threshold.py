"""How the threshold of SWITCH falls along a response: a pure function of the response step. Knows no model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qswitch.config import RolloutSection
from qswitch.errors import ConfigError

TAU_FLOOR_BITS = 1e-7
"""A threshold below this lies below any divergence that fp32 resolves: the teacher writes in any case."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """tau_t in bits along the response, t = 0, 1, ... (SWITCH, Koo et al. 2025, eq. 4 and Table 3)."""

    schedule: str
    tau_0: float
    decay_rate: float
    constant: float
    max_new_tokens: int
    tail_bits: float = TAU_FLOOR_BITS
    """Once the threshold has fallen below this for good, the teacher writes whatever the divergence is."""
    factor: float = 1.0
    """Makes the threshold fall so many times as fast, or lie so many times as low (constant): more of the teacher."""

    def __call__(self, steps: Tensor) -> Tensor:
        """int64 [...] -> float64 [...]."""
        t = steps.double()
        if self.schedule == "exponential":
            return self.tau_0 * torch.exp(-self.decay_rate * self.factor * t)
        if self.schedule == "linear":
            return self.tau_0 * (1 - t / self.max_new_tokens).clamp_min(0)
        if self.schedule == "constant":
            return torch.full_like(t, self._constant)
        if self.schedule == "growth":  # the paper gives no formula; this one is ours
            return 1 - torch.exp(-self.decay_rate * (t + 1))
        raise AssertionError(self.schedule)

    @property
    def _constant(self) -> float:
        return min(1.0, self.constant / self.factor)

    @property
    def tail_start(self) -> float:
        """First step whose threshold, and all later ones, lie below `tail_bits`."""
        if self.schedule == "exponential":
            rate = self.decay_rate * self.factor
            start = max(0, math.floor(math.log(self.tau_0 / self.tail_bits) / rate))
            # The logarithm rounds: settle it with the very arithmetic that the decision uses.
            while float(self(torch.tensor(start))) >= self.tail_bits:
                start += 1
            return start
        if self.schedule == "linear":
            start = max(0, math.floor(self.max_new_tokens * (1 - self.tail_bits / self.tau_0)))
            while float(self(torch.tensor(start))) >= self.tail_bits:
                start += 1
            return start
        return 0 if self.schedule == "constant" and self._constant < self.tail_bits else math.inf

    def critical_factor(self, step: int, jsd_bits: float) -> float:
        """The factor above which the teacher writes a token of this divergence; infinite where none makes it."""
        jsd = max(jsd_bits, TAU_FLOOR_BITS)
        if self.schedule == "constant":
            return self.constant / jsd
        assert self.schedule == "exponential", self.schedule
        if jsd > self.tau_0:
            return 0.0
        return math.log(self.tau_0 / jsd) / (self.decay_rate * step) if step else math.inf


def make_threshold(rollout: RolloutSection, *, expected_tokens: float | None = None, factor: float = 1.0) -> Threshold:
    """The threshold that a configuration names; `expected_tokens` is what `auto` stands for.

    Raises:
        ConfigError: rollout.expected_tokens is auto, and no run has said what that is.
    """
    schedule, decay_rate = rollout.schedule, rollout.decay_rate
    if schedule == "relative":  # exponential, at the rate that the expected length makes of it
        length = expected_tokens if rollout.expected_tokens == "auto" else rollout.expected_tokens
        if length is None:
            raise ConfigError(
                "rollout.expected_tokens=auto is the mean length of the teacher's answers to the held-out prompts, "
                "which a run knows once it has begun. Name a run, or set a number."
            )
        schedule, decay_rate = "exponential", rollout.relative_decay / length
    return Threshold(
        schedule=schedule,
        tau_0=rollout.tau_0,
        decay_rate=decay_rate,
        constant=rollout.constant_threshold,
        max_new_tokens=rollout.max_new_tokens,
        tail_bits=rollout.tail_bits,
        factor=factor,
    )
