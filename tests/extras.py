"""Packages that only an extra of pyproject.toml installs; tests that need one are skipped where it is missing."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest


def extra(module: str) -> Any:
    """The module of an optional package; with QSWITCH_EXTRAS=required, as in `make extras`, no test is left out."""
    if os.environ.get("QSWITCH_EXTRAS") == "required":
        return importlib.import_module(module)
    return pytest.importorskip(module)
