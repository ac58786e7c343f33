"""Which versions a result was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("qswitch", "torch", "transformers", "peft", "bitsandbytes", "rouge-score", "scipy")


def versions() -> dict[str, str]:
    """Package -> version, of those that are installed, and Python's."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a source checkout that was not installed
            continue
    return found
