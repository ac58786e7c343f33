"""How files and folders that stay come to exist whole or not at all.

Everything is written beside its final name, flushed to the disk and renamed into place, with the permissions that the
user's umask gives (safetensors writes its files for their owner alone). What a killed process left behind is removed
by the next write to the same folder: its writer held a lock that the kernel released. Cold; knows nothing of what is
written.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from qswitch.errors import system_number

PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.partial")
"""Names of what is being written: hidden, the final name, eight random digits."""


@contextlib.contextmanager
def folder_aside(target: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `target` when the block ends, and vanishes when the block raises.

    Missing parents are made. An existing empty folder is replaced, one that holds something never.

    Raises:
        OSError: the disk is full, a permission is missing, or `target` holds something by now.
    """
    with _aside(target, Path.mkdir) as partial:
        yield partial


@contextlib.contextmanager
def file_aside(target: Path) -> Iterator[Path]:
    """An empty file to write, which replaces `target` when the block ends, and vanishes when the block raises.

    It is to be written into, not replaced: the lock that keeps sweeps away belongs to the file itself. Missing parents
    are made.

    Raises:
        OSError: the disk is full or a permission is missing.
    """
    with _aside(target, Path.touch) as partial:
        yield partial


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """A folder with its parents while the block runs; where the block raises, those made here vanish if they are empty.

    Raises:
        OSError: it cannot be made; then no parent of it was made either.
    """
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for one in missing:
            with contextlib.suppress(OSError):
                one.rmdir()
        raise


def append_text(path: Path, text: str, *, sync: bool = False) -> None:
    """Add whole lines to a log, UTF-8; where the disk takes only a part of them, none of them.

    Raises:
        OSError: it cannot be written; names the file.
    """
    left = text.encode("utf-8")
    with path.open("ab", buffering=0) as handle:  # a buffer would write the rest again when it is closed
        before = os.fstat(handle.fileno()).st_size
        try:
            while left:
                left = left[handle.write(left) :]
            if sync:
                os.fsync(handle.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(handle.fileno(), before)
            error.filename = str(path)
            raise


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """An empty folder inside `folder` for what is needed meanwhile only; it vanishes when the block ends.

    Raises:
        OSError: it cannot be made.
    """
    with _aside(folder / "scratch", Path.mkdir, keep=False) as partial:
        yield partial


def sweep(folder: Path) -> list[str]:
    """Remove what dead processes left half-written in `folder`; the names of what was removed.

    What a live process writes is left alone, and so is everything on a file system that has no locks.
    """
    removed = []
    for path in folder.iterdir():
        if not PARTIAL.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError), _lock(path, wait=False) as locked:
            if locked:
                _remove(path)
                removed.append(path.name)
    return removed


@contextlib.contextmanager
def _aside(target: Path, create: Callable[[Path], None], *, keep: bool = True) -> Iterator[Path]:
    with made_folder(target.parent):
        sweep(target.parent)
        while True:
            partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
            create(partial)
            with _lock(partial, wait=True):
                if not partial.exists():  # a sweep of another process came between the two lines above
                    continue
                yield from _filled(partial, target, keep=keep)
                return


def _filled(partial: Path, target: Path, *, keep: bool) -> Iterator[Path]:
    """What is locked, to be filled, and then renamed; gone where that fails."""
    file_mode = stat.S_IMODE(partial.stat().st_mode) & 0o666  # the umask, which is read by setting it otherwise
    try:
        yield partial
        if keep:
            _settle(partial, file_mode)
            os.replace(partial, target)
            _flush(target.parent)
    except Exception as error:
        number = system_number(error)
        if number is None or (isinstance(error, OSError) and error.filename is not None):
            raise
        # Of a library that wrote here itself; its own error says neither the kind nor the file.
        raise OSError(number, os.strerror(number), str(target)) from error
    finally:
        _remove(partial)


@contextlib.contextmanager
def _lock(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process holds the lock of `path` while the block runs; the lock ends with the process."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # another process was faster to remove it
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:  # somebody else holds it, or the file system has no locks
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _settle(partial: Path, file_mode: int) -> None:
    """Permissions as the umask gives them to any new file, and every byte on the disk."""
    for path in [*partial.rglob("*"), partial] if partial.is_dir() else [partial]:
        if path.is_file():
            with contextlib.suppress(PermissionError):  # a folder of Windows under WSL2 keeps no mode
                path.chmod(file_mode)
        _flush(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Nothing happens where there is nothing."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
