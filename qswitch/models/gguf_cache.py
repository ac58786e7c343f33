"""A GGUF file as a plain safetensors folder, converted once and kept, so that it is read and quantised as any other."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qswitch.aside import folder_aside
from qswitch.errors import ModelError
from qswitch.models.messages import first_line, quiet, saying
from qswitch.outside import user_path
from qswitch.units import GIB

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 10.0
"""Between two lines about a conversion."""


def cache_folder() -> Path:
    """Where converted models are kept: $QSWITCH_CACHE, else ~/.cache/qswitch."""
    root = os.environ.get("QSWITCH_CACHE")
    return user_path(root) if root else Path.home() / ".cache" / "qswitch"


def converted_folder(path: Path) -> Path:
    """Where the folder is, or will be, that a GGUF file is converted into."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    return cache_folder() / "models" / f"{path.stem}-{key}"


def why_unreadable(path: Path) -> str | None:
    """What is missing here to read a GGUF file, and the remedy; None where it can be, or was converted before."""
    if importlib.util.find_spec("gguf") is not None or (converted_folder(path) / "config.json").is_file():
        return None
    return f"reading {path.name} needs the gguf package: pip install gguf sentencepiece protobuf"


def materialise_gguf(path: Path) -> Path:
    """The GGUF file as a plain bf16 safetensors folder with tokenizer, made once and kept in the cache.

    Raises:
        ModelError: a package is missing, or transformers cannot read the file.
    """
    folder = converted_folder(path)
    if (folder / "config.json").is_file():
        return folder
    if (problem := why_unreadable(path)) is not None:
        raise ModelError(problem)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.warning("converting %s (%.2f GiB), once, into %s", path.name, path.stat().st_size / GIB, folder)
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        with folder_aside(folder) as partial, quiet(), gguf_progress(f"converting {path.name}"):
            with saying(f"converting {path.name}: its tokenizer", PROGRESS_EVERY_S):
                tokenizer = AutoTokenizer.from_pretrained(**source)
            loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            plain_model(loaded).to(torch.bfloat16).save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    except (OSError, ValueError, LookupError, RuntimeError, ImportError, struct.error) as error:
        if not (folder / "config.json").is_file():  # else another process was first, and its folder is as good
            raise ModelError(f"{path} cannot be converted: {first_line(error)}") from error
    return folder


def plain_model(loaded: Any) -> Any:
    """A fresh unquantised model of the same class with the tensors of `loaded`.

    transformers refuses to save a model that was read from GGUF; a new model holding its dequantised tensors it saves.
    """
    import torch

    config = type(loaded.config).from_dict(loaded.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        fresh = type(loaded)(config)
    state = dict(loaded.state_dict())
    _, unexpected = fresh.load_state_dict(state, strict=False, assign=True)
    fresh.tie_weights()
    left = [name for name, tensor in fresh.named_parameters() if tensor.is_meta]
    if unexpected or left:
        raise ModelError(f"{type(loaded).__name__}: cannot carry over the tensors {sorted([*unexpected, *left])[:4]}.")
    if getattr(loaded, "generation_config", None) is not None:
        fresh.generation_config = loaded.generation_config
    return fresh


@contextlib.contextmanager
def gguf_progress(what: str | None = None) -> Iterator[None]:
    """In place of the bar of transformers' GGUF reader, which no setting switches off: a line now and then, or none."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = getattr(reader, "tqdm", None)
    reader.tqdm = lambda items, **_: items if what is None else _said(items, what)
    try:
        yield
    finally:
        reader.tqdm = bar


def _said(items: Iterable[Any], what: str) -> Iterator[Any]:
    """The items, and every `PROGRESS_EVERY_S` a line with the share of them that is done."""
    items = list(items)
    last = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - last >= PROGRESS_EVERY_S:
            last = time.monotonic()
            logger.warning("%s: %d %%", what, 100 * number // len(items))
        yield item
