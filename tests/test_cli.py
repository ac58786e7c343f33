"""Exit codes and messages: what a user sees when something is wrong."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest
from typer.main import get_command

from qswitch.cli import app, run
from qswitch.outside import user_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill"], "--preset NAME or --config FILE"),
        (["distill", "--preset", "smolm2-demo"], "Did you mean smollm2-demo?"),
        (["distill", "--preset", "smollm2-demo", "--set", "train.max_step=3"], "Did you mean train.max_steps?"),
        (["distill", "--config", "nowhere.yaml"], "`qswitch presets copy NAME nowhere.yaml` writes one"),
        (["compare", "nowhere.yaml"], "nowhere.yaml does not exist. It was looked for in "),
        (["distill", "--resume", "nowhere"], "does not exist"),
        (["distill", "--resume", "x", "--preset", "smollm2-demo"], "leave --preset"),
        (["plan", "--preset", "smollm2-demo", "--vram", "lots"], "lots"),
        (["merge", "nowhere", "--output-dir", "out"], "does not exist"),
        (["generate", "nowhere", "--prompt", "hello"], "does not exist"),
        (["presets", "show", "nothing"], "presets list"),
        (["presets", "copy", "smollm2-demo", "x.txt"], ".yaml ending"),
    ],
)
def test_mistakes_end_with_2_and_one_message(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


@pytest.mark.parametrize("arguments", [["frobnicate"], ["distill", "--presett", "x"], ["shrink", "m"]])
def test_usage_errors_end_with_2(arguments, capsys):
    assert run(arguments) == 2


def test_a_plan_that_does_not_fit_ends_with_3(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["plan", "--preset", "llama-7b-to-1b", "--vram", "3GiB"]) == 3
    assert "the budget is 3.0" in capsys.readouterr().err
    assert run(["distill", "--preset", "smollm2-demo", "--vram", "100MiB"]) == 3
    assert not list(tmp_path.iterdir())


def test_plan_json_has_the_documented_keys(capsys):
    assert run(["plan", "--preset", "llama-7b-to-1b", "--vram", "12GiB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["budget_gib"] == 12.0 and plan["total_gib"] <= 12.0
    assert {"parts", "choices", "phases"} <= set(plan) and {"rollout", "train"} <= set(plan["phases"])


def test_an_interruption_ends_with_130_and_the_way_back(capsys, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt("runs/x")

    monkeypatch.setattr("qswitch.preset_index.read_index", interrupted)
    assert run(["presets", "list"]) == 130
    assert "qswitch distill --resume runs/x" in capsys.readouterr().err


def test_memory_that_runs_out_is_one_message(monkeypatch, capsys):
    class OutOfMemoryError(RuntimeError):
        """torch's has this name; the command line knows it by that alone."""

    def refuse(*_arguments, **_options):
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr("qswitch.cli.app", refuse)
    assert run(["eval", "model"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: out of memory: CUDA out of memory. Tried") and "--batch-size" in printed
    assert "more" not in printed and "Traceback" not in printed


def test_our_bugs_keep_their_traceback(monkeypatch):
    def broken():
        raise ZeroDivisionError

    monkeypatch.setattr("qswitch.preset_index.read_index", broken)
    with pytest.raises(ZeroDivisionError):
        run(["presets", "list"])


def test_a_copied_preset_is_a_whole_configuration(tmp_path, capsys):
    target = tmp_path / "mine.yaml"
    assert run(["presets", "copy", "smollm2-demo", str(target)]) == 0
    assert "trains on package:qswitch/data/demo_prompts.jsonl" in capsys.readouterr().out
    assert run(["distill", "--config", str(target), "--dry-run"]) == 0
    assert run(["presets", "copy", "smollm2-demo", str(target)]) == 2


def test_the_tilde_of_a_path_is_the_home_folder(tmp_path, monkeypatch):
    """The shell leaves `--output-dir=~/x` as it is; a folder named `~` is one that somebody removes with `rm -r ~`."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert run(["presets", "copy", "smollm2-demo", "~/mine.yaml"]) == 0
    assert run(["distill", "--config=~/mine.yaml", "--output-dir=~/run", "--dry-run"]) == 0
    assert (tmp_path / "home" / "mine.yaml").is_file() and not (tmp_path / "~").exists()


def test_every_path_of_every_command_is_read_as_a_user_writes_it():
    commands = [
        *app.registered_commands,
        *(c for g in app.registered_groups for c in g.typer_instance.registered_commands),
    ]
    hints = [hint for c in commands for hint in get_type_hints(c.callback, include_extras=True).values()]
    paths = [hint for hint in hints if "pathlib" in str(get_args(hint)[:1])]
    assert len(paths) > 20
    assert all(get_args(hint)[1].parser is user_path for hint in paths)


def test_every_command_has_an_example_and_kebab_case_options(capsys):
    names = list(get_command(app).commands)
    assert {"distill", "plan", "merge", "generate", "shrink", "doctor", "presets"} <= set(names)
    for command in [[n] for n in names if n != "presets"] + [["presets", n] for n in ("list", "show", "copy")]:
        assert run([*command, "-h"]) == 0
        text = capsys.readouterr().out
        assert "Example: qswitch" in text
        assert "_" not in "".join(word for word in text.split() if word.startswith("--"))


def test_a_stopped_run_names_its_directory(tmp_path, capsys, monkeypatch):
    """`distill` stopped where training would start: a directory, a hint, and no second run in the same place."""

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("qswitch.distill.session.train", stopped)
    path = tmp_path / "run"
    assert run(["distill", "--preset", "smollm2-demo", "--output-dir", str(path)]) == 130
    assert f"qswitch distill --resume {path}" in capsys.readouterr().err
    assert (path / "config.yaml").is_file()
    # The way back works: the same configuration, and no second run in the same place.
    assert run(["distill", "--resume", str(path)]) == 130
    assert run(["distill", "--preset", "smollm2-demo", "--output-dir", str(path)]) == 2
    assert f"--resume {path}" in capsys.readouterr().err


def test_the_console_script_ends_with_the_same_codes():
    for arguments, code in [(["--version"], 0), (["presets", "show", "nothing"], 2), (["plan", "--bogus"], 2)]:
        result = subprocess.run([sys.executable, "-m", "qswitch", *arguments], capture_output=True, text=True)
        assert result.returncode == code
        assert "Traceback" not in result.stderr
        assert bool(result.stderr) == (code != 0)


@pytest.mark.parametrize("arguments", [["--help"], ["presets", "--help"], ["presets", "list"]])
def test_a_reader_that_has_read_enough_is_no_error(arguments):
    """As `qswitch presets list | head -1`, without its race: nobody reads from the start."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run([sys.executable, "-m", "qswitch", *arguments], stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (0, b"")


WORK = """
import sys
from pathlib import Path
from qswitch.cli import app, run
from qswitch.cli_options import say
from qswitch.distill.progress import Progress
from qswitch.errors import FileError

@app.command()
def work(path: Path, fail: bool = False) -> None:
    progress = Progress(1)
    for text in ("half", "whole"):
        say(text)
        progress.say(text)
        path.write_text(text)
    if fail:
        raise FileError("what is wrong")
    print("result")

sys.exit(run(["work", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("option", [None, "--fail"])
@pytest.mark.parametrize("same", [True, False])
def test_work_whose_progress_nobody_reads_is_done_to_its_end(tmp_path, option, same):
    """As `qswitch merge RUN 2>&1 | head -1`, and with stderr alone in the pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [sys.executable, "-c", WORK, str(tmp_path / "done"), *([option] if option else [])]
    try:
        result = subprocess.run(arguments, stdout=writer if same else subprocess.PIPE, stderr=writer)
    finally:
        os.close(writer)
    assert (tmp_path / "done").read_text() == "whole"
    assert result.returncode == (2 if option else 0)
    assert same or result.stdout == (b"" if option else b"result\n")


def test_another_pipe_that_breaks_is_an_error(monkeypatch, capsys):
    def lost():
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr("qswitch.preset_index.read_index", lost)
    assert run(["presets", "list"]) == 2
    assert "Broken pipe. What read the output has ended" in capsys.readouterr().err

    def broken():
        raise BrokenPipeError("a tracker's service has ended")

    monkeypatch.setattr("qswitch.preset_index.read_index", broken)
    with pytest.raises(BrokenPipeError, match="tracker"):
        run(["presets", "list"])
