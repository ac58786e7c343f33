"""The loop on two-layer random models: accumulation, teacher-free training, resume, checkpoints, refusals."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qswitch.config import RunConfig
from qswitch.data.gather import load_prompts
from qswitch.distill.replay import staleness_nats
from qswitch.distill.sequence import TrainingSequence
from qswitch.distill.trainer import Trainer
from qswitch.divergence import divergence
from qswitch.errors import DataError, Interrupted, NonFiniteError
from qswitch.layers import build_config
from qswitch.models.load import load_teacher
from qswitch.models.pair import load_pair_tokenizer
from qswitch.models.runtime import make_runtime
from qswitch.models.student import load_student
from qswitch.run import distill, resume
from qswitch.run_dir import RunDir
from tests.tiny import save_tiny_pair, trainable_state


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    teacher, student = save_tiny_pair(folder)
    data = folder / "data.jsonl"
    lines = [
        {"prompt": f"tell me about {'abcdefghij'[i % 10] * (1 + i % 7)}", "response": f"it is {i}"} for i in range(30)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    return teacher, student, data


def settings(folders, **changes: Any) -> RunConfig:
    teacher, student, data = folders
    values: dict[str, Any] = {
        "teacher": {"model": str(teacher), "precision": "fp32"},
        "student": {"model": str(student), "precision": "fp32", "lora": {"r": 4, "alpha": 8}},
        "data": {"train": str(data), "num_validation": 4},
        "rollout": {"max_new_tokens": 10, "batch_size": 4},
        "train": {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
                  "learning_rate": 5e-3, "eval_steps": 2, "save_steps": 2, "device": "cpu", "compute_dtype": "fp32"},
    }  # fmt: skip
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        values.setdefault(section, {})[key] = value
    return build_config(values)


def make_trainer(config: RunConfig, path: Path) -> Trainer:
    run_dir = RunDir.create(path, config)
    pair = load_pair_tokenizer(config)
    _, prompts, held_out = load_prompts(config, pair)
    runtime = make_runtime(config.train)
    teacher = load_teacher(config.teacher, runtime, vocab_size=pair.vocab_size)
    student = load_student(config, runtime, vocab_size=pair.vocab_size, base_path=None)
    return Trainer(
        config, run_dir, teacher=teacher, student=student, pair=pair, prompts=prompts, validation_prompts=held_out
    )


def written_sequences(trainer: Trainer, num: int) -> list[TrainingSequence]:
    """What `num` fresh rollouts teach, with the teacher's outputs in the cache."""
    rollouts, _ = trainer.supply.roll_out(trainer.supply.loader.next(num))
    return [s for s in trainer.supply.cache_teacher(rollouts) if s.loss_steps]


def gradients(trainer: Trainer) -> list[torch.Tensor]:
    """Gradients of the first step, before the optimizer uses them."""
    sequences = written_sequences(trainer, 8)
    trainer.learner.accumulate(sequences)
    return [p.grad.clone() for p in trainer.learner.trainable if p.grad is not None]


def test_accumulation_equals_the_big_batch(folders, tmp_path):
    found = []
    for micro, accumulation in ((1, 8), (8, 1), (3, 3)):
        config = settings(
            folders, train__per_device_train_batch_size=micro, train__gradient_accumulation_steps=accumulation,
            train__compute_dtype="fp64", loss__divergence="forward_kl",
        )  # fmt: skip
        found.append(gradients(make_trainer(config, tmp_path / f"{micro}")))
    assert len(found[0]) > 4 and any(g.abs().max() > 1e-6 for g in found[0])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scope", ["interventions", "all"])
def test_training_needs_no_teacher_and_equals_rescoring(folders, tmp_path, scope):
    config = settings(
        folders, loss__scope=scope, loss__divergence="forward_kl", train__compute_dtype="fp64", rollout__decay_rate=0.5
    )
    trainer = make_trainer(config, tmp_path / "run")
    rollouts, _ = trainer.supply.roll_out(trainer.supply.loader.next(6))
    sequences = [s for s in trainer.supply.cache_teacher(rollouts) if s.loss_steps]
    tokens = sum(len(s.loss_steps) for s in sequences)
    assert tokens > 5

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the teacher ran during training")

    handles = [m.register_forward_pre_hook(refuse) for m in [trainer.teacher.hf.base_model]]
    loss = trainer.learner.accumulate(sequences)
    for handle in handles:
        handle.remove()

    total = 0.0
    with torch.no_grad():
        for s in sequences:
            ids = torch.tensor([s.prompt_ids + s.response_ids])
            trainer.student.eval()
            p, q = trainer.teacher.hf(ids).logits[0], trainer.student.hf(ids).logits[0]
            at = torch.tensor(s.loss_steps) + len(s.prompt_ids) - 1
            p_log, q_log = p[at].log_softmax(-1), q[at].log_softmax(-1)
            total += (p_log.exp() * (p_log - q_log)).sum().item()
    assert loss == pytest.approx(total / tokens, rel=1e-10)


def test_topk_cache_is_a_lower_bound_of_the_loss(folders, tmp_path):
    losses = {}
    for name, extra in (("hidden", {}), ("topk", {"cache__topk": 8})):
        config = settings(folders, cache__format=name, loss__divergence="forward_kl", **extra)
        trainer = make_trainer(config, tmp_path / name)
        sequences = written_sequences(trainer, 6)
        losses[name] = trainer.learner.accumulate(sequences)
    assert 0 < losses["topk"] < losses["hidden"]


def adapter_bytes(path: Path) -> bytes:
    return (path / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data__ground_truth_mix": 0.5, "student__lora": {"r": 4, "alpha": 8, "dropout": 0.2}},
        {"rollout__policy": "student", "loss__scope": "all"},
        {"rollout__reuse": 3, "student__lora": {"r": 4, "alpha": 8, "dropout": 0.1}},
        {"rollout__policy": "adaswitch", "rollout__adaswitch_window": 2, "rollout__block_tokens": 3},
    ],
    ids=["interventions", "ground truth and dropout", "student policy", "reuse", "adaswitch"],
)
def test_resumed_run_ends_with_the_same_bytes(folders, tmp_path, changes):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    config = settings(folders, **changes)
    summary = distill(config, whole)

    run_dir = RunDir.create(halves, config)
    if (whole / "pass_times.json").exists():  # two runs measure two tables; one run, however often stopped, keeps one
        shutil.copy(whole / "pass_times.json", halves)
    original = Trainer.train_step

    def stop_at_two(self: Trainer):
        if self.step == 2:
            self.stop_requested = True
        return original(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "train_step", stop_at_two)
        resume(halves)  # from the folder that is there
    assert run_dir.latest_checkpoint().name == "step-000003"
    resumed = resume(halves)

    assert adapter_bytes(whole) == adapter_bytes(halves)
    assert resumed.kl_after_nats == summary.kl_after_nats
    assert resumed.rollout_tokens == summary.rollout_tokens
    steps = [m["step"] for m in RunDir.open(halves).read_metrics() if "loss" in m]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("nats", [1e-3, 1e3], ids=["a new best", "no new best"])
def test_a_stop_during_validation_leaves_its_step_and_takes_no_other(folders, tmp_path, nats):
    config = settings(folders, train__eval_steps=2, train__save_steps=100)
    original = Trainer.validate

    def stop_in_validation(self: Trainer) -> float:
        if self.step == 0:
            return original(self)
        self.stop_requested = True
        return nats

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "validate", stop_in_validation)
        distill(config, tmp_path / "run")
    run_dir = RunDir.open(tmp_path / "run")
    assert run_dir.latest_checkpoint().name == "step-000002"
    assert [m["step"] for m in run_dir.read_metrics() if "loss" in m] == [1, 2]


def test_a_run_resumed_before_its_first_checkpoint_starts_from_its_adapter(folders, tmp_path):
    first = settings(folders, train__max_steps=2, train__eval_steps=2)
    after = distill(first, tmp_path / "first").kl_after_nats
    config = settings(folders, train__max_steps=1, train__eval_steps=1, student__init_adapter=str(tmp_path / "first"))
    run_dir = RunDir.create(tmp_path / "second", config)  # and stopped before anything was saved
    assert resume(run_dir.path).kl_before_nats == pytest.approx(after, rel=1e-9)


def test_a_run_leaves_everything_and_loads_with_plain_peft(folders, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = settings(folders, data__lm_corpus=str(folders[2].parent / "corpus.txt"), loss__lm_passage_tokens=32)
    summary = distill(config, tmp_path / "run")
    run_dir = RunDir.open(tmp_path / "run")
    for name in ("config.yaml", "plan.json", "metrics.jsonl", "rollouts.jsonl", "summary.json", "adapter"):
        assert (run_dir.path / name).exists(), name
    assert RunDir.open(run_dir.path).config == config
    assert summary.kl_before_nats > 0 and math.isfinite(summary.kl_after_nats)
    assert json.loads(run_dir.summary_path.read_text())["kl_before_nats"] == summary.kl_before_nats
    held_out = json.loads(run_dir.held_out_path.read_text())
    for answer in held_out["answers"]:
        assert answer["prompt"] and "user:" not in answer["prompt"], "the template around the user's words is gone"
        assert all(isinstance(answer[who]["text"], str) for who in ("before", "after", "reference"))
    assert (
        len(held_out["tokens"]) == summary.validation_prompts and sum(held_out["tokens"]) == summary.validation_tokens
    )
    for name, figure in (("before", summary.kl_before_nats), ("after", summary.kl_after_nats)):
        weighted = sum(a * n for a, n in zip(held_out[f"{name}_nats"], held_out["tokens"], strict=True))
        assert weighted / summary.validation_tokens == pytest.approx(figure, rel=1e-9)
    line = run_dir.read_metrics()[0]
    assert line["rollout_tokens"] > 0 and line["peak_gib"] > 0 and 0 <= line["teacher_share"] <= 1
    rollout = run_dir.read_rollouts()[0]
    assert "".join(t["text"] for t in rollout["tokens"]).replace("</s>", "") == rollout["response"]
    assert {t["writer"] for t in rollout["tokens"]} <= {"student", "teacher"}
    assert all(t[t["writer"]] == t["text"] for t in rollout["tokens"]), "the writer's candidate is what was written"

    base = AutoModelForCausalLM.from_pretrained(config.student.model)
    tokenizer = AutoTokenizer.from_pretrained(run_dir.adapter_path)
    for answer in held_out["answers"]:
        turns = [{"role": "user", "content": answer["prompt"]}]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        limits = {"max_new_tokens": config.rollout.max_new_tokens, "do_sample": False, "eos_token_id": 2}
        written = base.generate(**asked, **limits)[0, asked["input_ids"].shape[1] :]
        assert answer["before"]["text"] == tokenizer.decode(written, skip_special_tokens=True), "the likeliest tokens"
    before = base(torch.tensor([[5, 6, 7]])).logits
    adapted = PeftModel.from_pretrained(base, run_dir.adapter_path)
    assert not torch.allclose(adapted(torch.tensor([[5, 6, 7]])).logits, before)
    assert tokenizer.chat_template
    assert json.loads((run_dir.adapter_path / "generation_config.json").read_text())["eos_token_id"] == 2


def test_full_fine_tuning_trains_and_resumes_its_weights(folders, tmp_path):
    config = settings(folders, student__adapter="none", train__max_steps=2, student__lora={})
    summary = distill(config, tmp_path / "run")
    run_dir = RunDir.open(tmp_path / "run")
    assert summary.kl_after_nats < summary.kl_before_nats
    assert (run_dir.adapter_path / "model.safetensors").exists()


def test_distillation_brings_the_student_closer(folders, tmp_path):
    config = settings(
        folders, train__max_steps=30, loss__divergence="forward_kl", train__eval_steps=30, train__save_steps=30,
        train__learning_rate=2e-2,
    )  # fmt: skip
    summary = distill(config, tmp_path / "run")
    assert summary.kl_after_nats < 0.8 * summary.kl_before_nats


def test_steps_without_interventions_are_counted_and_change_nothing(folders, tmp_path):
    config = settings(folders, rollout__schedule="constant", rollout__constant_threshold=1.0)
    trainer = make_trainer(config, tmp_path / "run")
    before = {k: v.clone() for k, v in trainable_state(trainer.student).items()}
    counters = trainer.run()
    assert counters.steps_without_loss == 4
    assert all(torch.equal(v, before[k]) for k, v in trainable_state(trainer.student).items())


def test_non_finite_loss_stops_before_the_optimizer(folders, tmp_path):
    trainer = make_trainer(settings(folders), tmp_path / "run")
    trainer.train_step()
    with torch.no_grad():
        trainer.learner.trainable[-1].fill_(math.nan)
    weights = trainer.learner.trainable
    before = [p.clone() for p in weights]
    # The poisoned student cannot write; ground truth of the teacher's reaches the loss.
    prompt, visit = trainer.supply.loader.next(1)[0]
    sequences = trainer.supply.read_ground_truth([(prompt, visit)])
    with pytest.raises(NonFiniteError, match="The student's loss is NaN"):
        trainer.learner.accumulate(sequences)
    assert all(
        torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))
        for a, b in zip(before, trainer.learner.trainable, strict=True)
    )


def test_checkpoints_rotate_and_the_best_stays(folders, tmp_path):
    config = settings(folders, train__max_steps=6, train__save_steps=1, train__save_total_limit=2, train__eval_steps=2)
    summary = distill(config, tmp_path / "run")
    run_dir = RunDir.open(tmp_path / "run")
    names = [p.name for p in run_dir.checkpoints()]
    assert f"step-{summary.best_step:06d}" in names
    assert "step-000006" in names and len(names) <= 3
    assert not list(run_dir.checkpoints_path.glob(".*partial"))


def test_ground_truth_mix_without_responses_is_refused(folders, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(12)))
    config = settings(folders, data__train=str(data), data__ground_truth_mix=0.5)
    with pytest.raises(DataError, match="12 of 12 records have none"):
        make_trainer(config, tmp_path / "run")


def test_the_loss_is_the_named_divergence(folders, tmp_path):
    config = settings(folders, loss__divergence="skew_reverse_kl", train__compute_dtype="fp64")
    trainer = make_trainer(config, tmp_path / "run")
    sequences = written_sequences(trainer, 4)
    tokens = sum(len(s.loss_steps) for s in sequences)
    expected = 0.0
    with torch.no_grad():
        for s in sequences:
            ids = torch.tensor([s.prompt_ids + s.response_ids])
            at = torch.tensor(s.loss_steps) + len(s.prompt_ids) - 1
            p, q = (m.hf(ids).logits[0][at] for m in (trainer.teacher, trainer.student))
            expected += divergence("skew_reverse_kl", p, q, alpha=0.1).sum().item()
    assert trainer.learner.accumulate(sequences) == pytest.approx(expected / tokens, rel=1e-10)


@pytest.mark.parametrize(
    "changes", [{"rollout__decay_rate": 1.0}, {"rollout__policy": "student", "loss__scope": "all"}]
)
def test_reused_rollouts_train_without_either_model_writing(folders, tmp_path, changes):
    config = settings(folders, rollout__reuse=2, train__max_steps=6, **changes)
    trainer = make_trainer(config, tmp_path / "run")
    trainer.run()
    lines = [m for m in trainer.run_dir.read_metrics() if "loss" in m]
    assert [m["fresh"] for m in lines] == [4, 2, 2, 2, 2, 2]
    assert [m["replayed"] for m in lines] == [0, 2, 2, 2, 2, 2]
    assert lines[0]["staleness_nats"] is None
    assert all(m["staleness_nats"] > 0 for m in lines[1:])
    assert trainer.cache.stats()["sequences"] == len(trainer.supply.replay.sequences) > 0


def test_trackers_hear_of_every_step_and_every_validation(folders, tmp_path, monkeypatch):
    """Step 0 too; the figures that stand inside a line have dotted names."""
    heard: list[tuple[int, dict[str, float]]] = []
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", lambda *_, **__: None)
    monkeypatch.setattr("accelerate.Accelerator.log", lambda _, values, step: heard.append((step, values)))
    config = settings(folders, train__max_steps=4, train__eval_steps=2, train__report_to=["tensorboard"])
    trainer = make_trainer(config, tmp_path / "run")
    counters = trainer.run()
    lines = trainer.run_dir.read_metrics()
    found = {step: values for step, values in heard if trainer.validation.key in values}
    assert list(found) == [0, 2, 4] and found[0][trainer.validation.key] == counters.before_nats
    assert [step for step, values in heard if "loss" in values] == [1, 2, 3, 4]
    for line in (one for one in lines if "own" in one):
        own = found[line["step"]]
        assert own[trainer.validation.key] == line[trainer.validation.key]
        assert own["own.reverse_kl_nats"] == line["own"]["reverse_kl_nats"]
    assert found[0]["own.reverse_kl_nats"] == counters.own_before["reverse_kl_nats"]
    assert all(isinstance(value, int | float) for _, values in heard for value in values.values())
    first = next(values for _, values in heard if "loss" in values)
    assert first["seconds.rollout"] == next(line for line in lines if "loss" in line)["seconds"]["rollout"]


def test_a_rollout_of_this_step_is_not_stale(folders, tmp_path):
    config = settings(folders, rollout__reuse=2, rollout__decay_rate=1.0, train__compute_dtype="fp64")
    trainer = make_trainer(config, tmp_path / "run")
    rollouts, _ = trainer.supply.roll_out(trainer.supply.loader.next(4))
    trainer.supply.remember(rollouts, trainer.supply.cache_teacher(rollouts), step=0)
    entries = trainer.supply.replay.draw(4, 0)
    fresh = staleness_nats(trainer.learner.objective, entries, pad_id=0, device=trainer.device)
    assert fresh == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        for parameter in trainer.learner.trainable:
            parameter.add_(0.1)
    assert staleness_nats(trainer.learner.objective, entries, pad_id=0, device=trainer.device) > 1e-3
