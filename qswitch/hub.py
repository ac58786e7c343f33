"""What a reference to a model on the hub looks like, and where its files lie once they are here. Cold."""

from __future__ import annotations

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
