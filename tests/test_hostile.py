"""Nothing lost, nothing silent: full disks, hostile files and folders, two starts, interrupts; each was seen once."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import yaml

from qswitch.aside import append_text, file_aside, folder_aside
from qswitch.cli import run
from qswitch.compare.cells import launch_process
from qswitch.compare.spec import read_comparison
from qswitch.config import known_keys, section_at
from qswitch.errors import ConfigError, DataError, FileError, RunDirError, storage_problem
from qswitch.evaluate.store import EvaluationDir
from qswitch.layers import build_config
from qswitch.manifest import write_manifest
from qswitch.outside import read_json, read_text, user_path
from qswitch.run_dir import RunDir, locked, make_folder
from qswitch.state_files import HeldOutFile, SummaryFile
from qswitch.terminal import filter_log, printable, printable_json
from qswitch.time_limit import TimeUp, time_limit
from qswitch.yaml_file import parse_yaml, read_yaml

BASE = {"teacher": {"model": "big"}, "student": {"model": "small"}, "data": {"train": "a.jsonl"}}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ----------------------------------------------------------------------------------------- what the system refuses (5)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "/run/a"), ("/run/a: No space left", "Free some space")),
        (OSError(13, "Permission denied", "/run/a"), ("/run/a: Permission denied", "Change its permissions")),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), ("No space left",)),
        (ValueError("a bug of ours"), None),
    ],
)
def test_an_error_of_the_system_becomes_a_message_with_the_remedy(error, words):
    problem = storage_problem(error)
    assert problem is None if words is None else all(word in problem for word in words)
    try:
        raise KeyError("outer") from error
    except KeyError as outer:
        assert storage_problem(outer) == problem


def test_a_log_gets_whole_lines_or_none_of_them(tmp_path):
    append_text(tmp_path / "log", "größer\n")
    code = f"""
import resource, signal
from pathlib import Path
from qswitch.aside import append_text
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
append_text(Path({str(tmp_path / "log")!r}), "x" * 30)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"File too large: '{tmp_path / 'log'}'" in ended.stderr
    assert (tmp_path / "log").read_text() == "größer\n"


def test_what_a_library_could_not_write_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left") as caught, file_aside(tmp_path / "weights"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert str(tmp_path / "weights") in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["presets", "copy", "smollm2-demo", "a" * 300 + ".yaml"],
        ["distill", "--resume", "a" * 300],
        ["report", "a" * 300],
        ["generate", "b" * 300, "--prompt", "x"],
    ],
)
def test_a_name_that_is_too_long_is_a_message(arguments, here, capsys):
    assert run(arguments) == 2
    assert "name too long" in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_a_folder_that_cannot_be_made_leaves_no_parents_behind(here, capsys):
    Path("old").mkdir()
    with pytest.raises(OSError, match="name too long"), file_aside(Path("old/deep/er", "a" * 250)):
        pass
    with pytest.raises(OSError, match="name too long"), folder_aside(Path("old/deep/er", "a" * 250)):
        pass
    with pytest.raises(RunDirError, match="name too long"):
        make_folder(Path("old/deep/er", "a" * 300))
    assert [path.name for path in here.rglob("*")] == ["old"]
    with pytest.raises(KeyError), file_aside(Path("old/deep/file")):
        Path("old/mine").touch()
        raise KeyError
    assert sorted(path.name for path in here.rglob("*")) == ["mine", "old"]
    assert make_folder(Path("new/deep")).is_dir()


def test_output_to_a_full_disk_is_a_message_and_a_closed_pipe_is_the_end():
    command = [sys.executable, "-c", "from qswitch.cli import main; main()", "presets", "copy", "--help"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 2 and "error: No space left on device" in ended.stderr
    assert "Traceback" not in ended.stderr


# ------------------------------------------------------------------------------------------- files from outside (8, 10)


def test_yaml_that_would_end_the_process_is_refused():
    with pytest.raises(ValueError, match="nested deeper than 50"):
        parse_yaml("[" * 100_000)
    letters = "abcdefghij"
    bomb = "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
    for before, name in itertools.pairwise(letters):
        bomb += f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n"
    started = time.monotonic()
    with pytest.raises(ValueError, match="more than 100,000 values"):
        parse_yaml(bomb)
    with pytest.raises(ValueError, match=r"line 1: \*a stands inside itself"):
        parse_yaml("a: &a [*a]")
    assert time.monotonic() - started < 5
    assert parse_yaml("a: &x {b: 1}\nc: *x") == {"a": {"b": 1}, "c": {"b": 1}}, "aliases themselves are fine"


def test_a_setting_that_stands_twice_is_one_message_with_both_lines(here):
    Path("run.yaml").write_text("seed: 3\ntrain:\n  max_steps: 4\n  device: cpu\n  max_steps: 5\nstudent: {seed: 3}\n")
    message = r"run\.yaml, line 5: max_steps is set a second time, first in line 3\. Keep one of them\."
    with pytest.raises(ConfigError, match=message):
        read_yaml(Path("run.yaml"))
    with pytest.raises(ValueError, match="line 1: a is set a second time"):
        parse_yaml("[{a: 1, b: {a: 2}, 'a': 3}]")
    assert parse_yaml("a: {b: a, c: a}\nd: [{a: 1}, {a: 2}]") == {"a": {"b": "a", "c": "a"}, "d": [{"a": 1}, {"a": 2}]}
    merged = parse_yaml("x: &x {a: 1}\ny: &y {b: 2}\nz: {<<: *x, <<: *y}")
    assert merged["z"] == {"a": 1, "b": 2}, "two merged mappings are both kept"


@pytest.mark.parametrize("key", ["[", "list[str]", "str", "x"])
def test_a_setting_that_does_not_exist_is_named_whatever_it_looks_like(key):
    with pytest.raises(ConfigError, match=f"^{re.escape(key)} is not a setting"):
        build_config({**BASE, key: []})
    with pytest.raises(ConfigError, match=f"^train.{re.escape(key)} is not a setting"):
        build_config({**BASE, "train": {key: 1}})


def test_a_pipe_is_not_waited_for(here):
    os.mkfifo("c.yaml")
    with pytest.raises(ConfigError, match=r"c\.yaml is a pipe or a device"):
        read_yaml(Path("c.yaml"))
    os.mkfifo("t.jinja")
    with pytest.raises(FileError, match="is a pipe or a device"):
        read_text(Path("t.jinja"))


def test_files_from_outside_have_limits(here):
    Path("large").write_bytes(b"x" * 100)
    with pytest.raises(FileError, match="has 100 bytes; at most 99 are read"):
        read_text(Path("large"), max_bytes=99)
    Path("deep.json").write_text("[" * 100_000)
    with pytest.raises(FileError, match="not valid JSON"):
        read_json(Path("deep.json"), list)
    with pytest.raises(FileError, match="null byte"):
        user_path("a\0b")
    assert user_path("~nobody-has-this-home/x") == Path("~nobody-has-this-home/x")


@pytest.mark.parametrize(
    ("kind", "value", "entry"),
    [
        (SummaryFile, {"kl_before_nats": "low"}, "kl_before_nats"),
        (SummaryFile, [1], "its content"),
        (HeldOutFile, {"answers": [{"prompt": 3}]}, "answers.0.prompt"),
        (HeldOutFile, {"answers": [], "reference": "nobody"}, "reference"),
        (
            HeldOutFile,
            {"answers": [{"prompt": "a", "Before": None, "after": None, "reference": None}]},
            "answers.0.before",
        ),
    ],
)
def test_a_state_file_that_says_something_else_is_named_with_its_entry(here, kind, value, entry):
    Path("state.json").write_text(json.dumps(value))
    with pytest.raises(FileError, match=f"state.json is not what belongs there: {entry}"):
        read_json(Path("state.json"), kind)


def test_a_damaged_line_of_an_evaluation_is_written_again(here):
    sets = {"protocol": {"seeds": [0]}, "sets": {}}
    folder = EvaluationDir.open(here / "eval", sets)
    good = {"id": 1, "seed": 0, "response": "yes", "tokens": 1, "ended": True}
    folder.responses("m", "s", "weights").add([good])
    path = here / "eval" / "models" / "m" / "s.jsonl"
    path.write_text(path.read_text() + '{"id": "x"}\n{"id": 2, "se\n')
    lines = folder.responses("m", "s", "weights")
    assert lines.rows == {(1, 0): good} and path.read_text().count("\n") == 1
    for text in ("[]", "{", '{"protocol": 3}'):
        (here / "eval" / "eval.json").write_text(text)
        with pytest.raises(FileError, match=r"eval\.json"):
            EvaluationDir.open(here / "eval", sets)


def test_a_template_that_never_ends_is_stopped():
    started = time.monotonic()
    with pytest.raises(TimeUp, match=r"a loop takes longer than 0\.2 s"), time_limit(0.2, "a loop"):
        while True:
            pass
    assert time.monotonic() - started < 5
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def with_count(kind: Any, count: int) -> Iterator[Any]:
    """Values of a field's type that hold an integer: `count` itself, or a list or mapping with it."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is int:
        yield count
    elif origin is Annotated:
        yield from with_count(inner[0], count)
    elif origin in (Union, UnionType):
        for member in inner:
            yield from with_count(member, count)
    elif origin is list:
        yield from ([value] for value in with_count(inner[0], count))
    elif origin is dict:
        yield from ({"q_proj": value} for value in with_count(inner[1], count))


def test_every_count_has_an_upper_bound():
    tried, unbounded = 0, []
    for key in known_keys():
        name, _, field = key.rpartition(".")
        section = section_at(name)
        assert section is not None
        for value in with_count(section.model_fields[field].annotation, 10**21):
            tried += 1
            try:
                build_config(BASE, {key: value})
            except ConfigError as error:
                assert "Input should be less than" in str(error), (key, error)
            else:
                unbounded.append((key, value))
    assert tried > 30 and not unbounded


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "x", "--prompt", "a", "--max-new-tokens", str(10**9)],
        ["eval", "x", "--data", "a", "--max-new-tokens", str(10**9)],
        ["fidelity", "x", "--device", "gpu"],
        ["fidelity", "x", "--max-new-tokens", str(10**9)],
    ],
)
def test_numbers_and_devices_that_nobody_means_are_refused(arguments, here, capsys):
    assert run(arguments) == 2
    assert f"Invalid value for '{arguments[-2]}'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ comparisons (3, 6)


def test_compare_runs_no_python_file_of_the_working_folder(here):
    for name in ("typer", "filelock", "yaml", "qswitch"):
        (here / f"{name}.py").write_text(f"open({str(here / 'executed')!r}, 'w').close()\n")
    assert launch_process(["--version"]) == 0
    assert not (here / "executed").exists()


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        ({"data": []}, "evaluate.data"),
        ({"data": ["e.jsonl"], "limit": 0}, "evaluate.limit"),
        ({"data": ["e.jsonl"], "columns": {"response": "antwort"}}, "names the column antwort"),
        ({"data": ["e.jsonl"], "columns": {"answr": "response"}}, "data.columns.answr is not a field"),
        ({"data": ["e.jsonl"], "max_new_tokens": -4}, "evaluate.max_new_tokens"),
        ({"data": ["e.jsonl"], "template": "gone.jinja"}, "gone.jinja is no file"),
        ({"data": ["e.jsonl", "deep/e.jsonl"]}, "the same file name"),
        ({"data": ["broken.jsonl"]}, "broken.jsonl line 1: not valid JSON"),
    ],
)
def test_a_comparison_that_could_not_be_scored_is_refused_before_it_trains(here, evaluate, words):
    (here / "deep").mkdir()
    for name in ("a.jsonl", "e.jsonl", "deep/e.jsonl"):
        (here / name).write_text('{"prompt": "why", "response": "so"}\n' * 2)
    (here / "broken.jsonl").write_text("{\n")
    (here / "run.yaml").write_text(yaml.safe_dump(BASE))
    study = {"run": "run.yaml", "budget": {"amount": 1}, "cells": {"switch": {}}, "evaluate": evaluate}
    (here / "study.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(ConfigError) as caught:
        read_comparison(here / "study.yaml")
    assert words in str(caught.value)


# ------------------------------------------------------------------------------------------------ a run's folder (8, 9)


def test_the_second_of_two_starts_leaves_the_first_alone(here):
    config = build_config(BASE)
    with locked(make_folder(here / "run")):
        RunDir.create(here / "run", config)
        with pytest.raises(RunDirError, match="Another qswitch command"), locked(make_folder(here / "run")):
            pass
    assert RunDir.open(here / "run").config == config


def test_a_folder_whose_start_was_killed_is_taken(here):
    (here / "run").mkdir()
    for name in (".lock", ".config.yaml.0123abcd.partial"):
        (here / "run" / name).touch()
    with locked(make_folder(here / "run")):
        RunDir.create(here / "run", build_config(BASE))
    # Some versions of filelock remove their file.
    assert {p.name for p in (here / "run").iterdir()} - {".lock"} == {"config.yaml"}
    (here / "run" / "config.yaml").rename(here / "run" / "thesis.txt")
    with pytest.raises(RunDirError, match="is not empty"):
        RunDir.create(here / "run", build_config(BASE))


def test_an_interrupt_while_libraries_are_imported_is_one_line():
    code = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "qswitch.cli_options":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from qswitch.__main__ import main
main()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr, ended.stdout) == (130, "interrupted.\n", "")


def test_a_damaged_adapter_is_refused_and_an_edited_card_is_not(here):
    run_dir = RunDir.create(here / "run", build_config(BASE))
    run_dir.adapter_path.mkdir()
    weights = run_dir.adapter_path / "adapter_model.safetensors"
    weights.write_bytes(bytes(100))
    (run_dir.adapter_path / "README.md").write_text("card")
    write_manifest(run_dir.adapter_path, pattern="*.safetensors")
    (run_dir.adapter_path / "README.md").write_text("my own words")
    assert run_dir.trained_weights() == run_dir.adapter_path
    weights.write_bytes(bytes(99) + b"\1")
    with pytest.raises(RunDirError, match=r"not as it was written: the SHA-256 of adapter_model.*--resume"):
        run_dir.trained_weights()


def test_a_damaged_checkpoint_gives_way_to_the_one_before(here, caplog):
    run_dir = RunDir.create(here / "run", build_config(BASE))
    for step in (1, 2):
        folder = run_dir.checkpoints_path / f"step-00000{step}"
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "weights").write_bytes(bytes(10))
        write_manifest(folder)
    assert run_dir.trained_weights().parent.name == "step-000002"
    (run_dir.checkpoints_path / "step-000002" / "adapter" / "weights").write_bytes(bytes(9))
    assert run_dir.trained_weights().parent.name == "step-000001"
    assert "step-000002 is damaged" in caplog.text


def test_a_resumed_run_says_what_is_not_as_it_was(here):
    run_dir = RunDir.create(here / "run", build_config(BASE))
    run_dir.append_metrics({"step": 1, "loss": 0.5})
    written = json.loads(json.dumps(run_dir.as_written()))
    run_dir.append_metrics({"step": 2, "loss": 0.4})  # a log may grow
    assert run_dir.changed_since(written) == [] and run_dir.changed_since({}) == []
    run_dir.metrics_path.write_text(run_dir.metrics_path.read_text().replace("0.5", "0.3"))
    (said,) = run_dir.changed_since(written)
    assert "metrics.jsonl is not as it was written" in said
    changed = RunDir(run_dir.path, build_config(BASE, {"train": {"learning_rate": 1e-3}, "seed": 7}))
    with pytest.raises(RunDirError, match=r"newest checkpoint was written with: seed is 7, was 42\."):
        changed.changed_since(written)
    faster = RunDir(run_dir.path, build_config(BASE, {"train": {"learning_rate": 1e-3, "device": "cpu"}}))
    assert "train.learning_rate is 0.001 now, it was 0.0001" in faster.changed_since(written)


# --------------------------------------------------------------------------------------------------- the terminal (11)

EVIL = "\x1b]0;owned\x07\x9b31m\u202etxt.exe"


def test_no_escape_reaches_the_terminal(here, capsys):
    assert printable(EVIL) == r"\x1b]0;owned\x07\x9b31m\u202etxt.exe"
    assert printable("größer\n\t漢字") == "größer\n\t漢字"
    assert json.loads(printable_json(json.dumps(EVIL, ensure_ascii=False))) == EVIL
    Path("evil.yaml").write_text(f"{json.dumps('a' + EVIL)}: 3\n")
    assert run(["plan", "--config", "evil.yaml"]) == 2
    (here / "data.jsonl").write_text(json.dumps({f"pr{EVIL}": 1}) + "\n")
    assert run(["distill", "--teacher", "a" + EVIL, "--student", EVIL, "--data", "data.jsonl"]) == 2
    printed = capsys.readouterr()
    assert not set("\x1b\x07\x9b\u202e") & set(printed.err + printed.out)


def test_no_escape_reaches_the_log(caplog):
    before = logging.getLogRecordFactory()
    try:
        filter_log()
        logging.getLogger("qswitch.data").warning("column %s", EVIL)
    finally:
        logging.setLogRecordFactory(before)
    assert caplog.records[0].getMessage() == f"column {printable(EVIL)}"


def test_data_that_cannot_be_printed_can_still_be_refused(here, capsys):
    (here / "d.jsonl").write_text('{"prompt": "\\ud800"}\n')
    with pytest.raises(DataError, match="half a character"):
        from qswitch.config import DataSection
        from qswitch.data.records import load_records

        load_records(DataSection(train="d.jsonl"), "d.jsonl")
