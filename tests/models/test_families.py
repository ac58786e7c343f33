"""Every family goes the whole way on disk: planned and counted, NF4 teacher, six steps, stop, resume, merge, load with
plain transformers.

BY_DEFAULT of them go the whole way in every run of the tests, all of them with `make families`, which also writes the
table of docs/models.md from what it found. What the plan says of each is compared with the loaded models in every run.
The file is long because half of it is one table, so that a new family is a row.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
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
from qswitch.models.student import attach_lora, load_student
from qswitch.plan import memory
from qswitch.plan.scheduler import model_shapes, plan_run
from qswitch.rollout.cache_layers import recurrent_states
from qswitch.rollout.kv_cache import KVState
from qswitch.run import distill, resume
from qswitch.run_dir import RunDir
from tests.rollout.test_kv_cache import join
from tests.tiny import VOCAB_SIZE, save_tiny, tiny_config, tiny_model, tiny_tokenizer

LLAMA_TARGETS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- families: written by make families -->", "<!-- families: end -->"
BY_DEFAULT = ("gpt2", "qwen2", "gemma3", "phi3", "glm4-moe", "qwen3.5", "lfm2")
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
    """Linear layers that NF4 packs and all-linear leaves out: peft takes their names for the tensors of experts."""
    what: str = ""
    """What is special about it, for the table."""


FAMILIES = {
    # A transposed Conv1D, learned positions, one token for BOS, EOS and, in a real GPT-2, no pad.
    "gpt2": Family(
        arch="gpt2", targets={"c_attn", "c_proj", "c_fc"}, tied=True,
        special={"pad_token": None, "bos_token": "</s>"},
        what=(
            "`Conv1D` layers are stored transposed: adapters are injected with `fan_in_fan_out`, and NF4 "
            "transposes them while reading. Learned positions: 1,024 at most. No pad token: the end token "
            "pads, masked. BOS and EOS are one token."
        ),
    ),
    "opt": Family(
        arch="opt", targets={"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}, tied=True,
        changes={"word_embed_proj_dim": 64}, special={"bos_token": "</s>"},
        what=(
            "Learned positions with an offset of two. The hub's main branch holds pickled weights; the hub's "
            "safetensors conversion is read instead."
        ),
    ),
    # OPT-350m: embeddings narrower than the layers and projected into them, norms after the residual.
    "opt-350m": Family(
        arch="opt", targets={"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "project_in", "project_out"},
        tied=True, changes={"word_embed_proj_dim": 32, "do_layer_norm_before": False}, special={"bos_token": "</s>"},
        left_out={"project_in"},
        what=(
            "Embeddings narrower than the layers (`project_in`, `project_out`), norms after the residual; the "
            "head reads the narrow state, and that is what the cache keeps."
        ),
    ),
    "llama": Family(
        arch="llama", targets=LLAMA_TARGETS, tied=False, special={"pad_token": None},
        what=(
            "Llama 2, OpenLLaMA, TinyLlama. Untied head: an adapter on `lm_head` is possible. No pad token. "
            "OpenLLaMA is pickled on the hub, as OPT is."
        ),
    ),
    "llama3": Family(
        arch="llama3", targets=LLAMA_TARGETS, tied=True, special={"pad_token": None}, eos=[2, 3],
        what=(
            "Scaled rotary positions. The 1B and 3B models have tied heads. Several end tokens in the "
            "generation config: all of them end a response."
        ),
    ),
    # One tokenizer before heads of different height, as Qwen2.5-7B and 0.5B have; no BOS at all.
    "qwen2": Family(
        arch="qwen2", targets=LLAMA_TARGETS, tied=True, teacher_rows=VOCAB_SIZE + 57, student_rows=VOCAB_SIZE + 25,
        special={"bos_token": None}, eos=[2, 3],
        what=(
            "Qwen 2 and 2.5. One tokenizer before heads of 151,936 and 152,064 rows: rows beyond the shared "
            "vocabulary are padding and are cut off. No BOS token. Biases on query, key and value."
        ),
    ),
    "qwen3": Family(
        arch="qwen3", targets=LLAMA_TARGETS, tied=True, teacher_rows=VOCAB_SIZE + 9, special={"bos_token": None},
        what=(
            "Norms on query and key; the head width is not hidden size / heads. Thinks before it answers "
            "unless the template is told otherwise (`data.template_kwargs: {enable_thinking: false}`, as the "
            "presets do)."
        ),
    ),
    "mistral": Family(
        arch="mistral", targets=LLAMA_TARGETS, tied=False, changes={"sliding_window": WINDOW},
        special={"pad_token": None},
        what=(
            "Sliding window in the first version: masks are built from positions, so that padding does not "
            "count."
        ),
    ),
    "gemma2": Family(
        arch="gemma2", targets=LLAMA_TARGETS, tied=True, changes={"sliding_window": WINDOW}, eos=[2, 3],
        what=(
            "Attention scores and logits are soft-capped; attention is computed eagerly, because the fused "
            "kernels leave the cap out. Layers with and without a sliding window alternate."
        ),
    ),
    "gemma3": Family(
        arch="gemma3", targets=LLAMA_TARGETS, tied=True, changes={"sliding_window": WINDOW}, eos=[2, 3],
        what=(
            "Text models. Norms on query and key, alternating windows, two rotary bases. Of models with a vision "
            "tower the text part is read."
        ),
    ),
    # Fused query, key and value, and fused MLP; the student's head is the taller one here.
    "phi3": Family(
        arch="phi3", targets={"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}, tied=False,
        student_rows=VOCAB_SIZE + 12, special={"pad_token": "</s>"},
        what="Phi-3, Phi-4-mini. Fused query-key-value and gate-up layers: each is one adapter.",
    ),
    "phi": Family(
        arch="phi", targets={"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}, tied=False,
        what="One norm before attention and MLP; the head has a bias.",
    ),
    "smollm2": Family(
        arch="llama", targets=LLAMA_TARGETS, tied=True, changes={"tie_word_embeddings": True},
        what="Tied head. Widths such as 576 are multiples of 64, so NF4 works on the CPU as well.",
    ),
    # ---- mixtures of experts: experts lie in tensors of their own, which neither NF4 nor an adapter touches
    "mixtral": Family(
        arch="mixtral", targets=ATTENTION, tied=False,
        what=(
            "Experts. They lie in tensors of their own, which neither NF4 nor an adapter touches; said when "
            "they are most of the model."
        ),
    ),
    "olmoe": Family(
        arch="olmoe", targets=ATTENTION, tied=False,
        what="Experts.",
    ),
    "qwen3-moe": Family(
        arch="qwen3_moe", targets=ATTENTION, tied=False,
        what="Experts.",
    ),
    "glm4-moe": Family(
        arch="glm4_moe", targets=LLAMA_TARGETS, tied=False, not_adapted=MLP,
        what="Experts and a shared expert; NF4 packs the dense layers.",
    ),
    "deepseek-v2": Family(
        arch="deepseek_v2", targets={"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", *MLP, "o_proj"},
        not_adapted=MLP,
        tied=False,
        what="Experts; keys and values are kept expanded from their latent.",
    ),
    "deepseek-v3": Family(
        arch="deepseek_v3", targets={"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", *MLP, "o_proj"},
        not_adapted=MLP,
        tied=False,
        what="Experts; keys and values are kept expanded from their latent.",
    ),
    "gpt-oss": Family(
        arch="gpt_oss", targets=ATTENTION, tied=False, changes={"sliding_window": WINDOW},
        what=(
            "Experts, attention sinks (computed eagerly), alternating windows. The published weights are "
            "MXFP4: see below."
        ),
    ),
    # ---- recurrent and convolution layers beside attention
    "qwen3.5": Family(
        arch="qwen3_5_text", tied=False,
        targets={*LLAMA_TARGETS, "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"},
        what=(
            "Three of four layers are linear attention: their states join and leave with their rows, and go "
            "back where a draft is taken back. Qwen 3.5 text models."
        ),
    ),
    "qwen3-next": Family(
        arch="qwen3_next", tied=False,
        not_adapted=MLP, targets={*LLAMA_TARGETS, "in_proj_qkvz", "in_proj_ba", "out_proj", "shared_expert_gate"},
        what="Linear attention and experts.",
    ),
    "granite-hybrid": Family(
        arch="granitemoehybrid", tied=False,
        targets={*ATTENTION, "in_proj", "out_proj", "input_linear", "output_linear"},
        what="Granite 4: Mamba-2 layers and experts beside attention.",
    ),
    "lfm2": Family(
        arch="lfm2", tied=True, targets={"q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"},
        what="Short convolutions beside attention.",
    ),
    "bamba": Family(
        arch="bamba", tied=False, targets={*LLAMA_TARGETS, "in_proj", "out_proj"},
        what="Mamba-2 layers beside attention.",
    ),
    "jamba": Family(
        arch="jamba", tied=False, targets={*LLAMA_TARGETS, "in_proj", "x_proj", "dt_proj", "out_proj"},
        left_out={"dt_proj"},
        what="Mamba layers and experts beside attention.",
    ),
    "olmo-hybrid": Family(
        arch="olmo_hybrid", tied=False, targets={*LLAMA_TARGETS, "a_proj", "b_proj", "g_proj"},
        what="Linear attention beside attention.",
    ),
    # ---- dense, today's
    "smollm3": Family(
        arch="smollm3", targets=LLAMA_TARGETS, tied=True,
        what="Every fourth layer has no rotary positions. Thinks unless the template is told otherwise.",
    ),
    "olmo2": Family(
        arch="olmo2", targets=LLAMA_TARGETS, tied=False,
        what="Norms after attention and MLP, and on query and key.",
    ),
    "olmo3": Family(
        arch="olmo3", targets=LLAMA_TARGETS, tied=False, changes={"sliding_window": WINDOW},
        what="As OLMo 2, with sliding windows.",
    ),
    "ministral3": Family(
        arch="ministral3", targets=LLAMA_TARGETS, tied=False,
        what="Ministral 3: scaled rotary positions and query scaling by position. Text models.",
    ),
    "gemma4": Family(
        arch="gemma4_text", tied=True, eos=[2, 3], changes={"sliding_window": WINDOW},
        targets={*LLAMA_TARGETS, "per_layer_model_projection", "per_layer_input_gate", "per_layer_projection"},
        left_out={"per_layer_projection"},
        what="Text models. Inputs of every layer beside the embedding, wider heads in layers without a window.",
    ),
    "glm4": Family(
        arch="glm4", targets={*ATTENTION, "gate_up_proj", "down_proj"}, tied=False,
        what="Fused gate-up layers, norms before and after.",
    ),
    "granite": Family(
        arch="granite", targets=LLAMA_TARGETS, tied=False,
        what="Embeddings, residuals, attention and logits are scaled.",
    ),
    "cohere2": Family(
        arch="cohere2", targets=LLAMA_TARGETS, tied=True, changes={"sliding_window": WINDOW},
        what="Command R7B: logits are scaled, windows alternate with layers without positions.",
    ),
    "exaone4": Family(
        arch="exaone4", targets=LLAMA_TARGETS, tied=False, changes={"sliding_window": WINDOW},
        what="Sliding windows; norms after the residual.",
    ),
    "ernie4.5": Family(
        arch="ernie4_5", targets=LLAMA_TARGETS, tied=True,
        what="Dense models.",
    ),
    "seed-oss": Family(
        arch="seed_oss", targets=LLAMA_TARGETS, tied=False,
        what="Biases on query, key and value.",
    ),
    "hunyuan": Family(
        arch="hunyuan_v1_dense", targets=LLAMA_TARGETS, tied=False,
        what="Dense models; norms on query and key.",
    ),
    "stablelm": Family(
        arch="stablelm", targets=LLAMA_TARGETS, tied=False,
        what="Partial rotary positions, LayerNorm.",
    ),
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


def run_with_a_stop(config: RunConfig, path: Path) -> tuple[RunDir, tuple[float, float]]:
    """A run that is stopped in its second step and resumed, and its KL on held-out prompts before and after."""
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
    return run_dir, (summary.kl_before_nats, summary.kl_after_nats)


@dataclass
class Found:
    """What a family's tests have found, for its line in the table."""

    planned: dict[str, float] = field(default_factory=dict)
    """Part -> planned bytes over those that were counted."""
    kl_nats: tuple[float, float] | None = None
    """KL(teacher || student) on held-out prompts before and after six steps, of a family that went the whole way."""


@pytest.fixture(scope="module")
def table() -> dict[str, Found]:
    return {name: Found() for name in FAMILIES}


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def packed_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, and what bitsandbytes keeps beside them."""
    for parameter in model.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_plan_says_what_is_counted(tmp_path: Path, name: str, table: dict[str, Found], monkeypatch):
    """Teacher in NF4, student, adapters, and what the caches keep of three rows: planned within 5 %."""
    # On CPUs with AVX-512 BF16 the first pass repacks weights and unpacks their scales: bytes are those before it.
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)
    config = run_config(tmp_path, FAMILIES[name])
    plan = plan_run(config, device="cpu")
    runtime = make_runtime(config.train)
    teacher, student = load_teacher(config.teacher, runtime), load_student(config, runtime)
    trained = num_bytes(p for p in student.parameters() if p.requires_grad)
    counted = {
        "teacher_weights": num_bytes(packed_tensors(teacher.hf)),
        "student_weights": num_bytes(p for p in student.parameters() if not p.requires_grad),
        "adapters": trained,
    }
    found = {part: plan.parts[part] / size for part, size in counted.items()}
    for role, model, shape in zip(("teacher", "student"), (teacher, student), model_shapes(config), strict=True):
        state = KVState(model, 3, 64)
        join(state, [[None, 5, 6], [None, None, 7], [8, 9, 10]])
        kept = state.buffer_bytes + num_bytes(t for t in recurrent_states(state._layers) if t is not None)
        found[f"{role}_cache"] = (memory.kv_buffer_bytes(shape, 3, 64, 4) + memory.state_bytes(shape, 3, 4)) / kept
    table[name].planned = found
    assert all(abs(ratio - 1) < 0.05 for ratio in found.values()), found


@pytest.mark.parametrize(
    "name", [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.families) for name in FAMILIES]
)
def test_a_family_goes_the_whole_way(tmp_path: Path, name: str, table: dict[str, Found]):
    family = FAMILIES[name]
    config = run_config(tmp_path, family)
    pair = load_pair_tokenizer(config)
    assert pair.vocab_size == min(family.teacher_rows, family.student_rows)
    assert set(pair.eos_ids) == {2, *(family.eos if isinstance(family.eos, list) else [family.eos])}
    assert pair.pad_id is not None
    teacher = load_teacher(config.teacher, make_runtime(config.train))
    packed = {n.rpartition(".")[2] for n, m in teacher.hf.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert packed == family.targets - family.left_out

    run_dir, kl_nats = run_with_a_stop(config, tmp_path / "run")
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
    table[name].kl_nats = kl_nats


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
    run_dir, _ = run_with_a_stop(build_config(values), tmp_path / "run")
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


# ------------------------------------------------------------------------------------ the table of docs/models.md, last


def cells(name: str, found: Found) -> list[str]:
    """A family's line; the KL is that of this session."""
    family = FAMILIES[name]
    parts = ("teacher_weights", "student_weights", "adapters")
    weights = ", ".join(f"{found.planned[part]:.3f}" for part in parts)
    caches = f"{found.planned['teacher_cache']:.3f}, {found.planned['student_cache']:.3f}"
    kl = NOT_RUN if found.kl_nats is None else f"{found.kl_nats[0]:.2f} to {found.kl_nats[1]:.2f}"
    return [name, f"`{tiny_config(family.arch).model_type}`", weights, caches, kl, family.what]


NOT_RUN = "not run"
HEADER = [
    "family",
    "`model_type`",
    "planned / counted: teacher, student, adapters",
    "and caches",
    "KL, nats/token",
    "what is special, and what is done about it",
]


def test_the_table_of_the_page_is_what_was_found(table: dict[str, Found]):
    """With QSWITCH_FAMILIES_TABLE=write (`make families`) it is written instead; who has not gone the whole way in that
    session is `not run` in it."""
    if not all(found.planned for found in table.values()):
        pytest.skip("only a selection of the families was planned")
    lines = [cells(name, found) for name, found in table.items()]
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(BEGIN)
    written, tail = rest.split(END)
    if os.environ.get("QSWITCH_FAMILIES_TABLE") == "write":
        rows = [HEADER, ["---"] * len(HEADER), *lines]
        text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        PAGE.write_text(f"{head}{BEGIN}\n\n{text}\n{END}{tail}", encoding="utf-8")
        return
    shown = [line.strip("| ").split(" | ") for line in written.strip().splitlines()[2:]]
    kl = HEADER.index("KL, nats/token")
    assert [row[:kl] + row[kl + 1 :] for row in shown] == [row[:kl] + row[kl + 1 :] for row in lines]
    assert all(re.fullmatch(rf"{NOT_RUN}|\d+\.\d\d to \d+\.\d\d", row[kl]) for row in shown)
