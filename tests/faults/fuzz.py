"""Inputs that nobody would write, by hypothesis: configurations, records, state files, references.

Each kind takes one drawn input to the code that a command would, and lets nothing out but errors with a message. An
input that takes more than `LIMIT_S`, or writes outside of the folder, is a failure too. `tests/faults/test_fuzz.py`
draws a few of each, `python -m tests.faults --sections fuzz` thousands.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qswitch.cli import run
from qswitch.config import DataSection, known_keys
from qswitch.data.records import load_records
from qswitch.data.sources import reference_path
from qswitch.data.template import PromptEncoder
from qswitch.errors import QSwitchError, storage_problem
from qswitch.evaluate.store import EvaluationDir
from qswitch.evaluate.subjects import find_subject
from qswitch.export.merge_report import read_merge_report
from qswitch.layers import build_config, set_layer
from qswitch.manifest import find_damage
from qswitch.models.references import resolve_reference
from qswitch.plan.machine import parse_size
from qswitch.presets import load_preset
from qswitch.report.page import write_report
from qswitch.run_dir import RunDir
from qswitch.time_limit import time_limit
from tests.faults.forked import FAULT_EVENTS, opens_for_writing
from tests.tiny import tiny_tokenizer

LIMIT_S = 10.0
"""Of the processor; on a busy machine the clock says nothing."""
HANG_S = 120.0
"""Of the clock: whatever takes so long waits for something."""
WORDS = ("teacher", "nf4", "bf16", "auto", "off", "on", "yes", "1e-4", "null", "all-linear", "switch", "gkd", "cpu",
         "messages", "role", "content", "user", "prompt", "response", "package:a/b", "../..", "/dev/zero", "~", "",
         "a/b", "a/b:c", "\x1b[31m", "\ud800", "\x00", "{{", "{% for", "%s", "2024-01-01", "0x10", "1:2:3",
         "x" * 300)  # fmt: skip
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([0, -1, 1, 10**21, -(10**400), 2**63, 2**31]),
    st.floats(), st.sampled_from(WORDS), st.text(max_size=12),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Fails where the block takes too long, or opens a file for writing outside of `folder`."""
    outside: list[str] = []
    _watch.folder, _watch.outside = str(folder.resolve()), outside
    if not _watch.installed:
        sys.addaudithook(_watch)
        _watch.installed = True
    started = time.process_time()
    # Ends the process, with its stack, even where one call into C never returns to Python.
    faulthandler.dump_traceback_later(HANG_S + 30, exit=True)
    try:
        with time_limit(HANG_S, "one input"):
            yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        _watch.folder = None
    seconds = time.process_time() - started
    assert seconds < LIMIT_S, f"took {seconds:.1f} s"
    assert not outside, f"wrote {outside}"


class _Watch:
    """The one audit hook of this process; they cannot be removed."""

    installed = False
    folder: str | None = None
    outside: list[str]

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None or event not in FAULT_EVENTS or (event == "open" and not opens_for_writing(arguments)):
            return
        path = arguments[0]
        if isinstance(path, (str, bytes, os.PathLike)) and not os.fsdecode(path).startswith("/dev/"):
            real = os.path.abspath(os.fsdecode(path))
            if not f"{real}{os.sep}".startswith(f"{self.folder}{os.sep}") and "__pycache__" not in real:
                self.outside.append(real)


_watch = _Watch()


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    """The current folder meanwhile, and output that nobody sees."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """What the command line makes a message of, and nothing else, may come out of the block."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, QSwitchError) and storage_problem(error) is None:
            raise


def command(folder: Path, *arguments: str) -> None:
    """A command that ends by itself, with an exit code of ours; a traceback comes out of `run` as its exception."""
    with in_folder(folder):
        code = run(list(arguments))
    assert code in (0, 2, 3), code


# ------------------------------------------------------------------------------------------------------ configurations


@st.composite
def configurations(draw: Any, sound: dict[str, Any]) -> bytes:
    """A sound configuration with some settings replaced, or its text with some bytes replaced, or no YAML at all."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.binary(max_size=60))
    config = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(known_keys()))
        node = config
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            node[last] = draw(values)
    if kind == 1:
        config[draw(st.text(max_size=8))] = draw(values)
    try:
        text = yaml.safe_dump(config, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError, UnicodeError):
        text = json.dumps(config).encode()
    if kind == 2:
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.binary(max_size=6)) + text[at + draw(st.integers(0, 4)) :]
    return text


def fuzz_configuration(folder: Path, text: bytes) -> None:
    (folder / "fuzz.yaml").write_bytes(text)
    command(folder, "plan", "--config", "fuzz.yaml", "--vram", "8GiB")


# ------------------------------------------------------------------------------------------------------------- records


@st.composite
def records(draw: Any) -> tuple[str, bytes]:
    """(ending, content) of a data file."""
    names = st.sampled_from(["prompt", "response", "messages", "conversations", "tools", "system", "instruction",
                             "input", "max_new_tokens", "chat_template_kwargs", "chosen", "label"])  # fmt: skip
    turn = st.fixed_dictionaries(
        {}, optional={"role": scalars, "content": values, "from": scalars, "value": values, "tool_calls": values}
    )
    row = st.dictionaries(names, values | st.lists(turn, max_size=3), max_size=4) | values
    rows = draw(st.lists(row, max_size=4))
    ending = draw(st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".parquet"]))
    text = "\n".join(json.dumps(one) for one in rows).encode()
    if ending == ".json":
        text = json.dumps(draw(st.just(rows) | st.just({"data": rows}) | values)).encode()
    if ending in (".csv", ".tsv") or draw(st.integers(0, 9)) == 0:
        text = draw(st.binary(max_size=80) | st.text(max_size=80).map(lambda t: t.encode("utf-8", "surrogatepass")))
    return ending, text


_ENCODERS: list[PromptEncoder] = []


def fuzz_records(folder: Path, drawn: tuple[str, bytes]) -> None:
    ending, content = drawn
    path = folder / f"fuzz{ending}"
    path.write_bytes(content)
    if not _ENCODERS:
        _ENCODERS.extend(PromptEncoder(tiny_tokenizer(), template) for template in ("teacher", "alpaca", "plain"))
    with in_folder(folder), answered():
        found = load_records(DataSection(train=str(path)), str(path), limit=5)
        for encoder in _ENCODERS:
            with answered():
                encoder.encode_batch(found)
    path.unlink()


# --------------------------------------------------------------------------------------------------------- state files


@st.composite
def states(draw: Any, files: dict[str, bytes]) -> tuple[str, bytes]:
    """(name, content): a file of a run, one of its values replaced, or some of its bytes."""
    name = draw(st.sampled_from(sorted(files)))
    text = files[name]
    if draw(st.integers(0, 2)) == 0 or not name.endswith((".json", ".jsonl")):
        at = draw(st.integers(0, len(text)))
        return name, text[:at] + draw(st.binary(max_size=4)) + text[at + draw(st.integers(0, 40)) :]
    lines = text.decode("utf-8").splitlines() if name.endswith(".jsonl") else [text.decode("utf-8")]
    at = draw(st.integers(0, max(0, len(lines) - 1)))
    value = json.loads(lines[at])
    lines[at] = json.dumps(draw(_changed(value)))
    return name, ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


@st.composite
def _changed(draw: Any, value: Any) -> Any:
    """A JSON value with one entry, however deep, replaced or gone."""
    if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 3)) == 0:
        return draw(values)
    value = copy.copy(value)
    key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    if draw(st.integers(0, 4)) == 0:
        del value[key]
    else:
        value[key] = draw(_changed(value[key]))
    return value


def fuzz_state(folder: Path, drawn: tuple[str, bytes]) -> None:
    """`folder` holds a finished and evaluated run; every command that reads the file again reads it."""
    name, content = drawn
    path = folder / "run" / name
    sound = path.read_bytes()
    path.write_bytes(content)
    reads: list[Callable[[], Any]] = [
        lambda: write_report([folder / "run"], folder / "report.html"),
        lambda: RunDir.open(folder / "run").trained_weights(),
        lambda: RunDir.open(folder / "run").truncate_logs(2),
        lambda: [find_damage(one) for one in RunDir.open(folder / "run").checkpoints()],
        lambda: read_merge_report(folder / "run" / "merged"),
        lambda: EvaluationDir(folder / "run" / "eval" / "greedy").is_complete("run"),
        lambda: EvaluationDir.open(folder / "run" / "eval" / "greedy", {"protocol": {}}),
    ]
    logs = {log: (folder / "run" / log).read_bytes() for log in ("metrics.jsonl", "rollouts.jsonl")}
    try:
        with in_folder(folder):
            for read in reads:
                with answered():
                    read()
    finally:
        for log, text in logs.items():
            (folder / "run" / log).write_bytes(text)
        path.write_bytes(sound)


def state_files(run_folder: Path) -> dict[str, bytes]:
    """Text files of a run that commands read again."""
    kinds = (".json", ".jsonl", ".yaml", ".txt")
    return {
        path.relative_to(run_folder).as_posix(): path.read_bytes()
        for path in sorted(run_folder.rglob("*"))
        if path.suffix in kinds and path.is_file() and not path.name.startswith("tokenizer")
    }


# ---------------------------------------------------------------------------------------------------------- references

references = st.one_of(
    st.sampled_from(WORDS), st.text(max_size=30),
    st.builds("".join, st.lists(st.sampled_from(["a", "/", ":", "..", "~", ".gguf", ".jsonl", "package:", "=", "[", "{",
                                                 "\x00", " ", "base", "teacher", "é", "https://"]), max_size=8)),
)  # fmt: skip


def fuzz_reference(folder: Path, text: str) -> None:
    reads: list[Callable[[], Any]] = [
        lambda: resolve_reference(text),
        lambda: resolve_reference([text, text]),
        lambda: reference_path(text),
        lambda: find_subject(text),
        lambda: load_preset(text),
        lambda: parse_size(text),
        lambda: build_config(set_layer([text]), where="--set"),
        lambda: build_config(set_layer([f"train.max_steps={text}"]), where="--set"),
        lambda: RunDir.open(Path(text)),
    ]
    with in_folder(folder):
        for read in reads:
            with answered():
                read()
    if "\x00" not in text:
        # An argument is any bytes, which Python decodes so; no shell can pass other surrogates.
        typed = text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
        command(folder, "report", "--", typed or "x")


KINDS = ("configuration", "records", "state", "reference")


def fuzz(kind: str, folder: Path, number: int, *, sound: dict[str, Any], files: dict[str, bytes], seed: int) -> int:
    """Draw `number` inputs of a kind, the same ones for the same seed; the number that was tried.

    Raises:
        Exception: the first failure, shrunk by hypothesis.
    """
    drawn, take = {
        "configuration": (configurations(sound), fuzz_configuration),
        "records": (records(), fuzz_records),
        "state": (states(files), fuzz_state),
        "reference": (references, fuzz_reference),
    }[kind]
    tried = 0

    @hypothesis.seed(seed)
    @settings(max_examples=number, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(drawn)
    def attempt(one: Any) -> None:
        nonlocal tried
        tried += 1
        with watched(folder):
            take(folder, one)

    attempt()
    return tried
