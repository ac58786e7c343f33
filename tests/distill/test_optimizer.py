"""Optimizers: what they hold, what a checkpoint keeps of it, what a failed attempt leaves. And what trackers hear."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import yaml

from qswitch.config import TrainSection
from qswitch.distill.checkpoint import load_checkpoint, save_checkpoint, saved_part
from qswitch.distill.optimizer import end_trackers, make_accelerator, make_optimizer
from qswitch.distill.trainer import Trainer
from qswitch.errors import Interrupted
from qswitch.layers import build_config
from qswitch.models.language_model import LanguageModel
from qswitch.run import distill, resume
from qswitch.run_dir import RunDir
from tests.distill.test_pretended_device import GPU, NO_LOOKS
from tests.distill.test_trainer import adapter_bytes, folders, settings  # noqa: F401
from tests.extras import extra
from tests.pretended_cuda import pretended_cuda
from tests.tiny import tiny_model

EIGHT_BIT = TrainSection(optimizer="paged_adamw_8bit", learning_rate=1e-2, weight_decay=0.1)
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    """Matrices, one that is kept in 8 bits, in blocks of 256 of which the last is not full, one too small for it."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(size, 1, generator=generator)) for size in (4097, 8)]


def set_gradients(of: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in of:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_the_8_bit_optimizer_is_adamw_with_the_runs_settings():
    """Its first step, before which there is nothing to round, is that of torch; later ones are near."""
    found, expected = parameters(), parameters()
    eight_bit = make_optimizer(EIGHT_BIT, found)
    exact = torch.optim.AdamW(expected, lr=1e-2, weight_decay=0.1)
    for step, tolerance in enumerate((1e-6, 0.01, 0.01)):
        for optimizer, own in ((eight_bit, found), (exact, expected)):
            set_gradients(own, step)
            optimizer.step()
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    large, small = (eight_bit.state[p] for p in found)
    assert large["state1"].dtype == large["state2"].dtype == torch.uint8 and small["state1"].dtype == torch.float32
    assert large["absmax1"].shape == large["absmax2"].shape == (17,)


@pytest.mark.parametrize("kind", ["adamw", "paged_adamw_8bit"])
def test_matrices_decay_and_biases_and_norms_do_not(kind):
    """Without a gradient a step only decays: by the rate times train.weight_decay."""
    train = TrainSection(optimizer=kind, learning_rate=1e-2, weight_decay=0.1)
    layers = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3), torch.nn.Embedding(4, 3))
    for parameter in layers.parameters():
        torch.nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    make_optimizer(train, list(layers.parameters())).step()
    found = {name: parameter.mean().item() for name, parameter in layers.named_parameters()}
    decayed = pytest.approx(1 - 1e-2 * 0.1)
    assert found == {"0.weight": decayed, "0.bias": 1, "1.weight": 1, "1.bias": 1, "2.weight": decayed}
    vectors = [torch.nn.Parameter(torch.ones(3))]
    assert len(make_optimizer(train, vectors).param_groups) == 1


def page_like_a_gpu(monkeypatch: Any) -> list[torch.Tensor]:
    """State that bitsandbytes pages is, for torch, host memory with two marks; returns what was fetched."""
    fetched: list[torch.Tensor] = []

    def paged(_: Any, parameter: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        buffer = torch.zeros_like(parameter, dtype=dtype)
        buffer.is_paged, buffer.page_deviceid = True, 0  # type: ignore[attr-defined]
        return buffer

    monkeypatch.setattr(bnb.optim.PagedAdamW8bit, "get_state_buffer", paged)
    monkeypatch.setattr(bnb.functional, "prefetch_tensor", fetched.append)
    return fetched


@pytest.mark.parametrize("paged", [False, True])
def test_a_checkpoint_keeps_the_8_bit_state(tmp_path: Path, monkeypatch, paged):
    fetched = page_like_a_gpu(monkeypatch) if paged else []
    student = LanguageModel(tiny_model("llama"))
    own = parameters()
    optimizer = make_optimizer(EIGHT_BIT, own)
    for step in range(3):
        set_gradients(own, step)
        optimizer.step()
    folder = save_checkpoint(tmp_path, step=3, student=student, states={"optimizer": optimizer.state_dict()})
    other = [torch.nn.Parameter(p.detach().clone()) for p in own]
    resumed = make_optimizer(EIGHT_BIT, other)
    load_checkpoint(folder, student=student, parts={"optimizer": resumed})
    for a, b in zip(own, other, strict=True):
        assert resumed.state[b].keys() == optimizer.state[a].keys() and resumed.state[b]["step"] == 3
        for name, value in optimizer.state[a].items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == resumed.state[b][name].dtype and torch.equal(value, resumed.state[b][name]), name
    for step in (3, 4):
        for one, its in ((optimizer, own), (resumed, other)):
            set_gradients(its, step)
            one.step()
    assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
    assert bool(fetched) == paged


def test_a_run_with_the_8_bit_optimizer_resumes_and_undoes_a_failed_attempt(folders, tmp_path, monkeypatch):  # noqa: F811
    """On a pretended card, through accelerate; the attempt fails once it has gradients, before any weight moved."""
    wide = {"student__lora": {"r": 64, "alpha": 8, "dropout": 0.1}, "train__max_steps": 3, "train__save_steps": 1,
            "train__optimizer": "paged_adamw_8bit", "train__per_device_train_batch_size": 1,
            "loss__scope": "all", **NO_LOOKS}  # fmt: skip
    original = Trainer.train_step
    failures: list[int] = []

    def stop_at_two_after_a_failure(trainer: Trainer) -> Any:
        trainer.stop_requested = trainer.stop_requested or trainer.step == 1
        gradients = trainer.learner._gradients

        def failing(*args: Any) -> Any:
            answer = gradients(*args)
            if trainer.step == 1 and not failures:
                failures.append(trainer.step)
                raise torch.OutOfMemoryError("CUDA out of memory, pretended")
            return answer

        trainer.learner._gradients = failing  # type: ignore[method-assign]
        try:
            return original(trainer)
        finally:
            trainer.learner._gradients = gradients  # type: ignore[method-assign]

    with pretended_cuda():
        # 64 loss positions at a time or 32: no step has as many, so the repeated attempt computes the same.
        config = settings(folders, **{**GPU, **wide, "loss__chunk_tokens": 64})
        distill(config, tmp_path / "whole")
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(Trainer, "train_step", stop_at_two_after_a_failure)
            distill(config, tmp_path / "halves")
        resume(tmp_path / "halves")
    run_dir = RunDir.open(tmp_path / "halves")
    state = saved_part(run_dir.checkpoints()[-1], "optimizer")["state"]
    kinds = {p["__bnb_optimizer_quant_state__"]["state1"].dtype for p in state.values()}
    assert kinds == {torch.uint8, torch.float32}, "k_proj and v_proj are too narrow for 8 bits"
    assert len([m for m in run_dir.read_metrics() if m.get("loss")]) == 3 and failures == [1]
    events = [e for m in run_dir.read_metrics() for e in m.get("out_of_memory", [])]
    assert [event["stage"] for event in events] == ["loss"]
    assert adapter_bytes(tmp_path / "halves") == adapter_bytes(tmp_path / "whole")


NO_P2P = ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")


@pytest.mark.parametrize(
    ("cards", "driver", "given", "expected"),
    [
        (("RTX 4090", "RTX 4090"), "535.183.01", None, "1"),
        (("RTX 4090", "RTX 4090"), "535.183.01", "0", "0"),
        (("RTX 4090", "RTX 4090"), "550.90.07", None, None),
        (("RTX 4090",), "535.183.01", None, None),
        (("RTX 3090", "RTX 3090"), "535.183.01", None, None),
    ],
)
def test_two_rtx_40_cards_with_an_old_driver_are_used(tmp_path: Path, monkeypatch, cards, driver, given, expected):
    """accelerate asks nvidia-smi for the cards, also where this process uses one, and refuses these."""
    script = tmp_path / "nvidia-smi"
    names = "\n".join(f"{len(cards)}, NVIDIA GeForce {card}" for card in cards)
    script.write_text(f"#!/bin/sh\ncase $1 in *driver*) echo {driver};; *) echo '{names}';; esac\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in NO_P2P:
        monkeypatch.setenv(name, given or "")  # so that it is as before after the test
        if given is None:
            monkeypatch.delenv(name)
    config = build_config({"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "x.jsonl"}})
    with pretended_cuda():
        student = SimpleNamespace(device=torch.device("cuda", 0), compute_dtype=torch.float32)
        accelerator = make_accelerator(config, RunDir.create(tmp_path / "run", config), student)
        assert accelerator.device.type == "cuda"
    assert [os.environ.get(name) for name in NO_P2P] == [expected, expected]


def test_a_tracker_gets_every_setting_by_its_dotted_name(tmp_path: Path):
    extra("tensorboard")
    given = {"teacher": {"model": ["a", "b"]}, "student": {"model": "s"}, "data": {"train": "x.jsonl"}}
    config = build_config({**given, "train": {"report_to": ["tensorboard"], "learning_rate": 3e-4}})
    run_dir = RunDir.create(tmp_path / "my-run", config)
    student = SimpleNamespace(device=torch.device("cpu"), compute_dtype=torch.float32)
    make_accelerator(config, run_dir, student).end_training()
    (path,) = run_dir.path.rglob("hparams.yml")
    stored = yaml.safe_load(path.read_text())
    assert stored["train.learning_rate"] == 3e-4 and stored["teacher.model"] == "['a', 'b']"
    assert stored["student.lora.r"] == config.student.lora.r


def test_wandb_gets_the_settings_and_the_runs_name(tmp_path: Path, monkeypatch):
    """Offline, where wandb writes what it would send."""
    wandb = extra("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    given = {"teacher": {"model": ["a", "b"]}, "student": {"model": "s"}, "data": {"train": "x.jsonl"}}
    config = build_config({**given, "train": {"report_to": ["wandb"], "learning_rate": 3e-4}})
    student = SimpleNamespace(device=torch.device("cpu"), compute_dtype=torch.float32)
    accelerator = make_accelerator(config, RunDir.create(tmp_path / "my-run", config), student)
    assert wandb.run.name == "my-run" and wandb.run.project == "qswitch"
    assert wandb.run.config["train.learning_rate"] == 3e-4 and wandb.run.config["teacher.model"] == "['a', 'b']"
    accelerator.log({"nats_of_a_step": 1.5}, step=1)
    end_trackers(accelerator)
    assert wandb.run is None
    (path,) = tmp_path.rglob("run-*.wandb")
    assert b"nats_of_a_step" in path.read_bytes()
