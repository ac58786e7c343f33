"""Stage 5: `qswitch distill` of a 7B teacher and a 1.1B student within 12, 10 and 8 GiB, peaks against the plan.

On a larger card `--vram` caps the process, so allocations fail as they would on a small one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.gpu.random_models import model_folder, prompts_file
from benchmarks.gpu.report import Context, Report
from benchmarks.memory import compare

BUDGETS_GIB = (12, 10, 8)


def run(context: Context, report: Report) -> None:
    """One run of a step per budget, the largest first; with --tiny on a CPU a single one."""
    for gib in (2,) if context.tiny else BUDGETS_GIB:
        report.measure(f"{gib} GiB", partial(capped, context, report, gib))


def capped(context: Context, report: Report, gib: int) -> dict[str, Any]:
    """Planned and measured peaks of the preset llama-7b-to-1b with random weights, by phase."""
    overrides = [
        f"teacher.model={model_folder(context, 'teacher-7b')}",
        f"student.model={model_folder(context, 'student-1.1b')}",
        f"data.train={prompts_file(context)}",
        "data.template=plain",
        "data.num_validation=4",
        "train.max_steps=1",
        "train.warmup_steps=0",
        "train.gradient_accumulation_steps=2",  # half of the responses, and the same peaks
        "train.eval_own_prompts=0",
        f"train.device={context.device.type}",
    ]
    if context.tiny:
        overrides += ["rollout.max_new_tokens=8", "train.per_device_train_batch_size=2",
                      "train.gradient_accumulation_steps=1"]  # fmt: skip
    found = compare("llama-7b-to-1b", overrides, f"{gib}GiB", timeout_s=max(report.seconds_left, 60))
    return {k: v for k, v in found.items() if k not in ("overrides", "notes")}
