"""The head applied to the hidden state is the model's own output, whatever the architecture."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from qswitch.errors import ModelError
from qswitch.models.language_model import LanguageModel, verify_head, weights_cast_once
from tests.tiny import ARCHITECTURES, tiny_model

EVERY = (*ARCHITECTURES, "cohere", "granite", "phi")


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two rows of 12 tokens, the second left-padded by 4."""
    ids = torch.randint(4, 70, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    ids[1, :4] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp_min(0)


@pytest.mark.parametrize("arch", EVERY)
@torch.no_grad()
def test_head_of_hidden_equals_the_models_logits(arch):
    hf = tiny_model(arch)
    model = LanguageModel(hf, vocab_size=70)
    ids, mask, positions = batch()
    hidden = model.hidden(ids, mask, positions)
    expected = hf(input_ids=ids, attention_mask=mask, position_ids=positions).logits[..., :70]
    kept = mask.bool()
    torch.testing.assert_close(model.logits(hidden)[kept], expected[kept], atol=1e-5, rtol=1e-5)
    verify_head(model)


@pytest.mark.parametrize("arch", EVERY)
@torch.no_grad()
def test_cached_passes_equal_one_pass(arch):
    from transformers import DynamicCache

    model = LanguageModel(tiny_model(arch))
    ids, mask, positions = batch()
    whole = model.hidden(ids[:1], mask[:1], positions[:1])
    cache = DynamicCache(config=model.config)
    parts = [model.hidden(ids[:1, i : i + 4], mask[:1, : i + 4], positions[:1, i : i + 4], cache) for i in (0, 4, 8)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-4)


def test_the_head_registers_no_parameter_twice():
    hf = tiny_model("gpt2")
    model = LanguageModel(hf)
    assert set(model.state_dict()) == {f"hf.{name}" for name in hf.state_dict()}
    assert sum(p.numel() for p in model.parameters()) == hf.num_parameters()
    assert model.head.linear.weight is hf.get_input_embeddings().weight


def test_wrapping_leaves_the_mode_of_the_model():
    model = LanguageModel(tiny_model("gpt2").eval())
    assert not model.training
    verify_head(model)
    assert not any(module.training for module in model.modules())


def test_an_unknown_logit_transform_is_refused_by_architecture():
    hf = tiny_model("cohere")
    hf.config.logit_scale = 1.0  # the wrapper now knows nothing of the 0.25 that the model still applies
    with pytest.raises(ModelError, match="CohereForCausalLM"):
        verify_head(LanguageModel(hf))


def test_weights_that_hold_nan_are_named_as_such():
    hf = tiny_model("llama")
    with torch.no_grad():
        hf.get_output_embeddings().weight[3, 0] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        verify_head(LanguageModel(hf))


def test_an_encoder_is_refused():
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(vocab_size=75, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    hf = BertLMHeadModel(config).eval()
    with pytest.raises(ModelError, match="BertLMHeadModel"):
        verify_head(LanguageModel(hf))


def test_eos_ids_come_from_the_generation_config():
    hf = tiny_model()
    hf.generation_config.eos_token_id = [2, 7]
    assert LanguageModel(hf).generation_eos_ids == (2, 7)
    hf.generation_config.eos_token_id = None
    assert LanguageModel(hf).generation_eos_ids == (2,)


def test_a_vocabulary_larger_than_the_head_is_refused():
    with pytest.raises(ModelError, match="only 75 rows"):
        LanguageModel(tiny_model(), vocab_size=76)


def test_bf16_arithmetic_over_fp32_weights_runs_under_autocast():
    model = LanguageModel(tiny_model(), compute_dtype=torch.bfloat16)
    hidden = model.hidden(*batch())
    assert hidden.dtype == torch.bfloat16
    assert model.logits(hidden).dtype == torch.bfloat16
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])
def test_weights_that_are_cast_once_give_the_same_states_and_come_back(arch):
    """qwen2 and gpt2 tie their head to the embedding, whose own rows must stay in fp32."""
    model = LanguageModel(tiny_model(arch), compute_dtype=torch.bfloat16).eval()
    ids, before = torch.arange(12)[None], dict(model.hf.named_parameters())
    casts: list[int] = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
                casts[-1] += args[0].numel()
            return func(*args, **(kwargs or {}))

    def states() -> torch.Tensor:
        casts.append(0)
        with torch.no_grad(), Casts():
            return model.logits(model.hidden(ids))

    usual = states()
    with weights_cast_once(model):
        assert torch.equal(states(), usual)
    assert all(p is before[n] for n, p in model.hf.named_parameters()), "nothing is left behind"
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D))
    assert casts[0] - casts[1] >= weights
    frozen = LanguageModel(tiny_model(arch).requires_grad_(False), compute_dtype=torch.bfloat16)
    with weights_cast_once(frozen):
        assert frozen.head.linear.weight.dtype == torch.float32, "planned for students that train every weight only"
