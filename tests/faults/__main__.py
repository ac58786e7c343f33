"""`make faults`: kill, fill the disk, damage files, take permissions away, spoil weights, fuzz; what was lost?

    python -m tests.faults --output faults.json                      everything, about an hour on one core
    python -m tests.faults --only kills,damage --output faults.json  these sections; the others stay as they are
    python -m tests.faults --only kills --kills 10                   ten kills, printed

The output has a record per section, with its own commit, seed and seconds, rewritten after every case. A harness that
was stopped goes on with the case after the last one where commit, seed and number are the same; otherwise the section
begins anew. Exit code 1 where anything was lost, differed in silence, or ended in a traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from qswitch.run_dir import write_atomically
from tests.faults import forked
from tests.faults.sections import SECTIONS, Case
from tests.faults.workplace import Workplace


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"comma-separated, of {', '.join(SECTIONS)}")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--damage", type=int, default=60)
    parser.add_argument("--disks", type=int, default=1000, help="events of each command, at most")
    parser.add_argument("--fuzz", type=int, default=20_000, help="inputs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    names = args.only.split(",")
    unknown = sorted(set(names) - set(SECTIONS))
    if unknown:
        parser.error(f"no section is named {', '.join(unknown)}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    forked.preload()
    numbers = {"kills": args.kills, "damage": args.damage, "fuzz": args.fuzz}
    records = [run_section(name, numbers.get(name, args.disks), args.seed, args.output) for name in names]
    print(json.dumps({name: f"{one['passed']} of {one['cases']}" for name, one in zip(names, records, strict=True)}))
    sys.exit(any(one["passed"] < one["cases"] for one in records))


def run_section(name: str, number: int, seed: int, output: Path | None) -> dict[str, Any]:
    """The record of a section, begun anew or gone on with; printed and written case by case."""
    record = begun(name, {"number": number, "seed": seed, **provenance()}, output)
    if record["finished"]:
        return record
    before, started = record["seconds"], time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix=f"qswitch-faults-{name}-"))
    try:
        for index, trial in enumerate(SECTIONS[name](Workplace.make(folder / "place"), number, seed)):
            if index < record["cases"]:
                continue
            add(record, trial())
            record["seconds"] = round(before + time.monotonic() - started)
            store(name, record, output)
        record["finished"] = True
        store(name, record, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return record


def begun(name: str, origin: dict[str, Any], output: Path | None) -> dict[str, Any]:
    """The record that `output` holds, if it comes from the same commit and settings; else an empty one."""
    found = stored(output).get(name, {})
    if not origin["uncommitted_changes"] and {key: found.get(key) for key in origin} == origin:
        return dict(found)
    empty = {"finished": False, "seconds": 0, "cases": 0, "passed": 0, "inputs": 0}
    return {**empty, "passed_of_cases_by_kind": {}, "failed": [], **origin}


def add(record: dict[str, Any], case: Case) -> None:
    """Count a case, and keep it if it failed."""
    print(json.dumps({key: value for key, value in case.items() if "output" not in key}), flush=True)
    count = record["passed_of_cases_by_kind"].setdefault(case["kind"], [0, 0])
    count[0] += case["passed"]
    count[1] += 1
    record["cases"] += 1
    record["passed"] += case["passed"]
    record["inputs"] += case.get("inputs", 0)
    if not case["passed"]:
        record["failed"].append(case)


def stored(output: Path | None) -> dict[str, Any]:
    """Records by section."""
    if output is None or not output.exists():
        return {}
    return dict(json.loads(output.read_text(encoding="utf-8"))["sections"])


def store(name: str, record: dict[str, Any], output: Path | None) -> None:
    """Replace one section's record; what another process wrote of other sections stays."""
    if output is not None:
        records = {**stored(output), name: record}
        ordered = {one: records[one] for one in SECTIONS if one in records}
        write_atomically(output, json.dumps({"benchmark": "faults", "sections": ordered}, indent=1) + "\n")


if __name__ == "__main__":
    main()
