"""`make lint` looks at every Python file and notebook that git has: ruff too leaves out what .gitignore names."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUFF = shutil.which("ruff", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def said_by(*command: str) -> set[Path]:
    """The files that a command lists, one a line."""
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {ROOT / line for line in ended.stdout.splitlines()}


@pytest.mark.skipif(RUFF is None, reason="ruff is not installed")
@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="not a git checkout")
def test_make_lint_checks_every_file_that_git_has():
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert recipe is not None
    checks = re.findall(r"\$\(BIN\)/ruff (check|format --check) (.*)", recipe[1])
    assert [kind for kind, _ in checks] == ["check", "format --check"]
    tracked = {path for path in said_by("git", "ls-files", "*.py", "*.ipynb") if path.is_file()}
    assert len(tracked) > 300
    for kind, what in checks:
        seen = said_by(str(RUFF), "check", "--show-files", *shlex.split(what))
        assert sorted(map(str, tracked - seen)) == [], f"ruff {kind} does not see them"
