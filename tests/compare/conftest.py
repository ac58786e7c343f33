"""What the tests of `qswitch compare` share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qswitch.compare.cells import compare
from tests.compare.comparisons import Launcher, write_comparison


@pytest.fixture(scope="package")
def finished(tmp_path_factory) -> tuple[Path, Path, dict[str, Any]]:
    """(file, output folder, results) of a comparison that is finished: tests go on from a copy of its output."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_comparison(folder)
    return path, folder / "out", compare(path, folder / "out", launch=Launcher(), say=lambda _: None)
