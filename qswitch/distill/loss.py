"""The loss over many positions without ever holding their logits.

Student and teacher are projected to the vocabulary a chunk of positions at a time, and the gradient with respect to the
student's hidden states is taken inside the chunk, in the forward pass. So memory grows with `chunk_tokens * V`, not
with `N * V`, and a frozen head gets no gradient buffer at all. Knows no trainer and no source of the targets.

Letters: `N` positions, `D` student width, `V` shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qswitch.distill.cache_format import LogitTargets
from qswitch.distill.logit_cache import Targets
from qswitch.divergence import divergence, topk_divergence

Divergences = str | Sequence[tuple[str, Tensor]]
ChunkLoss = Callable[[Tensor, int, int], Tensor]
"""(student hidden states [n, D], start, stop) -> loss per position [n], for positions start..stop."""


class _ChunkedLoss(torch.autograd.Function):
    """Sum of a per-position loss divided by a normalizer; gradients computed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, loss_of: ChunkLoss, normalizer: float, chunk_tokens: int, *parameters: Tensor
    ) -> Tensor:
        wants_hidden = ctx.needs_input_grad[0]
        wanted = [p for p, needed in zip(parameters, ctx.needs_input_grad[4:], strict=True) if needed]
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        # Summed in fp32: many chunks added up in bf16 would lose percents of a trainable head's gradient.
        parameter_grads = [
            torch.zeros_like(p, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32) for p in wanted
        ]
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk_tokens):
            stop = min(start + chunk_tokens, hidden.shape[0])
            chunk = hidden[start:stop].detach()
            if not wants_hidden and not wanted:
                total += loss_of(chunk, start, stop).sum() / normalizer
                continue
            with torch.enable_grad():
                chunk.requires_grad_(wants_hidden)
                loss = loss_of(chunk, start, stop).sum() / normalizer
                inputs = [chunk, *wanted] if wants_hidden else wanted
                gradients = list(torch.autograd.grad(loss, inputs))
            total += loss.detach()
            if hidden_grad is not None:
                hidden_grad[start:stop] = gradients.pop(0)
            for buffer in parameter_grads:  # a head's gradient is large: gone before the next chunk makes another
                buffer += gradients.pop(0)
        ctx.save_for_backward(*([hidden_grad] if hidden_grad is not None else []), *parameter_grads)
        ctx.wants_hidden = wants_hidden
        ctx.parameter_dtypes = [p.dtype for p in wanted]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = list(ctx.saved_tensors)
        hidden_grad = saved.pop(0) if ctx.wants_hidden else None
        scaled = iter([(g * grad_output.to(g.dtype)).to(d) for g, d in zip(saved, ctx.parameter_dtypes, strict=True)])
        parameters = tuple(next(scaled) if needed else None for needed in ctx.needs_input_grad[4:])
        first = hidden_grad * grad_output.to(hidden_grad.dtype) if hidden_grad is not None else None
        return (first, None, None, None, *parameters)


def chunked_divergence(
    hidden: Tensor,
    head: nn.Module,
    targets: Targets,
    *,
    name: Divergences,
    alpha: float,
    beta: float,
    temperature: float,
    normalizer: float,
    chunk_tokens: int,
) -> Tensor:
    """Sum over positions of the divergence from the teacher, divided by `normalizer`: [N, D] -> scalar, nats.

    `name` is one divergence for all positions, or several, each with a bool mask [N] in host memory of the positions
    that are its own; every position belongs to exactly one.

    `head` projects hidden states to logits [..., V]; those of its parameters that require a gradient get one.

    Raises:
        ValueError: hidden states and targets differ in number, or chunk_tokens is below 1.
    """
    if hidden.shape[0] != targets.num_positions:
        raise ValueError(f"{hidden.shape[0]} student positions, but {targets.num_positions} teacher targets")

    def loss_of(chunk: Tensor, start: int, stop: int) -> Tensor:
        return _divergence_of(chunk, head, targets, start, stop, name, alpha, beta, temperature)

    return _apply(hidden, head, loss_of, normalizer, chunk_tokens)


def chunked_divergence_values(
    hidden: Tensor,
    head: nn.Module,
    targets: Targets,
    *,
    name: str,
    chunk_tokens: int,
    alpha: float = 0.1,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """The divergence of each position, without gradients: [N, D] -> [N], nats."""
    if hidden.shape[0] != targets.num_positions:
        raise ValueError(f"{hidden.shape[0]} student positions, but {targets.num_positions} teacher targets")
    if not targets.num_positions:
        return hidden.new_zeros(0, dtype=torch.float32)
    with torch.no_grad():
        return torch.cat(
            [
                _divergence_of(hidden[start:stop], head, targets, start, stop, name, alpha, beta, temperature)
                for start, stop in _chunks(hidden.shape[0], chunk_tokens)
            ]
        )


def language_model_loss(
    hidden: Tensor, head: nn.Module, labels: Tensor, *, normalizer: float, chunk_tokens: int
) -> Tensor:
    """Sum of the next-token cross-entropy divided by `normalizer`: [N, D], int64 [N] -> scalar, nats."""

    def loss_of(chunk: Tensor, start: int, stop: int) -> Tensor:
        logits = head(chunk)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return nn.functional.cross_entropy(logits, labels[start:stop], reduction="none")

    return _apply(hidden, head, loss_of, normalizer, chunk_tokens)


def _apply(hidden: Tensor, head: nn.Module, loss_of: ChunkLoss, normalizer: float, chunk_tokens: int) -> Tensor:
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
    trainable = [p for p in head_parameters(head) if p.requires_grad]
    loss: Tensor = _ChunkedLoss.apply(hidden, loss_of, normalizer, chunk_tokens, *trainable)
    return loss


def head_parameters(head: nn.Module) -> list[nn.Parameter]:
    """Parameters a head uses, those of an embedding it borrows (a tied head) included."""
    linear = getattr(head, "linear", head)
    return list(linear.parameters())


def _chunks(num: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, num)) for start in range(0, num, size)]


def _divergence_of(
    chunk: Tensor,
    head: nn.Module,
    targets: Targets,
    start: int,
    stop: int,
    name: Divergences,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    student_logits = head(chunk)
    with torch.no_grad():
        target = targets.chunk(start, stop, chunk.device)

    def of(one: str, rows: Tensor | None) -> Tensor:
        """[n] of all rows, or of the rows [n] of the chunk."""

        def own(values: Tensor) -> Tensor:
            return values if rows is None else values[rows.to(values.device)]

        if isinstance(target, LogitTargets):
            return divergence(
                one, own(target.logits), own(student_logits), alpha=alpha, beta=beta, temperature=temperature
            )
        return topk_divergence(
            one,
            own(target.log_probs),
            own(target.ids),
            own(student_logits),
            teacher_tail_log_prob=own(target.tail_log_prob),
            alpha=alpha,
            beta=beta,
        )

    if isinstance(name, str):
        return of(name, None)
    masks = [(one, mask[start:stop].nonzero().squeeze(1)) for one, mask in name]
    present = [(one, rows) for one, rows in masks if len(rows)]
    if len(present) == 1:
        return of(present[0][0], None)
    order = torch.cat([rows for _, rows in present]).argsort().to(chunk.device)
    return torch.cat([of(one, rows) for one, rows in present])[order]
