"""How much host memory does a merge take, in bytes per parameter of the student?

    python -m benchmarks.merge_memory --output benchmarks/results/merge_memory.json

Builds a Llama of random weights (tied head, hidden width 1,024), gives it a LoRA run, and merges it in a process of its
own. Reported is the process's peak resident memory less what it held when the merge began, libraries included, for two
depths; the slope between them is the cost of a parameter without what a merge of nothing costs. As yardstick, in the
same process shape, the passes in fp64 over the whole model at once, which the merge did before it went layer by layer.
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
from qswitch.export.merge import merge_run
from qswitch.layers import build_config
from qswitch.models.runtime import Runtime
from qswitch.models.student import load_student, save_adapter
from qswitch.run_dir import RunDir
from tests.tiny import tiny_tokenizer

VOCAB_SIZE = 16_384


def make_run(folder: Path, layers: int) -> int:
    """A run directory under `folder` of a random student with an adapter; its number of parameters."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=True,
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


def measure(folder: Path, whole: bool) -> None:
    """In a process of its own: merge, and print the growth of the peak."""
    if whole:
        import qswitch.export.merge as export

        export._parts = lambda hf: iter([hf])  # the yardstick: one part, the model
    forget_peak()
    before = peak_bytes()
    merge_run(folder / "run", folder / f"merged-{whole}")
    print(json.dumps({"bytes": peak_bytes() - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs=2, default=[4, 12])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.measure is not None:
        measure(args.measure, args.whole)
        return
    rows: list[dict[str, Any]] = []
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as text:
            parameters = make_run(Path(text), layers)
            for whole in (False, True):
                command = [sys.executable, "-m", "benchmarks.merge_memory", "--measure", text]
                answer = subprocess.run(
                    [*command, *(["--whole"] if whole else [])], check=True, capture_output=True, text=True
                ).stdout
                grown = json.loads(answer.splitlines()[-1])["bytes"]
                rows.append(
                    {
                        "layers": layers,
                        "parameters": parameters,
                        "fp64": "whole model" if whole else "by layer",
                        "peak_growth_bytes": grown,
                        "bytes_per_parameter": round(grown / parameters, 2),
                    }
                )
    slopes = {}
    for kind in ("by layer", "whole model"):
        small, large = (r for r in rows if r["fp64"] == kind)
        slopes[kind] = round(
            (large["peak_growth_bytes"] - small["peak_growth_bytes"]) / (large["parameters"] - small["parameters"]), 2
        )
    result = {"benchmark": "merge_memory", "rows": rows, "bytes_per_further_parameter": slopes}
    publish(result, args.output)


if __name__ == "__main__":
    main()
