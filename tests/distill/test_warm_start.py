"""qswitch sft: either model of a pair is fine-tuned, and a distillation starts from the result."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch

from qswitch.cli import run
from qswitch.errors import ConfigError, ModelError
from qswitch.layers import build_config, sft_config
from qswitch.models.load import load_teacher
from qswitch.models.runtime import make_runtime
from qswitch.plan.adapters import find_adapter, init_adapter_problem
from qswitch.plan.scheduler import plan_run
from qswitch.run import distill
from qswitch.run_dir import RunDir
from tests.distill.test_trainer import folders, settings

__all__ = ["folders"]


@pytest.fixture(scope="module")
def tuned(folders, tmp_path_factory) -> dict[str, Path]:
    """Both models of the pair, fine-tuned for a few steps."""
    found = {}
    for model in ("teacher", "student"):
        config = sft_config(settings(folders, train__max_steps=6, train__learning_rate=2e-2), model)
        path = tmp_path_factory.mktemp("sft") / model
        summary = distill(config, path)
        assert summary.response_loss_after_nats < summary.response_loss_before_nats
        found[model] = path
    return found


def logits(model, ids=(5, 6, 7, 8)) -> torch.Tensor:
    with torch.no_grad():
        model.eval()
        hidden = model.hidden(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                              position_ids=torch.arange(len(ids))[None])  # fmt: skip
        return model.logits(hidden)


def plain_peft_logits(base: str, adapter: Path, ids=(5, 6, 7, 8)) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits


def test_the_teacher_with_its_adapter_is_what_plain_peft_makes_of_it(folders, tuned):
    expected = plain_peft_logits(str(folders[0]), tuned["teacher"] / "adapter")
    config = settings(folders, teacher__adapter=str(tuned["teacher"]))
    merged = load_teacher(config.teacher, make_runtime(config.train))
    assert not hasattr(merged.hf, "peft_config"), "fp32 weights take the adapter in"
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)
    plain = load_teacher(settings(folders).teacher, make_runtime(config.train))
    assert (logits(plain) - expected).abs().max() > 0.05
    assert not any(p.requires_grad for p in merged.parameters())


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_an_adapter_is_read_to_the_device_of_the_run(folders, tuned, precision, monkeypatch):
    """And not to a GPU that is there and not used, which peft would take by itself."""
    config = settings(folders, teacher__precision=precision, teacher__adapter=str(tuned["teacher"]))
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: "cuda")
    monkeypatch.setattr("peft.utils.save_and_load.infer_device", lambda: "cuda")
    read_to = []
    original = peft.peft_model.load_peft_weights

    def noted(*args, device=None, **options):
        read_to.append(device)
        return original(*args, device="cpu", **options)

    monkeypatch.setattr("peft.peft_model.load_peft_weights", noted)
    load_teacher(config.teacher, make_runtime(config.train))
    assert read_to == ["cpu"]


def test_beside_quantised_weights_the_adapter_stays_apart_and_is_planned(folders, tuned):
    config = settings(folders, teacher__precision="nf4", teacher__adapter=str(tuned["teacher"]))
    attached = load_teacher(config.teacher, make_runtime(config.train))
    assert hasattr(attached.hf, "peft_config")
    own = sum(p.numel() * p.element_size() for n, p in attached.hf.named_parameters() if "lora_" in n)
    assert plan_run(config).parts["teacher_adapter"] == own > 0
    assert plan_run(settings(folders, teacher__adapter=str(tuned["teacher"]))).parts["teacher_adapter"] == 0
    assert not any(p.requires_grad for p in attached.parameters())


def test_a_distillation_starts_from_the_fine_tuned_student(folders, tuned, tmp_path):
    expected = plain_peft_logits(str(folders[1]), tuned["student"] / "adapter")
    config = settings(
        folders, student__init_adapter=str(tuned["student"]), teacher__adapter=str(tuned["teacher"]),
        train__max_steps=2, train__learning_rate=1e-12,
    )  # fmt: skip
    distill(config, tmp_path / "run")
    run_dir = RunDir.open(tmp_path / "run")
    torch.testing.assert_close(plain_peft_logits(str(folders[1]), run_dir.adapter_path), expected, rtol=0, atol=1e-4)


def test_an_adapter_of_another_rank_is_refused_with_the_settings_it_needs(folders, tuned):
    config = settings(folders, student__init_adapter=str(tuned["student"]), student__lora={"r": 8, "alpha": 8})
    problem = init_adapter_problem(config.student)
    assert problem is not None and "--set student.lora.r=4" in problem and "alpha" not in problem


def test_an_adapter_of_another_model_is_refused(folders, tuned):
    config = settings(folders, teacher__adapter=str(tuned["student"]))  # two layers, where the teacher has three
    with pytest.raises(ModelError, match=r"teacher\.adapter.*does not fit"):
        load_teacher(config.teacher, make_runtime(config.train))


def test_where_there_is_no_adapter_the_message_says_what_is_there(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"teacher\.adapter=nowhere: no such folder"):
        find_adapter("nowhere", "teacher.adapter")
    with pytest.raises(ConfigError, match="holds a whole model"):
        find_adapter(str(folders[0]), "teacher.adapter")
    unfinished = RunDir.create(tmp_path / "run", settings(folders))
    with pytest.raises(ConfigError, match="is a run that has not finished"):
        find_adapter(str(unfinished.path), "student.init_adapter")


def test_the_fine_tuned_teacher_is_stored_as_the_teacher_is(folders):
    config = settings(folders, teacher__precision="nf4", student__gradient_checkpointing=True)
    teacher = sft_config(config, "teacher")
    assert teacher.student.model == config.teacher.model and teacher.student.precision == "nf4"
    assert teacher.student.lora == config.student.lora and teacher.student.gradient_checkpointing
    assert sft_config(config, "student").student == config.student
    assert teacher.method == "sft" and not teacher.needs_teacher
    with pytest.raises(ConfigError, match="int8 cannot be fine-tuned"):
        sft_config(settings(folders, teacher__precision="int8"), "teacher")


def test_settings_of_other_methods_do_not_stand_in_the_way(folders):
    config = settings(folders, rollout__temperature=0.7, loss__temperature=2.0, rollout__decay_rate=0.3)
    assert sft_config(config, "student").rollout.temperature == 1.0


def test_the_command_fine_tunes_and_says_how_to_go_on(folders, tmp_path, capsys):
    from qswitch.layers import dump_config

    file = tmp_path / "mine.yaml"
    file.write_text(dump_config(settings(folders, train__max_steps=2)))
    out = tmp_path / "run"
    assert run(["sft", "--config", str(file), "--model", "teacher", "--output-dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"--set teacher.adapter={out}" in printed and "Loss on the responses" in printed
    assert json.loads((out / "summary.json").read_text())["method"] == "sft" and (out / "report.html").is_file()
    assert build_config({**settings(folders).model_dump(), "teacher": {"model": str(folders[0]), "adapter": str(out)}})
