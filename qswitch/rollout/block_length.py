"""How many tokens the student drafts before the teacher looks: from the acceptance so far and a table of pass times.

The choice changes speed, never a token. It is a pure function of two things that a run keeps, so a resumed run chooses
the same: `Acceptance`, how often a draft stood at each place of a response, and `PassTimes`, seconds of a pass of each
model by rows and tokens, measured once. Knows no model.

Letters: `R` rows, `K` drafts of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

MAX_BLOCK_TOKENS = 16
"""Longest block the automatic choice considers."""
SCRATCH_BYTES = 256 * 2**20
"""Memory that the distributions of a block may take; the automatic choice stays within it."""
SCRATCH_BYTES_PER_LOGIT = 36
"""Noise, both log-probabilities, the logits and the divergence's temporaries, fp32, per row, step and token id."""
TEACHER_ONLY = -1
"""In place of a number of drafts: the student is not asked at all."""
BUCKET_STEPS = 8
"""Neighbouring steps of a response share their acceptance count."""
_PRIOR_WEIGHT = 4.0
"""Drafts that a bucket borrows from the rate over all buckets before its own count speaks."""
_FORGET = 0.8
"""Weight that counts keep from one batch of rollouts to the next: the student changes, and with it what is accepted."""


class Acceptance:
    """How often the student's token was the one written, by place in the response; older counts weigh less."""

    def __init__(self) -> None:
        self._offered = np.zeros(1)
        self._kept = np.zeros(1)

    def count(self, steps: np.ndarray, kept: np.ndarray) -> None:
        """Count written tokens: their response steps, and whether the student would have written the same."""
        buckets = steps // BUCKET_STEPS
        size = int(buckets.max(initial=0)) + 1
        if size > len(self._offered):
            self._offered = np.pad(self._offered, (0, size - len(self._offered)))
            self._kept = np.pad(self._kept, (0, size - len(self._kept)))
        np.add.at(self._offered, buckets, 1.0)
        np.add.at(self._kept, buckets, kept.astype(np.float64))

    def forget(self) -> None:
        """Let older counts weigh less."""
        self._offered *= _FORGET
        self._kept *= _FORGET

    def rates(self, steps: np.ndarray) -> np.ndarray:
        """Estimated probability that a draft at each of `steps` (any shape) is kept; 1/2 before any count."""
        overall = (self._kept.sum() + 0.5 * _PRIOR_WEIGHT) / (self._offered.sum() + _PRIOR_WEIGHT)
        rates = (self._kept + overall * _PRIOR_WEIGHT) / (self._offered + _PRIOR_WEIGHT)
        buckets = np.minimum(steps // BUCKET_STEPS, len(rates) - 1)
        return rates[buckets]

    def state_dict(self) -> dict[str, list[float]]:
        """Plain numbers; `load_state_dict` restores them exactly."""
        return {"offered": self._offered.tolist(), "kept": self._kept.tolist()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Continue from a `state_dict`."""
        self._offered = np.asarray(state["offered"], dtype=np.float64)
        self._kept = np.asarray(state["kept"], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class PassTimes:
    """Seconds of one pass with everything that belongs to it (head, noise, decision), by rows and tokens per row."""

    rows: tuple[int, ...]
    """Row counts measured, ascending."""
    tokens: tuple[int, ...]
    """Tokens per row measured for the teacher, ascending."""
    teacher: tuple[tuple[float, ...], ...]
    """[rows][tokens] seconds."""
    student: tuple[float, ...]
    """[rows] seconds of a pass of one token per row."""
    device: str
    """Where it was measured."""

    def teacher_seconds(self, rows: int, tokens: np.ndarray) -> np.ndarray:
        """Seconds of a teacher pass over `tokens` per row, interpolated; beyond the table, the last slope goes on."""
        by_rows = [_interpolate(tokens, self.tokens, times) for times in self.teacher]
        return _interpolate_rows(rows, self.rows, np.stack(by_rows))

    def student_seconds(self, rows: int) -> float:
        """Seconds of a student pass of one token per row."""
        return float(_interpolate_rows(rows, self.rows, np.asarray(self.student)[:, None])[0])

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` restores it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PassTimes:
        """From `to_dict`, also after a trip through JSON."""
        return cls(
            rows=tuple(values["rows"]),
            tokens=tuple(values["tokens"]),
            teacher=tuple(tuple(row) for row in values["teacher"]),
            student=tuple(values["student"]),
            device=values["device"],
        )


def _interpolate(at: np.ndarray, points: Sequence[int], values: Sequence[float]) -> np.ndarray:
    """Piecewise linear through (points, values); beyond the last point its last slope goes on, never downwards."""
    result = np.interp(at, points, values)
    if len(points) > 1:
        slope = max((values[-1] - values[-2]) / (points[-1] - points[-2]), 0.0)
        result = result + np.maximum(at - points[-1], 0) * slope
    return result


def _interpolate_rows(rows: int, points: Sequence[int], values: np.ndarray) -> np.ndarray:
    """`_interpolate` over the first axis of values [len(points), n] -> [n]."""
    at = np.asarray(rows, dtype=np.float64)
    return np.array([float(_interpolate(at, points, column)) for column in values.T])


@dataclass(frozen=True, slots=True)
class RowsAhead:
    """The rows about to be written: each where it stands, and what it still may write."""

    steps: np.ndarray
    """int64 [R]: the next response step."""
    remaining: np.ndarray
    """int64 [R]: tokens up to the limit."""
    can_draft: np.ndarray
    """bool [R]: the student has read the row; a row it has left drafts nothing that would stand."""
    student_needed: bool
    """Whether any row still needs the student's distribution for the decision."""


class BlockLength(Protocol):
    """Chooses the number of drafts of each round."""

    @property
    def most_drafts(self) -> int:
        """More are never chosen."""
        ...

    def choose(self, rows: RowsAhead) -> int:
        """Number of drafts, 0 for none; TEACHER_ONLY where the student need not be asked."""
        ...

    def count(self, steps: np.ndarray, kept: np.ndarray) -> None:
        """Told after each round which written tokens the student would have written too."""
        ...


@dataclass(frozen=True, slots=True)
class FixedBlock:
    """Always the same number of drafts; 0 is the sequential engine."""

    num_drafts: int

    @property
    def most_drafts(self) -> int:
        return self.num_drafts

    def choose(self, rows: RowsAhead) -> int:
        if self.num_drafts == 0 and not rows.student_needed:
            return TEACHER_ONLY
        return min(self.num_drafts, int(rows.remaining.max()) - 1)

    def count(self, steps: np.ndarray, kept: np.ndarray) -> None:
        pass


@dataclass(frozen=True, slots=True)
class AutoBlock:
    """The number of drafts with the most expected tokens per second."""

    times: PassTimes
    acceptance: Acceptance
    most_drafts: int = MAX_BLOCK_TOKENS

    def choose(self, rows: RowsAhead) -> int:
        return best_block(self.acceptance, self.times, rows, self.most_drafts)

    def count(self, steps: np.ndarray, kept: np.ndarray) -> None:
        self.acceptance.count(steps, kept)


def expected_tokens(acceptance: Acceptance, rows: RowsAhead, most_drafts: int) -> np.ndarray:
    """Tokens that a round with 0, 1, ... `most_drafts` drafts is expected to write, all rows together: [drafts + 1].

    A round writes one token more than it keeps drafts, and stops at the first that is not kept.
    """
    ahead = rows.steps[:, None] + np.arange(most_drafts)
    kept = acceptance.rates(ahead) * rows.can_draft[:, None]
    kept = np.where(np.arange(1, most_drafts + 1) < rows.remaining[:, None], kept, 0.0)
    return np.concatenate([[float(len(rows.steps))], len(rows.steps) + np.cumprod(kept, axis=1).sum(axis=0).cumsum()])


def drafts_within_scratch(num_rows: int, vocab_size: int) -> int:
    """Longest block whose distributions stay within SCRATCH_BYTES, at most MAX_BLOCK_TOKENS."""
    steps = SCRATCH_BYTES // (SCRATCH_BYTES_PER_LOGIT * num_rows * vocab_size)
    return max(min(steps - 1, MAX_BLOCK_TOKENS), 0)


def best_block(acceptance: Acceptance, times: PassTimes, rows: RowsAhead, most_drafts: int = MAX_BLOCK_TOKENS) -> int:
    """The block length with the most expected tokens per second; TEACHER_ONLY where that is cheaper and allowed."""
    most = max(min(most_drafts, int(rows.remaining.max()) - 1), 0)
    num_rows = len(rows.steps)
    drafts = np.arange(most + 1)
    seconds = times.teacher_seconds(num_rows, drafts + 1.0) + (drafts + 1) * times.student_seconds(num_rows)
    rate = expected_tokens(acceptance, rows, most) / seconds
    best = int(rate.argmax())
    if not rows.student_needed:
        teacher_only = num_rows / float(times.teacher_seconds(num_rows, np.array([1.0]))[0])
        if teacher_only >= rate[best]:
            return TEACHER_ONLY
    return best
