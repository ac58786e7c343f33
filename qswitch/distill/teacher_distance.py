"""How far a model is from the teacher: on the teacher's own responses, and on the model's own.

On the teacher's responses: KL(teacher || model) and top-1 agreement, per token. Supervised training lowers this.
On the model's responses: KL(model || teacher), Jensen-Shannon divergence and the teacher's log-probability of the
model's text less the model's own, by position. This is what a model meets when it is used: one that has strayed from
what the teacher would write shows it there, more and more along the response.

One model reads the responses first. Its final hidden states and its head wait in host memory, so that it need not stay
loaded while the other is measured; the head is brought to the device for as long as the other reads. Knows nothing of
files or references.

Letters: `T` response tokens, `D` hidden width, `N` positions, `V` shared vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from qswitch.distill.own_text import POSITIONS
from qswitch.divergence import divergence, jsd_bits
from qswitch.models.language_model import Head, LanguageModel
from qswitch.rollout.decode import score_responses

CHUNK_TOKENS = 128
"""Positions projected to the vocabulary at a time."""


@dataclass(frozen=True, slots=True)
class ModelView:
    """What a model makes of responses."""

    sequences: list[tuple[list[int], list[int]]]
    """(prompt ids, response ids), no response empty."""
    hidden: list[Tensor]
    """[T, D] per sequence, host memory."""
    head: Head
    """Anywhere; it is read with on the other model's device."""


@dataclass(frozen=True, slots=True)
class Distance:
    """One response of the teacher, measured on a model."""

    tokens: int
    kl_nats: float
    """Mean KL(teacher || model) per token, temperature 1."""
    top1_agreement: float
    """Share of tokens at which both find the same token likeliest."""


def view_of(
    model: LanguageModel, head: Head, sequences: Sequence[tuple[list[int], list[int]]], *, pad_id: int, batch_size: int
) -> ModelView:
    """Score responses with a model and keep what is needed to compare another with it, off the device at once.

    `head` is the model's `detached_head`, one for all that it reads.
    """
    sequences = list(sequences)
    hidden = score_responses(model, sequences, pad_id=pad_id, batch_size=batch_size, keep_on_host=True)
    return ModelView(sequences, hidden, head)


def _by_length(sequences: Sequence[tuple[list[int], list[int]]], batch_size: int) -> Iterator[list[int]]:
    """Indices, batch by batch, of sequences of similar length."""
    order = sorted(range(len(sequences)), key=lambda i: sum(map(len, sequences[i])))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def detached_head(head: Head) -> Head:
    """A copy in host memory, where it takes nothing from the models that are read with it later."""
    return _copied(head, torch.device("cpu"))


def head_on(head: Head, device: torch.device) -> Head:
    """The head on a device: itself where it lies there, else a copy, to be dropped when it has been read with."""
    return head if next(head.linear.parameters()).device == device else _copied(head, device)


def _copied(head: Head, device: torch.device) -> Head:
    # Straight to the device: a deep copy would lie where the head lies, beside it.
    tensors = [*head.linear.parameters(), *head.linear.buffers()]
    there = {id(t): nn.Parameter(t.detach().to(device, copy=True), requires_grad=False) for t in tensors}
    return Head(
        copy.deepcopy(head.linear, there),
        vocab_size=head.vocab_size,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        compute_dtype=head.compute_dtype,
    )


def distances(view: ModelView, model: LanguageModel, *, pad_id: int, batch_size: int) -> list[Distance]:
    """KL and agreement of every response in the teacher's `view`, in its order."""
    found: dict[int, Distance] = {}
    for i, chunks in _both(view, model, pad_id=pad_id, batch_size=batch_size):
        kl = agree = 0.0
        for p, q in chunks:
            kl += float(divergence("forward_kl", p, q).double().sum())
            agree += float((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
        tokens = len(view.hidden[i])
        found[i] = Distance(tokens, kl / tokens, agree / tokens)
    return [found[i] for i in range(len(view.sequences))]


@dataclass(frozen=True, slots=True)
class OwnDistance:
    """One response of a model, measured against the teacher; sums over the tokens of each entry of POSITIONS."""

    tokens: list[int]
    reverse_kl_nats: list[float]
    """KL(model || teacher), temperature 1."""
    jsd_bits: list[float]
    log_ratio_nats: list[float]
    """The teacher's log-probability of the written token less the model's own; its mean estimates -KL(model || teacher)
    from the written tokens alone."""


def own_distances(view: ModelView, teacher: LanguageModel, *, pad_id: int, batch_size: int) -> list[OwnDistance]:
    """The teacher's distance from every response in the `view` of the model that wrote it, in its order."""
    found: dict[int, OwnDistance] = {}
    for i, chunks in _both(view, teacher, pad_id=pad_id, batch_size=batch_size):
        written = torch.tensor(view.sequences[i][1], device=teacher.device)
        columns: list[Tensor] = []
        for start, (q, p) in zip(range(0, len(written), CHUNK_TOKENS), chunks, strict=True):
            tokens = written[start : start + CHUNK_TOKENS]
            own, teachers = (cross_entropy(logits.float(), tokens, reduction="none") for logits in (q, p))
            reverse = divergence("reverse_kl", p, q)
            columns.append(torch.stack([reverse.float(), jsd_bits(p, q).float(), own - teachers]).double())  # (3, N)
        figures = torch.cat(columns, dim=1).cpu()  # (3, T)
        parts = [figures[:, first:last].sum(dim=1).tolist() for first, last in POSITIONS]
        counts = [figures[:, first:last].shape[1] for first, last in POSITIONS]
        found[i] = OwnDistance(counts, *(list(values) for values in zip(*parts, strict=True)))
    return [found[i] for i in range(len(view.sequences))]


@torch.no_grad()
def _both(
    view: ModelView, model: LanguageModel, *, pad_id: int, batch_size: int
) -> Iterator[tuple[int, Iterator[tuple[Tensor, Tensor]]]]:
    """Of every sequence: its index, and the logits [N, V] of the viewed and the given model, chunk by chunk."""
    vocab_size = min(view.head.vocab_size, model.vocab_size)
    viewed = head_on(view.head, model.device)
    for members in _by_length(view.sequences, batch_size):
        scored = score_responses(
            model, [view.sequences[i] for i in members], pad_id=pad_id, batch_size=batch_size
        )  # in the order of members
        for i, hidden in zip(members, scored, strict=True):
            yield i, _logits(viewed, view.hidden[i], model.head, hidden, vocab_size)


def _logits(
    viewed: Head, viewed_hidden: Tensor, head: Head, hidden: Tensor, vocab_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(hidden), CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        logits = viewed(viewed_hidden[chunk].to(hidden.device))[..., :vocab_size]
        yield logits, head(hidden[chunk])[..., :vocab_size]
