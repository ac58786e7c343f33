"""A run directory on tiny models whose student has moved away from its start, made without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qswitch.layers import build_config
from qswitch.models.runtime import Runtime
from qswitch.models.student import load_student, save_adapter
from qswitch.run_dir import RunDir
from tests.tiny import save_tiny_pair, tiny_tokenizer

FP32 = Runtime(device=torch.device("cpu"), compute_dtype=torch.float32)
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "and",
    "runs",
    "far",
    "away",
    "from",
    "all",
    "is",
]


def write_test_set(path: Path, count: int = 6) -> Path:
    """Records with references of very different length; the third has two of them, the last has none."""
    lines: list[dict[str, Any]] = []
    for i in range(count):
        answer = " ".join(WORDS[j % len(WORDS)] for j in range(1 + 3 * i))
        lines.append({"instruction": f"say {WORDS[i]}", "input": "" if i % 2 else "now", "output": answer})
    lines[2]["references"] = [lines[2]["output"], "another good answer"]
    del lines[-1]["output"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def make_run(folder: Path, **changes: Any) -> RunDir:
    """RUN with config.yaml and adapter."""
    teacher, student = save_tiny_pair(folder / "pair")
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"tell {w}", "response": w}) + "\n" for w in WORDS))
    values: dict[str, Any] = {
        "teacher": {"model": str(teacher), "precision": "fp32"},
        "student": {"model": str(student), "precision": "fp32", "lora": {"r": 4, "alpha": 8}},
        "data": {"train": str(data), "num_validation": 4},
        "rollout": {"max_new_tokens": 10, "batch_size": 4},
        "train": {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
                  "eval_steps": 2, "save_steps": 2, "device": "cpu", "compute_dtype": "fp32"},
    }  # fmt: skip
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        values.setdefault(section, {})[key] = value
    config = build_config(values)
    run_dir = RunDir.create(folder / "run", config)
    model = load_student(config, FP32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, run_dir.adapter_path)
    tiny_tokenizer().save_pretrained(run_dir.adapter_path)
    return run_dir
