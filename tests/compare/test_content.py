"""A cell is what was trained: files that change under it, runs that were resumed otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from qswitch.compare.cells import CellFailed, compare
from qswitch.compare.content import content_marks
from qswitch.compare.spec import read_comparison
from qswitch.errors import RunDirError
from tests.compare.comparisons import Launcher, write_comparison


def test_what_a_cell_learnt_from_must_not_change_under_it(tmp_path: Path):
    """Two cells are there, the first is finished; then a line of the data, or the start, becomes another."""
    path, out = write_comparison(tmp_path), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compare(path, out, launch=Launcher(stop_at=5), say=lambda _: None)
    for file, setting, label in (
        ("train.jsonl", "data.train", "switch-seed1"),
        ("pair/student/config.json", "student.model", "switch-seed1"),
        ("pair/teacher/config.json", "teacher.model", "switch-seed1"),
    ):
        before = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(before.replace(b"\n", b" \n", 1))
        launcher = Launcher()
        with pytest.raises(RunDirError, match=rf"{label} in .*: the content of {setting} has changed") as caught:
            compare(path, out, launch=launcher, say=lambda _: None)
        assert not launcher.commands and "delete" in str(caught.value)
        (tmp_path / file).write_bytes(before)
    # A run that is not finished yet has its marks, too.
    finished_cell = out / "cells/switch-seed1.json"
    saved = json.loads(finished_cell.read_text(encoding="utf-8"))
    finished_cell.write_text(json.dumps(saved | {"settings": without_marks(saved["settings"])}), encoding="utf-8")
    (tmp_path / "train.jsonl").write_bytes((tmp_path / "train.jsonl").read_bytes() + b"\n")
    with pytest.raises(RunDirError, match=r"gkd-seed1 in .* learnt from other files"):
        compare(path, out, launch=Launcher(), say=lambda _: None)
    # An earlier version wrote no marks: its cells go on.
    start = out / "cells/gkd-seed1.start.json"
    start.write_text(json.dumps(without_marks(json.loads(start.read_text(encoding="utf-8")))), encoding="utf-8")
    launcher = Launcher(stop_at=1)
    with pytest.raises(KeyboardInterrupt):
        compare(path, out, launch=launcher, say=lambda _: None)
    assert launcher.kinds() == ["eval gkd-seed1"]


def without_marks(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if not key.startswith("content of ")}


def test_data_that_changes_while_a_comparison_runs_begins_no_further_cell(tmp_path: Path):
    path, out = (
        write_comparison(tmp_path, cells={"sft": {"settings": {"method": "sft"}}, "switch": {}}),
        tmp_path / "out",
    )

    class Mended(Launcher):
        def __call__(self, arguments: Sequence[str]) -> int:
            if len(self.commands) == 1:
                (tmp_path / "train.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 9, encoding="utf-8")
            return super().__call__(arguments)

    launcher = Mended()
    with pytest.raises(CellFailed, match=r"switch-seed1 was not started: the content of data.train is not what it was"):
        compare(path, out, launch=launcher, say=lambda _: None)
    assert launcher.kinds()[0] == "distill --config" and "distill" not in [c[0] for c in launcher.commands[1:]]


def test_marks_follow_the_content_of_files_and_not_their_place_or_time(tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    config = read_comparison(write_comparison(first)).cells[0].config
    shutil.copytree(first, second, dirs_exist_ok=True)
    moved = read_comparison(write_comparison(second)).cells[0].config
    marks = content_marks(config)
    assert sorted(marks) == ["content of data.train", "content of student.model", "content of teacher.model"]
    assert content_marks(moved) == marks
    (second / "train.jsonl").unlink()
    assert sorted(content_marks(moved)) == ["content of student.model", "content of teacher.model"], "no mark, no error"
    hub = moved.model_copy(update={"data": moved.data.model_copy(update={"train": "someone/dolly"})})
    assert "content of data.train" not in content_marks(hub), "known by its name"


def test_a_run_that_was_resumed_with_other_settings_is_not_the_cell(tmp_path: Path, finished):
    path, out = finished[0], shutil.copytree(finished[1], tmp_path / "out")
    (out / "cells/gkd-seed1.json").unlink()
    run_path = out / "runs/gkd-seed1"
    config = run_path / "config.yaml"
    before = config.read_text(encoding="utf-8")
    values = yaml.safe_load(before)
    values["train"] |= {"learning_rate": 1e-7, "max_steps": 9}
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    launcher = Launcher()
    with pytest.raises(
        CellFailed, match=r"train.learning_rate is 1e-07, the cell has 0.005; train.max_steps is 9"
    ) as it:
        compare(path, out, launch=launcher, say=lambda _: None)
    assert not launcher.commands and not (out / "cells/gkd-seed1.json").exists() and str(run_path) in str(it.value)
    values["train"] |= {"learning_rate": 5e-3, "max_steps": 2, "save_steps": 50}
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    compare(path, out, launch=launcher, say=lambda _: None)
    assert launcher.kinds() == ["eval gkd-seed1"], "how often it saves changes no figure"
