"""Divergences against plain arithmetic over probabilities, and the laws every one of them keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qswitch.divergence import (
    DIVERGENCES,
    divergence,
    jsd_bits,
    jsd_bits_from_log_probs,
    topk_divergence,
)
from qswitch.methods import METHODS

ALL = pytest.mark.parametrize("name", DIVERGENCES)


def logits(seed: int, *shape: int, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def probabilities(row: list[float], temperature: float) -> list[float]:
    weights = [math.exp(x / temperature) for x in row]
    return [w / math.fsum(weights) for w in weights]


def plain_kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0.0)


def plain(
    name: str, teacher: list[float], student: list[float], alpha: float, beta: float, temperature: float
) -> float:
    """The definition in Python floats, from probabilities."""
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)

    def mix(weight: float) -> list[float]:
        return [weight * a + (1.0 - weight) * b for a, b in zip(p, q, strict=True)]

    if name == "forward_kl":
        return plain_kl(p, q)
    if name == "reverse_kl":
        return plain_kl(q, p)
    if name == "jsd":
        return beta * plain_kl(p, mix(beta)) + (1.0 - beta) * plain_kl(q, mix(beta))
    if name == "skew_forward_kl":
        return plain_kl(p, mix(alpha))
    if name == "skew_reverse_kl":
        return plain_kl(q, mix(1.0 - alpha))
    assert name == "total_variation"
    return math.fsum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2.0


def dense(name: str, teacher: Tensor, student: Tensor, alpha: float, beta: float, temperature: float) -> Tensor:
    """The definition over probabilities, differentiable by autograd."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    m = beta * p + (1 - beta) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "skew_forward_kl": lambda: kl(p, alpha * p + (1 - alpha) * q),
        "skew_reverse_kl": lambda: kl(q, (1 - alpha) * p + alpha * q),
        "total_variation": lambda: (p - q).abs().sum(-1) / 2,
    }[name]()


SETTINGS = [(0.1, 0.5, 1.0), (0.0, 0.3, 1.0), (0.7, 0.9, 2.0), (1e-4, 1e-4, 0.7)]
SETTING = pytest.mark.parametrize(("alpha", "beta", "temperature"), SETTINGS)


@ALL
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_on_equal_inputs_with_zero_gradient(name, dtype):
    teacher = logits(0, 5, 37, scale=4.0, dtype=dtype)
    student = teacher.clone().requires_grad_()
    value = divergence(name, teacher, student)
    assert value.shape == (5,) and (value == 0).all()
    value.sum().backward()
    assert student.grad is not None and student.grad.dtype == dtype
    assert student.grad.abs().max() < 1e-6


def test_gkd_is_distillms_published_formula_at_its_own_weight():
    """js_distance of that code: weight times KL(student || mixture), the rest times KL(teacher || mixture)."""
    weight = 0.9
    teacher, student = logits(5, 6, 30), logits(6, 6, 30)
    own = METHODS["gkd"]["loss"]
    value = divergence(own["divergence"], teacher, student, beta=own["beta"])
    for row, teacher_row, student_row in zip(value.tolist(), teacher.tolist(), student.tolist(), strict=True):
        p, q = probabilities(teacher_row, 1.0), probabilities(student_row, 1.0)
        mixture = [(1 - weight) * a + weight * b for a, b in zip(p, q, strict=True)]
        assert row == pytest.approx(weight * plain_kl(q, mixture) + (1 - weight) * plain_kl(p, mixture), rel=1e-10)


@ALL
@SETTING
def test_positive_where_the_distributions_differ(name, alpha, beta, temperature):
    teacher, student = logits(1, 50, 20), logits(2, 50, 20)
    assert (divergence(name, teacher, student, alpha=alpha, beta=beta, temperature=temperature) > 1e-6).all()


@ALL
@SETTING
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_plain_arithmetic(name, alpha, beta, temperature, dtype):
    teacher, student = logits(3, 8, 40, dtype=dtype), logits(4, 8, 40, dtype=dtype)
    value = divergence(name, teacher, student, alpha=alpha, beta=beta, temperature=temperature)
    assert value.dtype == dtype
    expected = [
        plain(name, p, q, alpha, beta, temperature) for p, q in zip(teacher.tolist(), student.tolist(), strict=True)
    ]
    tolerance = {"abs": 1e-12, "rel": 1e-10} if dtype == torch.float64 else {"abs": 1e-6, "rel": 1e-6}
    assert value.tolist() == pytest.approx(expected, **tolerance)


@ALL
@SETTING
def test_gradient_is_the_derivative(name, alpha, beta, temperature):
    teacher, student = logits(5, 3, 9), logits(6, 3, 9).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: divergence(name, teacher, s, alpha=alpha, beta=beta, temperature=temperature), (student,)
    )


@ALL
@SETTING
def test_gradient_equals_autograd_of_the_definition(name, alpha, beta, temperature):
    teacher, student = logits(7, 4, 30), logits(8, 4, 30).requires_grad_()
    weights = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64)
    value = divergence(name, teacher, student, alpha=alpha, beta=beta, temperature=temperature)
    (found,) = torch.autograd.grad(value @ weights, student)
    (expected,) = torch.autograd.grad(dense(name, teacher, student, alpha, beta, temperature) @ weights, student)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@ALL
def test_a_constant_added_to_the_logits_changes_nothing(name):
    teacher, student = logits(9, 6, 25), logits(10, 6, 25)
    value = divergence(name, teacher, student)
    for shifted in (divergence(name, teacher - 15.0, student), divergence(name, teacher, student - 15.0)):
        torch.testing.assert_close(shifted, value, rtol=1e-12, atol=1e-13)
    single = divergence(name, teacher.float() - 15.0, student.float() + 15.0)
    torch.testing.assert_close(single, value.float(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(jsd_bits(teacher - 15.0, student), jsd_bits(teacher, student), rtol=1e-12, atol=1e-13)


@ALL
def test_the_teacher_gets_no_gradient(name):
    teacher, student = logits(11, 3, 12).requires_grad_(), logits(12, 3, 12).requires_grad_()
    divergence(name, teacher, student).sum().backward()
    log_probs, ids = teacher.log_softmax(-1).topk(4)
    topk_divergence(name, log_probs, ids, student).sum().backward()
    assert teacher.grad is None and student.grad is not None
    assert not divergence(name, teacher, student.detach()).requires_grad


def test_forward_kl_is_not_cross_entropy():
    teacher = logits(13, 4, 20)
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1)
    assert (entropy > 0.1).all()  # what cross-entropy would give at p = q
    assert (divergence("forward_kl", teacher, teacher.clone()) == 0).all()
    student = logits(14, 4, 20)
    cross_entropy = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(divergence("forward_kl", teacher, student), cross_entropy - entropy)


def test_forward_and_reverse_are_each_other_with_arguments_exchanged():
    a, b = logits(15, 4, 20), logits(16, 4, 20)
    for forward, reverse in (("forward_kl", "reverse_kl"), ("skew_forward_kl", "skew_reverse_kl")):
        torch.testing.assert_close(divergence(forward, a, b), divergence(reverse, b, a), rtol=1e-12, atol=1e-14)
    assert (divergence("forward_kl", a, b) - divergence("reverse_kl", a, b)).abs().min() > 1e-3


@ALL
def test_masked_tokens_stay_finite(name):
    teacher, student = logits(17, 2, 6), logits(18, 2, 6)
    teacher[:, 0] = -torch.inf  # both mask token 0, each masks one more
    student[:, 0] = -torch.inf
    teacher[:, 1] = -torch.inf
    student[:, 2] = -torch.inf
    student.requires_grad_()
    value = divergence(name, teacher, student)
    value.sum().backward()
    assert value.isfinite().all() and (value > 0).all()
    assert student.grad is not None and student.grad.isfinite().all()
    both = divergence(name, teacher[:, [0, 3, 4, 5]], student.detach()[:, [0, 3, 4, 5]])
    torch.testing.assert_close(both, divergence(name, teacher[:, 3:], student.detach()[:, 3:]), rtol=1e-12, atol=1e-14)


def test_jsd_bits_is_symmetric_bounded_and_one_for_disjoint_supports():
    for scale in (0.01, 1.0, 5.0, 100.0):
        a, b = (logits(s, 200, 30, scale=scale, dtype=torch.float32) for s in (19, 20))
        bits = jsd_bits(a, b)
        assert torch.equal(bits, jsd_bits(b, a))
        assert (bits >= 0).all() and (bits <= 1).all()
    assert (jsd_bits(a, a.clone()) == 0).all()
    inf = torch.inf
    assert jsd_bits(torch.tensor([[1.0, 2.0, -inf, -inf]]), torch.tensor([[-inf, -inf, 0.0, 3.0]])).item() == 1.0
    assert jsd_bits(torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])).item() == pytest.approx(1.0, abs=1e-6)


def test_jsd_bits_equals_plain_arithmetic_in_base_two():
    teacher, student = logits(21, 6, 40, dtype=torch.float32), logits(22, 6, 40, dtype=torch.float32)
    expected = [
        plain("jsd", p, q, 0.1, 0.5, 1.0) / math.log(2.0)
        for p, q in zip(teacher.tolist(), student.tolist(), strict=True)
    ]
    assert jsd_bits(teacher, student).tolist() == pytest.approx(expected, abs=1e-6)
    found = jsd_bits_from_log_probs(teacher.log_softmax(-1), student.log_softmax(-1))
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert not jsd_bits(teacher, student.requires_grad_()).requires_grad


@ALL
def test_a_padded_vocabulary_is_sliced_and_never_padded_with_zeros(name):
    teacher, student = logits(23, 4, 20), logits(24, 4, 26)
    with pytest.raises(ValueError, match=r"\(4, 20\).*\(4, 26\)"):
        divergence(name, teacher, student)
    with pytest.raises(ValueError, match="one shape"):
        jsd_bits(teacher, student)
    sliced = divergence(name, teacher, student[:, :20])
    padded = divergence(name, torch.cat([teacher, torch.zeros(4, 6, dtype=torch.float64)], -1), student)
    assert (sliced - padded).abs().min() > 1e-4
    expected = [plain(name, p, q[:20], 0.1, 0.5, 1.0) for p, q in zip(teacher.tolist(), student.tolist(), strict=True)]
    assert sliced.tolist() == pytest.approx(expected, rel=1e-10)


@ALL
def test_topk_is_a_lower_bound_that_grows_with_k_up_to_the_full_value(name):
    vocab_size = 24
    teacher, student = logits(25, 10, vocab_size), logits(26, 10, vocab_size)
    full = divergence(name, teacher, student)
    previous = torch.zeros(10, dtype=torch.float64)
    for k in range(1, vocab_size + 1):
        log_probs, ids = teacher.log_softmax(-1).topk(k)
        value = topk_divergence(name, log_probs, ids, student)
        assert (value >= previous - 1e-12).all() and (value <= full + 1e-12).all()
        if k < vocab_size:
            tail = torch.log1p(-log_probs.exp().sum(-1))
            given = topk_divergence(name, log_probs, ids, student, teacher_tail_log_prob=tail)
            torch.testing.assert_close(given, value, rtol=1e-9, atol=1e-11)
        previous = value
    torch.testing.assert_close(previous, full, rtol=1e-10, atol=1e-12)
    assert (topk_divergence(name, log_probs[:, :3], ids[:, :3], student) < full - 1e-4).all()


@ALL
def test_topk_equals_plain_arithmetic_over_merged_events(name):
    teacher, student = logits(27, 5, 15), logits(28, 5, 15)
    log_probs, ids = teacher.log_softmax(-1).topk(4)

    def merged(row: list[float], kept: list[int]) -> list[float]:
        p = probabilities(row, 1.0)
        events = [p[i] for i in kept]
        return [math.log(e) for e in [*events, 1.0 - math.fsum(events)]]

    expected = [
        plain(name, merged(p, kept), merged(q, kept), 0.1, 0.5, 1.0)
        for p, q, kept in zip(teacher.tolist(), student.tolist(), ids.tolist(), strict=True)
    ]
    assert topk_divergence(name, log_probs, ids, student).tolist() == pytest.approx(expected, rel=1e-9)


@ALL
def test_topk_gradient_is_the_derivative(name):
    log_probs, ids = logits(29, 3, 9).log_softmax(-1).topk(4)
    student = logits(30, 3, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: topk_divergence(name, log_probs, ids, s), (student,))


def test_bad_arguments_raise():
    a, b = logits(31, 2, 5), logits(32, 2, 5)
    with pytest.raises(ValueError, match="unknown divergence 'kl'"):
        divergence("kl", a, b)
    for bad in ({"alpha": 1.0}, {"alpha": -0.1}, {"beta": 0.0}, {"beta": 1.0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            divergence("jsd", a, b, **bad)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="different shapes"):
        topk_divergence("jsd", a[:, :2], ids, b)
    with pytest.raises(ValueError, match="different positions"):
        topk_divergence("jsd", a[:1, :3], ids[:1], b)
    with pytest.raises(ValueError, match="larger than the vocabulary"):
        topk_divergence("jsd", a, torch.zeros(2, 5, dtype=torch.int64), b[:, :4])
