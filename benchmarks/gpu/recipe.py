"""Stage 7: the second study on a trained pair, as far as the stage's time goes. Not among the stages of a first hour.

    python -m benchmarks.gpu --stage 7 --limit 14400 --models FOLDER --output OUT

FOLDER/study is what `benchmarks/study/prepare.py --output-dir FOLDER/study` has made of the data and a pair; it is
carried to the machine, and docs/study.md says how large it is. Every call goes on where the last one with the same
OUT stopped, and records which cells are finished; the tables are OUT/study/*/results.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import Context, Report

STUDY = Path(__file__).resolve().parents[1] / "study"
RESERVE_S = 150.0
"""Of the stage's time, for the last step and its checkpoint."""
STOPPED = 75
"""Exit code of chain.py when its time was up."""


def run(context: Context, report: Report) -> None:
    """The chain of search, finals and test."""
    report.measure("study", partial(study, context, report))


def study(context: Context, report: Report) -> dict[str, Any]:
    """What is finished after as much of the chain as the time allows."""
    place_data(context.models / "study", STUDY / "data")
    output = context.output / "study"
    command = [sys.executable, str(STUDY / "chain.py"), "--output-dir", str(output)]
    command += ["--seconds", str(max(1.0, report.seconds_left - RESERVE_S))]
    command += ["--until", "search"] * context.tiny
    code = subprocess.run(command).returncode
    if code not in (0, STOPPED):
        raise RuntimeError(f"chain.py ended with code {code}; its message stands above")
    return {"complete": code == 0, "finished": finished(output)}


def place_data(carried: Path, expected: Path) -> None:
    """Let the study's files find the data where they name it.

    Raises:
        FileNotFoundError: neither is there.
    """
    if (expected / "train.jsonl").is_file():
        return
    if not (carried / "train.jsonl").is_file():
        raise FileNotFoundError(
            f"{carried} holds no prepared study. Make it with benchmarks/study/prepare.py --output-dir {carried}, and "
            "carry it to this machine with its models."
        )
    expected.unlink(missing_ok=True)
    expected.symlink_to(carried.resolve(), target_is_directory=True)


def finished(output: Path) -> dict[str, dict[str, float]]:
    """Part -> finished cell -> seconds of its training."""
    found: dict[str, dict[str, float]] = {}
    for path in sorted(output.glob("*/cells/*.json")):
        if not path.name.endswith(".start.json"):
            saved = json.loads(path.read_text(encoding="utf-8"))
            found.setdefault(path.parts[-3], {})[path.stem] = saved["summary"]["seconds"]
    return found
