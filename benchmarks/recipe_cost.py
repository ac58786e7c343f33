"""What a recipe costs: seconds per token of a study's cells, taking turns, and of what validation looks at.

    python -m benchmarks.recipe_cost --study compare/study-2/test.yaml --cells recipe,switch-paper,gkd \\
        --output benchmarks/results/recipe_cost.json

From the top of the checkout, after benchmarks/study/prepare.py. Seconds stand beside trained tokens, those in the loss,
and beside response tokens, which a budget counts: a cell that trains on interventions alone has fewer of the former.
The cells are those of a study file (`--study`), and `default` is `method: switch` with nothing but what the file sets
for all of them: the same models and arithmetic. Their trainers take turns, step by step, so that a noisy machine
disturbs all of them; seconds and tokens are summed over the counted steps, so a cell that trains several times on a
rollout, or reads the data in some of its steps, has its mean. Validation is timed once, on the trainer of `default`.
On a busy machine only the ratios say anything.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.provenance import publish
from benchmarks.step import make_trainer
from qswitch import rules
from qswitch.compare.spec import read_comparison
from qswitch.config import RunConfig, TrainSection, reader
from qswitch.layers import build_config, set_layer
from qswitch.presets import load_preset

OWN_PROMPTS = TrainSection.model_fields["eval_own_prompts"].default
"""Responses of its own that a validation reads by default; a study may have switched that off."""


def configs(study: Path, names: list[str]) -> dict[str, RunConfig]:
    """Name -> configuration, of `default` and of the first seed of the cells."""
    comparison = read_comparison(study)
    section = comparison.section
    found: dict[str, RunConfig] = {}
    for cell in comparison.cells:
        found.setdefault(cell.name, cell.config)
    run = study.parent / section.run if section.run.endswith((".yaml", ".yml")) else section.run
    own = {"method": "switch", "train.eval_own_prompts": OWN_PROMPTS}
    found["default"] = build_config(load_preset(run), section.settings, own)
    if unknown := [name for name in names if name not in found]:
        raise SystemExit(f"{study} has no cell {unknown[0]}. Cells: {', '.join(found)}")
    return {name: found[name] for name in ["default", *names]}


def changed(config: RunConfig, changes: dict[str, str]) -> RunConfig:
    """The configuration with those of the changes that it reads."""
    unread = rules.unread(reader(config))
    kept = {key: value for key, value in changes.items() if key not in unread}
    return build_config(config.model_dump(exclude_unset=True), set_layer([f"{k}={v}" for k, v in kept.items()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, required=True)
    parser.add_argument("--cells", default="recipe,switch-paper,gkd")
    parser.add_argument("--steps", type=int, default=6, help="counted steps of each cell, after one that is not")
    parser.add_argument("--settings", action="append", default=[], help="section.key=value on top, for a quick try")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    changes = dict(setting.split("=", 1) for setting in args.settings)
    seconds: dict[str, list[float]] = {}
    tokens: dict[str, list[int]] = {}
    responses: dict[str, list[int]] = {}
    validation: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            name: make_trainer(changed(config, changes), Path(folder) / name)
            for name, config in configs(args.study, args.cells.split(",")).items()
        }
        for turn in range(args.steps + 1):
            for name, trainer in trainers.items():
                started = time.perf_counter()
                report = trainer.train_step()
                taken = time.perf_counter() - started
                trainer.counters.step += 1
                if turn:
                    seconds.setdefault(name, []).append(taken)
                    tokens.setdefault(name, []).append(report.loss_tokens)
                    read = report.loss_tokens if report.batch == "ground_truth" else 0
                    responses.setdefault(name, []).append(report.written_tokens or read)
        looker = trainers["default"]
        for what, look in (("teacher's text", looker.validate), ("own text", looker.own_figures)):
            started = time.perf_counter()
            look()
            validation[what] = time.perf_counter() - started
        device = looker.device.type
    per_trained, per_response = (
        {name: sum(values) / max(1, sum(counted[name])) for name, values in seconds.items()}
        for counted in (tokens, responses)
    )
    publish(
        {
            "benchmark": "recipe_cost",
            "study": args.study.name,
            "seconds_per_trained_token": per_trained,
            "seconds_per_response_token": per_response,
            "times_default_by_trained_token": {n: value / per_trained["default"] for n, value in per_trained.items()},
            "times_default_by_response_token": {
                n: value / per_response["default"] for n, value in per_response.items()
            },
            "median_step_seconds": {name: statistics.median(values) for name, values in seconds.items()},
            "validation_seconds": validation,
            "own_text_over_step": validation["own text"] / statistics.median(seconds["default"]),
            "trained_tokens": tokens,
            "response_tokens": responses,
        },
        args.output,
        device,
    )


if __name__ == "__main__":
    main()
