"""How big is each tensor of a model, read from its config.json values alone.

Knows nothing of precisions, batches or devices (`memory.py`), and never opens weights. Parameter counts are exact for
the families listed in FAMILIES: tests/plan/test_shapes.py compares them with the transformers classes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qswitch.config import StudentSection, TeacherSection
from qswitch.errors import ConfigError
from qswitch.hub import HUB_ID, hub_cache, is_hub_id


@dataclass(frozen=True)
class LinearShape:
    """One linear module (or GPT-2 Conv1D); `name` is its last path component, as LoRA targets spell it."""

    name: str
    in_features: int
    out_features: int
    bias: bool = False

    @property
    def weight_parameters(self) -> int:
        return self.in_features * self.out_features

    @property
    def parameters(self) -> int:
        return self.weight_parameters + (self.out_features if self.bias else 0)


@dataclass(frozen=True)
class ModelShape:
    """The tensors of a decoder-only model: `num_layers` equal layers between an embedding and a head."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    layer_linears: tuple[LinearShape, ...]
    """Linear modules of one layer."""
    layer_norm_parameters: int
    """Norm weights and biases of one layer."""
    outer_linears: tuple[LinearShape, ...]
    """Linear modules outside the layers and the head (OPT's projections of narrow embeddings)."""
    embedding_parameters: int
    """Token embedding."""
    position_parameters: int
    """Learned positions; 0 with rotary positions."""
    final_norm_parameters: int
    head_parameters: int
    """Weights of an untied head, and its bias; a tied head's weights count once, as the embedding."""
    tied: bool
    gated_mlp: bool
    """Two parallel MLP inputs, act(gate) * up, as in Llama."""
    saved_mlp_tensors: int
    """Tensors of MLP width that one layer saves for its backward pass, the input of its last linear layer aside."""
    rms_norm: bool
    num_layer_norms: int
    """Norms over the full width in one layer."""
    eager_attention: bool = False
    """Scores are materialised (attention soft-cap), not fused."""
    max_positions: int = 0

    @cached_property
    def linears(self) -> tuple[LinearShape, ...]:
        """Every linear module but the head."""
        return self.layer_linears * self.num_layers + self.outer_linears

    @cached_property
    def linear_weight_parameters(self) -> int:
        return sum(m.weight_parameters for m in self.linears)

    @property
    def norm_parameters(self) -> int:
        return self.layer_norm_parameters * self.num_layers + self.final_norm_parameters

    @cached_property
    def num_parameters(self) -> int:
        """All parameters, tied ones once."""
        return sum(m.parameters for m in self.linears) + self.other_parameters

    @property
    def other_parameters(self) -> int:
        """Parameters outside the linear modules that a quantiser converts: embeddings, positions, norms, head."""
        return self.embedding_parameters + self.position_parameters + self.norm_parameters + self.head_parameters

    @cached_property
    def largest_linear_parameters(self) -> int:
        return max(m.weight_parameters for m in (*self.layer_linears, *self.outer_linears))

    @property
    def largest_tensor_parameters(self) -> int:
        return max(self.largest_linear_parameters, self.embedding_parameters)

    @property
    def attention_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    def with_layers(self, num_layers: int) -> ModelShape:
        """The same model cut to `num_layers` layers."""
        return replace(self, num_layers=num_layers)


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
    """llama, mistral, qwen2, qwen3, gemma2, gemma3_text, phi3: rotary positions, RMS norms, gated MLP."""
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
    tied = bool(values.optional("tie_word_embeddings", gemma))
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


FAMILIES = {
    "llama": _llama_like,
    "mistral": _llama_like,
    "qwen2": _llama_like,
    "qwen3": _llama_like,
    "gemma2": _llama_like,
    "gemma3_text": _llama_like,
    "phi3": _llama_like,
    "phi": _phi,
    "gpt2": _gpt2,
    "opt": _opt,
}


def shape_from_config(values: Mapping[str, Any]) -> ModelShape:
    """The shape that config.json values describe; `text_config` is used where a model has several towers.

    Raises:
        ConfigError: the family is unknown, or a value is missing.
    """
    if isinstance(values.get("text_config"), Mapping):
        values = values["text_config"]
    model_type = values.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(
            f"Memory cannot be planned for model_type {model_type!r}. Known: {', '.join(sorted(FAMILIES))}; for an "
            "architecture with the same layers, give teacher.shape or student.shape with one of these as model_type."
        )
    return FAMILIES[model_type](_Values(values, model_type), model_type)


def shape_for(section: TeacherSection | StudentSection) -> ModelShape:
    """The shape of a model section: config.json of a local folder or of the hub cache, else its `shape` block.

    The file is the model, a block only describes it, so the file comes first; the block stands in for families that the
    planner does not know. With neither, config.json (a few KB, nothing else) is asked of the hub. A student with
    shrink_to_layers is returned after the cut.

    Raises:
        ConfigError: no configuration is at hand, or it describes an unknown family; or shrink_to_layers does not cut.
    """
    role = "student" if isinstance(section, StudentSection) else "teacher"
    try:
        shape = _shape(section, role)
    except ConfigError as error:
        raise ConfigError([p.replace("shape.", f"{role}.shape.", 1) if p.startswith("shape.") else p
                           for p in error.problems]) from None  # fmt: skip
    layers = section.shrink_to_layers if isinstance(section, StudentSection) else None
    if layers is not None:
        if layers > shape.num_layers:
            raise ConfigError(
                f"student.shrink_to_layers is {layers}, but the model has {shape.num_layers} layers. Lower it."
            )
        shape = shape.with_layers(layers)
    return shape


def _shape(section: TeacherSection | StudentSection, role: str) -> ModelShape:
    at_hand = _config_at_hand(section)
    if section.shape is None:
        return shape_from_config(at_hand if at_hand is not None else _published_config(section, role))
    if at_hand is not None:
        try:
            return shape_from_config(at_hand)
        except ConfigError:
            pass  # a family that only the block describes
    return shape_from_config(section.shape)


def _config_at_hand(section: TeacherSection | StudentSection) -> Mapping[str, Any] | None:
    """config.json of the first reference that a local folder or the hub cache has."""
    references = [section.model] if isinstance(section.model, str) else section.model
    for reference in references:
        for path in _config_paths(reference, section.revision):
            if path.is_file():
                return _read_config(path)
    return None


def _published_config(section: TeacherSection | StudentSection, role: str) -> Mapping[str, Any]:
    """config.json of a hub model, read and not kept; the download of the model puts it into the cache.

    Not through huggingface_hub, which retries for 23 s before it says that there is no network.
    """
    references = [section.model] if isinstance(section.model, str) else section.model
    reasons = []
    for reference in references:
        if not is_hub_id(reference):
            kind = "no installed package's file" if reference.startswith("package:") else _no_model_because(reference)
            reasons.append(f"{reference}: {kind}")
        elif os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
            reasons.append(f"{reference}: not in the hub cache, and HF_HUB_OFFLINE forbids to ask the hub")
        else:
            try:
                return _ask_hub(reference, section.revision)
            except (OSError, ValueError) as error:  # HTTPError and URLError are OSErrors
                reasons.append(f"{reference}: {_hub_answer(error)}")
    raise ConfigError(
        f"The shape of {role}.model is not known: {'; '.join(reasons)}. Mend {role}.model, or give {role}.shape "
        "(values of config.json) to plan without it."
    )


def _no_model_because(reference: str) -> str:
    path = Path(reference).expanduser()
    if not path.exists():
        return "there is no such folder"
    if path.is_file():
        return "a file; name the folder that holds config.json and the weights"
    if (path / "adapter_config.json").is_file():
        return "an adapter, no model; name its base here"
    if (path / "plan.json").is_file():
        return "a run directory, no model; `qswitch merge` makes a model of it"
    return "the folder has no config.json"


def _ask_hub(reference: str, revision: str | None) -> Mapping[str, Any]:
    import urllib.request  # here: a plan from files needs no network client

    from huggingface_hub import constants, get_token, hf_hub_url

    request = urllib.request.Request(hf_hub_url(reference, "config.json", revision=revision))
    if token := get_token():
        request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=constants.HF_HUB_ETAG_TIMEOUT) as answer:
        values = json.loads(answer.read())
    if not isinstance(values, dict):
        raise ValueError("its config.json is no JSON object")
    return values


def _hub_answer(error: Exception) -> str:
    code = getattr(error, "code", None)
    if code in (401, 403):
        return "the hub knows no such model, or it is gated: accept its licence there and set HF_TOKEN"
    if code == 404:
        return "the hub has no config.json under this id; check its spelling and the revision"
    return f"the hub did not answer ({getattr(error, 'reason', error)}); download the model first"


def _config_paths(reference: str, revision: str | None) -> list[Path]:
    """Where config.json of a reference may lie, best first."""
    if reference.startswith("package:"):
        return []
    paths = [Path(reference).expanduser() / "config.json"]
    if HUB_ID.fullmatch(reference) is None:
        return paths
    repository = hub_cache() / f"models--{reference.replace('/', '--')}"
    named = repository / "refs" / (revision or "main")
    commits = [revision] if revision else []
    if named.is_file():
        commits.append(named.read_text(encoding="utf-8").strip())
    paths += [repository / "snapshots" / commit / "config.json" for commit in commits]
    if revision is None:
        paths += sorted(repository.glob("snapshots/*/config.json"))
    return paths


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a model configuration.")
    return values
