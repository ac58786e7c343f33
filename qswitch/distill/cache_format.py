"""How one teacher output is stored, and what comes back: hidden, bf16, int8, topk. Pure functions.

Letters: `n` rows, `V` vocabulary, `K` ids kept by topk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FORMATS = ("hidden", "bf16", "int8", "topk")
_ABSENT = -128
"""int8 code of a logit of -inf: a token that the teacher never writes."""


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


def encode_logits(format: str, logits: Tensor, topk: int) -> dict[str, Tensor]:
    """Teacher logits [n, V] -> the fields of a stored row, first dimension n.

    bf16 and int8 hold logits below the row's largest. Softmax ignores what a row is shifted by, and near 0, where the
    probable tokens then lie, bf16 has its finest steps; int8 spreads its 255 over the row's whole range.
    """
    logits = logits.float()
    if format == "topk":
        every = torch.log_softmax(logits, dim=-1)
        log_probs, ids = every.topk(min(topk, every.shape[-1]), dim=-1)
        # Summing the rest itself: 1 minus the sum of the largest loses a small tail to rounding.
        tail = every.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)
        return {"log_probs": log_probs, "ids": ids.int(), "tail": tail}
    below = logits - logits.amax(dim=-1, keepdim=True)
    if format == "bf16":
        return {"logits": below.bfloat16()}
    absent = below == -torch.inf
    # -inf has a code of its own, so that it does not stretch the scale; NaN goes through and is met in the loss.
    scale = below.masked_fill(absent, 0.0).amin(dim=-1).neg().clamp_min(1e-12) / 254
    values = (below.masked_fill(absent, 0.0) / scale[:, None] + 127).round().to(torch.int8)
    return {"values": values.masked_fill(absent, _ABSENT), "scale": scale}


def decode(format: str, rows: dict[str, Tensor]) -> LogitTargets | TopkTargets:
    """Stored fields -> fp32 logits up to a constant per row, or the events of topk. Format hidden has no decoding."""
    if format == "bf16":
        return LogitTargets(rows["logits"].float())
    if format == "int8":
        values = rows["values"]
        logits = (values.float() - 127) * rows["scale"][:, None]
        return LogitTargets(logits.masked_fill(values == _ABSENT, -torch.inf))
    return TopkTargets(rows["log_probs"], rows["ids"].long(), rows["tail"])
