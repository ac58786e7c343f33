"""Stage 4: tokens a second of rollouts by rows and blocks, against `generate`; optimizer steps against TRL's.

The pair is random, so nearly no draft stands: `tokens_per_s` with drafts is a lower bound, and what a round costs is in
`round_ms`. Steps of whole trainers are compared by `benchmarks.step`, on the same pair and prompts, with TRL's
DistillationTrainer where trl is installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.loading import load_pair
from benchmarks.gpu.random_models import model_folder, prompts_file
from benchmarks.gpu.report import Context, Report
from qswitch.models.language_model import LanguageModel
from qswitch.rollout.block_length import FixedBlock
from qswitch.rollout.decode import RolloutRequest, inference, rollout
from qswitch.rollout.policy import Policy, StudentPolicy, SwitchPolicy, Threshold
from qswitch.rollout.step_graph import StepGraphs

ROWS = (8, 32)
DRAFTS = (0, 2, 4)


def run(context: Context, report: Report) -> None:
    """Rollouts, `generate`, then steps of whole trainers in a process of its own."""
    pair: list[LanguageModel] = []

    def load() -> dict[str, Any]:
        pair[:] = load_pair(context)
        return {}

    report.load("load", load)
    for rows in (2,) if context.tiny else ROWS:
        for drafts in DRAFTS[:2] if context.tiny else DRAFTS:
            for recorded in (False, True):
                name = f"switch, {rows} rows, {drafts} drafts{', recorded' * recorded}"
                report.measure(name, partial(written, context, pair, _switch(), rows, drafts, recorded))
        for recorded in (False, True):
            name = f"student alone, {rows} rows{', recorded' * recorded}"
            report.measure(name, partial(written, context, pair, StudentPolicy(), rows, 0, recorded))
        for role, index in (("student", 1), ("teacher", 0)):
            report.measure(f"generate, {role}, {rows} rows", partial(generated, context, pair, index, rows))
    pair.clear()
    report.measure("steps", partial(steps, context, report))


def _switch() -> Policy:
    return SwitchPolicy(Threshold("exponential", 1.0, 0.1, 0.2, 128))


def _prompts(context: Context, rows: int) -> list[list[int]]:
    length = 12 if context.tiny else 128
    return [[4 + (7 * i + j) % 500 for j in range(length)] for i in range(rows)]


def written(
    context: Context, pair: list[LanguageModel], policy: Policy, rows: int, drafts: int, recorded: bool
) -> dict[str, Any]:
    """One batch of responses to the limit by our engine."""
    if recorded:
        context.needs_gpu()
    new_tokens = 8 if context.tiny else 128
    requests = [RolloutRequest(i, 0, ids, new_tokens) for i, ids in enumerate(_prompts(context, rows))]
    graphs = StepGraphs(pair[1]) if recorded else None
    _, stats = rollout(
        requests, teacher=pair[0], student=pair[1], policy=policy, seed=0, temperature=1.0, eos_ids=(), pad_id=0,
        batch_size=rows, keep="nothing", blocks=FixedBlock(drafts), student_graphs=graphs,
    )  # fmt: skip
    return {
        "tokens": stats.tokens,
        "rollout_seconds": round(stats.seconds, 3),
        "tokens_per_s": round(stats.tokens / stats.seconds, 1),
        "round_ms": round(1e3 * stats.seconds / stats.rounds, 2),
        "rounds": stats.rounds,
        "kept_draft_share": stats.kept_draft_share,
        "replays": stats.student_replays,
        "failure": graphs.failure if graphs is not None else None,
    }


@torch.no_grad()
def generated(context: Context, pair: list[LanguageModel], index: int, rows: int) -> dict[str, Any]:
    """The same number of tokens by transformers' `generate` of one of the pair, sampled."""
    model = pair[index]
    new_tokens = 8 if context.tiny else 128
    ids = torch.tensor(_prompts(context, rows), device=context.device)
    with inference(model):
        context.synchronise()
        started = time.perf_counter()
        out = model.hf.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
                                min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0)  # fmt: skip
        context.synchronise()
        seconds = time.perf_counter() - started
    tokens = rows * (out.shape[1] - ids.shape[1])
    return {"tokens": tokens, "generate_seconds": round(seconds, 3), "tokens_per_s": round(tokens / seconds, 1)}


def steps(context: Context, report: Report) -> dict[str, Any]:
    """Seconds per trained token of SWITCH, of GKD and of TRL's trainer."""
    output = context.output / "step.json"
    command = [
        sys.executable, "-m", "benchmarks.step", "--teacher", str(model_folder(context, "teacher-7b")),
        "--student", str(model_folder(context, "student-1.1b")), "--prompts", str(prompts_file(context)),
        "--device", context.device.type, "--output", str(output), "--steps", "1" if context.tiny else "2",
    ]  # fmt: skip
    if context.tiny:
        command += ["--sequences", "2", "--micro-batch", "2", "--batch", "2", "--new-tokens", "6", "--reuse", "1"]
    else:
        command += ["--reuse", "1,4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(report.seconds_left, 60))
    if done.returncode:
        raise RuntimeError(f"benchmarks.step ended with {done.returncode}: {done.stderr[-1500:]}")
    values = json.loads(output.read_text(encoding="utf-8"))
    return {name: values[name] for name in ("seconds_per_trained_token", "trl", "seconds_by_part")}
