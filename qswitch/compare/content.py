"""Whether the files that a cell learns from hold what they held when it began: a mark of each. Cold.

Models and data of the hub have no mark; they are known by name and revision, which are settings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qswitch.config import RunConfig, StudentSection, TeacherSection
from qswitch.data.sources import local_files
from qswitch.errors import ConfigError, DataError
from qswitch.evaluate.marks import files_fingerprint, folder_fingerprint
from qswitch.hub import hub_cache
from qswitch.manifest import entry_of
from qswitch.outside import user_path
from qswitch.plan.adapters import find_adapter
from qswitch.plan.model_files import folder_at_hand, gguf_at_hand

CONTENT = "content of "
"""Before the setting whose files a mark is of, where marks stand beside settings."""


def content_marks(config: RunConfig) -> dict[str, str]:
    """`content of SETTING` -> hash of the files behind it, of those that are here."""
    return {f"{CONTENT}{setting}": mark for setting, mark in _marks(config)}


def marks_of_cells(configs: Mapping[str, RunConfig]) -> dict[str, dict[str, str]]:
    """`content_marks` of each; cells that name the same files have them read once."""
    known: dict[str, dict[str, str]] = {}
    marks = {}
    for label, config in configs.items():
        named = config.model_dump_json(include={"data", "student", "teacher"})
        if named not in known:
            known[named] = content_marks(config)
        marks[label] = known[named]
    return marks


def changed_content(saved: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """The marks of `now` that were others when `saved` was written; what has no mark in one of both does not count."""
    return sorted(key for key, mark in now.items() if saved.get(key, mark) != mark)


def _marks(config: RunConfig) -> Iterator[tuple[str, str]]:
    data = config.data
    for name, reference, split, is_text in (
        ("train", data.train, data.split, False),
        ("validation", data.validation, data.validation_split or data.split, False),
        ("lm_corpus", data.lm_corpus, data.split, True),
    ):
        if reference is not None and (mark := _data_mark(reference, split, is_text)) is not None:
            yield f"data.{name}", mark
    template = user_path(data.template)
    if template.is_file():
        yield "data.template", entry_of(template)["sha256"]
    for role, section in (("student", config.student), ("teacher", config.teacher)):
        if (mark := _model_mark(section)) is not None:
            yield f"{role}.model", mark
    for setting, adapter in (
        ("student.init_adapter", config.student.init_adapter),
        ("teacher.adapter", config.teacher.adapter),
    ):
        if adapter is not None:
            try:
                yield setting, folder_fingerprint(find_adapter(adapter, setting))
            except ConfigError:
                continue  # gone since, or not there yet: whoever needs it says so
    store = config.teacher.responses
    if store is not None and (folder := user_path(store)).is_dir():
        yield "teacher.responses", files_fingerprint(sorted(filter(Path.is_file, folder.rglob("*"))))


def _data_mark(reference: str | list[str], split: str, is_text: bool) -> str | None:
    """Of all bytes: a few mended records are other data. None where a file is gone, or all of it lies on the hub."""
    digest, found = hashlib.sha256(), False
    for one in [reference] if isinstance(reference, str) else reference:
        try:
            files = local_files(one, split, text_files=is_text)
        except DataError:
            return None
        for file in files or ():
            digest.update(entry_of(file)["sha256"].encode())
            found = True
    return digest.hexdigest() if found else None


def _model_mark(section: TeacherSection | StudentSection) -> str | None:
    if (file := gguf_at_hand(section)) is not None:
        return files_fingerprint([file])
    folder = folder_at_hand(section)
    return None if folder is None or folder.is_relative_to(hub_cache()) else folder_fingerprint(folder)
