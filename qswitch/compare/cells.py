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
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qswitch.compare.results_table import comparison_results, render_comparison
from qswitch.compare.spec import CONTROLS, SFT, Cell, Comparison, flat_settings, read_comparison
from qswitch.data.records import training_records
from qswitch.errors import DataError, QSwitchError, RunDirError
from qswitch.evaluate.store import EvaluationDir
from qswitch.layers import dump_config
from qswitch.outside import read_json, read_text
from qswitch.run_dir import RunDir, locked, make_folder, teacher_share, write_atomically
from qswitch.state_files import CellFile, SummaryFile

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
    """A cell ended with an error of the user's to mend; the finished cells are kept."""


class NothingToLearnFrom(CellFailed):
    """The SFT control was refused before it began: records of the data have no response."""


def compare(
    path: Path, output_dir: Path, *, launch: Launch | None = None, say: Callable[[str], None] = logger.info
) -> dict[str, Any]:
    """Run what is missing of a comparison and return the content of results.json.

    Raises:
        ConfigError: the comparison is wrong; nothing was started.
        RunDirError: output_dir holds cells of another comparison, or another command writes to it.
        CellFailed: a run stopped with an error.
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
    _refuse_other_cells(output_dir, comparison)
    write_atomically(output_dir / "compare.yaml", read_text(path))
    total = len(comparison.cells)
    failed: dict[str, str] = {}
    for number, cell in enumerate(comparison.cells, 1):
        if _finished(output_dir, cell) is not None:
            say(f"[{number}/{total}] {cell.label}: finished before")
            continue
        say(f"[{number}/{total}] {cell.label}")
        try:
            _run_cell(output_dir, comparison, cell, launch)
        except NothingToLearnFrom as error:
            # Data without responses has no SFT control; the other rows are still worth having.
            failed[cell.label] = str(error)
            say(str(error))
            continue
        _measure(output_dir, comparison, launch, say)
        _write_table(output_dir, comparison, failed)
    if all(_finished(output_dir, cell) is None for cell in comparison.cells):
        raise CellFailed("No cell could be trained. " + " ".join(failed.values()))
    _measure(output_dir, comparison, launch, say)
    return _write_table(output_dir, comparison, failed)


def _measure(output_dir: Path, comparison: Comparison, launch: Launch, say: Callable[[str], None]) -> None:
    """Measure what is not, or was measured against other responses of the teacher: finished cells and the controls."""
    stored = EvaluationDir(output_dir / "eval")
    done = [c for c in comparison.cells if _finished(output_dir, c) is not None]
    for cell in done:
        if not stored.is_complete(cell.label):
            if not _has_run(output_dir, cell):
                raise CellFailed(
                    f"{cell.label} is finished, but {output_dir / 'eval'} lacks its responses, or holds another "
                    f"teacher's, and its run is gone. Delete {output_dir / 'cells' / cell.label}.json to train it anew."
                )
            say(f"{cell.label}: measured anew")
            _evaluate(output_dir, comparison, f"{cell.label}={_run_path(output_dir, cell)}", launch, cell)
    # A control is read from any run. Finished cells may have come without theirs, which are large.
    run = next((_run_path(output_dir, c) for c in done if _has_run(output_dir, c)), None)
    for name, part in CONTROLS.items():
        if stored.is_complete(name):
            continue
        if run is None:
            raise CellFailed(
                f"The control {name} is measured from a run, and {output_dir / 'runs'} holds none of a finished cell. "
                f"Delete {output_dir / 'cells' / done[0].label}.json to train that cell anew."
            )
        _evaluate(output_dir, comparison, f"{name}={run}:{part}", launch)


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


def _run_cell(output_dir: Path, comparison: Comparison, cell: Cell, launch: Launch) -> None:
    run_path = _run_path(output_dir, cell)
    if not (run_path / "summary.json").is_file():
        if (run_path / "config.yaml").is_file():
            arguments = ["distill", "--resume", str(run_path)]
        else:
            config_path = output_dir / "cells" / f"{cell.label}.yaml"
            write_atomically(config_path, dump_config(cell.config))
            start = json.dumps(flat_settings(cell.config), indent=1) + "\n"
            write_atomically(_start_path(output_dir, cell), start)
            arguments = ["distill", "--config", str(config_path), "--output-dir", str(run_path)]
        code = launch(arguments)
        if code == 2 and cell.config.method == SFT and not run_path.exists() and _lacks_responses(cell):
            raise NothingToLearnFrom(
                f"{cell.label} could not start; its message stands above. To see it again: "
                f"qswitch {' '.join(arguments)}"
            )
        _require(code, cell, "training", arguments)
    _evaluate(output_dir, comparison, f"{cell.label}={run_path}", launch, cell)
    run_dir = RunDir.open(run_path)
    write_atomically(
        output_dir / "cells" / f"{cell.label}.json",
        json.dumps(
            {
                "cell": cell.name,
                "seed": cell.seed,
                "settings": cell.settings,
                "summary": read_json(run_dir.summary_path, SummaryFile),
                "teacher_share": teacher_share(run_dir.read_metrics()),
            },
            indent=1,
        )
        + "\n",
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
    _require(launch(arguments), cell, "evaluation", arguments)


def _require(code: int, cell: Cell | None, what: str, arguments: Sequence[str]) -> None:
    if code == 130:
        raise KeyboardInterrupt
    if code != 0:
        label = cell.label if cell is not None else "a control"
        raise CellFailed(
            f"The {what} of {label} ended with code {code}; its message stands above. To see it again: "
            f"qswitch {' '.join(arguments)}"
        )


def _finished(output_dir: Path, cell: Cell) -> dict[str, Any] | None:
    path = output_dir / "cells" / f"{cell.label}.json"
    return dict(read_json(path, CellFile)) if path.is_file() else None


def _refuse_other_cells(output_dir: Path, comparison: Comparison) -> None:
    """A cell that was started with other settings must not be taken for this one."""
    for cell in comparison.cells:
        saved = _finished(output_dir, cell)
        changed: list[str] = []
        if saved is not None:
            changed = cell.changed(saved["settings"])
        elif (_run_path(output_dir, cell) / "config.yaml").is_file():
            start = _start_path(output_dir, cell)
            known = start.is_file()
            changed = cell.changed(read_json(start, dict[str, Any])) if known else ["unknown ones"]
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


def _run_path(output_dir: Path, cell: Cell) -> Path:
    return output_dir / "runs" / cell.label


def _write_table(output_dir: Path, comparison: Comparison, failed: dict[str, str]) -> dict[str, Any]:
    finished = [(c, saved) for c in comparison.cells if (saved := _finished(output_dir, c)) is not None]
    results = comparison_results(output_dir / "eval", comparison, finished, list(CONTROLS), failed)
    write_atomically(output_dir / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_atomically(output_dir / "results.md", render_comparison(results))
    return results
