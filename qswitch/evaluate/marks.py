"""Which weights were measured: a mark of the files in a folder, and of what a run has trained.

Whoever reads a result later sees by it whether the run has gone on since. Cold: reads bytes, loads no model, and knows
nothing of results.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qswitch.outside import read_json
from qswitch.run_dir import RunDir
from qswitch.state_files import SummaryFile

WEIGHT_SUFFIXES = (".safetensors", ".bin")
HASHED_SUFFIXES = (*WEIGHT_SUFFIXES, ".json", ".jinja", ".model")
WHOLE_BYTES = 64 * 2**20
"""Files up to this size are hashed whole."""
BLOCK = 2**16
"""Bytes read at a place."""


def folder_fingerprint(folder: Path, suffixes: Sequence[str] = HASHED_SUFFIXES) -> str:
    """Hash of the weights, configurations and templates in a folder, wherever it lies; of large files, samples."""
    return files_fingerprint(sorted(p for p in folder.iterdir() if p.suffix in suffixes and p.is_file()))


def files_fingerprint(paths: Iterable[Path]) -> str:
    """Hash of the names, sizes and content of files; of large ones, samples."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}|{size}|".encode())
        with path.open("rb") as handle:
            # The header of a safetensors file, its end, and places between: training changes every tensor.
            starts = range(0, size, BLOCK) if size <= WHOLE_BYTES else [size * i // 256 for i in range(256)]
            for start in [*starts, max(0, size - BLOCK)]:
                handle.seek(start)
                digest.update(handle.read(BLOCK))
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class TrainedWeights:
    """What a run has trained, as it lay on disk at some moment."""

    folder: Path
    mark: str
    """Of the weight files alone, so that a checkpoint and the adapter made from it have the same one."""
    step: int | None
    """After which the weights were taken; None where an older run did not keep it."""
    finished: bool
    """Whether they are the run's result, and not a checkpoint of a run under way."""

    @classmethod
    def of(cls, run_dir: RunDir, folder: Path) -> TrainedWeights:
        """The weights in `folder`, which is RUN/adapter or the adapter of one of the run's checkpoints."""
        finished = folder == run_dir.adapter_path
        if finished:
            summary = read_json(run_dir.summary_path, SummaryFile) if run_dir.summary_path.is_file() else {}
            step = summary.get("best_step")
        else:
            number = folder.parent.name.removeprefix("step-")
            step = int(number) if number.isdecimal() else None
        return cls(folder, folder_fingerprint(folder, WEIGHT_SUFFIXES)[:16], step, finished)

    @classmethod
    def present(cls, run_dir: RunDir) -> TrainedWeights | None:
        """The weights that the run has now, unchecked; None before its first checkpoint."""
        checkpoints = [folder / "adapter" for folder in run_dir.checkpoints()]
        folders = [f for f in (*checkpoints, run_dir.adapter_path) if f.is_dir()]
        return cls.of(run_dir, folders[-1]) if folders else None

    def to_dict(self) -> dict[str, Any]:
        """For a result that was measured with them."""
        return {"mark": self.mark, "step": self.step, "finished": self.finished}


def weights_text(weights: Mapping[str, Any]) -> str:
    """What a result says of the weights (`TrainedWeights.to_dict`) that it was measured with."""
    step = "an unknown step" if weights["step"] is None else f"step {weights['step']}"
    return f"the weights of {step}" + ("" if weights["finished"] else "; the run had not finished")
