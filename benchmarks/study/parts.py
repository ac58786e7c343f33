"""Take a study file in parts, for several workers or machines, and put their finished cells together.

    python benchmarks/study/parts.py split benchmarks/study/test.yaml --seeds 4 --cells sft,kd --output PART.yaml
    qswitch compare PART.yaml --output-dir OUT/part-0
    python benchmarks/study/parts.py join OUT/part-0 OUT/part-1 --output-dir OUT/test
    qswitch compare benchmarks/study/test.yaml --output-dir OUT/test
    python benchmarks/study/parts.py publish OUT/test --output benchmarks/results/study-2-test.json

From the top of the checkout. The second `compare` repeats no cell: it measures what is missing, and writes the table.
A part that comes as an archive of its folders `cells` and `eval`, without the runs, is enough. The teacher's responses
and the controls `teacher` and `untrained` are the same in every part: copy them from the first one's `eval`, or each
part spends 75 minutes on them. `publish` writes the figures that the page of the study quotes. Knows no model.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from qswitch.run_dir import write_atomically

FOLDERS = ("cells", "eval")
"""What a finished cell leaves: its file and its responses. Its run is needed only to measure it anew."""
PER_PART = (".lock", "results.json", "results.md")
"""Files of a part that are not its cells'; the tables are written anew from all of them."""


def split(path: Path, cells: list[str], seeds: list[int]) -> dict[str, Any]:
    """The study file with these cells in this order, on these seeds, and without the test, which needs all of them."""
    study = yaml.safe_load(path.read_text(encoding="utf-8"))
    if unknown := [name for name in cells if name not in study["cells"]]:
        raise SystemExit(f"{path} has no cell {unknown[0]}. Cells: {', '.join(study['cells'])}")
    kept = {name: {k: v for k, v in (study["cells"][name] or {}).items() if k != "seeds"} for name in cells}
    part = {key: value for key, value in study.items() if key != "test"}
    return {**part, "run": str((path.parent / study["run"]).resolve()), "cells": kept, "seeds": seeds,
            "baseline": cells[0]}  # fmt: skip


def add_overlaps(source: Path, target: Path) -> None:
    """Of a set's file, which names the models of its part, take over those of another part.

    Raises:
        SystemExit: they are not about the same records.
    """
    ours, theirs = (json.loads(path.read_text(encoding="utf-8")) for path in (target, source))
    known, new = (content.pop("overlaps_with_training") for content in (ours, theirs))
    if ours != theirs:
        raise SystemExit(f"{source} has other records than another part. Cells are compared only on the same.")
    write_atomically(target, json.dumps({**ours, "overlaps_with_training": {**known, **new}}) + "\n")


def join(parts: list[Path], target: Path) -> int:
    """Copy what the parts finished, link their runs; how many cells there are.

    Raises:
        SystemExit: two parts have the same file with other content, for instance other responses of the teacher.
    """
    for part in parts:
        for folder in FOLDERS:
            for source in sorted((part / folder).rglob("*")):
                copy = target / source.relative_to(part)
                if source.is_dir() or source.name in PER_PART:
                    continue
                if source.parent.name == "sets" and copy.is_file():
                    add_overlaps(source, copy)
                elif copy.is_file() and not filecmp.cmp(source, copy, shallow=False):
                    raise SystemExit(f"{source} is not what another part has, and cells are compared only where it is.")
                else:
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(source, copy)
        for run in sorted((part / "runs").glob("*")):
            link = target / "runs" / run.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(run.resolve(), target_is_directory=True)
    return sum(not path.name.endswith(".start.json") for path in (target / "cells").glob("*.json"))


def without_details(results: Any) -> Any:
    """The results of a comparison as the repository has them: five digits, no length classes, no list of overlaps."""
    if isinstance(results, float):
        return float(f"{results:.5g}")
    if isinstance(results, list):
        return [without_details(value) for value in results]
    if not isinstance(results, dict):
        return results
    kept = {"all": results["all"]} if "all" in results else results
    return {key: without_details(value) for key, value in kept.items() if key != "overlaps_with_training"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    one = commands.add_parser("split", help="write a study file with some cells")
    one.add_argument("study", type=Path)
    one.add_argument("--cells", required=True, help="names with commas between them, in the order of their turns")
    one.add_argument("--seeds", required=True, help="numbers with commas between them")
    one.add_argument("--output", type=Path, required=True)
    all_of = commands.add_parser("join", help="put finished cells together")
    all_of.add_argument("parts", type=Path, nargs="+", help="output folders of qswitch compare")
    all_of.add_argument("--output-dir", type=Path, required=True)
    figures = commands.add_parser("publish", help="write the figures of a finished comparison")
    figures.add_argument("folder", type=Path, help="output folder of qswitch compare")
    figures.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.what == "publish":
        results = json.loads((arguments.folder / "results.json").read_text(encoding="utf-8"))
        write_atomically(arguments.output, json.dumps(without_details(results)) + "\n")
        print(f"wrote {arguments.output}")
    elif arguments.what == "split":
        part = split(arguments.study, arguments.cells.split(","), [int(s) for s in arguments.seeds.split(",")])
        write_atomically(arguments.output, yaml.safe_dump(part, sort_keys=False, allow_unicode=True))
        print(f"wrote {arguments.output}")
    else:
        print(f"{arguments.output_dir} has {join(arguments.parts, arguments.output_dir)} finished cells")


if __name__ == "__main__":
    main()
