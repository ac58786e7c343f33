"""How the bytes of a data file are read, whether it is compressed or not.

Knows the compressions by their endings and nothing of what the files hold.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import importlib.util
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

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
        DataError: the compressed data is damaged, or zstandard is needed and not installed.
    """
    kind = compression_of(path)
    damaged: tuple[type[Exception], ...] = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError)
    if kind == ".zst":
        if importlib.util.find_spec("zstandard") is None:
            raise DataError(f"{path}: reading .zst files needs zstandard: pip install zstandard. Or unpack the file.")
        import zstandard

        damaged = (*damaged, zstandard.ZstdError)
    try:
        with _opened(path, kind) as handle:
            yield handle
    except damaged as error:
        raise _damaged(path, kind, error) from None
    except OSError as error:
        if kind == ".bz2" and error.errno is None:  # bz2 raises a bare OSError for bytes that are no bzip2
            raise _damaged(path, kind, error) from None
        raise


def _opened(path: Path, kind: str | None) -> contextlib.AbstractContextManager[IO[bytes]]:
    if kind == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if kind == ".bz2":
        return cast(IO[bytes], bz2.open(path, "rb"))
    if kind == ".xz":
        return cast(IO[bytes], lzma.open(path, "rb"))
    if kind == ".zst":
        return cast(IO[bytes], io.BufferedReader(_ZstdReader(path), 1 << 20))
    return path.open("rb")


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of one or more zstandard frames.

    zstandard's own reader takes a file that was cut off for one that ended.
    """

    def __init__(self, path: Path) -> None:
        import zstandard

        self._new = zstandard.ZstdDecompressor().decompressobj
        self._file = path.open("rb")
        self._frame: Any = None
        self._input = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._input:
                self._input = self._file.read(1 << 17)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the last frame does not end")
                return 0
            self._frame = self._frame or self._new()
            self._ready, self._input = self._frame.decompress(self._input), b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _damaged(path: Path, kind: str | None, error: Exception) -> DataError:
    return DataError(
        f"{path}: the {kind} data is damaged or cut off ({str(error).rstrip('.') or type(error).__name__}). Copy or "
        "download the file again."
    )
