import math

import pytest

from qswitch.config import TeacherSection
from qswitch.errors import ConfigError
from qswitch.plan.families import shape_from_config
from qswitch.plan.model_files import shape_for

BASE = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
WITHOUT_GROUPS = {key: BASE[key] for key in BASE if key not in ("intermediate_size", "num_key_value_heads")}
"""For OPT, which has neither of the two under these names; transformers before 5.23 would keep them nevertheless."""

CONFIGS = {
    "llama": {"model_type": "llama", **BASE},
    "llama-bias": {"model_type": "llama", **BASE, "attention_bias": True, "mlp_bias": True},
    "smollm2": {"model_type": "llama", **BASE, "tie_word_embeddings": True},
    "llama-2 without num_key_value_heads": {"model_type": "llama", **BASE, "num_key_value_heads": None},
    "mistral": {"model_type": "mistral", **BASE, "head_dim": 32},
    "qwen2": {"model_type": "qwen2", **BASE},
    "qwen3": {"model_type": "qwen3", **BASE, "head_dim": 32},
    "gemma2": {"model_type": "gemma2", **BASE, "head_dim": 32},
    "gemma3": {"model_type": "gemma3_text", **BASE, "head_dim": 32},
    "phi3": {"model_type": "phi3", **BASE, "pad_token_id": 0},
    "phi": {"model_type": "phi", **BASE},
    "phi-qk": {"model_type": "phi", **BASE, "qk_layernorm": True},
    "gpt2": {"model_type": "gpt2", "vocab_size": 512, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "opt": {"model_type": "opt", **WITHOUT_GROUPS, "ffn_dim": 256, "word_embed_proj_dim": 64},
    "opt-350m": {
        "model_type": "opt",
        **WITHOUT_GROUPS,
        "ffn_dim": 256,
        "word_embed_proj_dim": 32,
        "do_layer_norm_before": False,
    },
    "qwen3.5": {
        "model_type": "qwen3_5_text",
        **BASE,
        "num_hidden_layers": 5,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 32,
    },
}
CONFIGS["ministral3"] = {"model_type": "ministral3", **BASE, "head_dim": 32}
GEMMA4 = {"model_type": "gemma4_text", **BASE, "num_hidden_layers": 6, "head_dim": 16, "global_head_dim": 32,
          "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512,
          "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}  # fmt: skip
CONFIGS["gemma4 small"] = {**GEMMA4, "num_kv_shared_layers": 3, "use_double_wide_mlp": True}
CONFIGS["gemma4 large"] = {**GEMMA4, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True,
                           "num_global_key_value_heads": 1, "num_attention_heads": 4}  # fmt: skip
EQUAL_LAYERS = [name for name in CONFIGS if not name.startswith(("qwen3.5", "gemma4"))]


def meta_model(values):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {k: v for k, v in values.items() if v is not None}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_equal_those_of_the_class_part_by_part(name):
    import torch
    from transformers.pytorch_utils import Conv1D

    model, shape = meta_model(CONFIGS[name]), shape_from_config(CONFIGS[name])
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head]
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert len(shape.linears) == len(linears)
    assert shape.linear_weight_parameters == sum(m.weight.numel() for m in linears)
    if name in EQUAL_LAYERS:
        norms = [m for m in model.modules() if type(m).__name__.endswith("Norm")]
        assert shape.norm_parameters == sum(p.numel() for m in norms for p in m.parameters())
    assert shape.tied == (head.weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize("name", CONFIGS)
def test_linear_names_and_sizes_are_those_of_the_class(name):
    import torch
    from transformers.pytorch_utils import Conv1D

    found = []
    for path, module in meta_model(CONFIGS[name]).named_modules():
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            found.append((path.rpartition(".")[2], module.in_features, module.out_features, module.bias is not None))
        elif isinstance(module, Conv1D):
            found.append((path.rpartition(".")[2], *module.weight.shape, True))
    expected = [(m.name, m.in_features, m.out_features, m.bias) for m in shape_from_config(CONFIGS[name]).linears]
    assert sorted(found) == sorted(expected)


def test_published_sizes():
    # config.json values of meta-llama/Llama-2-7b-hf, Llama-3.1-8B and Qwen/Qwen2.5-7B; their model cards say 6.74,
    # 8.03 and 7.62 billion parameters.
    llama2 = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
              "num_hidden_layers": 32, "num_attention_heads": 32}  # fmt: skip
    llama3 = {**llama2, "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}
    qwen = {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
            "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}  # fmt: skip
    for values, billions in ((llama2, 6.738), (llama3, 8.030), (qwen, 7.616)):
        assert math.isclose(shape_from_config(values).num_parameters / 1e9, billions, abs_tol=5e-4)


def test_a_tower_is_read_from_text_config():
    nested = {"model_type": "gemma3", "text_config": CONFIGS["gemma3"]}
    assert shape_from_config(nested) == shape_from_config(CONFIGS["gemma3"])


def test_bad_shapes_are_explained():
    with pytest.raises(ConfigError, match="past_key_values"):
        shape_from_config({"model_type": "mamba"})
    with pytest.raises(ConfigError, match="needs intermediate_size"):
        shape_from_config({k: v for k, v in CONFIGS["llama"].items() if k != "intermediate_size"})
    with pytest.raises(ConfigError, match=r"teacher\.shape\.vocab_size = -1"):
        shape_for(TeacherSection(model="a/b", shape={**CONFIGS["llama"], "vocab_size": -1}))
