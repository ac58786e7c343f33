"""How long does a step take with several processes, and what bounds it?

    python -m benchmarks.scale predict --output benchmarks/results/scale.json
    python -m benchmarks.scale measure --output benchmarks/results/scale-measured.json

`predict` simulates a step for 1, 2, 8 and 64 cards from pass times, the size of the gradients and a spread of response
lengths; pass times are those of the planner's arithmetic for a preset and a card (`qswitch/plan/cost.py`), so they are
stated and not measured. `measure` runs the same training in one process and in two, one thread each, and predicts the
second from the first: pass times that the first run measured on this machine, and the lengths that it wrote. Each
process needs a core of its own, so nothing else may run.

A process decodes its rows in rounds, each for as many rows as are still being written, and all wait for the last; then
each learns its sequences, all wait, and the gradients go round in a ring. Bounds, as shares of a step: `rows`, what
passes cost more per token because they hold fewer rows than one card would give them; `longest`, the wait for the
process whose responses are longest; `gradients`, the ring.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.provenance import publish
from qswitch.distill.processes import Processes
from qswitch.launch import Launch
from qswitch.plan import memory
from qswitch.plan.cost import BACKWARD_OVER_FORWARD, PCIE_BYTES_PER_S, pass_seconds, reduce_seconds
from qswitch.plan.machine import GPUS, Machine
from qswitch.plan.scheduler import model_shapes
from qswitch.presets import load_run_config
from qswitch.rollout.block_length import PassTimes

COUNTS = (1, 2, 8, 64)
SIMULATED_STEPS = 50


@dataclass(frozen=True)
class World:
    """What a simulated step depends on."""

    sequences: int
    """Of a step, all processes together."""
    max_rows: int
    """Decoded together in one process at most."""
    lengths: Callable[[random.Random], int]
    """Draws the tokens of one response."""
    round_seconds: Callable[[int], float]
    """Of a round with so many rows."""
    tokens_per_round: float
    learn_seconds: Callable[[int], float]
    """Of so many sequences in one process."""
    gradient_bytes: int
    link_bytes_per_s: float


def rollout_seconds(lengths: Sequence[int], world: World) -> float:
    """One process writes its responses: rounds for the rows that are alive, new rows join as others end."""
    waiting = [math.ceil(n / world.tokens_per_round) for n in lengths]
    live: list[int] = []
    seconds = 0.0
    while waiting or live:
        while waiting and len(live) < world.max_rows:
            live.append(waiting.pop(0))
        rounds = min(live)
        seconds += rounds * world.round_seconds(len(live))
        live = [left - rounds for left in live if left > rounds]
    return seconds


def simulate(world: World, processes: int, seed: int = 0) -> dict[str, float]:
    """Mean seconds of a step, and the shares of it that bound it."""
    draw = random.Random(seed)
    owners = Processes(Launch(processes)).divide([1.0] * world.sequences)
    exchange = reduce_seconds(world.gradient_bytes, processes, world.link_bytes_per_s)
    slowest, mean, alone = [], [], []
    for _ in range(SIMULATED_STEPS):
        lengths = [world.lengths(draw) for _ in range(world.sequences)]
        own = [
            rollout_seconds([n for n, owner in zip(lengths, owners, strict=True) if owner == rank], world)
            for rank in range(processes)
        ]
        slowest.append(max(own))
        mean.append(fmean(own))
        alone.append(rollout_seconds(lengths, world))
    learn = world.learn_seconds(-(-world.sequences // processes))
    step = fmean(slowest) + learn + exchange
    ideal = (fmean(alone) + world.learn_seconds(world.sequences)) / processes
    return {
        "seconds": step,
        "rollout": fmean(slowest),
        "learn": learn,
        "speedup": (fmean(alone) + world.learn_seconds(world.sequences)) / step,
        "efficiency": ideal / step,
        "rows": (fmean(mean) - fmean(alone) / processes + learn - world.learn_seconds(world.sequences) / processes)
        / step,
        "longest": (fmean(slowest) - fmean(mean)) / step,
        "gradients": exchange / step,
    }


def what_bounds(found: dict[str, float]) -> str:
    """The largest loss in words."""
    losses = {name: found[name] for name in ("rows", "longest", "gradients")}
    worst = max(losses, key=losses.__getitem__)
    if losses[worst] < 0.05:
        return "nothing: each process has enough to do"
    return {
        "rows": "passes with few rows: a card alone would share each pass among more",
        "longest": "the longest responses: the others wait for them",
        "gradients": "the exchange of gradients",
    }[worst]


def log_normal(mean_tokens: float, spread: float, most: int) -> Callable[[random.Random], int]:
    """Lengths whose logarithm has the standard deviation `spread`, cut at `most`, as an end token falls."""
    mu = math.log(mean_tokens) - spread**2 / 2
    return lambda draw: max(1, min(most, round(draw.lognormvariate(mu, spread))))


def predict(args: argparse.Namespace) -> dict[str, Any]:
    """The table for cards of one kind, by the planner's arithmetic."""
    config = load_run_config(args.preset)
    teacher, student = model_shapes(config)
    machine = Machine("cuda", "bf16", GPUS[args.gpu])
    drafts, kept = 3, 0.6  # as plan/cost.py assumes
    tokens = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    student_precision: memory.Precision = "bf16" if config.student.precision == "auto" else config.student.precision

    @cache
    def round_seconds(rows: int) -> float:
        both = (teacher, config.teacher.precision, drafts + 1, 1), (student, student_precision, 1, drafts + 1)
        return sum(
            times * pass_seconds(shape, precision, rows * width, memory.kv_buffer_bytes(shape, rows, tokens // 2, 2),
                                 machine)
            for shape, precision, width, times in both
        )  # fmt: skip

    @cache
    def learn_seconds(sequences: int) -> float:
        micro = min(sequences, config.train.per_device_train_batch_size)
        passes = -(-sequences // micro)
        forward = pass_seconds(student, student_precision, micro * tokens, 0, machine)
        return passes * forward * (1 + BACKWARD_OVER_FORWARD[config.student.adapter])

    trained = memory.trainable_parameters(student, config.student.adapter, config.student.lora)
    scenarios = {
        f"{args.sequences} sequences a step": lambda count: args.sequences,
        f"{args.per_card} sequences a card": lambda count: args.per_card * count,
    }
    rows: list[dict[str, Any]] = []
    for link, rate in {"PCIe 4.0 x8": PCIE_BYTES_PER_S, "10 GbE": 1.1e9}.items():
        for name, sequences_of in scenarios.items():
            one = 0.0
            for count in COUNTS:
                world = World(
                    sequences_of(count), config.rollout.batch_size,
                    log_normal(args.mean_tokens, args.spread, config.rollout.max_new_tokens), round_seconds,
                    (1 - kept ** (drafts + 1)) / (1 - kept), learn_seconds, trained * 4, rate,
                )  # fmt: skip
                found = simulate(world, count)
                per_s = world.sequences / found["seconds"]
                one = one or per_s
                rows.append({
                    "scenario": name, "link": link, "cards": count, "sequences": world.sequences,
                    **{k: round(v, 4) for k, v in found.items()}, "sequences_per_s": round(per_s, 3),
                    "throughput_over_one": round(per_s / one, 2), "bound": what_bounds(found),
                })  # fmt: skip
    return {
        "preset": args.preset, "gpu": args.gpu, "mean_tokens": args.mean_tokens, "spread": args.spread,
        "gradient_mib": round(trained * 4 / 2**20, 1), "stated_not_measured": True, "rows": rows,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ measured


def start(config: Path, output: Path, processes: int) -> None:
    """One run with one thread a process."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, "qswitch", "distill", "--config", str(config), "--output-dir", str(output)]
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The steps of a run but the first, in which caches of the libraries are filled."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "loss_tokens" in line][1:]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of two processes over one, beside the simulation that knows the first run alone."""
    folder = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "scale.yaml"
    config.write_text(
        f"extends: {args.preset}\nrollout: {{max_new_tokens: {args.tokens}, batch_size: {args.sequences}, "
        "block_tokens: 0}\n"
        f"train: {{max_steps: {args.steps}, per_device_train_batch_size: 2, gradient_accumulation_steps: "
        f"{args.sequences // 2}, eval_steps: 1000000, save_steps: 1000000, compute_dtype: fp32, device: cpu, "
        "eval_own_prompts: 0}\ndata: {num_validation: 2}\n",
        encoding="utf-8",
    )
    for count in (1, 2):
        start(config, folder / f"{count}", count)
    one, two = steps_of(folder / "1"), steps_of(folder / "2")

    def rate(steps: list[dict[str, Any]]) -> float:
        return sum(s["rollout_tokens"] for s in steps) / sum(sum(s["seconds"].values()) for s in steps)

    assert [s["rollout_tokens"] for s in one] == [s["rollout_tokens"] for s in two], "the same rollouts"
    written = [json.loads(line) for line in (folder / "1" / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()]
    lengths = [len(rollout["tokens"]) for rollout in written]
    times = PassTimes.from_dict(json.loads(args.times.read_text(encoding="utf-8"))) if args.times else None
    rollout_s, learn_s = (fmean(sum(s["seconds"].get(n, 0.0) for n in names) for s in one)
                          for names in (("rollout", "teacher"), ("loss", "optimizer")))  # fmt: skip

    def shape(rows: int) -> float:
        """A round's cost relative to others: by measured pass times, else a fixed part and one per row."""
        if times is None:
            return 1.0 + rows
        return times.student_seconds(rows) + float(times.teacher_seconds(rows, [1])[0])  # type: ignore[arg-type]

    world = World(args.sequences, args.sequences, lambda draw: draw.choice(lengths), shape, 1.0, lambda n: 0.0, 0, 1e9)
    unscaled = simulate(world, 1)["rollout"]
    scaled = World(
        args.sequences, args.sequences, world.lengths, lambda rows: shape(rows) * rollout_s / unscaled, 1.0,
        lambda n: learn_s * n / args.sequences, 0, 1e9,
    )  # fmt: skip
    predicted = simulate(scaled, 2)
    return {
        "preset": args.preset, "sequences_per_step": args.sequences, "max_new_tokens": args.tokens, "steps": len(one),
        "tokens_per_s": {"1": round(rate(one), 2), "2": round(rate(two), 2)},
        "measured_ratio": round(rate(two) / rate(one), 3),
        "predicted_ratio": round(predicted["speedup"], 3),
        "predicted": {k: round(v, 4) for k, v in predicted.items()},
        "pass_times": "of this machine" if times else "assumed: a fixed part as large as one row's",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    table = commands.add_parser("predict")
    table.add_argument("--preset", default="llama-7b-to-1b")
    table.add_argument("--gpu", default="rtx3060-12gb", choices=GPUS)
    table.add_argument("--sequences", type=int, default=64, help="Of a step, shared by all cards.")
    table.add_argument("--per-card", type=int, default=16, help="Of a step, where it grows with the cards.")
    table.add_argument("--mean-tokens", type=float, default=150.0)
    table.add_argument("--spread", type=float, default=0.6)
    table.set_defaults(run=predict)
    here = commands.add_parser("measure")
    here.add_argument("--preset", default="smollm2-demo")
    here.add_argument("--sequences", type=int, default=8)
    here.add_argument("--tokens", type=int, default=32)
    here.add_argument("--steps", type=int, default=5)
    here.add_argument("--times", type=Path, help="pass_times.json of a run of the pair on this machine, one thread.")
    here.add_argument("--folder", type=Path, default=Path("runs/scale"), help="Where the two runs go; must be new.")
    here.set_defaults(run=measure)
    for command in (table, here):
        command.add_argument("--output", type=Path)
    args = parser.parse_args()
    publish(args.run(args), args.output)


if __name__ == "__main__":
    main()
