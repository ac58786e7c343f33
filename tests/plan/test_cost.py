"""The cost model's constants are those of its committed measurement, and its order is that of the sizes."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import pytest

from qswitch.plan import cost
from qswitch.plan.machine import GPUS, Machine
from qswitch.plan.scheduler import model_shapes
from qswitch.plan.shapes import LinearShape
from qswitch.presets import load_run_config

RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "pass_times-cpu.json"
GPU = Machine("cuda", "bf16")


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
    assert seconds(machine=Machine("cuda", "bf16", GPUS["rtx4090-24gb"])) < base


def test_an_upload_is_shared_by_the_steps_of_a_round():
    def upload(steps_at_once: int) -> float:
        options = (f"rollout.steps_at_once={steps_at_once}", "rollout.batch_size=4")
        return seconds("teacher.residency=swap", *options) - seconds(*options)

    assert upload(4) == pytest.approx(upload(1) / 4, rel=1e-6)
    assert 0.2 < upload(1) < 0.4


def test_as_many_tokens_as_bitsandbytes_fuses_cost_one_reading_of_the_packed_weight():
    teacher, _ = model_shapes(load_run_config("llama-7b-to-1b"))
    one, eight, many = (cost.pass_seconds(teacher, "nf4", n, 0, GPU) for n in (1, 8, 512))
    assert one == pytest.approx(eight), "bound by memory"
    assert many > 3 * one, "the weight is unpacked first"


def test_the_thresholds_are_those_of_the_installed_bitsandbytes(monkeypatch):
    import torch

    # A build of torch without CUDA lacks what the module looks up while it is imported; nothing here calls it.
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", None, raising=False)
    from bitsandbytes.backends.cuda import ops

    decide = ops._gemm_4bit_use_custom_cuda.__wrapped__
    widths, tokens = (
        (64, 576, 1024, 2048, 4096, 5632, 11008, 14336),
        (1, 4, 5, 7, 8, 9, 12, 16, 17, 33, 65, 129, 257, 321),
    )
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for name, gpu in GPUS.items():
        monkeypatch.setattr(ops, "_gpu_dispatch_props", lambda _, gpu=gpu: (gpu.num_multiprocessors, *gpu.capability))
        for inputs, outputs, num, dtype in product(widths, widths, tokens, dtypes):
            small_on_turing = gpu.capability == (7, 5) and dtype == "fp16" and inputs * outputs < 4 * 2**20
            waves = -(-outputs // 64) / gpu.num_multiprocessors
            if small_on_turing and 1 / 2 < waves < 1 and inputs * 2 >= outputs and 4 < num <= 8:
                continue  # fused for 4 and for 9 tokens, and not between: the docstring says so
            fused = num <= cost.fused_tokens(LinearShape("layer", inputs, outputs), gpu, dtype)
            assert fused == decide(0, dtypes[dtype], num, outputs, inputs), (name, inputs, outputs, num, dtype)


def test_a_run_is_its_steps_and_its_validations():
    config = load_run_config("llama-7b-to-1b")
    run = cost.run_seconds(config, *model_shapes(config), GPU)
    assert 1000 * seconds() < run < 1.1 * 1000 * seconds()
    num_steps = math.ceil(600 / seconds())
    assert 1 < num_steps < 1000
    sequences = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
    least = math.ceil(1_000_000 / (sequences * config.rollout.max_new_tokens))
    for limit, steps in (("max_seconds=600", num_steps), ("max_tokens=1000000", least)):
        limited = load_run_config("llama-7b-to-1b", [f"train.{limit}"])
        counted = load_run_config("llama-7b-to-1b", [f"train.max_steps={steps}"])
        found, expected = (cost.run_seconds(c, *model_shapes(c), GPU) for c in (limited, counted))
        assert found == expected, limit
    assert seconds("rollout.reuse=2") < seconds() and seconds("data.ground_truth_mix=0.5") < seconds()
