"""The student's loss as one module: backbone, head and divergence, so that wrappers see a single forward.

Knows neither where responses come from nor how they are optimised.

Letters: `B` rows, `L` padded length, `N` loss positions, `D` student width, `V` shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qswitch.config import LossSection
from qswitch.distill.logit_cache import Targets
from qswitch.distill.loss import chunked_divergence, language_model_loss
from qswitch.distill.sequence import TrainingSequence
from qswitch.models.host_memory import trim_heap
from qswitch.models.language_model import LanguageModel
from qswitch.rollout.policy import STUDENT, TEACHER


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Right-padded sequences and the positions that predict their loss steps."""

    input_ids: Tensor
    """int64 [B, L]."""
    attention_mask: Tensor
    """int64 [B, L]."""
    rows: Tensor
    """int64 [N]."""
    columns: Tensor
    """int64 [N]."""
    writers: Tensor
    """int64 [N], in host memory: who wrote the token of each loss position, as rollout.policy numbers writers; -1 for
    the data."""


def collate(sequences: Sequence[TrainingSequence], pad_id: int, device: torch.device) -> MicroBatch:
    """Put sequences side by side; loss positions run sequence by sequence, in the order of `loss_steps`."""
    width = max(s.num_tokens for s in sequences)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(sequences), width), dtype=torch.int64)
    rows: list[int] = []
    columns: list[int] = []
    writers: list[int] = []
    for i, sequence in enumerate(sequences):
        tokens = sequence.prompt_ids + sequence.response_ids[:-1]
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
        rows += [i] * len(sequence.loss_steps)
        columns += [len(sequence.prompt_ids) - 1 + step for step in sequence.loss_steps]
        writers += sequence.loss_writers or [-1] * len(sequence.loss_steps)
    return MicroBatch(
        ids.to(device),
        mask.to(device),
        torch.tensor(rows, device=device),
        torch.tensor(columns, device=device),
        torch.tensor(writers),
    )


def collate_with_labels(sequences: Sequence[TrainingSequence], pad_id: int, device: torch.device) -> MicroBatch:
    """As `collate`, but the input also holds the last token, so that every loss position has its label in it."""
    extended = [
        TrainingSequence(s.example_id, s.visit, s.prompt_ids, [*s.response_ids, pad_id], s.loss_steps)
        for s in sequences
    ]
    return collate(extended, pad_id, device)


class StudentObjective(nn.Module):
    """Student backbone and loss."""

    def __init__(self, student: LanguageModel, loss: LossSection) -> None:
        super().__init__()
        self.student = student
        self.settings = loss

    def hidden_at(self, batch: MicroBatch) -> Tensor:
        """Student hidden states at the loss positions: [N, D]."""
        positions = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device).expand_as(batch.input_ids)
        hidden = self.student.hidden(batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions)
        return hidden[batch.rows, batch.columns]

    def forward(self, batch: MicroBatch, targets: Targets | None, normalizer: float) -> Tensor:
        """Sum of the per-token loss divided by `normalizer` (the tokens of the whole optimizer step): a scalar, nats.

        Without `targets` the loss is the cross-entropy of the next token (the language-model loss).
        """
        loss = self.settings
        hidden = self.hidden_at(batch)
        if hidden.device.type == "cpu":
            trim_heap()  # what the pass freed is resident still, and would add to the peak, which the first chunk is
        if targets is None:
            labels = batch.input_ids[batch.rows, batch.columns + 1]
            return language_model_loss(
                hidden, self.student.head, labels, normalizer=normalizer, chunk_tokens=loss.chunk_tokens
            )
        return chunked_divergence(
            hidden,
            self.student.head,
            targets,
            name=self._divergences(batch.writers),
            alpha=loss.alpha,
            beta=loss.beta,
            temperature=loss.temperature,
            normalizer=normalizer,
            chunk_tokens=loss.chunk_tokens,
        )

    def _divergences(self, writers: Tensor) -> str | list[tuple[str, Tensor]]:
        """The divergence of all positions, or each with a bool mask [N] of its own."""
        loss = self.settings
        by_writer = {TEACHER: loss.divergence_teacher_tokens, STUDENT: loss.divergence_student_tokens}
        masks: dict[str, Tensor] = {loss.divergence: torch.ones_like(writers, dtype=torch.bool)}
        for writer, name in by_writer.items():
            if name is not None and name != loss.divergence:
                own = writers == writer
                masks[loss.divergence] = masks[loss.divergence] & ~own
                masks[name] = masks[name] | own if name in masks else own
        return loss.divergence if len(masks) == 1 else list(masks.items())
