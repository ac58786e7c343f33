"""What a user sees while data is read: a line that renews itself on a terminal, few lines elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

from qswitch.distill import progress as progress_module
from qswitch.distill.progress import Progress


def shown(monkeypatch, *, terminal: bool, seconds: float) -> str:
    clock = iter(range(1000))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock) * seconds)
    text = io.StringIO()
    progress = Progress(1, Console(file=text, force_terminal=terminal, width=80, color_system=None))
    for done in range(0, 101, 10):
        progress.loading("tokenising", done, 100)
    progress.loading("reading hub data", 12_000, None)
    progress.say("ready")
    return text.getvalue()


def test_a_terminal_has_one_renewed_line(monkeypatch):
    text = shown(monkeypatch, terminal=True, seconds=1.0)
    assert "tokenising: 50%" in text and "reading hub data: 12,000" in text
    assert text.count("\n") == 1 and text.rstrip("\n").split("\r")[-1] == "ready"


def test_elsewhere_there_is_a_line_now_and_then_and_none_for_a_short_wait(monkeypatch):
    lines = shown(monkeypatch, terminal=False, seconds=6.0).splitlines()
    assert lines[-1] == "ready" and 3 <= len(lines) <= 8
    assert shown(monkeypatch, terminal=False, seconds=0.1) == "ready\n"
