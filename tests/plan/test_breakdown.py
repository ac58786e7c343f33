"""The plan's parts against the tensors of real models, before their first forward pass, and laws of the estimate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qswitch.config import RunConfig
from qswitch.layers import build_config
from qswitch.models.load import load_teacher
from qswitch.models.residency import SwappedModel, _own_storages, _tensors
from qswitch.models.runtime import Runtime
from qswitch.models.student import load_student
from qswitch.plan import memory
from qswitch.plan.breakdown import PHASES, break_down
from qswitch.plan.families import shape_from_config
from qswitch.plan.machine import GPUS, Machine, find_budget
from qswitch.plan.render import render_overview
from qswitch.plan.scheduler import model_shapes, plan_overview, plan_run
from qswitch.presets import load_run_config, preset_names
from qswitch.units import GIB
from tests.tiny import ARCHITECTURES, save_tiny_pair

CPU = Machine("cpu", "fp32")
GPU = Machine("cuda", "bf16")


def configure(teacher_path: Path, student_path: Path, /, **sections: dict[str, Any]) -> RunConfig:
    values: dict[str, Any] = {
        "teacher": {"model": str(teacher_path)},
        "student": {"model": str(student_path), "lora": {"r": 4}},
        "data": {"train": "prompts.jsonl"},
        "train": {"device": "cpu", "compute_dtype": "fp32"},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return build_config(values)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_part_is_that_of_the_loaded_models(arch, tmp_path, monkeypatch):
    """NF4 teacher with its scales, fp32 student, adapters, optimizer and what a swapped teacher frees: within 2 %."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    # The first pass, on CPUs with AVX-512 BF16, repacks weights and unpacks their scales: bytes are those before it.
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    teacher_path, student_path = save_tiny_pair(tmp_path, arch, vocab_size=400)
    config = configure(teacher_path, student_path, teacher={"residency": "swap"})
    planned = break_down(config, *model_shapes(config), CPU)
    runtime = Runtime(device=torch.device("cpu"), compute_dtype=torch.float32)
    teacher, student = load_teacher(config.teacher, runtime), load_student(config, runtime)

    def size(tensors: Any) -> int:
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    buffers = size(teacher.hf.buffers())  # rotary frequencies: not weights, and not planned
    assert planned.parts["teacher_weights"] == pytest.approx(size(_tensors(teacher.hf)) - buffers, rel=0.02)
    trainable = [p for p in student.parameters() if p.requires_grad]
    frozen = [p for p in student.hf.parameters() if not p.requires_grad]
    assert planned.parts["student_weights"] == pytest.approx(size(frozen), rel=0.02)
    assert planned.parts["adapters"] == planned.parts["gradients"] == size(trainable)
    assert planned.parts["optimizer_state"] == 2 * size(trainable)
    swapped = SwappedModel(teacher)
    assert planned.parts["teacher_copy"] == memory.pinned_bytes(planned.parts["teacher_weights"] - size(
        teacher.head.linear.parameters()
    ))  # fmt: skip
    away = planned.phases["rollout"] - planned.phases["train"]
    swapped.leave()
    left = sum(s.nbytes() for s in _own_storages(teacher.hf))
    resident = break_down(configure(teacher_path, student_path), *model_shapes(config), CPU)
    freed = (resident.phases["rollout"] - resident.phases["train"]) - away
    assert planned.parts["teacher_weights"] + freed == pytest.approx(left, rel=0.02)


@pytest.mark.parametrize("name", preset_names())
def test_presets_have_the_bytes_of_their_class_and_the_quantisation_rules(name):
    """The class of each preset's models on the meta device: 4.127 bits a quantised weight, 2 bytes all others."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = load_run_config(name)
    for section in (config.teacher, config.student):
        if section.shape is None:
            continue
        values = {k: v for k, v in section.shape.items() if v is not None}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
        head = model.get_output_embeddings()
        linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head]
        weights = sum(m.weight.numel() for m in linears)
        others = sum(p.numel() for p in model.parameters()) - weights
        shape = shape_from_config(section.shape)
        assert shape.num_parameters - shape.linear_weight_parameters == others
        # Half a byte, one byte per 64 weights for a scale, four per 256 scales.
        rule = weights * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + 2 * others
        assert memory.weight_bytes(shape, "nf4", 2) == pytest.approx(rule, rel=0.02)


SHAPE = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816,
         "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4}  # fmt: skip


def planned(machine: Machine, vocab: int = 32000, **sections: dict[str, Any]) -> Any:
    shape = {**SHAPE, "vocab_size": vocab}
    for name in ("teacher", "student"):
        sections[name] = {"shape": shape, **sections.get(name, {})}
    config = configure(Path("a/b"), Path("a/c"), **sections)
    return break_down(config, *model_shapes(config), machine)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 32), micro=st.integers(1, 8), prompt=st.integers(16, 512), new=st.integers(16, 512),
    vocab=st.integers(1000, 200_000), more=st.integers(1, 4), on_gpu=st.booleans(),
    checkpointing=st.booleans(), swap=st.booleans(),
)  # fmt: skip
def test_the_estimate_grows_with_batch_length_and_vocabulary(
    rows, micro, prompt, new, vocab, more, on_gpu, checkpointing, swap
):
    machine = GPU if on_gpu else CPU

    def phases(rows=rows, micro=micro, prompt=prompt, new=new, vocab=vocab) -> dict[str, int]:
        return planned(
            machine, vocab, teacher={"residency": "swap" if swap else "resident"},
            student={"gradient_checkpointing": checkpointing}, data={"max_prompt_tokens": prompt},
            rollout={"max_new_tokens": new, "batch_size": rows, "block_tokens": 3},
            train={"per_device_train_batch_size": micro, "gradient_accumulation_steps": 4},
        ).phases  # fmt: skip

    base = phases()
    for name, other, grows in (
        ("rows", phases(rows=rows + more), ("rollout", "validate")),
        ("micro-batch", phases(micro=micro + more), ("train",)),
        ("prompt", phases(prompt=prompt + more), ("rollout", "train", "validate")),
        ("response", phases(new=new + more), ("rollout", "train", "validate")),
        ("vocabulary", phases(vocab=vocab + more), PHASES),
    ):
        assert all(other[p] >= base[p] for p in PHASES), name
        assert all(other[p] > base[p] for p in grows), name


def test_a_swapped_teacher_is_absent_while_the_student_trains():
    resident, swap = planned(GPU), planned(GPU, teacher={"residency": "swap"})
    freed = resident.parts["teacher_weights"] - memory.head_bytes(shape_from_config(SHAPE), "nf4", 2)
    # A teacher that stays keeps its small buffers and recorded passes; they count as what comes and goes.
    kept = resident.parts["kept_kv_buffers"] - swap.parts["kept_kv_buffers"]
    assert kept > 0
    for phase in ("train", "validate"):
        more = kept * (1 + memory.FRAGMENTATION_SHARE)
        assert resident.phases[phase] - swap.phases[phase] == pytest.approx(freed + more, abs=2)
    for phase in ("load", "rollout"):
        assert resident.phases[phase] == swap.phases[phase]
    assert swap.host["teacher_copy"] >= freed and resident.host["teacher_copy"] == 0


def test_recorded_passes_count_while_responses_are_written_and_as_long_as_they_are_kept():
    graphs, usual = planned(GPU), planned(GPU, rollout={"student_graphs": "off", "teacher_graphs": "off"})
    recorded = graphs.parts["recorded_passes"]
    assert usual.parts["recorded_passes"] == 0 and recorded > 2 * memory.CUBLAS_WORKSPACE_BYTES
    more = 1 + memory.FRAGMENTATION_SHARE
    assert graphs.phases["rollout"] - usual.phases["rollout"] == pytest.approx(recorded * more, abs=2)
    # The buffers of both models are small here.
    kept = graphs.parts["kept_kv_buffers"] - usual.parts["kept_kv_buffers"]
    assert kept > recorded
    assert graphs.phases["train"] - usual.phases["train"] == pytest.approx(kept * more, abs=2)
    assert planned(CPU).parts["recorded_passes"] == 0


def test_rounds_and_reuse_keep_more_rows():
    one, three = planned(GPU), planned(GPU, rollout={"steps_at_once": 3})
    assert three.parts["logit_cache"] == 3 * one.parts["logit_cache"]
    again = planned(GPU, rollout={"reuse": 4})
    assert again.parts["logit_cache"] == 4 * one.parts["logit_cache"]


def at(name: str, gib: float, **settings: Any) -> Any:
    config = load_run_config(name, [f"{k.replace('__', '.')}={v}" for k, v in settings.items()])
    return plan_run(config, budget_bytes=int(gib * GIB), device="cuda")


def test_the_targets_fit():
    assert at("llama-7b-to-1b", 8).fits
    swap = at("llama-7b-to-1b", 8, teacher__residency="swap")
    assert swap.fits and swap.phases["train"] < 6 * GIB
    for gib in (12, 16):
        plan = at("llama-7b-to-1b", gib)
        assert plan.fits and plan.choices["teacher.residency"] == "resident"
        assert (plan.choices["rollout.batch_size"], plan.next_better is None) == (
            (8, False) if gib == 12 else (16, True)
        )
    assert at("qwen2.5-32b-to-3b", 24).fits
    # Llama-2-13B: https://huggingface.co/meta-llama/Llama-2-13b-hf/blob/main/config.json
    thirteen = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824,
                "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40}  # fmt: skip
    values = load_run_config("llama-7b-to-1b").model_dump()
    values["teacher"]["shape"] = thirteen
    plan = plan_run(build_config(values), budget_bytes=16 * GIB, device="cuda")
    assert plan.fits and 6.3 * GIB < plan.parts["teacher_weights"] < 7 * GIB


def test_a_card_leaves_less_than_its_name_says():
    config = load_run_config("llama-7b-to-1b")
    budget = find_budget(config.train, gpu="RTX3060-12GB")
    assert 11.5 * GIB < budget.num_bytes < 12 * GIB and budget.gpu is GPUS["rtx3060-12gb"]
    assert budget.device == "cuda" and "11.6 of 12 GiB" in budget.origin


def test_the_overview_has_every_preset_and_budget():
    configs = {name: load_run_config(name) for name in ("llama-7b-to-1b", "qwen2.5-32b-to-3b")}
    rows = plan_overview(configs)
    assert [[c["budget_gib"] for c in row["budgets"]] for row in rows] == [[6, 8, 12, 16, 24]] * 2
    assert [c["fits"] for c in rows[0]["budgets"]] == [False, True, True, True, True]
    text = render_overview(rows)
    assert "llama-7b-to-1b: " in text and "as written" in text and "at its smallest" in text
