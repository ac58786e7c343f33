"""What a GGUF file says of its model, as config.json values: the header alone, no weights. Cold.

Written out here because the reader of the `gguf` package makes an array of every token and takes seconds for a
vocabulary, in which a plan should be finished (tests/plan/test_gguf_header.py compares the two). The format is that of
ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from qswitch.errors import ConfigError

NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""Type number of a value -> its struct format; 8 is text, 9 a list."""
TEXT, LIST = 8, 9

MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text",
               "phi3": "phi3", "gpt2": "gpt2"}  # fmt: skip
"""Architecture in a GGUF file -> the model_type that transformers makes of it; families of the table only."""
SETTINGS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
}
"""Name in config.json -> name after the architecture."""


def tokens_of_gguf(path: Path) -> list[str]:
    """The vocabulary of a GGUF file by id; empty where it has none.

    Raises:
        ConfigError: as `read_header`.
    """
    tokens = read_header(path, items_of="tokenizer.ggml.tokens")[0].get("tokenizer.ggml.tokens", [])
    if not all(isinstance(token, str) for token in tokens):
        raise ConfigError(f"{path} cannot be read as a GGUF file: its vocabulary is no list of texts.")
    return tokens


def read_header(path: Path, *, items_of: str | None = None) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """(values by name, dimensions of every tensor by name); of a list only its length is read, but for `items_of`.

    Raises:
        ConfigError: the file is no GGUF file, is cut off, or is of a version that is not known.
    """
    try:
        with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data, items_of).header()
    except (OSError, ValueError, struct.error, OverflowError) as error:
        raise ConfigError(f"{path} cannot be read as a GGUF file: {error}. Download it again.") from None


class _Reader:
    def __init__(self, data: mmap.mmap, items_of: str | None = None) -> None:
        self._data, self._at, self._items_of = data, 0, items_of

    def header(self) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, where 2 and 3 are known")
        num_tensors, num_values = self._number("<Q"), self._number("<Q")
        values: dict[str, Any] = {}
        for _ in range(num_values):
            name, kind = self._text(), self._number("<I")
            values[name] = self._items(kind) if name == self._items_of else self._value(kind)
        tensors = {}
        for _ in range(num_tensors):
            name = self._text()
            tensors[name] = tuple(self._number("<Q") for _ in range(self._number("<I")))
            self._at += struct.calcsize("<IQ")  # how it is quantised, and where it begins
        return values, tensors

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _text(self) -> str:
        length = self._number("<Q")
        if self._at + length > len(self._data):
            raise ValueError("it ends within its header")
        self._at += length
        return self._data[self._at - length : self._at].decode("utf-8")

    def _items(self, kind: int) -> list[Any]:
        if kind != LIST:
            raise ValueError(f"{self._items_of} is no list")
        inner, length = self._number("<I"), self._number("<Q")
        return [self._text() if inner == TEXT else self._number(self._format(inner)) for _ in range(length)]

    def _value(self, kind: int) -> Any:
        if kind == TEXT:
            return self._text()
        if kind != LIST:
            return self._number(self._format(kind))
        inner, length = self._number("<I"), self._number("<Q")
        if inner == TEXT:
            unpack, at = struct.Struct("<Q").unpack_from, self._at  # a vocabulary has up to 262,144 texts
            for _ in range(length):
                at += 8 + unpack(self._data, at)[0]
            self._at = at
        else:
            self._at += length * struct.calcsize(self._format(inner))
        return range(length)

    @staticmethod
    def _format(kind: int) -> str:
        if kind not in NUMBERS:
            raise ValueError(f"a value of the unknown type {kind}")
        return NUMBERS[kind]


def config_of_gguf(path: Path) -> Mapping[str, Any]:
    """The values of config.json that transformers makes of a GGUF file, as far as the shape of the model needs them.

    Raises:
        ConfigError: the file cannot be read, or transformers makes no model of its architecture.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    return _config_of_version(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=8)  # a plan asks for the shape of a model some hundred times
def _config_of_version(path: Path, _size: int, _modified_ns: int) -> Mapping[str, Any]:
    values, tensors = read_header(path)
    architecture = str(values.get("general.architecture"))
    if architecture not in MODEL_TYPES:
        return _as_transformers_reads(path, architecture)
    found = {
        name: values[f"{architecture}.{key}"] for name, key in SETTINGS.items() if f"{architecture}.{key}" in values
    }
    vocabulary = values.get("tokenizer.ggml.tokens", ())
    embedding = tensors.get("token_embd.weight", (0, len(vocabulary)))
    bias = "blk.0.attn_q.bias" in tensors
    return {
        **found,
        "model_type": MODEL_TYPES[architecture],
        "vocab_size": embedding[1],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": bias,
        "n_embd": found.get("hidden_size"),
        "n_positions": found.get("max_position_embeddings"),
    }


def _as_transformers_reads(path: Path, architecture: str) -> Mapping[str, Any]:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        return load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    except (ValueError, LookupError, ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(". ")
        raise ConfigError(
            f"{path.name}: transformers makes no model of the GGUF architecture {architecture!r} ({reason}). Use the "
            "model's Hugging Face folder."
        ) from None
