"""Passes of one token per row, recorded once as CUDA graphs and replayed: no Python and no kernel launches in between.

Python may need longer to launch the kernels of a small student's one-token pass than the GPU to run them. A recorded
pass reads and writes fixed places, so keys and values live in buffers of fixed size with a cursor on the device, and a
batch is padded to a power of two of rows, or to all. What is recorded serves one rollout call and is freed with it. A
model that cannot be recorded goes on as before.

Letters: `R` rows, `C` slots of the buffers, `S` slots in use, `D` hidden width.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from qswitch.models.language_model import LanguageModel
from qswitch.models.messages import first_line
from qswitch.rollout.slot_layer import SlotLayer

logger = logging.getLogger(__name__)

CAPACITY_SLOTS = 128
"""Buffers grow by whole chunks of this many slots; a larger buffer has to be recorded anew."""
EAGER_PASSES = 3
"""Passes of a size that run as usual before one is recorded: recording costs about that many."""

Replay = Callable[[], Tensor]
Record = Callable[[Callable[[], Tensor]], Replay]
"""Takes a pass over fixed places and returns what repeats it; the answer lies in the same place every time."""


class CudaRecorder:
    """Records passes as CUDA graphs that share one memory pool: they never run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Replay:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # libraries set themselves up in the first call, which must not be recorded
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = run()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


class FixedLayer(DynamicLayer):
    """Keys and values of one attention layer in buffers [R, heads, C, width], written at a cursor on the device."""

    def __init__(self, keys: Tensor, values: Tensor, cursor: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self._cursor = keys, values, cursor
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [R, heads, 1, width] at the cursor and return the whole buffers."""
        self.keys.index_copy_(2, self._cursor, key_states)
        self.values.index_copy_(2, self._cursor, value_states)
        return self.keys, self.values


@dataclass(frozen=True)
class _Recorded:
    """One recorded size: where its inputs lie, and how to repeat it."""

    tokens: Tensor
    positions: Tensor
    masks: dict[str, Tensor]
    replay: Replay


class StepGraphs:
    """Recorded one-token passes of `model` for one rollout call of at most `max_rows` rows; serves one `KVState` at a
    time."""

    def __init__(self, model: LanguageModel, max_rows: int, record: Record | None = None) -> None:
        self._model, self._max_rows = model, max_rows
        self._record = record or CudaRecorder()
        self._buffers: list[tuple[Tensor, ...]] = []
        self._cursor = torch.zeros(1, dtype=torch.int64, device=model.device)
        self._recorded: dict[int, _Recorded] = {}
        self._passes: Counter[int] = Counter()
        self.failure: str | None = None
        """Why nothing is recorded any more."""
        self.num_replays = 0

    def step(
        self, layers: Sequence[SlotLayer], tokens: Tensor, positions: Tensor, masks: Mapping[str, Tensor]
    ) -> Tensor | None:
        """Read one token per row, int64 [R, 1], into `layers`: hidden states [R, 1, D].

        `masks` [R, 1, 1, S] say, by kind of attention layer, which slots a row sees, the new one included. None: this
        pass is to be made as usual.
        """
        if self.failure is not None:
            return None
        num_rows, num_slots = len(tokens), next(iter(masks.values())).shape[-1]
        padded = min(1 << (num_rows - 1).bit_length(), max(self._max_rows, num_rows))
        self._hold(layers, padded, num_slots)
        if padded not in self._recorded:
            self._passes[padded] += 1
            if self._passes[padded] <= EAGER_PASSES:
                return None
        self._cursor.fill_(num_slots - 1)
        recorded = self._recorded.get(padded)
        if recorded is None:
            recorded = self._new(padded, masks)
        _fill(recorded, tokens, positions, masks)
        if padded not in self._recorded:
            try:
                recorded = self._recorded[padded] = self._recorded_pass(recorded)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a model does that cannot be recorded, it still runs as usual
                self.failure = first_line(error)
                logger.warning("Student passes are not recorded as CUDA graphs: %s", self.failure)
                return None
        hidden = recorded.replay()[:num_rows].clone()
        self.num_replays += 1
        for layer in layers:
            layer.advance(1)
        return hidden

    def keep(self, index: int, layer: SlotLayer) -> None:
        """Let a layer that was packed anew live in its fixed buffers again at once, where they hold it."""
        if self._buffers and self.failure is None:
            keys, values = self._buffers[index]
            if layer.keys.shape[0] <= keys.shape[0] and layer.keys.shape[2] < keys.shape[2]:
                layer.move_to(keys, values)

    def _hold(self, layers: Sequence[SlotLayer], padded: int, num_slots: int) -> None:
        """Let `layers` live in the fixed buffers, which grow where they are too small."""
        capacity = -(-num_slots // CAPACITY_SLOTS) * CAPACITY_SLOTS
        have = self._buffers[0][0].shape if self._buffers else (0, 0, 0, 0)
        if padded > have[0] or capacity > have[2]:
            rows, slots = max(padded, have[0]), max(capacity, have[2])
            self._recorded.clear()
            self._passes.clear()
            self._buffers = self._buffers or [()] * len(layers)
            for i, layer in enumerate(layers):  # one by one: an old buffer goes as its layer leaves it
                # Zeros: a stray NaN in a slot that nobody wrote would survive a weight of zero.
                self._buffers[i] = (_zeros(layer.keys, rows, slots), _zeros(layer.values, rows, slots))
                layer.move_to(*self._buffers[i])
        for layer, (keys, values) in zip(layers, self._buffers, strict=True):
            layer.move_to(keys, values)

    def _new(self, padded: int, masks: Mapping[str, Tensor]) -> _Recorded:
        device, capacity = self._model.device, self._buffers[0][0].shape[2]
        ids = torch.zeros((padded, 1), dtype=torch.int64, device=device)
        places = {kind: mask.new_zeros((padded, 1, 1, capacity)) for kind, mask in masks.items()}
        return _Recorded(ids, ids.clone(), places, _not_recorded)

    def _recorded_pass(self, places: _Recorded) -> _Recorded:
        padded = len(places.tokens)

        def run() -> Tensor:
            cache = Cache(layer_class_to_replicate=FixedLayer)
            cache.layers = [FixedLayer(k[:padded], v[:padded], self._cursor) for k, v in self._buffers]
            masks = places.masks if len(places.masks) > 1 else next(iter(places.masks.values()))
            return self._model.hidden(
                places.tokens, attention_mask=masks, position_ids=places.positions, past_key_values=cache
            )

        return _Recorded(places.tokens, places.positions, places.masks, self._record(run))


def _not_recorded() -> Tensor:
    raise AssertionError("a pass is replayed before it is recorded")


def _zeros(like: Tensor, rows: int, slots: int) -> Tensor:
    return like.new_zeros((rows, like.shape[1], slots, like.shape[3]))


def _fill(places: _Recorded, tokens: Tensor, positions: Tensor, masks: Mapping[str, Tensor]) -> None:
    """Put the inputs of R rows where the recorded pass reads them; the other rows see nothing but themselves."""
    num_rows = len(tokens)
    places.tokens[:num_rows] = tokens
    places.positions[:num_rows] = positions
    for kind, mask in masks.items():
        num_slots = mask.shape[-1]
        opened, closed = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
        place = places.masks[kind].fill_(closed)
        place[:num_rows, :, :, :num_slots] = mask
        place[num_rows:, :, :, num_slots - 1] = opened
