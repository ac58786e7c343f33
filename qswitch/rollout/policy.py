"""Who writes the next token: the student, the teacher, or a mixture of both.

A policy sees a block of steps at once: the teacher's distribution p and the student's q at each, the step numbers,
coins (`random`), the student's own tokens (`skd`) and what came before (`adaswitch`). It never sees the token noise, so
each writer's draw stays an exact sample of its own distribution. What it says of one step never depends on later ones,
so a block may be cut anywhere. Knows no tokenizer and no model.

Letters: `R` rows, `J` steps of a block, `V` shared vocabulary, `W` steps of history.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from qswitch.config import RolloutSection
from qswitch.divergence import jsd_bits_from_log_probs
from qswitch.rollout.noise import REDRAW_STREAM, TOKEN_STREAM
from qswitch.rollout.threshold import TAU_FLOOR_BITS, Threshold, make_threshold

STUDENT, TEACHER, MIXTURE = 0, 1, 2
WRITER_NAMES = ("student", "teacher", "mixture")


@dataclass(frozen=True, slots=True)
class Block:
    """What a policy may look at."""

    steps: Tensor
    """int64 [R, J]."""
    teacher: Tensor | None
    """log p [R, J, V]."""
    student: Tensor | None
    """log q [R, J, V]."""
    drafts: Tensor | None
    """int64 [R, J]: what the student would write."""
    coins: Tensor | None
    """float64 [R, J] in (0, 1), for a policy that tosses coins."""
    past_jsd: Tensor | None
    """float64 [R, W] divergences of the W steps before the block, NaN where there were none."""
    handed_over: Tensor | None
    """bool [R]: the teacher wrote the step before the block."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Who writes each step of a block."""

    writers: Tensor
    """int8 [R, J]: STUDENT, TEACHER or MIXTURE."""
    jsd_bits: Tensor | None = None
    """[R, J] in [0, 1]; None where only one model was asked."""
    threshold: Tensor | None = None
    """float64 [R, J] bits; None for policies without one."""


@dataclass(frozen=True)
class Policy(ABC):
    """Base of all policies. Subclasses say who writes; the engine draws the tokens."""

    uses_teacher = True
    """Whether the teacher must be asked at every step."""
    uses_student = True
    """Whether the student must be asked at every step before the tail."""
    uses_coins = False
    """Whether the policy tosses a coin at every step."""
    mixes = False
    """Whether every token is drawn from `mixture`."""
    teacher_stream = TOKEN_STREAM
    """Noise of the teacher's tokens."""
    history = 0
    """W: how many earlier divergences the policy looks at."""
    hands_over_for_good = False
    """Whether the teacher, once it writes, writes to the end."""

    @property
    def tail_start(self) -> float:
        """First step from which on the student's distribution decides nothing any more; infinite if there is none."""
        return math.inf

    @abstractmethod
    def decide(self, block: Block) -> Decision:
        """The writers of every step of the block."""

    def mixture(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """Log-probabilities [..., V] of the writer MIXTURE."""
        raise NotImplementedError


def _jsd(block: Block) -> Tensor:
    assert block.teacher is not None and block.student is not None, "the engine must ask both models"
    return jsd_bits_from_log_probs(block.teacher, block.student)


def _written_by(writer: int, steps: Tensor) -> Tensor:
    return torch.full_like(steps, writer, dtype=torch.int8)


@dataclass(frozen=True)
class SwitchPolicy(Policy):
    """SWITCH: the student writes while the divergence is at most tau_t, the teacher intervenes above it."""

    threshold: Threshold

    @property
    def tail_start(self) -> float:
        return self.threshold.tail_start

    def decide(self, block: Block) -> Decision:
        tau = self.threshold(block.steps)
        in_tail = (tau < TAU_FLOOR_BITS) | (block.steps >= self.tail_start)
        if block.student is None:
            return Decision(_written_by(TEACHER, block.steps), None, tau)
        jsd = _jsd(block)
        return Decision(((jsd.double() > tau) | in_tail).to(torch.int8), jsd, tau)


@dataclass(frozen=True)
class StudentPolicy(Policy):
    """The student writes everything (on-policy: GKD, ImitKD); the teacher is not asked."""

    uses_teacher = False

    def decide(self, block: Block) -> Decision:
        return Decision(_written_by(STUDENT, block.steps))


@dataclass(frozen=True)
class TeacherPolicy(Policy):
    """The teacher writes everything (SeqKD, and the held-out responses of the validation); the student may draft."""

    uses_student = False
    tail_start = 0  # type: ignore[assignment]

    def decide(self, block: Block) -> Decision:
        return Decision(_written_by(TEACHER, block.steps))


@dataclass(frozen=True)
class RandomPolicy(Policy):
    """A coin decides each step: the control without a criterion (Table 3, "random teacher"; its share is ours)."""

    teacher_probability: float
    uses_coins = True

    def decide(self, block: Block) -> Decision:
        assert block.coins is not None
        return Decision((block.coins < self.teacher_probability).to(torch.int8), _jsd(block))


@dataclass(frozen=True)
class MixturePolicy(Policy):
    """Every token is drawn from w p + (1 - w) q (MiniLLM's teacher-mixed sampling)."""

    teacher_weight: float
    mixes = True

    def decide(self, block: Block) -> Decision:
        return Decision(_written_by(MIXTURE, block.steps), _jsd(block))

    def mixture(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        w = self.teacher_weight
        log_w = math.log(w) if w > 0 else -math.inf
        log_rest = math.log1p(-w) if w < 1 else -math.inf
        return torch.logaddexp(teacher_log_probs + log_w, student_log_probs + log_rest)


@dataclass(frozen=True)
class SkdPolicy(Policy):
    """SKD (Xu et al., ICLR 2025): a student token outside the teacher's top-k is redrawn from the teacher.

    The decision looks at the student's token, hence at its noise; the redraw uses a second, independent noise, or it
    would be biased towards tokens that noise favours.
    """

    top_k: int
    teacher_stream = REDRAW_STREAM

    def decide(self, block: Block) -> Decision:
        assert block.teacher is not None and block.drafts is not None
        best = block.teacher.topk(min(self.top_k, block.teacher.shape[-1]), dim=-1).indices
        outside = (best != block.drafts[..., None]).all(dim=-1)
        return Decision(outside.to(torch.int8), _jsd(block))


@dataclass(frozen=True)
class AdaSwitchPolicy(Policy):
    """AdaSwitch (Peng et al. 2025): hands over to the teacher for good at the first unusual divergence.

    Unusual is a divergence above `factor` times the mean of the rollout's own last `window` ones; a full window must
    lie behind. Factor and window are ours: the paper does not publish them here.
    """

    factor: float
    window: int
    hands_over_for_good = True

    @property
    def history(self) -> int:  # type: ignore[override]
        return self.window

    def decide(self, block: Block) -> Decision:
        assert block.past_jsd is not None and block.handed_over is not None
        if block.student is None:
            return Decision(_written_by(TEACHER, block.steps))
        jsd = _jsd(block)
        series = torch.cat([block.past_jsd, jsd.double()], dim=1)  # (R, W + J)
        # Mean of the W values before each step of the block; NaN, hence no comparison, until W steps lie behind.
        means = series.unfold(1, self.window, 1).mean(dim=-1)[:, : jsd.shape[1]]
        unusual = jsd.double() > self.factor * means
        handed_over = (unusual | block.handed_over[:, None]).long().cumsum(dim=1) > 0
        return Decision(handed_over.to(torch.int8), jsd, self.factor * means)


def make_policy(rollout: RolloutSection, threshold: Threshold | None = None) -> Policy:
    """The policy that a configuration names.

    Args:
        threshold: of `switch`; None: as the configuration has it.

    Raises:
        ConfigError: as `make_threshold`, where none is given.
    """
    if rollout.policy == "switch":
        return SwitchPolicy(threshold or make_threshold(rollout))
    if rollout.policy == "random":
        return RandomPolicy(rollout.teacher_probability)
    if rollout.policy == "mixture":
        return MixturePolicy(rollout.mixture_teacher_weight)
    if rollout.policy == "skd":
        return SkdPolicy(rollout.skd_top_k)
    if rollout.policy == "adaswitch":
        return AdaSwitchPolicy(rollout.adaswitch_factor, rollout.adaswitch_window)
    return StudentPolicy() if rollout.policy == "student" else TeacherPolicy()
