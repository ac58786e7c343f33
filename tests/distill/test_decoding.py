"""How a run decodes is found out once, kept in the run directory, and the same after a resume."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from qswitch.distill import decoding
from qswitch.distill.decoding import Decoding
from qswitch.layers import build_config
from qswitch.models.language_model import LanguageModel
from qswitch.plan.memory import KEPT_BUFFER_BYTES
from qswitch.rollout.block_length import FixedBlock
from qswitch.rollout.graph_trial import GraphTrial
from qswitch.run_dir import RunDir
from tests.tiny import tiny_model


def config_with(**rollout):
    values = {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d.jsonl"}, "rollout": rollout}
    return build_config(values)


def make(config, run_dir: RunDir, said: list[str], device: str = "cuda") -> Decoding:
    """Stands in for a student on a GPU: nothing here runs it."""
    student = SimpleNamespace(device=SimpleNamespace(type=device))
    progress = SimpleNamespace(say=said.append)
    return Decoding(config, run_dir, teacher=None, student=student, num_rows=6, progress=progress)


@pytest.mark.parametrize("used", [True, False])
def test_graphs_are_tried_once_and_the_answer_is_kept(tmp_path, monkeypatch, used):
    tried: list[int] = []

    def trial(student, num_rows, *, tokens):
        tried.append(num_rows)
        assert tokens == (1,)
        return GraphTrial(used, "because", num_rows, 2.0, 1.0, 0.0)

    monkeypatch.setattr(decoding, "try_graphs", trial)
    config, said = config_with(), []
    run_dir = RunDir.create(tmp_path / "run", config)
    assert (make(config, run_dir, said).student_graphs is not None) is used
    assert (make(config, RunDir.open(tmp_path / "run"), said).student_graphs is not None) is used
    assert tried == [6] and said == [f"CUDA graphs for the student: {'on' if used else 'off'}, because"]
    assert json.loads((tmp_path / "run/student_graphs.json").read_text())["used"] is used


def test_graphs_are_not_tried_without_a_gpu_or_where_they_are_off(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "try_graphs", None)
    for i, (config, device) in enumerate([(config_with(), "cpu"), (config_with(student_graphs="off"), "cuda")]):
        run_dir = RunDir.create(tmp_path / f"run{i}", config)
        found = make(config, run_dir, [], device)
        assert found.student_graphs is None and found.teacher_graphs is None
        assert not run_dir.student_graphs_path.exists() and not run_dir.teacher_graphs_path.exists()
        assert isinstance(found.blocks, FixedBlock), "nobody drafts for a teacher that is not asked"


def test_graphs_of_both_models_are_tried_with_blocks_and_kept_where_weights_stay(tmp_path, monkeypatch):
    tried = {}

    def trial(model, num_rows, *, tokens):
        tried[model.name] = tokens
        return GraphTrial(True, "because", num_rows)

    monkeypatch.setattr(decoding, "try_graphs", trial)
    monkeypatch.setattr(decoding, "StepGraphs", lambda model, **options: (model.name, options))
    teacher, student = (SimpleNamespace(device=SimpleNamespace(type="cuda"), name=n) for n in ("teacher", "student"))
    for residency, kept in (("resident", KEPT_BUFFER_BYTES), ("swap", 0)):
        values = config_with(block_tokens=2).model_dump()
        values["teacher"]["residency"] = residency
        config, progress = build_config(values), SimpleNamespace(say=lambda text: None)
        run_dir = RunDir.create(tmp_path / residency, config)
        made = Decoding(config, run_dir, teacher=teacher, student=student, num_rows=6, progress=progress)
        assert made.teacher_graphs == ("teacher", {"role": "teacher", "kept_bytes": kept})
        assert made.student_graphs == ("student", {"role": "student", "kept_bytes": KEPT_BUFFER_BYTES})
    assert tried == {"student": (1,), "teacher": (1, 4)}


def test_pass_times_are_measured_once_on_a_machine_and_by_a_run_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("QSWITCH_CACHE", str(tmp_path / "cache"))
    (teacher, student), said = (LanguageModel(tiny_model("llama", seed=i)) for i in (1, 2)), []
    progress = SimpleNamespace(say=said.append)
    config = config_with(batch_size=16)  # of which memory has left fewer

    def decode(name: str, num_rows: int = 2) -> dict:
        run_dir = RunDir.create(tmp_path / name, config)
        Decoding(config, run_dir, teacher=teacher, student=student, num_rows=num_rows, progress=progress)
        return json.loads(run_dir.pass_times_path.read_text())

    first, second = decode("first"), decode("second")
    assert first == second and first["rows"][-1] == 2
    assert [text.split(" ")[0] for text in said] == ["measuring", "pass"]
    assert decode("other", 3)["rows"][-1] == 3 and said[-1].startswith("measuring")
    # Of a machine that was too busy nothing is kept.
    monkeypatch.setattr(decoding, "LIMIT_S", -1.0)
    decode("busy", 4)
    assert "passes are slow" in said[-1] and len(list((tmp_path / "cache/pass_times").iterdir())) == 2
