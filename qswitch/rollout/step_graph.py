"""Passes of one token per row, recorded once as CUDA graphs and replayed: no Python and no kernel launches in between.

Python may need longer to launch the kernels of a small student's one-token pass than the GPU to run them. A recorded
pass reads and writes fixed places: the buffers of keys and values, which stay where they are for a whole rollout call,
with a cursor on the device. A batch is padded to a power of two of rows, or to all. What is recorded serves one rollout
call and is freed with it. A model that cannot be recorded goes on as before.

Letters: `R` rows, `C` slots that a recorded pass reads, `S` slots in use, `D` hidden width.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer

from qswitch.models.language_model import LanguageModel
from qswitch.models.messages import first_line
from qswitch.rollout.cache_layers import CacheLayer, SlotBuffers, SlotLayer

logger = logging.getLogger(__name__)

SPAN_SLOTS = 128
"""A recorded pass reads whole spans of this many slots; where one more is needed, it is recorded anew."""
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
    """Keys and values of one attention layer, [R, heads, C, width] of its buffers, written at a cursor there."""

    def __init__(self, buffers: SlotBuffers, num_rows: int, num_slots: int, cursor: Tensor) -> None:
        super().__init__()
        assert buffers.keys is not None and buffers.values is not None
        self.keys, self.values = (x[:num_rows, :, :num_slots] for x in (buffers.keys, buffers.values))
        self._cursor = cursor
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [R, heads, 1, width] at the cursor and return all C slots."""
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
    """Recorded one-token passes of `model` for one rollout call; serves one `KVState`."""

    def __init__(self, model: LanguageModel, record: Record | None = None) -> None:
        self._model = model
        self._record = record or CudaRecorder()
        self._cursor = torch.zeros(1, dtype=torch.int64, device=model.device)
        self._recorded: dict[int, _Recorded] = {}
        self._passes: Counter[int] = Counter()
        self._span = 0
        self.failure: str | None = None
        """Why nothing is recorded any more."""
        self.num_replays = 0

    def step(
        self, layers: Sequence[CacheLayer], tokens: Tensor, positions: Tensor, masks: Mapping[str, Tensor]
    ) -> Tensor | None:
        """Read one token per row, int64 [R, 1], into `layers`: hidden states [R, 1, D].

        `masks` [R, 1, 1, S] say, by kind of attention layer, which slots a row sees, the new one included. None: this
        pass is to be made as usual.
        """
        slot_layers = [layer for layer in layers if isinstance(layer, SlotLayer)]
        max_rows, capacity = slot_layers[0].buffers.allocated
        if self.failure is not None or capacity == 0:
            return None
        num_rows, num_slots = len(tokens), next(iter(masks.values())).shape[-1]
        if num_slots > self._span:
            self._span = min(-(-num_slots // SPAN_SLOTS) * SPAN_SLOTS, capacity)
            self._recorded.clear()
            self._passes.clear()
        padded = min(1 << (num_rows - 1).bit_length(), max_rows)
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
                recorded = self._recorded[padded] = self._recorded_pass(recorded, layers)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a model does that cannot be recorded, it still runs as usual
                self.failure = first_line(error)
                logger.warning("Student passes are not recorded as CUDA graphs: %s", self.failure)
                return None
        hidden = recorded.replay()[:num_rows].clone()
        self.num_replays += 1
        for layer in slot_layers:
            layer.filled += 1
        return hidden

    def _new(self, padded: int, masks: Mapping[str, Tensor]) -> _Recorded:
        ids = torch.zeros((padded, 1), dtype=torch.int64, device=self._model.device)
        places = {kind: mask.new_zeros((padded, 1, 1, self._span)) for kind, mask in masks.items()}
        return _Recorded(ids, ids.clone(), places, _not_recorded)

    def _recorded_pass(self, places: _Recorded, layers: Sequence[CacheLayer]) -> _Recorded:
        padded = len(places.tokens)

        def run() -> Tensor:
            fixed = [
                FixedLayer(layer.buffers, padded, self._span, self._cursor)
                if isinstance(layer, SlotLayer)
                else DummyLayer()
                for layer in layers
            ]
            masks = places.masks if len(places.masks) > 1 else next(iter(places.masks.values()))
            return self._model.hidden(
                places.tokens,
                attention_mask=masks,
                position_ids=places.positions,
                past_key_values=Cache(layers=fixed),
            )

        return _Recorded(places.tokens, places.positions, places.masks, self._record(run))


def _not_recorded() -> Tensor:
    raise AssertionError("a pass is replayed before it is recorded")


def _fill(places: _Recorded, tokens: Tensor, positions: Tensor, masks: Mapping[str, Tensor]) -> None:
    """Put the inputs of R rows where the recorded pass reads them; the other rows see nothing but themselves."""
    num_rows = len(tokens)
    places.tokens[:num_rows] = tokens
    places.positions[:num_rows] = positions
    for kind, mask in masks.items():
        num_slots = mask.shape[-1]
        place = places.masks[kind].fill_(torch.finfo(mask.dtype).min)
        place[:num_rows, :, :, :num_slots] = mask
        place[num_rows:, :, :, num_slots - 1] = 0.0
