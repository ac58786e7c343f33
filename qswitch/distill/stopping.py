"""What a signal does to a run: it ends after its step, with a checkpoint. All it knows of a trainer is that."""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from qswitch.terminal import STDERR, STDOUT, lead_nowhere

_HANG_UP = getattr(signal, "SIGHUP", None)
"""What the processes of a terminal get when its window or its SSH connection closes; Windows has none."""


class Stoppable(Protocol):
    """What ends after its step when it is asked."""

    stop_requested: bool


@contextmanager
def stop_on_signal(trainer: Stoppable, say: Callable[[str], None]) -> Iterator[None]:
    """SIGINT, SIGTERM or SIGHUP ends the run after the current step, with a checkpoint; a second of the first two at
    once. A SIGHUP that is ignored already (`nohup`) stays so. In a thread of a larger program signals are that
    program's, and nothing is changed: Python lets the main thread alone handle them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def request(signum: int, _frame: Any) -> None:
        nonlocal asked
        if signum == _HANG_UP:
            _leave_terminal()  # which may be told by shell, kernel and session manager: no reason to stop at once
        elif asked:
            raise KeyboardInterrupt
        else:
            asked = True
        if not trainer.stop_requested:
            trainer.stop_requested = True
            say("stopping after this step, with a checkpoint; press Ctrl-C again to stop at once")

    signals = [signal.SIGINT, signal.SIGTERM]
    if _HANG_UP is not None and signal.getsignal(_HANG_UP) is not signal.SIG_IGN:
        signals.append(_HANG_UP)
    previous = {s: signal.signal(s, request) for s in signals}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _leave_terminal() -> None:
    """Give up stdout and stderr, unless they are files: writing to a terminal or a pipe that is gone is an error, which
    would end the run before its checkpoint."""
    for descriptor in (STDOUT, STDERR):
        try:
            is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        except OSError:
            continue  # closed
        if not is_file:
            lead_nowhere(descriptor)
