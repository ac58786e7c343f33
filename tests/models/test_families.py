"""Every family goes the whole way on disk: NF4 teacher, distil, stop, resume, merge, load with plain transformers.

A representative few run by default, all of them with `make families`, which also writes the table of docs/models.md.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from qswitch.config import LoraSection, RunConfig
from qswitch.distill.trainer import Trainer
from qswitch.errors import Interrupted, ModelError
from qswitch.export.merge import merge_run
from qswitch.layers import build_config
from qswitch.models.load import load_teacher
from qswitch.models.pair import load_pair_tokenizer
from qswitch.models.runtime import make_runtime
from qswitch.models.student import attach_lora
from qswitch.run import distill, resume
from qswitch.run_dir import RunDir
from tests.tiny import VOCAB_SIZE, save_tiny, tiny_model, tiny_tokenizer

LLAMA_TARGETS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
WINDOW = 6
"""Shorter than every sequence of these runs, so that sliding layers forget their beginning."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family as a pair of tiny models on disk."""

    arch: str
    targets: set[str]
    """What all-linear adapts."""
    tied: bool
    changes: dict[str, Any] = field(default_factory=dict)
    """Configuration values of both models."""
    teacher_rows: int = VOCAB_SIZE
    student_rows: int = VOCAB_SIZE
    special: dict[str, str | None] = field(default_factory=dict)
    """Special tokens that differ from the tiny tokenizer's."""
    eos: int | list[int] = 2
    """eos_token_id of the generation config."""
    left_out: set[str] = field(default_factory=set)
    """Linear layers of the teacher that NF4 leaves alone, here: those narrower than a block, on a CPU."""
    not_adapted: set[str] = field(default_factory=set)
    """Linear layers that NF4 packs and that peft's all-linear does not adapt: those beside tensors of experts."""
    what: str = ""
    """What is special about it, for the table."""


FAMILIES = {
    # A transposed Conv1D, learned positions, one token for BOS, EOS and, in a real GPT-2, no pad.
    "gpt2": Family(
        arch="gpt2", targets={"c_attn", "c_proj", "c_fc"}, tied=True,
        special={"pad_token": None, "bos_token": "</s>"},
    ),
    "opt": Family(
        arch="opt", targets={"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}, tied=True,
        changes={"word_embed_proj_dim": 64}, special={"bos_token": "</s>"},
    ),
    # OPT-350m: embeddings narrower than the layers and projected into them, norms after the residual.
    "opt-350m": Family(
        arch="opt", targets={"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "project_in", "project_out"},
        tied=True, changes={"word_embed_proj_dim": 32, "do_layer_norm_before": False}, special={"bos_token": "</s>"},
        left_out={"project_in"},
    ),
    "llama": Family(arch="llama", targets=LLAMA_TARGETS, tied=False, special={"pad_token": None}),
    "llama3": Family(
        arch="llama3", targets=LLAMA_TARGETS, tied=True, special={"pad_token": None}, eos=[2, 3],
    ),
    # One tokenizer before heads of different height, as Qwen2.5-7B and 0.5B have; no BOS at all.
    "qwen2": Family(
        arch="qwen2", targets=LLAMA_TARGETS, tied=True, teacher_rows=VOCAB_SIZE + 57, student_rows=VOCAB_SIZE + 25,
        special={"bos_token": None}, eos=[2, 3],
    ),
    "qwen3": Family(
        arch="qwen3", targets=LLAMA_TARGETS, tied=True, teacher_rows=VOCAB_SIZE + 9, special={"bos_token": None},
    ),
    "mistral": Family(
        arch="mistral", targets=LLAMA_TARGETS, tied=False, changes={"sliding_window": WINDOW},
        special={"pad_token": None},
    ),
    "gemma2": Family(
        arch="gemma2", targets=LLAMA_TARGETS, tied=True, changes={"sliding_window": WINDOW}, eos=[2, 3],
    ),
    "gemma3": Family(
        arch="gemma3", targets=LLAMA_TARGETS, tied=True, changes={"sliding_window": WINDOW}, eos=[2, 3],
    ),
    # Fused query, key and value, and fused MLP; the student's head is the taller one here.
    "phi3": Family(
        arch="phi3", targets={"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}, tied=False,
        student_rows=VOCAB_SIZE + 12, special={"pad_token": "</s>"},
    ),
    "phi": Family(arch="phi", targets={"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}, tied=False),
    "smollm2": Family(arch="llama", targets=LLAMA_TARGETS, tied=True, changes={"tie_word_embeddings": True}),
    # ---- mixtures of experts: experts lie in tensors of their own, which neither NF4 nor an adapter touches
    "mixtral": Family(arch="mixtral", targets=ATTENTION, tied=False),
    "olmoe": Family(arch="olmoe", targets=ATTENTION, tied=False),
    "qwen3-moe": Family(arch="qwen3_moe", targets=ATTENTION, tied=False),
    "glm4-moe": Family(arch="glm4_moe", targets=LLAMA_TARGETS, tied=False, not_adapted=MLP),
    "deepseek-v2": Family(
        arch="deepseek_v2", targets={"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", *MLP, "o_proj"},
        not_adapted=MLP,
        tied=False,
    ),
    "deepseek-v3": Family(
        arch="deepseek_v3", targets={"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", *MLP, "o_proj"},
        not_adapted=MLP,
        tied=False,
    ),
    "gpt-oss": Family(arch="gpt_oss", targets=ATTENTION, tied=False, changes={"sliding_window": WINDOW}),
    # ---- recurrent and convolution layers beside attention
    "qwen3.5": Family(
        arch="qwen3_5_text", tied=False,
        targets={*LLAMA_TARGETS, "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"},
    ),
    "qwen3-next": Family(
        arch="qwen3_next", tied=False,
        not_adapted=MLP, targets={*LLAMA_TARGETS, "in_proj_qkvz", "in_proj_ba", "out_proj", "shared_expert_gate"},
    ),
    "granite-hybrid": Family(
        arch="granitemoehybrid", tied=False,
        targets={*ATTENTION, "in_proj", "out_proj", "input_linear", "output_linear"},
    ),
    "lfm2": Family(
        arch="lfm2", tied=True, targets={"q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"},
    ),
    "bamba": Family(arch="bamba", tied=False, targets={*LLAMA_TARGETS, "in_proj", "out_proj"}),
    "jamba": Family(
        arch="jamba", tied=False, targets={*LLAMA_TARGETS, "in_proj", "x_proj", "dt_proj", "out_proj"},
        left_out={"dt_proj"},
    ),
    "olmo-hybrid": Family(
        arch="olmo_hybrid", tied=False, targets={*LLAMA_TARGETS, "a_proj", "b_proj", "g_proj"},
    ),
    # ---- dense, today's
    "smollm3": Family(arch="smollm3", targets=LLAMA_TARGETS, tied=True),
    "olmo2": Family(arch="olmo2", targets=LLAMA_TARGETS, tied=False),
    "olmo3": Family(arch="olmo3", targets=LLAMA_TARGETS, tied=False, changes={"sliding_window": WINDOW}),
    "ministral3": Family(arch="ministral3", targets=LLAMA_TARGETS, tied=False),
    "glm4": Family(arch="glm4", targets={*ATTENTION, "gate_up_proj", "down_proj"}, tied=False),
    "granite": Family(arch="granite", targets=LLAMA_TARGETS, tied=False),
    "cohere2": Family(arch="cohere2", targets=LLAMA_TARGETS, tied=True, changes={"sliding_window": WINDOW}),
    "exaone4": Family(arch="exaone4", targets=LLAMA_TARGETS, tied=False, changes={"sliding_window": WINDOW}),
    "ernie4.5": Family(arch="ernie4_5", targets=LLAMA_TARGETS, tied=True),
    "seed-oss": Family(arch="seed_oss", targets=LLAMA_TARGETS, tied=False),
    "hunyuan": Family(arch="hunyuan_v1_dense", targets=LLAMA_TARGETS, tied=False),
    "stablelm": Family(arch="stablelm", targets=LLAMA_TARGETS, tied=False),
}  # fmt: skip


def save_pair(folder: Path, family: Family) -> tuple[Path, Path]:
    """(teacher, student), with the family's tokenizer and generation config."""
    paths = []
    for role, seed, rows in (("teacher", 1, family.teacher_rows), ("student", 2, family.student_rows)):
        path = save_tiny(
            folder / role, family.arch, seed=seed, vocab_size=rows, tokenizer=tiny_tokenizer(**family.special),
            **family.changes,
        )  # fmt: skip
        generation = path / "generation_config.json"
        values = json.loads(generation.read_text()) | {"eos_token_id": family.eos}
        generation.write_text(json.dumps(values))
        paths.append(path)
    return paths[0], paths[1]


def run_config(folder: Path, family: Family) -> RunConfig:
    teacher, student = save_pair(folder, family)
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {'abcdefgh'[i % 8] * (1 + i % 5)}"}) + "\n" for i in range(16)))
    return build_config({
        "teacher": {"model": str(teacher), "precision": "nf4"},
        "student": {"model": str(student), "precision": "fp32", "lora": {"r": 4, "alpha": 8}},
        "data": {"train": str(data), "num_validation": 2, "max_prompt_tokens": 64},
        # A threshold that falls at once: the teacher writes, so that every step learns something.
        "rollout": {"max_new_tokens": 8, "batch_size": 4, "decay_rate": 1.0},
        "train": {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
                  "learning_rate": 1e-2, "eval_steps": 6, "save_steps": 6, "device": "cpu", "compute_dtype": "fp32"},
    })  # fmt: skip


def run_with_a_stop(config: RunConfig, path: Path) -> RunDir:
    """A run that is stopped in its second step and resumed."""
    original = Trainer.train_step

    def stop_in_the_second(self: Trainer) -> Any:
        self.stop_requested = self.step == 1
        return original(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "train_step", stop_in_the_second)
        distill(config, path)
    run_dir = RunDir.open(path)
    assert run_dir.latest_checkpoint().name == "step-000002"
    summary = resume(run_dir.path)
    assert summary.steps == 6 and summary.steps_without_loss < 6
    assert 0 < summary.kl_before_nats < math.inf and summary.kl_after_nats < math.inf
    return run_dir


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_goes_the_whole_way(tmp_path: Path, name: str):
    family = FAMILIES[name]
    config = run_config(tmp_path, family)
    pair = load_pair_tokenizer(config)
    assert pair.vocab_size == min(family.teacher_rows, family.student_rows)
    assert set(pair.eos_ids) == {2, *(family.eos if isinstance(family.eos, list) else [family.eos])}
    assert pair.pad_id is not None
    teacher = load_teacher(config.teacher, make_runtime(config.train))
    packed = {n.rpartition(".")[2] for n, m in teacher.hf.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert packed == family.targets - family.left_out

    run_dir = run_with_a_stop(config, tmp_path / "run")
    adapter = json.loads((run_dir.adapter_path / "adapter_config.json").read_text())
    assert set(adapter["target_modules"]) == family.targets - family.not_adapted
    assert adapter["fan_in_fan_out"] == (family.arch == "gpt2")

    report = merge_run(run_dir.path, tmp_path / "merged", dtype="fp32")
    assert report.agrees
    ids = torch.tensor([[5, 9, 30, 12, 44]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    base = AutoModelForCausalLM.from_pretrained(config.student.model).eval()
    with torch.no_grad():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, run_dir.adapter_path).eval()(ids).logits
        torch.testing.assert_close(merged(ids).logits, adapted, atol=1e-4, rtol=0)
    assert not torch.allclose(adapted, before, atol=1e-3)
    assert merged.config.vocab_size == family.student_rows
    assert merged.generation_config.eos_token_id == family.eos
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    written = merged.generate(**tokenizer("say a", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert written.shape[1] > len("say a")


FULL = {"adapter": "none"}
DORA = {"lora": {"r": 4, "alpha": 8, "use_dora": True}, "gradient_checkpointing": True}
QUANTISED = {"precision": "nf4", "lora": {"r": 4, "alpha": 8}}


@pytest.mark.parametrize(
    ("name", "student"),
    [
        # Where weights are tied, projected, transposed or fused, and one plain family.
        pytest.param("gpt2", FULL, id="gpt2 in full"),
        pytest.param("opt-350m", FULL, id="opt-350m in full"),
        pytest.param("gemma3", FULL, id="gemma3 in full"),
        pytest.param("phi3", FULL, id="phi3 in full"),
        pytest.param("gpt2", DORA, id="gpt2 with dora"),
        pytest.param("opt-350m", DORA, id="opt-350m with dora"),
        pytest.param("phi3", DORA, id="phi3 with dora"),
        pytest.param("qwen2", DORA, id="qwen2 with dora"),
        pytest.param("gpt2", QUANTISED, id="gpt2 in nf4"),
    ],
)
def test_other_kinds_of_students_go_the_whole_way(tmp_path: Path, name: str, student: dict[str, Any]):
    values = run_config(tmp_path, FAMILIES[name]).model_dump()
    values["student"] = {"model": values["student"]["model"], "precision": "fp32", **student}
    run_dir = run_with_a_stop(build_config(values), tmp_path / "run")
    assert merge_run(run_dir.path, tmp_path / "merged", dtype="fp32").agrees


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_on_a_tied_head_is_refused_and_on_an_untied_one_trains(name: str):
    family = FAMILIES[name]
    model = tiny_model(family.arch, **family.changes)
    lora = LoraSection(r=2, target_modules=["lm_head"])
    if family.tied:
        with pytest.raises(ModelError, match="tied to its input embedding"):
            attach_lora(model, lora, seed=0)
    else:
        trained = [n for n, p in attach_lora(model, lora, seed=0).named_parameters() if p.requires_grad]
        assert len(trained) == 2 and all("lm_head" in n for n in trained)
