"""Stage 1: tiny pairs of every family in every precision, decoded and trained in all the ways that must not differ.

`decode FAMILY PRECISION` writes rollouts with the teacher resident, after it was away and came back, and with recorded
student passes. `train FAMILY PRECISION` runs whole trainings: resident, swapped, stopped and resumed, and with a memory
cap that the first sizes do not fit. `8-bit optimizer` trains with train.optimizer=paged_adamw_8bit, and resumes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.report import GIB, Context, Report
from qswitch.config import RunConfig
from qswitch.distill import recovery
from qswitch.distill.trainer import Trainer
from qswitch.errors import Interrupted, ModelError
from qswitch.layers import build_config
from qswitch.models.host_memory import release_memory
from qswitch.models.load import load_teacher
from qswitch.models.residency import SwappedModel
from qswitch.models.runtime import make_runtime
from qswitch.models.student import load_student
from qswitch.rollout.block_length import FixedBlock
from qswitch.rollout.decode import Rollout, RolloutRequest, RolloutStats, rollout
from qswitch.rollout.policy import SwitchPolicy, Threshold
from qswitch.rollout.step_graph import StepGraphs
from qswitch.run import distill, resume
from qswitch.run_dir import RunDir
from tests.families import CHANGES
from tests.tiny import save_tiny_pair

TABLE_FAMILIES = ("llama", "gpt2", "opt", "qwen2", "mistral", "gemma2", "qwen3", "phi3", "gemma3", "cohere", "granite")
PRECISIONS = ("nf4", "int8", "bf16")
TRAINED = (("llama", "nf4"), ("llama", "bf16"), ("qwen3", "nf4"), ("gemma3", "nf4"), ("qwen3_5_text", "bf16"))
NEW_TOKENS = 12
PAGED_RANK = 2048
"""At the width of the tiny pairs, 64, adapters of which bitsandbytes pages the state: it does from 100,000 on."""


def run(context: Context, report: Report) -> None:
    """A training and the paged optimizer, every family in NF4, the other trainings, then the other precisions."""
    pairs = TRAINED[:1] if context.tiny else TRAINED
    trained = [
        (f"train {family} {precision}", partial(train, context, family, precision)) for family, precision in pairs
    ]
    report.measure(*trained[0])
    report.measure("8-bit optimizer", partial(eight_bit_optimizer, context))
    families = ("llama", "gemma3", "qwen3_5_text") if context.tiny else (*TABLE_FAMILIES, *CHANGES)
    first, *others = PRECISIONS
    for family in families:
        report.measure(f"decode {family} {first}", partial(decode, context, family, first))
    for name, run_it in trained[1:]:
        report.measure(name, run_it)
    for precision in others[-1:] if context.tiny else others:
        for family in families[:1] if context.tiny else families:
            report.measure(f"decode {family} {precision}", partial(decode, context, family, precision))


def settings(context: Context, folder: Path, family: str, precision: str, **rollout_settings: Any) -> RunConfig:
    """A run of a few steps of a tiny pair, which is made in `folder` the first time."""
    if not (folder / "student").exists():
        save_tiny_pair(folder, family)
        lines = [{"prompt": "tell me about " + "abcdefghij"[i % 10] * (1 + i % 7), "response": f"it is {i}"}
                 for i in range(30)]  # fmt: skip
        (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return build_config(
        {
            "teacher": {"model": str(folder / "teacher"), "precision": precision},
            "student": {"model": str(folder / "student"), "lora": {"r": 4, "alpha": 8}},
            "data": {"train": str(folder / "data.jsonl"), "num_validation": 4},
            "rollout": {"max_new_tokens": NEW_TOKENS, "batch_size": 4, "block_tokens": 2, **rollout_settings},
            "train": {"max_steps": 2 if context.tiny else 4, "per_device_train_batch_size": 2,
                      "gradient_accumulation_steps": 2 if context.tiny else 4, "eval_steps": 2, "save_steps": 2,
                      "device": context.device.type},
        }
    )  # fmt: skip


def decode(context: Context, family: str, precision: str) -> dict[str, Any]:
    """Rollouts with the teacher resident, come back, and with recorded student passes: the same tokens."""
    with tempfile.TemporaryDirectory() as name:
        config = settings(context, Path(name), family, precision)
        runtime = make_runtime(config.train)
        try:
            teacher = load_teacher(config.teacher, runtime)
            student = load_student(config, runtime, vocab_size=None, base_path=None)
        except ModelError as error:
            return {"refused": str(error)[:300]}  # int8, and widths that NF4 cannot block
    requests = [RolloutRequest(i, 0, [4 + (5 * i + j) % 60 for j in range(3 + i % 5)], NEW_TOKENS) for i in range(10)]

    def write(graphs: StepGraphs | None = None) -> tuple[list[Rollout], RolloutStats]:
        return rollout(
            requests, teacher=teacher, student=student, seed=1, temperature=1.0, eos_ids=[2], pad_id=0, batch_size=4,
            policy=SwitchPolicy(Threshold("exponential", 1.0, 0.1, 0.2, NEW_TOKENS)), keep="interventions",
            blocks=FixedBlock(2), student_graphs=graphs,
        )  # fmt: skip

    resident, stats = write()
    swapped = SwappedModel(teacher)
    swapped.leave()
    swapped.come_back()
    come_back = compare(resident, write()[0])
    found = {"come_back": come_back, "rounds": stats.rounds, "teacher_bytes": swapped.num_bytes}
    if come_back["same_responses"] != len(requests):
        raise AssertionError(f"a teacher that came back writes otherwise: {come_back}")
    if context.device.type == "cuda":
        graphs = StepGraphs(student)
        written, stats = write(graphs)
        found["graphs"] = {**compare(resident, written), "replays": stats.student_replays, "failure": graphs.failure}
    return found


def compare(expected: list[Rollout], found: list[Rollout]) -> dict[str, Any]:
    """How many responses are the same token for token, of how many; rounding may turn a near tie."""
    same = sum(a.response_ids == b.response_ids for a, b in zip(expected, found, strict=True))
    return {"responses": len(expected), "same_responses": same}


def train(context: Context, family: str, precision: str) -> dict[str, Any]:
    """A run in several ways; of each, whether it wrote the same first rollouts, and how far its adapter is off."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = settings(context, folder, family, precision)
        distill(config, folder / "resident")
        found: dict[str, Any] = {}
        swap = config.model_copy(update={"teacher": config.teacher.model_copy(update={"residency": "swap"})})
        distill(swap, folder / "swap")
        _stopped_and_resumed(config, folder / "resumed")
        ways = ["swap", "resumed"]
        if not context.tiny:  # what the device itself does not repeat
            distill(config, folder / "again")
            ways.append("again")
        for way in ways:
            found[way] = _difference(folder / "resident", folder / way)
        if context.device.type == "cuda":
            try:
                found["capped"] = _capped(context, folder, family, precision)
            except Exception as error:  # the other ways stand
                found["capped"] = {"error": f"{type(error).__name__}: {error}"[:2000]}
        differing = [way for way in ways if not found[way]["same_first_rollouts"]]
        if differing:
            raise AssertionError(f"{', '.join(differing)}: other tokens in the first step ({found})")
        return found


def eight_bit_optimizer(context: Context) -> dict[str, Any]:
    """A run with the paged optimizer, whole, and stopped and resumed; how much of its state was paged."""
    context.needs_gpu()
    from bitsandbytes.functional import GlobalPageManager

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = settings(context, folder, "llama", "nf4")
        wide = config.student.lora.model_copy(update={"r": PAGED_RANK})
        config = config.model_copy(
            update={
                "student": config.student.model_copy(update={"lora": wide}),
                "train": config.train.model_copy(update={"optimizer": "paged_adamw_8bit", "eval_own_prompts": 0}),
            }
        )
        paged = GlobalPageManager.get_instance().paged_tensors
        before = len(paged)
        distill(config, folder / "whole")
        paged_bytes = sum(tensor.nbytes for tensor in paged[before:])
        if not paged_bytes:
            raise AssertionError("no state was paged")
        _stopped_and_resumed(config, folder / "resumed")
        found = {"paged_bytes": paged_bytes, "resumed": _difference(folder / "whole", folder / "resumed")}
    if not found["resumed"]["same_first_rollouts"]:
        raise AssertionError(f"other tokens in the first step ({found})")
    return found


def _stopped_and_resumed(config: RunConfig, path: Path) -> None:
    original = Trainer.train_step

    def stop_after_one(trainer: Trainer) -> Any:
        trainer.stop_requested = trainer.stop_requested or trainer.step == 0
        return original(trainer)

    try:
        with mock.patch.object(Trainer, "train_step", stop_after_one):
            distill(config, path)
    except Interrupted:
        resume(path)
        return
    raise AssertionError("the run was not stopped")


def _difference(expected: Path, found: Path) -> dict[str, Any]:
    """Between two runs: rollouts of the first step, and the adapters' largest difference."""
    from safetensors.torch import load_file

    a, b = (load_file(p / "adapter" / "adapter_model.safetensors") for p in (expected, found))
    largest = max((a[k].double() - b[k].double()).abs().max().item() for k in a)
    firsts = [[r["response"] for r in RunDir.open(p).read_rollouts() if r["step"] == 1] for p in (expected, found)]
    return {"same_first_rollouts": firsts[0] == firsts[1] != [], "largest_adapter_difference": largest}


def _capped(context: Context, folder: Path, family: str, precision: str) -> dict[str, Any]:
    """A run whose first sizes do not fit: what ran out, and whether the first rollouts are the same."""
    shutil.rmtree(folder / "wide", ignore_errors=True)
    wide = settings(context, folder, family, precision, batch_size=8, block_tokens=16)
    summary = distill(wide, folder / "wide")
    release_memory(context.device)
    before = torch.cuda.memory_reserved(context.device)  # with the workspaces that stay for good
    peak = max(figures["reserved"] for figures in summary.phases_gib.values()) * GIB
    total = torch.cuda.get_device_properties(context.device).total_memory

    def cap(*_: Any) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((before + 0.6 * (peak - before)) / total, context.device)

    try:
        with mock.patch.object(recovery, "limit_device_memory", cap):
            distill(wide, folder / "capped")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, context.device)
    events = [e for line in RunDir.open(folder / "capped").read_metrics() for e in line.get("out_of_memory", [])]
    return {"uncapped_gib": peak / GIB, "events": events, **_difference(folder / "wide", folder / "capped")}
