"""What a user hears of loading: transformers kept quiet, its errors turned into one message with the remedy."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Iterator

from safetensors import SafetensorError

from qswitch.errors import ModelError, causes, is_out_of_memory, storage_problem
from qswitch.hub import TOKEN_REMEDY, hub_problem, is_hub_id

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
def reported() -> Iterator[None]:
    """Raise what stopped a load where transformers' error only refers to its report, which `quiet` keeps back.

    It catches whatever fails while a weight is converted or quantised, memory that runs out too, and goes on to the
    end of the model.
    """
    log, reports = logging.getLogger("transformers.modeling_utils"), []
    level = log.level

    def keep(record: logging.LogRecord) -> bool:
        reports.append(record.getMessage())
        return record.levelno >= logging.ERROR

    log.addFilter(keep)
    log.setLevel(logging.WARNING)
    try:
        yield
    except RuntimeError as error:
        found = _FAILURE.search("\n".join(reports)) if "above report" in str(error) else None
        if found is None:
            raise
        raise RuntimeError(found[1]) from error
    finally:
        log.removeFilter(keep)
        log.setLevel(level)


_FAILURE = re.compile(r"^[\w.]*(?:Error|Exception): (.*)$", re.MULTILINE)
"""The last line of a traceback."""


@contextlib.contextmanager
def saying(what: str, every_s: float) -> Iterator[None]:
    """Every so many seconds a line with the time that a block has taken; nobody knows how much is left."""
    done, started = threading.Event(), time.monotonic()

    def say() -> None:
        while not done.wait(every_s):
            logger.warning("%s, %.0f s", what, time.monotonic() - started)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def explained(name: str, what: str, revision: str | None = None) -> Iterator[None]:
    """Turn what is raised for a user's mistake, a disk or a lost connection into a ModelError with the remedy.

    `revision` is that of a hub id.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        if is_out_of_memory(error):  # the caller's business
            raise
        remedy = _outside_remedy(error, name, what, revision)
        if remedy is None and isinstance(error, _OF_MODELS):
            remedy = _model_remedy(error, what)
        if remedy is None:
            raise
        raise ModelError(f"The {what} {name} cannot be loaded: {remedy}") from error


_OF_MODELS = (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError)
"""What transformers raises of a model or tokenizer that it cannot read."""
_OF_CONNECTIONS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
"""Packages whose errors huggingface_hub, in one version or another, lets through when a connection fails."""
_NO_WEIGHTS = "does not appear to have a file named model.safetensors"
"""transformers' words for a repository without weights that it could read."""
_NOT_HAD = {
    "model": ("does not appear to have", "couldn't find them in the cache", "can't load the model for"),
    "tokenizer": ("couldn't instantiate the backend tokenizer", "can't load tokenizer for"),
}
"""What it says where it was not given the files, also where it could not ask which of them the repository has."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
"""With one of these here, what a tokenizer lacks is a library that reads it."""
_KEPT = "What was downloaded is kept."


def _outside_remedy(error: Exception, name: str, what: str, revision: str | None) -> str | None:
    """The remedy where it is not the model that is at fault, but connection, hub, disk or memory; else None."""
    chain = list(causes(error, shown=True))
    lower = str(error).lower()
    statuses = [status for one in chain if (status := _hub_status(one)) is not None]
    if any(status in (401, 403) for status in statuses) or "gated repo" in lower:
        return f"it is gated or private: accept its licence at https://huggingface.co/{name}, then {TOKEN_REMEDY}."
    refused = next((status for status in statuses if status == 429 or status >= 500), None)
    if refused is not None:
        return f"the hub answered with status {refused}. Run it again later. {_KEPT}"
    broken = next((one for one in chain if _of_connection(one)), None)
    if broken is not None:
        return f"the connection to the hub failed ({first_line(broken)}). Run it again when it is back. {_KEPT}"
    problem = storage_problem(error)
    if problem is not None:
        return problem
    if "cannot allocate memory" in lower:  # mmap's words; safetensors maps a file as a whole
        return (
            f"the system gave it no host memory ({first_line(error)}). Close other programs, or allow more: with "
            "`memory=` in .wslconfig under WSL, with swap, or without `ulimit -v`."
        )
    if _is_not_had(lower, name, what, revision):
        problem = hub_problem(name, revision)
        if problem is not None:
            lacking = "weights" if what == "model" else "files"
            return f"its {lacking} are not all in the local Hugging Face cache, and {problem}. {_KEPT}"
    return None


def _is_not_had(text: str, name: str, what: str, revision: str | None) -> bool:
    """Whether an error's text, in lower case, says that files of a hub model are not here."""
    if not is_hub_id(name) or not any(words in text for words in _NOT_HAD[what]):
        return False
    import huggingface_hub

    files = _TOKENIZER_FILES if what == "tokenizer" else ()
    found = [huggingface_hub.try_to_load_from_cache(name, file, revision=revision) for file in files]
    return not any(isinstance(file, str) for file in found)


def _model_remedy(error: Exception, what: str) -> str:
    lower = str(error).lower()
    if "trust_remote_code" in lower:
        return "it needs Python code of its own. Read that code, then set trust_remote_code=true for this model."
    if what == "model" and _NO_WEIGHTS in lower:
        return "it has no safetensors weights, and qswitch reads no pickle. Convert it, or use another revision."
    if isinstance(error, SafetensorError):
        return f"a file of its weights is damaged ({first_line(error)}). Delete that file and download it again."
    if error.__cause__ is not None and "can't load the model for" in lower:
        return first_line(error.__cause__)  # all that transformers adds is advice about folders of the same name
    if "unrecognized configuration class" in lower:
        return "it is no decoder-only language model that transformers knows."
    if "unrecognized model" in lower or "does not recognize this architecture" in lower:
        return "this transformers version does not know its architecture; check config.json, or upgrade."
    if what == "tokenizer":
        return (
            f"{first_line(error)}. Put the tokenizer.json and tokenizer_config.json of the model it was made from "
            "beside its weights, or name a model that has them."
        )
    return first_line(error)


def _hub_status(error: BaseException) -> int | None:
    """The status with which the hub answered, of an error that says so."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _of_connection(error: BaseException) -> bool:
    """Whether no answer came, or came in part; the errors of these packages are no OSErrors."""
    if _hub_status(error) is not None:
        return False
    kinds = type(error).__mro__
    return any(k.__module__.partition(".")[0] in _OF_CONNECTIONS or k.__name__ == "XetDownloadError" for k in kinds)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with its type where the message is bare."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else error!r}"[:400]
