"""Whether a model's weight files are all there and whole, by their headers alone, and what of them the hub is to send.

Knows no model class.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from qswitch.errors import FileError, ModelError
from qswitch.launch import launched
from qswitch.models.messages import saying
from qswitch.models.references import ResolvedModel
from qswitch.outside import read_json
from qswitch.units import GIB

logger = logging.getLogger(__name__)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header, little-endian."""
_SAMPLED_BYTES = 4 * 2**20
"""Read of each end of a file for its fingerprint."""


SAY_EVERY_S = 60.0
"""Between two lines about a download, where no bar is shown."""


class IndexFile(TypedDict):
    """model.safetensors.index.json."""

    weight_map: dict[str, str]


def check_weight_files(resolved: ResolvedModel) -> None:
    """Nothing, or an error for a local folder whose weights cannot be read; a hub id is left to its download.

    Raises:
        ModelError: no safetensors file, a part is missing, or a file is cut off.
    """
    folder = Path(resolved.path)
    if not folder.is_dir():
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        found = f"only {pickled[0]}, and qswitch reads no pickle. Convert it to safetensors" if pickled else (
            "none. Copy or download model.safetensors into it"
        )  # fmt: skip
        raise ModelError(f"{folder}: it needs weights in safetensors format and has {found}.")
    index = folder / INDEX
    if index.is_file():
        try:
            parts = set(read_json(index, IndexFile)["weight_map"].values())
        except FileError as error:
            raise ModelError(f"{error} Download it again.") from None
        missing = sorted(parts - {f.name for f in files})
        if missing:
            raise ModelError(f"{folder}: {len(missing)} of {len(parts)} weight files are missing, for example "
                             f"{missing[0]}. Download them.")  # fmt: skip
        files = [folder / part for part in sorted(parts)]
    for file in files:
        check_whole(file)


@contextlib.contextmanager
def download_shown(resolved: ResolvedModel) -> Iterator[None]:
    """While a hub model is read: say how much of its weights is still to come, and show huggingface_hub's bars.

    A block inside `quiet`, which switches those bars off together with the ones of transformers.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    if Path(resolved.path).is_dir() or constants.HF_HUB_OFFLINE:
        yield
        return
    missing_bytes = bytes_to_download(resolved)
    size = f"{missing_bytes / GIB:.2f} GiB of {resolved.name}"
    if missing_bytes:
        logger.warning("downloading %s into %s", size, constants.HF_HUB_CACHE)
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None and launched().rank == 0:
        enable_progress_bars()
    try:
        # A bar is drawn on a terminal only; a log gets a line now and then. The weights are read in this block, too.
        what = f"downloading and loading {size}"
        with saying(what, SAY_EVERY_S) if missing_bytes and not sys.stderr.isatty() else contextlib.nullcontext():
            yield
    finally:
        if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
            disable_progress_bars()


def _in_cache(resolved: ResolvedModel, name: str) -> Path | None:
    """A file of a hub model that is in the cache."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(resolved.path, name, revision=resolved.revision)
    return Path(found) if isinstance(found, str) else None


def bytes_to_download(resolved: ResolvedModel) -> int:
    """Of a hub model's weights, the bytes that are not in the cache yet; 0 where the hub does not say.

    Why it does not, is said by whoever then reads the model.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    def size(name: str) -> int:
        url = huggingface_hub.hf_hub_url(resolved.path, name, revision=resolved.revision)
        return huggingface_hub.get_hf_file_metadata(url).size or 0

    if _in_cache(resolved, SINGLE):
        return 0
    try:
        index: Any = _in_cache(resolved, INDEX)
        if index is None:
            try:
                return size(SINGLE)
            except EntryNotFoundError:  # in parts, then
                index = huggingface_hub.hf_hub_download(resolved.path, INDEX, revision=resolved.revision)
        parts = sorted(set(read_json(Path(index), IndexFile)["weight_map"].values()))
        return sum(size(part) for part in parts if not _in_cache(resolved, part))
    except Exception:  # httpx, OSError and the hub's own; the model is read next, and what fails there is explained
        return 0


def check_whole(file: Path) -> None:
    """Nothing, or an error for a safetensors file that is missing, cut off or something else.

    Raises:
        ModelError: with the reason and the remedy.
    """
    if not file.is_file():
        raise ModelError(f"{file} is missing. Copy or download it.")
    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(_LENGTH_BYTES), "little")
            if not 0 < length <= size:
                raise ValueError("its header does not end")
            header = json.loads(handle.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is no safetensors file ({error}). Download it again.") from None
    expected = _LENGTH_BYTES + length + max(ends, default=0)
    if size != expected:
        raise ModelError(f"{file} has {size:,} bytes, but its header describes {expected:,}. Download it again.")


def weights_fingerprint(resolved: ResolvedModel) -> str | None:
    """Tells one model's weights from another's by names, sizes, first and last bytes of its files, in a folder or in
    the hub's cache; None where they are not all here."""
    folder = Path(resolved.path)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else _cached_weights(resolved)
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(_SAMPLED_BYTES))  # the header, which names every tensor, and the first of them
            handle.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(handle.read())
    return digest.hexdigest()[:32]


def _cached_weights(resolved: ResolvedModel) -> list[Path]:
    """The weight files of a hub model, sorted by name; none where one of them is not in the cache."""
    if (single := _in_cache(resolved, SINGLE)) is not None:
        return [single]
    if (index := _in_cache(resolved, INDEX)) is None:
        return []
    try:
        parts = sorted(set(read_json(index, IndexFile)["weight_map"].values()))
    except FileError:
        return []  # whoever reads the model says it
    found = [_in_cache(resolved, part) for part in parts]
    return [path for path in found if path is not None] if None not in found else []
