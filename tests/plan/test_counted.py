"""Counted shapes equal the table's where there is one, and the class where there is none; and what is refused."""

from __future__ import annotations

import pytest
import torch

from qswitch.config import LoraSection
from qswitch.errors import ConfigError
from qswitch.plan import memory
from qswitch.plan.counted import counted_shape
from qswitch.plan.families import shape_from_config
from tests.plan.test_shape_table import BASE, CONFIGS, meta_model

# No table knows these: alternating windows, experts, linear attention, convolutions, and attention beside states.
OTHERS = {
    "smollm3": {**BASE, "pad_token_id": 0},
    "olmo3": {**BASE},
    "qwen3_moe": {**BASE, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 16},
    "qwen3_5_text": {**BASE, "num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2,
                     "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "lfm2": {**BASE, "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
}  # fmt: skip


def counted(name: str):
    return counted_shape({"model_type": name, **OTHERS[name]})


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_table_knows_is_counted_the_same(name):
    values = {key: value for key, value in CONFIGS[name].items() if value is not None}
    table, found = shape_from_config(values), counted_shape(values)
    for precision in ("nf4", "int8", "bf16", "fp32"):
        assert memory.weight_bytes(table, precision, 2) == memory.weight_bytes(found, precision, 2)
        assert memory.head_bytes(table, precision, 2) == memory.head_bytes(found, precision, 2)
    for lora in (LoraSection(r=8), LoraSection(target_modules=["q_proj", "c_fc"], layers_to_transform=[0, 2])):
        assert memory.lora_parameters(table, lora) == memory.lora_parameters(found, lora)
    assert memory.kv_cache_bytes(table, 3, 40, 2) == memory.kv_cache_bytes(found, 3, 40, 2)
    assert (table.tied, table.eager_attention) == (found.tied, found.eager_attention)
    assert table.kv_widths == found.kv_widths
    assert memory.state_bytes(table, 3, 4) == memory.state_bytes(found, 3, 4)
    assert table.largest_tensor_parameters == found.largest_tensor_parameters and not table.counted
    assert table.with_layers(2).num_parameters == found.with_layers(2).num_parameters


@pytest.mark.parametrize("name", OTHERS)
def test_parameters_and_caches_are_those_of_the_class(name):
    shape = counted(name)
    model = meta_model({"model_type": name, **OTHERS[name]})
    assert shape.counted and shape.num_parameters == sum(p.numel() for p in model.parameters())
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()]
    assert sorted(m.weight_parameters for m in shape.linears) == sorted(m.weight.numel() for m in linears)
    real = type(model)(model.config).to(torch.bfloat16)
    with torch.no_grad():
        cache = real(input_ids=torch.zeros(2, 11, dtype=torch.long), use_cache=True).past_key_values
    kept = states = 0
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            kept += 0 if tensor is None else tensor.numel()
        for by_index in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            states += sum(t.numel() * t.element_size() for t in by_index.values() if t is not None)
    assert 2 * 11 * sum(shape.kv_widths) == kept and memory.state_bytes(shape, 2, 2) == states
    assert bool(states) == (name in ("qwen3_5_text", "lfm2"))


def test_experts_count_as_what_a_token_passes_through():
    assert counted("qwen3_moe").intermediate_size == 2 * 32
    assert counted("smollm3").intermediate_size == 176


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2}, "it is an encoder"),
        ({"model_type": "vit"}, "no causal language model"),
        ({"model_type": "rwkv", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 99}, "past_key_values"),
        ({"model_type": "abacus"}, "does not know it"),
        ({}, "does not know it"),
        ({"model_type": "olmo3", **BASE, "num_attention_heads": 0}, "cannot be planned"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(values, reason):
    with pytest.raises(ConfigError, match=reason):
        counted_shape(values)
