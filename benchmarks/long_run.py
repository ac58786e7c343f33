"""Does a long run hold its memory and open files? `qswitch distill` itself, on two-layer models, watched from outside.

    python -m benchmarks.long_run --output benchmarks/results/long_run.json

Every step reuses rollouts, every 25th is saved, every 50th validated, so that the cache, the replay buffer, the
checkpoints and the logs all turn over many times. Resident memory and open files are read from /proc once a second.
Growth is the median of the last tenth of the steps against that of the tenth after the warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.provenance import publish
from qswitch.config import RunConfig
from qswitch.layers import build_config, dump_config


def make_pair(folder: Path) -> tuple[Path, Path]:
    """A random teacher and student with a tokenizer of bytes that needs no download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(i) for i in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    paths = []
    for name, seed, layers in (("teacher", 1, 3), ("student", 2, 2)):
        torch.manual_seed(seed)
        shape = LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=len(vocabulary), pad_token_id=0, bos_token_id=1, eos_token_id=2,
            initializer_range=0.15, tie_word_embeddings=False,
        )  # fmt: skip
        LlamaForCausalLM(shape).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
        paths.append(folder / name)
    return paths[0], paths[1]


def make_config(folder: Path, steps: int) -> RunConfig:
    teacher, student = make_pair(folder)
    data = folder / "prompts.jsonl"
    lines = [{"prompt": f"tell me about {'abcdefghij'[i % 10] * (1 + i % 9)} number {i}"} for i in range(300)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return build_config({
        "teacher": {"model": str(teacher), "precision": "fp32"},
        "student": {"model": str(student), "precision": "fp32", "lora": {"r": 4, "alpha": 8}},
        "data": {"train": str(data), "num_validation": 4},
        "rollout": {"max_new_tokens": 12, "batch_size": 4, "reuse": 3, "decay_rate": 0.5, "block_tokens": 2},
        "train": {"max_steps": steps, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
                  "eval_steps": 50, "save_steps": 25, "device": "cpu", "compute_dtype": "fp32"},
    })  # fmt: skip


def watch(process: subprocess.Popen[bytes], metrics: Path) -> list[dict[str, int]]:
    """Step, resident bytes and open files of the process, once a second until it ends."""
    samples = []
    proc = Path(f"/proc/{process.pid}")
    while process.poll() is None:
        time.sleep(1)
        try:
            status = (proc / "status").read_text()
            files = len(list((proc / "fd").iterdir()))
            last = metrics.read_text(encoding="utf-8").rsplit("\n", 2)[-2]
        except (OSError, IndexError):  # it has just begun, or ended
            continue
        resident = next((line for line in status.splitlines() if line.startswith("VmRSS")), None)
        if resident is not None:
            resident_bytes = int(resident.split()[1]) * 1024
            samples.append({"step": json.loads(last)["step"], "resident_bytes": resident_bytes, "open_files": files})
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warm-up", type=int, default=200)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "config.yaml"
        config.write_text(dump_config(make_config(folder, args.steps)))
        command = [sys.executable, "-m", "qswitch", "distill", "--config", str(config), "--output-dir", f"{folder}/run"]
        started = time.perf_counter()
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        samples = watch(process, folder / "run" / "metrics.jsonl")
        seconds = time.perf_counter() - started
        if process.returncode != 0:
            raise SystemExit(f"the run ended with exit code {process.returncode}")

    def between(first: float, last: float) -> dict[str, Any]:
        chosen = [s for s in samples if first <= s["step"] <= last]
        files = [s["open_files"] for s in chosen]
        return {
            "samples": len(chosen),
            "resident_bytes": statistics.median(s["resident_bytes"] for s in chosen),
            "open_files": [min(files), statistics.median(files), max(files)],
        }

    tenth = args.steps / 10
    early = between(args.warm_up, args.warm_up + tenth)
    late = between(args.steps - tenth, args.steps)
    result = {
        "benchmark": "long_run",
        "settings": {"steps": args.steps, "warm_up": args.warm_up},
        "seconds": round(seconds, 1),
        "after_warm_up": early,
        "at_the_end": late,
        "growth_share": late["resident_bytes"] / early["resident_bytes"] - 1,
    }
    publish(result, args.output)


if __name__ == "__main__":
    main()
