"""By their files, two models have one vocabulary or two; where the files do not say, nobody guesses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qswitch.config import StudentSection, TeacherSection
from qswitch.plan.vocabulary import have_one_vocabulary


def model(folder: Path, vocabulary: Any, added: list[tuple[int, str]] | None = None, indent: int | None = None) -> str:
    """A folder with config.json and, unless `vocabulary` is None, a tokenizer.json."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if vocabulary is not None:
        tokens = [{"id": i, "content": token, "special": token.startswith("<")} for i, token in added or []]
        text = json.dumps({"model": {"vocab": vocabulary}, "added_tokens": tokens}, indent=indent)
        (folder / "tokenizer.json").write_text(text)
    return str(folder)


BPE = {"a": 0, "b": 1, "ab": 2}


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        ((BPE,), (BPE,), True),
        ((BPE,), (BPE, None, 1), True),
        ((BPE, [(3, "<end>")]), (BPE, [(3, "<end>")], 2), True),
        ((BPE,), ({"b": 0, "a": 1, "ab": 2},), False),
        ((BPE,), (BPE, [(3, "<end>")]), False),
        ((BPE, [(3, "<end>"), (4, "<unused0>")]), (BPE, [(3, "<unused0>"), (4, "<unused1>")]), True),
        ((BPE, [(3, "<end>")]), (BPE, [(3, "<stop>")]), False),
        ((BPE, [(3, "end")]), (BPE, [(3, "unused0")]), False),
        ((BPE, [(3, "<|image_placeholder|>")]), (BPE, [(3, "<think>")]), False),
        ((BPE, [(3, "<|placeholder1|>")]), (BPE, [(3, "<think>")]), True),
        ((BPE, [(3, "<UNUSED_TOKEN_7>")]), (BPE, [(3, "<think>")]), True),
        (([["a", -1.0], ["b", -2.0]],), ([["a", -3.0], ["b", -2.5]],), True),
        (([["a", -1.0], ["b", -2.0]],), (BPE,), False),
        ((BPE,), (None,), None),
        ((BPE,), ({},), None),
    ],
)
def test_vocabularies_are_compared_token_by_token(tmp_path, teacher, student, expected):
    pair = (
        TeacherSection(model=model(tmp_path / "teacher", *teacher)),
        StudentSection(model=model(tmp_path / "student", *student)),
    )
    assert have_one_vocabulary(*pair) is expected


def test_what_is_not_here_is_not_known_and_one_model_is_itself(tmp_path):
    assert have_one_vocabulary(TeacherSection(model="owner/one"), StudentSection(model="owner/other")) is None
    assert have_one_vocabulary(TeacherSection(model="owner/one"), StudentSection(model="owner/one")) is True


def test_a_gguf_file_is_compared_by_most_of_its_rows(tmp_path):
    from tests.plan.test_gguf_header import write

    write(tmp_path / "model.gguf")
    same = {f"token {i} \u00e9": i for i in range(500)}  # the file has rows beyond the vocabulary
    teacher = TeacherSection(model=str(tmp_path / "model.gguf"))
    assert have_one_vocabulary(teacher, StudentSection(model=model(tmp_path / "same", same))) is True
    other = {f"other {i}": i for i in range(500)}
    assert have_one_vocabulary(teacher, StudentSection(model=model(tmp_path / "other", other))) is False
