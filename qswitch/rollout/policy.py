"""Who writes the next token: the student, the teacher, or a mixture of both.

A policy sees the teacher's distribution p, the student's q, the step t and (for `random`) a coin; never the token noise
and never the text, so each writer's draw stays an exact sample of its own distribution. Knows no tokenizer and no
model.

Letters: `R` rows, `V` shared vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qswitch.config import RolloutSection
from qswitch.distill.divergence import jsd_bits_from_log_probs

STUDENT, TEACHER, MIXTURE = 0, 1, 2
WRITER_NAMES = ("student", "teacher", "mixture")


@dataclass(frozen=True, slots=True)
class Decision:
    """Who writes one step of each row."""

    writers: Tensor
    """int8 [R]: STUDENT, TEACHER or MIXTURE."""
    log_probs: Tensor
    """[R, V]: the distribution the token is drawn from, before the sampling temperature."""
    jsd_bits: Tensor | None
    """[R] in [0, 1]; None where only one model was asked."""
    threshold: Tensor | None
    """[R] bits; None for policies without one."""


class Policy(Protocol):
    """Decides the writers of one step."""

    @property
    def uses_teacher(self) -> bool: ...

    @property
    def uses_student(self) -> bool: ...

    def decide(
        self, teacher_log_probs: Tensor | None, student_log_probs: Tensor | None, steps: Tensor, coins: Tensor
    ) -> Decision:
        """Log-probabilities [R, V] of both models, steps int64 [R], coins float64 [R] in (0, 1)."""
        ...


def _both(teacher_log_probs: Tensor | None, student_log_probs: Tensor | None) -> tuple[Tensor, Tensor]:
    assert teacher_log_probs is not None and student_log_probs is not None, "the engine must ask both models"
    return teacher_log_probs, student_log_probs


def _pick(teacher_writes: Tensor, teacher_log_probs: Tensor, student_log_probs: Tensor) -> tuple[Tensor, Tensor]:
    writers = teacher_writes.to(torch.int8)  # STUDENT = 0, TEACHER = 1
    return writers, torch.where(teacher_writes[:, None], teacher_log_probs, student_log_probs)


@dataclass(frozen=True, slots=True)
class Threshold:
    """tau_t in bits along the response, t = 0, 1, ... (SWITCH, Koo et al. 2025, eq. 4 and Table 3)."""

    schedule: str
    tau_0: float
    decay_rate: float
    constant: float
    max_new_tokens: int

    def __call__(self, steps: Tensor) -> Tensor:
        """int64 [R] -> float64 [R]."""
        t = steps.double()
        if self.schedule == "exponential":
            return self.tau_0 * torch.exp(-self.decay_rate * t)
        if self.schedule == "linear":
            return self.tau_0 * (1 - t / self.max_new_tokens).clamp_min(0)
        if self.schedule == "constant":
            return torch.full_like(t, self.constant)
        if self.schedule == "growth":  # the paper gives no formula; this one is ours
            return 1 - torch.exp(-self.decay_rate * (t + 1))
        raise AssertionError(self.schedule)


@dataclass(frozen=True, slots=True)
class SwitchPolicy:
    """SWITCH: the student writes while the divergence is at most tau_t, the teacher intervenes above it."""

    threshold: Threshold
    uses_teacher: bool = True
    uses_student: bool = True

    def decide(
        self, teacher_log_probs: Tensor | None, student_log_probs: Tensor | None, steps: Tensor, coins: Tensor
    ) -> Decision:
        p, q = _both(teacher_log_probs, student_log_probs)
        jsd = jsd_bits_from_log_probs(p, q)
        tau = self.threshold(steps)
        writers, log_probs = _pick(jsd.double() > tau, p, q)
        return Decision(writers, log_probs, jsd, tau)


@dataclass(frozen=True, slots=True)
class StudentPolicy:
    """The student writes everything (on-policy: GKD, ImitKD); the teacher is not asked."""

    uses_teacher: bool = False
    uses_student: bool = True

    def decide(
        self, teacher_log_probs: Tensor | None, student_log_probs: Tensor | None, steps: Tensor, coins: Tensor
    ) -> Decision:
        assert student_log_probs is not None
        return Decision(torch.full_like(steps, STUDENT, dtype=torch.int8), student_log_probs, None, None)


@dataclass(frozen=True, slots=True)
class TeacherPolicy:
    """The teacher writes everything (SeqKD, and the held-out responses of the validation)."""

    uses_teacher: bool = True
    uses_student: bool = False

    def decide(
        self, teacher_log_probs: Tensor | None, student_log_probs: Tensor | None, steps: Tensor, coins: Tensor
    ) -> Decision:
        assert teacher_log_probs is not None
        return Decision(torch.full_like(steps, TEACHER, dtype=torch.int8), teacher_log_probs, None, None)


@dataclass(frozen=True, slots=True)
class RandomPolicy:
    """A coin decides each step: the control without a criterion (Table 3, "random teacher"; its share is ours)."""

    teacher_probability: float
    uses_teacher: bool = True
    uses_student: bool = True

    def decide(
        self, teacher_log_probs: Tensor | None, student_log_probs: Tensor | None, steps: Tensor, coins: Tensor
    ) -> Decision:
        p, q = _both(teacher_log_probs, student_log_probs)
        writers, log_probs = _pick(coins < self.teacher_probability, p, q)
        return Decision(writers, log_probs, jsd_bits_from_log_probs(p, q), None)


@dataclass(frozen=True, slots=True)
class MixturePolicy:
    """Every token is drawn from w p + (1 - w) q (MiniLLM's teacher-mixed sampling)."""

    teacher_weight: float
    uses_teacher: bool = True
    uses_student: bool = True

    def decide(
        self, teacher_log_probs: Tensor | None, student_log_probs: Tensor | None, steps: Tensor, coins: Tensor
    ) -> Decision:
        p, q = _both(teacher_log_probs, student_log_probs)
        w = self.teacher_weight
        log_w = math.log(w) if w > 0 else -math.inf
        log_rest = math.log1p(-w) if w < 1 else -math.inf
        mixed = torch.logaddexp(p + log_w, q + log_rest)
        return Decision(torch.full_like(steps, MIXTURE, dtype=torch.int8), mixed, jsd_bits_from_log_probs(p, q), None)


def make_policy(rollout: RolloutSection) -> Policy:
    """The policy that a configuration names."""
    if rollout.policy == "switch":
        return SwitchPolicy(
            Threshold(
                schedule=rollout.schedule,
                tau_0=rollout.tau_0,
                decay_rate=rollout.decay_rate,
                constant=rollout.constant_threshold,
                max_new_tokens=rollout.max_new_tokens,
            )
        )
    if rollout.policy == "random":
        return RandomPolicy(rollout.teacher_probability)
    if rollout.policy == "mixture":
        return MixturePolicy(rollout.mixture_teacher_weight)
    return StudentPolicy() if rollout.policy == "student" else TeacherPolicy()
