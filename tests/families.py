"""Tiny configurations of today's families, by `model_type`, as changes to one common set of values."""

from __future__ import annotations

from typing import Any

COMMON = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT = {
    "num_key_value_heads": 4, "head_dim": 8, "kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
GROUPED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
MAMBA = {
    "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 8, "mamba_d_head": 16,
    "mamba_n_groups": 1, "mamba_chunk_size": 16,
}  # fmt: skip
WINDOW = {"sliding_window": 8, "layer_types": ("sliding_attention", "full_attention")}
RECURRENT = {"layer_types": ("linear_attention", "full_attention")}

CHANGES: dict[str, dict[str, Any]] = {
    "smollm3": {},
    "gemma4_text": {**WINDOW, "global_head_dim": 32, "hidden_size_per_layer_input": 16},
    "gemma3n_text": {
        **WINDOW, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0, "laurel_rank": 8,
        "activation_sparsity_pattern": (0.0,), "intermediate_size": (128,),
    },
    "olmo2": {},
    "olmo3": WINDOW,
    "olmoe": EXPERTS,
    "ministral3": {},
    "qwen3_moe": EXPERTS,
    "qwen3_5_text": {**DELTA, **RECURRENT},
    "qwen3_5_moe_text": {**DELTA, **RECURRENT, **EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen3_next": {**DELTA, **RECURRENT, **EXPERTS, "shared_expert_intermediate_size": 64},
    "glm4": {},
    "glm4_moe": {**EXPERTS, **GROUPED},
    "granitemoehybrid": {**MAMBA, **RECURRENT, **EXPERTS, "shared_intermediate_size": 64, "logits_scaling": 4.0},
    "lfm2": {"layer_types": ("conv", "full_attention"), "conv_L_cache": 3, "block_multiple_of": 64},
    "lfm2_moe": {
        **EXPERTS, "layer_types": ("conv", "full_attention"), "conv_L_cache": 3, "num_dense_layers": 1,
    },
    "phimoe": EXPERTS,
    "mixtral": EXPERTS,
    "deepseek_v2": {**EXPERTS, **LATENT, **GROUPED},
    "deepseek_v3": {**EXPERTS, **LATENT, **GROUPED},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "bamba": {**MAMBA, "attn_layer_indices": (1,)},
    "nemotron_h": {
        **EXPERTS, "layers_block_type": ("mamba", "attention"), "ssm_state_size": 16, "mamba_num_heads": 8,
        "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 16,
    },
    "jamba": {
        **EXPERTS, "mamba_d_state": 16, "mamba_dt_rank": 8, "attn_layer_period": 2, "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "olmo_hybrid": {**DELTA, **RECURRENT},
    "gpt_oss": {**EXPERTS, **WINDOW},
    "llama4_text": {
        **EXPERTS, "intermediate_size_mlp": 128, "attention_chunk_size": 8,
        "layer_types": ("chunked_attention", "full_attention"),
    },
    "cohere2": WINDOW,
    "exaone4": WINDOW,
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "seed_oss": {},
    "apertus": {},
    "stablelm": {},
}  # fmt: skip
PER_LAYER = ("layer_types", "layers_block_type", "activation_sparsity_pattern")
"""Values that name each layer; their pattern is repeated over the layers."""


def family_config(model_type: str, *, layers: int, **changes: Any) -> Any:
    """A configuration of `layers` layers of a family; `changes` come last."""
    from transformers import AutoConfig

    values = {**COMMON, **CHANGES[model_type], "num_hidden_layers": layers}
    for key in PER_LAYER:
        if key in values:
            values[key] = [values[key][i % len(values[key])] for i in range(layers)]
    if "vocab_size" in changes and "hidden_size_per_layer_input" in values:
        values["vocab_size_per_layer_input"] = changes["vocab_size"]
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    if isinstance(values["intermediate_size"], list):
        values["intermediate_size"] = values["intermediate_size"] * layers
    return AutoConfig.for_model(model_type, **{**values, **changes})
