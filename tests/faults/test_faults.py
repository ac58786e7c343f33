"""A short form of `make faults`: a kill, a full disk and damaged files, against an undisturbed run."""

from __future__ import annotations

import pytest

from tests.faults import forked
from tests.faults.workplace import Workplace, signature


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    forked.preload()
    made = Workplace.make(tmp_path_factory.mktemp("faults"))
    ended = made.start("whole")
    assert ended.code == 0, ended.output
    return made


def test_a_run_killed_at_a_write_goes_on_as_if_it_had_not(place):
    events = forked.Events(place.folder, at=30, action=forked.kill_here)
    assert place.start("killed", fault=events.watch).code == -9
    ended = place.go_on("killed")
    assert ended.code == 0, ended.output
    assert signature(place.folder / "killed") == signature(place.folder / "whole")
