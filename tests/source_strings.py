"""What a module of ours can say: its strings, for tests that compare them with the documentation."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def strings_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string, docstrings included, with {} for each value in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
