"""What `pip install` gives: the wheel holds every file of the package, whatever .gitignore says about their names, and
so does the source archive, from which the published wheel is built."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).resolve().parents[1]
NOT_PACKED = {"benchmarks/study/data"}
"""Data sets fetched for a study, which are not ours to hand on."""


def files_under(folder: str) -> set[str]:
    """What lies there, by its path from the root; not by asking git, which leaves out what .gitignore names too."""
    found = (p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.is_file())
    names = {p.as_posix() for p in found if "__pycache__" not in p.parts}
    return {name for name in names if not name.startswith(tuple(f"{kept}/" for kept in NOT_PACKED))}


def in_wheel(root: Path) -> set[str]:
    return {file.distribution_path for file in WheelBuilder(str(root)).recurse_included_files()}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, built and unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    (archive,) = SdistBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (root,) = (path for path in folder.iterdir() if path.is_dir())
    return root


def test_the_wheel_holds_every_file_of_the_package_and_every_preset():
    # hatchling leaves out what .gitignore names: its pattern `compare/` once took the folder qswitch/compare along.
    packed = in_wheel(ROOT)
    here = files_under("qswitch") | {f"qswitch/{path}" for path in files_under("presets")}
    assert len(here) > 200 and sorted(here - packed) == []
    assert sorted(packed - here) == [], "and nothing else"


def test_the_wheel_of_the_source_archive_is_that_of_the_checkout(unpacked):
    assert in_wheel(unpacked) == in_wheel(ROOT)


def test_the_source_archive_holds_what_its_tests_read(unpacked):
    packed = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()} - {"PKG-INFO"}
    folders = {name.partition("/")[0] for name in packed if "/" in name}
    assert {"qswitch", "presets", "tests", "docs", "benchmarks", "notebooks"} <= folders
    here = set().union(*map(files_under, folders)) | {name for name in packed if "/" not in name}
    assert sorted(here - packed) == []
    assert sorted(packed - here) == []
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: whether it holds all of one is not seen here")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert sorted({name for name in listed.stdout.splitlines() if (ROOT / name).is_file()} - packed) == []


def test_every_folder_of_modules_is_a_package():
    # One without __init__.py can be imported, but no tool that walks packages finds it.
    folders = {p.parent for p in (ROOT / "qswitch").rglob("*.py")}
    assert len(folders) > 5
    assert sorted(str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").is_file()) == []
