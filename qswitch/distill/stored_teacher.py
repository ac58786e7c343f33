"""A teacher that worked earlier: its responses and outputs on disk, written once by `qswitch teach`, read by runs.

A store is a folder: `config.yaml` with the settings it was made with, `store.json` that says whose work it is,
`head.safetensors` (where hidden states are stored) and parts `part-000000/`, each complete or absent, with a manifest.
A part holds sequences of one kind: `given`, the data's own responses; `written`, the teacher's; `held_out`, its
responses to the prompts that a run is validated on. The rows of its outputs have the formats of a run's cache
(`cache_format.py`). Rows are read from the files when a chunk of the loss needs them, so a store may be larger than
memory. Knows no teacher and no optimizer.

Letters: `N` rows, `D` teacher width, `V` shared vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qswitch.aside import folder_aside
from qswitch.data.template import Prompt
from qswitch.distill.logit_cache import Targets
from qswitch.distill.sequence import TrainingSequence
from qswitch.errors import ModelError, RunDirError
from qswitch.manifest import find_damage, write_manifest
from qswitch.models.language_model import Head
from qswitch.outside import user_path
from qswitch.rollout.policy import TEACHER
from qswitch.run_dir import STORE, write_atomically

FORMAT = 1
"""Raised whenever a store of before could not be read as it was meant."""
Kind = Literal["given", "written", "held_out"]
SAME_DRAWS = "Write one for the same draws: qswitch teach with the seed, train.max_steps and batch sizes of this run."
_ABOUT, _HEAD, _ROWS, _SEQUENCES = STORE, "head.safetensors", "rows.safetensors", "sequences.json"


@dataclass(frozen=True, slots=True)
class About:
    """store.json: whose work it is, on what, and how it is stored."""

    teacher: str
    """For people."""
    weights: str | None
    """Fingerprint of the teacher's weight files; None where they were not all on the machine."""
    adapter: str | None
    """Where teacher.adapter lay, for people."""
    precision: str
    vocab_size: int
    eos_ids: list[int]
    pad_id: int
    data: list[Any]
    """Fingerprints of the training prompts, set by set, and of the held-out prompts."""
    rows: str | None
    """Format of the stored outputs, as cache.format; None where only responses are stored."""
    head: dict[str, Any] | None
    """Scale, soft-cap and vocabulary of the teacher's head, for stored hidden states."""
    max_new_tokens: int
    hub_id: str | None = None
    """Of a teacher from the hub; None of another, and in stores of before."""
    revision: str | None = None
    """Of `hub_id`, where one was named."""
    adapter_weights: str | None = None
    """Fingerprint of the files of teacher.adapter; None without one, and in stores of before."""
    seconds: float = 0.0
    """That writing it took."""
    complete: bool = False
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class _Stored:
    """What one sequence says, and where its rows are: from `start` on in the fields of its part."""

    response_ids: list[int]
    steps: list[int]
    fields: dict[str, Any]
    start: int


def part_path(folder: Path, number: int) -> Path:
    """Where a part lies; names sort by number."""
    return folder / f"part-{number:06d}"


def write_part(path: Path, kind: Kind, sequences: Sequence[TrainingSequence], fields: dict[str, Tensor] | None) -> None:
    """Write one part, whole or not at all: sequences and the rows of their loss steps, one after the other."""
    with folder_aside(path) as folder:
        listed = [{n: getattr(s, n) for n in ("example_id", "visit", "response_ids", "loss_steps")} for s in sequences]
        (folder / _SEQUENCES).write_text(json.dumps({"kind": kind, "sequences": listed}), encoding="utf-8")
        if fields is not None:
            save_file({name: tensor.contiguous().cpu() for name, tensor in fields.items()}, folder / _ROWS)
        write_manifest(folder, format=FORMAT)


def write_about(folder: Path, about: About) -> None:
    """Replace store.json."""
    write_atomically(folder / _ABOUT, json.dumps(asdict(about), indent=1, ensure_ascii=False) + "\n")


def read_about(folder: Path) -> About:
    """What a store says of itself.

    Raises:
        RunDirError: there is no store, or one of another format.
    """
    try:
        values = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise RunDirError(
                f"{folder} is a store of format {values['format']}, and this qswitch reads format {FORMAT}. Write it "
                "anew with qswitch teach, or use the version that wrote it."
            )
        return About(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = "does not exist" if not folder.is_dir() else f"holds no {_ABOUT} that can be read ({error})"
        raise RunDirError(f"teacher.responses={folder} {reason}. Name a folder of `qswitch teach`.") from None


def write_head(folder: Path, head: Head) -> dict[str, Any]:
    """Write the teacher's head, and return what `About.head` says of it.

    Raises:
        ModelError: its weights are quantised, so that they are not its own to write.
    """
    from accelerate.utils import align_module_device

    linear = head.linear
    with align_module_device(linear):
        if not linear.weight.is_floating_point():  # type: ignore[union-attr]
            raise ModelError(
                "The teacher's head is quantised, so hidden states cannot be scored without the teacher. Set "
                "cache.format=topk."
            )
        bias = getattr(linear, "bias", None)
        tensors = {"weight": linear.weight} | ({} if bias is None else {"bias": bias})
        save_file({name: t.detach().contiguous().cpu().clone() for name, t in tensors.items()}, folder / _HEAD)  # type: ignore[union-attr]
    return {"vocab_size": head.vocab_size, "logit_scale": head.logit_scale, "softcap": head.softcap}


def damaged_parts(folder: Path) -> dict[Path, str]:
    """The parts of a store that are not as they were written, and what is wrong with each."""
    found = {path: find_damage(path) for path in sorted(folder.glob("part-*"))}
    return {path: damage for path, damage in found.items() if damage is not None}


class StoredTeacher:
    """A complete store, in the place of a teacher and of a run's cache.

    `is_checked` says that every byte was looked at just now; hidden states are scored in `dtype` on `device`.

    Raises:
        RunDirError: it is unfinished, cut or damaged.
    """

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype, is_checked: bool = False) -> None:
        self.about = read_about(folder)
        if not self.about.complete:
            raise RunDirError(f"{folder} is not finished. Go on with: qswitch teach --resume {folder}")
        damaged = {} if is_checked else damaged_parts(folder)
        numbers = [int(path.name.removeprefix("part-")) for path in sorted(folder.glob("part-*"))]
        if damaged or numbers != list(range(len(numbers))) or not numbers:
            listed = [f"{path.name}: {reason}" for path, reason in damaged.items()]
            listed += [f"part {n} of it is missing" for n in sorted(set(range(max(numbers, default=0))) - set(numbers))]
            raise RunDirError(
                f"{folder} is damaged ({'; '.join(listed[:3]) or 'it holds no part'}). Write what is missing with: "
                f"qswitch teach --resume {folder}"
            )
        self._dtype = dtype
        self.head = _read_head(folder, self.about, device, dtype) if self.about.rows == "hidden" else None
        self._held: dict[Kind, dict[tuple[int, int], _Stored]] = {"given": {}, "written": {}, "held_out": {}}
        self._files: list[Any] = []
        for number in numbers:
            self._index(part_path(folder, number))
        self._visits: dict[int, list[int]] = {}
        for example_id, visit in sorted(self._held["written"]):
            self._visits.setdefault(example_id, []).append(visit)

    def _index(self, path: Path) -> None:
        listed = json.loads((path / _SEQUENCES).read_text(encoding="utf-8"))
        fields: dict[str, Any] = {}
        start = 0
        if (path / _ROWS).is_file():
            try:
                file = safe_open(path / _ROWS, framework="pt")
                fields = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise RunDirError(f"{path / _ROWS} cannot be read ({error}). Copy it again.") from error
            self._files.append(file)
        for one in listed["sequences"]:
            stored = _Stored(one["response_ids"], one["loss_steps"], fields, start)
            self._held[listed["kind"]][one["example_id"], one["visit"]] = stored
            start += len(one["loss_steps"])

    # ---------------------------------------------------------------- what it says

    def answer(self, prompt: Prompt, visit: int, owner: int = 0) -> TrainingSequence:
        """The response that the teacher wrote to a prompt; visits beyond those that were stored come round again.

        Raises:
            RunDirError: the store has none.
        """
        stored = self._find("written", prompt.example_id, visit)
        ids, steps = stored.response_ids, stored.steps
        return TrainingSequence(prompt.example_id, visit, prompt.prompt_ids, ids, steps, [TEACHER] * len(steps), owner)

    def held_out(self, prompts: Sequence[Prompt], owners: Sequence[int]) -> list[TrainingSequence]:
        """The teacher's responses to the held-out prompts, each with the process that scores it."""
        found = []
        for prompt, owner in zip(prompts, owners, strict=True):
            stored = self._find("held_out", prompt.example_id, 0)
            found.append(
                TrainingSequence(
                    prompt.example_id, 0, prompt.prompt_ids, stored.response_ids, stored.steps, owner=owner
                )
            )
        return found

    def held_out_targets(self, sequences: Sequence[TrainingSequence]) -> Targets:
        """The teacher's outputs at every step of some of `held_out`."""
        return self._targets([self._find("held_out", s.example_id, 0) for s in sequences])

    def get(self, sequences: Sequence[TrainingSequence]) -> Targets:
        """As `LogitCache.get`: the teacher's outputs at the loss steps of `sequences`, in that order.

        Raises:
            KeyError: a sequence of which the store holds other loss steps.
            RunDirError: one that it does not hold.
        """
        found = []
        for s in sequences:
            stored = self._find("given" if s.loss_writers is None else "written", s.example_id, s.visit)
            if stored.steps != s.loss_steps or stored.response_ids != s.response_ids:
                raise KeyError(f"no teacher outputs for the loss steps of (example, visit) {s.key}")
            found.append(stored)
        return self._targets(found)

    def _find(self, kind: Kind, example_id: int, visit: int, remedy: str = SAME_DRAWS) -> _Stored:
        """The data's responses are the same at every visit; written ones come round again."""
        asked = 0
        if kind == "written":
            visits = self._visits.get(example_id, [visit])
            asked = visit if visit in visits else visits[visit % len(visits)]
        stored = self._held[kind].get((example_id, asked))
        if stored is None:
            what = {"given": "outputs for the response", "written": "response", "held_out": "held-out response"}[kind]
            raise RunDirError(
                f"teacher.responses holds no {what} of example {example_id}, which this run draws. {remedy}"
            )
        return stored

    def _targets(self, found: Sequence[_Stored]) -> Targets:
        assert self.about.rows is not None, "a store without rows is for a loss that reads none"
        rows = [(s.fields, s.start, s.start + len(s.steps)) for s in found]
        return Targets.from_rows(self.about.rows, rows, self.head, self._dtype)

    def covers(self, needed: Iterable[tuple[Kind, int]], remedy: str = SAME_DRAWS) -> None:
        """Nothing, or an error for the first (kind, example) that is not held, with what to do about it.

        Raises:
            RunDirError: names it.
        """
        for kind, example_id in needed:
            self._find(kind, example_id, 0, remedy)

    # ---------------------------------------------------------------- in the place of a cache, with nothing to keep

    def keep_only(self, sequences: Iterable[TrainingSequence]) -> None:
        """A store forgets nothing."""

    def state_dict(self) -> dict[str, Any]:
        """A store is no part of a checkpoint."""
        return {"format": self.about.rows, "sequences": [], "fields": {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""

    def stats(self) -> dict[str, int]:
        """Sequences stored."""
        return {"sequences": sum(len(held) for held in self._held.values())}


def _read_head(folder: Path, about: About, device: torch.device, dtype: torch.dtype) -> Head:
    assert about.head is not None
    try:
        with safe_open(folder / _HEAD, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RunDirError(
            f"{folder / _HEAD} cannot be read ({error}). Write it again with: qswitch teach --resume {folder}"
        ) from error
    rows, width = tensors["weight"].shape
    linear = nn.Linear(width, rows, bias="bias" in tensors, device="meta")
    linear.load_state_dict(tensors, assign=True)
    linear.requires_grad_(False)
    return Head(linear.to(device), compute_dtype=dtype, **about.head)


def differs(ours: About, theirs: About) -> str | None:
    """In what a run (`ours`) is another one than its store was written for; None where they belong together.

    What one of them does not know is no difference: a run needs no weights of the teacher, and older stores say less.
    """
    for name, what in (
        ("vocab_size", "another vocabulary"),
        ("eos_ids", "other end tokens"),
        ("pad_id", "another tokenizer"),
        *_of_the_model(ours, theirs),
        ("precision", "another teacher.precision"),
        *_of_the_adapter(ours, theirs),
        ("data", "other data, another template or other limits of length"),
    ):
        mine, written = getattr(ours, name), getattr(theirs, name)
        if mine != written:
            return f"{what} ({name}: {_short(written)} there, {_short(mine)} here)"
    return None


def _of_the_model(ours: About, theirs: About) -> list[tuple[str, str]]:
    """By its weights where both know them, else by its names on the hub."""
    if None not in (ours.weights, theirs.weights):
        return [("weights", "other weights of the teacher")]
    hub_ids = [ours.hub_id, theirs.hub_id]
    if theirs.hub_id is None and theirs.weights is None:  # of a hub model, as stores of before said it
        hub_ids[1] = theirs.teacher
    if None in hub_ids or (hub_ids[0] == hub_ids[1] and None in (ours.revision, theirs.revision)):
        return []
    return [("teacher", "another teacher"), ("revision", "another teacher.revision")]


def _of_the_adapter(ours: About, theirs: About) -> list[tuple[str, str]]:
    """By its files, wherever they lie; of stores of before by its place."""
    what = "another teacher.adapter"
    if (ours.adapter is None) != (theirs.adapter is None):
        return [("adapter", what)]
    if None not in (ours.adapter_weights, theirs.adapter_weights):
        return [("adapter_weights", f"{what}, or one that was trained again")]
    places = [str(user_path(one.adapter).resolve()) for one in (ours, theirs) if one.adapter is not None]
    return [("adapter", what)] if len(set(places)) > 1 else []


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
