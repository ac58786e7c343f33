"""Where a benchmark result comes from, and where it goes."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def provenance(device: str = "cpu", code: str = "qswitch") -> dict[str, Any]:
    """Commit, whether `code` differs from it, versions and hardware: what a result must say to be repeated."""
    root = Path(__file__).resolve().parent

    def git(*command: str) -> str | None:
        try:
            return subprocess.run(
                ["git", *command], cwd=root, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    changed = git("status", "--porcelain", "--untracked-files=no", "--", f"../{code}")
    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {name: version(name) for name in ("transformers", "tokenizers", "peft", "bitsandbytes", "datasets")},
        "hardware": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        },
    }


def publish(result: dict[str, Any], output: Path | None, device: str = "cpu") -> None:
    """Print a result with its provenance as JSON, and write it to `output`, making the folder."""
    text = json.dumps({**result, **provenance(device)}, indent=2)
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
