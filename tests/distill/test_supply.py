"""DistiLLM's mix of batches: when the share grows, which batch comes, what is replayed, what a resume changes."""

from __future__ import annotations

import json
import math

import pytest

from qswitch.distill import supply
from qswitch.distill.supply import AdaptiveShare
from qswitch.distill.trainer import Trainer
from qswitch.errors import Interrupted
from qswitch.run import distill, resume
from qswitch.run_dir import RunDir
from tests.distill.test_trainer import adapter_bytes, folders
from tests.distill.test_training_by_method import with_method

__all__ = ["folders"]


def test_the_share_grows_by_a_tenth_for_every_rise_beyond_the_tolerance():
    share = AdaptiveShare(tolerance_nats=0.1)
    seen = [(loss, share.observe(loss), share.phi) for loss in (2.0, 1.5, 2.05, 2.1, 2.15, 2.19, 2.2)]
    assert [grew for _, grew, _ in seen] == [False, False, False, True, False, False, True]
    assert share.phi == 0.2
    for loss in range(3, 30):
        share.observe(float(loss))
    assert share.phi == 1.0


@pytest.mark.parametrize(("phi", "progress"), [(0.0, 0.3), (0.4, 0.0), (0.4, 0.5), (1.0, 0.75)])
def test_batches_have_the_documented_shares(phi: float, progress: float):
    share = AdaptiveShare(0.1, phi=phi)
    coins = [(i + 0.5) / 1000 for i in range(1000)]
    drawn = [share.batch(coin, progress, can_replay=True) for coin in coins]
    expected = {"rollout": phi * (1 - progress), "replay": phi * progress, "ground_truth": 1 - phi}
    for source, probability in expected.items():
        assert abs(drawn.count(source) / 1000 - probability) <= 0.001
    fresh = [share.batch(coin, progress, can_replay=False) for coin in coins]
    assert "replay" not in fresh and abs(fresh.count("rollout") / 1000 - phi) <= 0.001


def test_a_run_goes_through_all_three_sources_and_resumes_bit_for_bit(folders, tmp_path, monkeypatch):
    """Every validation is made to look worse than the one before, so that phi grows in steps of a half."""
    monkeypatch.setattr(supply, "PHI_STEP", 0.5)
    observed = AdaptiveShare.observe

    def observe_worse(self: AdaptiveShare, _loss: float) -> bool:
        return observed(self, 0.0 if self.reference_nats is None else 1e3 + self.phi)

    monkeypatch.setattr(AdaptiveShare, "observe", observe_worse)
    config = with_method(
        folders, "distillm", rollout__replay_capacity=8, train__max_steps=12, train__eval_steps=3, train__save_steps=3
    )
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    distill(config, whole)
    lines = RunDir.open(whole).read_metrics()
    batches = [line["batch"] for line in lines if "batch" in line]
    assert batches[:3] == ["ground_truth"] * 3, "phi is 0 at first"
    assert set(batches) == {"ground_truth", "rollout", "replay"}
    assert all(line["loss"] > 0 for line in lines if "batch" in line)
    summary = json.loads((whole / "summary.json").read_text())
    written = summary["rollout_batches"]
    assert written == sum(batch != "ground_truth" for batch in batches) > 0
    assert f"policy `student` in {written} of 12 batches" in (whole / "adapter" / "README.md").read_text()
    shares = [line["student_batch_share"] for line in lines if "student_batch_share" in line]
    assert shares[0] > 0 and shares == sorted(shares)

    original = Trainer.train_step

    def stop_late(self: Trainer):
        self.stop_requested = self.step == 7
        return original(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "train_step", stop_late)
        distill(config, halves)
    resume(halves)
    assert adapter_bytes(whole) == adapter_bytes(halves)
    assert [m["batch"] for m in RunDir.open(halves).read_metrics() if "batch" in m] == batches


@pytest.mark.parametrize("schedule", ["exponential", "relative"])
def test_a_threshold_that_adapts_resumes_bit_for_bit_and_sees_no_batch_size(folders, tmp_path, schedule):
    """Stopped between two steps of one set, and decoded three rows at a time instead of eight."""
    changes = {
        "rollout__schedule": schedule, "rollout__teacher_share": 0.3, "rollout__steps_at_once": 2,
        "loss__scope": "all", "train__max_steps": 6, "train__eval_steps": 6, "train__save_steps": 2,
        "train__compute_dtype": "fp64",
    }  # fmt: skip
    whole, halves, small = tmp_path / "whole", tmp_path / "halves", tmp_path / "small"
    distill(with_method(folders, "switch", **changes, rollout__batch_size=8), whole)
    lines = [line for line in RunDir.open(whole).read_metrics() if "loss" in line]
    factors = [line["threshold_factor"] for line in lines if line["threshold_factor"] is not None]
    assert len(factors) == 3 and factors[0] == 1 and len(set(factors)) == 3, "one factor a set, each another"
    assert [line["fresh"] > 0 for line in lines] == [True, False] * 3

    original = Trainer.train_step

    def stop_within_a_set(self: Trainer):
        self.stop_requested = self.step == 2
        return original(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "train_step", stop_within_a_set)
        distill(with_method(folders, "switch", **changes, rollout__batch_size=8), halves)
    resume(halves)
    distill(with_method(folders, "switch", **changes, rollout__batch_size=3), small)
    assert adapter_bytes(whole) == adapter_bytes(halves)
    for other in (halves, small):
        found = [m["threshold_factor"] for m in RunDir.open(other).read_metrics() if m.get("threshold_factor")]
        assert found == pytest.approx(factors, rel=1e-9)
        tokens = [[t["text"] for t in r["tokens"]] for r in RunDir.open(other).read_rollouts()]
        assert tokens == [[t["text"] for t in r["tokens"]] for r in RunDir.open(whole).read_rollouts()]


def test_a_runs_policy_is_the_one_that_it_wrote_with_last(folders, tmp_path):
    from qswitch.rollout.generate import Answerer

    config = with_method(
        folders, "switch", rollout__schedule="relative", rollout__teacher_share=0.3, train__max_steps=3,
        train__eval_steps=3, train__save_steps=3,
    )  # fmt: skip
    distill(config, tmp_path / "run")
    threshold = Answerer(tmp_path / "run").run_policy.threshold
    state = json.loads((tmp_path / "run" / "threshold.json").read_text())
    held_out = json.loads((tmp_path / "run" / "held_out.json").read_text())
    assert state["expected_tokens"] == sum(held_out["tokens"]) / len(held_out["tokens"])
    assert state["sets"] == 3 and threshold.factor == pytest.approx(math.exp(state["log_factor"]))
    assert threshold.decay_rate == pytest.approx(3.6 / state["expected_tokens"])
