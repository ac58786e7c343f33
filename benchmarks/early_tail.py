"""What does an early tail (`rollout.tail_bits`) change on a pair: tokens, their law, and passes of the student?

    python -m benchmarks.early_tail --teacher DIR --student DIR --prompts FILE.jsonl \
        --output benchmarks/results/early_tail.json

Writes every prompt once exactly and once for each value of `--tail-bits`, with the same noise, and counts: tokens of
the tail that the student writes exactly (their law moves), the part of them at which the teacher would have drawn
another token (they change), responses that are not the same any more, student passes, and the mean distance of the two
laws by the bound sqrt(2 ln 2 JSD). `seconds_over_exact` is worth something on a quiet machine only.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from benchmarks.provenance import publish
from benchmarks.rollout import Bench, numbers
from qswitch.rollout.block_length import FixedBlock
from qswitch.rollout.decode import rollout
from qswitch.rollout.policy import STUDENT, SwitchPolicy
from qswitch.rollout.threshold import TAU_FLOOR_BITS, Threshold


def write(bench: Bench, decay_rate: float, tail_bits: float) -> Any:
    law = Threshold("exponential", 1.0, decay_rate, 0.2, bench.args.new_tokens, tail_bits=tail_bits)
    written = rollout(
        bench.requests(), teacher=bench.teacher, student=bench.student, policy=SwitchPolicy(law), seed=0,
        temperature=1.0, eos_ids=bench.pair.eos_ids, pad_id=bench.pair.pad_id, batch_size=bench.args.batch[0],
        keep="nothing", blocks=FixedBlock(0),
    )  # fmt: skip
    return law, *written


def compare(exact: list[Any], early: list[Any], start: float) -> dict[str, Any]:
    tokens = tail = student = other = 0
    distance = 0.0
    for a in exact:
        tokens += len(a.response_ids)
        for step in range(int(start), len(a.response_ids)):
            tail += 1
            if a.writers[step] == STUDENT:
                student += 1
                other += a.teacher_ids[step] != a.response_ids[step]
                distance += math.sqrt(2 * math.log(2) * max(a.jsd_bits[step], 0.0))
    changed = sum(a.response_ids != b.response_ids for a, b in zip(exact, early, strict=True))
    return {
        "tail_start": start, "tokens": tokens, "tokens_in_the_tail": tail, "of_them_by_the_student": student,
        "of_these_drawn_otherwise_by_the_teacher": other, "share_of_all_tokens_changed": other / max(tokens, 1),
        "mean_bound_of_the_distance": distance / max(student, 1), "responses_changed": changed,
        "responses": len(exact),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "student", "prompts"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--precision", default="nf4")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--batch", type=numbers, default=[8])
    parser.add_argument("--decay", type=numbers, default=[10, 5], help="inverse decay rates")
    parser.add_argument("--tail-bits", type=float, action="append")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--prompt-tokens", type=int, default=96)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    bench = Bench(args)
    cells = []
    for inverse in args.decay:
        _, exact, before = write(bench, 1 / inverse, TAU_FLOOR_BITS)
        for tail_bits in args.tail_bits or [0.005, 0.02]:
            law, early, after = write(bench, 1 / inverse, tail_bits)
            passes = {"exact": before.student_passes, "early": after.student_passes}
            cells.append({"decay_rate": 1 / inverse, "tail_bits": tail_bits, **compare(exact, early, law.tail_start),
                          "student_passes": passes, "teacher_passes": after.teacher_passes,
                          "seconds_over_exact": after.seconds / before.seconds})  # fmt: skip
    settings = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    publish({"benchmark": "early_tail", "settings": settings, "cells": cells}, args.output, bench.device.type)


if __name__ == "__main__":
    main()
