"""A prompt with a response, and the response steps over which the loss runs. Knows no model and no cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qswitch.data.template import Prompt


@dataclass(frozen=True, slots=True)
class TrainingSequence:
    """What the student trains on; (example_id, visit) tells one sequence of a run from every other."""

    example_id: int
    visit: int
    prompt_ids: list[int]
    response_ids: list[int]
    loss_steps: list[int]
    loss_writers: list[int] | None = None
    """Who wrote the token of each loss step, as rollout.policy numbers writers; None for the data's own text."""
    owner: int = 0
    """The process that holds the teacher's outputs of it, and learns from it."""

    @property
    def key(self) -> tuple[int, int]:
        """(example, visit)."""
        return self.example_id, self.visit

    @property
    def num_tokens(self) -> int:
        """Tokens the student reads; the last response token is only ever predicted."""
        return len(self.prompt_ids) + len(self.response_ids) - 1

    def state_dict(self) -> dict[str, Any]:
        """Plain values, from which `TrainingSequence(**state)` is made again."""
        return {name: getattr(self, name) for name in self.__slots__}


def ground_truth_sequence(prompt: Prompt, visit: int, owner: int = 0) -> TrainingSequence | None:
    """The data's own response to a prompt; None without one. The loss runs over every assistant turn of it.

    In a conversation the response begins at the assistant's first turn, and the user's later turns lie in between,
    read and not learnt.
    """
    if not prompt.response_ids:
        return None
    first = prompt.earlier_turns[0][0] if prompt.earlier_turns else len(prompt.prompt_ids)
    own = range(len(prompt.prompt_ids) - first, len(prompt.prompt_ids) - first + len(prompt.response_ids))
    steps = [step - first for start, end in prompt.earlier_turns for step in range(start, end)]
    return TrainingSequence(
        prompt.example_id,
        visit,
        prompt.prompt_ids[:first],
        prompt.prompt_ids[first:] + prompt.response_ids,
        [*steps, *own],
        owner=owner,
    )
