"""What an evaluation leaves on disk, so that an interrupted one goes on: one line per response, one per measurement.

    DIR/eval.json                  what is measured; a later call must say the same
    DIR/sets/SET.json                     which records are asked, the lengths of their references, how many were left
                                          out, and how many of them each model was trained on
    DIR/teacher/SET.jsonl                 the teacher's responses
    DIR/models/MODEL/SET.jsonl            responses of a model, one line per record and seed
    DIR/models/MODEL/SET.teacher.jsonl    its distance from the teacher, one line per record
    DIR/models/MODEL/SET.own.jsonl        a response of the model to every record at temperature 1, with its token ids
    DIR/models/MODEL/SET.own.teacher.jsonl    how far the teacher is from those responses, by position
    DIR/models/MODEL/lm_eval.scores.jsonl    its scores of lm-evaluation-harness
    DIR/results.json, results.md          scores of the last call

Cold: knows no model and no score.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qswitch.aside import append_text
from qswitch.errors import FileError, RunDirError
from qswitch.outside import read_json
from qswitch.run_dir import holds_something, make_folder, read_lines, write_atomically
from qswitch.state_files import DistanceLine, EvalFile, HarnessLine, OwnDistanceLine, ResponseLine, SetFile


class EvaluationDir:
    """The folder of one evaluation."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path, settings: Mapping[str, Any]) -> EvaluationDir:
        """Start the folder, or go on with one that measures the same.

        Raises:
            RunDirError: the folder holds something else, or an evaluation with other settings.
        """
        saved = path / "eval.json"
        if saved.is_file():
            before: dict[str, Any] = dict(read_json(saved, EvalFile))
            here = json.loads(json.dumps(settings))
            changed = sorted(k for k in before.keys() | here.keys() if before.get(k) != here.get(k))
            if changed:
                shown = "; ".join(f"{k} was {before.get(k)}, is {here.get(k)}" for k in changed[:3])
                raise RunDirError(f"{path} holds an evaluation with other settings ({shown}). "
                                  "Choose another --output-dir, or delete that folder.")  # fmt: skip
        else:
            if holds_something(path):
                raise RunDirError(f"{path} is not empty and holds no evaluation. Choose another --output-dir.")
            make_folder(path)
            write_atomically(saved, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        return cls(path)

    def responses(self, model: str, set_name: str, fingerprint: str) -> Lines:
        """The responses of a model to a set; forgotten when its weights changed."""
        return Lines(self._folder(f"models/{model}", fingerprint) / f"{set_name}.jsonl", ("id", "seed"), ResponseLine)

    def distances(self, model: str, set_name: str, fingerprint: str, teacher_fingerprint: str) -> Lines:
        """The distances of a model from the teacher on a set; forgotten when the weights of either changed."""
        return self._measured(model, set_name, fingerprint, teacher_fingerprint, DistanceLine)

    def own_responses(self, model: str, set_name: str, fingerprint: str) -> Lines:
        """A model's responses that the teacher reads, to measure the distance; forgotten when its weights changed."""
        return Lines(self._folder(f"models/{model}", fingerprint) / f"{set_name}.own.jsonl", ("id",), ResponseLine)

    def own_distances(self, model: str, set_name: str, fingerprint: str, teacher_fingerprint: str) -> Lines:
        """The teacher's distances from a model's own responses; forgotten when the weights of either changed."""
        return self._measured(model, f"{set_name}.own", fingerprint, teacher_fingerprint, OwnDistanceLine)

    def harness_scores(self, model: str, fingerprint: str) -> Lines:
        """What lm-evaluation-harness found of a model, one line per list of tasks and limit."""
        folder = self._folder(f"models/{model}", fingerprint)
        return Lines(folder / "lm_eval.scores.jsonl", ("tasks", "limit"), HarnessLine)

    def teacher_responses(self, set_name: str, fingerprint: str) -> Lines:
        """The teacher's own responses to a set."""
        return Lines(self._folder("teacher", fingerprint) / f"{set_name}.jsonl", ("id",), ResponseLine)

    def is_complete(self, model: str) -> bool:
        """Whether every response and distance of a model is there, and is from the teacher's present responses."""
        saved, sets = self.path / "eval.json", sorted((self.path / "sets").glob("*.json"))
        if not saved.is_file() or not sets:
            return False
        seeds = read_json(saved, EvalFile)["protocol"]["seeds"]
        folder, teacher = self.path / "models" / model, self.path / "teacher" / "weights.txt"
        if teacher.is_file() and _text(folder / "teacher.txt") != _text(teacher):
            return False
        for path in sets:
            ids = read_json(path, SetFile)["ids"]
            responses = Lines(folder / f"{path.stem}.jsonl", ("id", "seed"), ResponseLine)
            distances = Lines(folder / f"{path.stem}.teacher.jsonl", ("id",), DistanceLine)
            if any((i, seed) not in responses for i in ids for seed in seeds):
                return False
            own_distances = Lines(folder / f"{path.stem}.own.teacher.jsonl", ("id",), OwnDistanceLine)
            if teacher.is_file() and any((i,) not in found for i in ids for found in (distances, own_distances)):
                return False
        return True

    def write_set(self, set_name: str, content: Mapping[str, Any], overlaps: Mapping[str, int | None]) -> None:
        """sets/SET.json: `content`, and how many of the records each model was trained on.

        Models of earlier calls, which this one does not look at, keep their number.
        """
        path = self.path / "sets" / f"{set_name}.json"
        path.parent.mkdir(exist_ok=True)
        try:
            known = read_json(path, SetFile).get("overlaps_with_training", {}) if path.is_file() else {}
        except FileError:  # a damaged one is written anew, as lines are
            known = {}
        whole = {**content, "overlaps_with_training": {**known, **overlaps}}
        write_atomically(path, json.dumps(whole) + "\n")

    def write(self, results: Mapping[str, Any], table: str) -> None:
        """results.json and results.md."""
        write_atomically(self.path / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        write_atomically(self.path / "results.md", table)

    def _measured(self, model: str, name: str, fingerprint: str, teacher_fingerprint: str, kind: type[Any]) -> Lines:
        folder = self._folder(f"models/{model}", fingerprint)
        self._mark(folder / "teacher.txt", teacher_fingerprint, "*.teacher.jsonl")
        return Lines(folder / f"{name}.teacher.jsonl", ("id",), kind)

    def _folder(self, name: str, fingerprint: str) -> Path:
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=True)
        self._mark(folder / "weights.txt", fingerprint, "*.jsonl")
        return folder

    @staticmethod
    def _mark(mark: Path, fingerprint: str, files: str) -> None:
        """Say in `mark` whose weights the files are from; delete those of others."""
        if _text(mark) == fingerprint:
            return
        for old in mark.parent.glob(files):
            old.unlink()
        write_atomically(mark, fingerprint + "\n")


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None


class Lines:
    """A file of JSON lines of one kind with a key each; what a crash cut off, or a fault damaged, is written again."""

    def __init__(self, path: Path, key: tuple[str, ...], kind: type[Any]) -> None:
        self.path, self._key = path, key
        self.rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        if path.exists():
            lines = read_lines(path, kind)
            self.rows = {self._of(row): row for row in lines}
            *whole, unfinished = path.read_bytes().split(b"\n")
            if unfinished or len(whole) > len(lines):
                write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self.rows

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows and flush them to disk."""
        rows = [dict(row) for row in rows]
        append_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), sync=True)
        self.rows |= {self._of(row): row for row in rows}

    def _of(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in self._key)
