"""A short form of `make faults`: a kill, a full disk and damaged files, against an undisturbed run."""

from __future__ import annotations

import os
import shutil

import pytest
import yaml

from tests.faults import forked, fuzz
from tests.faults.workplace import Workplace, signature


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    forked.preload()
    made = Workplace.make(tmp_path_factory.mktemp("faults"), steps=3)
    made.whole_run()
    return made


def test_a_run_killed_at_a_write_goes_on_as_if_it_had_not(place):
    events = forked.Events(place.folder, at=30, action=forked.kill_here)
    assert place.start("killed", fault=events.watch).code == -9
    ended = place.go_on("killed")
    assert ended.code == 0, ended.output
    assert signature(place.folder / "killed") == signature(place.folder / "whole")


def test_a_disk_that_is_full_is_a_message_and_costs_nothing(place):
    events = forked.Events(place.folder, at=70, action=forked.no_more_writes)
    ended = place.start("full", fault=events.watch)
    assert ended.code == 2 and not ended.has_traceback, ended.output
    assert "File too large. Raise the limit" in ended.message
    assert "What was trained is kept: qswitch distill --resume full" in ended.message
    assert place.go_on("full").code == 0
    assert signature(place.folder / "full") == signature(place.folder / "whole")


def test_a_comparison_that_cannot_even_begin_names_the_file(place):
    events = forked.Events(place.folder, at=1, action=forked.no_more_writes)
    ended = place.call("compare", "study.yaml", "--output-dir", "study", fault=events.watch)
    assert ended.code == 2 and "error: study/compare.yaml: File too large." in ended.message, ended.output


def test_weights_that_may_not_be_read_are_not_called_missing(place):
    file = place.folder / "student" / "model.safetensors"
    mode = file.stat().st_mode
    file.chmod(0)
    try:
        words = ("generate", "whole", "--prompt", "hi", "--max-new-tokens", "2")
        ended = place.call(*words, unprivileged=os.geteuid() == 0)
    finally:
        file.chmod(mode)
    assert ended.code == 2 and "student/model.safetensors: Permission denied" in ended.message, ended.output


def test_a_damaged_checkpoint_gives_way_and_a_changed_log_is_named(place):
    run = place.copy("whole", "damaged")
    (run / "summary.json").unlink()
    weights = run / "checkpoints" / "step-000003" / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(bytes(data))
    log = (run / "rollouts.jsonl").read_text()
    (run / "rollouts.jsonl").write_text(log.replace("say ", "sad ", 1))
    ended = place.go_on("damaged")
    assert ended.code == 0, ended.output
    assert "checkpoint step-000003 is damaged: the SHA-256" in ended.output
    assert "rollouts.jsonl is not as it was written" in ended.output
    found, whole = signature(run), signature(place.folder / "whole")
    assert {**found, "rollouts": None} == {**whole, "rollouts": None}


def test_no_state_file_ends_in_a_traceback(place, tmp_path):
    shutil.copytree(place.folder / "whole", tmp_path / "run")
    sound = yaml.safe_load((place.folder / "run.yaml").read_text())
    assert fuzz.fuzz("state", tmp_path, 15, sound=sound, files=fuzz.state_files(tmp_path / "run"), seed=1) >= 15
