"""The JSON of one stage, written after every measurement, so that nothing is lost when the process is.

A measurement that fails is recorded with its error, and the stage goes on. One that ends the whole process (a signal,
an exhausted host) is blamed by `__main__`, which then starts the stage again: what is recorded is not measured twice.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import provenance
from qswitch.distill.phase_peaks import forget_peaks, process_peaks
from qswitch.errors import is_out_of_memory

GIB = 2**30
POISONED = 76
"""Exit code of a process whose CUDA context is beyond repair: after an illegal access every later call fails."""


class NeedsGpuError(Exception):
    """A measurement that has nothing to measure on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What every stage is told."""

    device: torch.device
    tiny: bool
    """Small models and few repetitions: to try the driver where there is no GPU."""
    models: Path
    """Folder of models that stages make on disk and share."""
    output: Path
    """Folder of the results."""

    def needs_gpu(self) -> None:
        """Nothing on a GPU.

        Raises:
            NeedsGpuError: on a CPU.
        """
        if self.device.type != "cuda":
            raise NeedsGpuError

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Report:
    """Measurements by name, as they come; `path` may hold those of an earlier process of the same stage."""

    def __init__(self, path: Path, context: Context, *, stage: int, question: str, limit_s: float) -> None:
        self._path, self._device, self._limit_s = path, context.device, limit_s
        self._started = time.perf_counter()
        self.values: dict[str, Any] = {
            "benchmark": f"gpu stage {stage}", "question": question, "tiny": context.tiny,
            "device": str(context.device), "running": None, "not_tried": [], "measured": {},
        }  # fmt: skip
        if path.exists():
            self.values["measured"] = json.loads(path.read_text(encoding="utf-8"))["measured"]
        self.values |= provenance(context.device.type)
        self._save()

    @property
    def seconds_left(self) -> float:
        """Of the stage's time."""
        return self._limit_s - (time.perf_counter() - self._started)

    def measure(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Record what `run` returns, its seconds and its peaks of memory; or the error, or that time was up."""
        measured = self.values["measured"]
        if name in measured:
            return
        if self.seconds_left <= 0:
            self.values["not_tried"].append(name)
            self._save()
            return
        self.values["running"] = name
        self._save()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        forget_peaks(self._device)
        started = time.perf_counter()
        try:
            found = run()
        except NeedsGpuError:
            found = {"not_measured": "needs a GPU"}
        except Exception as error:  # whatever a driver or a library raises is the finding
            found = {"error": f"{type(error).__name__}: {error}"[:2000], "where": traceback.format_exc(limit=-3)}
        measured[name] = {"seconds": round(time.perf_counter() - started, 3), **self._peaks(), **found}
        self.values["running"] = None
        self._save()
        outcome = measured[name].get("error", measured[name].get("not_measured", "done"))
        print(f"  {name}: {outcome} ({measured[name]['seconds']:.1f} s)", flush=True)
        if "error" in found and self._is_poisoned():
            sys.exit(POISONED)

    def load(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Measure something whose result later measurements use: after a process that ended, the next one does it again
        and records nothing."""
        known = self.values["measured"].get(name)
        if known is None:
            self.measure(name, run)
        elif "error" not in known:
            run()

    def _peaks(self) -> dict[str, float]:
        try:
            found = process_peaks(self._device)
            return {f"peak_{kind}_gib": round(size / GIB, 3) for kind, size in found.items()}
        except RuntimeError:
            return {}

    def _is_poisoned(self) -> bool:
        if self._device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self._device)
            torch.zeros(1, device=self._device).item()
        except RuntimeError as error:
            return not is_out_of_memory(error)
        return False

    def _save(self) -> None:
        write_json(self._path, self.values)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a file that is whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1, default=str) + "\n", encoding="utf-8")
    partial.replace(path)


def blame(path: Path, why: str) -> bool:
    """Record in a stage's file that the measurement that was running ended its process; whether one was running."""
    if not path.exists():
        return False
    values = json.loads(path.read_text(encoding="utf-8"))
    name = values["running"]
    if name is None:
        return False
    values["measured"][name] = {"error": f"the process ended: {why}"}
    values["running"] = None
    write_json(path, values)
    return True
