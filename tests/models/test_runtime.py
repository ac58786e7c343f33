"""The device that nvidia-smi shows is used or refused, never silently replaced by the CPU."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch

from qswitch import doctor
from qswitch.config import TrainSection
from qswitch.errors import ModelError
from qswitch.layers import build_config
from qswitch.models.runtime import make_runtime, unusable_gpu
from qswitch.plan.machine import detect_budget_bytes
from qswitch.preflight import settings_problems

NVIDIA_SMI = """#!/bin/sh
case "$*" in
  *driver_version*) echo 470.223.02;;
  *compute_cap*) echo "11264, NVIDIA GeForce RTX 3060, 8.6";;
esac
"""


@pytest.fixture
def shown_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver with a card that this build of torch cannot use."""
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_card_that_torch_cannot_use_is_refused_with_driver_and_build(shown_gpu, device, monkeypatch):
    with pytest.raises(ModelError, match=r"RTX 3060, driver 470\.223\.02, but torch .* train\.device=cpu"):
        make_runtime(TrainSection(device=device))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA. Install a CUDA build" in str(unusable_gpu())
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def fails(text: str) -> str:
        monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError(text)))
        return str(unusable_gpu())

    said = fails("The NVIDIA driver on your system is too old\n(found version 11040). " + "More words. " * 30)
    assert "CUDA 13.0 cannot use it: The NVIDIA driver on your system is too old (found version 11040)." in said
    assert "CUDA 13.0 needs driver 580 or later" in said and "sees no GPU" in said
    said = fails("Error 802: system not yet initialized")
    assert said.endswith("Error 802: system not yet initialized."), "that is no fault of the driver's age"


def test_the_cpu_is_used_where_it_is_asked_for(shown_gpu, monkeypatch):
    assert make_runtime(TrainSection(device="cpu")).device.type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert make_runtime(TrainSection()).device.type == "cpu" and unusable_gpu() is None


def test_the_doctor_knows_a_token_that_a_login_has_left(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    assert "reachable; no token (only gated models need one" in doctor._try_hub()
    (tmp_path / "token").write_text("hf_of_a_login")
    assert doctor._try_hub().endswith("reachable; with a token")


def test_the_doctor_says_it(shown_gpu, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = next(line for line in doctor.render(doctor.examine()).splitlines() if line.startswith("device"))
    assert "cpu" in line and "nvidia-smi shows the first GPU, NVIDIA GeForce RTX 3060" in line


def test_a_driver_that_fails_is_said_and_nothing_begins_on_the_cpu(tmp_path, monkeypatch):
    """As after an update of the driver, until the machine is restarted."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'; exit 18\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = r"nvidia-smi fails \(exit code 18: Failed to initialize NVML: Driver/library version mismatch\).* restart"
    with pytest.raises(ModelError, match=f"{said}.*train.device=cpu"):
        make_runtime(TrainSection())
    assert make_runtime(TrainSection(device="cpu")).device.type == "cpu"
    config = build_config({"teacher": {"model": "a"}, "student": {"model": "b"}, "data": {"train": "c.jsonl"}})
    assert any(re.search(said, problem) for problem in settings_problems(config))
    assert not any("nvidia-smi" in problem for problem in settings_problems(config, elsewhere=True))
    assert re.search(said.replace(".* restart", ""), detect_budget_bytes()[1]), "a plan says what it did not see"
    program.write_text("#!/bin/sh\necho 'No devices were found'; exit 6\n")
    assert make_runtime(TrainSection()).device.type == "cpu", "there is a driver, and no card"
