"""Seconds of an optimizer step of SWITCH against GKD, at equal trained tokens, for several values of rollout.reuse.

    python -m benchmarks.step --teacher DIR --student DIR --prompts FILE.jsonl --output benchmarks/results/step.json

Rows of the table, all through the same trainer, loss (over every response token) and optimizer:

- `switch R`: this engine, block length auto, each rollout trained R times;
- `gkd R`: the student writes on this engine, one parallel teacher pass scores, each rollout trained R times;
- `gkd generate`: the student writes through transformers' `generate`, as in other trainers, one parallel teacher
  pass scores, every rollout trained once;
- `switch sequential`: one teacher pass a token and no reuse, what the paper pays;
- `trl ...`: TRL's stable DistillationTrainer with its chunked loss, where trl is installed, on the same two models,
  adapters and prompts, in several settings in its favour; `switch_over_trl` divides by the fastest of them.

A step's seconds are divided by its trained tokens, because responses differ in length. Rows take turns, step by
step, so that a noisy machine disturbs all of them. The first steps of each row, while its replay buffer fills, are not
counted.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset

from benchmarks.provenance import publish
from benchmarks.rollout import numbers
from qswitch.config import RunConfig
from qswitch.data.gather import load_prompts
from qswitch.data.loader import Mixture
from qswitch.data.template import pad_left
from qswitch.distill.metrics import Counters, StepReport
from qswitch.distill.trainer import Trainer
from qswitch.layers import build_config
from qswitch.models.load import load_teacher
from qswitch.models.pair import load_pair_tokenizer, template_tokenizer
from qswitch.models.runtime import make_runtime
from qswitch.models.student import load_student
from qswitch.rollout.decode import Rollout, RolloutStats, inference
from qswitch.run_dir import RunDir


def roll_out_with_generate(trainer: Trainer, items: Any) -> tuple[list[Rollout], RolloutStats]:
    """GKD as others run it: transformers' `generate` writes."""
    settings, pair, stats, started = trainer.config.rollout, trainer.pair, RolloutStats(), time.perf_counter()
    results = []
    with inference(trainer.student):
        for first in range(0, len(items), settings.batch_size):
            rows = items[first : first + settings.batch_size]
            ids, mask = pad_left([p.prompt_ids for p, _ in rows], pair.pad_id)
            out = trainer.student.hf.generate(
                input_ids=ids.to(trainer.device), attention_mask=mask.to(trainer.device), do_sample=True, top_k=0,
                top_p=1.0, max_new_tokens=settings.max_new_tokens, eos_token_id=list(pair.eos_ids),
                pad_token_id=pair.pad_id,
            )[:, ids.shape[1]:].tolist()  # fmt: skip
            for (prompt, visit), tokens in zip(rows, out, strict=True):
                end = next((i + 1 for i, t in enumerate(tokens) if t in pair.eos_ids), len(tokens))
                response = tokens[:end]
                results.append(
                    Rollout(prompt.example_id, visit, prompt.prompt_ids, response, [0] * end, None, None, [], None,
                            ended=response[-1] in pair.eos_ids)
                )  # fmt: skip
                stats.tokens += end
    stats.seconds = time.perf_counter() - started
    return results, stats


class TrlRow:
    """TRL's stable DistillationTrainer with its chunked loss, driven step by step so that it can take turns.

    On-policy by `generate` for all sequences of a step at once, reverse KL (its default), no gradient checkpointing,
    on the very models, adapters and token ids of the other rows.
    """

    def __init__(self, donor: Trainer, args: argparse.Namespace, folder: Path, **settings: Any) -> None:
        from trl import DistillationConfig, DistillationTrainer  # optional, in no extra

        class Ids(DistillationTrainer):
            def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[Any], None, dict[str, Any]]:
                return prompts, None, {}

        self.config, self.counters = donor.config, Counters()
        micro = settings.pop("per_device_train_batch_size", args.micro_batch)
        settings = {"bf16": False, **settings}
        self.accumulation = args.sequences // micro
        config = DistillationConfig(
            output_dir=str(folder / "trl"), max_completion_length=args.new_tokens, max_steps=1000, report_to=[],
            per_device_train_batch_size=micro, gradient_accumulation_steps=self.accumulation, fp16=False,
            gradient_checkpointing=False, learning_rate=donor.config.train.learning_rate, shuffle_dataset=False,
            use_cpu=donor.device.type == "cpu", dataloader_pin_memory=False, **settings,
        )  # fmt: skip
        tokenizer = template_tokenizer(donor.pair, "teacher")
        tokenizer.pad_token_id = donor.pair.pad_id
        donor.student.causal_model.generation_config.eos_token_id = list(donor.pair.eos_ids)
        _, prompts, _ = load_prompts(donor.config, donor.pair)
        assert donor.teacher is not None and not isinstance(prompts, Mixture), "make_row gives GKD and one file"
        self.trainer = Ids(
            model=donor.student.hf, teacher_model=donor.teacher.hf, args=config, processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": [p.prompt_ids for p in prompts]}),
        )  # fmt: skip
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = self.accumulation  # which its own loop sets
        self.batches = iter(self.trainer.get_train_dataloader())
        self.tokens = 0
        original = self.trainer.compute_loss

        def counted(model: Any, inputs: Any, **kwargs: Any) -> Any:
            self.tokens += int(inputs["completion_mask"].sum())
            return original(model, inputs, **kwargs)

        self.trainer.compute_loss = counted

    def train_step(self) -> StepReport:
        """One optimizer step of TRL."""
        self.tokens = 0
        for _ in range(self.accumulation):
            self.trainer.model.train()
            self.trainer.training_step(self.trainer.model, next(self.batches), None)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        report = StepReport()
        report.loss_tokens = self.tokens
        return report


def trl_settings(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Settings of TRL's trainer that are tried; the fastest of them is the rival."""
    return {
        "trl": {},
        "trl one micro-batch": {"per_device_train_batch_size": args.sequences},
        "trl static cache": {"cache_implementation": "static"},
        "trl autocast": {"bf16": True, "per_device_train_batch_size": args.sequences},
    }


def make_trainer(config: RunConfig, path: Path) -> Trainer:
    """A run at its start, in a folder of its own, with models of its own."""
    pair = load_pair_tokenizer(config)
    _, prompts, held_out = load_prompts(config, pair)
    runtime = make_runtime(config.train)
    return Trainer(
        config,
        RunDir.create(path, config),
        teacher=load_teacher(config.teacher, runtime, vocab_size=pair.vocab_size),
        student=load_student(config, runtime, vocab_size=pair.vocab_size, base_path=None),
        pair=pair,
        prompts=prompts,
        validation_prompts=held_out,
    )


def make_row(args: argparse.Namespace, folder: Path, name: str) -> Trainer:
    method, _, detail = name.partition(" ")
    reuse = int(detail) if detail.isdigit() else 1
    rollout: dict[str, Any] = {
        "policy": "switch" if method == "switch" else "student", "max_new_tokens": args.new_tokens,
        "batch_size": args.batch, "reuse": reuse,
    }  # fmt: skip
    if method == "switch":
        rollout |= {"decay_rate": args.decay_rate, "block_tokens": 0 if detail == "sequential" else "auto"}
    config = build_config(
        {
            "teacher": {"model": str(args.teacher), "precision": args.precision},
            "student": {"model": str(args.student)},
            "data": {"train": str(args.prompts), "max_prompt_tokens": args.prompt_tokens, "num_validation": 1},
            "rollout": rollout,
            "loss": {"scope": "all"},
            "train": {
                "per_device_train_batch_size": args.micro_batch, "max_steps": 1000,
                "gradient_accumulation_steps": args.sequences // args.micro_batch, "device": args.device,
            },
        }
    )  # fmt: skip
    trainer = make_trainer(config, folder / name.replace(" ", "-"))
    if name == "gkd generate":
        trainer.supply.roll_out = partial(roll_out_with_generate, trainer)  # type: ignore[method-assign]
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--precision", default="nf4")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--reuse", type=numbers, default=[1, 2, 4])
    parser.add_argument("--batch", type=int, default=8, help="rows decoded together")
    parser.add_argument("--sequences", type=int, default=16, help="of an optimizer step")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--decay-rate", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each row")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    names = ["switch sequential", "gkd generate"]
    names += [f"{method} {reuse}" for reuse in args.reuse for method in ("switch", "gkd")]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    parts: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        rows: dict[str, Any] = {name: make_row(args, Path(folder), name) for name in names}
        has_trl = importlib.util.find_spec("trl") is not None
        for name, settings in trl_settings(args).items() if has_trl else ():
            donor = make_row(args, Path(folder), f"gkd donor of {name}")
            rows[name], seconds[name] = TrlRow(donor, args, Path(folder), **settings), []
        gc.collect()
        gc.freeze()  # each collection of a step would look through the models of all rows; a run of its own has one
        settled = max(args.reuse) + 1
        for turn in range(settled + args.steps):
            for name, trainer in rows.items():
                reuse = trainer.config.rollout.reuse
                if turn < settled - reuse:
                    continue  # a row without reuse needs no filling of its buffer
                started = time.perf_counter()
                report = trainer.train_step()
                taken = time.perf_counter() - started
                trainer.counters.step += 1
                if turn >= settled:
                    seconds[name].append(taken / report.loss_tokens)
                    for part, value in report.seconds.items():
                        mine = parts.setdefault(name, {})
                        mine[part] = mine.get(part, 0.0) + value / report.loss_tokens / args.steps
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rivals = {name: value for name, value in medians.items() if name.startswith("trl")}
    result = {
        "benchmark": "step",
        "settings": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
        "pair": [args.teacher.name, args.student.name],
        "seconds_per_trained_token": medians,
        "times_gkd_generate": {name: value / medians["gkd generate"] for name, value in medians.items()},
        "times_gkd_same_reuse": {
            f"switch {r}": medians[f"switch {r}"] / medians[f"gkd {r}"] for r in args.reuse
        },
        "trl": version("trl") if has_trl else None,
        "switch_over_trl": {
            f"switch {r}": medians[f"switch {r}"] / min(rivals.values()) for r in args.reuse if rivals
        },
        "seconds_by_part": parts,
        "all": seconds,
    }  # fmt: skip
    publish(result, args.output, rows["gkd generate"].device.type)


if __name__ == "__main__":
    main()
