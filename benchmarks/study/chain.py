"""The second study from end to end: search, choice, finals, choice, test. One command, which goes on where it was.

    python benchmarks/study/chain.py --output-dir compare/study-2                    # all of it
    python benchmarks/study/chain.py --output-dir compare/study-2 --until search     # the search alone
    python benchmarks/study/chain.py --output-dir compare/study-2 --seconds 3600     # an hour of it, and later on

From the top of the checkout, after prepare.py. The device is what `train.device: auto` finds, so the same command runs
on a GPU. With --seconds the comparison that runs is stopped as Ctrl-C would stop it, with a checkpoint; the exit code
is then 75. docs/study.md says what each part costs.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = ("search", "finals", "test")
STOPPED = 75
"""Exit code when the time was up."""


class TimeIsUp(Exception):
    """The next call goes on."""


def run(command: list[str], deadline: float | None) -> None:
    """A command to its end, or until the deadline.

    Raises:
        TimeIsUp: it was stopped, or not begun.
        CalledProcessError: it failed.
    """
    left = None if deadline is None else deadline - time.monotonic()
    if left is not None and left <= 0:
        raise TimeIsUp
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(left)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
        process.send_signal(signal.SIGTERM)
        process.wait()  # for the step that is under way, and its checkpoint
        raise TimeIsUp from reason
    if code:
        raise subprocess.CalledProcessError(code, command)


def chain(output_dir: Path, *, until: str, deadline: float | None) -> None:
    """All parts up to `until`; what is finished is not repeated.

    Raises:
        TimeIsUp, CalledProcessError: as `run`.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    for part in PARTS[: PARTS.index(until) + 1]:
        path = HERE / "search.yaml"
        if part != "search":
            path = output_dir / f"{part}.yaml"
            if not path.is_file():  # chosen once: a cell that is measured anew must not move the choice
                before = output_dir / PARTS[PARTS.index(part) - 1]
                choice = [sys.executable, str(HERE / "choose.py"), part]
                run([*choice, "--from", str(before), "--output", str(path)], deadline)
        run([sys.executable, "-m", "qswitch", "compare", str(path), "--output-dir", str(output_dir / part)], deadline)
    if until == "test":
        run([sys.executable, str(HERE / "choose.py"), "target", "--from", str(output_dir / "test")], None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--until", choices=PARTS, default=PARTS[-1], help="the last part to run")
    parser.add_argument("--seconds", type=float, help="stop after so many, with a checkpoint")
    arguments = parser.parse_args()
    deadline = None if arguments.seconds is None else time.monotonic() + arguments.seconds
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does, and takes the comparison along
    try:
        chain(arguments.output_dir, until=arguments.until, deadline=deadline)
    except TimeIsUp:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(STOPPED)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


if __name__ == "__main__":
    main()
