"""Teacher outputs kept between rollout and training, so that the teacher does not run twice.

Rows are addressed by (example id, visit, step) and stored in one of the formats of `cache_format.py`. Blocks of rows
live on the device, in host memory or in a file; where a tier is full its oldest blocks move down a tier, and that is
said once. No row is ever dropped silently. Knows no model: a head is any callable from hidden states to logits.

Letters: `N` rows, `D` teacher width, `V` shared vocabulary.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qswitch.distill.cache_format import FORMATS, LogitTargets, TopkTargets, decode, encode_logits
from qswitch.errors import TrainingError

logger = logging.getLogger(__name__)

HeadFunction = Callable[[Tensor], Tensor]
Key = tuple[int, int, int]
TIERS = ("device", "host", "disk")
_ENCODE_ROWS = 256
"""Rows projected to the vocabulary at a time while encoding."""


@dataclass(slots=True, eq=False)
class _Block:
    """Rows that were put together, field by field, and which keys of them are still alive (row -> key)."""

    fields: dict[str, Tensor]
    tier: str
    keys: dict[int, Key]
    paths: list[Path] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return len(next(iter(self.fields.values())))

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.fields.values())


class Targets:
    """Teacher outputs of N positions, handed out a chunk at a time."""

    def __init__(
        self, format: str, places: Sequence[tuple[_Block, int]], head: HeadFunction, score_dtype: torch.dtype
    ) -> None:
        self._format, self._places, self._head, self._score_dtype = format, places, head, score_dtype

    @classmethod
    def from_hidden(cls, hidden: Tensor, head: HeadFunction) -> Targets:
        """Targets from final hidden states [N, D] that never were in a cache."""
        block = _Block({"hidden": hidden}, "device", {})
        return cls("hidden", [(block, i) for i in range(len(hidden))], head, hidden.dtype)

    @property
    def num_positions(self) -> int:
        return len(self._places)

    def chunk(self, start: int, stop: int, device: torch.device) -> LogitTargets | TopkTargets:
        """The teacher's outputs of positions start..stop on `device`; nothing else is moved or computed."""
        rows = self.gather(self._places[start:stop], device)
        if self._format == "hidden":
            return LogitTargets(self._head(rows["hidden"].to(self._score_dtype)))
        return decode(self._format, rows)

    @staticmethod
    def gather(places: Sequence[tuple[_Block, int]], device: torch.device) -> dict[str, Tensor]:
        """Rows in the order of `places`; one copy per run of rows of the same block."""
        pieces: dict[str, list[Tensor]] = {}
        begin = 0
        for end in range(1, len(places) + 1):
            if end < len(places) and places[end][0] is places[begin][0]:
                continue
            block = places[begin][0]
            index = torch.tensor([row for _, row in places[begin:end]])
            for name, tensor in block.fields.items():
                pieces.setdefault(name, []).append(tensor[index.to(tensor.device)].to(device, non_blocking=True))
            begin = end
        return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in pieces.items()}


class LogitCache:
    """Teacher outputs by (example id, visit, step) within byte budgets.

    Args:
        format: hidden (exact in `dtype`), bf16, int8 (one scale a row) or topk.
        disk_path: folder of the last tier, made when needed; None has no such tier.
        device_budget_bytes, host_budget_bytes: limits of the first two tiers; on a CPU both are host memory.
    """

    def __init__(
        self,
        format: str,
        *,
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
        self.format, self.vocab_size = format, vocab_size
        self._device, self._dtype, self._topk = device, dtype, min(topk, vocab_size)
        self._budgets = {"device": device_budget_bytes, "host": host_budget_bytes}
        self._disk_path = disk_path
        self._blocks: list[_Block] = []  # oldest first
        self._index: dict[Key, tuple[_Block, int]] = {}
        self._head: HeadFunction | None = None
        self._next_file = 0
        self._said: set[str] = set()

    def put(self, keys: Tensor, hidden: Tensor, head: HeadFunction) -> None:
        """Store rows: keys int64 [N, 3], the teacher's final hidden states [N, D], its head. All of them, or none.

        Raises:
            ValueError: numbers of keys and rows differ, or a key is stored already.
            TrainingError: every tier is full.
        """
        names = _key_list(keys)
        if len(names) != len(hidden):
            raise ValueError(f"{len(names)} keys for {len(hidden)} rows")
        self._refuse_known(names)
        self._add(names, self._encode(hidden, head), head)

    def get(self, keys: Tensor) -> Targets:
        """Targets of the keys int64 [N, 3], in that order; they outlive `discard` and `clear`.

        Raises:
            KeyError: a key that was never put, or was discarded.
        """
        places = self._places(_key_list(keys))
        assert self._head is not None or not places
        return Targets(self.format, places, self._head or (lambda hidden: hidden), self._dtype)

    def keys(self) -> Tensor:
        """Keys of every stored row, oldest first: int64 [N, 3]."""
        return torch.tensor(list(self._index), dtype=torch.int64).reshape(-1, 3)

    def discard(self, keys: Tensor) -> int:
        """Forget the keys int64 [N, 3] that are stored, and return how many those were.

        A block's bytes come back when more than half of its rows are gone: the others are then copied out of it.
        """
        return self._forget(key for key in _key_list(keys) if key in self._index)

    def drop(self, example_id: int, visit: int) -> None:
        """Forget every step of one rollout."""
        self._forget([k for k in self._index if k[:2] == (example_id, visit)])

    def clear(self) -> None:
        """Forget everything."""
        self._forget(list(self._index))
        for block in list(self._blocks):
            self._release(block)  # blocks that were put without a row

    def export(self, keys: Tensor | None = None) -> dict[str, Any]:
        """Rows as they are stored, by key: copies on the CPU, of every tier, that `restore` takes back bit for bit.

        Holds format (str), keys int64 [N, 3] and the format's tensors [N, ...]; torch.load reads it with weights_only.

        Raises:
            KeyError: as `get`.
        """
        asked = self.keys() if keys is None else keys
        places = self._places(_key_list(asked))
        rows = Targets.gather(places, torch.device("cpu")) if places else {}
        return {"format": self.format, "keys": asked.clone(), **rows}

    def restore(self, state: dict[str, Any], head: HeadFunction) -> None:
        """Add the rows of an `export`.

        Raises:
            ValueError: they have another format, or a key is stored already.
            TrainingError: every tier is full.
        """
        if state["format"] != self.format:
            raise ValueError(f"rows of format {state['format']} cannot go into a cache of format {self.format}")
        names = _key_list(state["keys"])
        self._refuse_known(names)
        if names:
            fields = {name: state[name].clone() for name in state if name not in ("format", "keys")}
            self._add(names, fields, head)

    def state_dict(self) -> dict[str, Any]:
        """Every row, as `export`."""
        return self.export()

    def load_state_dict(self, state: dict[str, Any], head: HeadFunction) -> None:
        """Hold exactly the rows of a `state_dict`; raises as `restore`."""
        self.clear()
        self.restore(state, head)

    def stats(self) -> dict[str, int]:
        """Rows stored, and bytes by tier."""
        used = {f"{tier}_bytes": 0 for tier in TIERS}
        for block in self._blocks:
            used[f"{block.tier}_bytes"] += block.num_bytes
        return {"rows": len(self._index), **used}

    # ---------------------------------------------------------------- rows

    @torch.no_grad()
    def _encode(self, hidden: Tensor, head: HeadFunction) -> dict[str, Tensor]:
        if self.format == "hidden":
            # A copy: a view would keep the caller's whole tensor alive, uncounted.
            return {"hidden": hidden.detach().to(self._dtype, copy=True)}
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, max(1, len(hidden)), _ENCODE_ROWS):
            logits = head(hidden[start : start + _ENCODE_ROWS])
            for name, tensor in encode_logits(self.format, logits, self._topk).items():
                parts.setdefault(name, []).append(tensor)
        return {name: torch.cat(tensors) for name, tensors in parts.items()}

    def _refuse_known(self, names: Sequence[Key]) -> None:
        known = next((k for k in names if k in self._index), None)
        if known is not None or len(set(names)) != len(names):
            raise ValueError(f"(example, visit, step) {known or 'within one call'} is stored already")

    def _places(self, names: Sequence[Key]) -> list[tuple[_Block, int]]:
        for key in names:
            if key not in self._index:
                raise KeyError(f"no teacher output for (example, visit, step) {key}")
        return [self._index[key] for key in names]

    def _add(self, names: Sequence[Key], fields: dict[str, Tensor], head: HeadFunction) -> None:
        """A new block, which is in the index only once there is room for it."""
        block = _Block({name: tensor.to(self._device) for name, tensor in fields.items()}, "device", {})
        self._make_room([*self._blocks, block])
        block.keys = dict(enumerate(names))
        self._blocks.append(block)
        self._index |= {key: (block, row) for row, key in block.keys.items()}
        self._head = head

    def _forget(self, names: Iterable[Key]) -> int:
        count, touched = 0, set()
        for key in names:
            block, row = self._index.pop(key)
            del block.keys[row]
            touched.add(block)
            count += 1
        for block in [b for b in self._blocks if b in touched]:
            if not block.keys:
                self._release(block)
            elif 2 * len(block.keys) < block.num_rows:
                self._rewrite(block)
        return count

    def _rewrite(self, block: _Block) -> None:
        """Copy a block's live rows into a new one of the same tier; targets handed out before keep the old one."""
        rows = torch.tensor(list(block.keys))
        fields = {name: tensor[rows.to(tensor.device)] for name, tensor in block.fields.items()}
        smaller = _Block(fields, "device", dict(enumerate(block.keys.values())))
        if block.tier != "device":
            try:
                self._move(smaller, block.tier)
            except TrainingError:
                return  # no room on the disk for the copy: the block stays as it is
        self._blocks[self._blocks.index(block)] = smaller
        self._index |= {key: (smaller, row) for row, key in smaller.keys.items()}
        _unlink(block)

    def _release(self, block: _Block) -> None:
        self._blocks.remove(block)
        _unlink(block)

    # ---------------------------------------------------------------- tiers

    def _make_room(self, blocks: Sequence[_Block]) -> None:
        """Move the oldest of `blocks` down until every tier is within its budget; an error leaves each block whole.

        Raises:
            TrainingError: there is no tier below, or it cannot be written.
        """
        goal = {id(block): block.tier for block in blocks}
        for tier, below in (("device", "host"), ("host", "disk")):
            members = [b for b in blocks if goal[id(b)] == tier]
            used = sum(b.num_bytes for b in members)
            for block in members:
                if used <= self._budgets[tier]:
                    break
                used -= block.num_bytes
                goal[id(block)] = below
        if self._disk_path is None and "disk" in goal.values():
            raise TrainingError(
                f"The teacher-output cache needs more than cache.device_budget_gib + cache.host_budget_gib "
                f"({sum(self._budgets.values()) / 2**30:.2f} GiB) and has no folder to go to. Raise "
                "cache.host_budget_gib, or use cache.format=hidden or topk."
            )
        # The lowest tier first: host memory is freed before more moves into it.
        for tier in ("disk", "host"):
            for block in blocks:
                if goal[id(block)] == tier != block.tier:
                    self._say_full(block.tier, tier)
                    self._move(block, tier)

    def _say_full(self, tier: str, below: str) -> None:
        # A block may skip host memory; what is full is the tier above the one it goes to.
        full = "device" if below == "host" else "host"
        if below not in self._said:
            self._said.add(below)
            logger.warning(
                "The teacher-output cache is over its %s budget (%.2f GiB); its oldest rows move to %s.",
                full,
                self._budgets[full] / 2**30,
                "host memory" if below == "host" else f"{self._disk_path}",
            )

    def _move(self, block: _Block, tier: str) -> None:
        if tier == "host":
            pin = self._device.type == "cuda"
            block.fields = {n: t.cpu().pin_memory() if pin else t.cpu() for n, t in block.fields.items()}
        else:
            try:
                block.fields = {name: self._to_file(block, name, t) for name, t in block.fields.items()}
            except TrainingError:
                _unlink(block)
                raise
        block.tier = tier

    def _to_file(self, block: _Block, name: str, tensor: Tensor) -> Tensor:
        """The same values in a memory-mapped file."""
        assert self._disk_path is not None
        path = self._disk_path / f"{self._next_file}-{name}.bin"
        self._next_file += 1
        try:
            self._disk_path.mkdir(parents=True, exist_ok=True)
            block.paths.append(path)
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


def _unlink(block: _Block) -> None:
    """Delete a block's files; a mapping that is still in use keeps its bytes until it goes."""
    for path in block.paths:
        path.unlink(missing_ok=True)
    block.paths.clear()


def _key_list(keys: Tensor) -> list[Key]:
    return [(int(a), int(b), int(c)) for a, b, c in keys.tolist()]
