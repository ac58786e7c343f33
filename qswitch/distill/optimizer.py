"""How the student's weights move: accelerator, optimizer and learning rate, as the configuration says."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import check_cuda_p2p_ib_support
from transformers import get_scheduler

from qswitch.config import RunConfig, TrainSection
from qswitch.distill.budget import learning_rate_factor
from qswitch.models.language_model import LanguageModel
from qswitch.run_dir import RunDir

SCHEDULE_SETTINGS = ("learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "max_tokens", "max_seconds")
"""Settings of the train section that the learning rate follows."""


def make_accelerator(config: RunConfig, run_dir: RunDir, student: LanguageModel) -> Accelerator:
    """For this process's device, with the trackers of train.report_to started by the first process."""
    report_to = list(config.train.report_to)
    # accelerate holds one precision for the life of a process, but a process may do runs of several, one by one.
    AcceleratorState._reset_state()
    if student.device.type == "cuda" and not check_cuda_p2p_ib_support():
        # Several RTX 40 cards and an old driver: the Accelerator refuses without these, also where one process uses one
        # card. `accelerate launch` sets the same; only NCCL reads them, which starts later.
        for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
            os.environ.setdefault(name, "1")
    accelerator = Accelerator(
        cpu=student.device.type == "cpu",
        mixed_precision="no",  # the learner's passes choose their arithmetic themselves; on a CPU it refuses fp16
        log_with=report_to or None,
        project_dir=str(run_dir.path) if report_to else None,
    )
    if report_to:
        name = run_dir.path.resolve().name
        accelerator.init_trackers(
            "qswitch",
            config=_flat(config.model_dump(mode="json")),
            # Where a tracker takes a name; tensorboard's is its folder, which lies in the run's.
            init_kwargs={"wandb": {"name": name}},
        )
    return accelerator


def end_trackers(accelerator: Accelerator) -> None:
    """Let the trackers write what they hold; `Accelerator.end_training` would also part the processes."""
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            tracker.finish()


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """What of a line of metrics.jsonl a tracker can draw: its numbers, those inside it by dotted names."""
    return {name: value for name, value in _flat(line).items() if isinstance(value, int | float) and name != "step"}


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings by their dotted names, lists as text: trackers take numbers, texts and truth values only."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{above}{key}.")
        elif value is not None:
            flat[f"{above}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def make_optimizer(train: TrainSection, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of train.optimizer; AdamW's state is there from the start, the other's from its first step.

    Weight decay is for matrices: biases and the scales of norms, which have one dimension, keep theirs, as in the
    trainers of Hugging Face and DistiLLM.

    The paged optimizer's state is paged where bitsandbytes allocates it: its load_state_dict moves what a checkpoint
    holds to the GPU as it is.
    """
    decays = [p for p in parameters if p.ndim >= 2], train.weight_decay
    stays = [p for p in parameters if p.ndim < 2], 0.0
    groups = [{"params": own, "weight_decay": decay} for own, decay in (decays, stays) if own]
    if train.optimizer == "paged_adamw_8bit":
        import bitsandbytes as bnb

        return bnb.optim.PagedAdamW8bit(groups, lr=train.learning_rate)
    # Fused: a step allocates nothing, so it is taken whole or, where its kernel fails, not at all.
    optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, fused=True)
    for parameter in parameters:
        # What the first step would allocate, in the middle of a run; torch makes it where there is none.
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


class Schedule:
    """The learning rate by steps, or, for a budget of tokens or seconds, by the share of it that `spent` says.

    A resumed run may have another rate or length than the checkpoint's; the rate is then set anew, as if the schedule
    had been the new one from the start.
    """

    def __init__(self, train: TrainSection, optimizer: torch.optim.Optimizer, spent: Callable[[], float]) -> None:
        self._settings = {name: getattr(train, name) for name in SCHEDULE_SETTINGS}
        if train.ends_by_steps_alone:
            name = train.lr_scheduler_type
            self._scheduler = get_scheduler(
                # Plain "constant" of transformers knows no warm-up.
                "constant_with_warmup" if name == "constant" and train.num_warmup_steps else name,
                optimizer,
                num_warmup_steps=train.num_warmup_steps,
                num_training_steps=train.max_steps,
            )
        else:
            self._scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda _: learning_rate_factor(train, share=spent())
            )

    @property
    def learning_rate(self) -> float:
        """That of the next step."""
        return self._scheduler.get_last_lr()[0]

    def step(self) -> None:
        """The step is over and counted in what is spent, whether or not the optimizer moved."""
        with warnings.catch_warnings():
            # A skipped step moves the schedule without the optimizer, which torch takes for a mistake.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
            self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"settings": self._settings, "scheduler": self._scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`; the optimizer's is loaded already, and so is what `spent` reads."""
        self._scheduler.load_state_dict(state["scheduler"])
        if state["settings"] == self._settings:
            return
        scheduler, peak = self._scheduler, self._settings["learning_rate"]
        scheduler.base_lrs = [peak] * len(scheduler.base_lrs)
        for group, factor in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = peak, peak * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
