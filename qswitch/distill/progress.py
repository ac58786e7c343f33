"""What the user sees while a run works: a live line with time left on a terminal, plain lines without one.

Knows only numbers; never reads the run directory.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

PLAIN_LINE_EVERY_S = 10.0


class Progress:
    """Shows steps, loss, teacher share and time left on stderr."""

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._total = total_steps
        self._start_step = 0
        self._started = time.monotonic()
        self._last_line = -float("inf")
        self._live_width = 0
        """Characters of the live line of loading that is on the screen."""
        self._bar: RichProgress | None = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        if self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("distill"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task("distill", total=self._total, completed=self._start_step, note="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        """One line that stays."""
        if self._live_width:
            self._console.print(" " * self._live_width, end="\r")
            self._live_width = 0
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def loading(self, what: str, done: int, total: int | None) -> None:
        """How far reading or tokenising the data is: a live line on a terminal, without one a line now and then."""
        now = time.monotonic()
        if now - self._last_line < (0.2 if self._console.is_terminal else PLAIN_LINE_EVERY_S):
            return
        if self._last_line == -float("inf") and not self._console.is_terminal:
            self._last_line = now  # what takes less than ten seconds needs no line
            return
        self._last_line = now
        text = f"{what}: {done / total:.0%}" if total else f"{what}: {done:,}"
        if not self._console.is_terminal:
            self.say(text)
            return
        self._console.print(text.ljust(self._live_width), end="\r", highlight=False, markup=False, soft_wrap=True)
        self._live_width = len(text)

    def resumed(self, step: int) -> None:
        """The run goes on from a checkpoint."""
        self._start_step = step
        self.say(f"resumed from step {step}")

    def validated(self, step: int, what: str, nats: float) -> None:
        """A validation figure; `what` says of what."""
        self.say(f"step {step}/{self._total}  {what}: {nats:.3f} nats/token")

    def stepped(self, metrics: dict[str, Any]) -> None:
        """A finished step, with its line of metrics.jsonl."""
        loss, share = metrics["loss"], metrics["teacher_share"]
        parts = [f"loss {loss:.3f}" if loss is not None else "no intervention"]
        if share is not None:
            parts.append(f"teacher writes {share:.0%}")
        if metrics["rollout_tokens_per_s"]:
            parts.append(f"{metrics['rollout_tokens_per_s']:.0f} rollout tokens/s")
        note = "  ".join(parts)
        step = metrics["step"]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
            return
        now = time.monotonic()
        if now - self._last_line >= PLAIN_LINE_EVERY_S or step == self._total:
            self._last_line = now
            done = step - self._start_step
            left_s = (now - self._started) / max(done, 1) * (self._total - step)
            self.say(f"step {step}/{self._total}  {note}  about {_duration(left_s)} left")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
