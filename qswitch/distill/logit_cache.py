"""Teacher outputs kept between rollout and training, so that the teacher does not run twice.

They come and go by whole sequences: a sequence has one row for each of its loss steps, in one of the formats of
`cache_format.py`. Sequences that were put together share a segment, which lives on the device, in host memory or in
files; where a tier is full its oldest segments move down a tier, and that is said once. No row is ever dropped
silently. Knows no model: a head is any callable from hidden states to logits.

Letters: `N` rows, `D` teacher width, `V` shared vocabulary.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qswitch.distill.cache_format import FORMATS, HeadFunction, LogitTargets, TopkTargets, encode_rows
from qswitch.distill.sequence import TrainingSequence
from qswitch.errors import TrainingError
from qswitch.pinned import host_buffer
from qswitch.plan.memory import pinned_block_bytes
from qswitch.units import GIB

logger = logging.getLogger(__name__)

Key = tuple[int, int]
"""(example, visit) of a sequence."""
TIERS = ("device", "host", "disk")


@dataclass(slots=True, eq=False)
class _Segment:
    """Rows of sequences that were put together, field by field, and the sequences that are still alive."""

    fields: dict[str, Tensor]
    tier: str
    sequences: dict[Key, _Rows] = field(default_factory=dict)
    paths: list[Path] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return len(next(iter(self.fields.values())))

    @property
    def num_live_rows(self) -> int:
        return sum(rows.stop - rows.start for rows in self.sequences.values())

    def num_bytes(self, block_bytes: Callable[[int], int] = int) -> int:
        """Of all fields, each as large as the block that holds it."""
        return sum(block_bytes(t.numel() * t.element_size()) for t in self.fields.values())


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows start..stop of a segment: those of one sequence, a row for each of its `steps`."""

    segment: _Segment
    start: int
    stop: int
    steps: Sequence[int]


class Targets:
    """Teacher outputs of N positions, handed out a chunk at a time."""

    def __init__(self, format: str, rows: Sequence[_Rows], head: HeadFunction | None, score_dtype: torch.dtype) -> None:
        self._format, self._rows, self._head, self._score_dtype = format, rows, head, score_dtype

    @classmethod
    def from_hidden(cls, hidden: Tensor, head: HeadFunction) -> Targets:
        """Targets from final hidden states [N, D] that never were in a cache."""
        segment = _Segment({"hidden": hidden}, "device")
        return cls("hidden", [_Rows(segment, 0, len(hidden), ())], head, hidden.dtype)

    @classmethod
    def from_rows(
        cls,
        format: str,
        rows: Sequence[tuple[dict[str, Any], int, int]],
        head: HeadFunction | None,
        score_dtype: torch.dtype,
    ) -> Targets:
        """Targets from rows start..stop of fields that are no cache's; a field may be a slice of a file."""
        return cls(format, [_Rows(_Segment(f, "disk"), start, stop, ()) for f, start, stop in rows], head, score_dtype)

    @property
    def num_positions(self) -> int:
        return sum(rows.stop - rows.start for rows in self._rows)

    def chunk(self, start: int, stop: int, device: torch.device) -> LogitTargets | TopkTargets:
        """The teacher's outputs of positions start..stop on `device`; nothing else is moved or computed."""
        fields = gather(_between(self._rows, start, stop), device)
        if self._format == "topk":
            return TopkTargets.of_stored(fields)
        assert self._head is not None, "hidden states are put with a head"
        return LogitTargets(self._head(fields["hidden"].to(self._score_dtype)))

    def are_finite(self, chunk_tokens: int, device: torch.device) -> bool:
        """Whether the teacher's outputs are numbers; a logit of -inf, a token that it never writes, is one."""
        for start in range(0, self.num_positions, chunk_tokens):
            chunk = self.chunk(start, min(start + chunk_tokens, self.num_positions), device)
            values = chunk.logits if isinstance(chunk, LogitTargets) else chunk.log_probs
            if not torch.isfinite(values.amax(dim=-1)).all():  # amax passes NaN on
                return False
        return True


class LogitCache:
    """Teacher outputs by sequence within byte budgets.

    Args:
        format: hidden (exact in `dtype`) or topk.
        head: the teacher's; None where no teacher is loaded, and nothing is ever put.
        disk_path: folder of the last tier, made when needed; None has no such tier.
        device_budget_bytes, host_budget_bytes: limits of the first two tiers; on a CPU both are host memory.
    """

    def __init__(
        self,
        format: str,
        *,
        head: HeadFunction | None,
        vocab_size: int,
        device: torch.device,
        dtype: torch.dtype,
        device_budget_bytes: int,
        host_budget_bytes: int,
        disk_path: Path | None,
        topk: int = 64,
    ) -> None:
        if format not in FORMATS:
            raise ValueError(f"unknown cache format {format!r}; choose one of {', '.join(FORMATS)}")
        self._format, self._head = format, head
        self._device, self._dtype, self._topk = device, dtype, min(topk, vocab_size)
        self._budgets = {"device": device_budget_bytes, "host": host_budget_bytes}
        self._disk_path = disk_path
        self._segments: list[_Segment] = []  # oldest first
        self._index: dict[Key, _Rows] = {}
        self._next_file = 0
        self._said: set[str] = set()

    def __contains__(self, sequence: TrainingSequence) -> bool:
        return sequence.key in self._index

    def put(self, sequences: Sequence[TrainingSequence], hidden: Tensor) -> None:
        """Store the teacher's final hidden states [N, D] at the loss steps of `sequences`, one after the other.

        All of them are stored, or none.

        Raises:
            ValueError: numbers of loss steps and rows differ, or a sequence is stored already.
            TrainingError: every tier is full.
        """
        num_steps = sum(len(s.loss_steps) for s in sequences)
        if num_steps != len(hidden):
            raise ValueError(f"{num_steps} loss steps for {len(hidden)} rows")
        self._add([(s.key, s.loss_steps) for s in sequences], self._encode(hidden))

    def get(self, sequences: Sequence[TrainingSequence]) -> Targets:
        """Targets at the loss steps of `sequences`, in that order; they outlive `keep_only` and `clear`.

        Raises:
            KeyError: a sequence that was never put, was put with other loss steps, or has been forgotten.
        """
        found = []
        for sequence in sequences:
            rows = self._index.get(sequence.key)
            if rows is None or list(rows.steps) != sequence.loss_steps:
                raise KeyError(f"no teacher outputs for the loss steps of (example, visit) {sequence.key}")
            found.append(rows)
        return Targets(self._format, found, self._head, self._dtype)

    def keep_only(self, sequences: Iterable[TrainingSequence]) -> None:
        """Forget every sequence but those given; one that is given and not stored changes nothing.

        A segment's bytes come back when more than half of its rows are gone: the others are then copied out of it.
        """
        needed = {s.key for s in sequences}
        touched = set()
        for key in [key for key in self._index if key not in needed]:
            segment = self._index.pop(key).segment
            del segment.sequences[key]
            touched.add(segment)
        for segment in [s for s in self._segments if s in touched]:
            if not segment.sequences:
                self._segments.remove(segment)
                _unlink(segment)
            elif 2 * segment.num_live_rows < segment.num_rows:
                self._rewrite(segment)

    def clear(self) -> None:
        """Forget everything."""
        self.keep_only(())

    def state_dict(self) -> dict[str, Any]:
        """Every row as it is stored: copies on the CPU, of every tier, that `load_state_dict` takes back bit for bit.

        Holds format (str), sequences (example, visit and steps of each) and the format's tensors [N, ...]; torch.load
        reads it with weights_only.
        """
        sequences = [(key, list(rows.steps)) for key, rows in self._index.items()]
        fields = gather(list(self._index.values()), torch.device("cpu")) if self._index else {}
        return {"format": self._format, "sequences": sequences, "fields": fields}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold exactly the rows of a `state_dict`.

        Raises:
            ValueError: they have another format.
            TrainingError: every tier is full.
        """
        if state["format"] != self._format:
            raise ValueError(f"rows of format {state['format']} cannot go into a cache of format {self._format}")
        self.clear()
        self._add(state["sequences"], {name: tensor.clone() for name, tensor in state["fields"].items()})

    def stats(self) -> dict[str, int]:
        """Sequences and rows stored, and bytes by tier."""
        used = {f"{tier}_bytes": 0 for tier in TIERS}
        for segment in self._segments:
            used[f"{segment.tier}_bytes"] += self._num_bytes(segment, segment.tier)
        num_rows = sum(segment.num_live_rows for segment in self._segments)
        return {"sequences": len(self._index), "rows": num_rows, **used}

    # ---------------------------------------------------------------- segments

    def _encode(self, hidden: Tensor) -> dict[str, Tensor]:
        return encode_rows(self._format, hidden, self._head, dtype=self._dtype, topk=self._topk)

    def _add(self, sequences: Sequence[tuple[Key, Sequence[int]]], fields: dict[str, Tensor]) -> None:
        """A new segment, which is in the index only once there is room for it."""
        names = [key for key, _ in sequences]
        known = next((key for key in names if key in self._index), None)
        if known is not None or len(set(names)) != len(names):
            raise ValueError(f"(example, visit) {known or 'within one call'} is stored already")
        if not sequences:
            return
        segment = _Segment({name: tensor.to(self._device) for name, tensor in fields.items()}, "device")
        self._make_room([*self._segments, segment])
        self._segments.append(segment)
        self._place(segment, sequences)

    def _place(self, segment: _Segment, sequences: Iterable[tuple[Key, Sequence[int]]]) -> None:
        """Let the segment's rows be those of `sequences`, one after the other."""
        start = 0
        for key, steps in sequences:
            segment.sequences[key] = self._index[key] = _Rows(segment, start, start + len(steps), steps)
            start += len(steps)

    def _rewrite(self, segment: _Segment) -> None:
        """Copy a segment's live rows into a new one of the same tier; targets handed out before keep the old one."""
        live = segment.sequences
        fields = {
            name: torch.cat([tensor[rows.start : rows.stop] for rows in live.values()])
            for name, tensor in segment.fields.items()
        }
        smaller = _Segment(fields, "device")
        if segment.tier != "device":
            try:
                self._move(smaller, segment.tier)
            except TrainingError:
                return  # no room on the disk for the copy: the segment stays as it is
        self._segments[self._segments.index(segment)] = smaller
        self._place(smaller, [(key, rows.steps) for key, rows in live.items()])
        _unlink(segment)

    # ---------------------------------------------------------------- tiers

    def _make_room(self, segments: Sequence[_Segment]) -> None:
        """Move the oldest of `segments` down until every tier is within its budget; an error leaves each one whole.

        Raises:
            TrainingError: there is no tier below, or it cannot be written.
        """
        goal = {id(segment): segment.tier for segment in segments}
        for tier, below in (("device", "host"), ("host", "disk")):
            members = [s for s in segments if goal[id(s)] == tier]
            used = sum(self._num_bytes(s, tier) for s in members)
            for segment in members:
                if used <= self._budgets[tier]:
                    break
                used -= self._num_bytes(segment, tier)
                goal[id(segment)] = below
        if self._disk_path is None and "disk" in goal.values():
            raise TrainingError(
                f"The teacher-output cache needs more than cache.device_budget_gib + cache.host_budget_gib "
                f"({sum(self._budgets.values()) / GIB:.2f} GiB) and has no folder to go to. Raise "
                "cache.host_budget_gib, or use cache.format=topk."
            )
        # The lowest tier first: host memory is freed before more moves into it.
        for tier in ("disk", "host"):
            for segment in segments:
                if goal[id(segment)] == tier != segment.tier:
                    self._say_full(tier)
                    self._move(segment, tier)

    def _num_bytes(self, segment: _Segment, tier: str) -> int:
        """What a segment takes of a tier's budget; a pinned tensor takes a whole block of torch's allocator."""
        is_pinned = tier == "host" and self._device.type == "cuda"
        return segment.num_bytes(pinned_block_bytes) if is_pinned else segment.num_bytes()

    def _say_full(self, below: str) -> None:
        # A segment may skip host memory; what is full is the tier above the one it goes to.
        full = "device" if below == "host" else "host"
        if below not in self._said:
            self._said.add(below)
            logger.warning(
                "The teacher-output cache is over its %s budget (%.2f GiB); its oldest rows move to %s.",
                full,
                self._budgets[full] / GIB,
                "host memory" if below == "host" else f"{self._disk_path}",
            )

    def _move(self, segment: _Segment, tier: str) -> None:
        if tier == "host":
            pinned = self._device.type == "cuda"
            segment.fields = {
                name: host_buffer(t.shape, t.dtype, pinned=pinned).copy_(t) for name, t in segment.fields.items()
            }
        else:
            try:
                segment.fields = {name: self._to_file(segment, name, t) for name, t in segment.fields.items()}
            except TrainingError:
                _unlink(segment)
                raise
        segment.tier = tier

    def _to_file(self, segment: _Segment, name: str, tensor: Tensor) -> Tensor:
        """The same values in a memory-mapped file."""
        assert self._disk_path is not None
        path = self._disk_path / f"{self._next_file}-{name}.bin"
        self._next_file += 1
        try:
            self._disk_path.mkdir(parents=True, exist_ok=True)
            segment.paths.append(path)
            # Reserve the bytes first: a mapped file that outgrows the disk ends the process without a message.
            with path.open("wb") as handle:
                os.posix_fallocate(handle.fileno(), 0, max(1, tensor.numel() * tensor.element_size()))
            mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
            mapped.copy_(tensor.flatten())
        except (OSError, RuntimeError) as error:
            raise TrainingError(
                f"The teacher-output cache cannot write {path} ({error}). Free disk space, or raise "
                "cache.host_budget_gib."
            ) from error
        return mapped.view(tensor.shape)


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several caches' `state_dict`s, of one format, as that of one cache that holds it all."""
    filled = [state for state in states if state["sequences"]]
    fields = {name: torch.cat([state["fields"][name] for state in filled]) for name in (filled or states)[0]["fields"]}
    return {**states[0], "sequences": [one for state in filled for one in state["sequences"]], "fields": fields}


def select_state(state: dict[str, Any], keys: Collection[Key]) -> dict[str, Any]:
    """Of a `state_dict` what belongs to the sequences `keys`."""
    sequences, kept, start = [], [], 0
    for key, steps in state["sequences"]:
        if tuple(key) in keys:
            sequences.append((tuple(key), steps))
            kept.append(torch.arange(start, start + len(steps)))
        start += len(steps)
    rows = torch.cat(kept) if kept else torch.arange(0)
    fields = {name: tensor[rows] for name, tensor in state["fields"].items()} if sequences else {}
    return {**state, "sequences": sequences, "fields": fields}


def gather(rows: Sequence[_Rows], device: torch.device) -> dict[str, Tensor]:
    """Field by field copies of the rows, in their order, on `device`."""
    pieces: dict[str, list[Tensor]] = {}
    goes_up = device.type == "cuda"  # down, the host would read what the device has not sent yet
    for part in rows:
        for name, tensor in part.segment.fields.items():
            pieces.setdefault(name, []).append(tensor[part.start : part.stop].to(device, non_blocking=goes_up))
    return {name: torch.cat(parts) for name, parts in pieces.items()}


def _between(rows: Sequence[_Rows], start: int, stop: int) -> list[_Rows]:
    """Positions start..stop of `rows` laid end to end."""

    def parts() -> Iterator[_Rows]:
        begin = 0
        for part in rows:
            end = begin + part.stop - part.start
            if begin < stop and start < end:
                first, last = part.start + max(start - begin, 0), part.start + min(stop, end) - begin
                yield _Rows(part.segment, first, last, ())
            begin = end

    return list(parts())


def _unlink(segment: _Segment) -> None:
    """Delete a segment's files; a mapping that is still in use keeps its bytes until it goes."""
    for path in segment.paths:
        path.unlink(missing_ok=True)
    segment.paths.clear()
