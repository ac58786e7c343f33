"""One driver for the first hour on a GPU.

    python -m benchmarks.gpu --output OUT                         # stages 0 to 6, at most eight minutes each
    python -m benchmarks.gpu --stage 0,3 --output OUT             # some of them, again or alone
    python -m benchmarks.gpu --stage 7 --limit 14400 --output OUT # the second study, on a pair that was carried along
    python -m benchmarks.gpu --device cpu --tiny --output OUT     # tries the driver where there is no GPU

Every stage is a process of its own and writes OUT/stage-N.json after each measurement. A measurement that fails is
recorded; one that takes the process with it is recorded too, and the stage goes on behind it. The exit code is 1 where
any measurement failed. docs/gpu.md says what a machine needs, and what each figure decides.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu.report import POISONED, Context, Report, blame

STAGES = {
    0: ("checks", "Do kernels, graphs, copies and noise do on this card what the tests say on a CPU?"),
    1: ("families", "Do tiny pairs of every family write the same resident, swapped, resumed and with graphs?"),
    2: ("loading", "How long do a 7B teacher and a 1.1B student load, and what do they take?"),
    3: ("passes", "How long are passes by rows and tokens, on the host and on the device?"),
    4: ("speed", "How many tokens a second, against transformers' generate and TRL's DistillationTrainer?"),
    5: ("capped", "Do runs stay within 12, 10 and 8 GiB as planned?"),
    6: ("profile", "Where does the time of a round and of a learning step go?"),
    7: ("recipe", "Which recipe wins on a trained pair? Hours; goes on where it was."),
}
"""Number -> module of this package with `run(context, report)`, and the question it answers."""
FIRST_HOUR = [n for n in STAGES if n != 7]
"""The stages that run where none is named."""
LIMIT_S = 450.0
"""Of one stage; the last measurement may run on until `GRACE_S` are over."""
GRACE_S = 30.0


def stages(text: str) -> list[int]:
    """0-2,5 -> [0, 1, 2, 5]."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    unknown = [n for n in found if n not in STAGES]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no stage {unknown[0]}; stages are {', '.join(map(str, STAGES))}")
    return found


def run_here(args: argparse.Namespace, stage: int) -> None:
    """One stage in this process."""
    module, question = STAGES[stage]
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device(args.device)
    context = Context(device=device, tiny=args.tiny, models=args.models, output=args.output)
    report = Report(args.output / f"stage-{stage}.json", context, stage=stage, question=question, limit_s=args.limit)
    importlib.import_module(f"benchmarks.gpu.{module}").run(context, report)


def run_apart(args: argparse.Namespace, stage: int) -> dict[str, str]:
    """One stage in processes of its own, another one where a measurement ended the first; errors by measurement."""
    path = args.output / f"stage-{stage}.json"
    path.unlink(missing_ok=True)
    deadline = time.perf_counter() + args.limit
    print(f"stage {stage}: {STAGES[stage][1]}", flush=True)
    ended = "no measurement was begun"
    while (left := deadline - time.perf_counter()) > 0:
        command = [sys.executable, "-m", "benchmarks.gpu", "--here", "--stage", str(stage), "--device", args.device,
                   "--output", str(args.output), "--models", str(args.models), "--limit", str(left)]  # fmt: skip
        try:
            code = run_group(command + ["--tiny"] * args.tiny, left + GRACE_S)
            ended = f"exit code {code}"
        except subprocess.TimeoutExpired:
            code, ended = None, f"it ran {GRACE_S:.0f} s beyond the stage's time"
        if code == 0:
            break
        if code != POISONED and not blame(path, ended):
            break
    values = (
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"measured": {"start": {"error": ended}}}
    )
    return {name: found["error"] for name, found in values["measured"].items() if "error" in found}


def run_group(command: list[str], timeout_s: float) -> int:
    """The exit code of a program; one that takes too long is ended with all that it has started.

    Raises:
        subprocess.TimeoutExpired: it was ended.
    """
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(timeout_s)
    except BaseException:  # also Ctrl-C, which a group of its own does not hear
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is asked for, and without a network the question can hang
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=stages, default=FIRST_HOUR, help="such as 0, 0-3 or 2,5; by default 0-6")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small models: to try the driver")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--models", type=Path, help="folder of the models it makes, 16 GiB; by default OUTPUT/models")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds of a stage")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.models = args.models or args.output / "models"
    if args.here:
        run_here(args, args.stage[0])
        return
    failed = {stage: errors for stage in args.stage if (errors := run_apart(args, stage))}
    for stage, errors in failed.items():
        for name, error in errors.items():
            print(f"stage {stage}, {name}: {error}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
