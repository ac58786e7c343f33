"""What goes into a rollout and what comes out: requests, the sampling contract, written responses, what they cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import Tensor

Keep = Literal["interventions", "all", "nothing"]
"""Of which steps the teacher's outputs are kept."""


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One response to write."""

    example_id: int
    visit: int
    prompt_ids: list[int]
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Sampling:
    """Everything besides weights and prompts on which the tokens depend, and what ends a response."""

    seed: int
    temperature: float
    eos_ids: tuple[int, ...]
    pad_id: int
    no_repeat_ngram_size: int = 0
    """Above 0: no n-gram of prompt and response is written twice. For one writer without drafts."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One written response and what is known of each of its T tokens."""

    example_id: int
    visit: int
    prompt_ids: list[int]
    response_ids: list[int]
    writers: list[int]
    """STUDENT, TEACHER or MIXTURE per token."""
    jsd_bits: list[float | None] | None
    """Divergence of teacher and student per token, bits; None where not both were asked."""
    thresholds: list[float | None] | None
    """tau_t per token, bits; None for policies without a threshold."""
    kept_steps: list[int]
    """Steps whose teacher output was kept."""
    teacher_hidden: Tensor | None
    """[len(kept_steps), D] final hidden states of the teacher; None when nothing is kept."""
    ended: bool
    """Whether an end-of-sequence token was written before the limit."""
    student_hidden: Tensor | None = None
    """[T, D'] final hidden states of the student when it wrote; None unless asked for. Steps at which it was not asked
    hold nothing of meaning."""
    student_ids: list[int | None] | None = None
    """Per token, what the student would have written; None at steps where it was not asked, or for all of them."""
    teacher_ids: list[int | None] | None = None
    """Per token, what the teacher would have written; None where it was not asked, or does not write alone."""

    @property
    def student_agrees(self) -> list[bool] | None:
        """Per token, whether the student would have written the same; None where it was not asked at all."""
        if self.student_ids is None:
            return None
        return [ours == written for ours, written in zip(self.student_ids, self.response_ids, strict=True)]


@dataclass(slots=True)
class RolloutStats:
    """What a batch of rollouts cost."""

    tokens: int = 0
    teacher_passes: int = 0
    student_passes: int = 0
    student_replays: int = 0
    """Of those, how many were replayed as CUDA graphs."""
    teacher_replays: int = 0
    prefill_passes: int = 0
    """Passes of either model over prompts, not counted above."""
    rounds: int = 0
    seconds: float = 0.0
    by_row_passes: dict[str, int] = field(default_factory=lambda: {"teacher": 0, "student": 0})
    """Row passes: every pass counted once per row it read, prefill apart."""
    rounds_by_drafts: dict[int, int] = field(default_factory=dict)
    """Number of drafts -> rounds that had so many; -1: the student was not asked."""
    offered_by_step: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """[T] tokens written at each response step while the student was asked."""
    kept_by_step: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """[T] of those, how many the student would have written too: the drafts that stand."""
    max_hole_share: float = 0.0
    """Largest share of holes among the live slots of a key-value cache that a pass met; left padding apart."""

    @property
    def kept_draft_share(self) -> float | None:
        """Share of tokens at which the student's own token stood; None where it was never asked."""
        offered = int(self.offered_by_step.sum())
        return int(self.kept_by_step.sum()) / offered if offered else None

    def add(self, other: RolloutStats) -> None:
        """Count what another process's rollouts cost, which were written at the same time."""
        for name in ("tokens", "teacher_passes", "student_passes", "student_replays", "prefill_passes", "rounds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.seconds = max(self.seconds, other.seconds)
        self.max_hole_share = max(self.max_hole_share, other.max_hole_share)
        for model, passes in other.by_row_passes.items():
            self.by_row_passes[model] += passes
        for drafts, rounds in other.rounds_by_drafts.items():
            self.rounds_by_drafts[drafts] = self.rounds_by_drafts.get(drafts, 0) + rounds
        steps = max(len(self.offered_by_step), len(other.offered_by_step))
        for name in ("offered_by_step", "kept_by_step"):
            ours, theirs = (np.pad(a, (0, steps - len(a))) for a in (getattr(self, name), getattr(other, name)))
            setattr(self, name, ours + theirs)

    def count_drafts(self, steps: np.ndarray, kept: np.ndarray) -> None:
        """Count written tokens by response step, and whether the student agreed."""
        size = int(steps.max(initial=-1)) + 1
        if size > len(self.offered_by_step):
            grow = (0, size - len(self.offered_by_step))
            self.offered_by_step = np.pad(self.offered_by_step, grow)
            self.kept_by_step = np.pad(self.kept_by_step, grow)
        np.add.at(self.offered_by_step, steps, 1)
        np.add.at(self.kept_by_step, steps, kept.astype(np.int64))
