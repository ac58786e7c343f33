"""`qswitch` and `python -m qswitch` begin here: Ctrl-C is understood from the first import on.

The libraries that a command loads take seconds to import, and an exception in the middle of that comes out as one of
their own, or as a traceback. So an interrupt that finds an import under way ends the process, with one line.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGINT, _interrupt)
    from qswitch.cli import main as command_line

    command_line()


def _interrupt(_signum: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_name == "_find_and_load":
            # Nothing is held that the next command misses: files are renamed into place, locks end with the process.
            sys.stderr.write("interrupted.\n")
            sys.stderr.flush()
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
