"""What a run must remember to go on as if it had never stopped.

A checkpoint is a folder `step-000040/`: the student's trained weights in `adapter/` in PEFT layout, which other
programs read, the state of every other part of the run in `state.pt`, and `manifest.json` with the format's number and
the size and SHA-256 of each file. It is complete or absent. Knows no rollout and no loss: a part is anything that gives
and takes a state.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from qswitch.aside import folder_aside
from qswitch.errors import QSwitchError, RunDirError
from qswitch.manifest import find_damage, read_manifest, write_manifest
from qswitch.models.language_model import LanguageModel
from qswitch.models.student import load_adapter, save_adapter

FORMAT = 5
"""Raised whenever a checkpoint of before could not be read as it was meant."""
_STATE = "state.pt"


class Stateful(Protocol):
    """A part of a run that must survive a stop."""

    def state_dict(self) -> Any:
        """Plain values and tensors; torch.load reads them with weights_only."""
        ...

    def load_state_dict(self, state: Any) -> Any:
        """Go on from a `state_dict`."""
        ...


def checkpoint_name(step: int) -> str:
    """Folder name of a step; sorts by step."""
    return f"step-{step:06d}"


def save_checkpoint(
    checkpoints: Path,
    *,
    step: int,
    student: LanguageModel,
    states: Mapping[str, Any],
    known: Mapping[str, Any] | None = None,
) -> Path:
    """Write `checkpoints/step-NNNNNN` and return it; an existing one of the same step is replaced.

    `states` are the `state_dict` of each part, by name. `known` stands in the manifest too: what a resumed run compares
    itself with.
    """
    final = checkpoints / checkpoint_name(step)
    with folder_aside(final) as folder:
        save_adapter(student, folder / "adapter")
        with (folder / _STATE).open("wb") as file:  # torch's own file would not say that the disk is full
            torch.save(dict(states), file)
        write_manifest(folder, format=FORMAT, step=step, **(known or {}))
        shutil.rmtree(final, ignore_errors=True)  # of a run that went back and takes this step again
    return final


def load_checkpoint(folder: Path, *, student: LanguageModel, parts: Mapping[str, Stateful]) -> None:
    """Put a checkpoint back into the live parts.

    Raises:
        RunDirError: it belongs to a run with other parts or of other shapes.
    """
    remedy = f"Resume with the configuration it was written with, or delete {folder} to resume from the one before it."
    try:
        # weights_only: a checkpoint is data, and must not be able to run code.
        saved = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to, IndexError for one
        raise RunDirError(f"{folder / _STATE} cannot be read ({error}). {remedy}") from error
    if not isinstance(saved, dict) or set(saved) != set(parts):
        has = ", ".join(saved) if isinstance(saved, dict) else "no parts"
        raise RunDirError(f"{folder / _STATE} holds {has}; this run needs {', '.join(parts)}. {remedy}")
    try:
        load_adapter(student, folder / "adapter")
    except QSwitchError as error:
        raise RunDirError(f"{error} {remedy}") from error
    for name, part in parts.items():
        try:
            part.load_state_dict(saved[name])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise RunDirError(f"The state of {name} in {folder / _STATE} does not fit ({reason}). {remedy}") from error


def newest_whole(checkpoints: list[Path]) -> tuple[Path | None, dict[Path, str]]:
    """The last of `checkpoints` whose files are as they were written, and what is wrong with each one after it.

    Raises:
        RunDirError: a checkpoint was written in another format, or there are some and none is whole.
    """
    damaged: dict[Path, str] = {}
    for folder in reversed(checkpoints):
        _refuse_other_format(folder)
        damage = find_damage(folder)
        if damage is None:
            return folder, damaged
        damaged[folder] = damage
    if damaged:
        listed = "; ".join(f"{folder.name}: {reason}" for folder, reason in damaged.items())
        raise RunDirError(
            f"No checkpoint in {checkpoints[0].parent} is as it was written ({listed}). Restore one from a copy, or "
            "start a new run."
        )
    return None, damaged


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, whose step the run will write again; an older one of that name goes."""
    aside = folder.with_name(f"damaged-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    return aside


def saved_part(folder: Path, name: str) -> Any:
    """The state of one part of a checkpoint.

    Raises:
        RunDirError: it cannot be read, or has no such part.
    """
    try:
        return torch.load(folder / _STATE, map_location="cpu", weights_only=True, mmap=True)[name]
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to, IndexError for one
        raise RunDirError(
            f"{name} cannot be read from {folder / _STATE} ({error}). Delete {folder} to resume from the one before it."
        ) from error


def rotate_checkpoints(checkpoints: list[Path], *, keep: int, protected: set[str]) -> None:
    """Delete the oldest checkpoints beyond `keep`, never one named in `protected`."""
    for path in [p for p in checkpoints if p.name not in protected][:-keep]:
        shutil.rmtree(path)


def _refuse_other_format(folder: Path) -> None:
    manifest = read_manifest(folder)
    if manifest is None and (folder / "state.json").exists():
        manifest = {"format": 1}  # which had no manifest
    if manifest is not None and manifest.get("format") != FORMAT:
        raise RunDirError(
            f"{folder} is a checkpoint of format {manifest.get('format')}, and this qswitch reads format {FORMAT}. "
            "Resume with the version of qswitch that wrote it, or start a new run."
        )
