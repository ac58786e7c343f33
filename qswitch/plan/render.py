"""How a plan is shown to people. Formatting only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qswitch.plan.machine import GPUS
from qswitch.plan.run_plan import Plan
from qswitch.units import GIB

SHOWN_BYTES = GIB // 200
"""Parts below half a hundredth of a GiB would read 0.00."""
PHASE_TEXTS = {
    "cut": "while the student is cut",
    "write": "while the teacher writes alone",
    "load": "while the models are loaded",
    "rollout": "while responses are written",
    "train": "while the student learns",
    "validate": "while held-out prompts are scored",
}
PART_TEXTS = {
    "process": "Python and its libraries",
    "cuda_context": "CUDA itself",
    "teacher_weights": "teacher's weights",
    "teacher_adapter": "teacher's adapter",
    "teacher_head": "head of the teacher that worked earlier",
    "added_gradients": "gradients on their way to other processes",
    "student_weights": "student's weights",
    "adapters": "student's adapter",
    "optimizer_state": "state of the optimizer",
    "logit_cache": "cache of teacher outputs",
    "load_buffer": "buffers of loading",
    "teacher_kv_cache": "teacher's KV cache",
    "student_kv_cache": "student's KV cache",
    "rollout_logits": "logits of a round",
    "kept_hidden": "teacher outputs of a round",
    "prefill": "reading of the prompts",
    "dequantisation": "one layer unpacked, or the norm of DoRA",
    "autocast_copies": "weights cast for a pass",
    "recorded_passes": "passes recorded as CUDA graphs",
    "gradients": "gradients",
    "activations": "activations",
    "loss_chunk": "logits of a chunk of the loss",
    "head_gradient": "gradient of the head, chunk by chunk",
    "kept_kv_buffers": "KV caches kept with recorded passes",
    "validation": "scoring of held-out prompts",
    "fragmentation": "allowance for fragmentation",
    "teacher_copy": "copy of the swapped teacher",
    "held_out_teacher_outputs": "teacher outputs of held-out prompts",
    "checkpoints": "checkpoints",
    "student_base": "the cut student",
    "cut": "cutting the student",
}
"""Name of a part in a plan's JSON -> what it is, for people."""


def render(
    plan: Plan,
    advice: Sequence[str],
    budget_origin: str,
    *,
    data: str | None = None,
    leaves_hardly_any: bool = False,
    desktop: str | None = None,
) -> str:
    """A plan for people: the verdict, the time, what would be faster, the sizes, then the parts that take memory.

    Args:
        data: what is to be said of the data; with `leaves_hardly_any` it is the verdict.
        desktop: what changes where the card drives a screen.
    """
    if leaves_hardly_any:
        lines = [*([] if data is None else [data]), _verdict(plan, budget_origin, "Memory alone would do")]
    else:
        lines = [_verdict(plan, budget_origin, "Fits"), *([_time(plan)] if plan.fits else [])]
        lines += [line for line in (data, desktop) if line is not None]
        if advice:
            lines += ["", "What would be faster, or better", *(f"  {line}" for line in advice)]
    lines += ["", "Sizes, chosen for the budget (--set changes them)"]
    lines += _table({name: str(value) for name, value in plan.choices.items()})
    breakdown = plan.breakdown
    further = [
        (f"Memory of GPU {number} by part, GiB, {card.total_bytes / GIB:.2f} at its peak", _named(card.parts))
        for number, card in enumerate(breakdown.further, 1)
    ]
    first = " of GPU 0" if further else ""
    for title, sizes in (
        (
            f"Memory{first} at the peak of each phase, GiB",
            {PHASE_TEXTS[name]: size for name, size in plan.phases.items()},
        ),
        (f"Memory{first} by part, GiB (not all at once)", _named(plan.parts)),
        *further,
        (f"Host memory, GiB, {plan.host_bytes / GIB:.2f} in all", _named(breakdown.host)),
        (f"Disk, GiB, {plan.disk_bytes / GIB:.2f} in all", _named(breakdown.disk)),
    ):
        largest_first = sorted(sizes.items(), key=lambda part: -part[1])
        shown = {name: f"{size / GIB:.2f}" for name, size in largest_first if size >= SHOWN_BYTES}
        if shown:
            lines += ["", title, *_table(shown)]
    return "\n".join([*lines, "", *(f"- {note}" for note in plan.notes)])


def _verdict(plan: Plan, budget_origin: str, fits: str) -> str:
    phase, _, where = _fullest(plan)
    needed = f"{plan.total_gib:.2f} GiB at the peak, {PHASE_TEXTS[phase]}{where}"
    if plan.budget_bytes is None:
        return f"Needs {needed}{' in each process' if plan.processes > 1 else ''}."
    verdict = fits if plan.fits else "Does not fit"
    if plan.processes > 1:
        verdict += f" each of {plan.processes} {'cards' if plan.machine.device == 'cuda' else 'processes'}"
    return f"{verdict}: {needed}; the budget is {plan.budget_bytes / GIB:.2f} ({budget_origin})."


def _fullest(plan: Plan) -> tuple[str, Mapping[str, int], str]:
    """The phase in which most memory is taken, the parts of the GPU on which it is, and where that is, in words."""
    gpus = [(plan.parts, plan.phases), *((card.parts, card.phases) for card in plan.breakdown.further)]
    number = max(range(len(gpus)), key=lambda i: max(gpus[i][1].values()))
    parts, phases = gpus[number]
    return max(phases, key=phases.__getitem__), parts, f" on GPU {number}" if len(gpus) > 1 else ""


def _time(plan: Plan) -> str:
    if plan.step_seconds is None:
        return "Time: not known for a CPU beforehand. A run says after its first step how long is left."
    card = next(name for name, gpu in GPUS.items() if gpu == plan.machine.gpu)
    train = plan.config.train
    cards = f"{plan.processes} x {card}" if plan.processes > 1 else card
    origin = (
        f"at the speed of {cards}, by arithmetic from its published figures (not measured; --gpu names another card)."
    )
    if plan.seconds is None:
        assert train.num_epochs is not None
        per_thousand = plan.config.steps_of_epochs(train.num_epochs, 1000)
        return (
            f"Time: about {duration(plan.step_seconds)} a step {origin} With train.num_epochs={train.num_epochs:g} "
            f"1,000 training prompts are {per_thousand} steps, {duration(per_thousand * plan.step_seconds)}."
        )
    steps = f"{plan.num_steps} steps"
    if plan.first_limit == "max_seconds":
        steps = f"about {steps}, until train.max_seconds={train.max_seconds:,g},"
    elif plan.first_limit == "max_tokens":
        at_most = f"responses of {plan.config.rollout.max_new_tokens} tokens, and more of shorter ones"
        steps = f"about {steps}, until train.max_tokens={train.max_tokens:,} with {at_most},"
    elif train.num_epochs is not None:
        steps = f"about {steps} (train.num_epochs={train.num_epochs:g} of the prompts that were counted)"
    return f"Time: about {duration(plan.seconds)} for {steps} {origin}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, two figures."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _named(parts: Mapping[str, int]) -> dict[str, int]:
    return {PART_TEXTS[name]: size for name, size in parts.items()}


def _table(values: Mapping[str, str]) -> list[str]:
    width, room = max(map(len, values)), max(map(len, values.values()))
    return [f"  {name:<{width}}  {value:>{room}}" for name, value in values.items()]


SHORT_NAMES = {
    "CUDA context": ("cuda_context",),
    "process": ("process",),
    "teacher": ("teacher_weights", "teacher_adapter", "teacher_head", "teacher_copy"),
    "student": ("student_weights", "adapters", "optimizer_state"),
    "logit cache": ("logit_cache",),
    "KV caches": ("teacher_kv_cache", "student_kv_cache"),
    "logits": ("rollout_logits",),
    "activations": ("activations",),
    "gradients": ("gradients",),
    "loss": ("loss_chunk", "head_gradient"),
    "workspace": ("dequantisation", "prefill", "kept_hidden", "recorded_passes"),
    "load buffer": ("load_buffer",),
    "the cut": ("cut",),
}
_BASE = {"CUDA context", "process"}
_MODELS = {*_BASE, "teacher", "student"}
_PHASE_NAMES = {
    "cut": {*_BASE, "the cut"},
    "write": {*_BASE, "teacher", "KV caches", "logits", "workspace", "load buffer"},
    "load": {*_MODELS, "load buffer"},
    "rollout": {*_MODELS, "KV caches", "logits", "workspace", "logit cache"},
    "train": {*_MODELS, "activations", "gradients", "loss", "logit cache"},
    "validate": {*_MODELS, "logit cache"},
}


def shortage(plan: Plan, which: str = "even at its smallest") -> str:
    """What a plan that does not fit needs, part by part, against the budget; `which` says of what sizes it is."""
    assert plan.budget_bytes is not None, "a plan without a budget always fits"
    phase, parts, where = _fullest(plan)
    shown = _PHASE_NAMES[phase]
    sizes = {label: sum(parts.get(p, 0) for p in names) for label, names in SHORT_NAMES.items() if label in shown}
    listed = ", ".join(f"{label} {size / GIB:.1f}" for label, size in sizes.items() if size >= 0.05 * GIB)
    return (
        f"The plan needs {plan.total_gib:.2f} GiB in its {phase} phase{where} {which} ({listed}); "
        f"the budget is {plan.budget_bytes / GIB:.2f}."
    )


_SHORT_CHOICES = {
    "teacher.residency": "swap",
    "rollout.batch_size": "rows {}",
    "train.per_device_train_batch_size": "micro-batch {}",
    "student.gradient_checkpointing": "checkpointing",
    "loss.chunk_tokens": "chunk {}",
    "cache.device_budget_gib": "cache on host",
}


def render_overview(rows: list[dict[str, Any]]) -> str:
    """`plan_overview` as one block a preset: per budget whether it runs as written, with which changes, or not."""
    lines = [
        "Every preset on a GPU of 6 to 24 GiB (memory in GiB, free to the program; hours at the speed of an rtx3060)"
    ]
    for row in rows:
        lines += ["", f"{row['name']}: {row['as_written_gib']:.1f} as written"]
        for cell in row["budgets"]:
            if not cell["fits"]:
                verdict = f"no: needs {cell['total_gib']:.1f} at its smallest"
            elif not cell["changed"]:
                verdict = "as written"
            else:
                changed = cell["changed"]
                verdict = ", ".join(text.format(changed[k]) for k, text in _SHORT_CHOICES.items() if k in changed)
            hours = "" if cell["hours"] is None else f"{cell['hours']:.1f} h, "
            lines.append(f"  {cell['budget_gib']:>4}  {hours}{verdict}")
    return "\n".join(lines)
