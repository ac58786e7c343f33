"""How long are passes by rows and block length, and what do backward passes and recomputation cost beside them?

    python -m benchmarks.pass_times --teacher DIR --output benchmarks/results/pass_times-cpu.json

The constants of qswitch/plan/cost.py come from here. `overhead_s_per_layer` is the slope over depth of a one-token pass
of a model too narrow for its arithmetic to count: the time of Python and of torch's dispatcher. The ratios are of a
llama-shaped student scaled down from the preset shapes (same proportions, random weights). `decode` has a real
teacher's passes in fp32 and NF4, relative to its pass over one token. Runs on a CPU; no GPU figure is in it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from benchmarks.provenance import publish
from qswitch.config import LoraSection
from qswitch.models.student import attach_lora

ROWS, BLOCKS = (1, 4, 16), (1, 4, 8)


def timed(run: Callable[[], Any], repeats: int, warmup: int = 1) -> float:
    """Fewest seconds of a call: what other programs on the machine add, they only add."""
    times = []
    for i in range(warmup + repeats):
        started = time.perf_counter()
        run()
        if i >= warmup:
            times.append(time.perf_counter() - started)
    return min(times)


def llama(width: int, layers: int, vocab: int = 512) -> Any:
    """Random weights in the proportions of TinyLlama (2048 wide: MLP 5632, head_dim 64, 8 query heads a key head)."""
    heads = max(1, width // 64)
    config = AutoConfig.for_model(
        "llama", hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 8), vocab_size=vocab,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def overhead_s_per_layer(repeats: int) -> float:
    """Seconds a layer of a one-token pass takes whatever its width."""
    found = {}
    for layers in (4, 16):
        model = llama(64, layers)
        ids = torch.zeros((1, 1), dtype=torch.int64)
        found[layers] = timed(partial(model.base_model, ids, use_cache=False), repeats * 4, warmup=3)
    return (found[16] - found[4]) / 12


def training(width: int, layers: int, rows: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Times of forward and backward passes of adapters, of every weight, and with recomputation, in forward passes."""
    ids = torch.randint(0, 500, (rows, tokens), generator=torch.Generator().manual_seed(0))
    result: dict[str, Any] = {"width": width, "layers": layers, "rows": rows, "tokens": tokens}
    for kind in ("lora", "none"):
        hf = llama(width, layers)
        if kind == "lora":
            hf = attach_lora(hf.requires_grad_(False), LoraSection(r=16), seed=0)
        base = hf.get_base_model() if kind == "lora" else hf
        with torch.no_grad():
            forward_s = timed(partial(base.base_model, ids, use_cache=False), repeats)

        def both(b: Any = base) -> None:
            b.base_model(ids, use_cache=False).last_hidden_state.sum().backward()

        hf.train()
        plain_s = timed(both, repeats)
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        recomputed_s = timed(both, repeats)
        result[kind] = {
            "forward_s": round(forward_s, 4),
            "backward_over_forward": round((plain_s - forward_s) / forward_s, 3),
            "recomputation_over_forward": round((recomputed_s - plain_s) / forward_s, 3),
        }
    return result


@torch.no_grad()
def decode(path: str, repeats: int, context: int = 128) -> dict[str, Any]:
    """Passes over R rows of K tokens after `context` cached tokens, relative to one row of one token."""
    from transformers import BitsAndBytesConfig

    result: dict[str, Any] = {"context_tokens": context}
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                   bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    for name, options in (("fp32", {}), ("nf4", {"quantization_config": quantised, "device_map": {"": "cpu"}})):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval().base_model
        times: dict[str, float] = {}
        for rows, block in [(r, 1) for r in ROWS] + [(r, k) for r in (1, 4) for k in BLOCKS if k > 1]:
            cache = DynamicCache()
            model(torch.ones((rows, context), dtype=torch.int64), past_key_values=cache)
            ids = torch.ones((rows, block), dtype=torch.int64)

            def step(m: Any = model, c: Any = cache, i: Any = ids) -> None:
                m(i, past_key_values=c)
                c.crop(-i.shape[1])

            times[f"{rows}x{block}"] = timed(step, repeats)
        one = times["1x1"]
        result[name] = {"one_token_s": round(one, 4), "relative": {k: round(t / one, 2) for k, t in times.items()}}
    result["nf4_over_fp32"] = round(result["nf4"]["one_token_s"] / result["fp32"]["one_token_s"], 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--teacher", help="folder of a real teacher; without it decode is left out")
    parser.add_argument("--label", default="", help="what the teacher is, for the result")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    args = parser.parse_args()
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "benchmark": "pass_times",
        "gpu": "not measured",
        "overhead_s_per_layer": round(overhead_s_per_layer(args.repeats), 6),
        "training": training(512, 4, 4, 256, args.repeats),
    }
    if args.teacher:
        result["decode"] = {"teacher": args.label, **decode(args.teacher, args.repeats)}
    publish(result, args.output)


if __name__ == "__main__":
    main()
