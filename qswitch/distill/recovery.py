"""What a run does when the device has less memory than the plan was promised.

A stage of a step that runs out of memory is undone, the sizes it depends on shrink, the plan is made anew, and the
stage runs again with the same random numbers. Sizes change memory and time, never what is learnt: the tokens of a
rollout are a function of its key, and the loss is the token mean over the whole step however it is cut. Knows no model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch

from qswitch.config import RunConfig
from qswitch.errors import TrainingError, is_out_of_memory, memory_reason
from qswitch.models.host_memory import release_memory, resident_bytes
from qswitch.plan.memory import CUDA_CONTEXT_BYTES
from qswitch.units import GIB

logger = logging.getLogger(__name__)

T = TypeVar("T")

MIN_CHUNK_TOKENS = 32
"""A loss chunk below this saves little beside the two heads."""


class MemoryFloorError(TrainingError):
    """Out of memory with nothing left to shrink."""


class MemoryBudgetExceededError(torch.OutOfMemoryError):
    """The process uses more host memory than its budget; on a CPU nothing else says so before the kernel ends it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a run may lower at any step."""

    rollout_rows: int
    """Rows decoded together."""
    micro_batch: int
    """Sequences in one forward and backward pass, and in one pass that scores given responses."""
    chunk_tokens: int
    """Loss positions projected to the vocabulary at a time."""
    validation_rows: int
    """Held-out responses scored together."""

    @classmethod
    def of(cls, config: RunConfig) -> Sizes:
        """The sizes a configuration starts with."""
        return cls(
            rollout_rows=config.rollout.batch_size,
            micro_batch=config.train.per_device_train_batch_size,
            chunk_tokens=config.loss.chunk_tokens,
            validation_rows=config.rollout.batch_size,
        )

    def smaller(self, stage: str) -> Sizes | None:
        """Sizes with which `stage` takes less memory; None at the floor."""
        if stage == "rollout" and self.rollout_rows > 1:
            return replace(self, rollout_rows=self.rollout_rows // 2)
        if stage in ("teacher", "loss") and self.micro_batch > 1:
            return replace(self, micro_batch=self.micro_batch // 2)
        if stage == "validation" and self.validation_rows > 1:
            return replace(self, validation_rows=self.validation_rows // 2)
        if stage in ("loss", "validation") and self.chunk_tokens > MIN_CHUNK_TOKENS:
            return replace(self, chunk_tokens=max(MIN_CHUNK_TOKENS, self.chunk_tokens // 2))
        return None

    def write_into(self, config: RunConfig) -> RunConfig:
        """The configuration with these sizes, for planning; its accumulation steps grow as its micro-batch shrinks."""
        train = config.train
        effective = train.per_device_train_batch_size * train.gradient_accumulation_steps
        changes = {
            "per_device_train_batch_size": self.micro_batch,
            "gradient_accumulation_steps": -(-effective // self.micro_batch),
        }
        return config.model_copy(
            update={
                "rollout": config.rollout.model_copy(update={"batch_size": self.rollout_rows}),
                "train": train.model_copy(update=changes),
                "loss": config.loss.model_copy(update={"chunk_tokens": self.chunk_tokens}),
            }
        )


class Recovery:
    """Runs the stages of a step, and shrinks the sizes of one that runs out of memory.

    Args:
        sizes: to start with.
        planned_bytes_of: the plan's peak for other sizes; None where nothing was planned.
        say: tells the user, once per shrinking.
        budget_bytes: of host memory; checked on a CPU only, by `check_host_memory`.
    """

    def __init__(
        self,
        sizes: Sizes,
        device: torch.device,
        *,
        planned_bytes: int | None = None,
        planned_bytes_of: Callable[[Sizes], int] | None = None,
        say: Callable[[str], None] = logger.warning,
        budget_bytes: int | None = None,
    ) -> None:
        self.sizes, self.planned_bytes = sizes, planned_bytes
        self.events: list[dict[str, Any]] = []
        """What happened since they were last taken, for metrics.jsonl."""
        self._device, self._planned_bytes_of, self._say = device, planned_bytes_of, say
        self._budget_bytes = budget_bytes if device.type == "cpu" else None

    def attempt(self, stage: str, run: Callable[[], T], undo: Callable[[], None] | None = None) -> T:
        """The result of `run`, which reads `sizes`; after an out-of-memory error it is undone and runs again, smaller.

        Raises:
            MemoryFloorError: nothing is left to shrink.
        """
        while True:
            try:
                return run()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = memory_reason(error)
            # Outside the handler the traceback is gone, and with it the tensors of the failed pass.
            if undo is not None:
                undo()
            release_memory(self._device)
            self._shrink(stage, reason)

    def lower_to(self, found: Sequence[Sizes]) -> None:
        """Go on with the smallest of several processes' sizes, so that all plan, and save, the same."""
        self._set(Sizes(**{name: min(getattr(s, name) for s in found) for name in asdict(self.sizes)}))

    def check_host_memory(self) -> None:
        """Nothing within the budget.

        Raises:
            MemoryBudgetExceededError: the process holds more than its budget.
        """
        if self._budget_bytes is None:
            return
        used = resident_bytes()
        if used > self._budget_bytes:
            raise MemoryBudgetExceededError(
                f"the process holds {used / GIB:.2f} GiB of host memory, its budget is {self._budget_bytes / GIB:.2f}"
            )

    def state_dict(self) -> dict[str, int]:
        """The sizes."""
        return asdict(self.sizes)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on with the sizes of a checkpoint: a resumed run computes with the shapes of the one that stopped."""
        self._set(Sizes(**state))

    def take_events(self) -> list[dict[str, Any]]:
        """The events so far, which are then forgotten."""
        events, self.events = self.events, []
        return events

    def _set(self, sizes: Sizes) -> None:
        if sizes != self.sizes and self._planned_bytes_of is not None:
            self.planned_bytes = self._planned_bytes_of(sizes)
        self.sizes = sizes

    def _shrink(self, stage: str, reason: str) -> None:
        smaller = self.sizes.smaller(stage)
        if smaller is None:
            raise MemoryFloorError(f"Out of memory in the {stage} stage, and nothing is left to shrink ({reason}).")
        before, planned = asdict(self.sizes), self.planned_bytes
        self._set(smaller)
        changes = {k: [before[k], v] for k, v in asdict(smaller).items() if v != before[k]}
        self.events.append({"stage": stage, "reason": reason, **changes})
        listed = ", ".join(f"{k} {old} -> {new}" for k, (old, new) in changes.items())
        plan = ""
        if planned is not None and self.planned_bytes is not None:
            plan = f"; planned peak {planned / GIB:.2f} -> {self.planned_bytes / GIB:.2f} GiB"
        self._say(
            f"out of memory ({stage}): {listed}{plan}; the {stage} stage is repeated with the same random numbers"
        )


class BatchRows:
    """Rows of passes that train nothing; halved, and the pass repeated, when memory runs out.

    By the sampling contract the number of rows changes no token but by rounding, so what was written before stays.
    """

    def __init__(self, rows: int, *, say: Callable[[str], None] = logger.warning) -> None:
        self.rows = rows
        self._say = say

    def attempt(self, device: torch.device, run: Callable[..., T]) -> T:
        """The result of `run(batch_size=rows)`.

        Raises:
            RuntimeError, MemoryError: what `run` raised, where it is not for memory or a single row is too many.
        """
        while True:
            try:
                return run(batch_size=self.rows)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.rows == 1:
                    raise
            # Outside the handler the traceback is gone, and with it the tensors of the failed pass.
            release_memory(device)
            self._say(f"out of memory: {self.rows} -> {self.rows // 2} rows at a time")
            self.rows //= 2


@contextmanager
def device_memory_bounded(device: torch.device, num_gpus: int, budget_bytes: int | None) -> Iterator[None]:
    """Keep the process within a budget on its GPU, and on each further one of a teacher on several; nothing on a CPU.

    Behind the block a GPU is as free as the process found it but for CUDA's context, for what a notebook does next.
    """
    devices = [] if budget_bytes is None else _gpus_of(device, num_gpus)
    for each in devices:
        limit_device_memory(each, budget_bytes or 0, CUDA_CONTEXT_BYTES)
    try:
        yield
    finally:
        for each in devices:
            torch.cuda.set_per_process_memory_fraction(1.0, each)
        if devices:
            release_memory(device)


def _gpus_of(device: torch.device, num_gpus: int) -> list[torch.device]:
    """The process's GPU and the further ones of a teacher on several; none on a CPU."""
    further = [torch.device("cuda", index) for index in range(1, num_gpus)]
    return [device, *further] if device.type == "cuda" else []


def limit_device_memory(device: torch.device, budget_bytes: int, context_bytes: int) -> None:
    """Keep the process within a budget, or the card: beyond it allocations fail as on a smaller card, also where the
    driver would lend system memory instead, as under WSL2."""
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = max(0, min(budget_bytes, total) - context_bytes)
    torch.cuda.set_per_process_memory_fraction(allowed / total, device)


def keep_to_free_memory(device: torch.device, num_gpus: int = 1) -> None:
    """Keep a process without a plan within what it has of each GPU and what is free there now; nothing on a CPU.

    A driver that puts the rest into the host's memory (Windows, WSL2) would make a pass slow that should fail and be
    repeated with fewer rows. CUDA itself says what is free, so it is that of this card, or of this slice of one. The
    limit stands until the next call, or the next run's.
    """
    for each in _gpus_of(device, num_gpus):
        free, total = torch.cuda.mem_get_info(each)
        own = torch.cuda.memory_reserved(each)
        torch.cuda.set_per_process_memory_fraction(min(1.0, (free + own) / total), each)
