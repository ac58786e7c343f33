"""What a user hears of loading: transformers kept quiet, its errors turned into one message with the remedy."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from safetensors import SafetensorError

from qswitch.errors import ModelError

logger = logging.getLogger(__name__)

_said: set[str] = set()


def say_once(message: str, level: int = logging.WARNING) -> None:
    """Log a message the first time it comes up in this process."""
    if message not in _said:
        _said.add(message)
        logger.log(level, message)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no loading reports from transformers; problems are raised by us instead."""
    from transformers.utils import logging as hf_logging

    bars, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


@contextlib.contextmanager
def explained(name: str, what: str) -> Iterator[None]:
    """Turn what transformers raises for a user's mistake into a ModelError with the remedy."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        text = str(error)
        lower = text.lower()
        if type(error).__name__ == "OutOfMemoryError":  # torch's; the trainer's business
            raise
        if "gated" in lower or "401" in lower or "403" in lower:
            remedy = f"it is gated: accept its licence at https://huggingface.co/{name} and set HF_TOKEN."
        elif "trust_remote_code" in lower:
            remedy = "it needs Python code of its own. Read that code, then set trust_remote_code=true for this model."
        elif "safetensors" in lower:
            remedy = "it has no safetensors weights, and qswitch reads no pickle. Convert it, or use another revision."
        elif "unrecognized configuration class" in lower:
            remedy = "it is no decoder-only language model that transformers knows."
        elif "unrecognized model" in lower or "does not recognize this architecture" in lower:
            remedy = "this transformers version does not know its architecture; check config.json, or upgrade."
        elif what == "tokenizer":
            remedy = (
                f"{first_line(error)}. Put the tokenizer.json and tokenizer_config.json of the model it was made from "
                "beside its weights, or name a model that has them."
            )
        else:
            remedy = first_line(error)
        raise ModelError(f"The {what} {name} cannot be loaded: {remedy}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with its type where the message is bare."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else error!r}"[:400]
