"""A teacher whose layers lie on two GPUs writes what it writes on one, and no operation mixes the two.

The GPUs are pretended (`tests/pretended_cuda.py`), so this shows where tensors are and which tokens are written. Speed,
streams and a driver's copies from card to card are not seen.
"""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from accelerate import dispatch_model

from qswitch import teach
from qswitch.distill import decoding
from qswitch.errors import ConfigError, ModelError
from qswitch.layers import build_config
from qswitch.models.gpus import begin_on, device_map, gpus_of_teacher
from qswitch.models.language_model import LanguageModel
from qswitch.models.runtime import Runtime
from qswitch.plan import breakdown
from qswitch.plan.cards import even_split
from qswitch.rollout.kv_cache import KVState
from qswitch.run import distill
from tests.distill.test_pretended_device import GPU
from tests.distill.test_trainer import folders, settings
from tests.pretended_cuda import CUDA, MixedDevicesError, pretended_cuda
from tests.rollout import test_engines
from tests.rollout.test_engines import POLICIES, draw_requests, make_pair, same, write
from tests.tiny import tiny_model

__all__ = ["folders"]

SECOND = torch.device("cuda", 1)


def test_two_cards_are_two_places():
    """A check that cannot fail would find nothing."""
    with pretended_cuda(2) as seen:
        one, other = torch.ones(3, device="cuda"), torch.ones(3, device="cuda:1")
        assert (one.device, other.device, (other + 1).device) == (CUDA, SECOND, SECOND)
        for mixed in (lambda: one + other, lambda: one[other.long()], lambda: torch.cat([one, other]),
                      lambda: one * other.sum()):  # fmt: skip
            with pytest.raises(MixedDevicesError):
                mixed()
        assert (one + other.to(0)).device == CUDA and one.copy_(other).device == CUDA
        assert seen.num_waits == 0, "between cards the host waits for nothing"


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "falcon_h1", "lfm2"])
def test_a_rollout_of_a_teacher_on_two_cards_is_that_of_one(arch, monkeypatch):
    """Refills, drafts that are taken back and rows that end: every index meets the caches of both cards."""
    requests = draw_requests(random.Random(3), 10)
    monkeypatch.setattr(test_engines, "ONE_LAYER", ())  # every family has layers for both cards
    teacher, student = make_pair(arch)
    expected, _ = write((teacher, student), POLICIES["switch"], requests, batch_size=4, drafts=2, keep="all")
    caches: list[KVState] = []
    made = KVState.__init__

    def kept(state: KVState, *args: Any, **kwargs: Any) -> None:
        made(state, *args, **kwargs)
        caches.append(state)

    monkeypatch.setattr(KVState, "__init__", kept)
    with pretended_cuda(2) as seen:
        hf = teacher.hf
        where = device_map(hf, [0, 1], [1, hf.config.num_hidden_layers - 1])
        spread = LanguageModel(dispatch_model(hf, where, skip_keys=hf._skip_keys_device_placement))
        begin_on(hf, 0)
        assert spread.device == CUDA and {p.device for p in hf.parameters()} == {CUDA, SECOND}
        pair = spread, LanguageModel(student.hf.to("cuda"))
        seen.waits.clear()
        written, stats = write(pair, POLICIES["switch"], requests, batch_size=4, drafts=2, keep="all")
        assert seen.num_waits == stats.rounds, seen.waits
        found = {layer.buffers.keys.device for layer in caches[0]._slot_layers}
        assert found == ({SECOND} if arch == "lfm2" else {CUDA, SECOND}), "its first layer is a convolution"
    assert all(same(a, b) and torch.equal(a.teacher_hidden, b.teacher_hidden)
               for a, b in zip(expected, written, strict=True))  # fmt: skip


def test_a_run_with_the_teacher_on_two_cards_is_that_of_one(folders, tmp_path, monkeypatch, capsys):
    changes = {**GPU, "rollout__max_new_tokens": 12, "data__ground_truth_mix": 0.5, "train__max_steps": 3}
    with pretended_cuda():
        distill(settings(folders, **changes), tmp_path / "one")
    monkeypatch.setattr(breakdown, "best_split", lambda num, gpus, measured, peaks: measured(even_split(num, gpus)))
    monkeypatch.setattr(decoding, "try_graphs", lambda *_, **__: pytest.fail("the teacher's passes cannot be recorded"))
    with pretended_cuda(2):
        distill(settings(folders, **changes, teacher__num_gpus=2, rollout__student_graphs="off"), tmp_path / "two")
    said = " ".join(capsys.readouterr().err.split())
    assert "layers of the teacher on each GPU: 1, 2" in said
    assert "CUDA graphs for the teacher: off, its layers lie on several GPUs" in said
    for name in ("adapter/adapter_model.safetensors", "rollouts.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    plan = json.loads((tmp_path / "two" / "plan.json").read_text())
    assert plan["teacher_layers"] == [1, 2] and len(plan["further_gpus"]) == 1


def test_a_store_of_a_teacher_on_two_cards_is_that_of_one(folders, tmp_path):
    changes = {
        "train__device": "cuda",
        "train__compute_dtype": "fp32",
        "data__ground_truth_mix": 1,
        "train__max_steps": 1,
    }
    kd = settings(folders, **changes).model_dump(mode="json", exclude_unset=True) | {"method": "kd"}
    with pretended_cuda(2):
        for number in (1, 2):
            teach.teach(build_config({**kd, "teacher": {**kd["teacher"], "num_gpus": number}}), tmp_path / f"{number}")
    parts = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*.safetensors"))
    assert len(parts) == 3
    for part in parts:
        assert (tmp_path / "1" / part).read_bytes() == (tmp_path / "2" / part).read_bytes()


def test_every_module_is_placed_once():
    for arch in ("llama", "gpt2", "opt", "falcon_h1"):
        hf = tiny_model(arch, layers=5)
        where = device_map(hf, [0, 1, 2])
        assert [gpu.index for gpu in where.values()].count(1) == [gpu.index for gpu in where.values()].count(2) == 2
        for name in hf.state_dict():
            owners = [place for place in where if name == place or name.startswith(f"{place}.")]
            assert len(owners) == 1, (arch, name, owners)


def test_too_few_cards_and_settings_that_exclude_each_other(folders):
    with pytest.raises(ConfigError, match="residency=swap cannot be combined with"):
        settings(folders, teacher__num_gpus=2, teacher__residency="swap", train__device="auto")
    with pytest.raises(ConfigError, match="needs GPUs, and train"):
        settings(folders, teacher__num_gpus=2)
    config = settings(folders, teacher__num_gpus=3, train__device="cuda")
    with pretended_cuda(2):
        with pytest.raises(ModelError, match="but there are 2 GPUs"):
            gpus_of_teacher(config.teacher, Runtime(device=CUDA, compute_dtype=torch.float32))
        with pytest.raises(ConfigError, match="nvidia-smi shows 2"):
            distill(config, folders[0].parent / "never")
    assert not (folders[0].parent / "never").exists()
