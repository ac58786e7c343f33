"""The shape of a model that no table knows: its modules, counted in the transformers class on the meta device.

No weight is made or read. The linear modules, all other parameters and what the caches keep of a token and of a row are
exact, since the class itself says them; which activations a layer saves is estimated from the names of its modules.
Importing this module is cold, counting imports torch and transformers.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from qswitch.errors import ConfigError
from qswitch.plan.shapes import LinearShape, ModelShape

PROBE_TOKENS = 8
"""Length of the pass, on the meta device, whose caches are looked at."""
EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k")
"""What configurations call the number of experts that read a token."""


def counted_shape(values: Mapping[str, Any], trust_remote_code: bool = False) -> ModelShape:
    """The shape of the causal language model that transformers makes of config.json values.

    Raises:
        ConfigError: transformers makes none of them, or it cannot be trained here; with the reason.
    """
    return _counted(json.dumps(values, default=str), trust_remote_code)


@lru_cache(maxsize=8)  # a plan asks for the shape of a model some hundred times
def _counted(config_json: str, trust_remote_code: bool) -> ModelShape:
    import torch
    from transformers import AutoModelForCausalLM

    config = _configuration(json.loads(config_json))
    reason = unusable_because(config)
    if reason is not None:
        raise ConfigError(f"A {config.model_type} model cannot be distilled here: {reason}")
    config = text_part(config)
    with _silent(), _meta(torch):
        try:
            # In bf16: the fused kernels of experts accept nothing else.
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code)
        except Exception as error:  # whatever the class makes of values that do not fit together
            raise _unplanned(config.model_type, f"its values do not make a model ({_first_line(error)})") from error
        layers = _kept_by_layer(model, torch)
    return _shape_of(model, config, layers)


def unusable_because(config: Any) -> str | None:
    """Why what a transformers configuration describes cannot be distilled here; None where nothing speaks against it.

    Found from the configuration alone: no weight is read.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model. Use a decoder-only language model."
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    config = text_part(config)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not remote:
        return "transformers has no causal language model of this type. Use a decoder-only language model."
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if masked and not getattr(config, "is_decoder", False):
        return "it is an encoder: every token reads those after it too. Use a decoder-only language model."
    return None


def text_part(config: Any) -> Any:
    """The configuration of the language model that is distilled: the given one; or its text's, of a model with further
    towers of which transformers makes no language model alone (Gemma 3 and 4, Mistral 3)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    text = getattr(config, "text_config", None)
    whole, part = (str(CAUSAL.get(getattr(one, "model_type", None), "")) for one in (config, text))
    if text is None or whole.endswith("ForCausalLM") or not part.endswith("ForCausalLM"):
        return config
    text = copy.deepcopy(text)
    text.tie_word_embeddings = config.tie_word_embeddings  # what the text says of it, transformers does not read
    return text


def _configuration(values: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, __version__

    model_type = values.get("model_type")
    if model_type not in CONFIG_MAPPING:
        remedy = "A newer transformers may; or give teacher.shape or student.shape with the values of a model like it."
        raise _unplanned(model_type, f"transformers {__version__} does not know it", remedy)
    try:
        with _silent():
            return CONFIG_MAPPING[model_type].from_dict(_plain_floats(dict(values)))
    except Exception as error:  # pydantic-like checks of each class, in kinds of their own
        raise _unplanned(model_type, f"its config.json is refused by transformers ({_first_line(error)})") from error


def _plain_floats(values: Any) -> Any:
    """transformers writes an infinite float as {"__float__": "Infinity"}, so that config.json stays JSON."""
    if isinstance(values, dict):
        if set(values) == {"__float__"}:
            return float(values["__float__"])
        return {key: _plain_floats(value) for key, value in values.items()}
    return [_plain_floats(value) for value in values] if isinstance(values, list) else values


def _unplanned(model_type: Any, reason: str, remedy: str = "Mend its config.json.") -> ConfigError:
    return ConfigError(f"Memory cannot be planned for model_type {model_type!r}: {reason}. {remedy}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}".rstrip(". ")


@contextmanager
def _meta(torch: Any) -> Iterator[None]:
    with torch.device("meta"), torch.no_grad():
        yield


@contextmanager
def _silent() -> Iterator[None]:
    """Without the advice of transformers to install kernels, and its doubts about token ids."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _kept_by_layer(model: Any, torch: Any) -> list[tuple[int, int, int]] | None:
    """By layer, from a pass in bf16 on meta: numbers of keys and values kept of a token; of a row, bytes of states in
    fp32, and numbers of those in bf16.

    None where the pass does not run there.

    Raises:
        ConfigError: the model keeps nothing that the next pass could go on from.
    """
    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long)
    try:
        output = model(input_ids=ids, use_cache=True)
    except Exception:  # a class that looks at the content of tensors, which the meta device has none of
        return None
    cache = output.get("past_key_values")
    if cache is None or not hasattr(cache, "layers"):
        raise ConfigError(
            f"A {model.config.model_type} model cannot be distilled here: its passes return no past_key_values, which "
            "rollouts go on from. Use a model with attention, alone or beside other layers."
        )
    return [_kept(layer, torch) for layer in cache.layers]


def _kept(layer: Any, torch: Any) -> tuple[int, int, int]:
    pair = [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]
    width = sum(t.shape[1] * t.shape[-1] for t in pair)
    fixed = numbers = 0
    for name, value in vars(layer).items():
        for tensor in value.values() if isinstance(value, dict) else [value]:
            if name not in ("keys", "values") and isinstance(tensor, torch.Tensor) and tensor.dim() > 1:
                if tensor.dtype == torch.bfloat16:
                    numbers += tensor.numel()
                else:
                    fixed += tensor.numel() * tensor.element_size()
    return width, fixed, numbers


def names_of_experts(hf: Any, names: Iterable[str]) -> tuple[str, ...]:
    """Those of the names that peft takes for a model's experts, which are no linear modules but one tensor.

    peft reads adapters of a time when every expert was linear layers, and so puts an adapter on all experts at once
    where gate_proj of a dense layer, or of a shared expert, was meant: many times the parameters, and not on that.
    """
    if all(parameter.dim() < 3 for parameter in hf.parameters()):
        return ()
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    taken = []
    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model=hf, conversions=None)
        except ValueError:  # half of what is one tensor
            taken.append(name)
        else:
            if name not in config.target_modules:
                taken.append(name)
    return tuple(taken)


def _shape_of(model: Any, config: Any, kept: list[tuple[int, int, int]] | None) -> ModelShape:
    text = config.get_text_config()
    text.allow_global_per_layer_attribute_access = True  # where layers differ, the caches have said how
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    num_layers, prefix = _layer_list(model, text)
    by_layer: list[list[LinearShape]] = [[] for _ in range(num_layers)]
    further_by_layer = [0] * num_layers
    outer: list[LinearShape] = []
    norms = further_outside = largest = 0
    seen = {id(p) for p in embedding.parameters()}
    for path, module in model.named_modules():
        place = path.removeprefix(prefix).split(".")[0] if path.startswith(prefix) else ""
        index = int(place) if place.isdigit() else None
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen |= {id(p) for p in own}
        linear = _linear(path, module)
        if module is head:
            continue
        if linear is not None:
            (outer if index is None else by_layer[index]).append(linear)
            continue
        size = sum(p.numel() for p in own)
        largest = max(largest, size)
        if index is None:
            further_outside += size
        else:
            further_by_layer[index] += size
        norms += index == 0 and "norm" in type(module).__name__.lower() and size >= text.hidden_size
    tied = head.weight is embedding.weight
    head_parameters = sum(p.numel() for p in head.parameters()) - (embedding.weight.numel() if tied else 0)
    names = {m.name for m in (*(m for layer in by_layer for m in layer), *outer)}
    gated = any("gate" in name for name in names) or _first(text, *EXPERTS_OF_A_TOKEN) is not None
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelShape(
        model_type=config.model_type,
        num_layers=num_layers,
        hidden_size=text.hidden_size,
        intermediate_size=_active_width(text, [m for layer in by_layer for m in layer]),
        num_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        vocab_size=text.vocab_size,
        layer_linears=tuple(by_layer[0]),
        layer_norm_parameters=0,
        outer_linears=tuple(outer),
        embedding_parameters=embedding.weight.numel(),
        position_parameters=0,
        final_norm_parameters=0,
        head_parameters=head_parameters,
        tied=tied,
        gated_mlp=gated,
        saved_mlp_tensors=3 if gated else 4,
        rms_norm=any("RMS" in type(m).__name__ for m in model.modules()),
        num_layer_norms=max(norms, 2),
        eager_attention=getattr(text, "attn_logit_softcapping", None) is not None,
        max_positions=getattr(text, "max_position_embeddings", None) or 0,
        counted=True,
        unequal_layers=tuple(tuple(layer) for layer in by_layer),
        further_by_layer=tuple(further_by_layer),
        further_parameters=further_outside,
        largest_further_tensor=largest,
        # Before transformers 5.23 the last layers have no entry where they share the keys and values of earlier ones.
        cached_widths=None if kept is None else (*(width for width, _, _ in kept), *[0] * (num_layers - len(kept))),
        state_bytes_per_row=0 if kept is None else sum(fixed for _, fixed, _ in kept),
        state_values_per_row=0 if kept is None else sum(numbers for _, _, numbers in kept),
        taken_for_experts=names_of_experts(model, sorted(names)),
    )


def _layer_list(model: Any, text: Any) -> tuple[int, str]:
    """How many layers the decoder has, and the path before their index: its longest list of modules, the outermost."""
    lists = {path: len(module) for path, module in model.named_modules() if type(module).__name__ == "ModuleList"}
    expected = getattr(text, "num_hidden_layers", None)
    outermost = {path: size for path, size in lists.items() if not re.search(r"\.\d+\.", f".{path}.")}
    matching = [path for path, size in outermost.items() if size == expected]
    if not matching:
        raise _unplanned(model.config.model_type, "its layers are in no list of num_hidden_layers modules")
    return outermost[matching[0]], f"{matching[0]}."


def _linear(path: str, module: Any) -> LinearShape | None:
    """A linear layer, or GPT-2's transposed Conv1D."""
    import torch

    name = path.rpartition(".")[2]
    if isinstance(module, torch.nn.Linear):
        return LinearShape(name, module.in_features, module.out_features, module.bias is not None)
    if type(module).__name__ == "Conv1D":
        return LinearShape(name, module.weight.shape[0], module.weight.shape[1], True)
    return None


def _active_width(text: Any, linears: list[LinearShape]) -> int:
    """MLP width that one token passes through: of a mixture of experts, those that are asked, and the shared one."""
    experts = _first(text, *EXPERTS_OF_A_TOKEN)
    width = _first(text, "intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim")
    if width is None:
        width = max((m.out_features for m in linears), default=4 * text.hidden_size)
    if experts is None:
        return width
    expert = _first(text, "moe_intermediate_size", "expert_ffn_hidden_size") or width
    shared = _first(text, "shared_expert_intermediate_size") or (_first(text, "n_shared_experts") or 0) * expert
    return experts * expert + shared


def _first(values: Any, *names: str) -> int | None:
    found = (getattr(values, name, None) for name in names)
    return next((v for v in found if isinstance(v, int) and not isinstance(v, bool)), None)
