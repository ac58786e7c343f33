"""Does a run of several processes survive the death of any of them at any moment?

    python -m benchmarks.kills --output benchmarks/results/kills.json

Starts one training in two processes and lets it end, then starts it again and again: at a random moment (while it
starts, or within a step after some more have been taken) one of the two is killed with SIGKILL, and what is left has 30
seconds to end by itself; then the run is resumed. After ten kills it ends in peace. Its adapter must be that of the run
which nobody killed, to 1e-10 in float64. Fails otherwise. Tiny random models, so about ten minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.provenance import publish
from qswitch.layers import build_config, dump_config
from tests.tiny import save_tiny_pair

LIMIT_S = 30.0


def write_config(folder: Path, steps: int) -> Path:
    """A SWITCH run with ground truth and reuse on two tiny models."""
    teacher, student = save_tiny_pair(folder)
    data = folder / "data.jsonl"
    rows = [
        {"prompt": f"tell me about {'abcdefghij'[i % 10] * (1 + i % 7)}", "response": f"it is {i}"} for i in range(40)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = build_config({
        "teacher": {"model": str(teacher), "precision": "fp32"},
        "student": {"model": str(student), "precision": "fp32", "lora": {"r": 4, "alpha": 8}},
        "data": {"train": str(data), "num_validation": 4, "ground_truth_mix": 0.3},
        "rollout": {"max_new_tokens": 12, "batch_size": 4, "block_tokens": 2, "reuse": 2, "decay_rate": 0.5},
        "train": {"max_steps": steps, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
                  "learning_rate": 5e-3, "eval_steps": 10, "save_steps": 2, "device": "cpu", "compute_dtype": "fp64"},
    })  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    return path


def launch(*words: str) -> subprocess.Popen[bytes]:
    """torchrun with two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "qswitch"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, "distill", *words], env=environment, stderr=subprocess.DEVNULL,
                            stdout=subprocess.DEVNULL, start_new_session=True)  # fmt: skip


def workers_of(launcher: int) -> list[int]:
    """Process ids of the launcher's children that run qswitch."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == launcher and b"qswitch" in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return sorted(found)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def steps_logged(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_text(encoding="utf-8").count("loss_tokens")
    except OSError:
        return 0


def kill_once(run: Path, config: Path, draw: random.Random) -> dict[str, Any]:
    """Start or resume, kill one process at a random moment, and time the end of the others."""
    begun = (run / "config.yaml").exists()
    launcher = launch("--resume", str(run)) if begun else launch("--config", str(config), "--output-dir", str(run))
    started, before = time.monotonic(), steps_logged(run)
    while len(workers_of(launcher.pid)) < 2 and launcher.poll() is None:
        time.sleep(0.05)
    workers = workers_of(launcher.pid)
    more = draw.choice((0, 1, 2, 3))  # 0: at any moment of the start
    if more:
        while steps_logged(run) < before + more and launcher.poll() is None and time.monotonic() - started < 600:
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.6))
    else:
        time.sleep(draw.uniform(0.0, 12.0))
    victim = draw.randrange(2)
    with contextlib.suppress(ProcessLookupError):
        os.kill(workers[victim], signal.SIGKILL)
    killed = time.monotonic()
    while any(map(is_alive, workers)) and time.monotonic() - killed < LIMIT_S + 30:
        time.sleep(0.05)
    seconds = time.monotonic() - killed
    launcher.wait(timeout=60)
    return {"after_steps": steps_logged(run), "victim": victim, "seconds_to_end": round(seconds, 2),
            "launcher_exit": launcher.returncode}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/kills"), help="Must be new.")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    config, draw = write_config(args.folder, args.steps), random.Random(args.seed)
    whole, killed = args.folder / "whole", args.folder / "killed"
    assert launch("--config", str(config), "--output-dir", str(whole)).wait() == 0
    kills = []
    for number in range(args.kills):
        kills.append(kill_once(killed, config, draw))
        print(number, kills[-1], file=sys.stderr, flush=True)
    words = ("--resume", str(killed)) if (killed / "config.yaml").exists() else (
        "--config", str(config), "--output-dir", str(killed))  # fmt: skip
    assert launch(*words).wait() == 0, "resumed and not disturbed, the run ends"
    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (killed, whole))
    difference = max((ours[name] - theirs[name]).abs().max().item() for name in theirs)
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
             if "loss_tokens" in line]  # fmt: skip
    slowest = max(kill["seconds_to_end"] for kill in kills)
    result = {"kills": kills, "slowest_end_s": slowest, "adapter_difference": difference, "steps": args.steps}
    publish(result, args.output)
    assert slowest < LIMIT_S and difference <= 1e-10, result
    assert steps == list(range(1, args.steps + 1)), "every step stands in the log once"


if __name__ == "__main__":
    main()
