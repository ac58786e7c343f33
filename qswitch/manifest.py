"""Whether the files of a folder are as they were written: a manifest beside them has the size and SHA-256 of each.

Cold: knows nothing of what the files hold.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from qswitch.errors import FileError
from qswitch.outside import read_json

MANIFEST = "manifest.json"


class Entry(TypedDict):
    """What is known of one file."""

    bytes: int
    sha256: str


class Manifest(TypedDict):
    """manifest.json, whatever else its writer put into it."""

    files: dict[str, Entry]


def write_manifest(folder: Path, *, pattern: str = "*", **head: Any) -> None:
    """Write `head` and the size and SHA-256 of every file in `folder` that fits `pattern` into its manifest.json."""
    files = {}
    for path in sorted(p for p in folder.rglob(pattern) if p.is_file()):
        files[path.relative_to(folder).as_posix()] = entry_of(path)
    (folder / MANIFEST).write_text(json.dumps({**head, "files": files}, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """A folder's manifest; None where there is none that can be read."""
    try:
        return dict(read_json(folder / MANIFEST, Manifest))
    except FileError:
        return None


def find_damage(folder: Path) -> str | None:
    """What is wrong with the files that the folder's manifest lists; None where each is as it was written."""
    manifest = read_manifest(folder)
    if manifest is None:
        return f"it has no {MANIFEST} that can be read"
    for name, written in manifest["files"].items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != written["bytes"]:
                return f"{name} has {size:,} bytes, {written['bytes']:,} were written"
            if _sha256(path) != written["sha256"]:
                return f"the SHA-256 of {name} is not that of the file that was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def entry_of(path: Path) -> Entry:
    """Size and SHA-256 of a file as it is now."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def begins_as(path: Path, written: Entry) -> bool:
    """Whether a file is there and begins with the bytes that it had once; a log may have grown since."""
    try:
        return path.stat().st_size >= written["bytes"] and _sha256(path, written["bytes"]) == written["sha256"]
    except OSError:
        return False


def _sha256(path: Path, num_bytes: int | None = None) -> str:
    """Of the whole file, or of its first bytes."""
    digest, left = hashlib.sha256(), path.stat().st_size if num_bytes is None else num_bytes
    with path.open("rb") as handle:  # hashlib.file_digest came with Python 3.11
        while left > 0 and (block := handle.read(min(left, 2**24))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()
