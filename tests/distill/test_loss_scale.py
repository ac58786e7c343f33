"""fp16 arithmetic: a scaled loss has the gradients of the unscaled one, and an overflow moves nothing but the scale."""

from __future__ import annotations

import pytest
import torch

from qswitch.distill.loss import language_model_loss
from qswitch.distill.loss_scale import LossScale
from qswitch.distill.trainer import Trainer
from qswitch.errors import Interrupted, NonFiniteError
from qswitch.run import distill, resume
from qswitch.run_dir import RunDir
from tests.distill.test_trainer import folders, make_trainer, settings, written_sequences  # noqa: F401
from tests.tiny import trainable_state

FP16 = {"train__compute_dtype": "fp16", "student__precision": "bf16", "rollout__block_tokens": 2}


def learnt_gradients(trainer: Trainer, scale: float) -> list[torch.Tensor]:
    """Of one step at a loss scale, clipped to nothing, as the optimizer sees them."""
    trainer.learner.loss_scale = loss_scale = LossScale(trainer.device, torch.float16)
    loss_scale.load_state_dict({**loss_scale.state_dict(), "scale": scale})
    trainer.learner.learn_step(written_sequences(trainer, 8), 0)
    return [p.grad.clone() for p in trainer.learner.trainable if p.grad is not None]


def test_a_scaled_loss_has_the_gradients_of_the_unscaled_one(folders, tmp_path):  # noqa: F811
    """In fp32, where nothing over- or underflows, bit for bit: a scale is a power of two."""
    config = settings(folders, train__max_grad_norm=1e9, rollout__decay_rate=0.5, loss__scope="all")
    plain = make_trainer(config, tmp_path / "plain")
    plain.learner.learn_step(written_sequences(plain, 8), 0)
    expected = [p.grad for p in plain.learner.trainable if p.grad is not None]
    assert len(expected) > 4 and not plain.learner.loss_scale.used
    for scale in (1.0, 2.0**16):
        found = learnt_gradients(make_trainer(config, tmp_path / f"{scale:g}"), scale)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_scaling_keeps_what_fp16_would_lose():
    """The chunked loss takes its gradient in fp16, before anybody could scale the loss; against float64."""
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(48, 64), torch.randn(512, 64) / 8, torch.randint(512, (48,))
    tokens = 4096 * 48  # those of the whole step, by which each is divided

    def gradient(scale: float, dtype: torch.dtype) -> torch.Tensor:
        head = torch.nn.Linear(64, 512, bias=False, dtype=dtype).requires_grad_(False)
        head.weight.copy_(weight)
        states = hidden.to(dtype).requires_grad_()
        loss = language_model_loss(states, head, labels, normalizer=tokens / scale, chunk_tokens=16)
        loss.backward()
        assert states.grad is not None
        return states.grad.double() / scale

    exact = gradient(1.0, torch.float64)

    def error(scale: float) -> float:
        return float((gradient(scale, torch.float16) - exact).norm() / exact.norm())

    assert error(2.0**16) < 1e-2
    assert error(1.0) > 10 * error(2.0**16)


def test_frozen_weights_are_fp16_and_trained_ones_fp32(folders, tmp_path):  # noqa: F811
    trainer = make_trainer(settings(folders, **FP16, teacher__precision="bf16"), tmp_path / "run")
    assert {p.dtype for p in trainer.student.parameters() if not p.requires_grad} == {torch.float16}
    assert trainer.teacher is not None and {p.dtype for p in trainer.teacher.parameters()} == {torch.float16}
    assert {p.dtype for p in trainer.learner.trainable} == {torch.float32}
    before = trainable_state(trainer.student)
    report = trainer.train_step()
    assert report.loss is not None and any(
        not torch.equal(before[k], v) for k, v in trainable_state(trainer.student).items()
    )


def test_an_overflow_moves_no_weight_and_halves_the_scale(folders, tmp_path):  # noqa: F811
    config = settings(folders, **FP16, loss__scope="all")
    said: list[str] = []
    trainer = make_trainer(config, tmp_path / "run")
    trainer.learner._say = said.append
    before = trainable_state(trainer.student)
    scale = trainer.learner.loss_scale
    scale.load_state_dict({**scale.state_dict(), "scale": 2.0**40})
    sequences = written_sequences(trainer, 8)
    attempts: list[bool] = []
    original = trainer.learner._gradients

    def counted(*args: object) -> object:
        attempts.append(all(torch.equal(before[k], v) for k, v in trainable_state(trainer.student).items()))
        return original(*args)  # type: ignore[arg-type]

    trainer.learner._gradients = counted  # type: ignore[method-assign, assignment]
    learnt = trainer.learner.learn_step(sequences, 0)
    assert learnt is not None and learnt.overflows > 2 and len(attempts) == learnt.overflows + 1 and all(attempts)
    assert scale.value == 2.0 ** (40 - learnt.overflows)
    assert len(said) == learnt.overflows and "no weight moved" in said[0] and f"{2.0**39:g}" in said[0]
    trainer.learner.update(learnt.loss)
    after = trainable_state(trainer.student)
    assert any(not torch.equal(before[k], v) for k, v in after.items()), "the attempt that did not overflow counts"

    # It is the step of a run whose scale was that low from the start.
    other = make_trainer(config, tmp_path / "other")
    other.learner.loss_scale.load_state_dict({**scale.state_dict(), "scale": scale.value, "_growth_tracker": 0})
    again = other.learner.learn_step(written_sequences(other, 8), 0)
    assert again is not None and again.overflows == 0 and again[:3] == learnt[:3]
    other.learner.update(again.loss)
    assert all(torch.equal(after[k], v) for k, v in trainable_state(other.student).items())


def test_what_no_scale_mends_is_an_error(folders, tmp_path):  # noqa: F811
    trainer = make_trainer(settings(folders, **FP16, loss__scope="all"), tmp_path / "run")
    sequences = written_sequences(trainer, 4)
    trainer.learner.trainable[0].register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(NonFiniteError):
        trainer.learner.learn_step(sequences, 0)
    assert trainer.learner.loss_scale.value == 1.0


def test_a_run_in_fp16_resumes_with_its_scale_and_counts_no_skipped_step(folders, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(
        "qswitch.distill.learner.LossScale",
        lambda device, dtype: at_scale(LossScale(device, dtype), 2.0**30),
    )
    config = settings(folders, **FP16, loss__scope="all", train__max_steps=4, train__save_steps=1)
    summary = distill(config, tmp_path / "whole")
    original = Trainer.train_step

    def stop_at_two(trainer: Trainer) -> object:
        trainer.stop_requested = trainer.stop_requested or trainer.step == 1
        return original(trainer)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "train_step", stop_at_two)
        distill(config, tmp_path / "halves")
    resumed = resume(tmp_path / "halves")
    assert summary.steps == resumed.steps == 4 and summary.overflows == resumed.overflows > 0
    lines = [RunDir.open(tmp_path / name).read_metrics() for name in ("whole", "halves")]
    scales = [[line["loss_scale"] for line in one if "loss" in line] for one in lines]
    assert scales[0] == scales[1] and len(scales[0]) == 4 and scales[0][-1] < 2.0**30
    weights = [(tmp_path / n / "adapter" / "adapter_model.safetensors").read_bytes() for n in ("whole", "halves")]
    assert weights[0] == weights[1]


def at_scale(scale: LossScale, value: float) -> LossScale:
    scale.load_state_dict({**scale.state_dict(), "scale": value})
    return scale
