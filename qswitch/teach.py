"""One store of a teacher's work, top to bottom: preflight, its plan, folder and lock, the teacher at work.

The counterpart of `run.py` for `qswitch teach`. Started as several processes, each one comes through here, in step with
the others, and writes its share of the parts. Cold until data and models are read.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from qswitch.config import RunConfig, reader
from qswitch.data.first_look import counted_prompts, first_look
from qswitch.distill.processes import Processes, joined
from qswitch.errors import ConfigError, Interrupted, RunDirError
from qswitch.launch import launched
from qswitch.layers import build_config, reopened
from qswitch.outside import user_path
from qswitch.plan.machine import Budget, Machine, describe_machine
from qswitch.plan.scheduler import with_choices
from qswitch.plan.teacher_alone import TeachingPlan, plan_teaching
from qswitch.plan.vocabulary import with_tokenizer
from qswitch.preflight import PreflightError, free_bytes, place_problems, settings_problems
from qswitch.rules import NO_STEP_LIMIT, has_step_limit, why_teacher_is_asked
from qswitch.run import (
    free_path,
    locked_by_first,
    machine_of,
    read_inputs,
    require_folder,
    require_same,
    smallest_budget,
    with_steps,
)
from qswitch.run_dir import RunDir, maker_of
from qswitch.units import GIB
from qswitch.yaml_file import read_yaml

if TYPE_CHECKING:
    from qswitch.distill.stored_teacher import About

logger = logging.getLogger(__name__)


def rehearse(
    config: RunConfig, path: Path | None = None, *, vram: str | None = None, spread: bool = False
) -> TeachingPlan:
    """The plan of a store from its settings alone; started as several processes, that of so many.

    Raises:
        PreflightError, ConfigError: what would stop it.
        PlanError: no rows fit.
        RunDirError: `path`, where a new store is to be, holds something.
    """
    if path is not None:
        free_path(path, "teach")
    config = with_tokenizer(config)
    _require_teachable(config)
    problems = settings_problems(_that_stays(config), elsewhere=vram is not None)
    if problems := [*problems, *(place_problems(path) if path is not None else ())]:
        raise PreflightError(problems)
    num_prompts = counted_prompts(first_look(config))
    if num_prompts is not None:
        config = with_steps(config, num_prompts)
    with joined() as processes:
        budget = smallest_budget(config, vram, processes)
        plan = _plan(config, budget, _machine_before(config, budget, vram), num_prompts, spread)
    if path is not None:
        _warn_of_disk(plan, path)
    return plan


def teach(config: RunConfig, path: Path, *, vram: str | None = None, spread: bool = False) -> About:
    """Let the teacher write a new store. Of several processes the first one's `path` is the store's.

    Raises:
        PreflightError, ConfigError, DataError, ModelError, TrainingError: as their messages say.
        PlanError: no rows fit the memory; no weight was loaded.
        Interrupted: stopped; `resume` goes on. Its arguments are the folder and the command.
    """
    with joined() as processes:
        path = processes.from_first(lambda: free_path(path, "teach"))
        problems = [*settings_problems(_that_stays(config)), *place_problems(path)] if processes.is_first else []
        return _work(config, path, vram, spread, problems, processes, is_new=True)


def resume(path: Path, *, vram: str | None = None, spread: bool = False) -> About:
    """Go on with a store that is unfinished, cut or damaged: what is missing is written.

    The number of processes may be another one than before.

    Raises:
        RunDirError: there is no store.
        and what `teach` raises.
    """
    with joined() as processes:
        path = processes.from_first(lambda: user_path(path))
        return _work(processes.each(lambda: _own_config(path)), path, vram, spread, [], processes, is_new=False)


def _own_config(path: Path) -> RunConfig:
    settings = path / "config.yaml"
    if not settings.is_file():
        raise RunDirError(f"{path} holds no config.yaml, so it is no store. Name the folder that `qswitch teach` made.")
    if maker_of(path) == "distill":
        raise RunDirError(
            f"{path} is a run, no store of a teacher's work. It goes on with `qswitch distill --resume {path}`."
        )
    where = str(settings)
    return build_config(reopened(read_yaml(settings), where), where=where, trains=False)


def _work(
    config: RunConfig,
    path: Path,
    vram: str | None,
    spread: bool,
    problems: list[str],
    processes: Processes,
    *,
    is_new: bool,
) -> About:
    _require_teachable(config)
    # Before the data, and in one process before torch, take their share of a CPU's memory.
    budget = smallest_budget(config, vram, processes)
    from qswitch.models.pair import with_own_tokenizer

    if not any(processes.gather(bool(problems))):
        with suppress(ConfigError):  # a shape that is not known; the preflight says it with all else that is wrong
            processes.from_first(lambda: _plan(config, budget, _machine_before(config, budget, vram), None, spread))
        processes.in_turn(lambda: _require_teachable(with_own_tokenizer(config)))
    prepared = processes.in_turn(lambda: read_inputs(config, problems, processes))
    num_prompts = prepared.prompts.report.training_prompts
    config = with_steps(config, num_prompts)
    require_same(config, prepared, processes)
    plan = processes.from_first(lambda: _plan(config, budget, machine_of(config, prepared, vram), num_prompts, spread))

    if is_new and processes.is_first:
        _warn_of_disk(plan, path)

    from qswitch.distill.recovery import device_memory_bounded
    from qswitch.distill.teaching import write_store
    from qswitch.models.runtime import make_runtime

    with locked_by_first(path, processes):  # first, so that of two starts on one folder the second finds the first
        if is_new:
            processes.from_first(lambda: str(RunDir.create(path, config, "teach").path))
        try:
            processes.everyone(lambda: require_folder(path, processes))
            device = processes.each(lambda: make_runtime(config.train)).device
            with device_memory_bounded(device, len(plan.teacher_layers), plan.budget.num_bytes):
                return write_store(
                    path, config, prepared, rows=plan.rows, spread=plan.weights_room_bytes if spread else 0,
                    layers=plan.teacher_layers, processes=processes,
                )  # fmt: skip
        except KeyboardInterrupt:
            raise Interrupted(str(path), "teach") from None
        except Exception:
            if is_new and processes.is_first and not any(path.glob("part-*")):
                RunDir(path, config).discard_unstarted()
            raise


def _warn_of_disk(plan: TeachingPlan, path: Path) -> None:
    """Says that a store may outgrow its disk, which nobody knows before the teacher has written."""
    free = free_bytes(path)
    if plan.disk_bytes > free:
        logger.warning(
            "The store may take up to %.1f GiB, and the disk of %s has %.1f free. Where it is full, free some: "
            "`qswitch teach --resume` goes on.",
            plan.disk_bytes / GIB,
            path,
            free / GIB,
        )


def _that_stays(config: RunConfig) -> RunConfig:
    """The settings with a teacher that never leaves the device, as it does not here, whatever the run has."""
    return with_choices(config, {"teacher.residency": "resident"})


def _machine_before(config: RunConfig, budget: Budget, vram: str | None) -> Machine:
    """What nvidia-smi and the budget say, before torch is asked."""
    return describe_machine(config.train, budget.device if vram is not None else None, budget.gpu)


def _plan(config: RunConfig, budget: Budget, machine: Machine, num_prompts: int | None, spread: bool) -> TeachingPlan:
    return plan_teaching(config, budget, machine, num_prompts=num_prompts, spread=spread, processes=launched().count)


def _require_teachable(config: RunConfig) -> None:
    """Nothing, or an error where a teacher cannot work before the run.

    Raises:
        ConfigError: with the reason and the nearest method.
    """
    if config.teacher.responses is not None:
        raise ConfigError(
            f"teacher.responses={config.teacher.responses} is a store already. Leave it out to write one."
        )
    if not config.learns_from_teacher:
        raise ConfigError(f"method={config.method} learns from no teacher, so there is nothing to store.")
    if config.passes_text:
        raise ConfigError(
            "A store holds tokens of the teacher, which mean nothing to a student with another tokenizer. `qswitch "
            "distill` with method=seqkd lets the teacher write text first, by itself."
        )
    if not has_step_limit(reader(config)):
        raise ConfigError(f"A teacher works before the run, and {NO_STEP_LIMIT}")
    if (reason := why_teacher_is_asked(reader(config))) is not None:
        raise ConfigError(f"A teacher cannot work before this run: {reason}.")
