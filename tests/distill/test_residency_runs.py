"""A swapped teacher, and rollouts for several steps at once: the same adapter, byte for byte, stopped or not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qswitch.distill.trainer import Trainer
from qswitch.errors import ConfigError, Interrupted
from qswitch.layers import build_config
from qswitch.plan.scheduler import plan_run
from qswitch.run import distill, resume
from qswitch.run_dir import RunDir
from qswitch.units import GIB
from tests.distill.test_trainer import adapter_bytes, folders, settings  # noqa: F401

MIXED = {"data__ground_truth_mix": 0.5, "student__lora": {"r": 4, "alpha": 8, "dropout": 0.2}}


def run(folders: Any, path: Any, **changes: Any) -> tuple[bytes, list[Any]]:  # noqa: F811
    config = settings(folders, rollout__block_tokens=2, train__max_steps=5, **changes)
    distill(config, path)
    run_dir = RunDir.open(path)
    return adapter_bytes(path), [r["response"] for r in run_dir.read_rollouts()]


@pytest.mark.parametrize(
    ("precision", "changes"),
    [
        ("fp32", {}),
        ("nf4", {}),
        ("fp32", {"rollout__steps_at_once": 3}),
        ("nf4", {**MIXED, "rollout__steps_at_once": 2}),
    ],
)
def test_swap_and_resident_end_with_the_same_bytes(folders, tmp_path, precision, changes):  # noqa: F811
    results = [
        run(folders, tmp_path / kind, teacher__precision=precision, teacher__residency=kind, **changes)
        for kind in ("resident", "swap")
    ]
    assert results[0] == results[1] and results[0][1]


def test_the_run_is_planned_for_the_prompts_there_are(folders, tmp_path):  # noqa: F811
    config = settings(folders, rollout__block_tokens=2, train__max_steps=1)
    summary = distill(config, tmp_path / "run")
    run_dir = RunDir.open(tmp_path / "run")
    plan = json.loads((run_dir.path / "plan.json").read_text())
    allowed = plan_run(config)
    assert any("the data's longest prompt" in note for note in plan["notes"])
    assert 0 < plan["phases"]["train"] < allowed.phases["train"] / GIB
    assert summary.planned_gib == pytest.approx(plan["total_gib"], abs=1e-3)


def test_rollouts_for_several_steps_are_written_by_the_student_of_the_first(folders, tmp_path):  # noqa: F811
    config = settings(folders, rollout__block_tokens=2, train__max_steps=5, rollout__steps_at_once=2)
    distill(config, tmp_path / "run")
    run_dir = RunDir.open(tmp_path / "run")
    lines = [m for m in run_dir.read_metrics() if "loss" in m]
    assert [m["fresh"] for m in lines] == [8, 0, 8, 0, 4]  # one step is left for the last ones


def test_a_budget_of_tokens_counts_step_by_step_and_the_run_says_so(folders, tmp_path, capsys):  # noqa: F811
    def lines(name, **changes):
        config = settings(folders, rollout__block_tokens=2, rollout__steps_at_once=3, **changes)
        distill(config, tmp_path / name)
        run_dir = RunDir.open(tmp_path / name)
        return [m for m in run_dir.read_metrics() if "loss" in m]

    written = lines("whole", train__max_steps=3)[0]["rollout_tokens"]
    budget = int(0.5 * written)
    found = lines("budget", train__max_steps=100, train__max_tokens=budget)
    spent = [m["spent"] for m in found]
    assert len(found) == 2 and spent[0] < 1 <= spent[1], (
        "the step that reaches the budget is the last, also where more was written"
    )
    assert found[0]["rollout_tokens"] == written and spent[1] * budget < written
    said = f"ended after 2 steps: train.max_tokens={budget:,} is reached ({spent[1] * budget:,.0f})"
    assert said in (told := capsys.readouterr().err) and "ended after 3 steps: train.max_steps=3 is reached" in told


@pytest.mark.parametrize("changes", [{"teacher__residency": "swap"}, MIXED])
def test_a_stop_before_what_was_written_has_trained_changes_nothing(folders, tmp_path, changes):  # noqa: F811
    options = {"rollout__steps_at_once": 4, **changes}
    whole, _ = run(folders, tmp_path / "whole", **options)
    config = settings(folders, rollout__block_tokens=2, train__max_steps=5, **options)
    original = Trainer.train_step

    def stop_at_one(self: Trainer) -> Any:
        self.stop_requested = self.stop_requested or self.step == 1
        return original(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "train_step", stop_at_one)
        distill(config, tmp_path / "halves")
    stopped = RunDir.open(tmp_path / "halves")
    assert stopped.latest_checkpoint().name == "step-000002"  # of the 4 that were written for
    resume(stopped.path)
    assert adapter_bytes(tmp_path / "halves") == whole


def test_steps_at_once_and_reuse_are_one_or_the_other(folders):  # noqa: F811
    values = settings(folders).model_dump()
    values["rollout"] |= {"steps_at_once": 2, "reuse": 2}
    with pytest.raises(ConfigError, match=r"steps_at_once=2 cannot be combined with rollout\.reuse"):
        build_config(values)
