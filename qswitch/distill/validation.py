"""Did the student get better, by held-out prompts: KL(teacher || student), or the loss on the data's responses.

The responses are written by the teacher once, before the first step, with their own seed, and never trained on. The
figure is the mean over response tokens of KL(p || q) at temperature 1, in nats. Where no teacher is loaded (SFT), it is
the mean cross-entropy of the data's own responses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

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


class HeldOut:
    """Held-out prompts with the responses that the student is scored on, and its last scores."""

    key: str
    """Name of the figure in metrics.jsonl."""
    what: str
    """The figure, for people."""

    def __init__(self, sequences: Sequence[TrainingSequence], *, pad_id: int, batch_size: int) -> None:
        self.sequences = list(sequences)
        self.num_prompts = len(self.sequences)
        self.num_tokens = sum(len(s.loss_steps) for s in self.sequences)
        self.nats_by_prompt: list[float] = []
        """What `nats` measured last, by prompt: nats per token of it, in the order of the sequences."""
        self._pad_id, self._batch_size = pad_id, batch_size

    def nats(
        self, objective: StudentObjective, device: torch.device, chunk_tokens: int, batch_size: int | None = None
    ) -> float:
        """Mean of the figure per response token, nats; the student is scored in evaluation mode."""
        total = 0.0
        by_prompt = [0.0] * self.num_prompts
        with inference(objective.student):
            for members in _by_length(self.sequences, batch_size or self._batch_size):
                values = self._token_nats(members, objective, device, chunk_tokens).double()
                total += float(values.sum())
                lengths = [len(self.sequences[i].loss_steps) for i in members]
                for i, own in zip(members, values.split(lengths), strict=True):
                    by_prompt[i] = float(own.mean())
        self.nats_by_prompt = by_prompt
        return total / self.num_tokens

    def _token_nats(
        self, members: Sequence[int], objective: StudentObjective, device: torch.device, chunk_tokens: int
    ) -> Tensor:
        """[N] nats of every response token of some sequences, one sequence after the other."""
        raise NotImplementedError


class Validation(HeldOut):
    """Teacher-written responses and the teacher's outputs, kept in host memory."""

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
        self.rollouts, self.stats = rollout(
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
        sequences = [
            TrainingSequence(r.example_id, 0, r.prompt_ids, r.response_ids, list(range(len(r.response_ids))))
            for r in self.rollouts
        ]
        super().__init__(sequences, pad_id=pad_id, batch_size=batch_size)
        self._teacher_head = teacher.head
        self._hidden = [r.teacher_hidden.cpu() for r in self.rollouts if r.teacher_hidden is not None]

    def _token_nats(
        self, members: Sequence[int], objective: StudentObjective, device: torch.device, chunk_tokens: int
    ) -> Tensor:
        batch = collate([self.sequences[i] for i in members], self._pad_id, device)
        return chunked_divergence_values(
            objective.hidden_at(batch),
            objective.student.head,
            Targets.from_hidden(torch.cat([self._hidden[i] for i in members]), self._teacher_head),
            name="forward_kl",
            chunk_tokens=chunk_tokens,
        )


class ResponseLoss(HeldOut):
    """The data's own responses; needs no teacher.

    Raises:
        DataError: none of the prompts has a response.
    """

    key = "response_loss_nats"
    what = "loss on held-out responses"

    def __init__(self, prompts: Sequence[Prompt], *, pad_id: int, batch_size: int) -> None:
        found = (ground_truth_sequence(p, 0) for p in prompts)
        super().__init__([s for s in found if s is not None], pad_id=pad_id, batch_size=batch_size)
        if not self.sequences:
            raise DataError(
                f"None of the {len(prompts)} held-out prompts has a response to be scored on. Name another "
                "data.validation, or raise data.num_validation."
            )

    def _token_nats(
        self, members: Sequence[int], objective: StudentObjective, device: torch.device, chunk_tokens: int
    ) -> Tensor:
        batch = collate_with_labels([self.sequences[i] for i in members], self._pad_id, device)
        hidden = objective.hidden_at(batch)
        labels = batch.input_ids[batch.rows, batch.columns + 1]
        found = []
        for chunk, expected in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True):
            logits = objective.student.head(chunk)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            found.append(torch.nn.functional.cross_entropy(logits, expected, reduction="none"))
        return torch.cat(found)


def _by_length(sequences: Sequence[TrainingSequence], size: int) -> Iterator[list[int]]:
    """Indices of the sequences, `size` at a time, similar lengths together: less padding."""
    order = sorted(range(len(sequences)), key=lambda i: (sequences[i].num_tokens, i))
    for start in range(0, len(order), size):
        yield order[start : start + size]
