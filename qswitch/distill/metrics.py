"""What one optimizer step did, and its line of metrics.jsonl."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from qswitch.rollout.policy import TEACHER
from qswitch.rollout.requests import Rollout, RolloutStats

BatchKind = Literal["ground_truth", "rollout", "replay"]
"""Where the responses of a step come from: the data, a fresh rollout, an earlier one."""


@dataclass(slots=True)
class Counters:
    """Totals of a run, kept across a resume."""

    step: int = 0
    """Optimizer steps that are finished."""
    seconds: float = 0.0
    rollout_tokens: int = 0
    trained_tokens: int = 0
    response_tokens: int = 0
    """Generated, or read from the data where a batch was ground truth."""
    steps_without_loss: int = 0
    rollout_batches: int = 0
    """Steps that learnt from rollouts, fresh or replayed, rather than from the data's own responses."""
    overflows: int = 0
    """Attempts at a step that moved no weight, because gradients left the range of fp16; they count as no step."""
    best_nats: float = math.inf
    """Lowest of the validations: KL from the teacher, or the response loss where no teacher is loaded."""
    best_step: int = -1
    before_nats: float | None = None
    last_nats: float | None = None
    before_nats_by_prompt: list[float] | None = None
    """The figure by held-out prompt, per token, before the first step; the mean weighted by tokens is `before_nats`."""
    best_nats_by_prompt: list[float] | None = None
    """The same of the best validation."""
    own_before: dict[str, Any] | None = None
    """Figures of the student's own responses before the first step; None where they are not measured."""
    own_best: dict[str, Any] | None = None
    """The same of the best validation."""

    def count(self, report: StepReport, seconds: float) -> None:
        """Add a finished step."""
        self.step += 1
        self.seconds += seconds
        self.rollout_tokens += report.rollout.tokens
        self.trained_tokens += report.loss_tokens
        self.response_tokens += report.loss_tokens if report.batch == "ground_truth" else report.written_tokens
        self.steps_without_loss += report.loss is None
        self.rollout_batches += report.batch != "ground_truth"
        self.overflows += report.overflows

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        for name in self.__slots__:
            setattr(self, name, state[name])


@dataclass(slots=True)
class Tally:
    """What the fresh rollouts of a step say, counted so that several processes' counts can be added."""

    rollouts: int = 0
    tokens: int = 0
    teacher_tokens: int = 0
    jsd_bits: float = 0.0
    """Sum over the tokens where both models were asked."""
    jsd_tokens: int = 0

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> Tally:
        """The count of some rollouts."""
        writers = [w for r in rollouts for w in r.writers]
        divergences = [j for r in rollouts for j in r.jsd_bits or [] if j is not None]
        by_teacher = sum(w == TEACHER for w in writers)
        return cls(len(rollouts), len(writers), by_teacher, sum(divergences), len(divergences))

    def add(self, other: Tally) -> None:
        """Count another process's rollouts too."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True)
class StepReport:
    """What one optimizer step did; becomes a line of metrics.jsonl."""

    loss: float | None = None
    """All that was minimised, the weighted language-model loss included."""
    lm_loss: float | None = None
    """The language-model loss on data.lm_corpus, before its weight; nats per token."""
    grad_norm: float | None = None
    overflows: int = 0
    """Attempts at this step whose gradients left the range of fp16, before the one that counts."""
    batch: BatchKind = "rollout"
    loss_tokens: int = 0
    replayed: int = 0
    """Sequences that had trained before."""
    staleness_nats: float | None = None
    """Mean KL(student that wrote || student that trains) over a sample of them."""
    teacher_share: float | None = None
    threshold_factor: float | None = None
    """How many times as fast as written the threshold fell; None where it stays as written."""
    jsd_bits: float | None = None
    written_tokens: int = 0
    """Response tokens that were written for this step, by it or by an earlier one (rollout.steps_at_once)."""
    rollout: RolloutStats = field(default_factory=RolloutStats)
    rollouts: list[Rollout] = field(default_factory=list)
    """Those that this process wrote."""
    tally: Tally = field(default_factory=Tally)
    """Of all processes' rollouts."""
    seconds: dict[str, float] = field(default_factory=dict)

    def read_rollouts(self, *, two_writers: bool) -> None:
        """Fill in what the rollouts say: the teacher's share, where both models may write, and the mean divergence."""
        tally = self.tally
        if tally.tokens and two_writers:
            self.teacher_share = tally.teacher_tokens / tally.tokens
        self.jsd_bits = tally.jsd_bits / tally.jsd_tokens if tally.jsd_tokens else None

    def metrics(self) -> dict[str, Any]:
        """The step's figures for metrics.jsonl; times in seconds."""
        stats = self.rollout
        learning = self.seconds.get("loss", 0.0) + self.seconds.get("optimizer", 0.0)
        return {
            "loss": self.loss,
            "lm_loss": self.lm_loss,
            "grad_norm": self.grad_norm,
            "overflows": self.overflows,
            "batch": self.batch,
            "loss_tokens": self.loss_tokens,
            "fresh": self.tally.rollouts,
            "replayed": self.replayed,
            "staleness_nats": self.staleness_nats,
            "teacher_share": self.teacher_share,
            "threshold_factor": self.threshold_factor,
            "jsd_bits": self.jsd_bits,
            "rollout_tokens": stats.tokens,
            "teacher_passes": stats.teacher_passes,
            "student_passes": stats.student_passes,
            "student_replays": stats.student_replays,
            "teacher_replays": stats.teacher_replays,
            "teacher_row_passes_per_token": stats.by_row_passes["teacher"] / stats.tokens if stats.tokens else None,
            "kept_draft_share": stats.kept_draft_share,
            "kept_drafts_by_step": _shares(stats),
            "rounds_by_drafts": stats.rounds_by_drafts,
            "rollout_tokens_per_s": stats.tokens / stats.seconds if stats.seconds else None,
            "train_tokens_per_s": self.loss_tokens / learning if learning and self.loss_tokens else None,
            "seconds": {k: round(v, 4) for k, v in self.seconds.items()},
        }


class Clock:
    """Seconds between laps, by name."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the seconds since the last lap to `name`."""
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now


def _shares(stats: RolloutStats) -> list[float]:
    """Share of drafts that stood in each eighth of the response steps reached: it falls as the threshold does."""
    if len(stats.offered_by_step) == 0:
        return []
    offered = np.array_split(stats.offered_by_step, 8)
    kept = np.array_split(stats.kept_by_step, 8)
    return [round(float(k.sum() / o.sum()), 4) for k, o in zip(kept, offered, strict=True) if o.sum()]
