"""The harness itself can be stopped: it goes on with the next trial, or begins anew where the code is another."""

from __future__ import annotations

import json

import pytest

from tests.faults import __main__ as harness


def test_a_stopped_harness_goes_on_and_another_commit_begins_anew(tmp_path, monkeypatch):
    output, tried = tmp_path / "faults.json", []

    def section(_place, number, seed):
        def trial(i):
            tried.append(i)
            if i == stop_at:
                raise KeyboardInterrupt
            return {"kind": "even" if i % 2 == 0 else "odd", "passed": i != 1, "seed": seed}

        for i in range(number):
            yield lambda i=i: trial(i)

    commit = {"commit": "a", "uncommitted_changes": False}
    monkeypatch.setattr(harness, "SECTIONS", {"kills": section, "users": section})
    monkeypatch.setattr(harness, "provenance", lambda: dict(commit))
    monkeypatch.setattr(harness.Workplace, "make", lambda folder: None)

    stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        harness.run_section("kills", 4, 1, output)
    assert not json.loads(output.read_text())["sections"]["kills"]["finished"]
    stop_at = None
    harness.run_section("users", 1, 1, output)
    record = harness.run_section("kills", 4, 1, output)
    assert tried == [0, 1, 2, 0, 2, 3], "trial 2 was cut short; 0 of the other section; then on"
    assert (record["cases"], record["passed"], record["finished"]) == (4, 3, True)
    assert record["passed_of_cases_by_kind"] == {"even": [2, 2], "odd": [1, 2]} and len(record["failed"]) == 1
    assert list(json.loads(output.read_text())["sections"]) == ["kills", "users"]

    tried.clear()
    assert harness.run_section("kills", 4, 1, output) == record and tried == []
    commit["commit"] = "b"
    assert harness.run_section("kills", 2, 1, output)["cases"] == 2 and tried == [0, 1]
