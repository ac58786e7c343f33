"""CPU seconds a step for keeping in the cache of teacher outputs only what the replay buffer may still draw.

    python -m benchmarks.forget_rows --output benchmarks/results/forget_rows.json

A full buffer of --sequences sequences with --steps loss steps each; every step puts --batch new ones, which push out as
many old ones. Rows are narrow, so that the time is that of the bookkeeping.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from benchmarks.provenance import publish
from qswitch.distill.logit_cache import LogitCache
from qswitch.distill.replay import ReplayBuffer, ReplayEntry
from qswitch.distill.sequence import TrainingSequence


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--sequences", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    cache = LogitCache(
        "hidden", head=lambda hidden: hidden, vocab_size=32, device=torch.device("cpu"), dtype=torch.float32,
        device_budget_bytes=1 << 40, host_budget_bytes=0, disk_path=None,
    )  # fmt: skip
    buffer = ReplayBuffer(args.sequences, max_age_steps=1 << 30, seed=0)
    put, forget = [], []
    filling = -(-args.sequences // args.batch)
    for step in range(filling + args.repeats):
        ids = range(step * args.batch, (step + 1) * args.batch)
        fresh = [TrainingSequence(i, 0, [1], [2] * args.steps, list(range(args.steps))) for i in ids]
        started = time.process_time()
        cache.put(fresh, torch.zeros(args.batch * args.steps, args.width))
        put.append(time.process_time() - started)
        buffer.add(ReplayEntry(sequence, step, None) for sequence in fresh)
        started = time.process_time()
        cache.keep_only(buffer.sequences)
        forget.append(time.process_time() - started)
    assert cache.stats()["sequences"] == args.sequences
    result = {
        "benchmark": "forget_rows",
        "settings": {k: v for k, v in vars(args).items() if k != "output"},
        "rows": cache.stats()["rows"],
        "put_cpu_s": statistics.median(put[filling:]),
        "forget_cpu_s": statistics.median(forget[filling:]),
    }
    publish(result, args.output)


if __name__ == "__main__":
    main()
