"""What one layer remembers of a batch of rows: keys and values by slot, or a recurrent state, or both.

Keys and values lie in buffers that are allocated once for a whole call, for all rows and slots that it may ever need,
so nothing grows by copying. A *slot* is a place in them; which position of the text it holds, if any, is for
`kv_cache.py` to know. A recurrent or convolution state has no slots: it is one tensor a row, which every token
overwrites.

Letters: `B` rows of the buffers, `R` rows in use, `n` tokens of a pass, `C` slots of the buffers, `S` slots in use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from qswitch.models.architecture import HYBRID_LAYERS, DummyLayer, cache_layers
from qswitch.models.language_model import LanguageModel
from qswitch.rollout.transfer import OnEachDevice


class SlotBuffers:
    """Keys and values of one attention layer, [B, heads, C, width] each, allocated when the first ones come.

    They lie in the arithmetic of the passes, `dtype`, whatever they come in: where an embedding is kept in fp32, rotary
    positions make keys of fp32, which autocast would round at every pass.
    """

    def __init__(self, num_rows: int, num_slots: int, dtype: torch.dtype) -> None:
        self._num_rows, self._num_slots, self._dtype = num_rows, num_slots, dtype
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """What the layer holds."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values) if t is not None)

    @property
    def allocated(self) -> tuple[int, int]:
        """(B, C); (0, 0) before the first states."""
        return (0, 0) if self.keys is None else (self.keys.shape[0], self.keys.shape[2])

    def allocate(self, keys: Tensor, values: Tensor) -> None:
        """Make room like these states [R, heads, n, width]; does nothing a second time."""
        if self.keys is None:
            # Zeros: a stray NaN in a slot that nobody wrote would survive a weight of zero.
            self.keys, self.values = (
                x.new_zeros((self._num_rows, x.shape[1], self._num_slots, x.shape[3]), dtype=self._dtype)
                for x in (keys, values)
            )

    def pack(self, all_rows: OnEachDevice, all_slots: OnEachDevice, width: int) -> None:
        """Let the first rows be those of an index int64 [r], their slots, of an index int64 [r, w], end at `width`."""
        for buffer in (self.keys, self.values):
            if buffer is None:
                continue
            rows, slots = all_rows.on(buffer.device), all_slots.on(buffer.device)
            start = width - slots.shape[1]
            if len(rows):
                heads = torch.arange(buffer.shape[1], device=rows.device)[None, :, None]
                buffer[: len(rows), :, start:width] = buffer[rows[:, None, None], heads, slots[:, None, :]]


class SlotLayer(DynamicLayer):
    """Rows `first_row` and on of a layer's buffers, in use from slot `start` on, as transformers wants to see them."""

    def __init__(self, buffers: SlotBuffers, *, first_row: int = 0, start: int = 0, filled: int = 0) -> None:
        super().__init__()
        self.buffers = buffers
        self._first_row, self._start, self.filled = first_row, start, filled
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [R, heads, n, width] and return everything in use, [R, heads, S, width]."""
        self.buffers.allocate(key_states, value_states)
        begin = self._start + self.filled
        self.filled += key_states.shape[2]
        end = self._start + self.filled
        rows = slice(self._first_row, self._first_row + key_states.shape[0])
        keys, values = self.buffers.keys, self.buffers.values
        assert keys is not None and values is not None and end <= keys.shape[2], "the buffers were planned too small"
        keys[rows, :, begin:end] = key_states
        values[rows, :, begin:end] = value_states
        return keys[rows, :, self._start : end], values[rows, :, self._start : end]

    def get_seq_length(self) -> int:
        """S."""
        return self.filled


class HybridLayer(LinearAttentionLayer, SlotLayer):
    """A layer with attention and a recurrent state side by side (Falcon-H1, Zamba)."""

    is_compileable = False

    def __init__(self, buffers: SlotBuffers, number_of_states: int, **place: int) -> None:
        SlotLayer.__init__(self, buffers, **place)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)


CacheLayer: TypeAlias = "SlotLayer | HybridLayer | LinearAttentionLayer | DummyLayer"
LayerMaker: TypeAlias = "Callable[..., CacheLayer]"


def layer_makers(model: LanguageModel, num_rows: int, num_slots: int) -> list[Callable[..., CacheLayer]]:
    """What makes each layer's cache for R rows at a place of its buffers, as the configuration names the layers.

    Raises:
        ModelError: a layer remembers something that neither slots nor recurrent states can hold.
    """
    makers: list[Callable[..., CacheLayer]] = []
    size = (num_rows, num_slots, model.compute_dtype)
    for layer in cache_layers(model.config, type(model.causal_model).__name__):
        if isinstance(layer, HYBRID_LAYERS):
            makers.append(_hybrid(SlotBuffers(*size), layer.number_of_states))
        elif isinstance(layer, LinearAttentionLayer):
            makers.append(_recurrent(layer.number_of_states))
        elif isinstance(layer, DummyLayer):
            makers.append(_nothing)
        else:
            makers.append(_slots(SlotBuffers(*size)))
    return makers


def _nothing(**place: int) -> CacheLayer:
    return DummyLayer()


def _slots(buffers: SlotBuffers) -> Callable[..., CacheLayer]:
    return lambda **place: SlotLayer(buffers, **place)


def _recurrent(number_of_states: int) -> Callable[..., CacheLayer]:
    return lambda **place: LinearAttentionLayer(number_of_states=number_of_states)


def _hybrid(buffers: SlotBuffers, number_of_states: int) -> Callable[..., CacheLayer]:
    return lambda **place: HybridLayer(buffers, number_of_states, **place)


# ---------------------------------------------------------------- recurrent states


def recurrent_states(layers: Sequence[CacheLayer]) -> list[Tensor | None]:
    """Every recurrent and convolution state [R, ...] of the layers, in a fixed order; None before the first token."""
    return [getattr(layer, name)[i] for layer, name, i in _places(layers)]


def set_recurrent_states(layers: Sequence[CacheLayer], states: Sequence[Tensor | None]) -> None:
    """Let the layers go on from these states, given in the order of `recurrent_states`; None: from nothing."""
    for (layer, name, i), state in zip(_places(layers), states, strict=True):
        getattr(layer, name)[i] = state
        getattr(layer, f"is_{name}_initialized")[i] = state is not None
        if name == "conv_states":
            layer.has_previous_state[i] = state is not None
            if state is not None:
                layer.conv_kernel_size[i] = state.shape[-1]
                layer.dtype, layer.device = state.dtype, state.device


def _places(layers: Sequence[CacheLayer]) -> list[tuple[LinearAttentionLayer, str, int]]:
    return [
        (layer, name, i)
        for layer in layers
        if isinstance(layer, LinearAttentionLayer)
        for name in ("conv_states", "recurrent_states")
        for i in range(layer.number_of_states)
    ]


def copied(states: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Copies: the layers write into their states in place."""
    return [None if state is None else state.clone() for state in states]


def selected(states: Sequence[Tensor | None], rows: OnEachDevice) -> list[Tensor | None]:
    """The states of rows, an index int64 [r]."""
    return [None if state is None else state[rows.on(state.device)] for state in states]


def joined(
    first: Sequence[Tensor | None], num_first: int, second: Sequence[Tensor | None], num_second: int
) -> list[Tensor | None]:
    """The states of two groups of rows as one; a group that has read nothing has states of zeros."""
    result: list[Tensor | None] = []
    for a, b in zip(first, second, strict=True):
        if a is None and b is None:
            result.append(None)
        else:
            result.append(torch.cat([_or_zeros(a, num_first, b), _or_zeros(b, num_second, a)]))
    return result


def mixed(new_rows: Tensor, new: Sequence[Tensor | None], old: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The new states where `new_rows` bool [R], the old ones elsewhere."""
    is_new = OnEachDevice(new_rows)
    result: list[Tensor | None] = []
    for a, b in zip(new, old, strict=True):
        if a is None:
            result.append(None)
        else:
            result.append(torch.where(is_new.on(a.device).view(-1, *[1] * (a.dim() - 1)), a, _or_zeros(b, len(a), a)))
    return result


def _or_zeros(state: Tensor | None, num_rows: int, like: Tensor | None) -> Tensor:
    if state is not None:
        return state
    assert like is not None
    return like.new_zeros((num_rows, *like.shape[1:]))
