"""Does llama.cpp say of an exported student what transformers says of the folder it was made from?

    python -m benchmarks.gguf_parity demo=runs/my-run/merged --random qwen3 --output benchmarks/results/gguf_parity.json

Needs llama-cpp-python and the converter that `qswitch merge --gguf` uses. Each NAME=FOLDER is a merged folder with a
chat template; `--random FAMILY` adds a small random model of another family with the tokenizer of the first folder. For
every type the KL to the folder; for f16 also greedy responses to 20 prompts, token by token. Where two responses part,
the probabilities of both tokens in transformers say whether it was a near tie.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.provenance import publish
from qswitch.export.gguf import export_gguf
from qswitch.export.llama_cpp import GGUF_TYPES, Engine
from tests.tiny import save_tiny

PROMPTS = [
    "Why is the sky blue?",
    "Name three planets.",
    "What is the capital of France?",
    "Write a short poem about rain.",
    "How do I boil an egg?",
    "What is two plus three?",
    "Explain what a prime number is.",
    "Give me a name for a cat.",
    "What do bees make?",
    "Translate 'good morning' into French.",
    "Who wrote Romeo and Juliet?",
    "List the days of the week.",
    "What is a computer?",
    "Tell me a fact about the ocean.",
    "How many legs has a spider?",
    "Write one sentence about winter.",
    "What should I pack for a hike?",
    "Which animal is the largest?",
    "Say hello in Spanish.",
    "What does a doctor do?",
]


def greedy_by_transformers(folder: Path, ids: list[list[int]], num_tokens: int) -> tuple[Any, list[list[int]]]:
    """The model, and its most likely continuation of each prompt, end tokens not heeded."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    limits = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0}
    written = []
    for row in ids:
        with torch.no_grad():
            out = model.generate(torch.tensor([row]), **limits)
        written.append(out[0, len(row) :].tolist())
    return model, written


def greedy_by_llama_cpp(engine: Engine, row: list[int], num_tokens: int, banned: list[int]) -> list[int]:
    """The same in llama.cpp; `banned` are the end tokens, which min_new_tokens bans above."""
    written: list[int] = []
    logits = engine.logits(row)[-1]
    while True:
        logits[banned] = -torch.inf
        written.append(int(logits.argmax()))
        if len(written) == num_tokens:
            return written
        engine.llama.eval([written[-1]])
        logits = torch.from_numpy(engine.llama.scores[engine.llama.n_tokens - 1].copy())


def parting(model: Any, row: list[int], ours: list[int], theirs: list[int]) -> dict[str, Any] | None:
    """Where two continuations part, and what transformers thinks of both tokens there."""
    step = next((t for t, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    if step is None:
        return None
    with torch.no_grad():
        probabilities = model(torch.tensor([row + ours[:step]])).logits[0, -1].softmax(-1)
    return {
        "step": step,
        "probability": round(probabilities[ours[step]].item(), 5),
        "probability_of_llama_cpp": round(probabilities[theirs[step]].item(), 5),
    }


def measure(name: str, folder: Path, num_tokens: int) -> dict[str, Any]:
    """Everything about one folder."""
    reports = export_gguf(folder, list(GGUF_TYPES), name=name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [[{"role": "user", "content": text}] for text in PROMPTS]
    ids = [tokenizer.apply_chat_template(t, add_generation_prompt=True)["input_ids"] for t in turns]
    model, ours = greedy_by_transformers(folder, ids, num_tokens)
    eos = model.generation_config.eos_token_id
    banned = eos if isinstance(eos, list) else [eos]
    f16 = next(report for report in reports if report.type == "f16")
    engine = Engine(f16.path, context=max(map(len, ids)) + num_tokens)
    theirs = [greedy_by_llama_cpp(engine, row, num_tokens, banned) for row in ids]
    engine.close()
    parted = {p: parting(model, *row) for p, *row in zip(PROMPTS, ids, ours, theirs, strict=True)}
    return {
        "model": name,
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "files": [{**asdict(r), "path": r.path.name} for r in reports],
        "greedy_f16": {
            "prompts": len(PROMPTS),
            "tokens_each": num_tokens,
            "equal": sum(where is None for where in parted.values()),
            "parted": {prompt: where for prompt, where in parted.items() if where is not None},
            "example": tokenizer.decode(ours[0]),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--random", action="append", default=[], metavar="FAMILY")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    folders = {name: Path(folder) for name, _, folder in (text.partition("=") for text in args.folders)}
    with tempfile.TemporaryDirectory() as text:
        for family in args.random:
            tokenizer = AutoTokenizer.from_pretrained(next(iter(folders.values())))
            folders[f"random-{family}"] = save_tiny(
                Path(text) / family, family, tokenizer=tokenizer, dtype=torch.bfloat16, vocab_size=len(tokenizer),
                hidden_size=256, intermediate_size=512,  # k-quants need rows of 256 weights
                eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
            )  # fmt: skip
        rows = []
        for name, folder in folders.items():
            rows.append(measure(name, folder, args.tokens))
            print(json.dumps(rows[-1]["greedy_f16"]), flush=True)
    publish({"benchmark": "gguf_parity", "rows": rows}, args.output)


if __name__ == "__main__":
    main()
