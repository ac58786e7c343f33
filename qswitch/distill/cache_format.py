"""How teacher outputs are stored, and what comes back: hidden states, or the k largest log-probabilities.

Letters: `n` rows, `V` vocabulary, `k` ids kept by topk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FORMATS = ("hidden", "topk")
HeadFunction = Callable[[Tensor], Tensor]
"""Hidden states [..., D] -> logits [..., V]."""
_ENCODE_ROWS = 64
"""Rows projected to the vocabulary at a time while encoding."""


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


@torch.no_grad()
def encode_rows(
    format: str, hidden: Tensor, head: HeadFunction | None, *, dtype: torch.dtype, topk: int
) -> dict[str, Tensor]:
    """The teacher's final hidden states [n, D] -> the fields of n stored rows in a format."""
    if format == "hidden":
        # A copy: a view would keep the caller's whole tensor alive, uncounted.
        return {"hidden": hidden.detach().to(dtype, copy=True)}
    assert head is not None, "teacher outputs come with a teacher"
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, max(1, len(hidden)), _ENCODE_ROWS):
        for name, tensor in encode_topk(head(hidden[start : start + _ENCODE_ROWS]), topk).items():
            parts.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}
