"""Starts groups of processes that do runs together, with the libraries imported once.

Reads a list of worlds as JSON, each a number of processes and the runs they do one after the other, and writes what
each run ended with. The processes of a world are forks of this one, which has imported everything and computed nothing.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import yaml

import qswitch.distill.session
import qswitch.report.page
from qswitch import teach
from qswitch.distill import supply, teaching
from qswitch.distill.processes import joined
from qswitch.distill.supply import AdaptiveShare
from qswitch.distill.trainer import Trainer
from qswitch.errors import Interrupted, QSwitchError
from qswitch.layers import build_config
from qswitch.run import distill, resume

assert qswitch.distill.session and qswitch.report.page


def let_share_grow() -> None:
    """Every validation looks worse than the one before, so that data.adaptive_share grows in steps of a half."""
    supply.PHI_STEP = 0.5
    AdaptiveShare.observe = _observe_worse  # type: ignore[method-assign]


def _observe_worse(self: AdaptiveShare, _loss: float) -> bool:
    return _OBSERVE(self, 0.0 if self.reference_nats is None else 1e3 + self.phi)


_OBSERVE, _PHI_STEP = AdaptiveShare.observe, supply.PHI_STEP


def do(run: dict[str, Any], rank: int) -> dict[str, Any]:
    """One run or store, new or resumed, or the error that it ended with, unless the error `escapes`.

    `stop_at` asks for a stop in the process `stop_rank`, after so many steps. `copy_of` is a folder that is copied
    first, to `to`, `without` some of its parts, others `cut`.
    """
    original = Trainer.train_step

    def stopping(self: Trainer) -> Any:
        if self.step == run["stop_at"] and rank == run.get("stop_rank", 0):
            self.stop_requested = True
        return original(self)

    os.chdir(run.get(f"cwd_{rank}", "."))
    if "distillm" in run.get("path", ""):
        let_share_grow()
    if "stop_at" in run:
        Trainer.train_step = stopping  # type: ignore[method-assign]
    try:
        if "copy_of" in run and rank == 0:  # the others wait for the first process before they read
            copy(run)
        if "resume" in run:
            return {"summary": resume(Path(run["resume"])).kl_after_nats}
        if "resume_store" in run:
            return {"complete": teach.resume(Path(run["resume_store"])).complete}
        settings = yaml.safe_load(Path(run["config"]).read_text())
        for key, value in run.get(f"set_{rank}", {}).items():
            section, _, name = key.partition(".")
            settings[section][name] = value
        if "store" in run:
            return {"complete": teach.teach(build_config(settings), Path(run["store"])).complete}
        return {"summary": distill(build_config(settings), Path(run["path"])).kl_after_nats}
    except Interrupted:
        return {"interrupted": True}
    except QSwitchError as error:
        if run.get("escapes"):
            raise
        return {"error": str(error), "exit_code": error.exit_code}
    finally:
        Trainer.train_step = original  # type: ignore[method-assign]
        supply.PHI_STEP, AdaptiveShare.observe = _PHI_STEP, _OBSERVE  # type: ignore[method-assign]


def copy(run: dict[str, Any]) -> None:
    """A folder as it would be after an accident."""
    folder = Path(run["to"])
    shutil.copytree(run["copy_of"], folder)
    for name in run.get("without", ()):
        shutil.rmtree(folder / name)
    for name in run.get("cut", ()):
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def world(count: int, rank: int, port: int, runs: list[dict[str, Any]], answer: Path) -> None:
    """The life of one process."""
    os.environ |= {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                   "LOCAL_WORLD_SIZE": str(count), "MASTER_PORT": str(port)}  # fmt: skip
    found = []
    try:
        with joined() as processes:
            for run in runs:
                found.append(do(run, rank) | {"rank": processes.rank})
    except QSwitchError as error:
        found.append({"error": str(error), "exit_code": error.exit_code, "said_elsewhere": error.said_elsewhere})
    answer.write_text(json.dumps(found))


def main() -> None:
    """Forks every process of every world, and waits for all of them."""
    request, folder = json.loads(sys.stdin.read()), Path(sys.argv[1])
    teaching.PART_SEQUENCES = 5
    children = []
    gc.freeze()  # what is imported stays: the runs' many collections need not look at it
    for number, one in enumerate(request):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for rank in range(one["processes"]):
            child = os.fork()
            if child == 0:
                try:
                    world(one["processes"], rank, port, one["runs"], folder / f"{number}-{rank}.json")
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            children.append(child)
        if any(os.waitpid(child, 0)[1] for child in children):
            sys.exit(1)
        children.clear()


if __name__ == "__main__":
    main()
