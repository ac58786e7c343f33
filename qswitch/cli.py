"""The command line: parse, import what the command needs, call one function, print.

The only place where an exception becomes an exit code: 0 done; 1 our bug, traceback kept; 2 the user can fix it; 3 the
plan does not fit; 130 interrupted, resumable. Cold: heavy imports stand inside the commands.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from qswitch import __version__
from qswitch.errors import ConfigError, QSwitchError


class _Interrupted(Exception):
    """Ctrl-C inside a command; its argument, if any, is the run directory to resume."""


class _Commands(TyperGroup):
    """typer turns KeyboardInterrupt into a bare exit code; this keeps what it says."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interrupted(*error.args) from error


app = typer.Typer(
    name="qswitch",
    cls=_Commands,
    help="Distil a large language model into a small one on one consumer GPU, with the SWITCH method.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
presets_app = typer.Typer(help="Ready-made configurations.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(presets_app, name="presets")

Preset = Annotated[str | None, typer.Option("--preset", help="Name of a preset; `qswitch presets list` shows them.")]
Config = Annotated[Path | None, typer.Option("--config", help="YAML file instead of a preset.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value, for example train.max_steps=100. Repeatable.")
]
Vram = Annotated[str | None, typer.Option("--vram", help="Memory budget, for example 12GiB; default: what is free.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the settings and print the plan; load nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; exceptions that are our bugs propagate with their traceback."""
    _silence_optional_kernels()
    try:
        result = app(arguments, standalone_mode=False)
    except QSwitchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except _Interrupted as error:
        hint = f" Resume with: qswitch distill --resume {error.args[0]}" if error.args else ""
        print(f"interrupted.{hint}", file=sys.stderr)
        return 130
    except Exception as error:
        # typer's usage errors (unknown option, missing argument) know how to show themselves and their exit code.
        show = getattr(error, "show", None)
        if callable(show) and hasattr(error, "exit_code"):
            show()
            return int(error.exit_code)
        if type(error).__name__ == "Abort":
            return 130
        if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):  # torch's, which is not loaded
            print(f"error: {_out_of_memory(error)}", file=sys.stderr)
            return 2
        raise
    return result if isinstance(result, int) else 0


def _out_of_memory(error: BaseException) -> str:
    """Training shrinks its sizes by itself; what ends here is loading, evaluating or generating."""
    first = str(error).strip().partition("\n")[0][:200]
    return (
        f"out of memory{': ' + first if first else ''}. Close what else uses the device; for `qswitch eval` lower "
        "--batch-size, --max-prompt-tokens or --max-new-tokens; or take --device cpu where a command has it."
    )


def _silence_optional_kernels() -> None:
    """No advice to install an optional package: bitsandbytes gives it, while imported, on CPUs with AVX-512 BF16."""
    import logging

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
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _load(preset: str | None, config: Path | None, overrides: list[str] | None):
    from qswitch.presets import load_run_config

    source = config if preset is None else preset
    if source is None or (preset is not None and config is not None):
        raise ConfigError("Name either --preset NAME or --config FILE. `qswitch presets list` shows the presets.")
    if config is not None and config.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--config {config}: expected a .yaml file. For a preset write --preset {config}.")
    return load_run_config(source, overrides)


def _print_plan(config: Any, vram: str | None, gpu: str | None, as_json: bool) -> None:
    from qswitch.plan.machine import find_budget
    from qswitch.plan.scheduler import plan_run, require_fit

    budget = find_budget(config.train, vram=vram, gpu=gpu)
    plan = plan_run(config, budget_bytes=budget.num_bytes, device=budget.device, gpu=budget.gpu)
    if as_json:
        print(json.dumps(plan.to_dict(), indent=1))
    else:
        print(plan.render())
        print(f"Budget: {budget.source}.")
    require_fit(plan)


@app.command(epilog="Example: qswitch distill --preset llama-7b-to-1b --set data.train=my_prompts.jsonl")
def distill(
    preset: Preset = None,
    config: Config = None,
    overrides: Overrides = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Run directory; default: runs/<preset>-<date>-<time>.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", "--resume-from-checkpoint", help="Go on with this run directory.")
    ] = None,
    dry_run: DryRun = False,
    vram: Vram = None,
    as_json: AsJson = False,
) -> None:
    """Train a student: teacher in 4-bit, LoRA student, SWITCH rollouts."""
    from qswitch.run_dir import RunDir

    if resume is not None:
        if preset or config or overrides or output_dir:
            raise ConfigError("--resume goes on with the run's own config.yaml; leave --preset, --config, --set and "
                              "--output-dir out.")  # fmt: skip
        settings = RunDir.open(resume).config
    else:
        settings = _load(preset, config, overrides)
    if dry_run:
        from qswitch.preflight import check_settings

        check_settings(settings, elsewhere=vram is not None)
        _print_plan(settings, vram, None, as_json)
        return
    run_dir, summary = _train(settings, resume, output_dir, preset or (config.stem if config else "run"), vram)
    if as_json:
        print(run_dir.summary_path.read_text(encoding="utf-8"), end="")
        return
    _print_result(run_dir, summary)


@app.command(epilog="Example: qswitch sft --preset llama-7b-to-1b --model teacher --set data.train=my_data.jsonl")
def sft(
    model: Annotated[
        Literal["teacher", "student"], typer.Option(help="Which model of the pair to fine-tune.")
    ] = "student",
    preset: Preset = None,
    config: Config = None,
    overrides: Overrides = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Run directory; default: runs/<preset>-sft-<model>-<date>-<time>.")
    ] = None,
    dry_run: DryRun = False,
    vram: Vram = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune the teacher or the student on the responses in the data, as a warm start for distill."""
    from qswitch.layers import sft_config
    from qswitch.preflight import check_settings

    settings = sft_config(_load(preset, config, overrides), model)
    if dry_run:
        check_settings(settings, elsewhere=vram is not None)
        _print_plan(settings, vram, None, as_json)
        return
    name = f"{preset or (config.stem if config else 'run')}-sft-{model}"
    run_dir, summary = _train(settings, None, output_dir, name, vram)
    if as_json:
        print(run_dir.summary_path.read_text(encoding="utf-8"), end="")
        return
    _print_result(run_dir, summary)
    setting = "teacher.adapter" if model == "teacher" else "student.init_adapter"
    print(f"  or:      qswitch distill ... --set {setting}={run_dir.path}")


def _train(settings: Any, resume: Path | None, output_dir: Path | None, name: str, vram: str | None) -> tuple[Any, Any]:
    """Check, then run or resume; a run that a user's mistake stops before its first step leaves no folder behind."""
    from qswitch.plan.machine import detect_budget_bytes, parse_size
    from qswitch.plan.scheduler import apply_plan, plan_run, require_fit
    from qswitch.preflight import prepare, settings_problems
    from qswitch.run_dir import RunDir, locked

    budget = None if vram is None else parse_size(vram)
    path = resume or output_dir or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if resume is None:
        RunDir.refuse_existing(path)
        problems = settings_problems(settings, path)
        if problems:
            prepare(settings, known=problems)  # adds what models and data have to say, and raises
        plan = plan_run(settings, budget_bytes=budget or detect_budget_bytes(settings.train.device)[0])
        require_fit(plan)
        settings = apply_plan(settings, plan)

    from qswitch.distill.progress import Progress, total_steps
    from qswitch.run import distill as run_distillation

    prepared = prepare(settings, notify=Progress(total_steps=total_steps(settings.train)).loading)
    run_dir = RunDir.open(path) if resume is not None else RunDir.create(path, settings)
    print(f"run directory: {run_dir.path}", file=sys.stderr)
    try:
        with locked(run_dir.path):
            summary = run_distillation(
                settings, run_dir, resume=resume is not None, budget_bytes=budget, prepared=prepared
            )
    except QSwitchError:
        if resume is None:
            run_dir.discard_unstarted()
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(str(run_dir.path)) from None
    from qswitch.report.page import write_report

    write_report(run_dir.path)
    return run_dir, summary


def _print_result(run_dir: Any, summary: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    rollouts = run_dir.read_rollouts()
    if rollouts:
        last = rollouts[-1]
        console.print(f"\nA rollout of step {last['step']}, coloured by writer:")
        _print_tokens(console, [(t["text"], t["writer"]) for t in last["tokens"]])
    what = f"KL(teacher || student) on {summary.validation_prompts} held-out prompts, teacher-written responses"
    before, after = summary.kl_before_nats, summary.kl_after_nats
    if before is None:
        what = f"Loss on the responses of {summary.validation_prompts} held-out prompts"
        before, after = summary.response_loss_before_nats, summary.response_loss_after_nats
    fall = 1 - after / before if before else 0.0
    console.print(
        f"\n{what} ({summary.validation_tokens} tokens):\n"
        f"  before {before:.3f}   after {after:.3f} nats/token ({fall:.0%} lower)\n"
        f"  {summary.steps} steps, {summary.rollout_tokens} rollout tokens, {summary.trained_tokens} trained tokens, "
        f"{summary.seconds:.0f} s of training\n"
        f"  memory: {summary.peak_gib:.2f} GiB measured, {summary.planned_gib:.2f} GiB planned\n"
        f"  adapter: {run_dir.adapter_path}\n"
        f"  report:  {run_dir.report_path}\n"
        f"  next:    qswitch merge {run_dir.path} --output-dir merged",
        soft_wrap=True,
    )


def _print_tokens(console: Any, tokens: list[tuple[str, str]]) -> None:
    """Tokens coloured by writer; without colours the teacher's stand in brackets."""
    from rich.text import Text

    colours = console.is_terminal and not console.no_color
    styles = {"teacher": "black on bright_yellow", "student": "bright_cyan", "mixture": "bright_magenta"}
    text = Text()
    for piece, writer in tokens:
        marked = piece if colours or writer != "teacher" or not piece.strip() else f"[{piece}]"
        text.append(marked, style=styles[writer])
    console.print(text, soft_wrap=True)
    legend = Text("student", style=styles["student"])
    legend.append("  ")
    legend.append("teacher" if colours else "[teacher]", style=styles["teacher"])
    console.print(legend)


@app.command(epilog="Example: qswitch plan --preset llama-7b-to-1b --gpu rtx3060-12gb")
def plan(
    preset: Preset = None,
    config: Config = None,
    overrides: Overrides = None,
    vram: Vram = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Plan for what a card leaves free, for example rtx3060-12gb.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every preset against 6, 8, 12, 16 and 24 GiB.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say beforehand how much memory a run takes, and whether it fits."""
    if not every:
        _print_plan(_load(preset, config, overrides), vram, gpu, as_json)
        return
    if preset or config or overrides or vram or gpu:
        raise ConfigError("--all plans every preset against fixed budgets; leave the other options out.")
    from qswitch.plan.render import render_overview
    from qswitch.plan.scheduler import plan_overview
    from qswitch.presets import load_run_config, preset_names

    overview = plan_overview({name: load_run_config(name) for name in preset_names()})
    print(json.dumps(overview, indent=1) if as_json else render_overview(overview))


@app.command(epilog="Example: qswitch merge runs/my-run --output-dir merged")
def merge(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    output_dir: Annotated[Path, typer.Option(help="Folder to write; must not exist or be empty.")],
    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="Of the saved weights.")] = "bf16",
    as_json: AsJson = False,
) -> None:
    """Merge the adapter into the unquantised student: a model that runs anywhere, compared with the adapter."""
    from dataclasses import asdict

    from qswitch.export.merge import merge_run

    report = merge_run(run_path, output_dir, dtype=dtype)
    if as_json:
        print(json.dumps(asdict(report), default=str, indent=1))
        return
    print(
        f"merged model: {report.output_dir}\n"
        f"against the adapter on {report.num_prompts} prompts: largest logit difference "
        f"{report.max_logit_difference:.2e} in fp32 (a pass rounds by {report.pass_rounding:.2e}), "
        f"{report.merge_error:.2e} in exact arithmetic; KL {report.kl_nats:.2e} nats (as saved)"
    )


@app.command(epilog='Example: qswitch generate runs/my-run --prompt "Why is the sky blue?" --show-writers')
def generate(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Response limit, tokens.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another response.")] = 0,
    show_writers: Annotated[
        bool, typer.Option("--show-writers", help="Let the run's policy write, and colour tokens by writer.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Let the student answer, alone or with the teacher intervening."""
    from dataclasses import asdict

    from qswitch.rollout.generate import generate_from_run

    result = generate_from_run(run_path, prompt, max_new_tokens=max_new_tokens, seed=seed, show_writers=show_writers)
    if as_json:
        print(json.dumps(asdict(result), ensure_ascii=False, indent=1))
    elif show_writers:
        from rich.console import Console

        _print_tokens(Console(highlight=False), [(t.text, t.writer) for t in result.tokens])
    else:
        print(result.text)


@app.command(
    "eval", epilog="Example: qswitch eval runs/my-run runs/my-run:base --data dolly_eval.jsonl --protocol paper"
)
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Run, adapter folder, model folder or hub id; RUN:base and RUN:teacher are a run's other models. "
            "Several are compared with the first. NAME=MODEL gives one a name.",
        ),
    ],
    data: Annotated[list[str], typer.Option("--data", help="Test set: file, folder or hub id. Repeatable.")],
    protocol: Annotated[str, typer.Option(help="paper or greedy; see docs/evaluation.md.")] = "greedy",
    teacher: Annotated[
        str | None, typer.Option(help="Model to measure the distance from; default: the teacher of the first run.")
    ] = None,
    teacher_precision: Annotated[str, typer.Option(help="Of --teacher: nf4, int8, bf16 or fp32.")] = "nf4",
    no_teacher: Annotated[bool, typer.Option("--no-teacher", help="Measure no distance from a teacher.")] = False,
    template: Annotated[
        str | None, typer.Option(help="As data.template, or `own`: the one that the first model was trained with.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Comma-separated, one response a record each.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature; 0 is greedy.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Response limit, tokens.")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Longer prompts are left out.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First records of each set only.")] = None,
    columns: Annotated[
        list[str] | None, typer.Option("--column", help="Our field=column of the file, for example response=answer.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "test",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows decoded together; speed only. Halved when memory runs out.")
    ] = 16,
    precision: Annotated[str, typer.Option(help="Of models that are no run: auto, nf4, int8, bf16, fp32.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: as the run, else what there is.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the models.")] = False,
    lm_eval: Annotated[
        str | None, typer.Option(help="Comma-separated tasks of EleutherAI's harness; needs the extra lm-eval.")
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Default: RUN/eval/<protocol>, or evals/<model>-<hash>-<protocol>. Goes on where it was; other sets "
            "or settings need another folder."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score models on test sets: ROUGE-L with intervals and length buckets, distance from the teacher."""
    from qswitch.evaluate.command import EvalRequest, run_eval

    results, folder = run_eval(
        EvalRequest(
            models=models, data=data, protocol=protocol, teacher=teacher, teacher_precision=teacher_precision,
            no_teacher=no_teacher, template=template, seeds=seeds, temperature=temperature,
            max_new_tokens=max_new_tokens, max_prompt_tokens=max_prompt_tokens, limit=limit, columns=columns or [],
            split=split, batch_size=batch_size, precision=precision, device=device,
            trust_remote_code=trust_remote_code, lm_eval=lm_eval, output_dir=output_dir,
        ),
        say=_say,
    )  # fmt: skip
    if as_json:
        print(json.dumps(results, ensure_ascii=False, indent=1))
        return
    print((folder / "results.md").read_text(encoding="utf-8"), end="")
    print(f"\nresponses and scores: {folder}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@app.command(epilog="Example: qswitch compare study.yaml --output-dir compare/study")
def compare(
    path: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; see docs/evaluation.md.")],
    output_dir: Annotated[
        Path | None, typer.Option(help="Default: compare/<name of the file>. Goes on where it was.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every cell and list them; start nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train several methods from one start at one budget, and put them into one table."""
    from qswitch.compare.spec import read_comparison

    if dry_run:
        cells = read_comparison(path).cells
        print(json.dumps([c.label for c in cells]) if as_json else "\n".join(c.label for c in cells))
        return
    from qswitch.compare.cells import compare as run_comparison

    folder = output_dir or Path("compare") / path.stem
    results = run_comparison(path, folder, say=_say)
    if as_json:
        print(json.dumps(results, ensure_ascii=False, indent=1))
        return
    print((folder / "results.md").read_text(encoding="utf-8"), end="")
    print(f"\nruns, responses and scores: {folder}")


@app.command(epilog="Example: qswitch fidelity runs/my-run --prompts 32")
def fidelity(
    run_path: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Run directory; else name --preset or --config.")
    ] = None,
    preset: Preset = None,
    config: Config = None,
    overrides: Overrides = None,
    precisions: Annotated[
        list[str] | None, typer.Option("--precision", help="nf4, fp4 or int8. Repeatable; default: all three.")
    ] = None,
    num_prompts: Annotated[int, typer.Option("--prompts", min=1, help="Held-out prompts, the run's.")] = 32,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Response limit; default: the run's.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu; a bf16 teacher that does not fit the GPU needs cpu.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Where fidelity.json goes; default: the run, or fidelity/<preset>.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what 4-bit and 8-bit weights do to the teacher, and to its interventions."""
    from qswitch.run_dir import RunDir, write_atomically

    run_dir = None
    if run_path is not None:
        if preset or config or overrides:
            raise ConfigError("A run has its own configuration; leave --preset, --config and --set out.")
        run_dir = RunDir.open(run_path)
        settings, folder = run_dir.config, output_dir or run_path
    else:
        settings = _load(preset, config, overrides)
        folder = output_dir or Path("fidelity") / (preset or (config.stem if config else "run"))

    from qswitch.evaluate.fidelity import PRECISIONS, render
    from qswitch.evaluate.fidelity import fidelity as measure

    result = measure(
        settings, run_dir=run_dir, work_dir=folder, precisions=precisions or PRECISIONS, num_prompts=num_prompts,
        max_new_tokens=max_new_tokens, device=device, say=_say,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "fidelity.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(result, ensure_ascii=False, indent=1) if as_json else render(result))


@app.command(epilog="Example: qswitch report runs/my-run")
def report(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, finished or not.")],
    as_json: AsJson = False,
) -> None:
    """Write RUN/report.html: one page that needs no network."""
    from qswitch.report.page import write_report

    path = write_report(run_path)
    print(json.dumps({"report": str(path)}) if as_json else path)


@app.command(epilog="Example: qswitch shrink HuggingFaceTB/SmolLM2-360M-Instruct --layers 20 --output-dir student")
def shrink(
    model: Annotated[str, typer.Argument(help="Hub id, local folder or package: reference.")],
    layers: Annotated[int, typer.Option(min=1, help="Layers to keep.")],
    output_dir: Annotated[Path, typer.Option(help="Folder to write; must not exist or be empty.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the model.")] = False,
    as_json: AsJson = False,
) -> None:
    """Cut a student out of a model: drop the layers that change the hidden state least."""
    from dataclasses import asdict

    from qswitch.models.shrink import shrink_to_folder

    report = shrink_to_folder(model, layers, output_dir, revision=revision, trust_remote_code=trust_remote_code)
    if as_json:
        print(json.dumps(asdict(report), default=str, indent=1))
        return
    print(
        f"{report.output_dir}: {report.parameters_before / 1e6:.1f} M -> {report.parameters_after / 1e6:.1f} M "
        f"parameters; dropped layers {', '.join(map(str, report.dropped)) or 'none'}"
    )


@app.command(epilog="Example: qswitch doctor")
def doctor(as_json: AsJson = False) -> None:
    """Check this machine: versions, GPU, memory, 4-bit, hub."""
    from qswitch.doctor import examine, render

    findings = examine()
    print(json.dumps(findings, indent=1) if as_json else render(findings))


@presets_app.command("list", epilog="Example: qswitch presets list")
def presets_list(as_json: AsJson = False) -> None:
    """Every preset: what it is for, its card and planned memory, what it needs."""
    from qswitch.preset_info import list_presets, render_list

    infos = list_presets()
    if as_json:
        from dataclasses import asdict

        print(json.dumps([asdict(info) for info in infos], default=str, indent=1))
        return
    print(render_list(infos))


@presets_app.command("show", epilog="Example: qswitch presets show smollm2-demo")
def presets_show(name: Annotated[str, typer.Argument(help="Name of a preset.")], as_json: AsJson = False) -> None:
    """What a preset is for, then its full configuration, defaults included."""
    from qswitch.layers import dump_config
    from qswitch.preset_info import describe, render_head
    from qswitch.presets import load_run_config

    config = load_run_config(name)
    if as_json:
        print(json.dumps(config.model_dump(mode="json"), indent=1))
        return
    print(render_head(describe(name)) + dump_config(config), end="")


@presets_app.command("page", epilog="Example: qswitch presets page > presets/README.md")
def presets_page() -> None:
    """All presets as a Markdown page, for presets/README.md."""
    from qswitch.preset_info import render_page

    print(render_page(), end="")


@presets_app.command("copy", epilog="Example: qswitch presets copy smollm2-demo my.yaml")
def presets_copy(
    name: Annotated[str, typer.Argument(help="Name of a preset.")],
    target: Annotated[Path, typer.Argument(help="File to write; must not exist.")],
) -> None:
    """Write the full configuration of a preset to a file of your own."""
    from qswitch.layers import dump_config
    from qswitch.presets import load_run_config

    config = load_run_config(name)
    if target.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{target}: give the file a .yaml ending, so that --config takes it.")
    try:
        with target.open("x", encoding="utf-8") as handle:
            handle.write(dump_config(config))
    except FileExistsError:
        raise ConfigError(f"{target} exists already; choose another name.") from None
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error.strerror}).") from error
    print(f"wrote {target}; run it with: qswitch distill --config {target}")


if __name__ == "__main__":
    main()
