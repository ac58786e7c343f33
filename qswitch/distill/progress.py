"""What the user sees while a run works: a live line with time left on a terminal, plain lines without one.

Knows only numbers; never reads the run directory.
"""

from __future__ import annotations

import io
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from qswitch.config import TrainSection
from qswitch.terminal import STDERR, lead_nowhere, printable

PLAIN_LINE_EVERY_S = 10.0


class _Console(Console):
    """A console on stderr; rich's own ends the process, and with it the run, when its reader has ended."""

    def on_broken_pipe(self) -> None:
        lead_nowhere(STDERR)


class Progress:
    """Shows steps, loss, teacher share and time left on stderr."""

    def __init__(self, total_steps: int | None, console: Console | None = None, *, quiet: bool = False) -> None:
        self._console = console or (Console(file=io.StringIO(), quiet=True) if quiet else _Console(stderr=True))
        self._total = total_steps
        self._start_step = 0
        self._start_spent: float | None = None
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
                *([MofNCompleteColumn()] if self._total is not None else [TextColumn("{task.fields[step]} steps")]),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
            total, done = (1.0, 0) if self._total is None else (float(self._total), self._start_step)
            self._task = self._bar.add_task("distill", total=total, completed=done, note="", step=self._start_step)
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
        self._console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    def loading(self, what: str, done: int, total: int | None) -> None:
        """How far reading or tokenising the data is: a live line on a terminal, without one a line now and then."""
        now = time.monotonic()
        if now - self._last_line < (0.2 if self._console.is_terminal else PLAIN_LINE_EVERY_S):
            return
        if self._last_line == -float("inf") and not self._console.is_terminal:
            self._last_line = now  # what takes less than ten seconds needs no line
            return
        self._last_line = now
        text = printable(f"{what}: {done / total:.0%}" if total else f"{what}: {done:,}")
        if not self._console.is_terminal:
            self.say(text)
            return
        self._console.print(text.ljust(self._live_width), end="\r", highlight=False, markup=False, soft_wrap=True)
        self._live_width = len(text)

    def resumed(self, step: int) -> None:
        """The run goes on from a checkpoint."""
        self._start_step = step
        self.say(f"resumed from step {step}")

    def validated(self, step: int, what: str, nats: float, own: dict[str, Any] | None = None) -> None:
        """A validation figure; `what` says of what. `own` are the figures of the student's own responses."""
        self.say(f"{self._at(step)}  {what}: {nats:.3f} nats/token")
        if own is not None:
            self.say(
                f"{self._at(step)}  on its own text: KL(student || teacher) {own['reverse_kl_nats']:.3f} nats/token, "
                f"{own['length_ratio']:.0%} of the teacher's length, {own['ended_share']:.0%} ended, "
                f"{own['repeated_4grams']:.0%} of 4-grams repeated"
            )

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
        spent = metrics["spent"]
        if self._start_spent is None:  # the share before the first step of this process
            self._start_spent = spent * self._start_step / step
        if self._bar is not None:
            self._bar.update(self._task, completed=step if self._total is not None else spent, note=note, step=step)
            return
        now = time.monotonic()
        if now - self._last_line >= PLAIN_LINE_EVERY_S or spent >= 1:
            self._last_line = now
            left_s = (now - self._started) / max(spent - self._start_spent, 1e-9) * max(0.0, 1 - spent)
            self.say(f"{self._at(step)}  {note}  about {_duration(left_s)} left")

    def _at(self, step: int) -> str:
        return f"step {step}/{self._total}" if self._total is not None else f"step {step}"


def total_steps(train: TrainSection) -> int | None:
    """How many steps a run takes; None where its budget is tokens or seconds."""
    return train.max_steps if train.ends_by_steps_alone else None


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
