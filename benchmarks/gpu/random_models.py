"""Models of random weights on disk, written shard by shard, in the shapes of a preset or very small.

Weights say nothing about memory or speed, so a 7B teacher need not be downloaded. Two random models agree about nearly
nothing: how many drafts stand, and with it tokens a round, is not theirs to tell.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from benchmarks.gpu.report import Context
from tests.tiny import tiny_tokenizer

SHARD_BYTES = 2 * 2**30
SHAPES = {
    "teacher-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                   "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096},
    "student-1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
                     "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048},
}  # fmt: skip
"""Llama-2-7B and TinyLlama-1.1B."""
TINY = {
    "teacher-7b": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
                   "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 2048},
    "student-1.1b": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                     "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 2048},
}  # fmt: skip
FIRST_CHARACTER = 0x4E00
"""The tokenizer knows one token per character, from here on."""


def model_folder(context: Context, name: str) -> Path:
    """Folder of the model `name` of SHAPES (with --tiny of TINY), made unless it is there."""
    folder = context.models / f"{name}{'-tiny' if context.tiny else ''}"
    if not (folder / "tokenizer.json").exists():  # written last
        _write(folder, (TINY if context.tiny else SHAPES)[name], context.device)
    return folder


def _write(folder: Path, shape: dict[str, Any], device: torch.device) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**shape, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
                         dtype=torch.bfloat16, architectures=["LlamaForCausalLM"])  # fmt: skip
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    generator = torch.Generator(device).manual_seed(len(shapes))
    shards: list[dict[str, torch.Tensor]] = [{}]
    where: dict[str, str] = {}
    held = total = 0
    for name, size in shapes.items():
        num_bytes = 2 * size.numel()
        if held + num_bytes > SHARD_BYTES and shards[-1]:
            _save(folder, len(shards), shards[-1])
            shards[-1].clear()
            shards.append({})
            held = 0
        tensor = torch.ones(size) if len(size) == 1 else torch.empty(size, dtype=torch.bfloat16, device=device)
        if len(size) > 1:
            tensor.normal_(0, 0.02 if shape["hidden_size"] > 512 else 0.15, generator=generator)
        shards[-1][name] = tensor.to("cpu", torch.bfloat16)
        where[name] = _shard_name(len(shards))
        held, total = held + num_bytes, total + num_bytes
    _save(folder, len(shards), shards[-1])
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(folder)
    characters = "".join(chr(FIRST_CHARACTER + i) for i in range(shape["vocab_size"] - 4))
    tiny_tokenizer(characters).save_pretrained(folder)


def _shard_name(number: int) -> str:
    return f"model-{number:05}.safetensors"


def _save(folder: Path, number: int, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / _shard_name(number), metadata={"format": "pt"})


def prompts_file(context: Context, *, num: int = 96, longest: int | None = None) -> Path:
    """A jsonl file of `num` prompts of random tokens, the longest first, with responses."""
    longest = longest or (12 if context.tiny else 200)
    path = context.models / f"prompts-{num}-{longest}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(num)
    with path.open("w", encoding="utf-8") as handle:
        for i in range(num):
            length = longest - (longest // 2) * i // num
            ids = torch.randint(0, 500, (2, length), generator=generator).tolist()
            prompt, response = ("".join(chr(FIRST_CHARACTER + t) for t in row) for row in ids)
            handle.write(json.dumps({"prompt": prompt, "response": response}) + "\n")
    return path
