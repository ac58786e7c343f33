"""The merged folder is base + adapter, and needs neither qswitch nor peft."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qswitch.cli import run
from qswitch.config import RunConfig
from qswitch.errors import ModelError, PlanError, RunDirError
from qswitch.export.card import model_card
from qswitch.export.merge import _exact_logits, _trained, merge_bytes, merge_run
from qswitch.export.merge_report import _OF_THE_TRAINING, source_of
from qswitch.layers import build_config
from qswitch.manifest import write_manifest
from qswitch.models.load import attention_kind
from qswitch.models.references import resolve_reference
from qswitch.models.runtime import Runtime
from qswitch.models.student import load_student, save_adapter
from qswitch.plan.families import shape_from_config
from qswitch.run_dir import RunDir
from tests.tiny import ARCHITECTURES, save_tiny, tiny_config, tiny_tokenizer

FP32 = Runtime(device=torch.device("cpu"), compute_dtype=torch.float32)
IDS = torch.tensor([[5, 9, 30, 12, 44, 8]])
TEXTS = ["Hello there.", "What is 2 and 3?", "A b c"]


def trained_run(
    tmp_path, arch: str = "llama", *, data: dict[str, Any] | None = None, **student
) -> tuple[RunDir, RunConfig]:
    """A run directory whose adapter has moved away from its start."""
    folder = save_tiny(tmp_path / "base", arch)
    config = build_config(
        {"about": {"licences": {str(folder): "Apache-2.0"}}, "teacher": {"model": str(folder)},
         "student": {"model": str(folder), **student}, "data": {"train": "x.jsonl", **(data or {})}}
    )  # fmt: skip
    run_dir = RunDir.create(tmp_path / "run", config)
    model = load_student(config, FP32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, run_dir.adapter_path)
    tokenizer = tiny_tokenizer(chat_template="{{ messages[0]['content'] }} of the run")
    tokenizer.save_pretrained(run_dir.adapter_path)
    return run_dir, config


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_merged_model_equals_the_adapter_in_fp32(tmp_path, arch):
    from qswitch.models.student import load_adapter

    run_dir, config = trained_run(tmp_path, arch, precision="fp32")
    report = merge_run(run_dir.path, tmp_path / "out", dtype="fp32", prompts=TEXTS)
    assert report.agrees and report.max_logit_difference <= 1e-4 and report.kl_nats <= 1e-6 and report.num_prompts == 3
    assert 0 < report.pass_rounding < 1e-4
    student = load_student(config, FP32).eval()
    load_adapter(student, run_dir.adapter_path)
    student.eval()
    attention = attention_kind(student.causal_model.config)  # Gemma 2: transformers before 5.23 would leave its cap out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation=attention).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, student.logits(student.hidden(IDS)), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "student",
    [
        {"precision": "nf4"},
        {"lora": {"use_dora": True}},
        {"lora": {"modules_to_save": ["norm"], "target_modules": ["q_proj", "lm_head"]}},
        {"adapter": "none"},
    ],
)
def test_every_kind_of_student_merges_into_plain_bf16(tmp_path, student):
    run_dir, _ = trained_run(tmp_path, **student)
    report = merge_run(run_dir.path, tmp_path / "out", prompts=TEXTS)
    assert (
        report.max_logit_difference <= 1e-4
        and report.merge_error <= 1e-4
        and report.kl_nats < 1e-2
        and report.dtype == "bf16"
    )
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not any("adapter" in name for name in names)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and str(tmp_path) not in json.dumps(config)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_template_and_card_come_along(tmp_path):
    run_dir, _ = trained_run(tmp_path)
    run_dir.summary_path.write_text(
        json.dumps({"kl_before_nats": 1.5, "kl_after_nats": 0.75, "steps": 3, "peak_gib": 7.5})
    )
    merge_run(run_dir.path, tmp_path / "out", prompts=TEXTS)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template.endswith("of the run")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card and "| 1.5 |" in card and "| 0.75 |" in card
    assert "at its peak, GiB | 7.5 |" in card and ", 3 steps" in card
    assert "AutoModelForCausalLM.from_pretrained" in card and str(tmp_path) not in card


def test_a_licence_the_hub_does_not_know_is_named_as_other(tmp_path):
    _, config = trained_run(tmp_path)
    config = config.model_copy(
        update={"about": config.about.model_copy(update={"licences": {config.student.model: "Gemma Terms of Use"}})}
    )
    card = model_card(config, "base", {}, 0.0, "bf16")
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "other" and header["license_name"] == "Gemma Terms of Use"
    assert f"- {Path(config.student.model).name}: Gemma Terms of Use" in card


def test_a_card_says_what_was_done_and_nothing_else():
    pair = {"teacher": {"model": "big/teacher"}, "student": {"model": ["package:x/y.gguf", "small/student"]},
            "data": {"train": "x.jsonl"}}  # fmt: skip
    distilled, tuned = (model_card(build_config(pair, {"method": m}), "s", {}, 0.0, "bf16") for m in ("gkd", "sft"))
    assert yaml.safe_load(distilled.split("---")[1])["base_model"] == "small/student"
    assert "`big/teacher`" in distilled and "policy `student`" in distilled and "schedule" not in distilled
    assert "big/teacher" not in tuned and "policy" not in tuned and "loss `cross_entropy`" in tuned
    assert "- package:x/y.gguf or small/student: licence not known" in tuned and "license" not in tuned.split("---")[1]


def test_a_card_names_a_file_and_a_folder_of_this_machine_by_their_last_part(tmp_path):
    file = tmp_path / "small.Q4_0.gguf"
    file.touch()
    config = build_config({"teacher": {"model": str(tmp_path)}, "student": {"model": str(file)},
                           "data": {"train": "x.jsonl"}})  # fmt: skip
    card = model_card(config, "s", {}, 0.0, "bf16")
    assert "- Student: `small.Q4_0.gguf`" in card and f"- Teacher: `{tmp_path.name}`" in card
    assert str(tmp_path) not in card and str(tmp_path.parent) not in card


def test_the_base_cut_into_the_run_directory_is_merged(tmp_path):
    from qswitch.models.student import save_adapter as save

    folder, _ = save_tiny(tmp_path / "base", layers=3), None
    config = build_config(
        {"teacher": {"model": str(folder)}, "student": {"model": str(folder), "shrink_to_layers": 1},
         "data": {"train": "x.jsonl"}}
    )  # fmt: skip
    run_dir = RunDir.create(tmp_path / "run", config)
    save_tiny(run_dir.student_base_path, layers=1)
    save(load_student(config, FP32, base_path=run_dir.student_base_path), run_dir.adapter_path)
    merge_run(run_dir.path, tmp_path / "out", prompts=TEXTS)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 1


def test_a_merge_whose_report_could_not_be_written_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    run_dir, _ = trained_run(tmp_path)

    def full(*_: object) -> float:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("qswitch.export.merge._kl_nats", full)
        merge_run(run_dir.path, tmp_path / "out", prompts=TEXTS)
    assert not (tmp_path / "out").exists()
    assert merge_run(run_dir.path, tmp_path / "out", prompts=TEXTS).agrees


def test_a_folder_that_holds_something_is_refused(tmp_path):
    run_dir, _ = trained_run(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ModelError, match="not empty"):
        merge_run(run_dir.path, tmp_path / "out")


def test_a_run_without_an_adapter_is_explained(tmp_path):
    folder = save_tiny(tmp_path / "base")
    config = build_config(
        {"teacher": {"model": str(folder)}, "student": {"model": str(folder)}, "data": {"train": "x.jsonl"}}
    )
    run_dir = RunDir.create(tmp_path / "run", config)
    with pytest.raises(RunDirError, match="no adapter yet"):
        merge_run(run_dir.path, tmp_path / "out")


def test_the_merged_model_ends_at_every_token_that_ended_a_response(tmp_path):
    run_dir, _ = trained_run(tmp_path)
    GenerationConfig(eos_token_id=[2, 7]).save_pretrained(run_dir.adapter_path)
    merge_run(run_dir.path, tmp_path / "out", prompts=TEXTS)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 7]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("lora", [{}, {"use_dora": True, "target_modules": "all-linear"}])
def test_fp64_passes_layer_by_layer_are_those_of_the_whole_model_in_fp64(tmp_path, arch, lora):
    run_dir, config = trained_run(tmp_path, arch, precision="fp32", lora=lora)
    hf = _trained(config, resolve_reference(config.student.model), run_dir.adapter_path).hf
    before = {name: value.clone() for name, value in hf.state_dict().items()}
    wide, widest = [], [0]

    def count(module, *_):
        wide.append(sum(p.numel() for p in hf.parameters() if p.dtype == torch.float64))
        widest[0] = max(widest[0], wide[-1])

    handle = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        by_layer = _exact_logits(hf, [IDS, IDS[:, :3]])
    finally:
        handle.remove()
    assert all(torch.equal(value, before[name]) and value.dtype == before[name].dtype
               for name, value in hf.state_dict().items())  # fmt: skip
    assert 0 < widest[0] < 0.75 * sum(p.numel() for p in hf.parameters()), "never the whole model in eight bytes"
    with torch.no_grad():
        whole = hf.to(torch.float64)(input_ids=IDS, use_cache=False).logits[0]
    for found, expected in zip(by_layer, (whole, whole[:3]), strict=True):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_a_finished_merge_is_left_as_it_is_and_another_adapter_is_not_mixed_with_it(tmp_path):
    run_dir, config = trained_run(tmp_path)
    said: list[str] = []
    first = merge_run(run_dir.path, prompts=TEXTS, notify=said.append)
    assert [line.split()[0] for line in said] == ["reading", "computing", "computing", "writing", "reading"]
    assert first.output_dir == run_dir.path / "merged" and json.loads((first.output_dir / "merge.json").read_text())
    weights = first.output_dir / "model.safetensors"
    written, mode = weights.stat().st_mtime_ns, stat.S_IMODE(weights.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    assert mode == 0o666 & ~umask, "not for its owner alone"
    assert merge_run(run_dir.path, prompts=TEXTS) == first and weights.stat().st_mtime_ns == written
    with pytest.raises(ModelError, match="another merge of this run"):
        merge_run(run_dir.path, prompts=TEXTS, dtype="fp32")
    save_adapter(load_student(config, FP32), run_dir.adapter_path)
    with pytest.raises(ModelError, match="another merge of this run"):
        merge_run(run_dir.path, prompts=TEXTS)


SUMMARY = {"steps": 9, "best_step": 6, "processes": 1, "kl_before_nats": 2.0, "kl_after_nats": 1.0, "seconds": 5.0,
           "peak_gib": 2.5, "planned_gib": 3.0, "versions": {"torch": "2.13"}, "commit": "abc"}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "is_another"),
    [
        ({"peak_gib": 2.51, "seconds": 6.0, "planned_gib": 3.1, "versions": {"torch": "3.0"}, "commit": "def"}, False),
        ({"kl_after_nats": 0.9}, True),
        ({"best_step": 9}, True),
        ({"steps": 12}, True),
    ],
)
def test_a_merge_is_known_by_what_the_training_decided(tmp_path, changes, is_another):
    """A finished run that is resumed ends again at once, and writes its memory and the versions of today."""
    run_dir, _ = trained_run(tmp_path)
    GenerationConfig(eos_token_id=2).save_pretrained(run_dir.adapter_path)
    run_dir.write_json(run_dir.summary_path.name, SUMMARY)
    weights = run_dir.trained_weights()
    source = source_of(run_dir, weights)
    run_dir.write_json(run_dir.summary_path.name, SUMMARY | changes)
    for name, key in (("generation_config.json", "transformers_version"), ("adapter_config.json", "peft_version")):
        path = weights / name
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), key: "9.9"}))
    assert (source_of(run_dir, weights) != source) == is_another
    run_dir.write_json(run_dir.summary_path.name, SUMMARY)
    GenerationConfig(eos_token_id=[2, 7]).save_pretrained(weights)
    assert source_of(run_dir, weights) != source, "of other end tokens"


def test_the_mark_of_a_merge_covers_all_that_its_card_reads(tmp_path):
    """But for time and memory, which every resume measures anew."""
    _, config = trained_run(tmp_path)
    read: set[str] = set()

    class Watched(dict):
        def get(self, key, default=None):
            read.add(key)
            return super().get(key, default)

        def __getitem__(self, key):
            read.add(key)
            return super().__getitem__(key)

    model_card(config, "name", Watched(SUMMARY | {"rollout_batches": 9}), 0.0, "bf16")
    assert read == {*_OF_THE_TRAINING, "seconds", "peak_gib"}


def test_a_merge_of_an_earlier_version_is_one_of_the_weights_it_names(tmp_path):
    run_dir, config = trained_run(tmp_path)
    first = merge_run(run_dir.path, prompts=TEXTS)
    path = first.output_dir / "merge.json"
    written = json.loads(path.read_text())
    del written["source_sha256"]
    weights = (run_dir.adapter_path / "adapter_model.safetensors").read_bytes()
    path.write_text(json.dumps(written | {"adapter_sha256": hashlib.sha256(weights).hexdigest()}))
    again = merge_run(run_dir.path, prompts=TEXTS)
    assert again.output_dir == first.output_dir and again.merge_error == first.merge_error
    assert run(["push", str(run_dir.path), "me/student", "--dry-run"]) == 0
    save_adapter(load_student(config, FP32), run_dir.adapter_path)
    with pytest.raises(ModelError, match="another merge of this run"):
        merge_run(run_dir.path, prompts=TEXTS)
    assert run(["push", str(run_dir.path), "me/student", "--dry-run"]) == 2


def test_a_run_that_has_not_finished_is_merged_with_its_template_and_end_tokens(tmp_path):
    """The base's own are another model's: a base that was never asked anything, say."""
    run_dir, config = trained_run(tmp_path, data={"template": "alpaca"})
    GenerationConfig(eos_token_id=[2, 7]).save_pretrained(config.teacher.model)
    checkpoint = run_dir.checkpoints_path / "step-000003"
    checkpoint.mkdir(parents=True)
    shutil.copytree(run_dir.adapter_path, checkpoint / "adapter")
    for path in (checkpoint / "adapter").glob("*token*"):
        path.unlink()
    write_manifest(checkpoint)
    finished = run_dir.adapter_path.rename(tmp_path / "finished")
    report = merge_run(run_dir.path, prompts=TEXTS)
    tokenizer = AutoTokenizer.from_pretrained(report.output_dir)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False)
    assert "### Instruction:" in asked and GenerationConfig.from_pretrained(report.output_dir).eos_token_id == [2, 7]
    assert ", 3 steps" in (report.output_dir / "README.md").read_text()
    assert merge_run(run_dir.path, prompts=TEXTS) == report
    finished.rename(run_dir.adapter_path)  # of the same weights, with a template and figures of its own
    with pytest.raises(ModelError, match="another merge of this run"):
        merge_run(run_dir.path, prompts=TEXTS)


def test_a_merge_that_disagrees_says_so_each_time(tmp_path, monkeypatch, caplog):
    run_dir, _ = trained_run(tmp_path)
    monkeypatch.setattr("qswitch.export.merge._kl_nats", lambda *_: 0.5)
    for _ in range(2):
        caplog.clear()
        assert not merge_run(run_dir.path, prompts=TEXTS).agrees
        assert "differs from base + adapter by KL 0.5 nats" in caplog.text


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_a_student_with_code_of_its_own_is_merged_where_the_run_trusts_it(tmp_path):
    run_dir, config = trained_run(tmp_path, trust_remote_code=True)
    folder = Path(config.student.model)
    (folder / "mine.py").write_text(CODE)
    values = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    named = {**values, "model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(named))
    report = merge_run(run_dir.path, tmp_path / "out", prompts=TEXTS)
    assert report.agrees and (tmp_path / "out" / "mine.py").is_file()


def test_the_merged_folder_says_its_positions_to_older_readers_too(tmp_path):
    run_dir, _ = trained_run(tmp_path)
    merge_run(run_dir.path, tmp_path / "out", prompts=TEXTS)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 10000.0
    named = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert named["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_sentencepiece_model_of_the_base_comes_along(tmp_path):
    run_dir, config = trained_run(tmp_path)
    (Path(config.student.model) / "tokenizer.model").write_bytes(b"pieces")
    report = merge_run(run_dir.path, tmp_path / "out", prompts=TEXTS)
    assert (report.output_dir / "tokenizer.model").read_bytes() == b"pieces"


def test_a_host_too_small_for_the_merge_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    run_dir, _ = trained_run(tmp_path)
    monkeypatch.setattr("qswitch.export.merge.detect_budget_bytes", lambda device: (1000, "available host memory"))
    monkeypatch.setattr("qswitch.export.merge.read_model", None)
    with pytest.raises(PlanError, match=r"0\.0 are free \(available host memory\)") as refused:
        merge_run(run_dir.path, tmp_path / "out", prompts=TEXTS)
    assert refused.value.exit_code == 3 and not (tmp_path / "out").exists()


def test_the_vocabulary_counts_in_the_forecast_beyond_its_weights():
    from dataclasses import replace

    shape = shape_from_config(tiny_config().to_dict())
    larger = replace(shape, vocab_size=shape.vocab_size + 1000)  # the same weights
    grown = merge_bytes(larger, [10, 30]) - merge_bytes(shape, [10, 30])
    assert grown >= 1000 * (4 * 40 + 2 * 8 * 60), "the kept logits of both prompts, padded where they are fp64"
