"""NaN and infinity, wherever they come from, end in an error that names the model to blame, and whose remedy works."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qswitch import cli
from qswitch.distill.learner import Learner
from qswitch.errors import ModelError, NonFiniteError, TrainingError
from qswitch.layers import dump_config
from qswitch.manifest import MANIFEST, write_manifest
from qswitch.run import distill, resume
from qswitch.run_dir import RunDir
from tests.distill.test_trainer import folders, make_trainer, settings

__all__ = ["folders"]

FEW = {"train__max_steps": 2, "train__eval_steps": 2, "rollout__block_tokens": 0}


def poison(model: torch.nn.Module) -> None:
    """The last norm multiplies with NaN, so that no logit is a number."""
    norm = [p for n, p in model.named_parameters() if n.endswith("norm.weight")][-1]
    with torch.no_grad():
        norm.fill_(math.nan)


def poison_file(path: Path, value: float = math.nan) -> None:
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name].view(-1)[3] = value
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "changes",
    [
        {},  # before: JSD > tau is false for NaN, the student wrote, and the run ended as a success
        {"loss__scope": "all"},
        {"data__ground_truth_mix": 1.0, "method": "kd"},
        {"rollout__policy": "student", "loss__scope": "all", "rollout__block_tokens": "auto"},
        {"rollout__policy": "mixture", "loss__scope": "all"},
        {"cache__format": "topk", "loss__scope": "all"},
    ],
    ids=["switch", "every token", "ground truth", "student writes", "mixture", "topk"],
)
def test_a_teacher_that_turns_nan_is_named_and_no_step_is_taken(folders, tmp_path, changes):
    if changes.pop("method", None):
        from tests.distill.test_training_by_method import with_method

        config = with_method(folders, "kd", train__max_steps=2)
    else:
        config = settings(folders, **{**FEW, **changes})
    trainer = make_trainer(config, tmp_path / "run")
    before = [p.detach().clone() for p in trainer.learner.trainable]
    poison(trainer.teacher.hf)
    with pytest.raises(TrainingError, match=r"teacher's .* NaN or infinite\. Step 1 was not taken.*teacher.precision"):
        trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.learner.trainable, strict=True))


def test_a_teacher_that_is_nan_from_the_start_is_named_before_the_first_step(folders, tmp_path, monkeypatch):
    from qswitch.distill import trainer as module

    held_out = module.written_by_teacher

    def poisoned(prompts: Any, teacher: Any, **options: Any) -> Any:
        poison(teacher.hf)
        return held_out(prompts, teacher, **options)

    monkeypatch.setattr(module, "written_by_teacher", poisoned)
    with pytest.raises(TrainingError, match=r"teacher's logits in a rollout of example .*No step was taken"):
        make_trainer(settings(folders, **FEW), tmp_path / "run")


@pytest.mark.parametrize("block_tokens", [0, 3])
def test_a_student_that_turns_nan_while_it_writes_is_named(folders, tmp_path, block_tokens):
    trainer = make_trainer(settings(folders, rollout__block_tokens=block_tokens), tmp_path / "run")
    poison(trainer.student.hf)
    with pytest.raises(NonFiniteError, match=r"The student's logits in a rollout of example \d+") as caught:
        trainer.train_step()
    assert caught.value.role == "student"


def test_a_validation_that_is_no_number_ends_the_run_and_saves_nothing(folders, tmp_path):
    config = settings(folders, **{**FEW, "train__max_steps": 4})
    original = Learner.update

    def ruin(self: Learner, loss: float | None) -> None:
        original(self, loss)
        if self.schedule.state_dict()["scheduler"]["last_epoch"] == 3:  # the fourth step
            with torch.no_grad():
                self.trainable[-1].fill_(math.inf)

    path = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "update", ruin)
        with pytest.raises(
            TrainingError, match=r"student's KL\(teacher .* is nan after step 4.*Go on from step-000002"
        ):
            distill(config, path)
    assert [p.name for p in RunDir.open(path).checkpoints()] == ["step-000002"]
    assert resume(path).steps == 4, "the checkpoint that is named is good"


def test_weights_that_are_no_numbers_are_never_saved(folders, tmp_path):
    trainer = make_trainer(settings(folders, **FEW), tmp_path / "run")
    with torch.no_grad():
        trainer.learner.trainable[-1].view(-1)[0] = math.inf
    with pytest.raises(TrainingError, match="student's weights are NaN or infinite after step 0"):
        trainer.save()
    assert trainer.run_dir.checkpoints() == []


def test_the_advised_command_mends_a_rate_that_was_too_high(folders, tmp_path, capsys):
    """Warm-up: the first step is small, the second one ruins the student; it is saved, and found out in the third."""
    config = settings(
        folders, rollout__block_tokens=0, train__learning_rate=1e30, train__warmup_steps=3, train__max_steps=5,
        train__eval_steps=5, train__save_steps=1, train__lr_scheduler_type="constant", loss__scope="all",
    )  # fmt: skip
    file, path = tmp_path / "config.yaml", tmp_path / "run"
    file.write_text(dump_config(config))
    assert cli.run(["distill", "--config", str(file), "--output-dir", str(path)]) == 2
    message = re.sub(r"\s+", " ", capsys.readouterr().err)
    command = re.search(r"qswitch (distill --resume \S+ --set train.learning_rate=\S+)", message)
    assert command is not None and "student's" in message, message
    checkpoints = re.findall(r"(?:damaged-)?step-\d{6}", message)
    assert checkpoints, message
    for name in checkpoints:
        assert (path / "checkpoints" / name).is_dir(), name
    # A tenth of 1e30 is no better; what is shown is that the command works.
    assert cli.run([*command.group(1).split()[:-1], "train.learning_rate=0.001"]) == 0
    assert RunDir.open(path).config.train.learning_rate == 1e-3
    rates = [m["learning_rate"] for m in RunDir.open(path).read_metrics() if "loss" in m]
    assert len(rates) == 5 and rates[-1] == 1e-3
    assert "train.learning_rate" in (path / "changes.jsonl").read_text()


def test_a_run_goes_on_longer_and_otherwise_where_it_may(folders, tmp_path):
    path = tmp_path / "run"
    distill(settings(folders, **FEW), path)
    summary = resume(path, changes={"train": {"max_steps": 4, "learning_rate": 1e-3, "lr_scheduler_type": "linear"}})
    assert summary.steps == 4
    rates = [m["learning_rate"] for m in RunDir.open(path).read_metrics() if "loss" in m]
    assert rates[2:] == pytest.approx([1e-3 / 4, 0.0]), "as if the schedule had been the new one from the start"


def test_a_resume_without_changes_keeps_the_rate_to_the_last_bit(folders, tmp_path):
    config = settings(folders, **{**FEW, "train__max_steps": 100, "train__max_tokens": 150})
    trainer = make_trainer(config, tmp_path / "run")
    for _ in range(2):
        trainer.counters.count(trainer.train_step(), 0.0)
    trainer.save()
    again = make_trainer(config, tmp_path / "again")
    shutil.copytree(trainer.run_dir.checkpoints_path, again.run_dir.checkpoints_path)
    assert again.resume()
    assert again.learner.schedule.learning_rate == trainer.learner.schedule.learning_rate
    assert again.learner.optimizer.param_groups[0]["lr"] == trainer.learner.optimizer.param_groups[0]["lr"]


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    distill(settings(folders, **FEW), path)
    return path


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("command", ["generate", "merge", "eval"])
def test_an_adapter_full_of_nan_is_refused_by_every_command(folders, trained, tmp_path, capsys, command, value):
    path = Path(shutil.copytree(trained, tmp_path / "run"))
    poison_file(path / "adapter" / "adapter_model.safetensors", value)
    (path / "adapter" / MANIFEST).unlink()  # as if it had been written so
    write_manifest(path / "adapter")
    data = str(folders[2])
    arguments = {
        "generate": ["generate", str(path), "--prompt", "hello"],
        "merge": ["merge", str(path), "--output-dir", str(tmp_path / "merged")],
        "eval": ["eval", str(path), "--data", data, "--output-dir", str(tmp_path / "eval")],
    }[command]
    assert cli.run(arguments) == 2
    message = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "adapter_model.safetensors" in message and "holds NaN or infinity" in message, message
    assert "Traceback" not in message


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_a_teacher_whose_files_hold_nan_is_refused(folders, tmp_path, precision):
    teacher = Path(shutil.copytree(folders[0], tmp_path / "teacher"))
    poison_file(teacher / "model.safetensors")
    config = settings(folders, teacher__model=str(teacher), teacher__precision=precision)
    with pytest.raises(ModelError, match=r"weights are not all numbers; \S+ holds NaN or infinity"):
        make_trainer(config, tmp_path / "run")


def test_shrink_refuses_a_model_of_nan(folders, tmp_path, capsys):
    model = Path(shutil.copytree(folders[0], tmp_path / "model"))
    poison_file(model / "model.safetensors")
    assert cli.run(["shrink", str(model), "--layers", "2", "--output-dir", str(tmp_path / "cut")]) == 2
    assert "holds NaN or infinity" in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert not (tmp_path / "cut").exists()
