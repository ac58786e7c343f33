"""How much a teacher that works alone takes: bytes on the device and on disk, rows at a time, and hours.

Arithmetic over shapes, as the plan of a run (`breakdown.py`, `cost.py`); no student, no optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from qswitch.config import RunConfig
from qswitch.errors import PlanError
from qswitch.plan import memory
from qswitch.plan.breakdown import teacher_writes
from qswitch.plan.cards import Card, best_split, further_cards
from qswitch.plan.cost import pass_seconds
from qswitch.plan.machine import Budget, Machine
from qswitch.plan.render import duration
from qswitch.plan.run_plan import in_gib
from qswitch.plan.scheduler import model_shapes
from qswitch.plan.shapes import ModelShape
from qswitch.units import GIB


@dataclass(frozen=True, slots=True)
class TeachingPlan:
    """What `qswitch teach` will take."""

    rows: int
    """Sequences at a time."""
    parts: dict[str, int]
    """Part -> bytes on the device."""
    host_bytes: int
    """Layers that do not fit the device and wait for their turn in host memory."""
    disk_bytes: int
    """Of the store, if every response is as long as it may be."""
    num_sequences: int
    """At most: a prompt of the data that is drawn again is stored once."""
    seconds: float | None
    """On the machine's card, by arithmetic; None for a CPU."""
    budget: Budget
    processes: int = 1
    """That share the sequences; sizes in memory are those of each, disk and time of all together."""
    teacher_layers: tuple[int, ...] = ()
    """Layers on each of the process's GPUs."""
    for_prompts: int | None = None
    """Training prompts for which sequences, disk and time are counted, where train.num_epochs makes more of more."""
    further: tuple[Card, ...] = ()
    """The GPUs after the first, of a teacher that lies on several."""

    @property
    def total_bytes(self) -> int:
        """Of the fullest device."""
        return max(sum(self.parts.values()), *(card.total_bytes for card in self.further), 0)

    @property
    def weights_room_bytes(self) -> int:
        """What the rest of the plan leaves of the device to weights, a layer that passes by among them."""
        return self.budget.num_bytes - sum(size for name, size in self.parts.items() if name != "teacher_weights")

    def to_dict(self) -> dict[str, Any]:
        """For `qswitch teach --dry-run --json`: sizes in GiB."""
        return {
            "rows": self.rows,
            "total_gib": in_gib(self.total_bytes),
            "budget_gib": in_gib(self.budget.num_bytes),
            "parts": {name: in_gib(size) for name, size in self.parts.items()},
            "host_gib": in_gib(self.host_bytes),
            "disk_gib": in_gib(self.disk_bytes),
            "sequences": self.num_sequences,
            "seconds": self.seconds,
            "for_prompts": self.for_prompts,
            "processes": self.processes,
            "teacher_layers": list(self.teacher_layers),
            "further_gpus_gib": [in_gib(card.total_bytes) for card in self.further],
        }

    def render(self) -> str:
        """For people."""
        each = f" in each of {self.processes} processes" if self.processes > 1 else ""
        lines = [
            f"The teacher alone needs {self.total_bytes / GIB:.2f} GiB{each} with {self.rows} sequences at a time; the "
            f"budget is {self.budget.num_bytes / GIB:.2f} ({self.budget.origin}).",
            f"The store takes up to {self.disk_bytes / GIB:.2f} GiB of disk, for {self.num_sequences:,} sequences at "
            "most"
            + ("." if self.for_prompts is None else f", where the data has {self.for_prompts:,} prompts to train on."),
        ]
        if self.further:
            layers = ", ".join(map(str, self.teacher_layers))
            lines.append(f"It lies on {len(self.teacher_layers)} GPUs, of which that is the fullest; layers: {layers}.")
        if self.host_bytes:
            lines.append(f"Layers of {self.host_bytes / GIB:.2f} GiB stay in host memory and pass by the device.")
        if self.seconds is not None:
            lines.append(f"Time: about {duration(self.seconds)}, by arithmetic and not measured.")
        return "\n".join(lines)


def plan_teaching(
    config: RunConfig,
    budget: Budget,
    machine: Machine,
    *,
    num_prompts: int | None = None,
    spread: bool = False,
    processes: int = 1,
) -> TeachingPlan:
    """The plan with the most rows, up to rollout.batch_size, that fits the budget.

    `num_prompts` are trained on, where that is known; with `spread` layers that do not fit stay in host memory.
    `processes` share the sequences, each with the whole teacher and a budget of this size.

    Raises:
        PlanError: not even one row fits.
    """
    rows = config.rollout.batch_size
    while True:
        plan = _with_rows(config, budget, machine, rows, num_prompts, spread, processes)
        if plan.total_bytes <= budget.num_bytes:
            return plan
        if rows == 1:
            can_spread = config.teacher.precision in ("bf16", "fp32") and machine.device == "cuda" and not spread
            remedy = "Let it pass by the device with --spread" if can_spread else "Choose a smaller one"
            raise PlanError(
                f"The teacher alone needs {plan.total_bytes / GIB:.2f} GiB even one sequence at a time; the budget is "
                f"{budget.num_bytes / GIB:.2f}. {remedy}."
            )
        rows //= 2


def _with_rows(
    config: RunConfig,
    budget: Budget,
    machine: Machine,
    rows: int,
    num_prompts: int | None,
    spread: bool,
    processes: int,
) -> TeachingPlan:
    teacher, student = model_shapes(config)
    measured = partial(_measured, config, budget, machine, teacher, student, rows, num_prompts, spread, processes)
    num_gpus = config.teacher.num_gpus if machine.device == "cuda" else 1
    if num_gpus == 1:
        return measured((teacher.num_layers,))
    return best_split(
        teacher.num_layers, num_gpus, measured,
        lambda plan: (sum(plan.parts.values()), max(card.total_bytes for card in plan.further)),
    )  # fmt: skip


def _measured(
    config: RunConfig,
    budget: Budget,
    machine: Machine,
    teacher: ModelShape,
    student: ModelShape,
    rows: int,
    num_prompts: int | None,
    spread: bool,
    processes: int,
    layers: tuple[int, ...],
) -> TeachingPlan:
    """The plan with so many of the teacher's layers on each GPU."""
    here = teacher if len(layers) == 1 else teacher.with_layers(layers[0])
    b, on_gpu = machine.compute_bytes, machine.device == "cuda"
    new, precision = config.rollout.max_new_tokens, config.teacher.precision
    tokens = config.data.max_prompt_tokens + new
    vocab = min(teacher.vocab_size, student.vocab_size)
    imitates = config.loss.objective == "divergence"
    row_bytes = memory.cache_row_bytes(config.cache.format, teacher.hidden_size, vocab, config.cache.topk, b)
    weights = memory.weight_bytes(here, precision, b, any_width=on_gpu)
    weights += memory.attached_adapter_bytes(here, config.teacher, b)
    # The held-out prompts are answered whatever the method, so the teacher always decodes.
    slots = memory.cache_slots(config.data.max_prompt_tokens, new, 0)
    working = {
        "kept_hidden": memory.kept_hidden_bytes(teacher.hidden_size, rows, rows, new, b),
        **teacher_writes(config, teacher, vocab, machine, rows, read_tokens=tokens),
        "kv_cache": memory.kv_cache_bytes(here, rows, slots, b, drafts=False),
    }
    working["fragmentation"] = int(sum(working.values()) * memory.FRAGMENTATION_SHARE)
    fixed = {"cuda_context": memory.CUDA_CONTEXT_BYTES} if on_gpu else {"process": memory.PROCESS_BYTES}
    host = 0
    if on_gpu and spread:
        room = budget.num_bytes - sum(fixed.values()) - sum(working.values())
        # A layer that passes by needs room too, and the head does.
        largest = max(weights // max(1, teacher.num_layers), memory.head_bytes(teacher, precision, b))
        host = max(0, weights - max(0, room - largest))
        weights = min(weights, weights - host + largest)
    parts = {**fixed, "teacher_weights": weights, **working}
    steps, for_prompts = config.train.max_steps, None
    if config.train.num_epochs is not None:
        num_prompts = for_prompts = 1000
        steps = config.steps_of_epochs(config.train.num_epochs, num_prompts)
    drawn = steps * config.train.sequences_per_step
    if num_prompts is not None and config.data.ground_truth_mix == 1:
        drawn = min(drawn, num_prompts)
    held_out = config.data.num_validation
    stored = (drawn if imitates else 0) + held_out
    disk = stored * new * row_bytes + (memory.head_bytes(teacher, "bf16", b) if config.cache.format == "hidden" else 0)
    seconds = None
    if on_gpu:
        kv_bytes = memory.kv_buffer_bytes(teacher, rows, tokens // 2 + 1, b)
        write = pass_seconds(teacher, precision, rows, kv_bytes, machine) * new / rows
        read = pass_seconds(teacher, precision, rows * tokens, 0, machine) / rows
        mix = config.data.ground_truth_mix
        seconds = held_out * write + drawn * ((1 - mix) * write + (mix * read if imitates else 0.0))
        seconds /= processes
    further = further_cards(
        config, teacher, machine, layers, rows=rows, slots=slots, pass_tokens=rows * tokens, drafts=False
    )
    return TeachingPlan(
        rows, parts, host, disk, drawn + held_out, seconds, budget, processes, layers, for_prompts, further
    )
