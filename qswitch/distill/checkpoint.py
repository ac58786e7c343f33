"""What a run must remember to go on as if it had never stopped, written so that a crash leaves it whole or absent.

A checkpoint is a folder `step-000040/`: the adapter in PEFT layout, the optimizer, the learning-rate schedule, the
random state, the sequences that will train again, and `state.json`. It is written beside its final name, flushed to
disk and renamed into place. Knows no rollout and no loss.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from qswitch.errors import ModelError, RunDirError
from qswitch.models.language_model import LanguageModel
from qswitch.models.student import load_adapter, save_adapter


def checkpoint_name(step: int) -> str:
    """Folder name of a step; sorts by step."""
    return f"step-{step:06d}"


def save_checkpoint(
    checkpoints: Path,
    *,
    step: int,
    student: LanguageModel,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: Any,
    state: dict[str, Any],
    replay: dict[str, Any] | None = None,
) -> Path:
    """Write `checkpoints/step-NNNNNN` and return it; an existing one of the same step is replaced."""
    final = checkpoints / checkpoint_name(step)
    partial = checkpoints / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_adapter(student, partial / "adapter")
    torch.save(
        {
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": lr_scheduler.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
        partial / "optimizer.pt",
    )
    if replay is not None:
        torch.save(replay, partial / "replay.pt")
    (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1), encoding="utf-8")
    for path in [*partial.rglob("*"), partial]:
        _flush(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    _flush(checkpoints)
    return final


def load_checkpoint(
    folder: Path, *, student: LanguageModel, optimizer: torch.optim.Optimizer, lr_scheduler: Any
) -> dict[str, Any]:
    """Put a checkpoint back into the live objects and return its `state.json`.

    Raises:
        RunDirError: a file of the checkpoint is missing or unreadable.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        # weights_only: a checkpoint is data, and must not be able to run code.
        saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to, IndexError for one
        raise RunDirError(
            f"{folder} cannot be read ({error}). Delete that folder to resume from the checkpoint before it."
        ) from error
    try:
        load_adapter(student, folder / "adapter")
    except ModelError as error:
        raise RunDirError(f"{error} Or delete {folder} to resume from the checkpoint before it.") from error
    optimizer.load_state_dict(saved["optimizer"])
    lr_scheduler.load_state_dict(saved["lr_scheduler"])
    torch.set_rng_state(saved["torch_rng"])
    if saved["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(saved["cuda_rng"])
    return state


def load_replay(folder: Path) -> dict[str, Any] | None:
    """What `save_checkpoint` was given as `replay`; None where it was given nothing.

    Raises:
        RunDirError: the file is unreadable.
    """
    path = folder / "replay.pt"
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to, IndexError for one
        raise RunDirError(
            f"{path} cannot be read ({error}). Delete {folder} to resume from the one before it."
        ) from error


def rotate_checkpoints(checkpoints: Path, *, keep: int, protected: set[str]) -> None:
    """Delete the oldest complete checkpoints beyond `keep`, never one named in `protected`."""
    found = sorted(p for p in checkpoints.glob("step-*") if p.is_dir() and p.name not in protected)
    for path in found[:-keep]:
        shutil.rmtree(path)


def seed_step(seed: int, step: int) -> None:
    """Seed the global random streams (dropout) from the run's seed and the step, so that a repeated or resumed step
    draws the same numbers whatever ran before it."""
    mixed = (seed * 1_000_003 + step) % 2**63
    random.seed(mixed)
    torch.manual_seed(mixed)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
