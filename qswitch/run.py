"""One run, top to bottom: what would stop it, its one plan, its folder and lock, training, the report.

Where the student has a tokenizer of its own, the teacher writes text between the folder and the training.

`distill` begins a run and `resume` goes on with one; `rehearse` says what either would do and loads nothing. The plan
is made here, once, with the lengths of the data that was read, and handed down: nothing below chooses sizes but the
recovery from an out-of-memory error, which says so. Started as several processes, each one comes through here, in step
with the others (`distill/processes.py`). Cold until data and models are read.
"""

from __future__ import annotations

import platform
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qswitch.config import RunConfig, known_keys, reader
from qswitch.data.first_look import FirstLook, counted_prompts, first_look
from qswitch.distill.processes import Processes, joined
from qswitch.errors import ConfigError, Interrupted, QSwitchError, RunDirError, StorageError, storage_problem
from qswitch.launch import launched
from qswitch.layers import Layer
from qswitch.outside import user_path
from qswitch.plan.advice import require_fit, require_own_sizes_fit
from qswitch.plan.machine import Budget, Machine, describe_machine, find_budget
from qswitch.plan.run_plan import Plan
from qswitch.plan.scheduler import model_shapes, plan_for, plan_run, unequal_shares, with_choices
from qswitch.plan.shapes import shared_context
from qswitch.plan.vocabulary import with_tokenizer
from qswitch.preflight import check_plannable, check_settings, prepare, settings_problems
from qswitch.run_dir import Command, RunDir, locked, make_folder

if TYPE_CHECKING:
    from qswitch.distill.phase_peaks import PhasePeaks
    from qswitch.distill.session import Summary
    from qswitch.preflight import Prepared


class Rehearsal(NamedTuple):
    """What is known of a run before anything is loaded."""

    plan: Plan
    budget_origin: str
    """Where the plan's budget is from."""
    data: FirstLook | None
    """None where the training data is not on this disk."""


def rehearse(
    config: RunConfig, path: Path | None = None, *, vram: str | None = None, resumes: bool = False
) -> Rehearsal:
    """The plan of a run from its settings alone; of the data the first rows.

    Started as several processes it is the plan of so many.

    Raises:
        PreflightError: what would stop the run on this machine, or with `vram` on any.
        RunDirError: `path`, where a new run is to be, holds something.
    """
    if path is not None:
        path = free_path(path)
    config = with_tokenizer(config)
    check_settings(config, path, elsewhere=vram is not None)
    return _rehearsed(config, vram=vram, keep_sizes=resumes, processes=launched().count)


def preview(config: RunConfig, *, vram: str | None = None, gpu: str | None = None, processes: int = 1) -> Rehearsal:
    """As `rehearse`, of a run on any machine: within `vram`, on the card `gpu`, or in what is free here.

    Raises:
        PreflightError: what would stop the run anywhere.
        ConfigError: the shape of a model, the card or the budget is not known, or the processes cannot share a step.
    """
    config = with_tokenizer(config)
    check_plannable(config)
    return _rehearsed(config, vram=vram, gpu=gpu, processes=processes)


def _rehearsed(config: RunConfig, **of_the_plan: Any) -> Rehearsal:
    look = first_look(config, shared_context(*model_shapes(config)))
    num_prompts = counted_prompts(look)
    num_steps = None if num_prompts is None else with_steps(config, num_prompts).train.max_steps
    return Rehearsal(*plan_for(config, num_steps=num_steps, **of_the_plan), look)


def distill(config: RunConfig, path: Path, *, vram: str | None = None) -> Summary:
    """Train a student in a new folder and write its report.

    Whatever fails before its first step, memory while the models load too, leaves no folder behind. Started as several
    processes, each calls this, and the first one's `path` is the run's.

    Raises:
        PreflightError: what would stop the run, all in one list.
        PlanError: no sizes fit the memory; no weight was loaded.
        DataError, ModelError, TrainingError: as their messages say.
        Interrupted: stopped by SIGINT, SIGTERM or SIGHUP; `resume` goes on. Its argument is the folder.
    """
    with joined() as processes:
        path = processes.from_first(lambda: free_path(path))
        # Before the data, and in one process before torch, take their share of a CPU's memory.
        budget = smallest_budget(config, vram, processes)
        problems = settings_problems(config, path) if processes.is_first else []
        if (unequal := unequal_shares(config, processes.count)) is not None:
            problems.append(unequal)
        if not any(processes.gather(bool(problems))):
            processes.from_first(lambda: _require_possible(config, budget, processes.count))
            config = processes.in_turn(lambda: _with_own_tokenizer(config))
        prepared = processes.in_turn(lambda: read_inputs(config, problems, processes))
        config = with_steps(config, prepared.prompts.report.training_prompts)
        require_same(config, prepared, processes)
        _require_store(config, prepared, processes)
        plan = processes.from_first(lambda: _first_plan(config, prepared, budget, vram, processes))
        with locked_by_first(path, processes):  # first, so that of two starts on one folder the second finds the first
            run_dir = processes.from_first(lambda: RunDir.create(path, plan.config))
            run_dir = RunDir(run_dir.path, run_dir.config, writes=processes.is_first)
            try:
                return _carry_out(run_dir, prepared, plan, resumes=False, processes=processes)
            except Exception:
                if processes.is_first:
                    run_dir.discard_unstarted()
                raise


def resume(path: Path, *, vram: str | None = None, changes: Layer | None = None) -> Summary:
    """Go on with a run from its newest checkpoint, with its own sizes and configuration, `changes` to it apart.

    A budget that was named and does not hold them refuses the run; where memory is only short now, that is said, and
    sizes are lowered when it runs out. The number of processes may be another one than before.

    Raises:
        RunDirError: there is no such run, or another command writes to it.
        ConfigError: a setting of `changes` may not change in a run that has begun.
        and what `distill` raises.
    """
    with joined() as processes:
        path = processes.from_first(lambda: user_path(path))
        run_dir = processes.each(lambda: RunDir.open(path, changes, writes=processes.is_first, trains=True))
        config = run_dir.config
        budget = smallest_budget(config, vram, processes)
        unequal = unequal_shares(config, processes.count)
        problems = [] if unequal is None else [unequal]
        prepared = processes.in_turn(lambda: read_inputs(config, problems, processes))
        require_same(config, prepared, processes)
        _require_store(config, prepared, processes)
        plan = processes.from_first(lambda: _plan_as_it_is(run_dir, prepared, budget, vram, processes))
        with locked_by_first(path, processes):
            return _carry_out(run_dir, prepared, plan, resumes=True, processes=processes)


@contextmanager
def locked_by_first(path: Path, processes: Processes) -> Iterator[None]:
    """The first process holds the lock of the folder for all."""
    with ExitStack() as held:
        processes.from_first(lambda: held.enter_context(locked(make_folder(path))))
        yield


def free_path(path: Path, command: Command = "distill") -> Path:
    """The path, `~` expanded, where nothing is of an earlier run, or of what else `command` makes."""
    path = user_path(path)
    RunDir.refuse_existing(path, command)
    return path


def _require_possible(config: RunConfig, budget: Budget, processes: int) -> None:
    """Refuses what would fit with no prompt, however short, before anything is downloaded, converted or read for it.

    Raises:
        PlanError: with the figures of `qswitch plan`, which knows no prompts either.
    """

    def planned(longest_prompt_tokens: int | None) -> Plan:
        return plan_run(
            with_tokenizer(config),
            budget_bytes=budget.num_bytes,
            device=budget.device,
            gpu=budget.gpu,
            longest_prompt_tokens=longest_prompt_tokens,
            processes=processes,
        )

    try:
        fits = planned(1).fits
    except ConfigError:  # a shape that is not known; the preflight says it together with all that is wrong
        return
    if not fits:
        require_fit(planned(None))


def _first_plan(config: RunConfig, prepared: Prepared, budget: Budget, vram: str | None, processes: Processes) -> Plan:
    """The plan of a new run, which fits."""
    plan = plan_run(
        config,
        budget_bytes=budget.num_bytes,
        machine=machine_of(config, prepared, vram),
        longest_prompt_tokens=_longest_prompt(config, prepared),
        processes=processes.count,
    )
    require_fit(plan)
    return plan


def _plan_as_it_is(run_dir: RunDir, prepared: Prepared, budget: Budget, vram: str | None, processes: Processes) -> Plan:
    """The plan of a run that has begun, with the sizes that its newest checkpoint was written with."""
    from qswitch.distill.session import saved_sizes

    sizes = saved_sizes(run_dir)
    plan = plan_run(
        run_dir.config if sizes is None else sizes.write_into(run_dir.config),
        budget_bytes=budget.num_bytes,
        machine=machine_of(run_dir.config, prepared, vram),
        longest_prompt_tokens=_longest_prompt(run_dir.config, prepared),
        keep_sizes=True,
        processes=processes.count,
    )
    if vram is not None:
        require_own_sizes_fit(plan)
    return plan


def _longest_prompt(config: RunConfig, prepared: Prepared) -> int | None:
    """Tokens of the data's longest prompt; not known where the student reads other tokens than those that were read."""
    return None if config.awaits_text else prepared.prompts.report.longest_prompt_tokens


def smallest_budget(config: RunConfig, vram: str | None, processes: Processes) -> Budget:
    """One plan serves every process, so it is made for the one that has least."""
    budgets = processes.everyone(lambda: find_budget(config.train, vram=vram, num_gpus=config.teacher.num_gpus))
    return min(budgets, key=lambda budget: budget.num_bytes)


def require_same(config: RunConfig, prepared: Prepared, processes: Processes) -> None:
    """Nothing, or an error where the processes have read different settings or data.

    Raises:
        ConfigError: names the process and what differs.
    """
    if processes.count == 1:
        return
    from qswitch.data.loader import PromptLoader

    read = reader(config)
    mine = {key: read(key) for key in known_keys()}
    data = {
        "the training prompts": PromptLoader(prepared.prompts.train, config.seed).state_dict(),
        "the held-out prompts": [(p.example_id, p.prompt_ids, p.response_ids) for p in prepared.prompts.held_out],
        "the vocabulary": (prepared.pair.vocab_size, prepared.pair.eos_ids, prepared.pair.pad_id),
        "data.lm_corpus": None if prepared.corpus is None else (len(prepared.corpus), int(prepared.corpus.sum())),
    }
    own = (mine, {name: zlib.crc32(repr(value).encode()) for name, value in data.items()})
    found = processes.gather(own)
    for rank, (settings, facts) in enumerate(found):
        different = [f"{key} is {value!r} there and {found[0][0][key]!r} in process 0"
                     for key, value in settings.items() if value != found[0][0][key]]  # fmt: skip
        different += [f"{name} are others there" for name, value in facts.items() if value != found[0][1][name]]
        if different:
            raise ConfigError(
                f"Process {rank} would do another run than process 0: {'; '.join(different[:3])}. Start every process "
                "with the same options, the same files and the same version of the data."
            )


def read_inputs(config: RunConfig, problems: list[str], processes: Processes) -> Prepared:
    """Tokenizers and data; or `problems`, and what models and data add to them, raised."""
    from qswitch.distill.progress import Progress, total_steps

    progress = Progress(total_steps(config.train), quiet=not processes.is_first)
    return prepare(config, notify=progress.loading, known=problems)


def _with_own_tokenizer(config: RunConfig) -> RunConfig:
    from qswitch.models.pair import with_own_tokenizer

    return with_own_tokenizer(config)


def machine_of(config: RunConfig, prepared: Prepared, vram: str | None) -> Machine:
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


def with_steps(config: RunConfig, num_prompts: int) -> RunConfig:
    """The configuration with train.num_epochs turned into steps, so that a resumed run has the same."""
    if config.train.num_epochs is None:
        return config
    steps = config.steps_of_epochs(config.train.num_epochs, num_prompts)
    if config.train.ends_by_steps_alone and 1 <= config.train.warmup_steps >= steps:
        raise ConfigError(
            f"train.num_epochs={config.train.num_epochs:g} is {steps} steps with {num_prompts} training prompts, but "
            f"train.warmup_steps is {config.train.warmup_steps:g}. Below 1 it is a share of the training: 0.05."
        )
    return with_choices(config, {"train.max_steps": steps, "train.num_epochs": None})


def _require_store(config: RunConfig, prepared: Prepared, processes: Processes) -> None:
    """The responses of a teacher that worked earlier are there, whole, and for this run."""
    if config.teacher.responses is None or not config.learns_from_teacher:
        return
    from qswitch.distill.teaching import require_store

    processes.in_turn(lambda: require_store(config, prepared))


def _carry_out(run_dir: RunDir, prepared: Prepared, plan: Plan, *, resumes: bool, processes: Processes) -> Summary:
    from qswitch.distill.session import train
    from qswitch.report.page import write_report

    try:
        processes.everyone(lambda: require_folder(run_dir.path, processes))
        run_dir.record_changes()
        run_dir.write_json("data.json", prepared.prompts.report.to_dict())
        run_dir.write_json("plan.json", plan.to_dict())
        config = run_dir.config
        peaks: PhasePeaks | None = None
        if config.awaits_text:
            config, prepared, peaks = _pass_text(run_dir, prepared, plan, processes)
        summary = train(run_dir, prepared, plan, resumes=resumes, processes=processes, config=config, peaks=peaks)
        processes.from_first(lambda: str(write_report([run_dir.path])))
    except KeyboardInterrupt:
        raise Interrupted(str(run_dir.path)) from None
    except Exception as error:
        problem = None if isinstance(error, QSwitchError) else storage_problem(error)
        if problem is None:
            raise
        go_on = f" What was trained is kept: qswitch distill --resume {run_dir.path}" if run_dir.has_begun else ""
        raise StorageError(f"{problem}{go_on}") from error
    return summary


def _pass_text(
    run_dir: RunDir, prepared: Prepared, plan: Plan, processes: Processes
) -> tuple[RunConfig, Prepared, PhasePeaks]:
    """The student's half of a run with two tokenizers, for which the teacher has written what was missing, and the
    memory that it took; `prepared` is the teacher's half."""
    from qswitch.distill.phase_peaks import PhasePeaks
    from qswitch.distill.progress import Progress
    from qswitch.distill.recovery import device_memory_bounded
    from qswitch.distill.teacher_text import text_files, write_text
    from qswitch.models.pair import student_half, teacher_half
    from qswitch.models.runtime import make_runtime

    device = make_runtime(run_dir.config.train).device
    peaks = PhasePeaks(device, plan.breakdown.fullest_phases)
    peaks.enter("write")
    folder, progress = run_dir.teacher_text_path, Progress(None, quiet=not processes.is_first)
    rows = plan.config.rollout.batch_size
    written = teacher_half(run_dir.config)

    def write() -> None:
        with device_memory_bounded(device, 1, plan.budget_bytes):
            write_text(folder, written, prepared, rows=rows, say=progress.say, notify=progress.loading)

    processes.from_first(write)
    half = student_half(run_dir.config, *text_files(folder))
    half_prepared = processes.in_turn(lambda: read_inputs(half, [], processes))
    peaks.enter("load")
    return half, half_prepared, peaks


def require_folder(path: Path, processes: Processes) -> None:
    """All processes work on one folder, so all must see it.

    Raises:
        RunDirError: this one does not see the config.yaml that the first has written there.
    """
    if not (path / "config.yaml").is_file():
        raise RunDirError(
            f"Process {processes.rank} on {platform.node()} does not see {path}. Name an --output-dir on a "
            "file system that all machines share, by its whole path."
        )
