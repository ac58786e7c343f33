"""What does the block engine save against single steps, and are its rollouts the same?

    python -m benchmarks.rollout passes   --teacher DIR --student DIR --prompts FILE.jsonl   # teacher passes per token
    python -m benchmarks.rollout time     --teacher DIR --student DIR --prompts FILE.jsonl   # seconds per token, paired
    python -m benchmarks.rollout simulate --teacher DIR --student DIR --prompts FILE.jsonl   # by the times of a plan
    python -m benchmarks.rollout rounding --teacher DIR --student DIR --prompts FILE.jsonl   # same tokens in floats?
    python -m benchmarks.rollout assisted --teacher DIR --student DIR --prompts FILE.jsonl   # against transformers
    python -m benchmarks.rollout graphs   --teacher DIR --student DIR --prompts FILE.jsonl   # CUDA graphs, on a GPU

Any pair with one tokenizer will do; `--precision`, `--dtype`, `--batch`, `--decay`, `--new-tokens` choose the work.
Each part prints its JSON, and writes it to `--output`. Times are medians of paired repetitions in one process: both
sides take turns on the same prompts, so a noisy machine disturbs both. Teacher passes are counts and need no quiet.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.planned_pass_times import planned_pass_times
from benchmarks.provenance import publish
from qswitch.data.records import load_records
from qswitch.data.template import PromptEncoder
from qswitch.layers import build_config
from qswitch.models.load import load_teacher
from qswitch.models.pair import TokenizerPair, load_pair_tokenizer, template_tokenizer
from qswitch.models.runtime import make_runtime
from qswitch.models.student import load_student
from qswitch.rollout.block_length import (
    MAX_BLOCK_TOKENS,
    TEACHER_ONLY,
    Acceptance,
    AutoBlock,
    FixedBlock,
    PassTimes,
    RowsAhead,
    drafts_within_scratch,
)
from qswitch.rollout.decode import Rollout, RolloutRequest, RolloutStats, inference, rollout
from qswitch.rollout.graph_trial import try_graphs
from qswitch.rollout.pass_times import measure_pass_times
from qswitch.rollout.policy import TEACHER, StudentPolicy, SwitchPolicy, Threshold
from qswitch.rollout.step_graph import StepGraphs


class Bench:
    """A pair, its prompts, and one way to write rollouts with it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        config = build_config(
            {
                "teacher": {"model": str(args.teacher), "precision": args.precision},
                "student": {"model": str(args.student), "lora": {"r": args.lora_rank}},
                "data": {"train": str(args.prompts), "max_prompt_tokens": args.prompt_tokens},
                "rollout": {"max_new_tokens": args.new_tokens},
                "train": {"compute_dtype": args.dtype, "device": args.device},
            }
        )
        self.pair: TokenizerPair = load_pair_tokenizer(config)
        encoder = PromptEncoder(template_tokenizer(self.pair, "teacher"), "teacher", end_token_ids=self.pair.eos_ids)
        records = load_records(config.data, config.data.train, limit=4 * args.num_prompts + 64)
        prompts = (p.prompt_ids for p in encoder.encode_batch(records))
        self.prompts = [ids for ids in prompts if len(ids) <= args.prompt_tokens][: args.num_prompts]
        runtime = make_runtime(config.train)
        self.teacher = load_teacher(config.teacher, runtime, vocab_size=self.pair.vocab_size)
        self.student = load_student(config, runtime, vocab_size=self.pair.vocab_size, base_path=None)
        self.student.eval()
        self.device = runtime.device

    def requests(self, num: int | None = None, visit: int = 0) -> list[RolloutRequest]:
        prompts = self.prompts[:num]
        return [RolloutRequest(i, visit, ids, self.args.new_tokens) for i, ids in enumerate(prompts)]

    def write(
        self,
        decay_rate: float,
        batch_size: int,
        blocks: Any,
        *,
        num: int | None = None,
        seed: int = 0,
        to_the_limit: bool = False,
    ) -> tuple[list[Rollout], RolloutStats]:
        policy = SwitchPolicy(Threshold("exponential", 1.0, decay_rate, 0.2, self.args.new_tokens))
        return rollout(
            self.requests(num), teacher=self.teacher, student=self.student, policy=policy, seed=seed, temperature=1.0,
            eos_ids=() if to_the_limit else self.pair.eos_ids, pad_id=self.pair.pad_id, batch_size=batch_size,
            keep="interventions", blocks=blocks,
        )  # fmt: skip


class AskAlways(FixedBlock):
    """Single steps that ask the student in the tail too, where it decides nothing, to learn whether it would agree."""

    def choose(self, rows: RowsAhead) -> int:
        return 0


def rounds_by_agreement(agrees: list[bool], num_drafts: int) -> int:
    """Rounds that one response takes when each draft stands or falls as it did in a sequential run."""
    rounds, t = 0, 0
    while t < len(agrees):
        rounds += 1
        for _ in range(num_drafts):
            if t + 1 >= len(agrees) or not agrees[t]:
                break
            t += 1
        t += 1
    return rounds


def expected_rounds(rates: np.ndarray, lengths: list[int], num_drafts: int) -> float:
    """Rounds per token when drafts stand independently with the rate of their position: a chain over positions."""
    total = 0.0
    for length in lengths:
        reach = np.zeros(length + 1)
        reach[0] = 1.0
        for t in range(length):
            stand = reach[t]
            total += reach[t]
            for j in range(num_drafts + 1):
                last = t + j
                if last >= length or j == num_drafts:
                    if last < length:
                        reach[last + 1] += stand
                    break
                kept = rates[last]
                reach[last + 1] += stand * (1 - kept)
                stand *= kept
    return total / sum(lengths)


def agreement_by_step(agreements: list[list[bool]], num_steps: int) -> np.ndarray:
    """Share of responses in which both writers would write the same, by step [num_steps].

    Steps that no response reached take the mean of the last sixteen that one did.
    """
    longest = max(map(len, agreements))
    rates = np.array([np.mean([a[t] for a in agreements if len(a) > t]) for t in range(longest)])
    return np.concatenate([rates, np.full(num_steps - longest, rates[-16:].mean())])


def passes(bench: Bench) -> dict[str, Any]:
    """Row passes of the teacher per token, prefill apart, against the prediction from an independent sequential run."""
    cells = []
    num_drafts = bench.args.drafts
    for decay in bench.args.decay:
        independent, _ = bench.write(1 / decay, max(bench.args.batch), AskAlways(0), seed=1)
        for batch in bench.args.batch:
            num = bench.args.solo_prompts if batch == 1 else None
            # Of the same prompts: prompts differ more than the noise of one does.
            agreements = [r.student_agrees or [] for r in independent[:num]]
            predicted_by_rows = sum(rounds_by_agreement(a, num_drafts) for a in agreements) / sum(map(len, agreements))
            rates = agreement_by_step(agreements, bench.args.new_tokens)
            written, stats = bench.write(1 / decay, batch, FixedBlock(num_drafts), seed=0, num=num)
            measured = stats.by_row_passes["teacher"] / stats.tokens
            predicted = expected_rounds(rates, [len(r.response_ids) for r in written], num_drafts)
            intervened = [
                (a, w) for r in written for a, w in zip(r.student_agrees or [], r.writers, strict=True) if w == TEACHER
            ]
            cells.append(
                {
                    "decay_rate": f"1/{decay}", "batch": batch, "drafts": num_drafts, "tokens": stats.tokens,
                    "teacher_row_passes_per_token": measured,
                    "predicted_by_position": predicted,
                    "measured_over_predicted": measured / predicted,
                    "predicted_by_sequences": predicted_by_rows,
                    "teacher_share": sum(w == TEACHER for r in written for w in r.writers) / stats.tokens,
                    "kept_of_intervened": sum(a for a, _ in intervened) / max(len(intervened), 1),
                    "kept_draft_share": stats.kept_draft_share,
                    "max_hole_share": stats.max_hole_share,
                    "mean_jsd_bits": mean_jsd(written),
                }
            )  # fmt: skip
            print(json.dumps(cells[-1]), flush=True)
    return {"cells": cells}


def mean_jsd(written: list[Rollout]) -> float:
    values = [j for r in written for j in r.jsd_bits or [] if j is not None]
    return sum(values) / len(values)


def timed(bench: Bench) -> dict[str, Any]:
    """Seconds per token of the automatic block length over those of single steps, paired medians.

    No token ends a response here, so that both sides write equally many tokens with equally many rows at all times:
    rounding lets responses part, and a few that end elsewhere would say more than the block length does.
    """
    cells = []
    for batch in bench.args.batch:
        if bench.args.pass_times:
            times = PassTimes.from_dict(json.loads(Path(bench.args.pass_times).read_text()))
        else:
            times = measure_pass_times(bench.teacher, bench.student, batch)
        for decay in bench.args.decay:
            auto = AutoBlock(times, Acceptance(), drafts_within_scratch(batch, bench.pair.vocab_size))
            num = min(len(bench.prompts), bench.args.prompts_per_row * batch)
            # Warms the machine and the acceptance counts.
            bench.write(1 / decay, batch, auto, num=num, to_the_limit=True)
            ratios, sequential, drafts = [], [], {}
            for repeat in range(bench.args.repeats):
                seconds = {}
                for name in ("auto", "sequential") if repeat % 2 else ("sequential", "auto"):
                    blocks = auto if name == "auto" else FixedBlock(0)
                    _, stats = bench.write(1 / decay, batch, blocks, num=num, seed=repeat, to_the_limit=True)
                    seconds[name] = stats.seconds / stats.tokens
                    if name == "auto":
                        drafts = stats.rounds_by_drafts
                ratios.append(seconds["sequential"] / seconds["auto"])
                sequential.append(seconds["sequential"])
            cells.append(
                {
                    "batch": batch, "decay_rate": f"1/{decay}", "prompts": num,
                    "speed_of_auto_over_sequential": statistics.median(ratios), "ratios": ratios,
                    "sequential_seconds_per_token": statistics.median(sequential),
                    "rounds_by_drafts_last": drafts,
                }
            )  # fmt: skip
            print(json.dumps(cells[-1]), flush=True)
        cells[-1]["pass_times"] = times.to_dict()
    return {"cells": cells}


def simulate(bench: Bench) -> dict[str, Any]:
    """What `auto` would gain where passes take other times: real agreement of the writers, planned times of passes.

    A rollout's tokens do not depend on the block length, so from where the student agreed in one run every round of any
    other block length follows; only the seconds are the table's.
    """
    args = bench.args
    tables = [planned_pass_times(args.preset, args.gpu, recorded=recorded) for recorded in (False, True)]
    cells: list[dict[str, Any]] = []
    for decay in args.decay:
        written, _ = bench.write(1 / decay, max(args.batch), AskAlways(0))
        agreements = [np.array(r.student_agrees, dtype=bool) for r in written]
        tail = SwitchPolicy(Threshold("exponential", 1.0, 1 / decay, 0.2, args.new_tokens)).tail_start
        for times, batch in itertools.product(tables, args.batch):
            replay = partial(replayed_seconds, agreements, batch, times=times, tail=tail, limit=args.new_tokens)
            blocks = AutoBlock(times, Acceptance())
            replay(blocks)  # warm
            auto, single = replay(blocks), replay(FixedBlock(0))
            cells.append(
                {"passes": times.device, "batch": batch, "decay_rate": f"1/{decay}",
                 "speed_of_auto_over_sequential": single / auto, "seconds_per_token_auto": auto,
                 "seconds_per_token_sequential": single}
            )  # fmt: skip
            print(json.dumps(cells[-1]), flush=True)
    return {"preset": args.preset, "tables": [times.to_dict() for times in tables], "cells": cells}


def replayed_seconds(
    agreements: list[np.ndarray], batch: int, blocks: Any, times: PassTimes, tail: float, limit: int
) -> float:
    """Seconds per token by the table, when the given responses are written again in blocks and rows are refilled."""
    waiting = list(agreements)
    rows: list[list[Any]] = []  # [agreement, next step, left by the student]
    seconds = 0.0
    while waiting or rows:
        while waiting and len(rows) < batch:
            rows.append([waiting.pop(), 0, False])
        steps = np.array([row[1] for row in rows])
        ahead = RowsAhead(
            steps, limit - steps, np.array([not row[2] for row in rows]), student_needed=bool((steps < tail).any())
        )
        drafts = blocks.choose(ahead)
        seconds += float(times.teacher_seconds(len(rows), np.array([max(drafts, 0) + 1.0]))[0])
        seconds += (drafts + 1) * times.student_seconds(len(rows))
        for row in rows:
            agrees, start = row[0], row[1]
            end = start + 1
            while end < len(agrees) and end - start <= drafts and agrees[end - 1] and not row[2]:
                end += 1
            if drafts != TEACHER_ONLY and not row[2]:
                blocks.count(np.arange(start, end), agrees[start:end])
            row[1], row[2] = end, row[2] or drafts == TEACHER_ONLY
        rows = [row for row in rows if row[1] < len(row[0])]
    return seconds / sum(map(len, agreements))


def rounding(bench: Bench) -> dict[str, Any]:
    """How many rollouts and tokens differ between single steps and blocks of 4, because passes round differently."""
    decay, batch = bench.args.decay[0], max(bench.args.batch)
    single, _ = bench.write(1 / decay, batch, FixedBlock(0))
    block, _ = bench.write(1 / decay, batch, FixedBlock(bench.args.drafts))
    same_until = [
        next((t for t, (a, b) in enumerate(zip(x.response_ids, y.response_ids, strict=False)) if a != b), None)
        for x, y in zip(single, block, strict=True)
    ]
    differing = [
        t
        if t is not None
        else (min(len(x.response_ids), len(y.response_ids)) if x.response_ids != y.response_ids else None)
        for t, x, y in zip(same_until, single, block, strict=True)
    ]
    tokens = sum(len(r.response_ids) for r in single)
    read_until_difference = sum(
        len(r.response_ids) if t is None else t + 1 for t, r in zip(differing, single, strict=True)
    )
    num_differing = sum(t is not None for t in differing)

    def shares(written: list[Rollout], edges: list[int]) -> list[dict[str, Any]]:
        found = []
        for low, high in itertools.pairwise(edges):
            writers = [[float(w == TEACHER) for w in r.writers[low:high]] for r in written]
            jsd = [[j for j in (r.jsd_bits or [])[low:high] if j is not None] for r in written]
            share, share_error = clustered_mean(writers)
            bits, bits_error = clustered_mean(jsd)
            if share is not None and bits is not None:
                found.append(
                    {
                        "steps": f"{low}-{high - 1}", "tokens": sum(map(len, writers)), "teacher_share": share,
                        "teacher_share_error": share_error, "jsd_bits": bits, "jsd_error": bits_error,
                    }
                )  # fmt: skip
        return found

    edges = [0, 4, 8, 16, 32, 64, 128, 256]
    # Independent noise for the comparison of distributions: the same noise would agree for the wrong reason.
    other, _ = bench.write(1 / decay, batch, FixedBlock(bench.args.drafts), seed=2)
    by_position = [
        {
            "steps": a["steps"], "sequential": a, "speculative": b,
            "teacher_share_sigmas": abs(a["teacher_share"] - b["teacher_share"])
            / max((a["teacher_share_error"] ** 2 + b["teacher_share_error"] ** 2) ** 0.5, 1e-12),
            "jsd_sigmas": abs(a["jsd_bits"] - b["jsd_bits"]) / (a["jsd_error"] ** 2 + b["jsd_error"] ** 2) ** 0.5,
        }
        for a, b in zip(shares(single, edges), shares(other, edges), strict=False)
    ]  # fmt: skip
    return {
        "rollouts": len(single), "tokens": tokens, "drafts": bench.args.drafts, "decay_rate": f"1/{decay}",
        "rollouts_that_differ": num_differing / len(single),
        "first_differences_per_token": num_differing / read_until_difference,
        "by_position": by_position,
    }  # fmt: skip


def clustered_mean(values: list[list[float]]) -> tuple[float | None, float]:
    """Mean over the tokens of all responses, and its standard error; the tokens of a response hang together."""
    num = sum(map(len, values))
    if num < 2:
        return None, 0.0
    mean = sum(map(sum, values)) / num
    return mean, sum((sum(v) - mean * len(v)) ** 2 for v in values) ** 0.5 / num


def assisted(bench: Bench) -> dict[str, Any]:
    """Yardsticks of decoding, batch 1: the teacher alone, and transformers' assisted generation by the student."""
    results: dict[str, list[float]] = {
        "teacher alone": [],
        "assisted": [],
        "switch, auto": [],
        "switch, sequential": [],
    }
    auto = AutoBlock(measure_pass_times(bench.teacher, bench.student, 1), Acceptance())
    decay = bench.args.decay[0]

    def generate(**extra: Any) -> float:
        tokens, started = 0, time.perf_counter()
        with inference(bench.teacher, bench.student):
            for i, ids in enumerate(bench.prompts):
                torch.manual_seed(i)
                prompt = torch.tensor([ids], device=bench.device)
                out = bench.teacher.hf.generate(
                    prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, top_p=1.0,
                    max_new_tokens=bench.args.new_tokens, pad_token_id=bench.pair.pad_id, **extra,
                )  # fmt: skip
                tokens += out.shape[1] - prompt.shape[1]
        return (time.perf_counter() - started) / tokens

    for _ in range(bench.args.repeats):
        results["teacher alone"].append(generate())
        results["assisted"].append(generate(assistant_model=bench.student.causal_model))
        for name, blocks in (("switch, auto", auto), ("switch, sequential", FixedBlock(0))):
            _, stats = bench.write(1 / decay, 1, blocks)
            results[name].append(stats.seconds / stats.tokens)
    return {"seconds_per_token": {k: statistics.median(v) for k, v in results.items()}, "all": results}


def graphs(bench: Bench) -> dict[str, Any]:
    """Student passes of one token per row, as usual and replayed, and whole rollouts of the student with either."""
    cells = []
    for batch in bench.args.batch:
        trial = try_graphs(bench.student, batch, repeats=8 * bench.args.repeats)
        seconds: dict[str, list[float]] = {"usual": [], "replayed": []}
        for _ in range(bench.args.repeats if trial.used else 0):
            for side, made in (("usual", None), ("replayed", StepGraphs(bench.student))):
                _, stats = rollout(
                    bench.requests(batch * bench.args.prompts_per_row), teacher=None, student=bench.student,
                    policy=StudentPolicy(), seed=0, temperature=1.0, eos_ids=(), pad_id=bench.pair.pad_id,
                    batch_size=batch, keep="nothing", student_graphs=made,
                )  # fmt: skip
                seconds[side].append(stats.seconds / stats.tokens)
        cells.append({"batch": batch, "trial": trial.to_dict(), "seconds_per_token": seconds})
    return {"cells": cells}


def numbers(text: str) -> list[int]:
    """1,4,8 -> [1, 4, 8]."""
    return [int(part) for part in text.split(",")]


PARTS = {"passes": passes, "simulate": simulate, "time": timed, "rounding": rounding, "assisted": assisted,
         "graphs": graphs}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="any file that qswitch reads")
    parser.add_argument("--precision", default="nf4", help="of the teacher")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp32", "fp64"))
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--batch", type=numbers, default=[1, 4, 8])
    parser.add_argument("--decay", type=numbers, default=[5, 10, 25], help="inverse decay rates")
    parser.add_argument(
        "--drafts", type=int, default=4, help=f"fixed block length, at most {MAX_BLOCK_TOKENS} makes sense"
    )
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--solo-prompts", type=int, help="part passes: prompts at batch 1, by default all")
    parser.add_argument(
        "--prompts-per-row", type=int, default=2, help="part time: prompts of a batch of B are B times this"
    )
    parser.add_argument("--pass-times", type=Path, help="part time: a pass_times.json instead of measuring")
    parser.add_argument("--preset", default="llama-7b-to-1b", help="part simulate: whose models' times")
    parser.add_argument("--gpu", default="rtx3060-12gb", help="part simulate: on which card, as `qswitch plan --gpu`")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    bench = Bench(args)
    result = {
        "benchmark": f"rollout {args.part}",
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()
                     if k not in ("output", "teacher", "student", "prompts")},
        "pair": [args.teacher.name, args.student.name],
        **PARTS[args.part](bench),
    }  # fmt: skip
    publish(result, args.output, bench.device.type)


if __name__ == "__main__":
    main()
