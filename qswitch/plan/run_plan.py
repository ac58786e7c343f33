"""What was decided for a run: its sizes, the bytes they take, and whether they fit. Knows not how it was decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qswitch.config import RunConfig
from qswitch.plan.breakdown import Breakdown
from qswitch.plan.machine import Machine
from qswitch.units import GIB


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes of a run's parts, the peak of each phase, and the sizes they belong to."""

    breakdown: Breakdown
    choices: dict[str, Any]
    """Dotted setting -> chosen value."""
    budget_bytes: int | None
    fits: bool
    notes: tuple[str, ...]
    """What is assumed, and what was lowered."""
    config: RunConfig
    """With the choices written in."""
    prompt_tokens: int
    """The longest prompt that is planned for: the data's where that is known, else data.max_prompt_tokens."""
    machine: Machine
    next_better: tuple[int, float] | None = None
    """Bytes of the next budget at which a step is faster, and the share of this plan's time it takes there."""
    num_steps: int | None = None
    """Of the run, where every response has its full length; None where train.num_epochs counts prompts that nobody has
    counted, and where tokens or seconds alone end a run on a CPU."""
    first_limit: str | None = None
    """The setting of train by which `num_steps` is counted, on a GPU: max_steps (num_epochs too), max_tokens or
    max_seconds, whichever is reached first."""
    seconds: float | None = None
    """Of the whole run on `machine.gpu`, by arithmetic; None for a CPU, whose speed the plan does not know, and for
    steps that nobody knows."""
    step_seconds: float | None = None
    """Of one step on `machine.gpu`; None for a CPU."""
    processes: int = 1
    """Processes that share the work, each with a device of its own; bytes are those of one of them."""

    @property
    def parts(self) -> dict[str, int]:
        """Part -> bytes on the device that computes."""
        return self.breakdown.parts

    @property
    def phases(self) -> dict[str, int]:
        """cut and write where there are such, load, rollout, train, validate -> peak bytes."""
        return self.breakdown.phases

    @property
    def total_bytes(self) -> int:
        """The largest phase, on the fullest GPU."""
        return self.breakdown.total_bytes

    @property
    def total_gib(self) -> float:
        return self.total_bytes / GIB

    @property
    def host_bytes(self) -> int:
        """Host memory beside a GPU."""
        return sum(self.breakdown.host.values())

    @property
    def disk_bytes(self) -> int:
        """Of the run directory."""
        return sum(self.breakdown.disk.values())

    def to_dict(self) -> dict[str, Any]:
        """For `qswitch plan --json` and RUN/plan.json: sizes in GiB (2**30 bytes)."""
        better = self.next_better
        several: dict[str, Any] = {} if self.processes == 1 else {"processes": self.processes}
        if self.breakdown.further:
            several["teacher_layers"] = list(self.breakdown.teacher_layers)
            several["further_gpus"] = [
                {"total_gib": in_gib(card.total_bytes), "parts": {n: in_gib(size) for n, size in card.parts.items()}}
                for card in self.breakdown.further
            ]
        return several | {
            "fits": self.fits,
            "budget_gib": None if self.budget_bytes is None else in_gib(self.budget_bytes),
            "total_gib": in_gib(self.total_bytes),
            "parts": {name: in_gib(size) for name, size in self.parts.items()},
            "choices": dict(self.choices),
            "phases": {name: in_gib(size) for name, size in self.phases.items()},
            "host_gib": in_gib(self.host_bytes),
            "host_parts": {name: in_gib(size) for name, size in self.breakdown.host.items()},
            "disk_gib": in_gib(self.disk_bytes),
            "disk_parts": {name: in_gib(size) for name, size in self.breakdown.disk.items()},
            "next_better": None
            if better is None
            else {"budget_gib": in_gib(better[0]), "time_share": round(better[1], 3)},
            "notes": list(self.notes),
        }


def in_gib(size_bytes: int) -> float:
    """GiB of so many bytes, rounded for people and for JSON."""
    return round(size_bytes / GIB, 4)
