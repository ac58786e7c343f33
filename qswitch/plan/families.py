"""The shape of a model from its config.json values alone, for the families that are written out here. Cold.

Parameter counts are exact: tests/plan/test_shape_table.py compares them with the transformers classes. Other families
are counted in their classes, which costs an import of torch (`counted.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qswitch.errors import ConfigError
from qswitch.plan.shapes import LinearShape, ModelShape
from qswitch.plan.stored import stored_quantisation


class _Values:
    """config.json values with the aliases of a family; a missing one is named in the error."""

    def __init__(self, values: Mapping[str, Any], model_type: str) -> None:
        self._values, self._model_type = values, model_type

    def __call__(self, *names: str) -> int:
        for name in names:
            if self._values.get(name) is not None:
                value = self._values[name]
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise ConfigError(f"shape.{name} = {value!r}: expected a whole number of at least 1.")
                return value
        raise ConfigError(f"The shape of a {self._model_type} model needs {names[0]}. Copy it from its config.json.")

    def optional(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        return default if value is None else value


def _llama_like(values: _Values, model_type: str) -> ModelShape:
    """llama, mistral, qwen2, qwen3, gemma2, gemma3_text, phi3, smollm3, olmo2: rotary, RMS norms, gated MLP."""
    gemma = model_type.startswith("gemma")
    hidden, inter = values("hidden_size"), values("intermediate_size")
    heads = values("num_attention_heads")
    # Old files omit num_key_value_heads where every head has its own keys; transformers reads them the same way.
    kv_heads = values.optional("num_key_value_heads", heads)
    # Defaults of the transformers configuration classes: 256 for Gemma, 128 for Qwen3, else hidden / heads.
    head_dim = values.optional("head_dim", 256 if gemma else 128 if model_type == "qwen3" else hidden // heads)
    vocab, layers = values("vocab_size"), values("num_hidden_layers")
    q_width, kv_width = heads * head_dim, kv_heads * head_dim
    linears: tuple[LinearShape, ...]
    if model_type == "phi3":
        linears = (
            LinearShape("qkv_proj", hidden, q_width + 2 * kv_width),
            LinearShape("o_proj", q_width, hidden),
            LinearShape("gate_up_proj", hidden, 2 * inter),
            LinearShape("down_proj", inter, hidden),
        )
    else:
        attention_bias = bool(values.optional("attention_bias", False)) and model_type != "mistral"
        qkv_bias = model_type == "qwen2" or attention_bias
        out_bias = attention_bias and model_type != "qwen2"
        mlp_bias = bool(values.optional("mlp_bias", False)) and model_type == "llama"
        linears = (
            LinearShape("q_proj", hidden, q_width, qkv_bias),
            LinearShape("k_proj", hidden, kv_width, qkv_bias),
            LinearShape("v_proj", hidden, kv_width, qkv_bias),
            LinearShape("o_proj", q_width, hidden, out_bias),
            LinearShape("gate_proj", hidden, inter, mlp_bias),
            LinearShape("up_proj", hidden, inter, mlp_bias),
            LinearShape("down_proj", inter, hidden, mlp_bias),
        )
    num_norms = 4 if gemma else 2
    head_norms = 2 * head_dim if model_type in ("qwen3", "gemma3_text") else 0
    if model_type == "olmo2":  # norms over all heads at once
        head_norms = q_width + kv_width
    tied = bool(values.optional("tie_word_embeddings", gemma or model_type == "smollm3"))
    return ModelShape(
        model_type=model_type,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=inter,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        layer_linears=linears,
        layer_norm_parameters=num_norms * hidden + head_norms,
        outer_linears=(),
        embedding_parameters=vocab * hidden,
        position_parameters=0,
        final_norm_parameters=hidden,
        head_parameters=0 if tied else vocab * hidden,
        tied=tied,
        gated_mlp=True,
        saved_mlp_tensors=3,
        rms_norm=True,
        num_layer_norms=num_norms,
        eager_attention=model_type == "gemma2",
        max_positions=values.optional("max_position_embeddings", 0),
    )


def _saved_by(activation: str) -> int:
    """An MLP's activation saves its input and its result; gelu_new, written out in Python, its factors as well."""
    return 4 if activation == "gelu_new" else 2


def _gpt2(values: _Values, model_type: str) -> ModelShape:
    hidden = values("n_embd", "hidden_size")
    heads, layers = values("n_head", "num_attention_heads"), values("n_layer", "num_hidden_layers")
    inter = values.optional("n_inner", 4 * hidden)
    positions = values("n_positions", "max_position_embeddings", "n_ctx")
    vocab = values("vocab_size")
    tied = bool(values.optional("tie_word_embeddings", True))
    linears = (
        LinearShape("c_attn", hidden, 3 * hidden, True),
        LinearShape("c_proj", hidden, hidden, True),
        LinearShape("c_fc", hidden, inter, True),
        LinearShape("c_proj", inter, hidden, True),
    )
    return ModelShape(
        model_type=model_type,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=inter,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        vocab_size=vocab,
        layer_linears=linears,
        layer_norm_parameters=4 * hidden,
        outer_linears=(),
        embedding_parameters=vocab * hidden,
        position_parameters=positions * hidden,
        final_norm_parameters=2 * hidden,
        head_parameters=0 if tied else vocab * hidden,
        tied=tied,
        gated_mlp=False,
        saved_mlp_tensors=_saved_by(values.optional("activation_function", "gelu_new")),
        rms_norm=False,
        num_layer_norms=2,
        max_positions=positions,
    )


def _opt(values: _Values, model_type: str) -> ModelShape:
    hidden, inter = values("hidden_size"), values("ffn_dim", "intermediate_size")
    heads, layers, vocab = values("num_attention_heads"), values("num_hidden_layers"), values("vocab_size")
    embed = values.optional("word_embed_proj_dim", hidden)
    positions = values("max_position_embeddings")
    bias = bool(values.optional("enable_bias", True))
    norm = 2 * hidden if values.optional("layer_norm_elementwise_affine", True) else 0
    final_norm = values.optional("do_layer_norm_before", True) and not values.optional(
        "_remove_final_layer_norm", False
    )
    tied = bool(values.optional("tie_word_embeddings", True))
    linears = (
        LinearShape("k_proj", hidden, hidden, bias),
        LinearShape("v_proj", hidden, hidden, bias),
        LinearShape("q_proj", hidden, hidden, bias),
        LinearShape("out_proj", hidden, hidden, bias),
        LinearShape("fc1", hidden, inter, bias),
        LinearShape("fc2", inter, hidden, bias),
    )
    outer = (
        () if embed == hidden else (LinearShape("project_out", hidden, embed), LinearShape("project_in", embed, hidden))
    )
    # The two extra rows are OPT's offset for padding (OPTLearnedPositionalEmbedding).
    return ModelShape(
        model_type=model_type,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=inter,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        vocab_size=vocab,
        layer_linears=linears,
        layer_norm_parameters=2 * norm,
        outer_linears=outer,
        embedding_parameters=vocab * embed,
        position_parameters=(positions + 2) * hidden,
        final_norm_parameters=norm if final_norm else 0,
        head_parameters=0 if tied else vocab * embed,
        tied=tied,
        gated_mlp=False,
        saved_mlp_tensors=_saved_by(values.optional("activation_function", "relu")),
        rms_norm=False,
        num_layer_norms=2,
        max_positions=positions,
    )


def _phi(values: _Values, model_type: str) -> ModelShape:
    hidden, inter = values("hidden_size"), values("intermediate_size")
    heads, layers, vocab = values("num_attention_heads"), values("num_hidden_layers"), values("vocab_size")
    kv_heads = values.optional("num_key_value_heads", heads)
    head_dim = values.optional("head_dim", hidden // heads)
    tied = bool(values.optional("tie_word_embeddings", False))
    linears = (
        LinearShape("q_proj", hidden, heads * head_dim, True),
        LinearShape("k_proj", hidden, kv_heads * head_dim, True),
        LinearShape("v_proj", hidden, kv_heads * head_dim, True),
        LinearShape("dense", heads * head_dim, hidden, True),
        LinearShape("fc1", hidden, inter, True),
        LinearShape("fc2", inter, hidden, True),
    )
    # Phi's optional query and key norms run over hidden // num_heads, weight and bias each.
    head_norms = 4 * (hidden // heads) if values.optional("qk_layernorm", False) else 0
    return ModelShape(
        model_type=model_type,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=inter,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        layer_linears=linears,
        layer_norm_parameters=2 * hidden + head_norms,
        outer_linears=(),
        embedding_parameters=vocab * hidden,
        position_parameters=0,
        final_norm_parameters=2 * hidden,
        head_parameters=vocab + (0 if tied else vocab * hidden),
        tied=tied,
        gated_mlp=False,
        saved_mlp_tensors=_saved_by(values.optional("hidden_act", "gelu_new")),
        rms_norm=False,
        num_layer_norms=1,
        max_positions=values.optional("max_position_embeddings", 0),
    )


def _qwen3_5(values: _Values, model_type: str) -> ModelShape:
    """Three of four layers are a gated delta rule, which keeps one state a row instead of keys and values."""
    hidden, inter, vocab = values("hidden_size"), values("intermediate_size"), values("vocab_size")
    heads, kv_heads = values("num_attention_heads"), values("num_key_value_heads")
    head_dim, num_layers = values.optional("head_dim", 256), values("num_hidden_layers")
    # Defaults of the transformers configuration class.
    key_heads, value_heads = values.optional("linear_num_key_heads", 16), values.optional("linear_num_value_heads", 32)
    key_dim, value_dim = values.optional("linear_key_head_dim", 128), values.optional("linear_value_head_dim", 128)
    kernel, interval = values.optional("linear_conv_kernel_dim", 4), values.optional("full_attention_interval", 4)
    kinds = values.optional("layer_types", None) or [
        "linear_attention" if (i + 1) % interval else "full_attention" for i in range(num_layers)
    ]
    recurrent = [kind == "linear_attention" for kind in kinds]
    bias = bool(values.optional("attention_bias", False))
    mlp = (
        LinearShape("gate_proj", hidden, inter),
        LinearShape("up_proj", hidden, inter),
        LinearShape("down_proj", inter, hidden),
    )
    mixed, value_width = 2 * key_heads * key_dim + value_heads * value_dim, value_heads * value_dim
    delta = (
        LinearShape("out_proj", value_width, hidden),
        LinearShape("in_proj_qkv", hidden, mixed),
        LinearShape("in_proj_z", hidden, value_width),
        LinearShape("in_proj_b", hidden, value_heads),
        LinearShape("in_proj_a", hidden, value_heads),
        *mlp,
    )
    # The query projection gives the output's gate too.
    attention = (
        LinearShape("q_proj", hidden, 2 * heads * head_dim, bias),
        LinearShape("k_proj", hidden, kv_heads * head_dim, bias),
        LinearShape("v_proj", hidden, kv_heads * head_dim, bias),
        LinearShape("o_proj", heads * head_dim, hidden, bias),
        *mlp,
    )
    delta_further = mixed * kernel + 2 * value_heads + value_dim + 2 * hidden
    attention_further = 2 * head_dim + 2 * hidden
    # transformers keeps the state of the rule in fp32 and that of the convolution as the model computes.
    state_bytes = value_heads * key_dim * value_dim * 4
    tied = bool(values.optional("tie_word_embeddings", False))
    return ModelShape(
        model_type=model_type,
        num_layers=num_layers,
        hidden_size=hidden,
        intermediate_size=inter,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        layer_linears=delta if recurrent[0] else attention,
        layer_norm_parameters=0,
        outer_linears=(),
        embedding_parameters=vocab * hidden,
        position_parameters=0,
        final_norm_parameters=hidden,
        head_parameters=0 if tied else vocab * hidden,
        tied=tied,
        gated_mlp=True,
        saved_mlp_tensors=3,
        rms_norm=True,
        num_layer_norms=2,
        max_positions=values.optional("max_position_embeddings", 0),
        unequal_layers=tuple(delta if is_state else attention for is_state in recurrent),
        further_by_layer=tuple(delta_further if is_state else attention_further for is_state in recurrent),
        largest_further_tensor=mixed * kernel,
        cached_widths=tuple(0 if is_state else 2 * kv_heads * head_dim for is_state in recurrent),
        state_bytes_per_row=sum(recurrent) * state_bytes,
        state_values_per_row=sum(recurrent) * mixed * kernel,
    )


def _gemma4(values: _Values, model_type: str) -> ModelShape:
    """Inputs of every layer beside the embedding; wider heads in layers without a window; last layers that read the
    keys and values of earlier ones, and may have a wider MLP."""
    hidden, inter, vocab = values("hidden_size"), values("intermediate_size"), values("vocab_size")
    heads, kv_heads = values("num_attention_heads"), values("num_key_value_heads")
    num_layers, shared = values("num_hidden_layers"), values.optional("num_kv_shared_layers", 0)
    # Defaults of the transformers configuration class.
    beside, tied = values.optional("hidden_size_per_layer_input", 256), values.optional("tie_word_embeddings", True)
    beside_vocab = values.optional("vocab_size_per_layer_input", 262_144)
    dims = {"sliding_attention": values.optional("head_dim", 256),
            "full_attention": values.optional("global_head_dim", 512)}  # fmt: skip
    wide, bias = bool(values.optional("use_double_wide_mlp", False)), bool(values.optional("attention_bias", False))
    same = bool(values.optional("attention_k_eq_v", False))
    kinds = values.optional("layer_types", None) or [
        "sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(num_layers)
    ]
    # As transformers saves it; as it is published, the layers without a window have values of their own.
    written = values.optional("per_layer_config", None)
    layers: list[tuple[LinearShape, ...]] = []
    further: list[int] = []
    cached: list[int] = []
    for index, kind in enumerate(kinds):
        own, full = index < num_layers - shared, kind == "full_attention"
        differs = (written or {}).get(str(index)) or {}
        dim = differs.get("head_dim") or dims["sliding_attention" if written else kind]
        groups = differs.get("num_key_value_heads") or kv_heads
        if full and same and not written:
            groups = values.optional("num_global_key_value_heads", None) or kv_heads
        width = inter * (2 if wide and not own else 1)
        keys = [LinearShape("k_proj", hidden, groups * dim, bias)] if own else []
        keys += [LinearShape("v_proj", hidden, groups * dim, bias)] if own and not (full and same) else []
        inputs = (
            LinearShape("per_layer_input_gate", hidden, beside),
            LinearShape("per_layer_projection", beside, hidden),
        )
        layers.append(
            (
                LinearShape("q_proj", hidden, heads * dim, bias),
                *keys,
                LinearShape("o_proj", heads * dim, hidden, bias),
                LinearShape("gate_proj", hidden, width),
                LinearShape("up_proj", hidden, width),
                LinearShape("down_proj", width, hidden),
                *(inputs if beside else ()),
            )
        )
        further.append((2 if own else 1) * dim + (5 if beside else 4) * hidden)
        cached.append(2 * groups * dim if own else 0)
    projection = LinearShape("per_layer_model_projection", hidden, num_layers * beside)
    return ModelShape(
        model_type=model_type,
        num_layers=num_layers,
        hidden_size=hidden,
        intermediate_size=inter * (2 if wide and shared else 1),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dims["sliding_attention"],
        vocab_size=vocab,
        layer_linears=layers[0],
        layer_norm_parameters=0,
        outer_linears=(projection,) if beside else (),
        embedding_parameters=vocab * hidden,
        position_parameters=0,
        final_norm_parameters=hidden,
        head_parameters=0 if tied else vocab * hidden,
        tied=bool(tied),
        gated_mlp=True,
        saved_mlp_tensors=3,
        rms_norm=True,
        num_layer_norms=5 if beside else 4,
        max_positions=values.optional("max_position_embeddings", 0),
        unequal_layers=tuple(layers),
        further_by_layer=tuple(further),
        further_parameters=beside_vocab * num_layers * beside + beside if beside else 0,
        largest_further_tensor=beside_vocab * num_layers * beside,
        cached_widths=tuple(cached),
    )


FAMILIES = {
    "llama": _llama_like,
    "mistral": _llama_like,
    "qwen2": _llama_like,
    "qwen3": _llama_like,
    "gemma2": _llama_like,
    "gemma3_text": _llama_like,
    "phi3": _llama_like,
    "smollm3": _llama_like,
    "olmo2": _llama_like,
    "ministral3": _llama_like,
    "qwen3_5_text": _qwen3_5,
    "gemma4_text": _gemma4,
    "phi": _phi,
    "gpt2": _gpt2,
    "opt": _opt,
}


TIED_AS_A_WHOLE = ("mistral3", "gemma3", "gemma4")
"""Models with further towers, of which the whole says whether the head is tied, and not the text; it is, by default."""


def shape_from_config(values: Mapping[str, Any], trust_remote_code: bool = False) -> ModelShape:
    """The shape that config.json values describe: from the table, else counted in the transformers class.

    `text_config` is used where a model has several towers and the table knows its family.

    Raises:
        ConfigError: a value is missing, or the model is none that can be trained here, with the reason.
    """
    stored = stored_quantisation(values)
    tower = values["text_config"] if isinstance(values.get("text_config"), Mapping) else values
    if tower is not values and values.get("model_type") in TIED_AS_A_WHOLE:
        tower = {**tower, "tie_word_embeddings": values.get("tie_word_embeddings", True)}
    model_type = tower.get("model_type")
    if model_type in FAMILIES and not tower.get("enable_moe_block"):
        return replace(FAMILIES[model_type](_Values(tower, model_type), model_type), stored=stored)
    from qswitch.plan.counted import counted_shape

    return replace(counted_shape(values, trust_remote_code), stored=stored)
