"""Who writes, by response length: the student's share of the first n tokens in the rollouts that runs have logged.

    python benchmarks/study/writers.py compare/study-ablations/runs/decay-1-5-seed1 ... --output writers.json

Reads RUN/rollouts.jsonl, a sample of the rollouts of every step. The share of whole responses is in metrics.jsonl and
in the table of the comparison; this says what it would be for shorter ones, since the threshold falls along a response.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128)


def shares(path: Path) -> dict[str, Any]:
    """Number of rollouts, their mean length, and the student's share of the tokens among the first n of each."""
    with path.open(encoding="utf-8") as handle:
        writers = [[token["writer"] for token in json.loads(line)["tokens"]] for line in handle]
    if not writers:
        raise SystemExit(f"{path} has no rollout: the run has logged none")
    found = {}
    for length in LENGTHS:
        kept = [w for row in writers for w in row[:length]]
        found[str(length)] = round(kept.count("student") / len(kept), 4)
    return {
        "rollouts": len(writers),
        "mean_tokens": round(sum(map(len, writers)) / len(writers), 1),
        "student_share_of_first": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    text = json.dumps({str(run): shares(run / "rollouts.jsonl") for run in arguments.runs}, indent=1)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
