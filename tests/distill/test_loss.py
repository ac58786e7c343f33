"""The loss in chunks equals the loss of the whole, in value and in every gradient, and allocates only a chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qswitch.distill.logit_cache import LogitCache, Targets
from qswitch.distill.loss import (
    chunked_divergence,
    chunked_divergence_values,
    head_parameters,
    language_model_loss,
)
from qswitch.distill.sequence import TrainingSequence
from qswitch.divergence import divergence, topk_divergence
from qswitch.models.language_model import Head

N, D, V, ROWS = 11, 8, 20, 24  # the student's head has padding rows beyond the shared vocabulary
CHUNKS = [1, 3, N, N + 5]
OPTIONS: dict[str, Any] = {"name": "jsd", "alpha": 0.1, "beta": 0.3, "temperature": 1.5, "normalizer": 7.0}


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_head(kind: str, dtype: torch.dtype = torch.float64) -> Head:
    linear = nn.Linear(D, ROWS, bias=kind == "bias", dtype=dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(linear.parameters()):
            parameter.copy_(randn(seed + 1, *parameter.shape))
    linear.requires_grad_(kind != "frozen")
    return Head(linear, vocab_size=V, softcap=2.0 if kind == "softcap" else None)


def make_targets(dtype: torch.dtype = torch.float64, num: int = N) -> tuple[Targets, Tensor]:
    """Teacher targets of another width than the student's, and the logits they stand for."""
    hidden, weight = randn(50, num, 5, dtype=dtype), randn(51, V, 5, dtype=dtype)
    return Targets.from_hidden(hidden, lambda h: h @ weight.T), hidden @ weight.T


def whole(hidden: Tensor, head: nn.Module, teacher_logits: Tensor) -> Tensor:
    values = divergence("jsd", teacher_logits, head(hidden), alpha=0.1, beta=0.3, temperature=1.5)
    return values.sum() / OPTIONS["normalizer"]


def leaf(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return randn(seed, N, D, dtype=dtype).requires_grad_()


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within 1e-10 in fp64, within 1e-5 of the largest entry in fp32."""
    size = expected.abs().max().item()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5 * size
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["plain", "bias", "softcap", "frozen"])
@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_chunked_equals_whole(kind, chunk_tokens, dtype):
    head, (targets, teacher_logits) = make_head(kind, dtype), make_targets(dtype)
    hidden = leaf(3, dtype)
    inputs = [hidden, *(p for p in head_parameters(head) if p.requires_grad)]
    assert len(inputs) == {"plain": 2, "softcap": 2, "bias": 3, "frozen": 1}[kind]
    loss = chunked_divergence(hidden, head, targets, chunk_tokens=chunk_tokens, **OPTIONS)
    expected = whole(hidden, head, teacher_logits)
    assert loss.shape == () and loss.dtype == dtype
    assert_close(loss, expected, dtype)
    wanted = torch.autograd.grad(expected, inputs)
    for found, gradient in zip(torch.autograd.grad(loss, inputs), wanted, strict=True):
        assert gradient.abs().max() > 1e-4
        assert_close(found, gradient, dtype)


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_divergences_of_several_writers_are_each_taken_over_their_own_tokens(chunk_tokens):
    head, (targets, teacher_logits) = make_head("plain"), make_targets()
    hidden = leaf(3)
    inputs = [hidden, *head_parameters(head)]
    teacher_wrote = torch.tensor([i % 3 == 0 or i > N // 2 for i in range(N)])
    names = [("forward_kl", teacher_wrote), ("skew_reverse_kl", ~teacher_wrote)]
    loss = chunked_divergence(hidden, head, targets, chunk_tokens=chunk_tokens, **(OPTIONS | {"name": names}))
    p = (teacher_logits / OPTIONS["temperature"]).log_softmax(-1)
    q = (head(hidden) / OPTIONS["temperature"]).log_softmax(-1)
    alpha = OPTIONS["alpha"]
    mixture = ((1 - alpha) * p.exp() + alpha * q.exp()).log()
    direct = torch.where(teacher_wrote, (p.exp() * (p - q)).sum(-1), (q.exp() * (q - mixture)).sum(-1))
    direct = direct.sum() / OPTIONS["normalizer"]
    assert_close(loss, direct, torch.float64)
    for found, gradient in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(direct, inputs), strict=True):
        assert gradient.abs().max() > 1e-4
        assert_close(found, gradient, torch.float64)


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_a_tied_head_gathers_the_gradients_of_both_its_uses(chunk_tokens):
    targets, teacher_logits = make_targets()
    ids = torch.arange(N) % ROWS
    found = []
    for chunked in (True, False):
        embedding = nn.Embedding(ROWS, D, dtype=torch.float64)
        linear = nn.Linear(D, ROWS, bias=False, dtype=torch.float64)
        linear.weight = embedding.weight
        with torch.no_grad():
            embedding.weight.copy_(randn(4, ROWS, D))
        head = Head(linear, vocab_size=V)
        hidden = embedding(ids).tanh()
        loss = (
            chunked_divergence(hidden, head, targets, chunk_tokens=chunk_tokens, **OPTIONS)
            if chunked
            else whole(hidden, head, teacher_logits)
        )
        loss.backward()
        assert embedding.weight.grad is not None
        found.append(embedding.weight.grad)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-10)


def test_a_trainable_head_under_frozen_hidden_states():
    head, (targets, teacher_logits) = make_head("bias"), make_targets()
    hidden = randn(5, N, D)
    parameters = head_parameters(head)
    loss = chunked_divergence(hidden, head, targets, chunk_tokens=3, **OPTIONS)
    expected = torch.autograd.grad(whole(hidden, head, teacher_logits), parameters)
    for found, gradient in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-10)


class Allocations(TorchDispatchMode):
    """Sizes of tensors that operations made anew; views of their arguments are none."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves
        given = {t.untyped_storage().data_ptr() for t in leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.sizes.append(tensor.numel())
        return result


def test_a_frozen_head_gets_no_gradient_and_no_buffer():
    num, width, vocab_size, chunk = 40, 10, 64, 4
    hidden = randn(6, num, width).requires_grad_()
    weight, teacher = randn(8, vocab_size, 5), randn(9, num, 5)
    targets = Targets.from_hidden(teacher, lambda h: h @ weight.T)
    linear = nn.Linear(width, vocab_size, bias=False, dtype=torch.float64)
    head = Head(linear)
    largest = {}
    for frozen in (True, False):
        linear.requires_grad_(not frozen)
        with Allocations() as allocations:
            chunked_divergence(hidden, head, targets, chunk_tokens=chunk, **OPTIONS).backward()
        largest[frozen] = max(allocations.sizes)
        assert (linear.weight.grad is None) == frozen
    assert hidden.grad is not None
    assert largest[True] == num * width  # the gradient of the hidden states
    assert chunk * vocab_size < num * width < vocab_size * width < num * vocab_size
    assert largest[False] == vocab_size * width  # so a buffer would have been seen

    linear.requires_grad_(False)
    with Allocations() as allocations:  # and the logits of all positions would have been seen
        chunked_divergence(hidden, head, targets, chunk_tokens=num, **OPTIONS).backward()
    assert max(allocations.sizes) >= num * vocab_size


def test_parts_under_one_normalizer_add_up():
    head, (targets, teacher_logits) = make_head("plain"), make_targets()
    weight, teacher = randn(51, V, 5), randn(50, N, 5)
    hidden = leaf(10)
    total = torch.zeros((), dtype=torch.float64)
    for part in (slice(0, 2), slice(2, 9), slice(9, N)):
        some = Targets.from_hidden(teacher[part], lambda h: h @ weight.T)
        total = total + chunked_divergence(hidden[part], head, some, chunk_tokens=4, **OPTIONS)
    inputs = [hidden, *head_parameters(head)]
    expected = chunked_divergence(hidden, head, targets, chunk_tokens=4, **OPTIONS)
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(expected, inputs)
    for found, gradient in zip(torch.autograd.grad(total, inputs), wanted, strict=True):
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-12)
    twice = chunked_divergence(hidden, head, targets, chunk_tokens=4, **{**OPTIONS, "normalizer": 14.0})
    torch.testing.assert_close(twice * 2, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(expected, whole(hidden, head, teacher_logits), rtol=0, atol=1e-10)


def test_the_incoming_gradient_scales_every_gradient():
    head, (targets, _) = make_head("bias"), make_targets()
    hidden = leaf(11)
    inputs = [hidden, *head_parameters(head)]
    gradients = [
        torch.autograd.grad(
            chunked_divergence(hidden, head, targets, chunk_tokens=3, **OPTIONS),
            inputs,
            torch.tensor(scale, dtype=torch.float64),
        )
        for scale in (1.0, -2.5)
    ]
    for one, scaled in zip(*gradients, strict=True):
        torch.testing.assert_close(one * -2.5, scaled, rtol=0, atol=1e-12)


def test_gradcheck():
    head, (targets, _) = make_head("softcap"), make_targets(num=4)
    hidden = randn(12, 4, D).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h: chunked_divergence(h, head, targets, chunk_tokens=3, **OPTIONS), (hidden,)
    )


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_without_gradients(chunk_tokens):
    head, (targets, teacher_logits) = make_head("plain"), make_targets()
    hidden = leaf(13)
    with torch.no_grad():
        loss = chunked_divergence(hidden, head, targets, chunk_tokens=chunk_tokens, **OPTIONS)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, whole(hidden, head, teacher_logits).detach(), rtol=0, atol=1e-10)
    frozen = make_head("frozen")
    assert not chunked_divergence(hidden.detach(), frozen, targets, chunk_tokens=chunk_tokens, **OPTIONS).requires_grad

    values = chunked_divergence_values(
        hidden, head, targets, name="jsd", alpha=0.1, beta=0.3, temperature=1.5, chunk_tokens=chunk_tokens
    )
    expected = divergence("jsd", teacher_logits, head(hidden), alpha=0.1, beta=0.3, temperature=1.5)
    assert values.shape == (N,) and not values.requires_grad
    torch.testing.assert_close(values, expected.detach(), rtol=0, atol=1e-12)


def test_topk_targets_are_used_as_events():
    weight, teacher, head = randn(51, V, 5), randn(50, N, 5), make_head("plain")
    cache = LogitCache(
        "topk", head=lambda h: h @ weight.T, vocab_size=V, device=torch.device("cpu"), dtype=torch.float64,
        device_budget_bytes=1 << 20, host_budget_bytes=0, disk_path=None, topk=6,
    )  # fmt: skip
    sequences = [TrainingSequence(0, 0, [1], [2] * N, list(range(N)))]
    cache.put(sequences, teacher)
    hidden = leaf(14)
    options = {**OPTIONS, "temperature": 1.0}
    loss = chunked_divergence(hidden, head, cache.get(sequences), chunk_tokens=3, **options)
    log_probs, ids = (teacher @ weight.T).log_softmax(-1).topk(6)
    expected = topk_divergence("jsd", log_probs, ids, head(hidden), alpha=0.1, beta=0.3).sum() / 7.0
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    (found,), (wanted,) = torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_bad_arguments_raise():
    head, (targets, _) = make_head("plain"), make_targets()
    short = randn(15, N - 1, D)
    with pytest.raises(ValueError, match="10 student positions, but 11 teacher targets"):
        chunked_divergence(short, head, targets, chunk_tokens=3, **OPTIONS)
    with pytest.raises(ValueError, match="10 student positions, but 11 teacher targets"):
        chunked_divergence_values(short, head, targets, name="jsd", chunk_tokens=3)
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        chunked_divergence(leaf(15), head, targets, chunk_tokens=0, **OPTIONS)
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        language_model_loss(leaf(15), head, torch.zeros(N).long(), normalizer=1.0, chunk_tokens=0)
    with pytest.raises(ValueError):
        chunked_divergence_values(leaf(15), head, targets, name="jsd", chunk_tokens=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_language_model_loss_equals_cross_entropy(chunk_tokens, dtype):
    head, hidden, labels = make_head("bias", dtype), leaf(16, dtype), torch.arange(N) * 7 % V
    inputs = [hidden, *head_parameters(head)]
    loss = language_model_loss(hidden, head, labels, normalizer=float(N), chunk_tokens=chunk_tokens)
    expected = nn.functional.cross_entropy(head(hidden), labels)
    assert_close(loss, expected, dtype)
    wanted = torch.autograd.grad(expected, inputs)
    for found, gradient in zip(torch.autograd.grad(loss, inputs), wanted, strict=True):
        assert_close(found, gradient, dtype)
