"""A checkpoint that is not as it was written is named, and the newest good one before it is used."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qswitch import run
from qswitch.distill import session
from qswitch.distill.checkpoint import FORMAT
from qswitch.distill.trainer import Trainer
from qswitch.errors import Interrupted, QSwitchError, RunDirError
from qswitch.manifest import find_damage, write_manifest
from qswitch.run_dir import RunDir
from tests.distill.test_trainer import adapter_bytes, folders, settings

__all__ = ["folders"]


@pytest.fixture(scope="module")
def config(folders) -> Any:
    return settings(
        folders, rollout__block_tokens=0, rollout__reuse=2, rollout__decay_rate=1.0, train__eval_steps=2,
        train__save_steps=1, train__save_total_limit=10,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    run.distill(config, path)
    return path


@pytest.fixture(scope="module")
def stopped_run(config, tmp_path_factory) -> Path:
    """With the checkpoints of steps 1, 2 and 3."""
    original = Trainer.train_step

    def stop_at_two(self: Trainer) -> Any:
        self.stop_requested = self.step == 2
        return original(self)

    path = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "train_step", stop_at_two)
        run.distill(config, path)
    return path


@pytest.fixture
def stopped(stopped_run, tmp_path) -> Path:
    return Path(shutil.copytree(stopped_run, tmp_path / "run"))


def resumed(path: Path, capsys: Any) -> str:
    """What the user is told."""
    capsys.readouterr()
    run.resume(path)
    return re.sub(r"\s+", " ", capsys.readouterr().err)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a bit of the adapter": lambda c: flip(c / "step-000003/adapter/adapter_model.safetensors"),
    "a bit of the state": lambda c: flip(c / "step-000003/state.pt"),
    "the adapter of another step": lambda c: shutil.copy(
        c / "step-000002/adapter/adapter_model.safetensors", c / "step-000003/adapter/adapter_model.safetensors"
    ),
    "the state of another step": lambda c: shutil.copy(c / "step-000002/state.pt", c / "step-000003/state.pt"),
    "no state": lambda c: (c / "step-000003/state.pt").unlink(),
    "no manifest": lambda c: (c / "step-000003/manifest.json").unlink(),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_the_checkpoint_before_it_is_used(whole, stopped, capsys, case):
    DAMAGE[case](stopped / "checkpoints")
    told = resumed(stopped, capsys)
    assert "checkpoint step-000003 is damaged: " in told and "step-000002 is used" in told
    assert "resumed from step 2" in told
    assert (stopped / "checkpoints/damaged-step-000003").is_dir()
    assert adapter_bytes(stopped) == adapter_bytes(whole), "the steps are taken again, with the same numbers"
    assert [m["step"] for m in RunDir.open(stopped).read_metrics() if "loss" in m] == [1, 2, 3, 4]


def test_where_no_checkpoint_is_whole_each_is_named_and_none_is_touched(stopped, capsys):
    for step in (1, 2, 3):
        flip(stopped / f"checkpoints/step-{step:06d}/state.pt")
    with pytest.raises(RunDirError, match=r"No checkpoint in .*step-000003: .*step-000002: .*step-000001: .*new run"):
        resumed(stopped, capsys)
    assert len(RunDir.open(stopped).checkpoints()) == 3


def test_a_damaged_best_checkpoint_gives_its_place_to_the_one_that_is_used(stopped, capsys):
    flip(stopped / "checkpoints/step-000002/adapter/adapter_model.safetensors")
    told = resumed(stopped, capsys)
    assert "the best checkpoint, step-000002, is damaged" in told and "step-000003 takes its place" in told
    assert json.loads((stopped / "summary.json").read_text())["best_step"] in (3, 4)


@pytest.mark.parametrize("number", [1, FORMAT + 1, None])
def test_another_format_is_refused(stopped, capsys, number):
    newest = stopped / "checkpoints/step-000003"
    if number == 1:  # which had a state.json and no manifest
        (newest / "manifest.json").rename(newest / "state.json")
    else:
        manifest = json.loads((newest / "manifest.json").read_text())
        (newest / "manifest.json").write_text(json.dumps({**manifest, "format": number}))
    with pytest.raises(RunDirError, match=rf"of format {number}, and this qswitch reads format {FORMAT}"):
        resumed(stopped, capsys)


WRONG_STATES = {
    "no dictionary": (lambda state: [1, 2], "sizes cannot be read from"),
    "a part too few": (lambda state: {k: v for k, v in state.items() if k != "replay"}, "this run needs .*replay"),
    "a part too many": (lambda state: {**state, "corpus": {}}, "holds .*corpus"),
    "counters without a step": (lambda state: {**state, "counters": {"seconds": 1.0}}, "state of counters"),
    "sizes of another kind": (lambda state: {**state, "sizes": {"rows": 3}}, "state of sizes"),
    "replay of another kind": (lambda state: {**state, "replay": [{"sequence": 3}]}, "state of replay"),
    "prepared of another kind": (lambda state: {**state, "prepared": [3]}, "state of prepared"),
    "cache of another format": (
        lambda state: {**state, "cache": {**state["cache"], "format": "topk"}}, "state of cache.*format topk"
    ),
    "optimizer of another model": (
        lambda state: {**state, "optimizer": {"state": {}, "param_groups": []}}, "state of optimizer"
    ),
    "loader of other data": (
        lambda state: {**state, "loader": {"sets": [{**state["loader"]["sets"][0], "size": 3}], "taken": [0]}},
        "data changed since the checkpoint",
    ),
    "figures of other held-out prompts": (
        lambda state: {**state, "validation": {"prompts": 9, "fingerprint": 1}},
        "held-out prompts changed since the checkpoint.*there were 9, now there are 4",
    ),
    "no acceptance": (lambda state: {**state, "acceptance": None}, "state of acceptance"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_STATES)
def test_a_well_formed_state_that_does_not_fit_is_one_message(stopped, capsys, case):
    change, expected = WRONG_STATES[case]
    folder = stopped / "checkpoints/step-000003"
    torch.save(change(torch.load(folder / "state.pt", weights_only=True)), folder / "state.pt")
    (folder / "manifest.json").unlink()
    write_manifest(folder, format=FORMAT, step=3)
    assert find_damage(folder) is None
    with pytest.raises(QSwitchError, match=rf"(?s){expected}"):
        resumed(stopped, capsys)


def test_the_final_adapter_is_whole_or_absent(config, tmp_path, monkeypatch):
    """A run that ends while its adapter is written leaves none, and writes it when it is resumed."""

    def crash(*_: object) -> str:
        raise RuntimeError("power cut")

    path = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(session, "adapter_card", crash)
        run.distill(config, path)
    run_dir = RunDir.open(path)
    assert not run_dir.adapter_path.exists() and not list(path.glob(".*partial"))
    assert not run_dir.summary_path.exists()
    run.resume(path)
    assert (run_dir.adapter_path / "README.md").is_file() and run_dir.summary_path.is_file()
