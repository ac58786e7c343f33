"""Does a merge take the host memory that is forecast for it, whatever the vocabulary?

    python -m benchmarks.merge_memory --output benchmarks/results/merge_memory.json

Builds Llamas of random weights (tied head, hidden width 640), one for each vocabulary, gives each a LoRA run, and
merges it in a process of its own. Reported is how much the peak of its resident memory grew beyond what it held when
the merge began, libraries loaded, beside `merge_bytes`, by which `qswitch merge` refuses what does not fit. The prompts
of the check are cut to 24 tokens, about what a subword tokenizer makes of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.provenance import publish
from qswitch.export.merge import merge_bytes, merge_run
from qswitch.layers import build_config
from qswitch.models.runtime import Runtime
from qswitch.models.shrink import CALIBRATION_PROMPTS
from qswitch.models.student import load_student, save_adapter
from qswitch.plan.model_files import shape_for
from qswitch.run_dir import RunDir
from tests.tiny import tiny_tokenizer

VOCABULARIES = (16_384, 49_152, 262_144)
PROMPT_TOKENS = 24


def make_run(folder: Path, vocab_size: int, layers: int) -> int:
    """A run directory under `folder` of a random student with an adapter; its number of parameters."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=640, intermediate_size=2048, num_hidden_layers=layers,
        num_attention_heads=10, num_key_value_heads=10, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    settings = build_config(
        {"teacher": {"model": str(folder / "base")}, "student": {"model": str(folder / "base")},
         "data": {"train": "x.jsonl"}}
    )  # fmt: skip
    run_dir = RunDir.create(folder / "run", settings)
    runtime = Runtime(device=torch.device("cpu"), compute_dtype=torch.float32)
    save_adapter(load_student(settings, runtime), run_dir.adapter_path)
    return sum(p.numel() for p in model.parameters())


def peak_bytes() -> int:
    """The most that this process has held since `forget_peak`; Linux (getrusage counts what the parent held, too)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024


def forget_peak() -> None:
    """Start counting anew, from what the process holds now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def measure(folder: Path) -> None:
    """In a process of its own: merge, and print the forecast and the growth of the peak."""
    prompts = [text[:PROMPT_TOKENS] for text in CALIBRATION_PROMPTS]  # a token each character
    shape = shape_for(RunDir.open(folder / "run").config.student)
    forecast = merge_bytes(shape, [PROMPT_TOKENS] * len(prompts))
    forget_peak()
    before = peak_bytes()
    merge_run(folder / "run", folder / "merged", prompts=prompts)
    print(json.dumps({"forecast_bytes": forecast, "peak_growth_bytes": peak_bytes() - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.measure is not None:
        measure(args.measure)
        return
    rows: list[dict[str, Any]] = []
    for vocab_size in VOCABULARIES:
        with tempfile.TemporaryDirectory() as text:
            parameters = make_run(Path(text), vocab_size, args.layers)
            command = [sys.executable, "-m", "benchmarks.merge_memory", "--measure", text]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row = {"vocabulary": vocab_size, "parameters": parameters, **json.loads(answer.splitlines()[-1])}
            rows.append({**row, "measured_over_forecast": round(row["peak_growth_bytes"] / row["forecast_bytes"], 3)})
    publish({"benchmark": "merge_memory", "layers": args.layers, "rows": rows}, args.output)


if __name__ == "__main__":
    main()
