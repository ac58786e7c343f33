"""How far a model is from the teacher on the teacher's own responses: KL(p || q) and top-1 agreement, per token.

The teacher's responses are read once and its final hidden states kept in host memory, so that it need not stay loaded
while the models are measured. Knows nothing of files or references.

Letters: `T` response tokens, `D` hidden width, `N` positions, `V` shared vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qswitch.divergence import divergence
from qswitch.models.language_model import Head, LanguageModel
from qswitch.rollout.decode import score_responses

CHUNK_TOKENS = 128
"""Positions projected to the vocabulary at a time."""


@dataclass(frozen=True, slots=True)
class TeacherView:
    """What the teacher makes of its responses."""

    sequences: list[tuple[list[int], list[int]]]
    """(prompt ids, response ids), no response empty."""
    hidden: list[Tensor]
    """[T, D] per sequence, host memory."""
    head: Head


@dataclass(frozen=True, slots=True)
class Distance:
    """One response of the teacher, measured on a model."""

    tokens: int
    kl_nats: float
    """Mean KL(teacher || model) per token, temperature 1."""
    top1_agreement: float
    """Share of tokens at which both find the same token likeliest."""


def view_of_teacher(
    teacher: LanguageModel, sequences: Sequence[tuple[list[int], list[int]]], *, pad_id: int, batch_size: int
) -> TeacherView:
    """Score responses with the teacher and keep what is needed to compare others with it, off the device at once."""
    sequences = list(sequences)
    hidden: dict[int, Tensor] = {}
    for members in _by_length(sequences, batch_size):
        scored = score_responses(teacher, [sequences[i] for i in members], pad_id=pad_id, batch_size=batch_size)
        hidden |= {i: h.cpu() for i, h in zip(members, scored, strict=True)}
    return TeacherView(sequences, [hidden[i] for i in range(len(sequences))], detached_head(teacher.head))


def _by_length(sequences: Sequence[tuple[list[int], list[int]]], batch_size: int) -> Iterator[list[int]]:
    """Indices, batch by batch, of sequences of similar length."""
    order = sorted(range(len(sequences)), key=lambda i: sum(map(len, sequences[i])))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def detached_head(head: Head) -> Head:
    """A head of its own, so that the rest of its model can be freed."""
    return Head(
        copy.deepcopy(head.linear),
        vocab_size=head.vocab_size,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        compute_dtype=head.compute_dtype,
    )


def distances(view: TeacherView, model: LanguageModel, *, pad_id: int, batch_size: int) -> list[Distance]:
    """KL and agreement of every response in `view`, in its order."""
    results: list[Distance | None] = [None] * len(view.sequences)
    vocab_size = min(view.head.vocab_size, model.vocab_size)
    with torch.no_grad():
        for members in _by_length(view.sequences, batch_size):
            scored = score_responses(
                model, [view.sequences[i] for i in members], pad_id=pad_id, batch_size=batch_size
            )  # in the order of members
            for i, hidden in zip(members, scored, strict=True):
                results[i] = _distance(view.hidden[i], view.head, hidden, model.head, vocab_size)
    return [r for r in results if r is not None]


def _distance(teacher_hidden: Tensor, teacher_head: Head, hidden: Tensor, head: Head, vocab_size: int) -> Distance:
    kl = agree = 0.0
    for start in range(0, len(hidden), CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        p = teacher_head(teacher_hidden[chunk].to(hidden.device))[..., :vocab_size]  # (N, V)
        q = head(hidden[chunk])[..., :vocab_size]
        kl += float(divergence("forward_kl", p, q).double().sum())
        agree += float((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
    return Distance(len(hidden), kl / len(hidden), agree / len(hidden))
