"""Commands about what runs have made: evaluate, compare, measure, report; and cutting a student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qswitch.cli_options import (
    AsJson,
    Config,
    Data,
    Device,
    MaxNewTokens,
    Named,
    Overrides,
    Preset,
    Student,
    Teacher,
    load_settings,
    say,
    show,
)
from qswitch.errors import ConfigError
from qswitch.outside import user_path
from qswitch.units import MAX_TOKENS

results_app = typer.Typer()


@results_app.command("eval", epilog="Example: qswitch eval runs/my-run runs/my-run:base --data questions.jsonl")
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
    protocol: Annotated[
        str, typer.Option(help="greedy, or paper: five samples a prompt, in the paper's template.")
    ] = "greedy",
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
    max_new_tokens: Annotated[int | None, typer.Option(min=1, max=MAX_TOKENS, help="Response limit, tokens.")] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, max=MAX_TOKENS, help="Longer prompts are left out.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="First records of each set, and first documents of each --lm-eval task.")
    ] = None,
    columns: Annotated[
        list[str] | None, typer.Option("--column", help="Our field=column of the file, for example response=answer.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "test",
    batch_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Rows decoded together: speed, and rounding, which in bf16 makes other samples. Halved when memory "
            "runs out.",
        ),
    ] = 16,
    precision: Annotated[str, typer.Option(help="Of models that are no run: auto, nf4, int8, bf16, fp32.")] = "auto",
    device: Device = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the models.")] = False,
    lm_eval: Annotated[
        str | None, typer.Option(help="Comma-separated tasks of EleutherAI's harness; needs the extra lm-eval.")
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            parser=user_path,
            help="Default: RUN/eval/<protocol>, or evals/<model>-<hash>-<protocol>. Goes on where it was; other sets "
            "or settings need another folder.",
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
        say=say,
    )  # fmt: skip
    show(results, as_json, lambda _: f"{(folder / 'results.md').read_text('utf-8')}\nresponses and scores: {folder}")


@results_app.command(epilog="Example: qswitch compare study.yaml --output-dir compare/study")
def compare(
    path: Annotated[
        Path, typer.Argument(parser=user_path, metavar="CONFIG", help="YAML file: cells, seeds, budget, test sets.")
    ],
    output_dir: Annotated[
        Path | None, typer.Option(parser=user_path, help="Default: compare/<name of the file>. Goes on where it was.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every cell and list them; start nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train several methods from one start at one budget, and put them into one table."""
    from qswitch.compare.spec import read_comparison

    if dry_run:
        comparison = read_comparison(path)
        for note in comparison.notes:
            say(note)
        show([cell.label for cell in comparison.cells], as_json, "\n".join)
        return
    from qswitch.compare.cells import compare as run_comparison

    folder = output_dir or Path("compare") / path.stem
    results = run_comparison(path, folder, say=say)
    show(results, as_json, lambda _: f"{(folder / 'results.md').read_text('utf-8')}\nruns and scores: {folder}")


@results_app.command(epilog="Example: qswitch fidelity runs/my-run --prompts 32")
def fidelity(
    run_path: Annotated[
        Path | None,
        typer.Argument(parser=user_path, metavar="[RUN]", help="Run directory; else name --preset or --config."),
    ] = None,
    teacher: Teacher = None,
    student: Student = None,
    data: Data = None,
    preset: Preset = None,
    config: Config = None,
    overrides: Overrides = None,
    precisions: Annotated[
        list[str] | None, typer.Option("--precision", help="nf4, fp4 or int8. Repeatable; default: all three.")
    ] = None,
    num_prompts: Annotated[int, typer.Option("--prompts", min=1, help="Held-out prompts, the run's.")] = 32,
    max_new_tokens: MaxNewTokens = None,
    device: Device = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(parser=user_path, help="Where fidelity.json goes; default: the run, or fidelity/<preset>."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what 4-bit and 8-bit weights do to the teacher, and to its interventions."""
    from qswitch.run_dir import RunDir, write_atomically

    named = Named(preset, config, overrides, teacher, student, data)
    run_dir = None
    if run_path is not None:
        if named:
            raise ConfigError("A run has its own configuration; leave --preset, --config, --set and models out.")
        run_dir = RunDir.open(run_path)
        settings, folder = run_dir.config, output_dir or run_path
    else:
        settings = load_settings(named, command="fidelity")
        folder = output_dir or Path("fidelity") / named.label

    from qswitch.evaluate.fidelity import PRECISIONS, render
    from qswitch.evaluate.fidelity import fidelity as measure

    result = measure(
        settings, run_dir=run_dir, work_dir=folder, precisions=precisions or PRECISIONS, num_prompts=num_prompts,
        max_new_tokens=max_new_tokens, device=device, say=say,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "fidelity.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    show(result, as_json, render)


@results_app.command(epilog="Example: qswitch report runs/my-run")
def report(
    run_paths: Annotated[
        list[Path], typer.Argument(parser=user_path, metavar="RUN...", help="Run directories, finished or not.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            parser=user_path, help="File to write; default: report.html in the run, or in the current folder."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write RUN/report.html, or one page about several runs: it needs no network."""
    from qswitch.report.page import write_report

    show({"report": str(write_report(run_paths, output))}, as_json, lambda written: written["report"])


@results_app.command(
    epilog="Example: qswitch shrink HuggingFaceTB/SmolLM2-360M-Instruct --layers 20 --output-dir student"
)
def shrink(
    model: Annotated[str, typer.Argument(help="Hub id, local folder or package: reference.")],
    layers: Annotated[int, typer.Option(min=1, help="Layers to keep.")],
    output_dir: Annotated[Path, typer.Option(parser=user_path, help="Folder to write; must not exist or be empty.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the model.")] = False,
    as_json: AsJson = False,
) -> None:
    """Cut a student out of a model: keep the layers with which its output changes least."""
    from qswitch.console import shrunk
    from qswitch.models.shrink import shrink_to_folder

    report = shrink_to_folder(
        model, layers, output_dir, revision=revision, trust_remote_code=trust_remote_code, notify=say
    )
    show(report, as_json, shrunk)
