"""The cost model's constants are those of its committed measurement, and its order is that of the sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qswitch.plan import cost
from qswitch.plan.machine import GPUS, Machine
from qswitch.plan.scheduler import model_shapes
from qswitch.presets import load_run_config

RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "pass_times-cpu.json"
GPU = Machine("cuda", 2, 4)


def seconds(*overrides: str, machine: Machine = GPU) -> float:
    config = load_run_config("llama-7b-to-1b", list(overrides))
    return cost.step_seconds(config, *model_shapes(config), machine)


def test_the_constants_are_measured():
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert result["gpu"] == "not measured"
    assert pytest.approx(result["overhead_s_per_layer"], rel=0.05) == cost.PASS_OVERHEAD_S_PER_LAYER
    for adapter, ratio in cost.BACKWARD_OVER_FORWARD.items():
        assert ratio == pytest.approx(result["training"][adapter]["backward_over_forward"], rel=0.05)


def test_what_costs_time_costs_time():
    base = seconds()
    assert seconds("rollout.batch_size=1") > seconds("rollout.batch_size=4") > base
    assert seconds("rollout.max_new_tokens=512") > base
    assert seconds("student.gradient_checkpointing=false") < base
    assert seconds("teacher.residency=swap") > base
    assert seconds("loss.chunk_tokens=32") > base
    assert seconds(machine=Machine("cuda", 2, 4, GPUS["rtx4090-24gb"])) < base


def test_an_upload_is_shared_by_the_steps_of_a_round():
    def upload(round_steps: int) -> float:
        options = (f"rollout.round_steps={round_steps}", "rollout.batch_size=4")
        return seconds("teacher.residency=swap", *options) - seconds(*options)

    assert upload(4) == pytest.approx(upload(1) / 4, rel=1e-6)
    assert 0.2 < upload(1) < 0.4


def test_one_token_reads_the_packed_weight_and_several_unpack_it():
    teacher, _ = model_shapes(load_run_config("llama-7b-to-1b"))
    one, two, many = (cost.pass_seconds(teacher, "nf4", n, 0, GPU) for n in (1, 2, 64))
    assert two > 3 * one
    assert many == pytest.approx(two)  # still bound by memory
