"""Ends Python code that takes longer than it may, such as a template from outside that loops for ever. Cold."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class TimeUp(Exception):
    """The block took longer than it may."""


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """The block, or `TimeUp` as soon as it has run for so many seconds; `what` takes so long.

    Between two steps of the interpreter: a single call into C is waited for. In other threads than the main one there
    is no limit, because signals reach that one alone.

    Raises:
        TimeUp: says what took how long.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signum: int, _frame: FrameType | None) -> None:
        raise TimeUp(f"{what} takes longer than {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, stop)
    outer, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, previous)
        signal.setitimer(signal.ITIMER_REAL, outer)  # what a block around this one has left; 0 where there is none
