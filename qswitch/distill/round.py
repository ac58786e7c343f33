"""What a round of rollouts has prepared for the optimizer steps that it feeds. Knows no model and no cache."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qswitch.distill.batch_source import Source
from qswitch.distill.objective import TrainingSequence


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """The sequences of one optimizer step; the cache holds the teacher's outputs of their loss steps."""

    source: Source
    sequences: list[TrainingSequence]
    num_written: int = 0
    """Response tokens that were written for this step; what the budget of tokens counts."""

    def cache_keys(self) -> list[tuple[int, int, int]]:
        """(example, visit, step) of every loss position."""
        return [key for s in self.sequences for key in s.cache_keys()]

    def state_dict(self) -> dict[str, Any]:
        """Plain values; torch.load reads them with weights_only."""
        sequences = [asdict(s) for s in self.sequences]
        return {"source": self.source, "sequences": sequences, "num_written": self.num_written}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> PreparedStep:
        """Of a `state_dict`."""
        sequences = [TrainingSequence(**values) for values in state["sequences"]]
        return cls(state["source"], sequences, state.get("num_written", 0))


def unique_keys(keys: list[tuple[int, int, int]]) -> Tensor:
    """Keys int64 [N, 3], each once, in the order of their first appearance."""
    return torch.tensor(list(dict.fromkeys(keys)), dtype=torch.int64).reshape(-1, 3)
