"""Peaks of memory by phase: on a card that is pretended figure by figure, and on this process."""

from __future__ import annotations

import json

import pytest
import torch

from qswitch.distill import phase_peaks
from qswitch.distill.phase_peaks import PhasePeaks, forget_peaks, highest_of, in_gib_beside, process_peaks
from qswitch.report.read import memory_rows
from qswitch.run import distill
from qswitch.run_dir import RunDir
from qswitch.units import GIB
from tests.distill.test_trainer import folders, settings  # noqa: F401

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class Card:
    """What torch.cuda counts of one device: what is held, and the most since it was last reset."""

    def __init__(self, monkeypatch) -> None:
        self.allocated = self.reserved = self.most_allocated = self.most_reserved = 0
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: self.most_allocated)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: self.most_reserved)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self._reset)
        monkeypatch.setattr(phase_peaks, "_earlier", {})

    def _reset(self, _: torch.device) -> None:
        self.most_allocated, self.most_reserved = self.allocated, self.reserved

    def take(self, size: int) -> None:
        self.allocated += size
        self.reserved = max(self.reserved, self.allocated)  # a caching allocator gives nothing back
        self.most_allocated = max(self.most_allocated, self.allocated)
        self.most_reserved = max(self.most_reserved, self.reserved)


def test_each_phase_has_its_own_peak(monkeypatch):
    card = Card(monkeypatch)
    peaks = PhasePeaks(CUDA, {"load": 6, "rollout": 9})
    card.take(5)
    peaks.enter("rollout")
    card.take(4), card.take(-3)
    peaks.enter("train")
    card.take(1)
    peaks.enter("rollout")
    card.take(1)
    assert peaks.take() == {
        "load": {"allocated": 5, "reserved": 5},
        "rollout": {"allocated": 9, "reserved": 9},
        "train": {"allocated": 7, "reserved": 9},
    }
    assert peaks.highest_bytes == 9
    card.take(20), card.take(-20)
    assert peaks.take() == {"rollout": {"allocated": 28, "reserved": 28}}, "since they were last taken"
    assert peaks.highest_bytes == 28
    assert process_peaks(CUDA) == {"allocated": 28, "reserved": 28}, "that phases are told apart hides nothing"
    forget_peaks(CUDA)
    assert process_peaks(CUDA) == {"allocated": 8, "reserved": 28}


def test_the_plan_stands_beside_them():
    found = highest_of([{"load": {"allocated": GIB}}, {"load": {"allocated": 2 * GIB}, "train": {"allocated": GIB}}])
    assert in_gib_beside(found, {"load": 3 * GIB}) == {
        "load": {"planned": 3.0, "allocated": 2.0}, "train": {"allocated": 1.0}
    }  # fmt: skip


def test_a_process_counts_its_resident_set_anew():
    peaks = PhasePeaks(CPU)
    peaks.enter("rollout")
    large = torch.ones(96 * 2**20)
    del large
    peaks.enter("train")
    found = peaks.take()
    if "train" not in found:
        pytest.skip("this system does not let a process count its peak anew")
    assert found["rollout"]["resident"] - found["train"]["resident"] > 250 * 2**20
    assert process_peaks(CPU)["resident"] >= found["rollout"]["resident"]


def test_where_peaks_cannot_be_counted_anew_a_hidden_one_is_left_out(monkeypatch):
    monkeypatch.setattr(phase_peaks, "_count_anew", lambda _: False)
    readings = iter([{"resident": 5}, {"resident": 5}, {"resident": 7}])
    monkeypatch.setattr(phase_peaks, "_read", lambda _: next(readings))
    monkeypatch.setattr(phase_peaks, "process_peaks", lambda _: {})
    peaks = PhasePeaks(CPU)
    peaks.enter("rollout")
    peaks.enter("train")
    assert peaks.take() == {"load": {"resident": 5}, "train": {"resident": 7}}


def test_a_run_says_its_peaks_by_phase(folders, tmp_path, monkeypatch):  # noqa: F811
    """In every line of metrics.jsonl and in summary.json; the report reads the same."""
    summary = distill(settings(folders, train__max_steps=2), tmp_path / "run")
    run_dir = RunDir.open(tmp_path / "run")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    lines = [line for line in run_dir.read_metrics() if "loss" in line]
    assert {"rollout", "train"} <= set(lines[1]["phases_gib"]) and "validate" in lines[0]["phases_gib"]
    assert set(summary.phases_gib) == set(plan["phases"])
    for phase, figures in summary.phases_gib.items():
        assert figures["planned"] == pytest.approx(plan["phases"][phase], abs=1e-4)
        logged = [line["phases_gib"].get(phase, {}).get("resident", 0.0) for line in lines]
        assert figures["resident"] >= max(logged) > 0
    assert summary.peak_gib == pytest.approx(max(f["resident"] for f in summary.phases_gib.values()), abs=2e-3)
    rows = memory_rows(plan, run_dir.read_metrics(), {})
    assert rows["kinds"] == ["planned", "resident"] and [name for name, _ in rows["phases"]][-1] is not None
    assert dict(rows["phases"])["train"]["resident"] == max(line["phases_gib"]["train"]["resident"] for line in lines)
