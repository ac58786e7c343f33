"""Files that stay are whole or absent, readable as the umask says, and a killed writer leaves nothing for long."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qswitch import aside
from qswitch.aside import PARTIAL, file_aside, folder_aside, sweep

WRITER = """
import sys
from pathlib import Path
from qswitch.aside import folder_aside
with folder_aside(Path(sys.argv[1])) as partial:
    (partial / "half").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def partials(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if PARTIAL.fullmatch(p.name)]


def start_writer(target: Path) -> subprocess.Popen[str]:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
    return writer


def test_a_folder_appears_when_it_is_finished(tmp_path):
    with folder_aside(tmp_path / "deep" / "out") as partial:
        (partial / "a").write_text("whole")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "a").read_text() == "whole" and partials(tmp_path / "deep") == []


@pytest.mark.parametrize("aside", [folder_aside, file_aside])
def test_what_fails_leaves_nothing_and_what_was_there_stays(tmp_path, aside):
    target = tmp_path / "out"
    if aside is file_aside:
        target.write_text("old")
    with pytest.raises(ZeroDivisionError), aside(target) as partial:
        (partial / "a" if partial.is_dir() else partial).write_text("half")
        raise ZeroDivisionError
    assert partials(tmp_path) == [] and (not target.exists() or target.read_text() == "old")


def test_an_empty_folder_is_replaced_and_a_full_one_never(tmp_path):
    (tmp_path / "out").mkdir()
    with folder_aside(tmp_path / "out") as partial:
        (partial / "a").touch()
    with pytest.raises(OSError), folder_aside(tmp_path / "out") as partial:
        (partial / "b").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "a"]


def test_a_file_replaces_the_old_one(tmp_path):
    (tmp_path / "f").write_text("old")
    with file_aside(tmp_path / "f") as partial:
        partial.write_text("new")
        assert (tmp_path / "f").read_text() == "old"
    assert (tmp_path / "f").read_text() == "new"


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions_are_those_of_the_umask_whatever_the_writer_chose(tmp_path, umask):
    before = os.umask(umask)
    try:
        with folder_aside(tmp_path / "out") as partial:
            (partial / "weights").touch(mode=0o600)
        with file_aside(tmp_path / "file") as partial:
            partial.chmod(0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out" / "weights").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


def test_what_a_killed_process_left_is_swept_by_the_next_write(tmp_path):
    writer = start_writer(tmp_path / "out")
    assert len(partials(tmp_path)) == 1 and sweep(tmp_path) == []  # it lives, so its work is its own
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert len(partials(tmp_path)) == 1 and not (tmp_path / "out").exists()
    with file_aside(tmp_path / "other") as partial:
        assert partials(tmp_path) == [partial.name]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other"]


def test_two_writers_of_one_target_do_not_disturb_each_other(tmp_path):
    writer = start_writer(tmp_path / "out")
    with folder_aside(tmp_path / "mine") as partial:
        (partial / "a").touch()
    writer.communicate("")
    assert writer.returncode == 0 and (tmp_path / "out" / "half").read_text() == "half"


@pytest.mark.parametrize("before", ["os.open", "fcntl.flock"])
def test_a_sweep_before_the_lock_is_there_does_not_disturb(tmp_path, monkeypatch, before):
    """Another process may sweep what was created and is not locked yet; the writer begins again."""
    module, name = before.split(".")
    real = getattr(getattr(aside, module), name)
    swept: list[str] = []

    def late(*arguments: object) -> object:
        monkeypatch.undo()
        swept.extend(sweep(tmp_path))
        return real(*arguments)

    monkeypatch.setattr(getattr(aside, module), name, late)
    with folder_aside(tmp_path / "out") as partial:
        assert len(swept) == 1 and swept[0] != partial.name and partials(tmp_path) == [partial.name]
        (partial / "a").touch()
    assert (tmp_path / "out" / "a").exists() and partials(tmp_path) == []


def test_a_sweep_touches_no_strangers(tmp_path):
    for name in (".x.partial", "x.12345678.partial", ".x.1234.partial", "report.html"):
        (tmp_path / name).touch()
    assert sweep(tmp_path) == [] and len(list(tmp_path.iterdir())) == 4
