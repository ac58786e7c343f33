"""How much memory each phase of a run took at its most, beside what the plan says of it.

On a GPU that is what torch allocated for tensors and what it reserved of the card for them, of several GPUs on the
fullest; the CUDA context comes on top. On a CPU it is the resident set of the process, which Linux lets a process count
anew: whoever asks the system for the peak of a run (`time -v`) is told that of its last phase only, and `summary.json`
has all of them. Knows no model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from qswitch.units import GIB

Size = TypeVar("Size", int, float)
Peaks = dict[str, dict[str, int]]
"""Phase -> kind of figure -> bytes."""
COUNTED_KIND = {"cuda": "allocated", "cpu": "resident"}
"""By device: the kind that is the peak of the run."""


class PhasePeaks:
    """Tells the phases of `plan/breakdown.py` apart by the memory they take.

    Args:
        planned: phase -> bytes of the plan; empty where nothing was planned.
    """

    def __init__(self, device: torch.device, planned: Mapping[str, int] | None = None) -> None:
        self.planned = dict(planned or {})
        self.highest_bytes = 0
        """Of all phases so far, as `COUNTED_KIND` counts."""
        self._device, self._phase = device, "load"
        self._since_taken: Peaks = {}

    def enter(self, phase: str) -> None:
        """What is allocated from now on belongs to `phase`."""
        self._note()
        self._phase = phase

    def take(self) -> Peaks:
        """The peaks of the phases since they were last taken."""
        self._note()
        taken, self._since_taken = self._since_taken, {}
        return taken

    def _note(self) -> None:
        found, are_counted_anew = _next_peaks(self._device)
        highest = found[COUNTED_KIND[self._device.type]]
        if not are_counted_anew and highest <= self.highest_bytes:
            return  # the peak of an earlier phase hides this one's
        self.highest_bytes = max(self.highest_bytes, highest)
        self._since_taken = highest_of([self._since_taken, {self._phase: found}])


def highest_of(several: Iterable[Mapping[str, Mapping[str, Size]]]) -> dict[str, dict[str, Size]]:
    """The highest of each figure."""
    highest: dict[str, dict[str, Size]] = {}
    for peaks in several:
        for phase, figures in peaks.items():
            mine = highest.setdefault(phase, {})
            for kind, size in figures.items():
                mine[kind] = max(mine.get(kind, size), size)
    return highest


def in_gib_beside(peaks: Peaks, planned: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Phase -> kind -> GiB, with the plan's figure as the kind `planned`."""
    both = {phase: ({"planned": planned[phase]} if phase in planned else {}) | peaks[phase] for phase in peaks}
    return {phase: {kind: round(size / GIB, 4) for kind, size in figures.items()} for phase, figures in both.items()}


def process_peaks(device: torch.device) -> dict[str, int]:
    """Bytes by kind since `forget_peaks`, or since the process began, whatever phases were told apart meanwhile."""
    return highest_of([{"": _earlier}, {"": _read(device)}])[""]


def forget_peaks(device: torch.device) -> None:
    """`process_peaks` begins at what is held now, where the system lets us."""
    if _count_anew(device):
        _earlier.clear()


_earlier: dict[str, int] = {}
"""Peaks of the process that its counters have forgotten."""


def _next_peaks(device: torch.device) -> tuple[dict[str, int], bool]:
    """Peaks since the last call, and whether the next ones begin at what is held now."""
    found = _read(device)
    _earlier.update(process_peaks(device))
    return found, _count_anew(device)


def _read(device: torch.device) -> dict[str, int]:
    if device.type == "cuda":
        kinds = {"allocated": torch.cuda.max_memory_allocated, "reserved": torch.cuda.max_memory_reserved}
        return {kind: max(read(gpu) for gpu in _used_gpus(device)) for kind, read in kinds.items()}
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return {"resident": int(found[1]) * 1024}
    import resource

    return {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _used_gpus(device: torch.device) -> list[torch.device]:
    """The device, and other GPUs on which this process holds tensors: layers of the teacher (`teacher.num_gpus`)."""
    first = device.index or 0
    others = [
        index for index in range(torch.cuda.device_count()) if index != first and torch.cuda.memory_allocated(index)
    ]
    return [device, *(torch.device("cuda", index) for index in others)]


def _count_anew(device: torch.device) -> bool:
    """Let the counters begin at what is held now; False where the system does not let us."""
    if device.type == "cuda":
        for gpu in _used_gpus(device):
            torch.cuda.reset_peak_memory_stats(gpu)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): forget the peak resident set
    except OSError:
        return False
    return True
