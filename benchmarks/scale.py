"""How long does a step take with several processes, and what bounds it?

    python -m benchmarks.scale predict --output benchmarks/results/scale.json
    python -m benchmarks.scale measure --output benchmarks/results/scale-measured.json

`predict` simulates a step for 1, 2, 8 and 64 cards from pass times, the size of the gradients and a spread of response
lengths; pass times are those of the planner's arithmetic for a preset and a card (`qswitch/plan/cost.py`), so they are
stated and not measured. `measure` runs the same training in one process and in two, one thread each, and predicts the
second from the first: pass times that the first run measured on this machine, and the lengths that it wrote. Each
process needs a core of its own, so nothing else may run.

A process decodes its rows in rounds, each for as many rows as are still being written, and all wait for the last; then
each learns its sequences, in micro-batches padded to their longest, all wait, and the gradients go round in a ring.
Bounds, as shares of a step: `rows`, what passes cost more per token because they hold fewer rows than one card would
give them; `longest`, the wait for the process whose responses are longest; `gradients`, the ring. `rebalancing` is the
share that a step would lose if the sequences were shared out anew before they are learnt, by the lengths that are known
by then, and moving them cost nothing.
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
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.provenance import publish
from qswitch.distill.processes import Processes
from qswitch.launch import Launch
from qswitch.plan import memory
from qswitch.plan.cost import BACKWARD_OVER_FORWARD, PCIE_BYTES_PER_S, pass_seconds, reduce_seconds
from qswitch.plan.machine import GPUS, Machine
from qswitch.plan.scheduler import model_shapes
from qswitch.presets import load_run_config

COUNTS = (1, 2, 8, 64)
SIMULATED_STEPS = 50
DOLLY_SPREAD = 1.3
"""Standard deviation of the logarithm of the lengths of Dolly's responses, in characters: 1.32 of the 11,435 of the
training set that the papers use, 1.33 of its 500 test records."""


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
    prompt_seconds: float
    """For one response, in which both models read its prompt: work that processes share without loss."""
    learn_seconds: Callable[[Sequence[int]], float]
    """Of responses of these lengths in one process."""
    gradient_bytes: int
    link_bytes_per_s: float


def rollout_seconds(lengths: Sequence[int], world: World) -> float:
    """One process reads prompts and writes: rounds for the rows that are alive, new rows join as others end."""
    waiting = [math.ceil(n / world.tokens_per_round) for n in lengths]
    live: list[int] = []
    seconds = len(lengths) * world.prompt_seconds
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
    divide = Processes(Launch(processes)).divide
    owners = divide([1.0] * world.sequences)
    exchange = reduce_seconds(world.gradient_bytes, processes, world.link_bytes_per_s)
    write: list[list[float]] = []  # of each step, by process
    learn: list[list[float]] = []
    alone: list[float] = []  # of each step, in one process
    rebalanced: list[float] = []  # of each step, the slowest

    def shares(lengths: Sequence[int], owners: Sequence[int]) -> list[list[int]]:
        return [[n for n, owner in zip(lengths, owners, strict=True) if owner == rank] for rank in range(processes)]

    for _ in range(SIMULATED_STEPS):
        lengths = [world.lengths(draw) for _ in range(world.sequences)]
        own = shares(lengths, owners)
        write.append([rollout_seconds(one, world) for one in own])
        learn.append([world.learn_seconds(one) for one in own])
        alone.append(rollout_seconds(lengths, world) + world.learn_seconds(lengths))
        rebalanced.append(max(world.learn_seconds(one) for one in shares(lengths, divide(lengths))))
    slowest = {"rollout": fmean(map(max, write)), "learn": fmean(map(max, learn))}
    mean = fmean(map(fmean, write)) + fmean(map(fmean, learn))
    step = sum(slowest.values()) + exchange
    return {
        "seconds": step,
        **slowest,
        "speedup": fmean(alone) / step,
        "efficiency": fmean(alone) / processes / step,
        "rows": (mean - fmean(alone) / processes) / step,
        "longest": (sum(slowest.values()) - mean) / step,
        "gradients": exchange / step,
        "rebalancing": (slowest["learn"] - fmean(rebalanced)) / step,
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
    def forward_seconds(num_tokens: int) -> float:
        return pass_seconds(student, student_precision, num_tokens, 0, machine)

    prompt_seconds = forward_seconds(config.data.max_prompt_tokens) + pass_seconds(
        teacher, config.teacher.precision, config.data.max_prompt_tokens, 0, machine
    )

    def learn_seconds(lengths: Sequence[int]) -> float:
        """Micro-batches of similar lengths, as the learner makes them."""
        ordered, micro = sorted(lengths), config.train.per_device_train_batch_size
        groups = [ordered[i : i + micro] for i in range(0, len(ordered), micro)]
        forward = sum(forward_seconds(len(g) * (config.data.max_prompt_tokens + g[-1])) for g in groups)
        return forward * (1 + BACKWARD_OVER_FORWARD[config.student.adapter])

    trained = memory.trainable_parameters(student, config.student.adapter, config.student.lora)
    scenarios = {
        f"{args.sequences} sequences a step": lambda count: args.sequences,
        f"{args.per_card} sequences a card": lambda count: args.per_card * count,
    }
    links = {"PCIe 4.0 x8": PCIE_BYTES_PER_S, "10 GbE": 1.1e9}
    rows: list[dict[str, Any]] = []
    for spread, (link, rate), (name, sequences_of) in product(args.spread, links.items(), scenarios.items()):
        one = 0.0
        for count in COUNTS:
            world = World(
                sequences_of(count), config.rollout.batch_size,
                log_normal(args.mean_tokens, spread, config.rollout.max_new_tokens), round_seconds,
                (1 - kept ** (drafts + 1)) / (1 - kept), prompt_seconds, learn_seconds, trained * 4, rate,
            )  # fmt: skip
            found = simulate(world, count)
            per_s = world.sequences / found["seconds"]
            one = one or per_s
            rows.append({
                "scenario": name, "spread": spread, "link": link, "cards": count, "sequences": world.sequences,
                **{k: round(v, 4) for k, v in found.items()}, "sequences_per_s": round(per_s, 3),
                "throughput_over_one": round(per_s / one, 2), "bound": what_bounds(found),
            })  # fmt: skip
    return {
        "preset": args.preset, "gpu": args.gpu, "mean_tokens": args.mean_tokens,
        "gradient_mib": round(trained * 4 / 2**20, 1), "stated_not_measured": True, "rows": rows,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ measured


def start(config: Path, output: Path, processes: int) -> None:
    """One run with one thread a process, and pass times measured now."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "QSWITCH_CACHE": str(output.parent / "cache")}
    command = [*launcher, "qswitch", "distill", "--config", str(config), "--output-dir", str(output)]
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The steps of a run but the first, in which caches of the libraries are filled."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "loss_tokens" in line][1:]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of two processes over one, beside the simulation that knows the first run alone."""
    from qswitch.rollout.block_length import PassTimes  # loads torch, which `predict` does without

    folder = args.folder
    folder.mkdir(parents=True)

    def run(name: str, processes: int, **rollout: Any) -> Path:
        settings = {
            "extends": args.preset,
            "rollout": {"max_new_tokens": args.tokens, "batch_size": args.sequences, "block_tokens": 0,
                        "steps_at_once": 1} | rollout,
            "train": {"max_steps": args.steps if name != "times" else 1, "per_device_train_batch_size": 2,
                      "gradient_accumulation_steps": args.sequences // 2, "eval_steps": 1_000_000,
                      "save_steps": 1_000_000, "compute_dtype": "fp32", "device": "cpu", "eval_own_prompts": 0},
            "data": {"num_validation": 2},
        }  # fmt: skip
        if (cut := folder / "times" / "student").is_dir():  # the first run has cut the student for all
            settings["student"] = {"model": str(cut.resolve()), "shrink_to_layers": None, "shape": None}
        config = folder / f"{name}.yaml"
        config.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
        start(config, folder / name, processes)
        return folder / name

    # Drafts of a chosen length let the run time passes of either model by their rows, with one thread as all others.
    times = PassTimes.from_dict(json.loads((run("times", 1, block_tokens="auto") / "pass_times.json").read_text()))
    one, two = (steps_of(run(str(count), count)) for count in (1, 2))

    def rate(steps: list[dict[str, Any]]) -> float:
        return sum(s["rollout_tokens"] for s in steps) / sum(sum(s["seconds"].values()) for s in steps)

    assert [s["rollout_tokens"] for s in one] == [s["rollout_tokens"] for s in two], "the same rollouts"
    written = [json.loads(line) for line in (folder / "1" / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()]
    lengths = [len(rollout["tokens"]) for rollout in written]
    rollout_s, learn_s = (fmean(sum(s["seconds"].get(n, 0.0) for n in names) for s in one)
                          for names in (("rollout", "teacher"), ("loss", "optimizer")))  # fmt: skip

    @cache
    def round_seconds(rows: int) -> float:
        """A round as the measured passes have it: no drafts, so one of either model."""
        return times.student_seconds(rows) + float(times.teacher_seconds(rows, np.ones(1))[0])

    def world(prompt_seconds: float, learn_scale: float) -> World:
        return World(
            args.sequences, args.sequences, lambda draw: draw.choice(lengths), round_seconds, 1.0, prompt_seconds,
            lambda own: learn_scale * sum(own), 0, 1e9,
        )  # fmt: skip

    # What the first run took beyond its rounds is the price of its prompts, and a token learnt costs what it did there.
    unscaled = simulate(world(0.0, 1.0), 1)
    prompt_seconds = max(0.0, rollout_s - unscaled["rollout"]) / args.sequences
    predicted = simulate(world(prompt_seconds, learn_s / unscaled["learn"]), 2)
    return {
        "preset": args.preset, "sequences_per_step": args.sequences, "max_new_tokens": args.tokens, "steps": len(one),
        "tokens_per_s": {"1": round(rate(one), 2), "2": round(rate(two), 2)},
        "seconds_by_phase": {name: mean_phases(steps) for name, steps in (("1", one), ("2", two))},
        "measured_ratio": round(rate(two) / rate(one), 3),
        "predicted_ratio": round(predicted["speedup"], 3),
        "predicted": {k: round(v, 4) for k, v in predicted.items()},
        "prompt_seconds": round(prompt_seconds, 4),
        "round_seconds": {str(n): round(round_seconds(n), 4) for n in (1, args.sequences // 2, args.sequences)},
    }  # fmt: skip


def mean_phases(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of a step by phase, as metrics.jsonl has them."""
    names = dict.fromkeys(name for step in steps for name in step["seconds"])
    return {name: round(fmean(step["seconds"].get(name, 0.0) for step in steps), 3) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    table = commands.add_parser("predict")
    table.add_argument("--preset", default="llama-7b-to-1b")
    table.add_argument("--gpu", default="rtx3060-12gb", choices=GPUS)
    table.add_argument("--sequences", type=int, default=64, help="Of a step, shared by all cards.")
    table.add_argument("--per-card", type=int, default=16, help="Of a step, where it grows with the cards.")
    table.add_argument("--mean-tokens", type=float, default=150.0)
    table.add_argument("--spread", type=float, nargs="+", default=[0.6, DOLLY_SPREAD], help="Of log lengths.")
    table.set_defaults(run=predict)
    here = commands.add_parser("measure")
    here.add_argument("--preset", default="smollm2-demo")
    here.add_argument("--sequences", type=int, default=8)
    here.add_argument("--tokens", type=int, default=32)
    here.add_argument("--steps", type=int, default=5)
    here.add_argument("--folder", type=Path, default=Path("runs/scale"), help="Where the two runs go; must be new.")
    here.set_defaults(run=measure)
    for command in (table, here):
        command.add_argument("--output", type=Path)
    args = parser.parse_args()
    publish(args.run(args), args.output)


if __name__ == "__main__":
    main()
