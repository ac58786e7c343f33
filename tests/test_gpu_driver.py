"""The driver of the first GPU hour loses nothing: failures are recorded, ended processes are blamed, time is kept."""

from __future__ import annotations

import argparse
import importlib
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch

from benchmarks.gpu import families, recipe
from benchmarks.gpu.__main__ import FIRST_HOUR, STAGES, stages
from benchmarks.gpu.report import Context, NeedsGpuError, Report, blame
from qswitch.distill import recovery
from tests.pretended_cuda import pretended_cuda


@pytest.fixture
def context(tmp_path) -> Context:
    return Context(device=torch.device("cpu"), tiny=True, models=tmp_path / "models", output=tmp_path)


def make(context: Context, limit_s: float = 60.0) -> Report:
    return Report(context.output / "stage-0.json", context, stage=0, question="?", limit_s=limit_s)


def recorded(context: Context) -> dict:
    return json.loads((context.output / "stage-0.json").read_text())


def fail() -> dict:
    raise ValueError("wrong by 3")


def test_a_failure_is_recorded_and_the_stage_goes_on(context):
    report = make(context)
    report.measure("first", fail)
    report.measure("second", lambda: {"figure": 7})
    report.measure("third", context.needs_gpu)  # type: ignore[arg-type]
    with pytest.raises(NeedsGpuError):
        context.needs_gpu()
    measured = recorded(context)["measured"]
    assert measured["first"]["error"] == "ValueError: wrong by 3" and "in fail" in measured["first"]["where"]
    assert measured["second"]["figure"] == 7 and measured["second"]["seconds"] >= 0
    assert measured["third"]["not_measured"] == "needs a GPU"
    assert recorded(context)["running"] is None and recorded(context)["versions"]["torch"] == torch.__version__


def test_a_measurement_that_ends_its_process_is_blamed_and_not_repeated(context):
    child = os.fork()
    if child == 0:
        report = make(context)
        report.measure("fine", lambda: {"figure": 1})
        report.measure("fatal", lambda: os._exit(9))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    path = context.output / "stage-0.json"
    assert recorded(context)["running"] == "fatal"
    assert blame(path, "exit code 9")
    assert not blame(path, "exit code 9"), "nothing is running any more"
    report = make(context)  # the next process of the stage
    for name in ("fine", "fatal"):
        report.measure(name, fail)
    loaded: list[int] = []
    for name in ("fine", "fatal", "new"):
        report.load(name, lambda: loaded.append(1) or {})
    assert len(loaded) == 2, "what ended a process is not loaded again"
    report.measure("last", lambda: {"figure": 2})
    measured = recorded(context)["measured"]
    assert measured["fine"]["figure"] == 1 and measured["last"]["figure"] == 2
    assert measured["fatal"] == {"error": "the process ended: exit code 9"}


def test_what_time_did_not_suffice_for_is_listed(context):
    report = make(context, limit_s=0.0)
    report.measure("late", fail)
    assert recorded(context)["not_tried"] == ["late"] and recorded(context)["measured"] == {}


def test_stages_are_named_by_numbers_and_ranges():
    assert stages("0-2,5") == [0, 1, 2, 5]
    with pytest.raises(argparse.ArgumentTypeError, match=f"there is no stage {len(STAGES)}"):
        stages(str(len(STAGES)))


def test_the_study_finds_the_data_that_was_carried_and_is_not_of_the_first_hour(tmp_path):
    expected = tmp_path / "study" / "data"
    expected.parent.mkdir()
    with pytest.raises(FileNotFoundError, match=r"carried holds no prepared study.*prepare\.py"):
        recipe.place_data(tmp_path / "carried", expected)
    (tmp_path / "carried").mkdir()
    (tmp_path / "carried/train.jsonl").write_text("{}\n")
    recipe.place_data(tmp_path / "carried", expected)
    recipe.place_data(tmp_path / "nothing", expected)  # it is there already
    assert (expected / "train.jsonl").read_text() == "{}\n"
    cells = tmp_path / "out/search/cells"
    cells.mkdir(parents=True)
    (cells / "gkd-seed1.json").write_text(json.dumps({"summary": {"seconds": 12.5}}))
    (cells / "gkd-seed1.start.json").write_text("{}")
    assert recipe.finished(tmp_path / "out") == {"search": {"gkd-seed1": 12.5}}
    assert 7 in STAGES and FIRST_HOUR == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_stage_mixes_no_devices(context, stage):
    """On a pretended card, on which alone some measurements do anything; its memory is no card's."""
    with pretended_cuda():
        on_card = replace(context, device=torch.device("cuda", 0))
        report = Report(context.output / "stage-0.json", on_card, stage=stage, question="?", limit_s=600.0)
        importlib.import_module(f"benchmarks.gpu.{STAGES[stage][0]}").run(on_card, report)
    measured = recorded(context)["measured"]
    assert {name for name, found in measured.items() if "error" in found} <= {"memory cap"}
    assert len(measured) > 6 and not any("not_measured" in found for found in measured.values())


def test_the_8_bit_optimizer_is_tried_with_state_that_is_paged(context, monkeypatch):
    """On a pretended card, where a buffer is what bitsandbytes' paged one is for torch: a tensor with two marks."""
    with pytest.raises(NeedsGpuError):
        families.eight_bit_optimizer(context)

    def buffer(optimizer, parameter, dtype=torch.float32):
        made = torch.zeros_like(parameter, dtype=dtype)
        if parameter.numel() >= 1e5:
            made.is_paged, made.page_deviceid = True, 0
            optimizer.page_mng.paged_tensors.append(made)
        return made

    fetched = []
    monkeypatch.setattr(bitsandbytes.optim.PagedAdamW8bit, "get_state_buffer", buffer)
    monkeypatch.setattr(bitsandbytes.functional, "prefetch_tensor", fetched.append)
    with pretended_cuda():
        found = families.eight_bit_optimizer(replace(context, device=torch.device("cuda", 0)))
    assert found["resumed"] == {"same_first_rollouts": True, "largest_adapter_difference": 0.0}
    assert fetched and found["paged_bytes"] >= 2 * 64 * families.PAGED_RANK
    monkeypatch.setattr(families, "distill", lambda *_: None)
    with pretended_cuda(), pytest.raises(AssertionError, match="no state was paged"):
        families.eight_bit_optimizer(replace(context, device=torch.device("cuda", 0)))


def test_a_stage_of_the_study_works_for_its_time_and_says_what_is_finished(context, monkeypatch):
    commands = []

    def chain(command: list[str]) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=recipe.STOPPED)

    monkeypatch.setattr(recipe, "subprocess", SimpleNamespace(run=chain))
    monkeypatch.setattr(recipe, "place_data", lambda *_: None)
    report = make(context, limit_s=1000.0)
    recipe.run(context, report)
    found = recorded(context)["measured"]["study"]
    assert found["complete"] is False and found["finished"] == {} and "error" not in found
    (command,) = commands
    assert 800 < float(command[command.index("--seconds") + 1]) < 1000 - recipe.RESERVE_S + 1
    monkeypatch.setattr(recipe, "subprocess", SimpleNamespace(run=lambda _: SimpleNamespace(returncode=3)))
    with pytest.raises(RuntimeError, match="code 3"):
        recipe.study(context, report)


def test_a_capped_run_keeps_to_the_drivers_cap_and_not_to_its_plan(context, monkeypatch):
    summary = SimpleNamespace(phases_gib={"load": {"reserved": 0.5}, "train": {"reserved": 2.0}})

    def distill(*_):
        with recovery.device_memory_bounded(torch.device("cuda", 0), 1, 8 * 2**30):
            return summary

    monkeypatch.setattr(families, "distill", distill)
    monkeypatch.setattr(families, "settings", lambda *_, **__: None)
    monkeypatch.setattr(families, "_difference", lambda *_: {})
    monkeypatch.setattr(families.RunDir, "open", lambda _: SimpleNamespace(read_metrics=list))
    with pretended_cuda() as seen:
        families._capped(replace(context, device=torch.device("cuda", 0)), context.output, "llama", "bf16")
    assert seen.memory_fractions == [(7.5 / 12, 0), (1.0, 0), (pytest.approx(1.2 / 12), 0), (1.0, 0), (1.0, 0)]
