"""One run, top to bottom: what would stop it, its one plan, its folder and lock, training, the report.

`distill` begins a run and `resume` goes on with one; `rehearse` says what either would do and loads nothing. The plan
is made here, once, with the lengths of the data that was read, and handed down: nothing below chooses sizes but the
recovery from an out-of-memory error, which says so. Cold until data and models are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qswitch.config import RunConfig
from qswitch.errors import ConfigError, Interrupted, QSwitchError, StorageError, storage_problem
from qswitch.layers import Layer
from qswitch.plan.advice import require_fit, require_own_sizes_fit
from qswitch.plan.machine import Machine, describe_machine, find_budget
from qswitch.plan.run_plan import Plan
from qswitch.plan.scheduler import plan_for, plan_run, with_choices
from qswitch.preflight import check_settings, prepare, settings_problems
from qswitch.run_dir import RunDir, locked, make_folder

if TYPE_CHECKING:
    from qswitch.distill.session import Summary
    from qswitch.preflight import Prepared


def rehearse(config: RunConfig, *, vram: str | None = None, resumes: bool = False) -> tuple[Plan, str]:
    """The plan of a run from its settings alone, and where its budget is from; of the data the first rows.

    Raises:
        PreflightError: what would stop the run on this machine, or with `vram` on any.
    """
    check_settings(config, elsewhere=vram is not None)
    return plan_for(config, vram=vram, keep_sizes=resumes)


def distill(config: RunConfig, path: Path, *, vram: str | None = None) -> Summary:
    """Train a student in a new folder and write its report.

    A user's mistake that stops the run before its first step leaves no folder behind.

    Raises:
        PreflightError: what would stop the run, all in one list.
        PlanError: no sizes fit the memory; no weight was loaded.
        DataError, ModelError, TrainingError: as their messages say.
        Interrupted: stopped by SIGINT or SIGTERM; `resume` goes on. Its argument is the folder.
    """
    RunDir.refuse_existing(path)
    budget = find_budget(config.train, vram=vram)  # before torch and the data take their share of a CPU's memory
    prepared = _prepare(config, settings_problems(config, path))
    config = _with_steps(config, prepared.prompts.report.training_prompts)
    machine, longest = _machine(config, prepared, vram), prepared.prompts.report.longest_prompt_tokens
    plan = plan_run(config, budget_bytes=budget.num_bytes, machine=machine, longest_prompt_tokens=longest)
    require_fit(plan)
    with locked(make_folder(path)):  # first, so that of two starts on one folder the second finds the first
        run_dir = RunDir.create(path, plan.config)
        try:
            return _carry_out(run_dir, prepared, plan, resumes=False)
        except QSwitchError:
            run_dir.discard_unstarted()
            raise


def resume(path: Path, *, vram: str | None = None, changes: Layer | None = None) -> Summary:
    """Go on with a run from its newest checkpoint, with its own sizes and configuration, `changes` to it apart.

    A budget that was named and does not hold them refuses the run; where memory is only short now, that is said, and
    sizes are lowered when it runs out.

    Raises:
        RunDirError: there is no such run, or another command writes to it.
        ConfigError: a setting of `changes` may not change in a run that has begun.
        and what `distill` raises.
    """
    run_dir = RunDir.open(path, changes)
    budget = find_budget(run_dir.config.train, vram=vram)
    prepared = _prepare(run_dir.config, [])

    from qswitch.distill.session import saved_sizes

    sizes = saved_sizes(run_dir)
    plan = plan_run(
        run_dir.config if sizes is None else sizes.write_into(run_dir.config),
        budget_bytes=budget.num_bytes,
        machine=_machine(run_dir.config, prepared, vram),
        longest_prompt_tokens=prepared.prompts.report.longest_prompt_tokens,
        keep_sizes=True,
    )
    if vram is not None:
        require_own_sizes_fit(plan)
    with locked(path):
        return _carry_out(run_dir, prepared, plan, resumes=True)


def _prepare(config: RunConfig, problems: list[str]) -> Prepared:
    """Tokenizers and data; or `problems`, and what models and data add to them, raised."""
    from qswitch.distill.progress import Progress, total_steps

    return prepare(config, notify=Progress(total_steps(config.train)).loading, known=problems)


def _machine(config: RunConfig, prepared: Prepared, vram: str | None) -> Machine:
    """What the run computes on, as torch says; the budget was read from the same device, or named.

    Raises:
        ConfigError: only torch sees the GPU, so that nobody knows what is free on it.
    """
    machine = describe_machine(config.train)
    if machine.device == prepared.device:
        return machine
    if vram is None:
        raise ConfigError(
            "torch computes on a GPU here, but nvidia-smi does not answer, so that its free memory is not known. Put "
            "nvidia-smi on the PATH, or name the memory, for example --vram 12GiB."
        )
    return describe_machine(config.train, prepared.device)


def _with_steps(config: RunConfig, num_prompts: int) -> RunConfig:
    """The configuration with train.num_epochs turned into steps, so that a resumed run has the same."""
    if config.train.num_epochs is None:
        return config
    from qswitch.distill.budget import steps_of_epochs

    steps = steps_of_epochs(config.train, num_prompts=num_prompts, reuse=config.rollout.reuse)
    if config.train.warmup_steps >= steps:
        raise ConfigError(
            f"train.num_epochs={config.train.num_epochs:g} is {steps} steps with {num_prompts} training prompts, but "
            f"train.warmup_steps is {config.train.warmup_steps}. Lower it, or raise train.num_epochs."
        )
    return with_choices(config, {"train.max_steps": steps, "train.num_epochs": None})


def _carry_out(run_dir: RunDir, prepared: Prepared, plan: Plan, *, resumes: bool) -> Summary:
    from qswitch.distill.session import train
    from qswitch.report.page import write_report

    try:
        run_dir.record_changes()
        run_dir.write_json("data.json", prepared.prompts.report.to_dict())
        run_dir.write_json("plan.json", plan.to_dict())
        summary = train(run_dir, prepared, plan, resumes=resumes)
        write_report([run_dir.path])
    except KeyboardInterrupt:
        raise Interrupted(str(run_dir.path)) from None
    except Exception as error:
        problem = None if isinstance(error, QSwitchError) else storage_problem(error)
        if problem is None:
            raise
        go_on = f" What was trained is kept: qswitch distill --resume {run_dir.path}" if run_dir.has_begun else ""
        raise StorageError(f"{problem}{go_on}") from error
    return summary
