"""Stage 6: where the time of rollouts and of a learning step goes, by operation, and how many kernels are launched."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.loading import load_pair, pair_config
from benchmarks.gpu.report import Context, Report
from qswitch.data.gather import load_prompts
from qswitch.distill.trainer import Trainer
from qswitch.models.language_model import LanguageModel
from qswitch.models.pair import load_pair_tokenizer
from qswitch.rollout.block_length import FixedBlock
from qswitch.rollout.decode import RolloutRequest, rollout
from qswitch.rollout.policy import SwitchPolicy, Threshold
from qswitch.run_dir import RunDir

SHOWN = 25
"""Operations of each table."""


def run(context: Context, report: Report) -> None:
    """Rollouts without and with drafts, then a learning step."""
    pair: list[LanguageModel] = []

    def load() -> dict[str, Any]:
        pair[:] = load_pair(context)
        return {}

    report.load("load", load)
    for drafts in (0, 3):
        report.measure(f"rollouts, {drafts} drafts", partial(rounds, context, pair, drafts))
    report.measure("learning step", partial(learning, context, pair))


def _tables(context: Context, profiler: Any, calls: int, name: str) -> dict[str, Any]:
    """The operations that take most on the device and on the host, milliseconds per call; the trace beside them."""
    events = profiler.key_averages()
    on_gpu = context.device.type == "cuda"

    def table(attribute: str) -> list[dict[str, Any]]:
        rows = sorted(events, key=lambda e: -getattr(e, attribute))[:SHOWN]
        return [{"name": e.key[:120], "ms": round(getattr(e, attribute) / 1e3 / calls, 4), "calls": e.count / calls}
                for e in rows if getattr(e, attribute)]  # fmt: skip

    if on_gpu:
        profiler.export_chrome_trace(str(context.output / f"trace-{name}.json.gz"))
    launches = sum(e.count for e in events if "LaunchKernel" in e.key)
    return {
        "launches_per_call": launches / calls,
        "graph_launches_per_call": sum(e.count for e in events if "GraphLaunch" in e.key) / calls,
        "waits_per_call": sum(e.count for e in events if "Synchronize" in e.key) / calls,
        "host": table("self_cpu_time_total"),
        "device": table("self_device_time_total") if on_gpu else [],
    }


def _profiled(context: Context) -> Any:
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (context.device.type == "cuda")
    return profile(activities=kinds)


def rounds(context: Context, pair: list[LanguageModel], drafts: int) -> dict[str, Any]:
    """A short call of eight rows, per round."""
    rows, new_tokens = (2, 4) if context.tiny else (8, 24)
    requests = [RolloutRequest(i, 0, [4 + (7 * i + j) % 500 for j in range(16)], new_tokens) for i in range(rows)]
    write = partial(
        rollout, requests, teacher=pair[0], student=pair[1], seed=0, temperature=1.0, eos_ids=(), pad_id=0,
        policy=SwitchPolicy(Threshold("exponential", 1.0, 0.1, 0.2, new_tokens)), batch_size=rows,
        keep="interventions", blocks=FixedBlock(drafts),
    )  # fmt: skip
    write()
    with _profiled(context) as profiler:
        _, stats = write()
        context.synchronise()
    return {"rounds": stats.rounds, **_tables(context, profiler, stats.rounds, f"rollout-{drafts}")}


def learning(context: Context, pair: list[LanguageModel]) -> dict[str, Any]:
    """Loss, backward pass and update over the interventions of one step."""
    tokens = 8 if context.tiny else 64
    config = pair_config(
        context, rollout={"max_new_tokens": tokens, "batch_size": 8, "block_tokens": 0}, loss={"scope": "all"},
        train={"device": context.device.type, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    )  # fmt: skip
    tokenizers = load_pair_tokenizer(config)
    _, prompts, held_out = load_prompts(config, tokenizers)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            config, RunDir.create(Path(folder) / "run", config), teacher=pair[0], student=pair[1], pair=tokenizers,
            prompts=prompts, validation_prompts=held_out,
        )  # fmt: skip
        trainer.train_step()
        written, _ = trainer.supply.roll_out(trainer.supply.loader.next(4))
        sequences = trainer.supply.cache_teacher(written)
        with _profiled(context) as profiler:
            learnt = trainer.learner.learn_step(sequences, 1)
            loss = None if learnt is None else learnt[0]
            trainer.learner.update(loss)
            context.synchronise()
    length = max(len(s.response_ids) for s in sequences)
    return {"loss": loss, "longest_response": length, **_tables(context, profiler, 1, "learning")}
