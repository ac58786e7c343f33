"""How many operations a decoding pass starts, and how many bytes they make: what a GPU would launch and write.

    python -m benchmarks.launches [--output benchmarks/results/launches.json] [--label before]

Models of small width at the depth of a 7B teacher (32 layers, NF4, every head with keys of its own) and of a 1.1B
student (22 layers, LoRA, eight query heads to a key head), eight rows behind a past of 509 slots, which is no multiple
of 8; and a student of which every weight trains. An operation that only changes how memory is looked at is not counted.
It runs on a CPU, whose attention kernel is another one than a GPU's; of its masks and heads it wants the same. `bytes`
are those of the outputs at this width, `largest` the largest single one: with copied heads that is a layer's keys.
It uses nothing but `KVState`, so it runs at older commits too; results are kept side by side by `--label`.
"""

from __future__ import annotations

import argparse
import collections
import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.provenance import provenance
from qswitch.config import LoraSection
from qswitch.models.language_model import LanguageModel
from qswitch.models.student import attach_lora
from qswitch.rollout.kv_cache import KVState, Prompts

VIEWS = {
    "view", "t", "transpose", "permute", "slice", "select", "expand", "unsqueeze", "squeeze", "as_strided", "alias",
    "_unsafe_view", "split", "unbind", "detach", "lift_fresh", "_reshape_alias", "unfold", "split_with_sizes",
}  # fmt: skip
ROWS, PAST = 8, 509


class Operations(TorchDispatchMode):
    """Counts operations that are no views, and the bytes of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()
        self.num_bytes = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name not in VIEWS:
            self.counts[name] += 1
            sizes = [t.numel() * t.element_size() for t in tree_leaves(result) if isinstance(t, Tensor)]
            self.num_bytes += sum(sizes)
            self.largest = max([self.largest, *sizes])
        return result


def model_of(layers: int, heads: int, key_heads: int, dtype: torch.dtype) -> Any:
    torch.manual_seed(layers)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, max_position_embeddings=1024,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def in_nf4(model: Any) -> Any:
    """The model with its linear layers in NF4."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                layer = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16,
                    compress_statistics=True,
                )  # fmt: skip
                layer.load_state_dict(child.state_dict())
                layer = layer.to("cpu")
                layer.support_avx512bf16_for_cpu = False
                setattr(module, name, layer)
    return model.requires_grad_(False)


def models() -> dict[str, LanguageModel]:
    bf16 = torch.bfloat16
    teacher = in_nf4(model_of(32, 8, 8, bf16))
    lora = attach_lora(model_of(22, 16, 2, bf16), LoraSection(r=8, alpha=16), seed=0)
    return {
        "teacher, NF4, 32 layers": LanguageModel(teacher, compute_dtype=bf16),
        "student, LoRA, 22 layers": LanguageModel(lora.eval(), compute_dtype=bf16),
        "student, every weight trains": LanguageModel(model_of(22, 16, 2, torch.float32), compute_dtype=bf16),
    }


def once_a_call(model: LanguageModel) -> Any:
    """What a rollout call does to the student's weights before its passes, where this commit does anything."""
    import contextlib

    from qswitch.models import language_model

    cast = getattr(language_model, "weights_cast_once", None)
    return contextlib.nullcontext() if cast is None else cast(model)


@torch.no_grad()
def count(model: LanguageModel, tokens: int) -> dict[str, Any]:
    """One pass over `tokens` tokens a row, its mask included and its head apart."""
    with once_a_call(model):
        state = KVState(model, ROWS, PAST + 2 * tokens + 8)
        ids = torch.ones((ROWS, PAST - tokens), dtype=torch.int64)
        state.repack(np.arange(0), Prompts(ids, torch.ones_like(ids, dtype=torch.bool), np.full(ROWS, PAST - tokens)))
        block = torch.ones((ROWS, tokens), dtype=torch.int64)
        live, counts = torch.ones_like(block, dtype=torch.bool), np.full(ROWS, tokens)
        state.append(block, live, counts)
        state.take_back(tokens, torch.zeros(ROWS, dtype=torch.int64), np.zeros(ROWS, dtype=np.int64), counts)
        with Operations() as seen:
            state.append(block, live, counts)
    return {
        "operations": seen.counts.total(),
        "bytes": seen.num_bytes,
        "largest": seen.largest,
        "most": dict(seen.counts.most_common(12)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--label", default="now", help="key of these counts in the file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        f"{name}, {tokens} token{'s' * (tokens > 1)}": count(model, tokens)
        for name, model in models().items()
        for tokens in (1, 5)
    }
    result = {"passes": found, **provenance()}
    print(json.dumps(result, indent=1))
    if args.output is not None:
        kept = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
        args.output.write_text(json.dumps({**kept, args.label: result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
