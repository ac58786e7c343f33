"""Is the wanted share of teacher tokens held? What runs with rollout.teacher_share have logged, set by set.

    qswitch distill --config benchmarks/study/base.yaml --set rollout.teacher_share=0.5 --set loss.scope=all \\
        --set rollout.max_new_tokens=64 --set train.per_device_train_batch_size=4 --set train.max_steps=14 \\
        --output-dir RUN
    python -m benchmarks.teacher_share RUN --output benchmarks/results/teacher_share.json

`share` is of all tokens, those of the first set among them, whose threshold was as written; `share_after_first` leaves
that set out. Nothing here depends on the speed of the machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.provenance import publish
from qswitch.run_dir import RunDir


def shares(run_dir: RunDir) -> dict[str, Any]:
    """Of one run: the wanted share, what became of it, and the factor of every set."""
    sets = [line for line in run_dir.read_metrics() if line.get("threshold_factor") is not None]
    tokens = [line["rollout_tokens"] for line in sets]
    by_teacher = [line["rollout_tokens"] * line["teacher_share"] for line in sets]
    settings = run_dir.config.rollout
    if not sum(tokens):
        raise SystemExit(f"{run_dir.path} has no step with a threshold factor: it ran without rollout.teacher_share")
    return {
        "wanted": settings.teacher_share,
        "schedule": settings.schedule,
        "tokens": sum(tokens),
        "share": round(sum(by_teacher) / sum(tokens), 4),
        "share_after_first": round(sum(by_teacher[1:]) / max(1, sum(tokens[1:])), 4),
        "by_set": [round(line["teacher_share"], 4) for line in sets],
        "factors": [round(line["threshold_factor"], 4) for line in sets],
        "mean_jsd_bits": [round(line["jsd_bits"], 4) for line in sets],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found = {run.name: shares(RunDir.open(run)) for run in args.runs}
    publish({"benchmark": "teacher_share", "runs": found}, args.output)


if __name__ == "__main__":
    main()
