"""Damage to one bit of a folder with a manifest is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qswitch.manifest import find_damage, read_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "weights").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "state").write_text("step 4")
    write_manifest(tmp_path, format=2, step=4)
    return tmp_path


def test_a_manifest_finds_every_damage(folder: Path):
    assert find_damage(folder) is None
    assert read_manifest(folder)["step"] == 4 and set(read_manifest(folder)["files"]) == {"deep/weights", "state"}
    weights = folder / "deep" / "weights"
    sound = weights.read_bytes()
    for position in (0, 1000, len(sound) - 1):
        weights.write_bytes(sound[:position] + bytes([sound[position] ^ 4]) + sound[position + 1 :])
        assert "SHA-256 of deep/weights" in find_damage(folder)
    weights.write_bytes(sound[:-1])
    assert find_damage(folder) == "deep/weights has 2,047 bytes, 2,048 were written"
    weights.unlink()
    assert "deep/weights cannot be read (No such file" in find_damage(folder)
    weights.write_bytes(sound)
    assert find_damage(folder) is None
    manifest = folder / "manifest.json"
    for text in ("", "[]", '{"files": 3}', "{"):
        manifest.write_text(text)
        assert "no manifest.json that can be read" in find_damage(folder)
    for entry in ({}, None, {"bytes": 6}):
        manifest.write_text(json.dumps({"files": {"state": entry}}))
        assert "no manifest.json that can be read" in find_damage(folder)
