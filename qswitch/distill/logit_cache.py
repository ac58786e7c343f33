"""Teacher outputs kept between rollout and training, so that the teacher does not run twice.

Rows are addressed by (example id, visit, step) and stored in one of four formats. Blocks of rows live on the device, in
host memory or in a file; where a tier is full its oldest blocks move down a tier, and that is said once. No row is ever
dropped silently. Knows no model: a head is any callable from hidden states to logits.

Letters: `N` rows, `D` teacher width, `V` shared vocabulary.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qswitch.errors import TrainingError

logger = logging.getLogger(__name__)

HeadFunction = Callable[[Tensor], Tensor]
Key = tuple[int, int, int]
FORMATS = ("hidden", "bf16", "int8", "topk")
_ENCODE_ROWS = 256
"""Rows projected to the vocabulary at a time while encoding."""


@dataclass(frozen=True, slots=True)
class LogitTargets:
    """Teacher logits [n, V]."""

    logits: Tensor


@dataclass(frozen=True, slots=True)
class TopkTargets:
    """The k largest teacher log-probabilities [n, k], their ids [n, k] and the log-probability of the rest [n]."""

    log_probs: Tensor
    ids: Tensor
    tail_log_prob: Tensor


@dataclass(slots=True)
class _Block:
    """Rows that were put together, field by field; `live` counts those not dropped."""

    fields: dict[str, Tensor]
    tier: str
    live: int
    paths: list[Path] = field(default_factory=list)

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
        block = _Block({"hidden": hidden}, "device", len(hidden))
        return cls("hidden", [(block, i) for i in range(len(hidden))], head, hidden.dtype)

    @property
    def num_positions(self) -> int:
        return len(self._places)

    def chunk(self, start: int, stop: int, device: torch.device) -> LogitTargets | TopkTargets:
        """The teacher's outputs of positions start..stop on `device`; nothing else is moved or computed."""
        rows = self._gather(self._places[start:stop], device)
        if self._format == "hidden":
            return LogitTargets(self._head(rows["hidden"].to(self._score_dtype)))
        if self._format == "bf16":
            return LogitTargets(rows["logits"].float())
        if self._format == "int8":
            return LogitTargets(rows["values"].float() * rows["scale"][:, None])
        return TopkTargets(rows["log_probs"], rows["ids"].long(), rows["tail"])

    @staticmethod
    def _gather(places: Sequence[tuple[_Block, int]], device: torch.device) -> dict[str, Tensor]:
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
        self._blocks: OrderedDict[int, _Block] = OrderedDict()
        self._index: dict[Key, tuple[_Block, int]] = {}
        self._head: HeadFunction | None = None
        self._next_block = self._next_file = 0
        self._said: set[str] = set()

    def put(self, keys: Tensor, hidden: Tensor, head: HeadFunction) -> None:
        """Store rows: keys int64 [N, 3], the teacher's final hidden states [N, D], its head.

        Raises:
            ValueError: numbers of keys and rows differ, or a key is stored already.
            TrainingError: every tier is full.
        """
        names = _key_list(keys)
        if len(names) != len(hidden):
            raise ValueError(f"{len(names)} keys for {len(hidden)} rows")
        known = next((k for k in names if k in self._index), None)
        if known is not None or len(set(names)) != len(names):
            raise ValueError(f"(example, visit, step) {known or 'within one call'} is stored already")
        self._head = head
        block = _Block(self._encode(hidden, head), "device", len(names))
        block.fields = {name: tensor.to(self._device) for name, tensor in block.fields.items()}
        self._blocks[self._next_block] = block
        self._next_block += 1
        self._index |= {key: (block, row) for row, key in enumerate(names)}
        self._make_room()

    def get(self, keys: Tensor) -> Targets:
        """Targets of the keys int64 [N, 3], in that order.

        Raises:
            KeyError: a key that was never put, or was dropped.
        """
        places = []
        for key in _key_list(keys):
            if key not in self._index:
                raise KeyError(f"no teacher output for (example, visit, step) {key}")
            places.append(self._index[key])
        assert self._head is not None or not places
        return Targets(self.format, places, self._head or (lambda hidden: hidden), self._dtype)

    def drop(self, example_id: int, visit: int) -> None:
        """Forget every step of one rollout."""
        for key in [k for k in self._index if k[:2] == (example_id, visit)]:
            block, _ = self._index.pop(key)
            block.live -= 1
        self._release([number for number, block in self._blocks.items() if block.live == 0])

    def clear(self) -> None:
        """Forget everything."""
        self._index.clear()
        self._release(list(self._blocks))

    def stats(self) -> dict[str, int]:
        """Rows stored, and bytes by tier."""
        used = {f"{tier}_bytes": 0 for tier in ("device", "host", "disk")}
        for block in self._blocks.values():
            used[f"{block.tier}_bytes"] += block.num_bytes
        return {"rows": len(self._index), **used}

    # ---------------------------------------------------------------- formats

    @torch.no_grad()
    def _encode(self, hidden: Tensor, head: HeadFunction) -> dict[str, Tensor]:
        if self.format == "hidden":
            # A copy: a view would keep the caller's whole tensor alive, uncounted.
            return {"hidden": hidden.detach().to(self._dtype, copy=True)}
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, len(hidden), _ENCODE_ROWS):
            logits = head(hidden[start : start + _ENCODE_ROWS])
            for name, tensor in self._encode_logits(logits).items():
                parts.setdefault(name, []).append(tensor)
        return {name: torch.cat(tensors) for name, tensors in parts.items()}

    def _encode_logits(self, logits: Tensor) -> dict[str, Tensor]:
        if self.format == "topk":
            every = torch.log_softmax(logits.float(), dim=-1)
            log_probs, ids = every.topk(self._topk, dim=-1)
            # Summing the rest itself: 1 minus the sum of the largest loses a small tail to rounding.
            tail = every.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)
            return {"log_probs": log_probs, "ids": ids.int(), "tail": tail}
        # Softmax ignores a constant per row; centred logits use the small floats, and both signs of int8.
        centred = logits.float() - logits.float().mean(dim=-1, keepdim=True)
        if self.format == "bf16":
            return {"logits": centred.bfloat16()}
        scale = centred.abs().amax(dim=-1).clamp_min(1e-12) / 127
        return {"values": (centred / scale[:, None]).round().to(torch.int8), "scale": scale}

    # ---------------------------------------------------------------- tiers

    def _make_room(self) -> None:
        for tier, below in (("device", "host"), ("host", "disk")):
            used = self.stats()[f"{tier}_bytes"]
            for block in list(self._blocks.values()):  # oldest first
                if used <= self._budgets[tier]:
                    break
                if block.tier == tier:
                    used -= block.num_bytes
                    self._move(block, below)

    def _move(self, block: _Block, tier: str) -> None:
        if tier not in self._said:
            self._said.add(tier)
            logger.warning(
                "The teacher-output cache is over its %s budget (%.2f GiB); its oldest rows move to %s.",
                block.tier,
                self._budgets[block.tier] / 2**30,
                "host memory" if tier == "host" else f"{self._disk_path}",
            )
        if tier == "host":
            pin = self._device.type == "cuda"
            block.fields = {n: t.cpu().pin_memory() if pin else t.cpu() for n, t in block.fields.items()}
        else:
            block.fields = {name: self._to_file(block, name, t) for name, t in block.fields.items()}
        block.tier = tier

    def _to_file(self, block: _Block, name: str, tensor: Tensor) -> Tensor:
        """The same values in a memory-mapped file."""
        if self._disk_path is None:
            raise TrainingError(
                f"The teacher-output cache needs more than cache.device_budget_gib + cache.host_budget_gib "
                f"({sum(self._budgets.values()) / 2**30:.2f} GiB) and has no folder to go to. Raise "
                "cache.host_budget_gib, or use cache.format=hidden or topk."
            )
        self._disk_path.mkdir(parents=True, exist_ok=True)
        path = self._disk_path / f"{self._next_file}-{name}.bin"
        self._next_file += 1
        try:
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
        block.paths.append(path)
        return mapped.view(tensor.shape)

    def _release(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            block = self._blocks.pop(number)
            for path in block.paths:
                path.unlink(missing_ok=True)


def _key_list(keys: Tensor) -> list[Key]:
    return [(int(a), int(b), int(c)) for a, b, c in keys.tolist()]
