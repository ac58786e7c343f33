"""What `pip install` gives: the wheel holds every file of the package, whatever .gitignore says about their names."""

from __future__ import annotations

from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).resolve().parents[1]


def files_under(folder: str) -> set[str]:
    found = (p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.is_file())
    return {p.as_posix() for p in found if "__pycache__" not in p.parts}


def test_the_wheel_holds_every_file_of_the_package_and_every_preset():
    # hatchling leaves out what .gitignore names: its pattern `compare/` once took the folder qswitch/compare along.
    packed = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    here = files_under("qswitch") | {f"qswitch/{path}" for path in files_under("presets")}
    assert len(here) > 200 and sorted(here - packed) == []
    assert sorted(packed - here) == [], "and nothing else"


def test_every_folder_of_modules_is_a_package():
    # One without __init__.py can be imported, but no tool that walks packages finds it.
    folders = {p.parent for p in (ROOT / "qswitch").rglob("*.py")}
    assert len(folders) > 5
    assert sorted(str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").is_file()) == []
