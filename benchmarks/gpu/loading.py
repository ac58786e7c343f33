"""Stage 2: models of the presets' size, from disk to the device: seconds, and bytes against the plan."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.random_models import model_folder, prompts_file
from benchmarks.gpu.report import GIB, Context, Report
from qswitch.config import RunConfig
from qswitch.errors import ModelError
from qswitch.layers import build_config
from qswitch.models.host_memory import resident_bytes
from qswitch.models.language_model import LanguageModel
from qswitch.models.load import load_teacher
from qswitch.models.residency import SwappedModel
from qswitch.models.runtime import make_runtime
from qswitch.models.student import load_student
from qswitch.plan.machine import describe_machine
from qswitch.plan.scheduler import plan_run


def run(context: Context, report: Report) -> None:
    """Make the models, then load each as a run does."""
    for name in ("teacher-7b", "student-1.1b"):
        report.measure(f"make {name}", partial(_make, context, name))
    for precision in ("nf4", "bf16", "int8"):
        report.measure(f"teacher {precision}", partial(teacher_loads, context, precision))
    report.measure("student", partial(student_loads, context))
    report.measure("teacher nf4 leaves and comes back", partial(teacher_moves, context))


def _make(context: Context, name: str) -> dict[str, Any]:
    folder = model_folder(context, name)
    return {"gib": round(sum(f.stat().st_size for f in Path(folder).glob("*.safetensors")) / GIB, 3)}


def pair_config(context: Context, *, precision: str = "nf4", **sections: dict[str, Any]) -> RunConfig:
    """The pair of random models as a run has it; `sections` come on top."""
    values: dict[str, Any] = {
        "teacher": {"model": str(model_folder(context, "teacher-7b")), "precision": precision},
        "student": {"model": str(model_folder(context, "student-1.1b"))},
        "data": {"train": str(prompts_file(context)), "template": "plain", "num_validation": 4},
        "rollout": {"max_new_tokens": 16 if context.tiny else 256},
        "train": {"device": context.device.type},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return build_config(values)


def load_pair(context: Context, precision: str = "nf4") -> tuple[LanguageModel, LanguageModel]:
    """(teacher, student) of random weights on the device."""
    config = pair_config(context, precision=precision)
    runtime = make_runtime(config.train)
    return load_teacher(config.teacher, runtime), load_student(config, runtime, vocab_size=None, base_path=None)


def _device_bytes(context: Context) -> int:
    return torch.cuda.memory_allocated(context.device) if context.device.type == "cuda" else resident_bytes()


def teacher_loads(context: Context, precision: str) -> dict[str, Any]:
    """Seconds, resident bytes over planned ones; the report's peaks over the plan's load phase."""
    config = pair_config(context, precision=precision)
    plan = plan_run(config, machine=describe_machine(config.train, context.device.type))
    before, started = _device_bytes(context), time.perf_counter()
    try:
        teacher = load_teacher(config.teacher, make_runtime(config.train))
    except ModelError as error:
        return {"refused": str(error)[:300]}
    context.synchronise()
    seconds = time.perf_counter() - started
    held = _device_bytes(context) - before
    planned = plan.parts["teacher_weights"]
    return {
        "load_seconds": round(seconds, 2),
        "held_gib": round(held / GIB, 4),
        "planned_gib": round(planned / GIB, 4),
        "held_over_planned": round(held / planned, 4),
        "planned_load_buffer_gib": round(plan.parts["load_buffer"] / GIB, 4),
        "host_process_gib": round(resident_bytes() / GIB, 3),
        "parameters": sum(p.numel() for p in teacher.parameters()),
    }


def student_loads(context: Context) -> dict[str, Any]:
    """The student with its adapters."""
    config = pair_config(context)
    plan = plan_run(config, machine=describe_machine(config.train, context.device.type))
    before, started = _device_bytes(context), time.perf_counter()
    student = load_student(config, make_runtime(config.train), vocab_size=None, base_path=None)
    context.synchronise()
    seconds, held = time.perf_counter() - started, _device_bytes(context) - before
    planned = plan.parts["student_weights"] + plan.parts["adapters"]
    return {
        "load_seconds": round(seconds, 2),
        "held_gib": round(held / GIB, 4),
        "planned_gib": round(planned / GIB, 4),
        "held_over_planned": round(held / planned, 4),
        "trainable": sum(p.numel() for p in student.parameters() if p.requires_grad),
    }


def teacher_moves(context: Context) -> dict[str, Any]:
    """Seconds to leave and to come back, and what stays allocated meanwhile."""
    config = pair_config(context)
    teacher = load_teacher(config.teacher, make_runtime(config.train))
    started = time.perf_counter()
    swapped = SwappedModel(teacher)
    copied = time.perf_counter() - started
    found = {"copy_seconds": round(copied, 2), "moved_gib": round(swapped.num_bytes / GIB, 3),
             "host_gib": round(swapped.host_bytes / GIB, 3)}  # fmt: skip
    leaves, returns = [], []
    for _ in range(3):
        started = time.perf_counter()
        swapped.leave()
        context.synchronise()
        leaves.append(time.perf_counter() - started)
        found["allocated_while_away_gib"] = round(_device_bytes(context) / GIB, 3)
        started = time.perf_counter()
        swapped.come_back()
        context.synchronise()
        returns.append(time.perf_counter() - started)
    return {**found, "leave_seconds": [round(s, 3) for s in leaves], "return_seconds": [round(s, 3) for s in returns]}
