"""Did the student get better, by held-out prompts: KL(teacher || student), or the loss on the data's responses.

The responses are written by the teacher once, before the first step, with their own seed, and never trained on. The
figure is the mean over response tokens of KL(p || q) at temperature 1, in nats. Where no teacher is loaded (SFT), it is
the mean cross-entropy of the data's own responses. Several processes write and score a share of the prompts each, and
all know the whole figure.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qswitch.data.template import Prompt
from qswitch.distill.logit_cache import Key, Targets
from qswitch.distill.loss import chunked_divergence_values
from qswitch.distill.objective import StudentObjective, collate, collate_with_labels
from qswitch.distill.processes import Processes
from qswitch.distill.recovery import Recovery
from qswitch.distill.sequence import TrainingSequence, ground_truth_sequence
from qswitch.errors import DataError
from qswitch.models.language_model import LanguageModel
from qswitch.rollout.decode import RolloutRequest, inference, rollout
from qswitch.rollout.policy import TeacherPolicy

VALIDATION_SEED = 20_250_429
"""Fixed, so that runs with different seeds are scored on the same responses."""

Scores = tuple[float, dict[int, float]]
"""Sum of the figure over a process's response tokens, and its mean by prompt; nats."""


class HeldOut:
    """Held-out prompts with the responses that the student is scored on, and its last scores.

    A checkpoint holds which prompts they are, because its figures are of them.
    """

    key: str
    """Name of the figure in metrics.jsonl."""
    what: str
    """The figure, for people."""
    reads_responses: bool = False
    """Whether the responses are the data's."""

    def __init__(self, sequences: Sequence[TrainingSequence], *, pad_id: int, processes: Processes) -> None:
        self.sequences = list(sequences)
        self.num_prompts = len(self.sequences)
        self.num_tokens = sum(len(s.loss_steps) for s in self.sequences)
        self.nats_by_prompt: list[float] = []
        """What `nats` measured last, by prompt: nats per token of it, in the order of the sequences."""
        self._pad_id, self._processes = pad_id, processes
        self._own = [i for i, s in enumerate(self.sequences) if s.owner == processes.rank]

    def state_dict(self) -> dict[str, Any]:
        """Which prompts these are; the responses only where they are the data's, for a teacher may round otherwise."""
        responses = [s.response_ids for s in self.sequences] if self.reads_responses else None
        content = repr(([(s.example_id, s.prompt_ids) for s in self.sequences], responses))
        return {"prompts": self.num_prompts, "fingerprint": zlib.crc32(content.encode())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See that a checkpoint's figures are of these prompts.

        Raises:
            DataError: they are of others.
        """
        if state != self.state_dict():
            raise DataError(
                f"The held-out prompts changed since the checkpoint (there were {state['prompts']}, now there are "
                f"{self.num_prompts}), so figures before and after could not be compared. Resume with the same "
                "data.validation and data.num_validation, or start a new run."
            )

    def nats(
        self,
        objective: StudentObjective,
        device: torch.device,
        sizes: Callable[[], tuple[int, int]],
        attempt: Callable[[Callable[[], Scores]], Scores],
    ) -> float:
        """Mean of the figure per response token, nats; the student is scored in evaluation mode.

        `attempt` runs the scoring, as often as it takes; `sizes` says how many tokens of the loss and how many rows go
        together.
        """
        shares = self._processes.everyone(lambda: attempt(lambda: self._score_own(objective, device, *sizes())))
        by_prompt = {i: nats for _, own in shares for i, nats in own.items()}
        self.nats_by_prompt = [by_prompt[i] for i in range(self.num_prompts)]
        return sum(total for total, _ in shares) / self.num_tokens

    def _score_own(self, objective: StudentObjective, device: torch.device, chunk_tokens: int, rows: int) -> Scores:
        total = 0.0
        by_prompt = {}
        with inference(objective.student):
            for members in _by_length(self.sequences, self._own, rows):
                values = self._token_nats(members, objective, device, chunk_tokens).double()
                total += float(values.sum())
                lengths = [len(self.sequences[i].loss_steps) for i in members]
                for i, own in zip(members, values.split(lengths), strict=True):
                    by_prompt[i] = float(own.mean())
        return total, by_prompt

    def _token_nats(
        self, members: Sequence[int], objective: StudentObjective, device: torch.device, chunk_tokens: int
    ) -> Tensor:
        """[N] nats of every response token of some sequences, one sequence after the other."""
        raise NotImplementedError


class Validation(HeldOut):
    """Teacher-written responses; `targets_of` has the teacher's outputs of those that are this process's own."""

    key = "kl_nats"
    what = "KL(teacher || student) on held-out prompts"

    def __init__(
        self,
        sequences: Sequence[TrainingSequence],
        targets_of: Callable[[Sequence[TrainingSequence]], Targets],
        *,
        pad_id: int,
        processes: Processes,
    ) -> None:
        super().__init__(sequences, pad_id=pad_id, processes=processes)
        self._targets_of = targets_of

    def _token_nats(
        self, members: Sequence[int], objective: StudentObjective, device: torch.device, chunk_tokens: int
    ) -> Tensor:
        sequences = [self.sequences[i] for i in members]
        return chunked_divergence_values(
            objective.hidden_at(collate(sequences, self._pad_id, device)),
            objective.student.head,
            self._targets_of(sequences),
            name="forward_kl",
            chunk_tokens=chunk_tokens,
        )


def written_by_teacher(
    prompts: Sequence[Prompt],
    teacher: LanguageModel,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    recovery: Recovery,
    processes: Processes | None = None,
) -> Validation:
    """A validation whose responses the teacher writes now, as many rows at a time as a rollout; its outputs stay in
    host memory.

    Raises:
        NonFiniteError: the teacher computes NaN.
        MemoryFloorError: nothing is left to shrink.
    """
    processes = processes or Processes()
    answers = partial(teacher_answers, teacher=teacher, max_new_tokens=max_new_tokens, eos_ids=eos_ids, pad_id=pad_id)
    owners = processes.divide([len(p.prompt_ids) for p in prompts])
    own = [i for i, owner in enumerate(owners) if owner == processes.rank]
    hidden: dict[Key, Tensor] = {}

    def write_own() -> dict[int, TrainingSequence]:
        found = {}
        asked = [prompts[i] for i in own]
        written = recovery.attempt("rollout", lambda: answers(asked, batch_size=recovery.sizes.rollout_rows))
        for i, (sequence, states) in zip(own, written, strict=True):
            found[i] = replace(sequence, owner=processes.rank)
            hidden[sequence.key] = states
        return found

    sequences = {i: sequence for share in processes.everyone(write_own) for i, sequence in share.items()}
    return Validation(
        [sequences[i] for i in range(len(prompts))],
        lambda some: Targets.from_hidden(torch.cat([hidden[s.key] for s in some]), teacher.head),
        pad_id=pad_id,
        processes=processes,
    )


def teacher_answers(
    prompts: Sequence[Prompt],
    teacher: LanguageModel,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    batch_size: int,
) -> list[tuple[TrainingSequence, Tensor]]:
    """The teacher's response to every held-out prompt, and, in host memory, its final hidden states [T, D] before each
    token of it."""
    rollouts, _ = rollout(
        [RolloutRequest(p.example_id, 0, p.prompt_ids, max_new_tokens) for p in prompts],
        teacher=teacher,
        student=None,
        policy=TeacherPolicy(),
        seed=VALIDATION_SEED,
        temperature=1.0,
        eos_ids=eos_ids,
        pad_id=pad_id,
        batch_size=batch_size,
        keep="all",
        keep_on_host=True,
    )
    answers = []
    for r in rollouts:
        assert r.teacher_hidden is not None
        steps = list(range(len(r.response_ids)))
        answers.append((TrainingSequence(r.example_id, 0, r.prompt_ids, r.response_ids, steps), r.teacher_hidden))
    return answers


class ResponseLoss(HeldOut):
    """The data's own responses; needs no teacher.

    Raises:
        DataError: none of the prompts has a response.
    """

    key = "response_loss_nats"
    what = "loss on held-out responses"
    reads_responses = True

    def __init__(self, prompts: Sequence[Prompt], *, pad_id: int, processes: Processes) -> None:
        owners = processes.divide([len(p.prompt_ids) + len(p.response_ids or ()) for p in prompts])
        found = (ground_truth_sequence(p, 0, owner) for p, owner in zip(prompts, owners, strict=True))
        super().__init__([s for s in found if s is not None], pad_id=pad_id, processes=processes)
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


def _by_length(sequences: Sequence[TrainingSequence], members: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices `members` of the sequences, `size` at a time, similar lengths together: less padding."""
    order = sorted(members, key=lambda i: (sequences[i].num_tokens, i))
    for start in range(0, len(order), size):
        yield order[start : start + size]
