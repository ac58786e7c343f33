"""How far is the student's next-token distribution q from the teacher's p, and in which direction must it move?

Pure mathematics over the last dimension; imports torch only and knows no model, cache or loss reduction. All functions
normalise their inputs themselves, so adding a constant to a row of logits changes nothing. Arithmetic is fp32, or
fp64 where an input is fp64. Gradients flow to the student only and are closed forms, which keeps one [..., V] tensor
for the backward pass and stays finite where a composition of log, exp and clamp would not.

Sources: SWITCH (Koo et al., Findings of NAACL 2025) for the JSD; DistiLLM (Ko et al., ICML 2024) for the skew
divergences; GKD (Agarwal et al., ICLR 2024) for jsd(beta).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation")

# Log-probabilities are floored here, so that a masked (-inf) token costs nothing where both models mask it, and a
# large but finite amount where only one does. exp(-1e4) is 0 in fp32 and fp64: no probability changes.
_MIN_LOG_PROB = -1.0e4

# Below this weight log1p(-(1 - w)) loses too many digits of log(w) in fp32.
_MIN_FP32_WEIGHT = 1.0e-3


def divergence(
    name: str,
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    alpha: float = 0.1,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """Divergence of the student q from the teacher p per position, in nats: [..., V], [..., V] -> [...], each >= 0.

    forward_kl       KL(p || q)
    reverse_kl       KL(q || p)
    jsd              beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
    skew_forward_kl  KL(p || alpha p + (1 - alpha) q)
    skew_reverse_kl  KL(q || (1 - alpha) p + alpha q)
    total_variation  1/2 sum |p - q|, in [0, 1] and without unit

    `temperature` divides both logits; the value is not multiplied by temperature**2. The teacher gets no gradient, and
    the result cannot be differentiated twice. Exactly zero where both rows are equal.

    Raises:
        ValueError: unknown name, shapes that differ, or alpha, beta, temperature out of range.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"unknown divergence {name!r}; choose one of {', '.join(DIVERGENCES)}")
    _check_shapes(teacher_logits, student_logits)
    if not 0.0 <= alpha < 1.0:
        raise ValueError(f"alpha is {alpha}; it must be in [0, 1)")
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta is {beta}; it must be in (0, 1)")
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    return _Divergence.apply(name, teacher_logits.detach(), student_logits, alpha, beta, temperature)


@torch.no_grad()
def jsd_bits(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence per token in bits: [..., V], [..., V] -> [...], each in [0, 1], without gradient.

    SWITCH (Koo et al. 2025) eq. 3 in base 2, because tau_0 = 1 is out of reach in nats. Symmetric to the bit; computed
    in fp32, or fp64 where an input is fp64.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(teacher_logits, student_logits)
    dtype = _accumulation_dtype(teacher_logits, student_logits)
    return jsd_bits_from_log_probs(
        torch.log_softmax(teacher_logits.to(dtype), dim=-1), torch.log_softmax(student_logits.to(dtype), dim=-1)
    )


@torch.no_grad()
def jsd_bits_from_log_probs(teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
    """`jsd_bits` from normalised natural log-probabilities: [..., V], [..., V] -> [...] in bits, each in [0, 1].

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(teacher_log_probs, student_log_probs)
    dtype = _accumulation_dtype(teacher_log_probs, student_log_probs)
    log_p = teacher_log_probs.to(dtype).clamp_min(_MIN_LOG_PROB)
    log_q = student_log_probs.to(dtype).clamp_min(_MIN_LOG_PROB)
    nats, _ = _jsd(log_p, log_q, 0.5, needs_gradient=False)
    return (nats / math.log(2.0)).clamp(0.0, 1.0)


def topk_divergence(
    name: str,
    teacher_topk_log_probs: Tensor,
    teacher_topk_ids: Tensor,
    student_logits: Tensor,
    *,
    teacher_tail_log_prob: Tensor | None = None,
    alpha: float = 0.1,
    beta: float = 0.5,
) -> Tensor:
    """Divergence over k tokens and the tail as one more event, in nats: [..., k], [..., k], [..., V] -> [...].

    Merging events never increases an f-divergence (data-processing inequality), so this is a lower bound of
    `divergence`, and it grows with k when the sets are nested. It holds at temperature 1 only: a tempered tail cannot
    be had from its mass. `teacher_tail_log_prob` [...] is the log of the teacher's remaining mass; without it, it is
    1 minus the sum of the given probabilities. Gradient to the student only.

    Raises:
        ValueError: unknown name, shapes that do not fit, or k larger than V.
    """
    if teacher_topk_log_probs.shape != teacher_topk_ids.shape:
        raise ValueError(
            f"top-k log-probabilities {tuple(teacher_topk_log_probs.shape)} and ids {tuple(teacher_topk_ids.shape)} "
            "have different shapes"
        )
    if teacher_topk_ids.shape[:-1] != student_logits.shape[:-1]:
        raise ValueError(
            f"top-k ids {tuple(teacher_topk_ids.shape)} and student logits {tuple(student_logits.shape)} "
            "cover different positions"
        )
    k, vocab_size = teacher_topk_ids.shape[-1], student_logits.shape[-1]
    if k > vocab_size:
        raise ValueError(f"top-k of {k} tokens is larger than the vocabulary of {vocab_size}")
    dtype = _accumulation_dtype(teacher_topk_log_probs, student_logits)
    ids = teacher_topk_ids.long()
    student = student_logits.to(dtype)
    teacher = teacher_topk_log_probs.detach().to(dtype)
    events = student.gather(-1, ids)
    if k < vocab_size:
        # The log-sum-exp of a group of logits is the logit of the merged event.
        tail = student.scatter(-1, ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
        events = torch.cat([events, tail], dim=-1)
        if teacher_tail_log_prob is None:
            tail_mass = (1.0 - teacher.exp().sum(dim=-1)).clamp_min(0.0)
            teacher_tail_log_prob = tail_mass.log()
        teacher = torch.cat([teacher, teacher_tail_log_prob.detach().to(dtype).unsqueeze(-1)], dim=-1)
    return divergence(name, teacher, events, alpha=alpha, beta=beta)


class _Divergence(torch.autograd.Function):
    """Value of a divergence, and its gradient with respect to the student's logits in closed form.

    With D = sum_i h(log p_i, log q_i), a_i = dh_i / d log q_i and logits z = temperature * (log q + const):
    dD/dz_i = (a_i - q_i sum_j a_j) / temperature.
    """

    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        teacher_logits: Tensor,
        student_logits: Tensor,
        alpha: float,
        beta: float,
        temperature: float,
    ) -> Tensor:
        dtype = _accumulation_dtype(teacher_logits, student_logits)
        log_p = _log_probs(teacher_logits, dtype, temperature)
        log_q = _log_probs(student_logits, dtype, temperature)
        needs_gradient = ctx.needs_input_grad[2]
        value, slope = _VALUE_AND_SLOPE[name](log_p, log_q, alpha, beta, needs_gradient)
        if slope is not None:
            gradient = slope.addcmul_(log_q.exp_(), slope.sum(dim=-1, keepdim=True), value=-1.0)
            if temperature != 1.0:
                gradient.div_(temperature)
            ctx.save_for_backward(gradient)
            ctx.student_dtype = student_logits.dtype
        # Rounding may leave -1e-8 where the truth is 0.
        return value.clamp_min_(0.0).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None, None, (gradient * grad_output.unsqueeze(-1)).to(ctx.student_dtype), None, None, None


def _forward_kl(
    log_p: Tensor, log_q: Tensor, alpha: float, beta: float, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    p = log_p.exp()
    value = (log_p - log_q).mul_(p).sum(dim=-1)
    return value, p.neg_() if needs_gradient else None


def _reverse_kl(
    log_p: Tensor, log_q: Tensor, alpha: float, beta: float, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    q = log_q.exp()
    terms = (log_q - log_p).mul_(q)
    return terms.sum(dim=-1), terms.add_(q) if needs_gradient else None


def _skew_forward_kl(
    log_p: Tensor, log_q: Tensor, alpha: float, beta: float, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    if alpha == 0.0:
        return _forward_kl(log_p, log_q, alpha, beta, needs_gradient)
    p = log_p.exp()
    ratio = log_q - log_p
    value = _log_mixture(ratio, alpha).mul_(p).sum(dim=-1).neg_()
    return value, _mixture_share(ratio, alpha).mul_(p).neg_() if needs_gradient else None


def _skew_reverse_kl(
    log_p: Tensor, log_q: Tensor, alpha: float, beta: float, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    if alpha == 0.0:
        return _reverse_kl(log_p, log_q, alpha, beta, needs_gradient)
    q = log_q.exp()
    ratio = log_p - log_q
    terms = _log_mixture(ratio, alpha).mul_(q)
    value = terms.sum(dim=-1).neg_()
    return value, _mixture_share(ratio, alpha).mul_(q).sub_(terms) if needs_gradient else None


def _jsd_slope(
    log_p: Tensor, log_q: Tensor, alpha: float, beta: float, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    return _jsd(log_p, log_q, beta, needs_gradient)


def _jsd(log_p: Tensor, log_q: Tensor, beta: float, needs_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The two ratios share one logarithm: log(m/p) = relu(-r) + t and log(m/q) = relu(r) + t, with r = log(p/q)."""
    ratio = log_p - log_q
    common = _log_mixture_bounded(-ratio, beta)
    student_terms = ratio.clamp_min(0.0).add_(common).mul_(log_q.exp())
    teacher_terms = ratio.neg_().clamp_min_(0.0).add_(common).mul_(log_p.exp())
    if beta == 0.5:
        value = teacher_terms.add_(student_terms).sum(dim=-1).mul_(-0.5)
    else:
        value = -(beta * teacher_terms.sum(dim=-1) + (1.0 - beta) * student_terms.sum(dim=-1))
    return value, student_terms.mul_(beta - 1.0) if needs_gradient else None


def _total_variation(
    log_p: Tensor, log_q: Tensor, alpha: float, beta: float, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    q = log_q.exp()
    difference = q - log_p.exp()
    value = difference.abs().sum(dim=-1).mul_(0.5)
    return value, difference.sign_().mul_(q).mul_(0.5) if needs_gradient else None


_VALUE_AND_SLOPE = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd_slope,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
}


def _log_mixture(ratio: Tensor, weight: float) -> Tensor:
    """log(weight + (1 - weight) exp(ratio)), exactly 0 at ratio 0, without overflow for ratios in [-1e4, 1e4]."""
    return _log_mixture_bounded(ratio, weight).add_(ratio.clamp_min(0.0))


def _log_mixture_bounded(ratio: Tensor, weight: float) -> Tensor:
    """`_log_mixture` less relu(ratio): log1p(c expm1(-|ratio|)), c = weight where ratio > 0, else 1 - weight."""
    dtype = ratio.dtype
    decay = ratio.abs().neg_()
    if min(weight, 1.0 - weight) < _MIN_FP32_WEIGHT:
        decay = decay.double()
    decay = decay.expm1_()
    if weight == 0.5:
        return decay.mul_(weight).log1p_().to(dtype)
    return torch.where(ratio > 0.0, decay * weight, decay * (1.0 - weight)).log1p_().to(dtype)


def _mixture_share(ratio: Tensor, weight: float) -> Tensor:
    """d/d ratio of `_log_mixture`: the share of (1 - weight) exp(ratio) in the mixture, in [0, 1]. Overwrites ratio."""
    return ratio.add_(math.log1p(-weight) - math.log(weight)).sigmoid_()


def _log_probs(logits: Tensor, dtype: torch.dtype, temperature: float) -> Tensor:
    scaled = logits.to(dtype) if temperature == 1.0 else logits.to(dtype) / temperature
    return torch.log_softmax(scaled, dim=-1).clamp_min_(_MIN_LOG_PROB)


def _accumulation_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32


def _check_shapes(teacher: Tensor, student: Tensor) -> None:
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher {tuple(teacher.shape)} and student {tuple(student.shape)} must have one shape, [..., vocabulary]"
        )
