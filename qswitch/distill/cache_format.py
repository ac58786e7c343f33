"""How teacher outputs are stored, and what comes back: hidden states, or the k largest log-probabilities.

Letters: `n` rows, `V` vocabulary, `k` ids kept by topk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FORMATS = ("hidden", "topk")


@dataclass(frozen=True, slots=True)
class LogitTargets:
    """Teacher logits [n, V]."""

    logits: Tensor


@dataclass(frozen=True, slots=True)
class TopkTargets:
    """The k largest teacher log-probabilities [n, k], their ids [n, k] and the log-probability of the rest [n]."""

    log_probs: Tensor
    ids: Tensor
    tail_log_prob: Tensor

    @classmethod
    def of_stored(cls, fields: dict[str, Tensor]) -> TopkTargets:
        """From the fields that `encode_topk` made."""
        return cls(fields["log_probs"], fields["ids"].long(), fields["tail"])


def encode_topk(logits: Tensor, k: int) -> dict[str, Tensor]:
    """Teacher logits [n, V] -> the fields of n stored rows: log_probs [n, k], ids int32 [n, k], tail [n]."""
    every = torch.log_softmax(logits.float(), dim=-1)
    log_probs, ids = every.topk(min(k, every.shape[-1]), dim=-1)
    # Summing the rest itself: 1 minus the sum of the largest loses a small tail to rounding.
    tail = every.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)
    return {"log_probs": log_probs, "ids": ids.int(), "tail": tail}
