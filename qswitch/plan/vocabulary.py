"""Whether two models have one vocabulary, by the files that are at hand; what that means for a run. Cold.

A first answer, for plans and dry runs: it compares vocabularies and nothing else of the tokenizers, and of a GGUF file,
whose rows beyond the vocabulary have names too, only whether most rows agree. A run compares the tokenizers themselves
before it loads a weight (`models/vocab.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from functools import lru_cache
from pathlib import Path
from typing import Any

from qswitch import rules
from qswitch.config import RunConfig, StudentSection, TeacherSection, as_text, reader
from qswitch.errors import ConfigError, FileError
from qswitch.outside import read_bytes, read_json
from qswitch.plan.gguf_header import tokens_of_gguf
from qswitch.plan.model_files import folder_at_hand, gguf_at_hand

SAME_SHARE = 0.5
"""Of the rows that both have: with fewer that mean the same, two vocabularies are strangers."""


HELD_IN_RESERVE = re.compile(r"\W*(reserved|unused|placeholder|dummy)(_special)?(_token)?_?\d+\W*", re.IGNORECASE)
"""The whole name of a special token that a model's makers keep for later: Llama's <|reserved_special_token_0|>, Gemma's
<unused0>, Phi's <|placeholder1|>. Those are numbered; <|image_placeholder|> is one in use."""


def renamed_ids(teacher: Mapping[int, str], student: Mapping[int, str], special: Set[int]) -> list[int] | None:
    """Ids with a name of their own in one of two vocabularies, by id, where the other holds them in reserve; None where
    another id means something else.

    Models see ids alone. Llama 3.1 named three special tokens of Llama 3.0 and counted the reserved ones anew, so that
    248 names differ between two vocabularies in which every text of a user has the same ids.
    """
    if teacher.keys() != student.keys():
        return None
    different = sorted(i for i, token in teacher.items() if token != student[i])
    kept = (i in special and any(map(HELD_IN_RESERVE.fullmatch, (teacher[i], student[i]))) for i in different)
    return different if all(kept) else None


def with_tokenizer(config: RunConfig) -> RunConfig:
    """The configuration with student.tokenizer=auto turned into `own`, where the files say that it is another one.

    Where they say nothing, or that there is one vocabulary, it stays as it is.

    Raises:
        ConfigError: there are two vocabularies, and the method mixes tokens of both models.
    """
    if config.student.tokenizer != "auto" or have_one_vocabulary(config.teacher, config.student) is not False:
        return config
    if not rules.may_pass_text(reader(config)):
        raise ConfigError(
            f"Teacher and student have different vocabularies, by their files, and method={config.method} needs one "
            f"for both. {rules.OTHER_TOKENIZER_REMEDY}"
        )
    return as_text(config)


def have_one_vocabulary(teacher: TeacherSection, student: StudentSection) -> bool | None:
    """Whether the ids of both models mean the same; None where the files of one are not here or do not tell."""
    if (teacher.model, teacher.revision) == (student.model, student.revision):
        return True
    mine, other = _tokenizer_file(teacher), _tokenizer_file(student)
    if mine is None or other is None:
        return None
    try:
        if mine == other or _same_bytes(mine, other):
            return True
        (first, special), (second, other_special) = _tokens(mine), _tokens(other)
    except (FileError, ConfigError):
        return None
    if not first or not second:
        return None
    if ".gguf" not in (mine.suffix, other.suffix):
        return renamed_ids(first, second, special & other_special) is not None
    shared = first.keys() & second.keys()
    return sum(first[i] == second[i] for i in shared) >= SAME_SHARE * len(shared)


def _tokenizer_file(section: TeacherSection | StudentSection) -> Path | None:
    """tokenizer.json of the model, or its GGUF file; None where neither is here."""
    if (file := gguf_at_hand(section)) is not None:
        return file
    folder = folder_at_hand(section)
    path = None if folder is None else folder / "tokenizer.json"
    return path if path is not None and path.is_file() else None


def _same_bytes(first: Path, second: Path) -> bool:
    if first.suffix == ".gguf" or second.suffix == ".gguf" or first.stat().st_size != second.stat().st_size:
        return False
    return read_bytes(first) == read_bytes(second)


def _tokens(path: Path) -> tuple[dict[int, str], frozenset[int]]:
    """Token of every id, empty where the file lists none; and the ids of special ones, none of a GGUF file."""
    stat = path.stat()
    return _tokens_of_version(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4)
def _tokens_of_version(path: Path, _size: int, _modified_ns: int) -> tuple[dict[int, str], frozenset[int]]:
    if path.suffix == ".gguf":
        return dict(enumerate(tokens_of_gguf(path))), frozenset()
    values = read_json(path, dict[str, Any])
    model = values.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    found: dict[int, str] = {}
    if isinstance(vocabulary, dict):
        found = {int(i): token for token, i in vocabulary.items()}
    elif isinstance(vocabulary, list):  # Unigram: [token, score] by id
        found = {i: str(entry[0]) for i, entry in enumerate(vocabulary)}
    special = set()
    for added in values.get("added_tokens") or ():
        found[int(added["id"])] = str(added["content"])
        if added.get("special"):
            special.add(int(added["id"]))
    return found, frozenset(special)
