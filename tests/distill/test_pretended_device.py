"""Whole runs on a pretended GPU: no operation mixes devices, and a round of rollouts makes the host wait once.

There is no GPU in these tests; `tests/pretended_cuda.py` says what is pretended. What they find is what a first run on
a card would stop at: a tensor that was left on the host, a copy that holds up every token, a wait within a CUDA graph.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qswitch.config import TeacherSection
from qswitch.distill import decoding
from qswitch.distill.logit_cache import LogitCache
from qswitch.distill.loss_scale import LossScale
from qswitch.distill.sequence import TrainingSequence
from qswitch.distill.trainer import Trainer
from qswitch.errors import Interrupted
from qswitch.models.language_model import LanguageModel
from qswitch.models.load import load_teacher
from qswitch.models.runtime import Runtime
from qswitch.rollout.engine import Engine
from qswitch.rollout.graph_trial import GraphTrial
from qswitch.run import distill, resume
from qswitch.run_dir import RunDir
from tests.distill.test_loss_scale import at_scale
from tests.distill.test_trainer import folders, settings  # noqa: F401
from tests.pretended_cuda import CUDA, CaptureError, MixedDevicesError, Pretended, pretended_cuda
from tests.rollout.test_engines import POLICIES, draw_requests, make_pair, same, write

GPU = {
    "train__device": "cuda", "train__compute_dtype": "bf16", "teacher__precision": "nf4", "student__precision": "bf16",
    "rollout__block_tokens": 2, "student__gradient_checkpointing": True, "train__max_steps": 2,
    "student__lora": {"r": 4, "alpha": 8, "dropout": 0.1}, "rollout__max_new_tokens": 6, "data__num_validation": 2,
}  # fmt: skip
NO_LOOKS = {"train__eval_own_prompts": 0}
"""The student's own responses are looked at in one run here: every operation costs ten times as much as elsewhere."""


@pytest.fixture
def rounds(monkeypatch) -> list[Counter[str]]:
    """Waits of each round of rollouts, by place; filled while a run is pretended."""
    found: list[Counter[str]] = []
    original = Engine._round

    def counted(engine: Engine, num_drafts: int) -> Any:
        seen = engine.pretended  # type: ignore[attr-defined]
        before = Counter(seen.waits)
        answer = original(engine, num_drafts)
        found.append(Counter(seen.waits) - before)
        return answer

    monkeypatch.setattr(Engine, "_round", counted)
    return found


def run(seen: Pretended, config: Any, path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(Engine, "pretended", seen, raising=False)
    distill(config, path)
    # 11 of 12 GiB are free, of which the driver's context, that torch does not count, takes half a one.
    assert seen.memory_fractions == [(pytest.approx((11 - 0.5) / 12), 0), (1.0, 0)]


def check(rounds: list[Counter[str]]) -> None:
    assert len(rounds) > 10
    assert max(r.total() for r in rounds) == 1, max(rounds, key=Counter.total)
    assert {place.partition(":")[0] for r in rounds for place in r} == {"copy cuda to cpu at rollout/engine.py"}


def test_the_device_notices_what_cuda_would_refuse():
    """A check that cannot fail would find nothing."""
    with pretended_cuda() as seen:
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert there.is_cuda and (there + 1).device == CUDA and not here.is_cuda
        with pytest.raises(MixedDevicesError):
            here + there
        assert (there * torch.tensor(2.0)).device == CUDA, "numbers may come from the host"
        with pytest.raises(MixedDevicesError, match="numpy"):
            there.numpy()
        assert seen.num_waits == 0
        there.cpu()
        there.sum().item()
        there[there > 0]
        there[torch.tensor([0, 1])]
        assert seen.num_waits == 4
        here.pin_memory().to("cuda", non_blocking=True)
        assert seen.num_waits == 4 and seen.uploads.total() == 1
        here.to("cuda", non_blocking=True)
        assert seen.num_waits == 5, "from pageable memory the driver may wait"
        with pytest.raises(CaptureError):
            seen.record(lambda: there + here.to("cuda", non_blocking=True))
        replay = seen.record(lambda: there * 2)
        there.fill_(4)
        assert replay().tolist() == [8, 8, 8]
    assert not torch.ones(3).is_cuda and not torch.cuda.is_available(), "nothing is left behind"


@pytest.mark.parametrize("name", ["switch with a tail", "adaswitch", "skd", "student", "mixture"])
@pytest.mark.parametrize("drafts", [0, 2])
def test_a_round_waits_once_whoever_writes(name, drafts, rounds, monkeypatch):
    """In the tail too, where rows that the student has left stand beside others that it follows."""
    requests = draw_requests(random.Random(5), 14)
    pair = make_pair("llama")
    monkeypatch.setattr(Engine, "pretended", Pretended(), raising=False)
    expected, _ = write(pair, POLICIES[name], requests, batch_size=4, drafts=drafts, keep="nothing")
    rounds.clear()
    with pretended_cuda() as seen:
        monkeypatch.setattr(Engine, "pretended", seen, raising=False)
        moved = [LanguageModel(model.hf.to("cuda")) for model in pair]
        seen.waits.clear()
        written, _ = write(moved, POLICIES[name], requests, batch_size=4, drafts=drafts, keep="nothing")
        check(rounds)
        assert set(seen.waits) == {place for r in rounds for place in r}, "nor does anything wait between rounds"
    assert all(same(a, b) for a, b in zip(expected, written, strict=True))


def test_nf4_teacher_lora_student_and_checkpointing(folders, tmp_path, rounds, monkeypatch):  # noqa: F811
    with pretended_cuda() as seen:
        run(seen, settings(folders, **GPU), tmp_path / "run", monkeypatch)
        check(rounds)
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_card_without_bf16_trains_in_fp16_with_a_loss_scale(folders, tmp_path, rounds, monkeypatch):  # noqa: F811
    """As a T4 or an RTX 2060 to 2080 does when nobody chooses the arithmetic; the first scale is too high here."""
    monkeypatch.setattr(
        "qswitch.distill.learner.LossScale", lambda device, dtype: at_scale(LossScale(device, dtype), 2.0**40)
    )
    changes = {"train__compute_dtype": "auto", "loss__scope": "all", **NO_LOOKS}
    with pretended_cuda(capability=(7, 5)) as seen:
        run(seen, settings(folders, **{**GPU, **changes}), tmp_path / "run", monkeypatch)
        check(rounds)
    steps = [m for m in RunDir.open(tmp_path / "run").read_metrics() if "loss" in m]
    assert len(steps) == 2 and steps[0]["overflows"] > 2
    assert steps[0]["loss_scale"] == 2.0 ** (40 - steps[0]["overflows"])
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    moved = [value for name, value in weights.items() if "lora_B" in name]
    assert moved and all(w.dtype == torch.float32 and w.isfinite().all() and w.any() for w in moved)


def test_swap_resume_and_ground_truth(folders, tmp_path, rounds, monkeypatch):  # noqa: F811
    changes = {"teacher__residency": "swap", "data__ground_truth_mix": 0.5, "train__max_steps": 4, **NO_LOOKS}
    original = Trainer.train_step

    def stop_at_one(trainer: Trainer) -> Any:
        trainer.stop_requested = trainer.stop_requested or trainer.step == 1
        return original(trainer)

    with pretended_cuda() as seen:
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(Trainer, "train_step", stop_at_one)
            run(seen, settings(folders, **{**GPU, **changes}), tmp_path / "run", monkeypatch)
        resume(tmp_path / "run")
        check(rounds)
    batches = [m["batch"] for m in RunDir.open(tmp_path / "run").read_metrics() if "batch" in m]
    assert len(batches) == 4 and set(batches) == {"rollout", "ground_truth"}


def test_a_cache_that_moves_through_the_tiers(folders, tmp_path, rounds, monkeypatch):  # noqa: F811
    changes = {
        "cache__device_budget_gib": 1e-6, "cache__host_budget_gib": 2e-6, "rollout__reuse": 2, "loss__scope": "all",
        "cache__format": "topk", "cache__topk": 8, **NO_LOOKS,
    }  # fmt: skip
    with pretended_cuda() as seen:
        run(seen, settings(folders, **{**GPU, **changes}), tmp_path / "run", monkeypatch)
        check(rounds)
        moves = [place for place in seen.waits if "logit_cache.py" in place]
    assert moves, "no row has left the device"


@pytest.mark.parametrize("budget", [1 << 20, 0], ids=["device", "host"])
def test_a_checkpoint_holds_the_rows_of_the_device_and_not_what_they_will_be(budget):
    """Into host memory that nobody waits for, a copy has not come when it is read at once."""
    hidden = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    sequence = TrainingSequence(0, 0, [1], [2] * 4, [0, 1, 2, 3])
    with pretended_cuda() as seen:
        cache = LogitCache(
            "hidden", head=None, vocab_size=8, device=CUDA, dtype=torch.float32, device_budget_bytes=budget,
            host_budget_bytes=1 << 20, disk_path=None,
        )  # fmt: skip
        cache.put([sequence], hidden.to(CUDA))
        assert cache.stats()[f"{'device' if budget else 'host'}_bytes"] > 0
        stored = cache.state_dict()["fields"]["hidden"]
        assert torch.equal(stored, hidden)
        sent = hidden.to(CUDA).to("cpu", non_blocking=True)
        assert not sent.isfinite().any(), "else this test sees nothing"
        seen.land()
        assert torch.equal(sent, hidden)


def test_pinned_rows_count_with_the_blocks_that_hold_them(tmp_path):
    """Two times 120 bytes are within 250; the two blocks of 128 that torch pins for them are not."""
    with pretended_cuda():
        cache = LogitCache(
            "hidden", head=None, vocab_size=8, device=CUDA, dtype=torch.float32, device_budget_bytes=0,
            host_budget_bytes=250, disk_path=tmp_path / "cache",
        )  # fmt: skip
        for example in range(2):
            sequence = TrainingSequence(example, 0, [1], [2] * 5, list(range(5)))
            cache.put([sequence], torch.ones(5, 6, device=CUDA))
        used = cache.stats()
    assert (used["device_bytes"], used["host_bytes"], used["disk_bytes"]) == (0, 128, 120)


def test_passes_that_are_recorded(folders, tmp_path, rounds, monkeypatch):  # noqa: F811
    monkeypatch.setattr(decoding, "try_graphs", lambda *_, **__: GraphTrial(True, "forced", 4))
    with pretended_cuda() as seen:
        changes = {"rollout__max_new_tokens": 16, "train__max_steps": 1, **NO_LOOKS}
        run(seen, settings(folders, **{**GPU, **changes}), tmp_path / "run", monkeypatch)
        check(rounds)
        assert seen.captures > 0 and seen.replayed_launches > 0
    assert sum(m["student_replays"] for m in RunDir.open(tmp_path / "run").read_metrics() if "batch" in m) > 0


def test_a_bf16_teacher_goes_to_the_device_tensor_by_tensor(folders, monkeypatch):  # noqa: F811
    original, read = AutoModelForCausalLM.from_pretrained, []

    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        model, info = original(*args, **kwargs)
        read.extend(p.is_cuda for p in model.parameters())
        return model, info

    with pretended_cuda():
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
        section = TeacherSection(model=str(folders[0]), precision="bf16")
        load_teacher(section, Runtime(device=CUDA, compute_dtype=torch.bfloat16))
    assert read and all(read), "the model lay in host memory as a whole"
