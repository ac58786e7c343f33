"""Which sizes fit a memory budget, and which of those run fastest.

Arithmetic over shapes: neither weights nor a GPU are needed. How many bytes a configuration takes stands in
`breakdown.py`, how long a step takes in `cost.py`. Rollout rows are chosen for speed, also above the configured ones;
the other values are upper bounds. The effective batch stays: a plan changes time and memory and never what is learnt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from heapq import merge
from itertools import product
from operator import itemgetter
from typing import Any, Literal

from qswitch.config import RunConfig
from qswitch.errors import ConfigError
from qswitch.plan import memory
from qswitch.plan.breakdown import break_down, share_of
from qswitch.plan.cost import expected_steps, run_seconds, step_seconds
from qswitch.plan.machine import Gpu, Machine, describe_machine, find_budget
from qswitch.plan.model_files import shape_for
from qswitch.plan.run_plan import Plan, in_gib
from qswitch.plan.shapes import ModelShape
from qswitch.plan.stored import unmovable
from qswitch.plan.vocabulary import with_tokenizer
from qswitch.units import GIB

MIN_CHUNK_TOKENS = 32
"""Smaller loss chunks save little and starve the matrix product."""
WORTH_SAYING = 0.97
"""A larger budget is named where its step takes at most this share of the time."""
OVERVIEW_BUDGETS_GIB = (6, 8, 12, 16, 24)
"""What `qswitch plan --all` tries: the memory of consumer cards."""


def measure(config: RunConfig, teacher: ModelShape, student: ModelShape, machine: Machine, processes: int = 1) -> Plan:
    """The bytes of a configuration exactly as it is; pure. No budget: the plan is said to fit."""
    sizes = break_down(config, teacher, student, machine, processes)
    prompt_tokens = config.data.max_prompt_tokens
    return Plan(sizes, _choices(config), None, True, (), config, prompt_tokens, machine, processes=processes)


def _choices(config: RunConfig) -> dict[str, Any]:
    return {
        "teacher.residency": config.teacher.residency,
        "rollout.batch_size": config.rollout.batch_size,
        "train.per_device_train_batch_size": config.train.per_device_train_batch_size,
        "train.gradient_accumulation_steps": config.train.gradient_accumulation_steps,
        "student.gradient_checkpointing": config.student.gradient_checkpointing,
        "loss.chunk_tokens": config.loss.chunk_tokens,
        "cache.format": config.cache.format,
        "cache.device_budget_gib": config.cache.device_budget_gib,
    }


def with_choices(config: RunConfig, choices: dict[str, Any]) -> RunConfig:
    """The configuration with dotted settings replaced; every other value, and whether it was written, is kept."""
    by_section: dict[str, dict[str, Any]] = {}
    for dotted, value in choices.items():
        name, _, field = dotted.partition(".")
        if getattr(getattr(config, name), field) != value:
            by_section.setdefault(name, {})[field] = value
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in by_section.items()}
    )


# -------------------------------------------------------------------------------------------------------- the scheduler


def plan_run(
    config: RunConfig,
    *,
    budget_bytes: int | None = None,
    device: Literal["auto", "cuda", "cpu"] | None = None,
    gpu: Gpu | None = None,
    machine: Machine | None = None,
    longest_prompt_tokens: int | None = None,
    keep_sizes: bool = False,
    processes: int = 1,
    num_steps: int | None = None,
) -> Plan:
    """The fastest plan within `budget_bytes`; without a budget the configuration as it is.

    Where nothing fits, the smallest plan is returned with fits=False (`require_fit` turns it into the error).

    Args:
        device: plans for another machine than train.device would find here (`plan --vram` plans for a GPU).
        gpu: plans for the speed of a card.
        machine: plans for just that one, instead of what train, device and gpu say.
        longest_prompt_tokens: of the data, where it is known; else prompts are planned as long as they may be.
        keep_sizes: measures the configuration's own sizes against the budget, for a run that has begun.
        processes: share the sequences of a step; the budget is that of each.
        num_steps: that train.num_epochs stands for, where somebody has counted the prompts.

    Raises:
        ConfigError: the shape of a model is not known, or the teacher cannot leave the device as it is asked to.
    """
    asked_for = config
    if longest_prompt_tokens is not None and longest_prompt_tokens < config.data.max_prompt_tokens:
        config = with_choices(config, {"data.max_prompt_tokens": longest_prompt_tokens})
    if config.train.num_epochs is None:
        num_steps = config.train.step_limit
    elif num_steps is not None:
        config = with_choices(config, {"train.max_steps": num_steps})
    teacher, student = model_shapes(config)
    fixed = unmovable(teacher.stored, config.teacher.precision)
    if fixed is not None and config.teacher.residency == "swap":
        raise ConfigError(fixed)
    machine = machine or describe_machine(config.train, device, gpu)
    asked = measure(config, teacher, student, machine, processes)
    best, better, notes = asked, None, _notes(config, machine, teacher, student)
    if config.data != asked_for.data:
        notes.append(
            f"For the data's longest prompt, {longest_prompt_tokens} tokens; data.max_prompt_tokens allows "
            f"{asked_for.data.max_prompt_tokens}."
        )
    if processes > 1:
        total = config.train.sequences_per_step
        notes.append(
            f"{processes} processes, each with {total // processes} of a step's {total} sequences: the memory is that "
            "of each, the time that of all together, without the wait for the longest responses."
        )
    if keep_sizes:
        notes.append("The sizes are those of a run that has begun; none is chosen anew.")
    elif budget_bytes is not None:
        best, better = _fastest_within(budget_bytes, asked, teacher, student)
        changes = ", ".join(f"{k} {asked.choices[k]} -> {v}" for k, v in best.choices.items() if v != asked.choices[k])
        if best.total_bytes <= budget_bytes and changes:
            why = "for speed" if asked.total_bytes <= budget_bytes else "to fit"
            notes.append(f"As written it needs {asked.total_gib:.2f} GiB; changed {why}: {changes}.")
    is_timed = machine.device == "cuda"
    one_step = step_seconds(share_of(best.config, processes), teacher, student, machine) if is_timed else None
    is_counted = config.train.num_epochs is None or num_steps is not None
    first_limit: str | None = None
    if one_step is not None and is_counted:
        num_steps, first_limit = expected_steps(best.config, one_step)
    return replace(
        best,
        config=with_choices(asked_for, best.choices),
        prompt_tokens=config.data.max_prompt_tokens,
        budget_bytes=budget_bytes,
        fits=budget_bytes is None or best.total_bytes <= budget_bytes,
        notes=tuple(notes),
        next_better=better,
        num_steps=num_steps,
        first_limit=first_limit,
        seconds=run_seconds(best.config, teacher, student, machine, processes) if is_timed and is_counted else None,
        step_seconds=one_step,
    )


def unequal_shares(config: RunConfig, processes: int) -> str | None:
    """Why so many processes cannot share a step's sequences equally, and the remedy; None where they can."""
    total = config.train.sequences_per_step
    if total % processes == 0:
        return None
    return (
        f"{processes} processes cannot share the {total} sequences of a step equally: "
        "train.per_device_train_batch_size * train.gradient_accumulation_steps counts those of all processes. Start "
        f"another number of processes, or make it {-(-total // processes) * processes}."
    )


def plan_for(
    config: RunConfig,
    *,
    vram: str | None = None,
    gpu: str | None = None,
    keep_sizes: bool = False,
    processes: int = 1,
    num_steps: int | None = None,
) -> tuple[Plan, str]:
    """The plan of a configuration on this machine, within `vram`, or on the card `gpu`; and where the budget is from.

    Raises:
        ConfigError: the shape of a model, the card or the budget is not known, or the processes cannot share a step.
    """
    if (problem := unequal_shares(config, processes)) is not None:
        raise ConfigError(problem)
    config = with_tokenizer(config)
    budget = find_budget(config.train, vram=vram, gpu=gpu, num_gpus=config.teacher.num_gpus)
    plan = plan_run(
        config,
        budget_bytes=budget.num_bytes,
        device=budget.device,
        gpu=budget.gpu,
        keep_sizes=keep_sizes,
        processes=processes,
        num_steps=num_steps,
    )
    return plan, budget.origin


def model_shapes(config: RunConfig) -> tuple[ModelShape, ModelShape]:
    """Teacher's and student's shape, with the problems of both in one error."""
    problems, shapes = [], []
    for section in (config.teacher, config.student):
        try:
            shapes.append(shape_for(section))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return shapes[0], shapes[1]


def _fastest_within(
    budget_bytes: int, asked: Plan, teacher: ModelShape, student: ModelShape
) -> tuple[Plan, tuple[int, float] | None]:
    """The fastest plan that fits, and what a larger budget would bring; where none fits, the smallest plan.

    Sizes are tried in the order of their time, so that all that is faster than the first that fits needs more memory,
    and nothing slower has to be measured.
    """
    machine, processes = asked.machine, asked.processes

    def timed(configs: Iterator[RunConfig]) -> Iterator[tuple[float, RunConfig]]:
        for config in configs:
            yield step_seconds(share_of(config, processes), teacher, student, machine), config

    groups = [iter([asked.config]), *_candidates(asked.config, teacher, processes)]
    best, best_seconds = None, 0.0
    larger: list[tuple[float, Plan]] = []
    for seconds, config in merge(*map(timed, groups), key=itemgetter(0)):
        if best is not None and seconds > best_seconds:
            break
        plan = measure(config, teacher, student, machine, processes)
        if plan.total_bytes > budget_bytes:
            larger.append((seconds, plan))
        elif best is None or plan.total_bytes < best.total_bytes:
            best, best_seconds = plan, seconds
    if best is None:
        return min((plan for _, plan in larger), key=lambda plan: plan.total_bytes), None
    return best, _next_better(larger, best_seconds)


def _candidates(config: RunConfig, teacher: ModelShape, processes: int = 1) -> Iterator[Iterator[RunConfig]]:
    """Every combination of sizes with the same effective batch: any number of rows, the rest at most as configured.

    Those of one group differ in what costs little time, and take longer from one to the next.
    """
    micro, effective = config.train.per_device_train_batch_size, config.train.sequences_per_step
    share = effective // processes
    checkpointing = [True] if config.student.gradient_checkpointing else [False, True]
    most = config.loss.chunk_tokens
    chunks = sorted({max(min(most, MIN_CHUNK_TOKENS), most // n) for n in (1, 2, 4)}, reverse=True)
    # Rows from host memory cost one wait for each micro-batch, smaller chunks one for each chunk more.
    small = [
        {"loss.chunk_tokens": chunk, "cache.device_budget_gib": device_budget}
        for chunk in chunks
        for device_budget in sorted({config.cache.device_budget_gib, 0.0}, reverse=True)
    ]
    residencies = ["swap"] if config.teacher.residency == "swap" else ["resident", "swap"]
    # It has left before the student comes, lies elsewhere, or cannot leave.
    if config.passes_text or config.teacher.num_gpus > 1 or unmovable(teacher.stored, config.teacher.precision):
        residencies = ["resident"]
    rows = _row_counts(share * config.rollout.steps_at_once)
    sizes = [n for n in range(1, micro + 1) if share % n == 0]
    for residency, num_rows, size, recompute in product(residencies, rows, sizes, checkpointing):
        large = with_choices(config, {
            "teacher.residency": residency,
            "rollout.batch_size": num_rows,
            "train.per_device_train_batch_size": size,
            "train.gradient_accumulation_steps": effective // size,
            "student.gradient_checkpointing": recompute,
        })  # fmt: skip
        yield map(partial(with_choices, large), small)


def _row_counts(sequences: int) -> list[int]:
    """The fewest rows for each number of batches that rollouts are written in: more rows would only take memory."""
    return sorted({-(-sequences // n) for n in range(1, sequences + 1)})


def _next_better(larger: list[tuple[float, Plan]], best_seconds: float) -> tuple[int, float] | None:
    """The smallest larger budget that is worth saying, and the share of the time that its fastest plan takes."""
    worth = [(seconds, plan) for seconds, plan in larger if seconds <= WORTH_SAYING * best_seconds]
    if not worth:
        return None
    size = min(plan.total_bytes for _, plan in worth)
    fastest = min(seconds for seconds, plan in worth if plan.total_bytes <= size)
    return size, fastest / best_seconds


def _notes(config: RunConfig, machine: Machine, teacher: ModelShape, student: ModelShape) -> list[str]:
    where = "a GPU" if machine.device == "cuda" else "the CPU"
    notes = [f"Planned for {where}, arithmetic in {machine.compute_dtype}."]
    if machine.compute_dtype == "fp16":
        notes.append("fp16: weights that do not train are kept in it, those that train in fp32; the loss is scaled.")
    if machine.device == "cuda":
        context = memory.CUDA_CONTEXT_BYTES / GIB
        notes.append(
            f"Unmeasured on a GPU: CUDA context ({context:.1f} GiB), activations and the "
            f"{memory.FRAGMENTATION_SHARE:.0%} fragmentation allowance are estimates."
        )
    elif machine.compute_bytes == 4 and "bf16" in (config.teacher.precision, config.student.precision):
        notes.append("This CPU has no bf16 units: weights in bf16 are kept in fp32, 4 bytes each.")
    for family in dict.fromkeys(shape.model_type for shape in (teacher, student) if shape.counted):
        notes.append(
            f"Generic: {family} is in no table of families. Its parameters and caches were counted in transformers' "
            "class; what its layers save for the backward pass is estimated from the names of their modules."
        )
    if config.passes_text:
        notes.append(
            "The tokenizers differ: the teacher writes all its responses first, alone, and the student learns them as "
            "text when the teacher has left."
        )
    if config.student.shrink_to_layers is not None:
        notes.append("The student is cut from a model in bf16; one that is stored in fp32 takes more while it is cut.")
    if config.loss.objective == "divergence":
        notes.append(
            "The cache of teacher outputs is planned as if the teacher wrote every token, the most that it can hold."
        )
    return notes


# --------------------------------------------------------------------------------------------------------- every preset


def plan_overview(configs: dict[str, RunConfig]) -> list[dict[str, Any]]:
    """Each configuration against the budgets of consumer cards: name, GiB as written, and per budget what it takes.

    Hours are those of the reference card, whatever the budget.
    """
    rows = []
    for name, config in configs.items():
        asked = plan_run(config, device="cuda")
        cells = []
        for gib in OVERVIEW_BUDGETS_GIB:
            plan = plan_run(config, budget_bytes=gib * GIB, device="cuda")
            changed = {k: v for k, v in plan.choices.items() if v != asked.choices[k]} if plan.fits else {}
            cells.append(
                {
                    "budget_gib": gib,
                    "fits": plan.fits,
                    "total_gib": in_gib(plan.total_bytes),
                    "rollout_rows": plan.choices["rollout.batch_size"],
                    "hours": None if plan.seconds is None or not plan.fits else round(plan.seconds / 3600, 1),
                    "changed": changed,
                }
            )
        rows.append({"name": name, "as_written_gib": in_gib(asked.total_bytes), "budgets": cells})
    return rows
