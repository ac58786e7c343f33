"""Rollouts that train more than once: which, when, and how far the student has moved since it wrote them.

A rollout with its cached teacher outputs can train the student again without either model writing a token. With
`rollout.reuse` R every rollout is used R times over the following steps, oldest first; with unlimited uses, as in
DistiLLM, the buffer is drawn from at random. Entries leave when they are used up, when they are older than the
freshness limit, or when the buffer is over its capacity. Knows no cache: the supply keeps the teacher's rows of what
is in here.

Letters: `D` student width, `V` shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qswitch.distill.objective import StudentObjective, collate
from qswitch.distill.sequence import TrainingSequence
from qswitch.rollout.decode import inference
from qswitch.rollout.noise import row_keys, step_keys, uniform

_DRAW_STREAM = 3
"""Coins of the random draw, independent of those of the rollouts."""
PROBES_PER_STEP = 4
"""Replayed sequences at which staleness is measured: about a tenth of the forward passes of a step of 32."""


@dataclass(slots=True)
class ReplayEntry:
    """A sequence that may train again."""

    sequence: TrainingSequence
    born_step: int
    """Optimizer step whose student wrote it."""
    uses_left: int | None
    """How often it may still be drawn; None: without limit."""
    probe_step: int | None = None
    """A loss step at which the writing student's state is remembered."""
    probe_hidden: Tensor | None = None
    """[D] final hidden state of the student that wrote, at `probe_step`."""


class ReplayBuffer:
    """Sequences by age.

    Args:
        capacity: entries held; the oldest leave first.
        max_age_steps: optimizer steps after which an entry is too stale to train on.
        seed: of the random draw.
    """

    def __init__(self, capacity: int, max_age_steps: int, seed: int) -> None:
        self._capacity, self._max_age_steps, self._seed = capacity, max_age_steps, seed
        self._entries: list[ReplayEntry] = []  # oldest first

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entries: Iterable[ReplayEntry]) -> None:
        """Take in entries that may still be used; the oldest make place."""
        self._entries += [e for e in entries if e.uses_left != 0]
        del self._entries[: max(len(self._entries) - self._capacity, 0)]

    def expire(self, step: int) -> None:
        """Drop what is used up, and what is too old to be drawn at `step`."""
        self._entries = [e for e in self._entries if e.uses_left != 0 and step - e.born_step <= self._max_age_steps]

    def draw(self, num: int, step: int) -> list[ReplayEntry]:
        """Up to `num` different entries, each use counted: the oldest first, or at random where uses are unlimited."""
        self.expire(step)
        order = list(range(len(self._entries)))
        if any(e.uses_left is None for e in self._entries):
            coins = self._coins(step)
            order.sort(key=coins.__getitem__)
        drawn = [self._entries[i] for i in order[:num]]
        for entry in drawn:
            if entry.uses_left is not None:
                entry.uses_left -= 1
        return drawn

    def _coins(self, step: int) -> list[float]:
        """One number per entry, a function of (seed, entry, step), so that a resumed run draws the same."""
        rows = row_keys(
            self._seed,
            torch.tensor([e.sequence.example_id for e in self._entries]),
            torch.tensor([e.sequence.visit for e in self._entries]),
        )
        return uniform(step_keys(rows, torch.full_like(rows, step), _DRAW_STREAM)).tolist()

    @property
    def sequences(self) -> list[TrainingSequence]:
        """Those that may still be drawn, oldest first."""
        return [e.sequence for e in self._entries if e.uses_left != 0]

    def hand_over(self, owners: int) -> None:
        """Let the entries belong to `owners` processes in turn, oldest first."""
        for i, entry in enumerate(self._entries):
            entry.sequence = replace(entry.sequence, owner=i % owners)

    def state_dict(self) -> list[dict[str, Any]]:
        """Plain values and CPU tensors; torch.load reads them with weights_only."""
        return [{n: getattr(e, n) for n in e.__slots__} | {"sequence": e.sequence.state_dict()} for e in self._entries]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Hold exactly the entries of a `state_dict`."""
        self._entries = [ReplayEntry(**{**e, "sequence": TrainingSequence(**e["sequence"])}) for e in state]


def split_step(total: int, reuse: int, available: int) -> tuple[int, int]:
    """(fresh, replayed) sequences of a step of `total`, such that in the long run each trains `reuse` times.

    The first steps have nothing to replay and are fresh. Where `reuse` does not divide `total`, more is replayed than
    fresh sequences bring in, until the buffer has no more: rounding the other way would fill it for ever.
    """
    replayed = min(total - max(1, total // reuse), available)
    return total - replayed, replayed


@torch.no_grad()
def staleness_nats(
    objective: StudentObjective, entries: Sequence[ReplayEntry], *, pad_id: int, device: torch.device
) -> float | None:
    """Mean KL(student that wrote || student that trains) at the remembered steps, nats; None without any.

    Exact while the student's head is frozen, as it is with adapters; under full fine-tuning both states are read by the
    head of now, which leaves out the head's own change.
    """
    probed = [e for e in entries if e.probe_hidden is not None and e.probe_step is not None][:PROBES_PER_STEP]
    if not probed:
        return None
    sequences = [
        TrainingSequence(
            e.sequence.example_id, e.sequence.visit, e.sequence.prompt_ids, e.sequence.response_ids, [e.probe_step or 0]
        )
        for e in probed
    ]
    with inference(objective.student):
        now = objective.hidden_at(collate(sequences, pad_id, device))  # (N, D)
        then = torch.stack([e.probe_hidden for e in probed if e.probe_hidden is not None]).to(now)
        head = objective.student.head
        log_then, log_now = (torch.log_softmax(head(h).double(), dim=-1) for h in (then, now))
        return float((log_then.exp() * (log_then - log_now)).sum(dim=-1).mean())
