"""The chunked loss on the heads that models really have, against dense autograd through the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.live_bytes import LiveBytes
from qswitch.config import LoraSection
from qswitch.distill.logit_cache import LogitCache, Targets
from qswitch.distill.loss import chunked_divergence
from qswitch.distill.sequence import TrainingSequence
from qswitch.divergence import divergence
from qswitch.errors import ModelError
from qswitch.models.language_model import Head, LanguageModel
from qswitch.models.student import attach_lora
from tests.tiny import tiny_model

IDS = torch.arange(36).reshape(3, 12) % 60
NAME = "skew_reverse_kl"


def student(kind: str) -> LanguageModel:
    if kind == "tied, trained":
        return LanguageModel(tiny_model("gpt2", dtype=torch.float64))
    if kind == "untied, trained":
        return LanguageModel(tiny_model("llama", dtype=torch.float64), vocab_size=70)
    if kind == "soft-capped, tied, trained":
        return LanguageModel(tiny_model("gemma2", dtype=torch.float64))
    hf = tiny_model({"frozen": "llama", "scaled": "cohere"}.get(kind, "llama"), dtype=torch.float64)
    hf.requires_grad_(False)
    targets = ["q_proj", "lm_head"] if kind == "adapted" else ["q_proj"]
    saved = ["lm_head"] if kind == "saved with the adapter" else []
    lora = LoraSection(r=3, target_modules=targets, modules_to_save=saved, init_lora_weights="gaussian")
    adapted = attach_lora(hf, lora, seed=1, dtype=torch.float64)
    with torch.no_grad():  # lora_B starts at 0, where the gradient of lora_A is 0 too
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    return LanguageModel(adapted)


KINDS = ("tied, trained", "untied, trained", "soft-capped, tied, trained", "frozen", "scaled", "adapted",
         "saved with the adapter")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_equals_dense_autograd(kind):
    model = student(kind).eval()
    teacher = torch.randn(36, model.vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 3
    parameters = {n: p for n, p in model.hf.named_parameters() if p.requires_grad}

    def gradients(loss: Tensor) -> dict[str, Tensor | None]:
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return dict(zip(parameters, found, strict=True))

    dense = divergence(NAME, teacher, model.logits(model.hidden(IDS).flatten(0, 1)), alpha=0.1).sum() / 36
    expected = gradients(dense)
    chunked = chunked_divergence(
        model.hidden(IDS).flatten(0, 1), model.head, Targets.from_hidden(teacher, lambda t: t), name=NAME, alpha=0.1,
        beta=0.5, temperature=1.0, normalizer=36.0, chunk_tokens=7,
    )  # fmt: skip
    torch.testing.assert_close(chunked, dense, rtol=1e-12, atol=0)
    found = gradients(chunked)
    assert any(g is not None and g.abs().max() > 1e-6 for g in expected.values())
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12, msg=name)


def test_an_adapter_on_a_tied_head_is_refused():
    hf = tiny_model("gpt2").requires_grad_(False)
    with pytest.raises(ModelError, match="tied to its input embedding"):
        attach_lora(hf, LoraSection(target_modules=["c_attn", "lm_head"]), seed=0)


def test_a_quantised_head_passes_its_gradient_on():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(64, 96, bias=False)
    linear = bnb.nn.Linear4bit(64, 96, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    linear.load_state_dict(plain.state_dict())
    linear = linear.to("cpu").requires_grad_(False)
    linear.support_avx512bf16_for_cpu = False
    weight = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()
    teacher, hidden = torch.randn(20, 96) * 2, torch.randn(20, 64).requires_grad_()
    loss = chunked_divergence(
        hidden, Head(linear), Targets.from_hidden(teacher, lambda t: t), name=NAME, alpha=0.1, beta=0.5,
        temperature=1.0, normalizer=20.0, chunk_tokens=6,
    )  # fmt: skip
    expected = divergence(NAME, teacher, hidden @ weight.T, alpha=0.1).sum() / 20
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    wanted, = torch.autograd.grad(expected, hidden)  # fmt: skip
    found, = torch.autograd.grad(loss, hidden)  # fmt: skip
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_a_second_derivative_is_refused():
    """The gradient is taken in the forward pass: differentiating it again would silently give zero."""
    head, hidden = nn.Linear(4, 9).requires_grad_(False), torch.randn(5, 4).requires_grad_()
    loss = chunked_divergence(
        hidden, head, Targets.from_hidden(torch.randn(5, 9), lambda t: t), name=NAME, alpha=0.1, beta=0.5,
        temperature=1.0, normalizer=5.0, chunk_tokens=2,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss * loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("format", ["hidden", "topk"])
@pytest.mark.parametrize("trained", [False, True])
def test_no_tensor_of_all_logits_and_no_gradient_buffer_of_a_frozen_head(format, trained):
    positions, chunk, width, vocab = 192, 8, 16, 512
    torch.manual_seed(1)
    head = nn.Linear(width, vocab, bias=False).requires_grad_(trained)
    teacher_head = nn.Linear(width, vocab, bias=False).requires_grad_(False)
    hidden, teacher_hidden = torch.randn(positions, width).requires_grad_(), torch.randn(positions, width)
    cache = LogitCache(
        format, head=teacher_head, vocab_size=vocab, device=hidden.device, dtype=torch.float32,
        device_budget_bytes=1 << 30, host_budget_bytes=0, disk_path=None,
    )  # fmt: skip
    sequences = [TrainingSequence(0, 0, [1], [2] * positions, list(range(positions)))]
    cache.put(sequences, teacher_hidden)
    with LiveBytes() as mode:
        loss: Any = chunked_divergence(
            hidden, head, cache.get(sequences), name=NAME, alpha=0.1, beta=0.5, temperature=1.0,
            normalizer=float(positions), chunk_tokens=chunk,
        )  # fmt: skip
        loss.backward()
    head_bytes = vocab * width * 4
    chunk_bytes = chunk * vocab * 4
    assert head_bytes > chunk_bytes  # so that the largest tensor tells which one it is
    assert mode.largest_bytes == (head_bytes if trained else chunk_bytes)
    assert mode.peak_bytes < positions * vocab * 4
