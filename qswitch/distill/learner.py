"""How one optimizer step learns from its sequences: micro-batches, gradients, update.

Knows neither where sequences come from nor what a run saves and shows.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator

from qswitch.config import RunConfig
from qswitch.data.loader import PassageLoader
from qswitch.distill.logit_cache import LogitCache, Targets
from qswitch.distill.loss_scale import LossScale
from qswitch.distill.objective import MicroBatch, StudentObjective, collate, collate_with_labels
from qswitch.distill.optimizer import Schedule, make_optimizer
from qswitch.distill.processes import Processes
from qswitch.distill.recovery import Recovery
from qswitch.distill.sequence import TrainingSequence
from qswitch.distill.stored_teacher import StoredTeacher
from qswitch.errors import NonFiniteError
from qswitch.models.host_memory import trim_heap
from qswitch.models.language_model import LanguageModel

logger = logging.getLogger(__name__)

NARROW = (torch.bfloat16, torch.float16)
"""Arithmetic in which the trained weights, which are fp32, are cast for each product."""


class Learnt(NamedTuple):
    """What a step learnt by."""

    loss: float
    """All that was minimised, nats: the token mean over the sequences, and the weighted language-model loss."""
    lm_loss: float | None
    """The language-model loss on data.lm_corpus in it, before its weight, nats per token; None without a corpus."""
    grad_norm: float
    """Of the gradient before it was clipped."""
    overflows: int
    """Attempts whose gradients left the range of fp16: no weight moved, and the step was repeated."""


class Learner:
    """Moves the student's weights. Owns the optimizer and its schedule, borrows the teacher's cached outputs.

    Args:
        corpus: passages of plain text for the language-model loss; None without one.
        spent: says which share of the run's budget is spent, which the learning rate follows.
        say: tells the user of a step that is repeated.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        student: LanguageModel,
        cache: LogitCache | StoredTeacher,
        pad_id: int,
        corpus: PassageLoader | None,
        accelerator: Accelerator,
        recovery: Recovery,
        spent: Callable[[], float],
        processes: Processes | None = None,
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        self.config, self._pad_id, self._say = config, pad_id, say
        self._processes = processes or Processes()
        self.corpus, self._cache, self._accelerator, self._recovery = corpus, cache, accelerator, recovery
        self._device = student.device
        self._imitates = config.loss.objective == "divergence"
        self.objective = StudentObjective(student, config.loss)
        self.trainable = [p for p in student.parameters() if p.requires_grad]
        optimizer = make_optimizer(config.train, self.trainable)
        # evaluation_mode leaves out the wrapper that adds up gradients in every backward pass; `Processes` says why.
        self._wrapped = accelerator.prepare_model(self.objective, evaluation_mode=True)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.loss_scale = LossScale(student.device, student.compute_dtype)
        self._compute_dtype = student.compute_dtype
        self.schedule = Schedule(config.train, optimizer, spent)

    def learn_step(self, sequences: Sequence[TrainingSequence], step: int) -> Learnt | None:
        """Loss and gradient of a step; None for one that has no loss token.

        `sequences` are those of all processes; this one learns from its own. The gradients are left for `update`, the
        same in each process. Where memory runs out the step is undone and repeated, smaller; where gradients overflow
        the range of fp16, with half the loss scale.

        Raises:
            NonFiniteError: the loss or the gradient is not finite; no weight has moved.
            MemoryFloorError: nothing is left to shrink.
        """
        if not sequences and self.corpus is None:
            return None
        cursor = self.corpus.state_dict() if self.corpus is not None else None

        def undo() -> None:
            self.optimizer.zero_grad()
            if self.corpus is not None and cursor is not None:
                self.corpus.load_state_dict(cursor)

        def learn_share() -> tuple[float, float | None]:
            return self._recovery.attempt("loss", lambda: self._gradients(sequences, step), undo=undo)

        overflows = 0
        while True:
            shares = self._processes.everyone(learn_share)
            self._processes.sum_gradients(self.trainable)
            scale = self.loss_scale.value
            self.loss_scale.unscale(self.optimizer)
            norm = float(self._accelerator.clip_grad_norm_(self.trainable, self.config.train.max_grad_norm))
            if math.isfinite(norm):
                break
            if not self.loss_scale.overflowed():
                raise NonFiniteError("student", "gradient norm is")
            overflows += 1
            undo()
            self._say(
                f"the gradients of step {step + 1} overflow fp16 at a loss scale of {scale:g}: no weight moved, the "
                f"step is repeated at {self.loss_scale.value:g}"
            )
        own, lm_loss = (sum(part or 0.0 for part in parts) for parts in zip(*shares, strict=True))
        loss = own + self.config.loss.lm_coefficient * lm_loss
        return Learnt(loss, None if self.corpus is None else lm_loss, norm, overflows)

    def update(self, loss: float | None) -> None:
        """Step the optimizer with the gradients of a step that had a loss."""
        if loss is not None:
            self.loss_scale.step(self.optimizer)
        self.optimizer.zero_grad()

    def accumulate(self, sequences: Sequence[TrainingSequence]) -> float:
        """Accumulate gradients over all micro-batches of this process; its part of the loss's token mean, nats.

        `sequences` are those of all processes: every micro-batch is divided by the tokens of the whole step, so the
        split into micro-batches, and over processes, does not change the sum of the gradients.
        """
        self._wrapped.train()
        size = self._recovery.sizes.micro_batch
        num_tokens = float(sum(len(s.loss_steps) for s in sequences))
        total = 0.0
        # Similar lengths share a micro-batch: less padding, and the token mean does not see the order.
        own = [s for s in sequences if s.owner == self._processes.rank]
        ordered = sorted(own, key=lambda s: (s.num_tokens, s.key))
        for start in range(0, len(ordered), size):
            group = ordered[start : start + size]
            if self._imitates:
                batch, targets = collate(group, self._pad_id, self._device), self._cache.get(group)
            else:
                batch, targets = collate_with_labels(group, self._pad_id, self._device), None
            total += self._backward(batch, targets, num_tokens)
        return total

    def _gradients(self, sequences: Sequence[TrainingSequence], step: int) -> tuple[float, float | None]:
        """This process's part of the loss over the sequences, and of the language-model loss; nats."""
        seed_step(self.config.seed, step, self._processes.rank)
        chunk_tokens = self._recovery.sizes.chunk_tokens
        self.objective.settings = self.config.loss.model_copy(update={"chunk_tokens": chunk_tokens})
        own = self.accumulate(sequences)
        return own, self.accumulate_corpus(self.corpus) if self.corpus is not None else None

    def accumulate_corpus(self, corpus: PassageLoader) -> float:
        """Add the weighted gradients of the language-model loss over as many passages as a step has sequences.

        Returns the loss before its weight: the token mean of the cross-entropy, nats.
        """
        self._wrapped.train()
        train, size = self.config.train, self._recovery.sizes.micro_batch
        passages = corpus.next(train.per_device_train_batch_size * train.gradient_accumulation_steps)
        sequences = [
            TrainingSequence(i, 0, passage[:1].tolist(), passage[1:].tolist(), list(range(len(passage) - 1)))
            for i, passage in enumerate(passages)
        ]
        num_tokens = float(sum(len(s.loss_steps) for s in sequences))
        weight, total = self.config.loss.lm_coefficient, 0.0
        sequences = sequences[self._processes.rank :: self._processes.count]
        for start in range(0, len(sequences), size):
            batch = collate_with_labels(sequences[start : start + size], self._pad_id, self._device)
            total += self._backward(batch, None, num_tokens, weight)
        return total / weight

    def _backward(self, batch: MicroBatch, targets: Targets | None, num_tokens: float, weight: float = 1.0) -> float:
        """Add the gradients of a micro-batch, scaled; its part of the loss, which is not."""
        scale, narrow = self.loss_scale.value, self._compute_dtype in NARROW
        with torch.autocast(self._device.type, dtype=self._compute_dtype if narrow else None, enabled=narrow):
            # Scaled by its normalizer, because the loss takes its gradient, in the compute dtype, in the forward pass.
            loss = weight * self._wrapped(batch, targets, num_tokens / scale)
        value = float(loss.detach()) / scale
        if not math.isfinite(value):
            chunk_tokens = self.objective.settings.chunk_tokens
            if targets is not None and not targets.are_finite(chunk_tokens, self._device):
                raise NonFiniteError("teacher", "outputs for the loss are")
            raise NonFiniteError("student", "loss is")
        self._accelerator.backward(loss)
        if self._device.type == "cpu":
            trim_heap()  # what a micro-batch leaves behind would add to the peak of the next
        self._recovery.check_host_memory()
        return value


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed the global random streams (dropout) from the run's seed, the step and the process, so that a repeated or
    resumed step draws the same numbers whatever ran before it."""
    mixed = (seed * 1_000_003 + step + rank * 998_244_353) % 2**63
    random.seed(mixed)
    torch.manual_seed(mixed)
