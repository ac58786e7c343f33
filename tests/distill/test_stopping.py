"""A run that loses its terminal ends with a checkpoint, as one that is told to stop."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from qswitch.distill.stopping import stop_on_signal

RUN = """
import sys, time
from types import SimpleNamespace
from qswitch.distill.progress import Progress
from qswitch.distill.stopping import stop_on_signal
trainer, progress = SimpleNamespace(stop_requested=False), Progress(9)
with stop_on_signal(trainer, progress.say):
    progress.say("step")
    while not trainer.stop_requested:
        time.sleep(0.01)
    for _ in range(9):
        progress.say("the rest of the step")
        print("to stdout", flush=True)
open(sys.argv[1], "w").write("checkpoint")
"""


@pytest.mark.parametrize("piped", [False, True])
def test_a_terminal_that_closes_costs_no_step(tmp_path, piped):
    ours, theirs = pty.openpty()
    stdout = subprocess.PIPE if piped else theirs  # a `| tee log`, which ends with the terminal
    # A session of its own, whose terminal is the one that closes.
    code = "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n" + RUN
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "checkpoint")], stdin=theirs, stdout=stdout,
                               stderr=theirs, start_new_session=True)  # fmt: skip
    os.close(theirs)
    while b"step" not in os.read(ours, 1000):
        pass
    if process.stdout is not None:
        process.stdout.close()
    os.close(ours)
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "checkpoint").read_text() == "checkpoint"


def test_a_hang_up_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    try:
        trainer = SimpleNamespace(stop_requested=False)
        with stop_on_signal(trainer, print):
            os.kill(os.getpid(), signal.SIGHUP)
        assert not trainer.stop_requested and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_in_a_thread_leaves_signals_to_the_program_around_it():
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def work() -> None:
        with stop_on_signal(SimpleNamespace(stop_requested=False), print):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_session_that_ends_sends_several_signals_and_leaves_the_time_for_a_checkpoint(monkeypatch):
    monkeypatch.setattr("qswitch.distill.stopping._leave_terminal", lambda: None)
    said: list[str] = []
    trainer = SimpleNamespace(stop_requested=False)
    with stop_on_signal(trainer, said.append):
        for signum in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), signum)
        assert trainer.stop_requested and len(said) == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.0)
