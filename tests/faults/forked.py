"""qswitch commands as children of one process that has everything imported: a fault can be put into each, cheaply.

A child runs `qswitch.cli.run` as the console script does, with its own session, folder and output. Faults work on the
events that Python's audit hooks report (`open` for writing, `rename`, `mkdir`, `remove`): the process is killed at one
of them, or from there on every write fails. Knows nothing of what the commands do.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import json
import mmap
import os
import resource
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAULT_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (minus the signal that killed it), and all it printed."""

    code: int
    output: str

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.output

    @property
    def message(self) -> str:
        """The line that says what was wrong; empty where nothing was."""
        return next((line for line in self.output.splitlines() if line.lower().startswith("error:")), "")


def opens_for_writing(arguments: tuple[object, ...]) -> bool:
    """Whether an audit event `open`, of Python's open or of os.open, may change the file."""
    _, mode, flags = arguments
    return bool(set(mode) & set("wax+") if isinstance(mode, str) else isinstance(flags, int) and flags & _WRITES)


class Events:
    """Counts file events below a folder, over a process and its children, and does something at one of them."""

    def __init__(self, folder: Path, at: int = 0, action: Callable[[], None] | None = None) -> None:
        self.folder, self._at, self._action = f"{folder}{os.sep}", at, action
        self._count = mmap.mmap(-1, 8)
        self._watching = False

    @property
    def count(self) -> int:
        return struct.unpack("q", self._count[:8])[0]

    def watch(self) -> None:
        """From now on, in this process and its children."""
        if not self._watching:
            self._watching = True
            sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if event not in FAULT_EVENTS or not arguments or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        if event == "open" and not opens_for_writing(arguments):
            return
        if not f"{os.path.abspath(os.fsdecode(arguments[0]))}{os.sep}".startswith(self.folder):
            return
        count = self.count + 1
        self._count[:8] = struct.pack("q", count)
        if count == self._at and self._action is not None:
            self._action()


def kill_here() -> None:
    """The process is gone at once, as by the kernel or a power cut."""
    os.kill(os.getpid(), signal.SIGKILL)


def no_more_writes() -> None:
    """From now on every write to a file fails with EFBIG; needs no privilege, and no disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def preload() -> None:
    """Import and build what every command does, so that a child need not.

    What is imported by then is frozen: a run collects garbage many times, and the child would look through the objects
    of all these libraries each time, which is four fifths of a tiny run.
    """
    import bitsandbytes  # noqa: F401
    import datasets.packaged_modules.generator.generator  # noqa: F401
    import rouge_score.rouge_scorer  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch
    import typer.main

    import qswitch.__main__
    import qswitch.choose
    import qswitch.cli
    import qswitch.compare.cells
    import qswitch.data.template_checks
    import qswitch.distill.session
    import qswitch.evaluate.command
    import qswitch.evaluate.fidelity
    import qswitch.export.merge
    import qswitch.report.page
    import qswitch.rollout.generate
    import qswitch.run

    torch.set_num_threads(1)
    # A fork finds torch's thread pool without its threads and makes another at its next use. That must not be several
    # threads' use at once, as the loading of weights is: all but one of them would see no pool at all, and fail.
    os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))
    typer.main.get_command = functools.cache(typer.main.get_command)
    typer.main.get_command(qswitch.cli.app)
    qswitch.report.page.page_template()
    gc.collect()
    gc.freeze()


def command(
    arguments: Sequence[str],
    *,
    cwd: Path,
    fault: Callable[[], None] | None = None,
    environment: dict[str, str] | None = None,
    kill_after_s: float | None = None,
    signal_number: int = signal.SIGKILL,
    timeout_s: float = 600.0,
    unprivileged: bool = False,
    own_session: bool = True,
) -> Ended:
    """Run one command and wait for its end; what it started ends with it, where it has a session of its own.

    Args:
        fault: called in the child before the command.
        kill_after_s: send `signal_number` after so many seconds.
        unprivileged: give up root's right to read and write what belongs to others; the interpreter, which may lie in
            root's home, stays readable.

    Raises:
        TimeoutError: it took longer than `timeout_s`, and was killed.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        if own_session:
            os.setsid()
        _become(arguments, cwd, fault, environment or {}, writing, unprivileged)
    os.close(writing)
    started, signalled, pieces = time.monotonic(), False, []
    while True:
        elapsed = time.monotonic() - started
        if kill_after_s is not None and not signalled and elapsed >= kill_after_s:
            os.kill(pid, signal_number)
            signalled = True
        if elapsed > timeout_s:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(reading)
            raise TimeoutError(f"{' '.join(arguments)} took longer than {timeout_s:g} s")
        wait = 0.5 if kill_after_s is None or signalled else max(0.0, min(0.5, kill_after_s - elapsed))
        if select.select([reading], [], [], wait)[0]:
            piece = os.read(reading, 65536)
            if not piece:
                break
            pieces.append(piece)
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    if own_session:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return Ended(os.waitstatus_to_exitcode(status), b"".join(pieces).decode("utf-8", errors="replace"))


def in_child(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a function returns in a fork of this process, as JSON; where the fork ends otherwise, `output` says how."""
    with tempfile.TemporaryFile() as answer:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                answer.write(json.dumps(function()).encode())
                answer.flush()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        answer.seek(0)
        text = answer.read()
    return dict(json.loads(text)) if code == 0 else {"output": f"the process ended with {code}"}


def _become(
    arguments: Sequence[str],
    cwd: Path,
    fault: Callable[[], None] | None,
    environment: dict[str, str],
    output: int,
    unprivileged: bool,
) -> None:
    """The child; never returns."""
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
        os.environ.update(environment)
        os.chdir(cwd)
        if unprivileged:
            os.setgroups([])
            _drop_capabilities()
        from qswitch.__main__ import _interrupt
        from qswitch.cli import run
        from qswitch.compare import cells

        signal.signal(signal.SIGINT, _interrupt)
        cells.launch_process = lambda words: _relay(words, cwd)
        if fault is not None:
            fault()
        code = run(list(arguments))
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _drop_capabilities() -> None:
    """capset(2) with empty sets: root without any privilege over the files of others."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    empty = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(header, empty) != 0:
        raise OSError(ctypes.get_errno(), "capset")


on_launch: list[Callable[[], None]] = []
"""Called in a command's process before it starts each process of its own; a fault may add to it."""


def _relay(words: Sequence[str], cwd: Path) -> int:
    """What compare's own process is here: a child of this one, its output passed on."""
    for listener in on_launch:
        listener()
    ended = command(words, cwd=cwd, own_session=False)
    sys.stderr.write(ended.output)
    sys.stderr.flush()
    return ended.code
