"""Which files a model reference means: a folder, a GGUF file, one inside a Python package, or a repository on the hub.

Every reference ends as a hub id or a plain Hugging Face folder, so there is one loading path. Reads no weights, but for
GGUF files (`gguf_cache.py`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from qswitch.config import ModelReference
from qswitch.errors import ModelError
from qswitch.hub import HUB_ID, hub_problem, package_file
from qswitch.models.gguf_cache import materialise_gguf, why_unreadable
from qswitch.models.messages import explained, quiet, say_once
from qswitch.outside import user_path


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A reference turned into something `from_pretrained` reads."""

    path: str
    """Folder, or hub id."""
    revision: str | None
    """Of a hub id; None for folders."""
    name: str
    """For people."""


def model_file(model: ResolvedModel, name: str, without: str) -> Path | None:
    """One small file of a model that not every model has; None where it has none, or, which is said, where nobody can
    tell. `without` says what follows from that.

    Raises:
        ModelError: it cannot be downloaded.
    """
    folder = Path(model.path)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    with quiet(), explained(model.name, "model", model.revision):
        known = huggingface_hub.try_to_load_from_cache(model.path, name, revision=model.revision)
        if known is not None:  # the cache has it, or has noted that this commit has none
            return Path(known) if isinstance(known, str) else None
        try:
            return Path(huggingface_hub.hf_hub_download(model.path, name, revision=model.revision))
        except (LocalEntryNotFoundError, RepositoryNotFoundError):  # not asked; gated or private, and no token now
            say_once(
                f"{model.name}: {name} is not in the local Hugging Face cache, and the hub does not give it. If the "
                f"model has one, download it: {without}."
            )
            return None
        except EntryNotFoundError:
            return None


def sentencepiece_files(model: ResolvedModel) -> list[Path]:
    """tokenizer.model of a model, where it has one: converters to GGUF read it, and transformers does not save it."""
    path = model_file(model, "tokenizer.model", "without it the model cannot be written as a right GGUF file")
    return [] if path is None else [path]


class _UnavailableError(Exception):
    """Why one candidate cannot be had, and the remedy."""


def resolve_reference(reference: ModelReference, revision: str | None = None) -> ResolvedModel:
    """The first available model of a reference: a folder, a GGUF file, `package:module/file.gguf`, or a hub id.

    Raises:
        ModelError: none is available; lists each with its reason and remedy.
    """
    candidates = [reference] if isinstance(reference, str) else list(reference)
    if not candidates:
        raise ModelError("The model reference is an empty list. Give a hub id, a folder or package:module/file.gguf.")
    reasons = []
    for candidate in candidates:
        try:
            resolved = _resolve_one(candidate, revision)
        except _UnavailableError as error:
            reasons.append(f"{candidate}: {error}")
            continue
        if len(candidates) > 1:
            skipped = f" (not available: {'; '.join(reasons)})" if reasons else ""
            say_once(f"Using the model {candidate}{skipped}", level=logging.INFO)
        return resolved
    if len(reasons) == 1:
        raise ModelError(f"Model not available. {reasons[0]}")
    raise ModelError("None of the models is available:\n" + "\n".join(f"  - {reason}" for reason in reasons))


def _resolve_one(reference: str, revision: str | None) -> ResolvedModel:
    if reference.startswith("package:"):
        try:
            return _from_file(package_file(reference))
        except LookupError as error:
            raise _UnavailableError(error.args[0]) from None
    path = user_path(reference)
    if path.is_file():
        return _from_file(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise _UnavailableError("the folder has no config.json; it must be a Hugging Face model folder")
        return ResolvedModel(str(path), None, path.resolve().name)
    if not HUB_ID.fullmatch(reference):
        raise _UnavailableError("no such folder or file, and no hub id (owner/name) either")
    return _hub(reference, revision)


def _from_file(path: Path) -> ResolvedModel:
    if path.is_dir():
        return ResolvedModel(str(path), None, path.name)
    if path.suffix != ".gguf":
        raise _UnavailableError("a single file must be a .gguf; otherwise give the folder that holds config.json")
    if (problem := why_unreadable(path)) is not None:
        raise _UnavailableError(problem)
    return ResolvedModel(str(materialise_gguf(path)), None, path.stem)


def _hub(reference: str, revision: str | None) -> ResolvedModel:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        huggingface_hub.utils.validate_repo_id(reference)
    except errors.HFValidationError:
        raise _UnavailableError("no such folder or file, and no hub id (owner/name) either") from None
    found = ResolvedModel(reference, revision, reference)
    if isinstance(huggingface_hub.try_to_load_from_cache(reference, "config.json", revision=revision), str):
        return found
    problem = hub_problem(reference, revision)
    if problem is not None:
        raise _UnavailableError(f"not in the local Hugging Face cache, and {problem}")
    return found
