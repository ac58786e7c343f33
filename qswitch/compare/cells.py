"""Train several methods from one start at one budget and put them into one table: what `qswitch compare` calls.

Every run is a process of its own (`qswitch distill`, then `qswitch eval`), so that its memory is its own and an
interruption stops it as it stops any run. A finished cell leaves one JSON file; a later call repeats no finished cell.

    OUT/compare.yaml               the comparison
    OUT/runs/CELL-seedN/           run directories
    OUT/eval/                      responses and distances of all models, on the same records
    OUT/cells/CELL-seedN.json      a finished cell
    OUT/results.json, results.md   the table
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qswitch.compare.content import CONTENT, changed_content, content_marks, marks_of_cells
from qswitch.compare.results_table import comparison_results, render_comparison
from qswitch.compare.spec import (
    CONTROLS,
    SFT,
    TWO_TOKENIZERS,
    Cell,
    Comparison,
    flat_settings,
    is_cosmetic,
    read_comparison,
)
from qswitch.config import RunConfig
from qswitch.data.records import training_records
from qswitch.errors import DataError, QSwitchError, RunDirError
from qswitch.evaluate.store import EvaluationDir
from qswitch.layers import dump_config
from qswitch.outside import read_json, read_text
from qswitch.plan.vocabulary import have_one_vocabulary
from qswitch.run_dir import CHANGEABLE, RunDir, locked, make_folder, teacher_share, write_atomically
from qswitch.state_files import CellFile, SummaryFile
from qswitch.terminal import ERROR_FILE

logger = logging.getLogger(__name__)

_START = """\
import sys
sys.path[:] = [path for path in sys.path if path] + [sys.argv.pop(1)]
from qswitch.__main__ import main
main()
"""
_PACKAGE_FOLDER = str(Path(__file__).resolve().parents[2])
"""Last on the path: where this package was imported from, if it is not installed."""
Launch = Callable[[Sequence[str]], int]
"""Runs one qswitch command line and returns its exit code."""


class CellFailed(QSwitchError):
    """A cell or a control ended with an error of the user's to mend; the others are kept, and gone on with."""

    def __init__(self, message: str, exit_code: int = QSwitchError.exit_code) -> None:
        self.exit_code = exit_code
        super().__init__(message)


class NothingToLearnFrom(QSwitchError):
    """The SFT control was refused before it began: records of the data have no response."""


class NoRunLeft(CellFailed):
    """What is to be measured has no run in this folder; a cell that is trained later may bring one."""


def compare(
    path: Path, output_dir: Path, *, launch: Launch | None = None, say: Callable[[str], None] = logger.info
) -> dict[str, Any]:
    """Run what is missing of a comparison and return the content of results.json.

    Raises:
        ConfigError: the comparison is wrong; nothing was started.
        RunDirError: output_dir holds cells of another comparison, or another command writes to it.
        CellFailed: runs stopped with an error; raised when all others are done and the table is written.
        KeyboardInterrupt: stopped; the same command goes on.
    """
    launch = launch or launch_process
    comparison = read_comparison(path)
    make_folder(output_dir / "cells")
    with locked(output_dir):
        return _compare(path, output_dir, comparison, launch, say)


def _compare(
    path: Path, output_dir: Path, comparison: Comparison, launch: Launch, say: Callable[[str], None]
) -> dict[str, Any]:
    for note in comparison.notes:
        say(note)
    marks = marks_of_cells({cell.label: cell.config for cell in comparison.cells})
    _refuse_other_cells(output_dir, comparison, marks)
    write_atomically(output_dir / "compare.yaml", read_text(path))
    total = len(comparison.cells)
    missing: dict[str, str] = {}
    failures: dict[str, QSwitchError] = {}
    for number, cell in enumerate(comparison.cells, 1):
        if _finished(output_dir, cell) is not None:
            say(f"[{number}/{total}] {cell.label}: finished before")
            continue
        say(f"[{number}/{total}] {cell.label}")
        try:
            _run_cell(output_dir, comparison, cell, marks[cell.label], launch)
        except NothingToLearnFrom as error:
            # Data without responses has no SFT control; the other rows are still worth having.
            missing[cell.label] = str(error)
            say(str(error))
            continue
        except QSwitchError as error:
            failures[cell.label] = error
            say(str(error))
            continue
        _measure(output_dir, comparison, launch, say, failures)
        _write_table(output_dir, comparison, missing, failures)
    if all(_finished(output_dir, cell) is None for cell in comparison.cells):
        raise _failure("No cell could be trained.", failures, missing)
    _measure(output_dir, comparison, launch, say, failures)
    results = _write_table(output_dir, comparison, missing, failures)
    if failures:
        raise _failure(f"{output_dir / 'results.md'} is without what failed.", failures)
    return results


def _failure(head: str, failures: Mapping[str, QSwitchError], missing: Mapping[str, str] | None = None) -> CellFailed:
    """One error of everything that failed, with the exit code of the first."""
    reasons = [*(missing or {}).values(), *map(str, failures.values())]
    again = " The same command tries that again, and repeats nothing that is finished." if failures else ""
    code = next((error.exit_code for error in failures.values()), QSwitchError.exit_code)
    return CellFailed(f"{head}{again}\n" + "\n".join(f"  - {reason}" for reason in reasons), code)


def _measure(
    output_dir: Path,
    comparison: Comparison,
    launch: Launch,
    say: Callable[[str], None],
    failures: dict[str, QSwitchError],
) -> None:
    """Measure what is not, or was measured against other responses of the teacher: finished cells and the controls.

    What fails is put into `failures`, and not tried again as long as it stands there.
    """
    stored = EvaluationDir(output_dir / "eval")
    done = [c for c in comparison.cells if _finished(output_dir, c) is not None]
    # A control is read from any run. Finished cells may have come without theirs, which are large.
    run = next((_run_path(output_dir, c) for c in done if _has_run(output_dir, c)), None)

    def measure_cell(cell: Cell) -> None:
        if not _has_run(output_dir, cell):
            raise NoRunLeft(
                f"{cell.label} is finished, but {output_dir / 'eval'} lacks its responses, or holds another "
                f"teacher's, and its run is gone. Delete {output_dir / 'cells' / cell.label}.json to train it anew."
            )
        say(f"{cell.label}: measured anew")
        _require_own_settings(output_dir, cell)
        _evaluate(output_dir, comparison, f"{cell.label}={_run_path(output_dir, cell)}", launch, cell)

    def measure_control(name: str, part: str) -> None:
        if run is None:
            raise NoRunLeft(
                f"The control {name} is measured from a run, and {output_dir / 'runs'} holds none of a finished cell. "
                f"Delete {output_dir / 'cells' / done[0].label}.json to train that cell anew."
            )
        _evaluate(output_dir, comparison, f"{name}={run}:{part}", launch)

    work = {cell.label: partial(measure_cell, cell) for cell in done}
    work |= {name: partial(measure_control, name, part) for name, part in CONTROLS.items()}
    for name, measure in work.items():
        before = failures.get(name)
        if stored.is_complete(name) or (before is not None and not isinstance(before, NoRunLeft)):
            continue
        try:
            measure()
            failures.pop(name, None)
        except QSwitchError as error:
            failures[name] = error
            if str(error) != str(before):
                say(str(error))


def _has_run(output_dir: Path, cell: Cell) -> bool:
    return (_run_path(output_dir, cell) / "config.yaml").is_file()


def launch_process(arguments: Sequence[str]) -> int:
    """Run a qswitch command in a process of its own; what stops this process stops it first, and it may finish.

    Not by `python -m`, which would take any module from the current folder, where data may lie, before the installed.
    """
    process = subprocess.Popen([sys.executable, "-c", _START, _PACKAGE_FOLDER, *arguments], stdout=subprocess.DEVNULL)
    stopped = False

    def forward(signum: int, _frame: Any) -> None:
        nonlocal stopped
        stopped = True
        if signum == signal.SIGTERM:  # Ctrl-C reaches the whole process group by itself
            process.send_signal(signal.SIGTERM)

    previous = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    if stopped:
        raise KeyboardInterrupt
    return code


def _run_cell(output_dir: Path, comparison: Comparison, cell: Cell, marks: Mapping[str, str], launch: Launch) -> None:
    """Train a cell, or go on with its run, score it, and write its file.

    Args:
        marks: the content of its files when the comparison went on, which all its cells share.
    """
    run_path = _run_path(output_dir, cell)
    begun = _has_run(output_dir, cell)
    if begun:
        _require_own_settings(output_dir, cell)
    if not (run_path / "summary.json").is_file():
        if begun:
            arguments = ["distill", "--resume", str(run_path)]
        else:
            if changed := changed_content(content_marks(cell.config), marks):
                raise CellFailed(
                    f"{cell.label} was not started: the {', '.join(changed)} is not what it was when this command "
                    "began, and the other cells learnt from that. Bring it back."
                )
            config_path = output_dir / "cells" / f"{cell.label}.yaml"
            write_atomically(config_path, dump_config(_with_shared_tokenizer(cell.config)))
            start = json.dumps(flat_settings(cell.config) | dict(marks), indent=1) + "\n"
            write_atomically(_start_path(output_dir, cell), start)
            arguments = ["distill", "--config", str(config_path), "--output-dir", str(run_path)]
        ended = _run(launch, arguments)
        if ended.code == 2 and cell.config.method == SFT and not run_path.exists() and _lacks_responses(cell):
            raise NothingToLearnFrom(
                f"{cell.label} could not start: {ended.reason} To see it again: qswitch {' '.join(arguments)}"
            )
        if ended.code == 2 and have_one_vocabulary(cell.config.teacher, cell.config.student) is False:
            raise CellFailed(f"{cell.label} could not start: {TWO_TOKENIZERS}.")  # the hub's, which are here only now
        _require(ended, cell.label, "training", arguments)
    _evaluate(output_dir, comparison, f"{cell.label}={run_path}", launch, cell)
    run_dir = RunDir.open(run_path)
    learnt_from = {k: v for k, v in _started_with(output_dir, cell).items() if k.startswith(CONTENT)}
    write_atomically(
        output_dir / "cells" / f"{cell.label}.json",
        json.dumps(
            {
                "cell": cell.name,
                "seed": cell.seed,
                "settings": cell.settings | learnt_from,
                "summary": read_json(run_dir.summary_path, SummaryFile),
                "teacher_share": teacher_share(run_dir.read_metrics()),
            },
            indent=1,
        )
        + "\n",
    )


def _with_shared_tokenizer(config: RunConfig) -> RunConfig:
    """The same, refused by the run itself, before it loads a weight, where only the hub knew that there are two."""
    return config.model_copy(update={"student": config.student.model_copy(update={"tokenizer": "shared"})})


def _require_own_settings(output_dir: Path, cell: Cell) -> None:
    """Settings may change when a run is resumed by hand; then it is no longer the run of this cell.

    Raises:
        CellFailed: it was resumed with others.
    """
    run_path = _run_path(output_dir, cell)
    names = [name for name in CHANGEABLE if not is_cosmetic(f"train.{name}")]
    there, here = ({n: getattr(c.train, n) for n in names} for c in (RunDir.open(run_path).config, cell.config))
    changed = [f"train.{n} is {there[n]}, the cell has {here[n]}" for n in names if there[n] != here[n]]
    if changed:
        raise CellFailed(
            f"{run_path} was gone on with by hand under other settings ({'; '.join(changed)}), so it is not the run of "
            f"{cell.label}. Delete it with {output_dir / 'cells' / cell.label}.json, if that is there, and write the "
            "settings that the cell should have into the comparison: it is trained anew."
        )


def _lacks_responses(cell: Cell) -> bool:
    """Whether a record of the training data has no response, which a method that learns from them refuses."""
    data = cell.config.data
    try:
        return any(not record.has_response for record in training_records(data))
    except DataError:
        return False


def _evaluate(output_dir: Path, comparison: Comparison, model: str, launch: Launch, cell: Cell | None = None) -> None:
    section = comparison.section.evaluate
    arguments = ["eval", model, "--protocol", section.protocol, "--output-dir", str(output_dir / "eval")]
    for reference in section.data:
        arguments += ["--data", reference]
    for field, column in section.columns.items():
        arguments += ["--column", f"{field}={column}"]
    if section.seeds is not None:
        arguments += ["--seeds", ",".join(map(str, section.seeds))]
    for option in (
        "temperature", "template", "max_new_tokens", "max_prompt_tokens", "limit", "split", "batch_size", "device",
    ):  # fmt: skip
        value = getattr(section, option)
        if value is not None:
            arguments += [f"--{option.replace('_', '-')}", str(value)]
    label = cell.label if cell is not None else f"the control {model.partition('=')[0]}"
    _require(_run(launch, arguments), label, "evaluation", arguments)


@dataclass(frozen=True, slots=True)
class _Ended:
    """How a command ended."""

    code: int
    """Below zero: by a signal."""
    reason: str
    """What it said, for those who read only the end of a long comparison."""


def _run(launch: Launch, arguments: Sequence[str]) -> _Ended:
    with tempfile.TemporaryDirectory() as folder:
        said, before = Path(folder) / "error.txt", os.environ.get(ERROR_FILE)
        os.environ[ERROR_FILE] = str(said)
        try:
            code = launch(arguments)
        finally:
            del os.environ[ERROR_FILE]
            if before is not None:
                os.environ[ERROR_FILE] = before
        if said.is_file():
            return _Ended(code, read_text(said))
    if code < 0:
        return _Ended(code, f"signal {-code} ended it; 9 is also how a system without free memory ends a process.")
    return _Ended(code, "what it said stands above.")


def _require(ended: _Ended, label: str, what: str, arguments: Sequence[str]) -> None:
    if ended.code == 130:
        raise KeyboardInterrupt
    if ended.code != 0:
        raise CellFailed(
            f"The {what} of {label} ended with code {ended.code}: {ended.reason} To see it again: "
            f"qswitch {' '.join(arguments)}",
            ended.code if ended.code > 0 else QSwitchError.exit_code,
        )


def _finished(output_dir: Path, cell: Cell) -> dict[str, Any] | None:
    path = output_dir / "cells" / f"{cell.label}.json"
    return dict(read_json(path, CellFile)) if path.is_file() else None


def _refuse_other_cells(output_dir: Path, comparison: Comparison, marks: Mapping[str, Mapping[str, str]]) -> None:
    """A cell that was started with other settings, or learnt from other content, must not be taken for this one."""
    for cell in comparison.cells:
        finished = _finished(output_dir, cell)
        saved: dict[str, Any] = {}
        changed: list[str] = []
        if finished is not None:
            changed = cell.changed(saved := finished["settings"])
        elif _has_run(output_dir, cell):
            saved = _started_with(output_dir, cell)
            changed = cell.changed(saved) if saved else ["unknown ones"]
        if not changed and (changed := changed_content(saved, marks[cell.label])):
            raise RunDirError(
                f"{cell.label} in {output_dir} learnt from other files than those that are here now: the "
                f"{', '.join(changed)} has changed. Bring it back, choose another --output-dir, or delete "
                f"{output_dir / 'cells'} and {output_dir / 'runs'} to train every cell anew."
            )
        if changed and all(key.startswith("evaluate.") for key in changed):
            raise RunDirError(
                f"{output_dir} was scored with other settings ({', '.join(changed[:4])}). Choose another --output-dir; "
                f"or delete {output_dir / 'eval'} and the files {output_dir / 'cells'}/NAME-seedN.json (not those "
                "named .start.json): the runs stay, and are scored anew."
            )
        if changed:
            raise RunDirError(
                f"{output_dir} holds {cell.label} with other settings ({', '.join(changed[:4])}). Choose another "
                f"--output-dir, or delete {output_dir / 'cells' / cell.label}.json and {_run_path(output_dir, cell)} "
                "to run it again."
            )


def _start_path(output_dir: Path, cell: Cell) -> Path:
    """What a run was started with; its own config.yaml has the plan's sizes in it."""
    return output_dir / "cells" / f"{cell.label}.start.json"


def _started_with(output_dir: Path, cell: Cell) -> dict[str, Any]:
    """Settings and content marks that a run was started with; nothing where that is not known."""
    path = _start_path(output_dir, cell)
    return dict(read_json(path, dict[str, Any])) if path.is_file() else {}


def _run_path(output_dir: Path, cell: Cell) -> Path:
    return output_dir / "runs" / cell.label


def _write_table(
    output_dir: Path, comparison: Comparison, missing: Mapping[str, str], failures: Mapping[str, QSwitchError]
) -> dict[str, Any]:
    failed = {**missing, **{name: str(error) for name, error in failures.items()}}
    finished = [(c, saved) for c in comparison.cells if (saved := _finished(output_dir, c)) is not None]
    results = comparison_results(output_dir / "eval", comparison, finished, list(CONTROLS), failed)
    write_atomically(output_dir / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_atomically(output_dir / "results.md", render_comparison(results))
    return results
