"""Did the student get better, by held-out prompts: KL(teacher || student), or the loss on the data's responses.

The responses are written by the teacher once, before the first step, with their own seed, and never trained on. The
figure is the mean over response tokens of KL(p || q) at temperature 1, in nats. Where no teacher is loaded (SFT), it is
the mean cross-entropy of the data's own responses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from qswitch.data.template import Prompt
from qswitch.distill.logit_cache import Targets
from qswitch.distill.loss import chunked_divergence_values
from qswitch.distill.objective import StudentObjective, collate, collate_with_labels
from qswitch.distill.sequence import TrainingSequence, ground_truth_sequence
from qswitch.errors import DataError
from qswitch.models.language_model import LanguageModel
from qswitch.rollout.decode import RolloutRequest, inference, rollout
from qswitch.rollout.policy import TeacherPolicy

VALIDATION_SEED = 20_250_429
"""Fixed, so that runs with different seeds are scored on the same responses."""


class Validation:
    """Held-out prompts with teacher-written responses and the teacher's outputs, kept in host memory."""

    key = "kl_nats"
    what = "KL(teacher || student) on held-out prompts"

    def __init__(
        self,
        prompts: Sequence[Prompt],
        teacher: LanguageModel,
        *,
        max_new_tokens: int,
        eos_ids: Sequence[int],
        pad_id: int,
        batch_size: int,
    ) -> None:
        requests = [RolloutRequest(p.example_id, 0, p.prompt_ids, max_new_tokens) for p in prompts]
        written, self.stats = rollout(
            requests,
            teacher=teacher,
            student=None,
            policy=TeacherPolicy(),
            seed=VALIDATION_SEED,
            temperature=1.0,
            eos_ids=eos_ids,
            pad_id=pad_id,
            batch_size=batch_size,
            keep="all",
        )
        self.rollouts = written
        self._teacher_head = teacher.head
        self._pad_id = pad_id
        self._batch_size = batch_size
        self._hidden = [r.teacher_hidden.cpu() for r in written if r.teacher_hidden is not None]
        self._sequences = [
            TrainingSequence(r.example_id, 0, r.prompt_ids, r.response_ids, list(range(len(r.response_ids))))
            for r in written
        ]
        self.num_prompts = len(written)
        self.num_tokens = sum(len(s.loss_steps) for s in self._sequences)

    def nats(
        self, objective: StudentObjective, device: torch.device, chunk_tokens: int, batch_size: int | None = None
    ) -> float:
        """Mean KL(teacher || student) per response token, nats; the student is scored in evaluation mode."""
        total = 0.0
        with inference(objective.student):
            for members in _by_length(self._sequences, batch_size or self._batch_size):
                batch = collate([self._sequences[i] for i in members], self._pad_id, device)
                targets = Targets.from_hidden(torch.cat([self._hidden[i] for i in members]), self._teacher_head)
                values = chunked_divergence_values(
                    objective.hidden_at(batch),
                    objective.student.head,
                    targets,
                    name="forward_kl",
                    chunk_tokens=chunk_tokens,
                )
                total += float(values.double().sum())
        return total / self.num_tokens


class ResponseLoss:
    """Held-out prompts with the data's own responses; needs no teacher.

    Raises:
        DataError: none of the prompts has a response.
    """

    key = "response_loss_nats"
    what = "loss on held-out responses"

    def __init__(self, prompts: Sequence[Prompt], *, pad_id: int, batch_size: int) -> None:
        self._pad_id = pad_id
        self._batch_size = batch_size
        found = (ground_truth_sequence(p, 0) for p in prompts)
        self._sequences = [s for s in found if s is not None]
        self.num_prompts = len(self._sequences)
        self.num_tokens = sum(len(s.loss_steps) for s in self._sequences)
        if not self._sequences:
            raise DataError(
                f"None of the {len(prompts)} held-out prompts has a response to be scored on. Name another "
                "data.validation, or raise data.num_validation."
            )

    def nats(
        self, objective: StudentObjective, device: torch.device, chunk_tokens: int, batch_size: int | None = None
    ) -> float:
        """Mean next-token cross-entropy per response token, nats; the student is scored in evaluation mode."""
        total = 0.0
        with inference(objective.student):
            for members in _by_length(self._sequences, batch_size or self._batch_size):
                batch = collate_with_labels([self._sequences[i] for i in members], self._pad_id, device)
                hidden = objective.hidden_at(batch)
                labels = batch.input_ids[batch.rows, batch.columns + 1]
                for chunk, expected in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True):
                    logits = objective.student.head(chunk)
                    logits = logits if logits.dtype == torch.float64 else logits.float()
                    total += float(torch.nn.functional.cross_entropy(logits, expected, reduction="sum").double())
        return total / self.num_tokens


def _by_length(sequences: Sequence[TrainingSequence], size: int) -> Iterator[list[int]]:
    """Indices of the sequences, `size` at a time, similar lengths together: less padding."""
    order = sorted(range(len(sequences)), key=lambda i: (sequences[i].num_tokens, i))
    for start in range(0, len(order), size):
        yield order[start : start + size]
