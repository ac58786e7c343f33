"""The teacher works alone: it writes or scores every response that a run will draw, and the results stay on disk.

What a run draws is known without running it: the order of the prompts and the coin of each step are functions of the
seed. So the store holds just those sequences, in the order of the run, in parts that are complete or absent; resumed,
it goes on with the first part that is missing. Knows no student's weights.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qswitch.config import RunConfig
from qswitch.data.gather import Prompts
from qswitch.data.loader import Mixture, PromptLoader
from qswitch.data.template import Prompt
from qswitch.distill.cache_format import encode_rows
from qswitch.distill.processes import Processes
from qswitch.distill.progress import Progress
from qswitch.distill.recovery import BatchRows
from qswitch.distill.sequence import TrainingSequence, ground_truth_sequence
from qswitch.distill.stored_teacher import (
    SAME_DRAWS,
    About,
    Kind,
    StoredTeacher,
    damaged_parts,
    differs,
    part_path,
    read_about,
    write_about,
    write_head,
    write_part,
)
from qswitch.distill.supply import ground_truth_coin
from qswitch.distill.validation import teacher_answers
from qswitch.errors import RunDirError
from qswitch.manifest import entry_of
from qswitch.models.language_model import LanguageModel
from qswitch.models.load import load_teacher
from qswitch.models.references import resolve_reference
from qswitch.models.runtime import make_runtime
from qswitch.models.weight_files import weights_fingerprint
from qswitch.outside import user_path
from qswitch.plan.adapters import ADAPTER_CONFIG, find_adapter
from qswitch.rollout.decode import RolloutRequest, rollout, score_responses
from qswitch.rollout.policy import TeacherPolicy
from qswitch.run_dir import STORE

if TYPE_CHECKING:
    from qswitch.models.pair import TokenizerPair
    from qswitch.preflight import Prepared

PART_SEQUENCES = 128
"""Sequences of a part: what a killed process loses at most, and what waits in memory to be written."""

Item = tuple[Prompt, int]
"""A prompt and its visit."""


def items_of_a_run(config: RunConfig, prompts: Prompts) -> Iterator[tuple[Kind, Prompt, int]]:
    """What the steps of a run draw, in their order, each sequence once."""
    seen = set()
    for kind, prompt, visit in _draws(config, prompts):
        own = (kind, prompt.example_id, visit)
        if own not in seen:
            seen.add(own)
            yield kind, prompt, visit


def _draws(config: RunConfig, prompts: Prompts) -> Iterator[tuple[Kind, Prompt, int]]:
    """The prompts of every step, with what is learnt of each; the data's response is the same at every visit."""
    loader, mix = PromptLoader(prompts, config.seed), config.data.ground_truth_mix
    for step in range(config.train.max_steps):
        kind: Kind = "given" if mix == 1 or ground_truth_coin(config.seed, step) < mix else "written"
        for prompt, visit in loader.next(config.train.sequences_per_step):
            yield kind, prompt, 0 if kind == "given" else visit


def needed_of_a_store(config: RunConfig, prompts: Prompts) -> Iterator[tuple[Kind, int]]:
    """(kind, example) of what a run reads of its store, each once: visits of a prompt come round again there.

    Where no number of steps ends the run it may draw every prompt.
    """
    kinds: list[Kind] = []
    if config.reads_responses and config.loss.objective == "divergence":
        kinds.append("given")
    if config.writes_rollouts:
        kinds.append("written")
    seen: set[tuple[Kind, int]] = set()
    if config.train.step_limit is None:
        sets = prompts.sets if isinstance(prompts, Mixture) else [prompts]
        drawn = ((kind, prompt) for some in sets for prompt in some for kind in kinds)
    else:
        drawn = ((kind, prompt) for kind, prompt, _ in _draws(config, prompts) if kind in kinds)
    for kind, prompt in drawn:
        if (kind, prompt.example_id) not in seen:
            seen.add((kind, prompt.example_id))
            yield kind, prompt.example_id
            if len(seen) == len(kinds) * len(prompts):
                return


def about_run(config: RunConfig, pair: TokenizerPair, prompts: Prompts, held_out: Sequence[Prompt]) -> About:
    """Whose work a store for this run is, as it is before anything is written."""
    resolved = resolve_reference(config.teacher.model, config.teacher.revision)
    is_of_hub = not Path(resolved.path).is_dir()
    sets = PromptLoader(prompts, config.seed).state_dict()["sets"]
    # Whichever the first few are to be: a store's responses are read one by one, by the example.
    texts = repr([(p.example_id, p.prompt_ids) for p in sorted(held_out, key=lambda p: p.example_id)]).encode()
    return About(
        teacher=resolved.name,
        weights=weights_fingerprint(resolved),
        adapter=config.teacher.adapter,
        precision=config.teacher.precision,
        vocab_size=pair.vocab_size,
        eos_ids=list(pair.eos_ids),
        pad_id=pair.pad_id,
        data=[*([one["size"], one["fingerprint"]] for one in sets), zlib.crc32(texts)],
        rows=config.cache.format,
        head=None,
        max_new_tokens=config.rollout.max_new_tokens,
        hub_id=resolved.path if is_of_hub else None,
        revision=resolved.revision if is_of_hub else None,
        adapter_weights=adapter_fingerprint(config),
    )


def adapter_fingerprint(config: RunConfig) -> str | None:
    """Tells what teacher.adapter names from another adapter; None where nothing is named."""
    if config.teacher.adapter is None:
        return None
    folder = find_adapter(config.teacher.adapter, "teacher.adapter")
    files = [folder / name for name in (ADAPTER_CONFIG, "adapter_model.safetensors")]
    return hashlib.sha256("".join(entry_of(file)["sha256"] for file in files).encode()).hexdigest()[:32]


def require_store(config: RunConfig, prepared: Prepared) -> None:
    """Nothing, or an error where the run's store is not there, not whole, or not for this run.

    Raises:
        RunDirError: with the reason and the remedy.
    """
    assert config.teacher.responses is not None
    folder = user_path(config.teacher.responses)
    stored = StoredTeacher(folder, device=torch.device("cpu"), dtype=torch.float32)
    prompts = prepared.prompts
    ours = about_run(config, prepared.pair, prompts.train, prompts.held_out)
    if (difference := differs(ours, stored.about)) is not None:
        raise RunDirError(
            f"teacher.responses={folder} is for another run: it has {difference}. Name what is there, or write one "
            "with these settings: qswitch teach."
        )
    imitates = config.loss.objective == "divergence"
    if stored.about.rows == "topk" and imitates and config.loss.temperature != 1:
        raise RunDirError(
            f"teacher.responses={folder} holds probabilities at temperature 1 (topk). Set loss.temperature=1, or write "
            "it with cache.format=hidden."
        )
    remedy = SAME_DRAWS
    if config.train.step_limit is None:
        remedy = (
            "train.max_tokens or max_seconds does not say how many prompts that are. Set train.max_steps beside it, as "
            f"{folder / 'config.yaml'} has it, or write a store of every prompt: qswitch teach with train.num_epochs."
        )
    stored.covers(needed_of_a_store(config, prompts.train), remedy)
    stored.held_out(prompts.held_out, [0] * len(prompts.held_out))


def write_store(
    folder: Path,
    config: RunConfig,
    prepared: Prepared,
    *,
    rows: int,
    spread: int = 0,
    layers: Sequence[int] | None = None,
    processes: Processes | None = None,
) -> About:
    """Write what is missing of a store, `rows` sequences at a time, and return what it says of itself.

    Of a teacher that is larger than the device `spread` bytes lie on it, and of one on several GPUs `layers` on each
    (`load_teacher`). Several processes take the missing parts in turn. What a part holds does not depend on who writes
    it; the first process writes what is not in a part.

    Raises:
        RunDirError: the folder is a store for another run.
        ModelError, TrainingError: as their messages say.
    """
    pair, prompts = prepared.pair, prepared.prompts
    processes = processes or Processes()
    progress = Progress(None, quiet=not processes.is_first)
    ours = about_run(config, pair, prompts.train, prompts.held_out)
    about = processes.from_first(lambda: _opened(folder, ours, progress))
    written = processes.from_first(lambda: {path.name for path in folder.glob("part-*")})
    runtime = make_runtime(config.train)
    several = f", in each of {processes.count} processes" if processes.count > 1 else ""
    progress.say(f"loading the teacher ({config.teacher.precision}) on {runtime.device}{several}")
    teacher = processes.each(
        lambda: load_teacher(config.teacher, runtime, vocab_size=pair.vocab_size, spread=spread, layers=layers)
    )
    resolved = resolve_reference(config.teacher.model, config.teacher.revision)
    about = replace(about, weights=processes.from_first(lambda: weights_fingerprint(resolved)))  # downloaded by now
    writer = _Writer(config, pair, teacher, rows, progress)
    if about.rows == "hidden":
        head = processes.from_first(lambda: write_head(folder, writer.teacher.head))
        about = replace(about, head=head)
    total = config.train.max_steps * config.train.sequences_per_step + len(prompts.held_out)
    done = 0
    waiting: list[tuple[Path, Kind, list[Item]]] = []

    def write_own() -> float:
        started = time.perf_counter()
        for path, kind, items in waiting[processes.rank : processes.rank + 1]:
            write_part(path, kind, *writer.write(kind, items))
        return time.perf_counter() - started

    def write_waiting() -> None:
        nonlocal about
        if waiting:
            seconds = max(processes.everyone(write_own))
            about = replace(about, seconds=about.seconds + seconds)
            processes.from_first(lambda: write_about(folder, about))
            waiting.clear()
        progress.loading("the teacher works", done, total)

    for number, (kind, items) in enumerate(_parts(config, prompts.train, prompts.held_out)):
        done += len(items)
        if part_path(folder, number).name not in written:
            waiting.append((part_path(folder, number), kind, items))
        if len(waiting) == processes.count:
            write_waiting()
    write_waiting()
    about = replace(about, complete=True)
    processes.from_first(lambda: write_about(folder, about))
    return about


def _opened(folder: Path, about: About, progress: Progress) -> About:
    """What a store for this run says of itself before more is written; its damaged parts are gone.

    Raises:
        RunDirError: the folder is a store for another run.
    """
    if (folder / STORE).exists():
        written = read_about(folder)
        if (difference := differs(about, written)) is not None:
            raise RunDirError(f"{folder} is a store for another run: it has {difference}. Choose another --output-dir.")
        about = replace(about, seconds=written.seconds, head=written.head)
        for path, reason in damaged_parts(folder).items():
            progress.say(f"{path.name} is damaged ({reason}); it is written again")
            shutil.rmtree(path)
    write_about(folder, about)
    return about


def _parts(config: RunConfig, prompts: Prompts, held_out: Sequence[Prompt]) -> Iterator[tuple[Kind, list[Item]]]:
    """The parts of a store in their order, the same whenever it is asked."""
    walk: Iterator[tuple[Kind, Prompt, int]] = itertools.chain(
        (("held_out", prompt, 0) for prompt in held_out), items_of_a_run(config, prompts)
    )
    waiting: dict[Kind, list[Item]] = {}
    for kind, prompt, visit in walk:
        items = waiting.setdefault(kind, [])
        items.append((prompt, visit))
        if len(items) == PART_SEQUENCES:
            yield kind, waiting.pop(kind)
    yield from waiting.items()


class _Writer:
    """Lets the teacher write or score the sequences of a part."""

    def __init__(
        self, config: RunConfig, pair: TokenizerPair, teacher: LanguageModel, rows: int, progress: Progress
    ) -> None:
        self.teacher, self._config, self._pair = teacher, config, pair
        self._imitates = config.loss.objective == "divergence"
        self._rows = BatchRows(rows, say=progress.say)

    def write(self, kind: Kind, items: Sequence[Item]) -> tuple[list[TrainingSequence], dict[str, Tensor] | None]:
        """The sequences, and the rows of their loss steps; None where nothing reads them.

        Hidden states leave the device as they come: there, the plan counts those of the rows that are decoded.
        """
        found = {"given": self._given, "written": self._written, "held_out": self._held_out}[kind](items)
        if kind != "held_out" and not self._imitates:
            return [sequence for sequence, _ in found], None
        hidden = [states for _, states in found if states is not None]
        cache = self._config.cache
        device = self.teacher.device
        fields = encode_rows(
            cache.format,
            torch.cat(hidden),
            lambda rows: self.teacher.head(rows.to(device)),
            dtype=self.teacher.compute_dtype,
            topk=cache.topk,
        )
        return [sequence for sequence, _ in found], fields

    def _held_out(self, items: Sequence[Item]) -> list[tuple[TrainingSequence, Tensor | None]]:
        answers = partial(
            teacher_answers,
            [prompt for prompt, _ in items],
            self.teacher,
            max_new_tokens=self._config.rollout.max_new_tokens,
            eos_ids=self._pair.eos_ids,
            pad_id=self._pair.pad_id,
        )
        return [*self._rows.attempt(self.teacher.device, answers)]

    def _given(self, items: Sequence[Item]) -> list[tuple[TrainingSequence, Tensor | None]]:
        sequences = [s for s in (ground_truth_sequence(p, visit) for p, visit in items) if s is not None]
        if not self._imitates:
            return [(s, None) for s in sequences]
        hidden = self._rows.attempt(
            self.teacher.device,
            partial(
                score_responses,
                self.teacher,
                [(s.prompt_ids, s.response_ids) for s in sequences],
                pad_id=self._pair.pad_id,
                keep_on_host=True,
            ),
        )
        return [(s, h[s.loss_steps]) for s, h in zip(sequences, hidden, strict=True)]

    def _written(self, items: Sequence[Item]) -> list[tuple[TrainingSequence, Tensor | None]]:
        settings = self._config.rollout
        requests = [
            RolloutRequest(p.example_id, visit, p.prompt_ids, p.max_new_tokens or settings.max_new_tokens)
            for p, visit in items
        ]
        rollouts, _ = self._rows.attempt(
            self.teacher.device,
            partial(
                rollout,
                requests,
                teacher=self.teacher,
                student=None,
                policy=TeacherPolicy(),
                seed=self._config.seed,
                temperature=settings.temperature,
                eos_ids=self._pair.eos_ids,
                pad_id=self._pair.pad_id,
                keep="all" if self._imitates else "nothing",
                keep_on_host=True,
            ),
        )
        return [
            (
                TrainingSequence(r.example_id, r.visit, r.prompt_ids, r.response_ids, list(range(len(r.response_ids)))),
                r.teacher_hidden,
            )
            for r in rollouts
        ]
