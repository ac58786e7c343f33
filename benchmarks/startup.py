"""How long do the commands take that load nothing?

    python -m benchmarks.startup --output benchmarks/results/startup.json

Starts each command as a user would, as a process of its own, in turns, and reports the median and the range in seconds,
beside the start of a Python that does nothing and of one that imports the libraries of the command line alone; `ratio`
is a command's median over that of the libraries. The first start of each, which reads files from disk, is reported
apart.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.provenance import publish

LIBRARIES = "typer, pydantic, yaml"
COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    LIBRARIES: [sys.executable, "-c", "import typer, pydantic, yaml"],
    "qswitch --help": ["--help"],
    "qswitch presets list": ["presets", "list"],
    "qswitch plan": ["plan", "--preset", "llama-7b-to-1b", "--vram", "12GiB"],
    "qswitch distill --dry-run": ["distill", "--preset", "llama-7b-to-1b", "--dry-run"],
}


def seconds_of(command: list[str]) -> float:
    """Seconds from start to exit of one process; raises if it fails."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    qswitch = str(Path(sys.executable).with_name("qswitch"))
    commands = {name: words if words[0] == sys.executable else [qswitch, *words] for name, words in COMMANDS.items()}
    first = {name: seconds_of(words) for name, words in commands.items()}
    later: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(args.repetitions):
        for name, words in commands.items():
            later[name].append(seconds_of(words))
    result: dict[str, dict[str, Any]] = {
        name: {
            "first": round(first[name], 3),
            "median": round(statistics.median(times), 3),
            "range": [round(min(times), 3), round(max(times), 3)],
        }
        for name, times in later.items()
    }
    libraries = result[LIBRARIES]["median"]
    for values in result.values():
        values["ratio"] = round(values["median"] / libraries, 2)
    publish({"benchmark": "startup", "seconds": result}, args.output)


if __name__ == "__main__":
    main()
