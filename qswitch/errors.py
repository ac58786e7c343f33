"""Which failures a user can mend, and the exit code of each.

Every message says what is wrong (with the numbers), where, and the remedy. `cli.py` is the only place that turns an
exception into an exit code; whoever catches one before has something to do about it, as `chat`, which goes on.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from typing import Any, Literal


class QSwitchError(Exception):
    """A failure with a message for the user; exit code 2 unless a subclass says otherwise."""

    exit_code = 2
    said_elsewhere = False
    """Whether another process of the same run says it."""


class ConfigError(QSwitchError):
    """The configuration is wrong: unknown keys, bad values, settings that have no effect together."""

    def __init__(self, problems: list[str] | str, where: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.where = where
        head = f"{where}: " if where else ""
        if len(self.problems) == 1:
            message = head + self.problems[0]
        else:
            message = f"{head}{len(self.problems)} problems:\n" + "\n".join(f"  - {p}" for p in self.problems)
        super().__init__(message)


class DataError(QSwitchError):
    """A data file cannot be read as prompts; the message names file, line and reason."""


class ModelError(QSwitchError):
    """A model cannot be found, loaded, quantised, adapted, shrunk or exported."""


class TokenizerMismatchError(ModelError):
    """Teacher and student do not map the same text to the same token ids."""


class RunDirError(QSwitchError):
    """The run directory is missing, incomplete, or belongs to another configuration."""


class TrainingError(QSwitchError):
    """Training cannot go on (for instance a non-finite loss); the last checkpoint is intact."""


class NonFiniteError(TrainingError):
    """A model computed NaN or infinity; `role` is the one to blame, teacher or student."""

    def __init__(self, role: Literal["teacher", "student"], what: str) -> None:
        self.role, self._what = role, what
        super().__init__(f"The {role}'s {what} NaN or infinite.")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.role, self._what)


class ProcessLostError(TrainingError):
    """Another process of the run has ended or failed, so that this one cannot go on; the last checkpoint is intact."""


class Interrupted(KeyboardInterrupt):
    """The user stopped a run, which is no failure; it can be resumed. Its arguments are the folder and the command,
    distill where none is named."""


class FileError(QSwitchError):
    """A file from outside, or one that a command left, cannot be read as what it should be; names it and says why."""


class StorageError(QSwitchError):
    """The operating system refused a file: a full disk, a missing permission, a name that is too long."""


class PlanError(QSwitchError):
    """The plan does not fit the memory budget."""

    exit_code = 3


_REMEDIES = {
    errno.ENOSPC: "Free some space on that disk",
    errno.EDQUOT: "Free some of your quota on that disk",
    errno.EFBIG: "Raise the limit of file sizes (ulimit -f), or use another disk",
    errno.EACCES: "Change its permissions, or name another place",
    errno.EPERM: "Change its permissions or its owner, or name another place",
    errno.EROFS: "Name a place that can be written",
    errno.ENAMETOOLONG: "Give a shorter name",
    errno.ENOENT: "Bring it back, or name another",
    errno.ENOTDIR: "Name another place",
    errno.EISDIR: "Name a file",
    errno.EEXIST: "Choose another name, or remove it",
    errno.ENOTEMPTY: "Choose another name, or empty it",
    errno.ELOOP: "Mend the symbolic links",
    errno.EBUSY: "Wait for what uses it, or name another place",
    errno.EIO: "The disk or its connection fails: look at `dmesg`, and copy what you need to another disk",
    errno.ESTALE: "The network disk was lost; mount it again",
    errno.EMFILE: "Raise the limit of open files (ulimit -n)",
    errno.ENFILE: "Close other programs",
    errno.ENOMEM: "Close other programs, or allow more memory",
    errno.EPIPE: "What read the output has ended",
}
"""What a user does about an error of the operating system, by its number."""
_FOREIGN = re.compile(r"os error (\d+)|[Ee]rrno (\d+)")
"""How libraries in Rust and C++ write the number of such an error into their own."""


_SIGNS_OF_FULL_MEMORY = re.compile(
    r"DefaultCPUAllocator"  # torch's, on a CPU
    r"|(CUDA|Cuda|HIP)\b.{0,40}out of memory"  # torch, the driver through it, NCCL, Triton, bitsandbytes
    r"|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_(\w+_)?ALLOC(ATION)?_FAILED"
)
_CUBLAS_CANNOT_START = re.compile(r"CUBLAS_STATUS_NOT_INITIALIZED.*cublasCreate")
"""Its first call on a card that is full; also with a driver that does not fit it, or while a CUDA graph is recorded."""


def is_out_of_memory(error: BaseException, *, surely: bool = False) -> bool:
    """Whether an error means that an allocation failed, on a GPU or in host memory; false for one of ours, which says.

    `surely`: and can mean nothing else, as it can where cuBLAS does not start.

    Most libraries raise a plain RuntimeError and say so in its text alone. Asks no torch, so that a command that has
    not loaded it can ask. What the system refused for want of memory, as a file to be mapped, is a `storage_problem`.
    """
    for one in causes(error):
        if isinstance(one, QSwitchError):
            return False
        is_torchs = any(kind.__name__ == "OutOfMemoryError" for kind in type(one).__mro__)
        if is_torchs or isinstance(one, MemoryError):
            return True
        if isinstance(one, Exception) and _SIGNS_OF_FULL_MEMORY.search(str(one)):
            return True
        if not surely and isinstance(one, Exception) and _CUBLAS_CANNOT_START.search(str(one)):
            return True
    return False


def memory_reason(error: BaseException) -> str:
    """The first line of what an error that counts as out of memory says, and what else may be behind it."""
    reason = str(error).strip().partition("\n")[0][:200]
    if is_out_of_memory(error, surely=True):
        return reason
    return f"{reason}; a driver that does not fit the libraries leads to the same error, see `qswitch doctor`"


def storage_problem(error: BaseException) -> str | None:
    """What the operating system refused, with the file and the remedy; None for any other error.

    Libraries that write files themselves (safetensors, pyarrow, datasets) raise their own kinds with the number in the
    text, or with the system's error as their cause.
    """
    for one in causes(error):
        number = system_number(one)
        if number in _REMEDIES:
            names = [getattr(one, name, None) for name in ("filename", "filename2")]
            where = next((os.fsdecode(n) for n in names if isinstance(n, (str, bytes, os.PathLike))), None)
            return f"{'' if where is None else _short(where) + ': '}{os.strerror(number)}. {_REMEDIES[number]}."
    return None


def system_number(error: BaseException) -> int | None:
    """The number that the operating system gave an error, also where a library only writes it into its text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if not isinstance(error, Exception) or isinstance(error, QSwitchError):
        return None
    found = _FOREIGN.search(str(error))
    return None if found is None else int(found[1] or found[2])


def causes(error: BaseException, *, shown: bool = False) -> Iterator[BaseException]:
    """An error and those it was raised from; `shown`: also those that Python shows above it, since libraries raise some
    of their own without naming the cause."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = at.__cause__ or (at.__context__ if shown and not at.__suppress_context__ else None)


def _short(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:90]}...{name[-90:]}"
