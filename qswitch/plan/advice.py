"""What to do about a plan: what would make one fit that does not, and what would make a run faster that fits.

Every change that is named has been measured on the plan it is named for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from qswitch.errors import PlanError
from qswitch.plan import memory
from qswitch.plan.cost import step_seconds
from qswitch.plan.render import duration, shortage
from qswitch.plan.run_plan import Plan
from qswitch.plan.scheduler import WORTH_SAYING, measure, model_shapes, plan_run, with_choices
from qswitch.units import GIB

MOST_STEPS_AT_ONCE = 4
"""At most this many steps at once are proposed: beyond, the responses are written by too old a student."""


def require_fit(plan: Plan) -> None:
    """Nothing, or the error that says what is needed and what would fit.

    Raises:
        PlanError: the plan does not fit; exit code 3.
    """
    if not plan.fits:
        raise PlanError(explain_no_fit(plan))


def require_own_sizes_fit(plan: Plan) -> None:
    """Nothing, or the error of a run that has begun with sizes which this budget does not hold.

    Raises:
        PlanError: the plan does not fit; exit code 3.
    """
    if not plan.fits:
        raise PlanError(
            f"{shortage(plan, 'with the sizes that the run began with')}\nA run keeps its sizes when it is resumed. "
            f"Give it at least {_enough(plan.total_bytes)}, leave --vram out, or start a new run with that --vram."
        )


def explain_no_fit(plan: Plan) -> str:
    """What the smallest plan needs, part by part, against the budget, and the settings that would fit."""
    remedies = list(_remedies(plan))
    if not remedies:
        remedies = [f"choose a smaller teacher or give at least {_enough(plan.total_bytes)}"]
    text = ", or ".join(remedies)
    return f"{shortage(plan)}\n{text[0].upper()}{text[1:]}."


def _enough(num_bytes: int) -> str:
    """A budget to ask for: rounded up, since one that is rounded down would not hold it."""
    return f"{math.ceil(100 * num_bytes / GIB) / 100:.2f} GiB"


def _remedies(plan: Plan) -> Iterator[str]:
    """Single changes that make the smallest plan fit, each tried."""
    config = with_choices(plan.config, {"data.max_prompt_tokens": plan.prompt_tokens})
    budget, machine = plan.budget_bytes or 0, plan.machine

    def fits(changes: dict[str, Any]) -> bool:
        changed = with_choices(config, changes)
        return measure(changed, *model_shapes(changed), machine, plan.processes).total_bytes <= budget

    if config.teacher.precision not in ("nf4", "stored") and fits({"teacher.precision": "nf4"}):
        yield f"set teacher.precision=nf4 (now {config.teacher.precision})"
    for key in ("rollout.max_new_tokens", "data.max_prompt_tokens"):
        section, _, field = key.partition(".")
        now = getattr(getattr(config, section), field)
        low, high = 0, now - 1  # the largest value that fits lies in [low, high]; 0 stands for none
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits({key: middle}) else (low, middle - 1)
        rounded = low // 16 * 16 or low
        if rounded >= 16:
            yield f"lower {key} from {now} to {rounded}"
    student = config.student
    if student.adapter == "none":
        if fits({"student.adapter": "lora"}):
            yield "set student.adapter=lora"
    elif student.precision != "nf4" and fits({"student.precision": "nf4"}):
        yield "set student.precision=nf4"
    if config.train.optimizer == "adamw" and machine.device == "cuda" and fits({"train.optimizer": "paged_adamw_8bit"}):
        yield "set train.optimizer=paged_adamw_8bit"


DESKTOP_BYTES = GIB
"""What a desktop takes of the card that drives its screen, at most."""
WORTH_A_WARNING = 1.25
"""A desktop is named where the run takes at least so many times as long with it."""


def beside_a_desktop(plan: Plan) -> str | None:
    """What a desktop on the same card would change about a plan for a whole card; None where that is little."""
    if not plan.fits or plan.budget_bytes is None or not plan.machine.gpu.drives_screens:
        return None
    left = plan.budget_bytes - DESKTOP_BYTES
    config = with_choices(plan.config, {"data.max_prompt_tokens": plan.prompt_tokens})
    with_it = plan_run(
        config, budget_bytes=left, machine=plan.machine, processes=plan.processes, num_steps=plan.num_steps
    )
    now, then = plan.seconds or plan.step_seconds or 0, with_it.seconds or with_it.step_seconds or 0
    if with_it.fits and then < WORTH_A_WARNING * now:
        return None
    time = f"about {duration(then)}{'' if with_it.seconds else ' a step'}" if with_it.fits else "the run does not fit"
    # Rounded down, for the sum of the two must not be more than there is.
    budget = f"--vram {math.floor(10 * left / GIB) / 10:.1f}GiB"
    return f"A desktop on the same card takes up to 1 GiB of it. With it: {time} ({budget} beside --gpu plans that)."


def faster(plan: Plan) -> list[str]:
    """What would make a run that fits faster, or its teacher exact, within the same memory; best first."""
    config = with_choices(plan.config, {"data.max_prompt_tokens": plan.prompt_tokens})
    if not plan.fits or plan.machine.device != "cuda":
        return []

    def planned(changes: dict[str, Any]) -> Plan:
        return plan_run(
            with_choices(config, changes),
            budget_bytes=plan.budget_bytes,
            machine=plan.machine,
            processes=plan.processes,
        )

    def share(other: Plan) -> float:
        now, then = (step_seconds(p, *model_shapes(p), plan.machine) for p in (config, other.config))
        return then / now

    tried: list[tuple[float, str]] = []
    if config.student.gradient_checkpointing:
        other = planned({"student.gradient_checkpointing": False})
        if other.fits and not other.choices["student.gradient_checkpointing"] and share(other) <= WORTH_SAYING:
            tried.append((share(other), "student.gradient_checkpointing=false"))
    rollout = config.rollout
    live = config.needs_teacher and not config.passes_text
    if live and rollout.steps_at_once == 1 == rollout.reuse and not config.data.adaptive_share:
        best = WORTH_SAYING
        for steps in (2, MOST_STEPS_AT_ONCE):  # the older the responses, the more they must save
            other = planned({"rollout.steps_at_once": steps})
            if other.fits and share(other) <= best:
                best = WORTH_SAYING * share(other)
                staleness = f"responses up to {steps - 1} update{'s' if steps > 2 else ''} old"
                rows = other.choices["rollout.batch_size"]
                tried.append((share(other), f"rollout.steps_at_once={steps} ({rows} rollout rows, {staleness})"))
    lines = [f"{change}: about {100 * part:.0f} % of the time" for part, change in sorted(tried)]
    weights = memory.weight_bytes(model_shapes(config)[0], "bf16", plan.machine.compute_bytes)
    if config.needs_teacher and config.teacher.precision in ("nf4", "int8") and weights <= (plan.budget_bytes or 0):
        exact = planned({"teacher.precision": "bf16"})
        if exact.fits and exact.choices["teacher.residency"] == plan.choices["teacher.residency"]:
            room, time = f"{exact.total_gib:.1f} GiB", f"about {100 * share(exact):.0f} % of the time"
            lines.append(f"teacher.precision=bf16 fits too, in {room}: the teacher as it was trained, {time}")
    if plan.next_better is not None:
        size, part = plan.next_better
        lines.append(f"a budget of {_enough(size)}: about {100 * part:.0f} % of the time")
    return lines
