"""What of a text reaches a terminal: no control character, so that data, models and file names cannot give it orders.

One filter for messages, progress, warnings and results; and one way to write lines that nobody has to read. Cold.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, tabs and line ends apart; what turns the direction of writing; halves of characters."""


STDOUT, STDERR = 1, 2
ERROR_FILE = "QSWITCH_ERROR_FILE"
"""Environment variable of `complain`."""


def printable(text: str) -> str:
    """Text whose control characters, tabs and line ends apart, a terminal shows as escapes instead of obeying them."""
    return _CONTROL.sub(lambda match: _escape(ord(match[0])), text)


def printable_json(text: str) -> str:
    """The same of a JSON text, which stays JSON: such characters stand inside of strings only."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def tell(text: str) -> None:
    """A line on stderr; none where its reader has ended, which is no reason to stop what the line is about."""
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except BrokenPipeError:
        lead_nowhere(STDERR)


def complain(text: str) -> None:
    """The line on stderr that says why a command ends; also into the file that $QSWITCH_ERROR_FILE names, where it is
    set by a command that started this one and wants to say it later."""
    tell(f"error: {text}")
    if path := os.environ.get(ERROR_FILE):
        with contextlib.suppress(OSError):  # it has been said
            Path(path).write_text(printable(text), encoding="utf-8")


def lead_nowhere(descriptor: int) -> None:
    """Let what is written to a descriptor disappear, also what waits in a buffer, since its reader has ended."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def filter_log() -> None:
    """Let every line that is logged in this process, by whatever library, go through `printable`."""
    if logging.getLogRecordFactory() is not _clean_record:
        logging.setLogRecordFactory(_clean_record)


def _clean_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = logging.LogRecord(*args, **kwargs)
    with contextlib.suppress(Exception):  # arguments that do not fit the text: logging says so, and where
        record.msg, record.args = printable(record.getMessage()), ()
    return record


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
