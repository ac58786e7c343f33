"""How near to the whole model is one that was cut to fewer layers: today's choice of layers against the one before?

    python -m benchmarks.shrink MODEL --layers 26 --layers 22 --layers 18 --data FILE.jsonl --output FILE.json

MODEL is any model reference (hub id, folder, `package:`, GGUF file). FILE has `instruction`, `input` and `output`, one
record a line; KL(whole || cut) is measured on the responses of its first records, which neither choice has seen. The
choice before dropped the layers with the smallest 1 - cosine between the hidden state that they read and the one that
they return; `last_two` is the same with the last two layers kept.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import publish
from qswitch.models.decoder_layers import LayerStack, ScoredRow, computing_in_fp32
from qswitch.models.layer_choice import MAX_POSITIONS, calibration, choices, scored_rows
from qswitch.models.load import read_model, read_tokenizer
from qswitch.models.references import resolve_reference
from qswitch.models.runtime import Runtime
from qswitch.models.shrink import CALIBRATION_PROMPTS

MAX_HELD_OUT_TOKENS = 120


def hidden_change(hf: Any, rows: Sequence[Sequence[int]]) -> list[float]:
    """The score before: 1 - cosine of each layer's input and output, mean over all tokens."""
    sums = [0.0] * hf.config.get_text_config().num_hidden_layers
    with computing_in_fp32(hf):
        for ids in rows:
            stack = LayerStack(hf, [ScoredRow(tuple(ids), len(ids) - 1)], max_positions=1)
            for index in range(len(stack)):
                before, after = stack.states[index], stack.states[index + 1]
                sums[index] += float((1 - torch.cosine_similarity(before, after, dim=-1)).sum())
    return [total / sum(map(len, rows)) for total in sums]


def response_row(tokenizer: Any, record: dict[str, str]) -> ScoredRow | None:
    """A record as the model's own chat, where it has a template, its response scored; None without a response."""
    prompt = f"{record['instruction']}\n{record['input']}".strip()
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        opening = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before = tokenizer(opening, add_special_tokens=False)["input_ids"]
    else:
        before = tokenizer(f"{prompt}\n")["input_ids"]
    ids = [*before, *tokenizer(record["output"], add_special_tokens=False)["input_ids"]][:MAX_HELD_OUT_TOKENS]
    return ScoredRow(tuple(ids), len(before) - 1) if len(before) < len(ids) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--layers", type=int, action="append", required=True)
    parser.add_argument("--data", type=Path, required=True, help="held-out records, jsonl")
    parser.add_argument("--records", type=int, default=10)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    resolved = resolve_reference(args.model, None)
    tokenizer = read_tokenizer(resolved)
    hf = read_model(resolved, Runtime(device=torch.device("cpu"), compute_dtype=torch.float32), "fp32")
    lines = args.data.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines[: args.records]]
    held_out = [row for record in records if (row := response_row(tokenizer, record)) is not None]
    rows = scored_rows(tokenizer, calibration("choose"))

    started = time.process_time()
    change = hidden_change(hf, [tokenizer(text)["input_ids"] for text in CALIBRATION_PROMPTS])
    before_s = time.process_time() - started
    by_change = sorted(range(len(change)), key=lambda i: (-change[i], i))
    last_two = sorted(by_change, key=lambda i: i < len(change) - 2)
    started = time.process_time()
    chosen = choices(hf, rows, args.layers, notify=print)
    now_s = time.process_time() - started
    kept = [
        {"before": by_change[:size], "last_two": last_two[:size], "now": choice.kept}
        for size, choice in zip(args.layers, chosen, strict=True)
    ]
    results = []
    with computing_in_fp32(hf):
        stack = LayerStack(hf, held_out, max_positions=sum(len(row.ids) for row in held_out))

        @cache
        def kl_nats(layers: tuple[int, ...]) -> float:
            return round(stack.kl_nats(stack.through(layers, stack.states[0])[len(stack)]), 4)

        for size, ways in zip(args.layers, kept, strict=True):
            results.append(
                {
                    "layers": size,
                    "kl_nats": {name: kl_nats(tuple(sorted(k))) for name, k in ways.items()},
                    "dropped": {name: sorted(set(range(len(change))) - set(k)) for name, k in ways.items()},
                }
            )
            print(results[-1], flush=True)
    publish(
        {
            "model": resolved.name,
            "layers_of_the_whole": len(change),
            "data": args.data.name,
            "held_out_tokens": stack.num_positions,
            "calibration_tokens": sum(len(row.ids) for row in rows),
            "scored_positions": MAX_POSITIONS,
            "cpu_s": {"before": round(before_s, 1), "now, all sizes": round(now_s, 1)},
            "results": results,
        },
        args.output,
    )


if __name__ == "__main__":
    main()
