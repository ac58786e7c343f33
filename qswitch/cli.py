"""The command line: read the options, import what the command needs, let it work, print what came out.

The only place where an exception becomes an exit code: 0 done; 1 our bug, traceback kept; 2 the user can fix it; 3 the
plan does not fit; 130 interrupted, resumable. Cold: heavy imports stand inside the commands.
"""

from __future__ import annotations

import logging
import select
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from qswitch import __version__
from qswitch.cli_options import (
    AsJson,
    Config,
    Data,
    DryRun,
    Method,
    Named,
    Overrides,
    Preset,
    Student,
    Teacher,
    Vram,
    load_settings,
    show,
    show_plan,
)
from qswitch.cli_results import results_app
from qswitch.cli_student import student_app
from qswitch.errors import ConfigError, QSwitchError, is_out_of_memory, memory_reason, storage_problem
from qswitch.launch import launched
from qswitch.outside import user_path
from qswitch.terminal import STDERR, STDOUT, complain, filter_log, lead_nowhere, tell


class _Interrupted(Exception):
    """Ctrl-C inside a command; its argument, if any, is the run directory to resume."""


class _PipeClosed(Exception):
    """What was being written to is closed; its cause says where."""


class _Commands(TyperGroup):
    """typer turns KeyboardInterrupt and a closed pipe into bare exit codes; this keeps what they say."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        try:  # `qswitch --help` is printed here
            return super().make_context(*arguments, **options)
        except BrokenPipeError as error:
            raise _PipeClosed from error

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interrupted(*error.args) from error
        except BrokenPipeError as error:
            raise _PipeClosed from error


OF_SEVERAL_PROCESSES = ("distill", "sft", "teach")
"""Commands that accelerate launch and torchrun may start several times at once."""

app = typer.Typer(
    name="qswitch",
    cls=_Commands,
    help="Distil a large language model into a small one on one consumer GPU, with the SWITCH method.",
    epilog="Documentation: https://github.com/qswitch/qswitch/blob/main/docs/index.md",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
presets_app = typer.Typer(help="Ready-made configurations.", no_args_is_help=True, rich_markup_mode=None)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; exceptions that are our bugs propagate with their traceback."""
    _silence_optional_kernels()
    filter_log()
    try:
        if launched().rank:  # the first process says it all
            logging.disable(logging.WARNING)
        result = app(arguments, standalone_mode=False)
        sys.stdout.flush()  # a full disk or a closed pipe is heard here, and not after the exit code
    except QSwitchError as error:
        if not error.said_elsewhere:
            complain(str(error))
        return error.exit_code
    except (_PipeClosed, BrokenPipeError) as error:
        if _reader_left():
            return 0
        if (problem := storage_problem(error)) is None:
            raise (error.__cause__ or error) from None
        complain(problem)
        return 2
    except (_Interrupted, KeyboardInterrupt) as error:
        if launched().rank:
            return 130
        folder, command = (*error.args, "distill")[:2] if error.args else ("", "")
        hint = f" Resume with: qswitch {command} --resume {folder}" if folder else ""
        tell(f"interrupted.{hint}")
        return 130
    except Exception as error:
        # typer's usage errors (unknown option, missing argument) know how to show themselves and their exit code.
        show = getattr(error, "show", None)
        if callable(show) and hasattr(error, "exit_code"):
            show()
            return int(error.exit_code)
        if type(error).__name__ == "Abort":
            return 130
        if is_out_of_memory(error):
            complain(_out_of_memory(error))
            return 2
        if (problem := storage_problem(error)) is not None:
            complain(problem)
            return 2
        raise
    return result if isinstance(result, int) else 0


def _reader_left() -> bool:
    """Whether who reads our results has read enough, as `qswitch presets list | head -1` has; they then lead nowhere.

    Otherwise the closed pipe is another, to a tracker's service for instance, and an error like any. That of stderr
    is none: progress ends no work.
    """
    poll = select.poll()
    for descriptor in (STDOUT, STDERR):
        poll.register(descriptor, 0)
    left = [descriptor for descriptor, state in poll.poll(0) if state & (select.POLLERR | select.POLLHUP)]
    for descriptor in left:
        lead_nowhere(descriptor)
    return STDOUT in left


def _out_of_memory(error: BaseException) -> str:
    """Training shrinks its sizes by itself; what ends here is loading, evaluating or generating."""
    reason = memory_reason(error)
    return (
        f"out of memory{': ' + reason if reason else ''}. Close what else uses the device; lower --max-new-tokens, for "
        "`qswitch eval` --batch-size or --max-prompt-tokens too; or take --device cpu where a command has it."
    )


def _silence_optional_kernels() -> None:
    """No advice to install an optional package: bitsandbytes gives it, while imported, on CPUs with AVX-512 BF16."""
    # One function, so that a second command of the process adds nothing.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_advice)


def _is_no_advice(record: Any) -> bool:
    return "kernels-community" not in str(record.msg)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"qswitch {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    launch = launched()
    if launch.count > 1 and ctx.invoked_subcommand not in OF_SEVERAL_PROCESSES:
        error = ConfigError(
            f"qswitch {ctx.invoked_subcommand} runs in one process, and {launch.count} were started. Start it without "
            "accelerate launch or torchrun."
        )
        error.said_elsewhere = launch.rank > 0
        raise error


def _print_run(path: Path, summary: Any, as_json: bool, *, shown: bool) -> None:
    from qswitch.console import print_summary
    from qswitch.run_dir import RunDir

    if not shown:
        return
    run_dir = RunDir.open(path)
    if as_json:
        print(run_dir.summary_path.read_text(encoding="utf-8"), end="")
    else:
        print_summary(run_dir, summary)


@app.command(epilog="Example: qswitch distill --teacher TEACHER --student STUDENT --data my_prompts.jsonl")
def distill(
    teacher: Teacher = None,
    student: Student = None,
    data: Data = None,
    method: Method = None,
    preset: Preset = None,
    config: Config = None,
    overrides: Overrides = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            parser=user_path,
            help="Run directory; default: runs/NAME-<date>-<time>. NAME is the preset, the file, or run.",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", "--resume-from-checkpoint", parser=user_path, help="Go on with this run directory."),
    ] = None,
    dry_run: DryRun = False,
    vram: Vram = None,
    as_json: AsJson = False,
) -> None:
    """Train a student of a teacher on your data, from a preset, a file, or the names of two models."""
    from qswitch import run as runs
    from qswitch.distill.processes import joined
    from qswitch.layers import set_layer
    from qswitch.run_dir import RunDir, folder_of_its_own

    named = Named(preset, config, overrides, teacher, student, data, method)
    with joined() as processes, ExitStack() as held:
        if resume is not None and (preset or config or teacher or student or data or method or output_dir):
            raise ConfigError(
                "--resume goes on with the run's own config.yaml; leave --preset, --config, --teacher, --student, "
                "--data, --method and --output-dir out. --set changes learning rates, limits, and when it saves."
            )
        changes = set_layer(overrides or [])
        if dry_run and resume is not None:
            settings = RunDir.open(resume, changes, trains=True).config
            show_plan(runs.rehearse(settings, vram=vram, resumes=True), as_json, shown=processes.is_first)
        elif dry_run:
            settings = processes.each(lambda: load_settings(named, vram=vram))
            show_plan(runs.rehearse(settings, output_dir, vram=vram), as_json, shown=processes.is_first)
        elif resume is not None:
            _print_run(resume, runs.resume(resume, vram=vram, changes=changes), as_json, shown=processes.is_first)
        else:
            settings = processes.each(lambda: load_settings(named, vram=vram))
            path = processes.from_first(lambda: held.enter_context(folder_of_its_own(output_dir, named.label)))
            _print_run(path, runs.distill(settings, path, vram=vram), as_json, shown=processes.is_first)


@app.command(epilog="Example: qswitch sft --preset qwen2.5-7b-to-1.5b --model teacher --set data.train=my_data.jsonl")
def sft(
    model: Annotated[
        Literal["teacher", "student"], typer.Option(help="Which model of the pair to fine-tune.")
    ] = "student",
    teacher: Teacher = None,
    student: Student = None,
    data: Data = None,
    preset: Preset = None,
    config: Config = None,
    overrides: Overrides = None,
    output_dir: Annotated[
        Path | None, typer.Option(parser=user_path, help="Run directory; default: runs/NAME-sft-<model>-<date>-<time>.")
    ] = None,
    dry_run: DryRun = False,
    vram: Vram = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune the teacher or the student on the responses in the data, as a warm start for distill."""
    from qswitch import run as runs
    from qswitch.distill.processes import joined
    from qswitch.run_dir import folder_of_its_own

    if preset is None and config is None:  # one model is enough
        teacher, student = teacher or student, student or teacher
    named = Named(preset, config, overrides, teacher, student, data, None if preset or config else "sft")
    with joined() as processes, ExitStack() as held:
        settings = processes.each(lambda: load_settings(named, vram=vram, command=f"sft --model {model}", trains=model))
        if dry_run:
            show_plan(runs.rehearse(settings, output_dir, vram=vram), as_json, shown=processes.is_first)
            return
        label = f"{named.label}-sft-{model}"
        path = processes.from_first(lambda: held.enter_context(folder_of_its_own(output_dir, label)))
        _print_run(path, runs.distill(settings, path, vram=vram), as_json, shown=processes.is_first)
        if not as_json and processes.is_first:
            setting = "teacher.adapter" if model == "teacher" else "student.init_adapter"
            print(f"  or:      qswitch distill ... --set {setting}={path}")


@app.command(epilog="Example: qswitch teach --preset qwen2.5-7b-to-1.5b --method kd --output-dir store")
def teach(
    teacher: Teacher = None,
    student: Student = None,
    data: Data = None,
    method: Method = None,
    preset: Preset = None,
    config: Config = None,
    overrides: Overrides = None,
    output_dir: Annotated[
        Path | None, typer.Option(parser=user_path, help="Folder to write; default: runs/NAME-teacher-<date>-<time>.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", parser=user_path, help="Write what is missing of this store.")
    ] = None,
    spread: Annotated[
        bool,
        typer.Option("--spread", help="Layers that do not fit the GPU wait in host memory: slow, for bf16 or fp32."),
    ] = False,
    dry_run: DryRun = False,
    vram: Vram = None,
    as_json: AsJson = False,
) -> None:
    """Let the teacher alone write or score the responses of a run, which then trains without it."""
    from dataclasses import asdict

    from qswitch import teach as teaching
    from qswitch.distill.processes import joined
    from qswitch.run_dir import folder_of_its_own

    named = Named(preset, config, overrides, teacher, student, data, method)
    with joined() as processes, ExitStack() as held:
        if resume is not None and (named or output_dir):
            raise ConfigError("--resume goes on with the store's own config.yaml; leave the other options out.")
        if resume is not None and dry_run:
            raise ConfigError("--dry-run is for a new store. Leave --resume out.")
        if resume is not None:
            folder, about = resume, teaching.resume(resume, vram=vram, spread=spread)
        else:
            settings = processes.each(lambda: load_settings(named, vram=vram, command="teach"))
            if dry_run:
                planned = teaching.rehearse(settings, output_dir, vram=vram, spread=spread)
                if processes.is_first:
                    show(planned.to_dict(), as_json, lambda _: planned.render())
                return
            label = f"{named.label}-teacher"
            folder = processes.from_first(lambda: held.enter_context(folder_of_its_own(output_dir, label)))
            about = teaching.teach(settings, folder, vram=vram, spread=spread)
        if processes.is_first:
            show(asdict(about), as_json, lambda _: (
                f"{about.teacher} has worked for {about.seconds:.0f} s.\n"
                f"next: the same qswitch distill, with --set teacher.responses={folder}"
            ))  # fmt: skip


@app.command(epilog="Example: qswitch plan --preset qwen2.5-7b-to-1.5b --gpu rtx3060-12gb")
def plan(
    teacher: Teacher = None,
    student: Student = None,
    data: Data = None,
    method: Method = None,
    preset: Preset = None,
    config: Config = None,
    overrides: Overrides = None,
    vram: Vram = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Plan for all that a card leaves free, rtx3060-12gb say, or for --vram.")
    ] = None,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="Plan for so many processes, each with a GPU of its own.")
    ] = 1,
    every: Annotated[bool, typer.Option("--all", help="Every preset against 6, 8, 12, 16 and 24 GiB.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say beforehand how much memory a run takes, and whether it fits."""
    from qswitch.plan.render import render_overview
    from qswitch.plan.scheduler import plan_overview
    from qswitch.presets import load_run_config, preset_names
    from qswitch.run import preview

    named = Named(preset, config, overrides, teacher, student, data, method)
    if not every:
        settings = load_settings(named, vram=vram, gpu=gpu)
        rehearsal = preview(settings, vram=vram, gpu=gpu, processes=processes)
        show_plan(rehearsal, as_json, is_whole_card=gpu is not None and vram is None)
        return
    if named or vram or gpu or processes > 1:
        raise ConfigError("--all plans every preset against fixed budgets; leave the other options out.")
    show(plan_overview({name: load_run_config(name) for name in preset_names()}), as_json, render_overview)


@app.command(epilog="Example: qswitch doctor")
def doctor(as_json: AsJson = False) -> None:
    """Check this machine: versions, GPU, memory, 4-bit, hub."""
    from qswitch.doctor import examine, render

    show(examine(), as_json, render)


@presets_app.command("list", epilog="Example: qswitch presets list")
def presets_list(as_json: AsJson = False) -> None:
    """Every preset: what it is for, its card and planned memory, what it needs."""
    from qswitch.preset_index import read_index, render_list

    show(read_index(), as_json, render_list)


@presets_app.command("show", epilog="Example: qswitch presets show smollm2-demo")
def presets_show(name: Annotated[str, typer.Argument(help="Name of a preset.")], as_json: AsJson = False) -> None:
    """What a preset is for, then its full configuration, defaults included."""
    from qswitch.layers import dump_config
    from qswitch.preset_info import describe, render_head
    from qswitch.presets import load_run_config

    config = load_run_config(name)
    show(config.model_dump(mode="json"), as_json, lambda _: render_head(describe(name)) + dump_config(config).rstrip())


@presets_app.command("page", epilog="Example: qswitch presets page > presets/README.md")
def presets_page(as_json: AsJson = False) -> None:
    """All presets planned anew, as a Markdown page for presets/README.md, or as JSON for presets/index.json."""
    from qswitch.preset_index import render_index
    from qswitch.preset_info import plan_presets, render_page

    print(render_index(plan_presets()) if as_json else render_page(), end="")


@presets_app.command("copy", epilog="Example: qswitch presets copy smollm2-demo my.yaml")
def presets_copy(
    name: Annotated[str, typer.Argument(help="Name of a preset.")],
    target: Annotated[Path, typer.Argument(parser=user_path, help="File to write; must not exist.")],
) -> None:
    """Write the full configuration of a preset to a file of your own."""
    from qswitch.preset_info import copy_preset

    data = copy_preset(name, target).data.train
    print(f"wrote {target}, which trains on {data} (data.train); run it with: qswitch distill --config {target}")


app.add_typer(student_app)
app.add_typer(results_app)
app.add_typer(presets_app, name="presets")
