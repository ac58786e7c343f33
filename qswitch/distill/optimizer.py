"""How the student's weights move: accelerator, optimizer and learning rate, as the configuration says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from transformers import get_scheduler

from qswitch.config import RunConfig, TrainSection
from qswitch.distill.budget import learning_rate_factor
from qswitch.errors import TrainingError
from qswitch.models.language_model import LanguageModel
from qswitch.run_dir import RunDir


def make_accelerator(config: RunConfig, run_dir: RunDir, student: LanguageModel) -> Accelerator:
    """For one device, with the trackers of train.report_to started.

    Raises:
        TrainingError: several processes were started.
    """
    report_to = list(config.train.report_to)
    accelerator = Accelerator(
        cpu=student.device.type == "cpu",
        mixed_precision="bf16" if student.compute_dtype == torch.bfloat16 else "no",
        log_with=report_to or None,
        project_dir=str(run_dir.path) if report_to else None,
    )
    if accelerator.num_processes > 1:
        raise TrainingError(
            f"{accelerator.num_processes} processes were started, but a run uses one GPU. Start it without accelerate "
            "launch, or with --num_processes 1."
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


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings by their dotted names, lists as text: trackers take numbers, texts and truth values only."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{above}{key}.")
        elif value is not None:
            flat[above + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def make_optimizer(train: TrainSection, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of train.optimizer, all of its state there from the start."""
    if train.optimizer == "paged_adamw_8bit":
        import bitsandbytes as bnb

        return bnb.optim.PagedAdamW8bit(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)
    # Fused: a step allocates nothing, so it is taken whole or, where its kernel fails, not at all.
    optimizer = torch.optim.AdamW(parameters, lr=train.learning_rate, weight_decay=train.weight_decay, fused=True)
    for parameter in parameters:
        # What the first step would allocate, in the middle of a run; torch makes it where there is none.
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def make_lr_scheduler(train: TrainSection, optimizer: torch.optim.Optimizer, spent: Callable[[], float]) -> Any:
    """The learning rate by steps, or, for a budget of tokens or seconds, by the share of it that `spent` says."""
    if train.max_tokens is None and train.max_seconds is None:
        name = train.lr_scheduler_type
        return get_scheduler(
            # Plain "constant" of transformers knows no warm-up.
            "constant_with_warmup" if name == "constant" and train.warmup_steps else name,
            optimizer,
            num_warmup_steps=train.warmup_steps,
            num_training_steps=train.max_steps,
        )
    # Called before this step's tokens are counted: the rate lags the budget by one step.
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(train, step=step, share=spent())
    )
