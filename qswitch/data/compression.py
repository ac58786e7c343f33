"""How the bytes of a data file are read, whether it is compressed or not.

Knows the compressions by their endings and nothing of what the files hold.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from qswitch.errors import DataError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


def compression_of(path: Path) -> str | None:
    """`.gz` of `data.jsonl.gz`; None for a file that is not compressed."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else None


def data_suffix(path: Path) -> str:
    """The ending that says what the file holds: `.jsonl` of `data.jsonl.gz`."""
    return (path.with_suffix("") if compression_of(path) else path).suffix.lower()


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed while they are read.

    Raises:
        DataError: the compressed data is damaged or cut off.
    """
    kind = compression_of(path)
    try:
        with _opened(path, kind) as handle:
            yield handle
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        # bz2, gzip and pyarrow raise a bare OSError for bytes that are not theirs; one of the system has a number.
        if isinstance(error, OSError) and (kind is None or error.errno is not None):
            raise
        raise DataError(
            f"{path}: the {kind} data is damaged or cut off ({str(error).rstrip('.') or type(error).__name__}). Copy "
            "or download the file again."
        ) from None


def _opened(path: Path, kind: str | None) -> contextlib.AbstractContextManager[IO[bytes]]:
    if kind == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if kind == ".bz2":
        return cast(IO[bytes], bz2.open(path, "rb"))
    if kind == ".xz":
        return cast(IO[bytes], lzma.open(path, "rb"))
    if kind == ".zst":
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
        return cast(IO[bytes], io.BufferedReader(cast(io.RawIOBase, stream), 1 << 20))
    return path.open("rb")
