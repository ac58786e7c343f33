"""Is the planned peak the measured one? Runs `qswitch distill` for a few steps and puts both side by side.

    python -m benchmarks.memory --preset smollm2-demo --set train.max_steps=2
    python -m benchmarks.memory --preset llama-7b-to-1b --set train.max_steps=2 --vram 12GiB     # where there is a GPU

Each run is a process of its own, because a peak is of the whole process (resident set on a CPU, allocated bytes on a
GPU, beside which the CUDA context stands). `ratio` is measured over planned; `plan` is for the data's longest prompt.
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

from benchmarks.provenance import publish


def compare(preset: str, overrides: list[str], vram: str | None, timeout_s: float | None = None) -> dict[str, Any]:
    """Planned and measured peak of one short run, GiB."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "qswitch", "distill", "--preset", preset, "--output-dir", str(run)]
        command += [part for override in overrides for part in ("--set", override)]
        command += ["--vram", vram] if vram else []
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    on_gpu = summary["device"].startswith("cuda")
    planned = summary["planned_gib"] - (plan["parts"]["cuda_context"] if on_gpu else 0.0)
    return {
        "preset": preset,
        "overrides": overrides,
        "vram": vram,
        "device": summary["device"],
        "planned_gib": round(planned, 3),
        "measured_gib": summary["peak_gib"],
        "ratio": round(summary["peak_gib"] / planned, 3),
        "parts": plan["parts"],
        "phases": summary["phases_gib"],
        "choices": plan["choices"],
        "notes": plan["notes"],
        "out_of_memory": [event for line in lines for event in line.get("out_of_memory", [])],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--preset", action="append", required=True, help="repeatable")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="section.key=value, repeatable")
    parser.add_argument("--vram", help="as of `qswitch distill`")
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    args = parser.parse_args()
    runs = [compare(preset, args.overrides, args.vram) for preset in args.preset]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    publish({"benchmark": "memory", "runs": runs}, args.output, device)


if __name__ == "__main__":
    main()
