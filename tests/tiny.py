"""Tiny random models and a tokenizer, built in memory in milliseconds; shared by all tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from qswitch.models.load import attention_kind
from tests.families import family_config

ARCHITECTURES = ("llama", "gpt2", "opt", "qwen2", "mistral", "gemma2")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,:;!?'\n0123456789"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_tokenizer(
    characters: str = CHARACTERS, chat_template: str | None = CHAT_TEMPLATE, **special: str | None
) -> PreTrainedTokenizerFast:
    """One token per character; ids 0 to 3 are pad, BOS, EOS and unknown. `special` renames or takes away (None) one."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", **{k: v for k, v in tokens.items() if v is not None}
    )
    fast.chat_template = chat_template
    return fast


VOCAB_SIZE = len(CHARACTERS) + len(SPECIAL)


def tiny_config(arch: str = "llama", *, layers: int = 2, vocab_size: int = VOCAB_SIZE, **changes: Any) -> Any:
    """A configuration of width 64, 4 heads, `layers` layers."""
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": vocab_size}
    modern = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, **ids,
    }  # fmt: skip
    if arch == "llama":
        return LlamaConfig(**{**modern, "tie_word_embeddings": False, **changes})
    if arch == "llama3":
        scaling = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
        return LlamaConfig(**{**modern, "tie_word_embeddings": True, "rope_parameters": scaling, **changes})
    if arch == "qwen3":
        return Qwen3Config(**{**modern, "head_dim": 32, "tie_word_embeddings": True, **changes})
    if arch == "phi3":
        return Phi3Config(**{**modern, "tie_word_embeddings": False, **changes})
    if arch == "gemma3":
        return Gemma3TextConfig(**{**modern, "head_dim": 16, "sliding_window": 8, "layer_types": _alternating(layers),
                                   **changes})  # fmt: skip
    if arch == "qwen2":
        return Qwen2Config(**{**modern, "tie_word_embeddings": True, **changes})
    if arch == "mistral":
        return MistralConfig(**{**modern, "sliding_window": 8, "tie_word_embeddings": False, **changes})
    if arch == "gemma2":
        return Gemma2Config(**{
            **modern, "head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 2.0,
            "attn_logit_softcapping": 5.0, **changes,
        })  # fmt: skip
    if arch == "cohere":
        return CohereConfig(**{**modern, "logit_scale": 0.25, **changes})
    if arch == "granite":
        return GraniteConfig(**{**modern, "logits_scaling": 4.0, **changes})
    if arch == "phi":
        return PhiConfig(**{**modern, "num_key_value_heads": 4, "tie_word_embeddings": False, **changes})
    if arch == "gpt2":
        return GPT2Config(**{**ids, "n_embd": 64, "n_layer": layers, "n_head": 4, "n_positions": 512, **changes})
    if arch == "opt":
        return OPTConfig(**{
            **ids, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": layers, "num_attention_heads": 4,
            "max_position_embeddings": 512, "word_embed_proj_dim": 32, **changes,
        })  # fmt: skip
    return family_config(arch, layers=layers, **ids, **changes)


def _alternating(layers: int) -> list[str]:
    return ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]


def tiny_model(arch: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model in eval mode, with larger weights than usual so that its distributions are far from flat."""
    config = tiny_config(arch, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention_kind(config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.15)
                elif "norm" not in name and "ln" not in name:
                    parameter.normal_(0, 0.05)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the grouped product has no float64
    return model.to(dtype).eval()


def trainable_state(model: Any) -> dict[str, torch.Tensor]:
    """Name -> tensor of every trainable parameter of a `LanguageModel`, detached copies."""
    return {name: p.detach().clone() for name, p in model.hf.named_parameters() if p.requires_grad}


def save_tiny(
    folder: Path, arch: str = "llama", *, seed: int = 0, tokenizer: Any = None, dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:  # fmt: skip
    """Write one tiny model with its tokenizer as a Hugging Face folder."""
    tiny_model(arch, seed=seed, dtype=dtype, **changes).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def save_tiny_pair(
    folder: Path, arch: str = "llama", *, teacher_layers: int = 3, student_layers: int = 2, **changes: Any
) -> tuple[Path, Path]:
    """(teacher folder, student folder) of one architecture and one tokenizer."""
    teacher = save_tiny(folder / "teacher", arch, seed=1, layers=teacher_layers, **changes)
    student = save_tiny(folder / "student", arch, seed=2, layers=student_layers, **changes)
    return teacher, student
