"""The teacher outputs that a run holds: their cache as it is set, and all processes' rows as a part of a checkpoint."""

from __future__ import annotations

import shutil
from typing import Any

from qswitch.config import RunConfig
from qswitch.distill.logit_cache import LogitCache, merge_states, select_state
from qswitch.distill.processes import Processes
from qswitch.distill.supply import Supply
from qswitch.models.language_model import LanguageModel
from qswitch.run_dir import RunDir
from qswitch.units import GIB


class HeldRows:
    """The teacher outputs that all processes hold, as one part of a checkpoint, which the first process writes."""

    def __init__(self, supply: Supply, processes: Processes) -> None:
        self._supply, self._processes = supply, processes

    def state_dict(self) -> dict[str, Any]:
        """As `LogitCache.state_dict`, of every process's rows; in the first process only, in step with the others."""
        shares = self._processes.gather_to_first(self._supply.cache.state_dict())
        return {**merge_states(shares), "processes": self._processes.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold this process's rows of a `state_dict`; the sequences they belong to are loaded already."""
        if state.get("processes", 1) != self._processes.count:
            self._supply.hand_over()
        own = {s.key for s in self._supply.held if s.owner == self._processes.rank}
        self._supply.cache.load_state_dict(select_state(state, own))


def make_cache(
    config: RunConfig,
    run_dir: RunDir,
    *,
    teacher: LanguageModel | None,
    student: LanguageModel,
    vocab_size: int,
    processes: Processes,
) -> LogitCache:
    """The cache of teacher outputs as `config.cache` describes it; without a teacher nothing will be put into it.

    The files that an earlier start of the run left when it was killed go: a checkpoint holds its rows itself.
    """
    cache = config.cache
    folders = [run_dir.path / ("cache" if rank == 0 else f"cache-{rank}") for rank in range(processes.count)]
    stale = [folders[processes.rank]]
    if processes.is_first:  # of processes that there are no longer
        stale += [folder for folder in run_dir.path.glob("cache-*") if folder not in folders]
    for folder in stale:
        if folder.is_symlink():  # to a disk with room: the link stays, and what else lies there
            for file in folder.glob("[0-9]*-*.bin"):
                file.unlink()
        elif folder.is_dir():
            shutil.rmtree(folder)
    return LogitCache(
        cache.format,
        head=teacher.head if teacher is not None else None,
        vocab_size=vocab_size,
        device=student.device,
        dtype=student.compute_dtype if teacher is None else teacher.compute_dtype,
        device_budget_bytes=int(cache.device_budget_gib * GIB),
        host_budget_bytes=int(cache.host_budget_gib * GIB),
        disk_path=folders[processes.rank],
        topk=cache.topk,
    )
