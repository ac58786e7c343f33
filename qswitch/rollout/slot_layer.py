"""Keys and values of one attention layer over the slots of a batch of rows, and how they grow and are packed anew.

A slot is a place in the cache; which position of the text it holds, if any, is `kv_cache.py`'s business.

Letters: `R` rows, `n` tokens of a pass, `S` slots in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

GROWTH_SLOTS = 64
"""Buffers grow by whole chunks of this many slots: a pass writes its own slots and seldom copies the others."""


class SlotLayer(DynamicLayer):
    """Keys and values of one attention layer, as views [R, heads, S, width] into larger buffers."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self._keys = _room(key_states, key_states.shape[0], 0)
        self.values, self._values = _room(value_states, value_states.shape[0], 0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [R, heads, n, width] and return everything in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self._keys = _append(self.keys, self._keys, key_states)
        self.values, self._values = _append(self.values, self._values, value_states)
        return self.keys, self.values

    def advance(self, num_slots: int) -> None:
        """Take slots into use that were written into the buffers directly."""
        end = self.keys.shape[2] + num_slots
        self.keys, self.values = self._keys[:, :, :end], self._values[:, :, :end]

    def move_to(self, keys: Tensor, values: Tensor) -> None:
        """Live on in the first rows of other buffers [>= R, heads, >= S, width]; nothing happens if it does already."""
        if self._keys.data_ptr() == keys.data_ptr():
            return
        num_rows, _, filled, _ = self.keys.shape
        keys[:num_rows, :, :filled] = self.keys
        values[:num_rows, :, :filled] = self.values
        self._keys, self._values = keys[:num_rows], values[:num_rows]
        self.keys, self.values = self._keys[:, :, :filled], self._values[:, :, :filled]

    def repacked(self, parts: Sequence[tuple[SlotLayer | None, Tensor, Tensor]], width: int) -> SlotLayer:
        """A layer of the rows of several, each given as (layer, rows [r], slots [r, w]); slots end at `width`."""
        result = SlotLayer()
        result.dtype, result.device, result.is_initialized = self.dtype, self.device, True
        num_rows = sum(len(rows) for _, rows, _ in parts)
        for name in ("keys", "values"):
            view, buffer = _room(getattr(self, name), num_rows, width)
            start = 0
            for layer, rows, slots in parts:
                target = view[start : start + len(rows)]
                start += len(rows)
                padding = width - slots.shape[1]
                target[:, :, :padding] = 0  # masked, but a stray NaN would survive a weight of zero
                if layer is not None:
                    heads = torch.arange(view.shape[1], device=rows.device)[None, :, None]
                    target[:, :, padding:] = getattr(layer, name)[rows[:, None, None], heads, slots[:, None, :]]
            setattr(result, name, view)
            setattr(result, f"_{name}", buffer)
        return result


def _room(like: Tensor, rows: int, filled: int) -> tuple[Tensor, Tensor]:
    """(view of the first `filled` slots, buffer) of `like`'s heads and width, with room to grow."""
    slots = -(-max(filled, 1) // GROWTH_SLOTS) * GROWTH_SLOTS
    buffer = like.new_empty((rows, like.shape[1], slots, like.shape[3]))
    return buffer[:, :, :filled], buffer


def _append(used: Tensor, buffer: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    filled, end = used.shape[2], used.shape[2] + states.shape[2]
    if end > buffer.shape[2]:
        larger = _room(buffer, buffer.shape[0], end)[1]
        larger[:, :, :filled] = used
        buffer = larger
    buffer[:, :, filled:end] = states
    return buffer[:, :, :end], buffer
