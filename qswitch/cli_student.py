"""Commands that use a trained student: merge, push, generate, chat. Cold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qswitch.cli_options import AsJson, MaxNewTokens, say, show
from qswitch.errors import ConfigError
from qswitch.outside import user_path

student_app = typer.Typer()

Run = Annotated[Path, typer.Argument(parser=user_path, metavar="RUN", help="Run directory.")]
Temperature = Annotated[float | None, typer.Option(help="Sampling temperature; 0 is greedy. Default: the run's.")]
Seed = Annotated[int, typer.Option(min=0, help="Another seed, another response.")]
ShowWriters = Annotated[
    bool, typer.Option("--show-writers", help="Let the run's policy write, and colour tokens by writer.")
]


@student_app.command(epilog="Example: qswitch merge runs/my-run --gguf q8_0")
def merge(
    run_path: Run,
    output_dir: Annotated[
        Path | None,
        typer.Option(parser=user_path, help="Folder to write; must not exist or be empty. Default: RUN/merged."),
    ] = None,
    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="Of the saved weights.")] = "bf16",
    gguf: Annotated[
        list[str] | None,
        typer.Option(help="Also write GGUF for llama.cpp and Ollama: f16, q8_0 or q4_k_m. Repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Merge the adapter into the unquantised student: a model that runs anywhere, compared with the adapter."""
    from qswitch.console import merged, written_as_gguf
    from qswitch.export.llama_cpp import check_tools
    from qswitch.export.merge import merge_run

    check_tools(gguf or [])
    report = merge_run(run_path, output_dir, dtype=dtype, notify=say)
    if not gguf:
        show(report, as_json, merged)
        return
    from qswitch.export.gguf import export_run_gguf

    files = export_run_gguf(run_path, report.output_dir, gguf)
    show({"merge": report, "gguf": files}, as_json, lambda _: f"{merged(report)}\n{written_as_gguf(files)}")


@student_app.command(epilog="Example: qswitch push runs/my-run my-name/my-student --dry-run")
def push(
    run_path: Annotated[
        Path, typer.Argument(parser=user_path, metavar="RUN", help="Run directory that was merged, or a merged folder.")
    ],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Repository on the Hugging Face hub.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; it is private else.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files; send nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload the merged model, its card and its GGUF files to the hub; the same call goes on after a stop."""
    from qswitch.console import pushed
    from qswitch.export.push import push_run

    show(push_run(run_path, repository, private=not public, dry_run=dry_run), as_json, pushed)


@student_app.command(epilog='Example: qswitch generate runs/my-run --prompt "Why is the sky blue?" --show-writers')
def generate(
    run_path: Run,
    prompt: Annotated[str | None, typer.Option(help="What to ask.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            parser=user_path, help="File of prompts instead: a line each, or records, read as the run read its own."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(parser=user_path, help="JSON-lines file for the responses of --prompts; must not exist."),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    seed: Seed = 0,
    show_writers: ShowWriters = False,
    as_json: AsJson = False,
) -> None:
    """Let the student answer, alone or with the teacher intervening."""
    if (prompt is None) == (prompts is None):
        raise ConfigError("Name either --prompt TEXT or --prompts FILE.")
    if output is not None and prompts is None:
        raise ConfigError("--output takes the responses of --prompts; a single response is printed.")
    from qswitch.console import answers
    from qswitch.rollout.generate import generate_from_run, read_prompts, write_generations

    found = generate_from_run(
        run_path,
        read_prompts(prompts, run_path) if prompts is not None else [prompt or ""],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        show_writers=show_writers,
    )
    if output is not None:
        write_generations(output, found)
        show({"output": str(output), "responses": len(found)}, as_json, lambda _: output)
        return
    text = answers(found, coloured_by_writer=show_writers)
    show(found if prompt is None else found[0], as_json, lambda _: text, coloured=show_writers)


@student_app.command(epilog="Example: qswitch chat runs/my-run")
def chat(
    run_path: Run,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    seed: Seed = 0,
    show_writers: ShowWriters = False,
) -> None:
    """Talk with the student; /teacher shows what the teacher would say, /help the other commands."""
    from qswitch.console import answers
    from qswitch.rollout.chat import Chat

    Chat(
        run_path,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        show_writers=show_writers,
        say=print,
        show=lambda generation, by_writer: print(answers([generation], coloured_by_writer=by_writer)),
        read=input,
    ).converse()
