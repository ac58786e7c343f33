"""Passes of few tokens per row, recorded once as CUDA graphs and replayed: no Python and no launches in between.

Python may need longer to launch the kernels of a pass than the GPU to run them. A recorded pass reads and writes fixed
places: the buffers of keys and values, which stay where they are for a whole rollout call, with a cursor on the device.
A batch is padded to a power of two of rows, or to all. Each number of rows, of tokens and of spans that are read is
recorded by itself, after a few passes as usual. Small buffers, and what was recorded over them, are kept from one call
to the next; large ones are given back, since training needs their memory. A model that cannot be recorded goes on as
before.

Letters: `R` rows, `n` tokens of a pass, `C` slots that a recorded pass reads, `S` slots in use, `D` hidden width.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from qswitch.errors import is_out_of_memory
from qswitch.models.architecture import DummyLayer
from qswitch.models.language_model import LanguageModel
from qswitch.models.messages import first_line
from qswitch.rollout.cache_layers import CacheLayer, LayerMaker, SlotBuffers, SlotLayer, layer_makers

logger = logging.getLogger(__name__)

SPAN_SLOTS = 128
"""A recorded pass reads whole spans of this many slots; where one more is needed, it is recorded anew."""
EAGER_PASSES = 3
"""Passes of a size that run as usual before one is recorded: recording costs about that many."""

NO_ROOM = "recorded passes do not fit beside the rest"

Replay = Callable[[], Tensor]
Record = Callable[[Callable[[], Tensor]], Replay]
"""Takes a pass over fixed places and returns what repeats it; the answer lies in the same place every time."""


class CudaRecorder:
    """Records passes of one model as CUDA graphs that share one memory pool: they never run at once.

    A recorded product of cuBLAS writes into the workspace of the stream that it was recorded on, and where a graph of a
    stream goes, torch may take that workspace away. So the graphs of a model, which go together, have a stream of their
    own, and those that are recorded after all have gone have a pool of their own.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool: Any = None
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, run: Callable[[], Tensor]) -> Replay:
        """Raises RuntimeError where the host waits for the device in the pass; a capture that failed for it would leave
        torch's allocator as if it still went on."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()  # libraries set themselves up in the first call, which must not be recorded
            with _waits_are_errors():
                run()
        current.wait_stream(self._stream)
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                output = run()
        except BaseException:
            torch.cuda.set_stream(current)  # the block leaves its own current when its end fails
            raise
        self._graphs.add(graph)

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


@contextmanager
def _waits_are_errors() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]ynchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


_recorders: WeakKeyDictionary[LanguageModel, Record] = WeakKeyDictionary()
"""What is tried, timed and then used of a model is recorded by one recorder: every stream keeps a workspace."""


def _recorder_of(model: LanguageModel) -> Record:
    if model not in _recorders:
        _recorders[model] = CudaRecorder()
    return _recorders[model]


class FixedLayer(DynamicLayer):
    """Keys and values of one attention layer, [R, heads, C, width] of its buffers, written at a cursor there."""

    def __init__(self, buffers: SlotBuffers, num_rows: int, num_slots: int, cursor: Tensor) -> None:
        super().__init__()
        assert buffers.keys is not None and buffers.values is not None
        self.keys, self.values = (x[:num_rows, :, :num_slots] for x in (buffers.keys, buffers.values))
        self._cursor = cursor
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [R, heads, n, width] at the cursor, int64 [n], and return all C slots."""
        self.keys.index_copy_(2, self._cursor, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self._cursor, value_states.to(self.values.dtype))
        return self.keys, self.values


@dataclass(frozen=True)
class _Recorded:
    """One recorded size: where its inputs lie, and how to repeat it."""

    tokens: Tensor
    positions: Tensor
    cursor: Tensor
    masks: dict[str, Tensor]
    replay: Replay


_Size = tuple[int, int, int]
"""(rows after padding, tokens, slots that are read)."""


class StepGraphs:
    """Recorded passes of `model`; serves one `KVState` at a time.

    Args:
        role: what messages call the model.
        kept_bytes: buffers up to this size, and what was recorded over them, are kept from call to call. 0 where the
            weights that a pass reads lie elsewhere in every call.
    """

    def __init__(
        self, model: LanguageModel, record: Record | None = None, *, role: str = "student", kept_bytes: int = 0
    ) -> None:
        self._model, self._role, self._kept_bytes = model, role, kept_bytes
        self._record = record
        self._recorded: dict[_Size, _Recorded] = {}
        self._passes: Counter[_Size] = Counter()
        self._makers: list[LayerMaker] = []
        self._room = (0, 0)
        self.failure: str | None = None
        """Why nothing is recorded any more."""
        self.num_replays = 0
        self.num_recorded = 0

    def layer_makers(self, num_rows: int, num_slots: int) -> list[LayerMaker]:
        """As `cache_layers.layer_makers`; over the buffers of an earlier call where those are kept and large enough."""
        if not self._makers or num_rows > self._room[0] or num_slots > self._room[1]:
            self.forget()
            self._room = (max(num_rows, self._room[0]), max(num_slots, self._room[1]))
            self._makers = layer_makers(self._model, *self._room)
        return self._makers

    def call_ends(self, buffer_bytes: int) -> None:
        """Keep buffers of this size and what was recorded over them, or give both back."""
        if buffer_bytes > self._kept_bytes:
            self.forget()
            self._room = (0, 0)

    def forget(self) -> None:
        """Give back the buffers and what was recorded over them."""
        self._recorded.clear()
        self._passes.clear()
        self._makers = []

    def step(
        self, layers: Sequence[CacheLayer], tokens: Tensor, positions: Tensor, masks: Mapping[str, Tensor]
    ) -> Tensor | None:
        """Read tokens int64 [R, n] into `layers`: hidden states [R, n, D].

        `masks` [R, 1, n, S] say, by kind of attention layer, which slots a row sees, the new ones included. None: this
        pass is to be made as usual.
        """
        slot_layers = [layer for layer in layers if isinstance(layer, SlotLayer)]
        max_rows, capacity = slot_layers[0].buffers.allocated
        if self.failure is not None or capacity == 0:
            return None
        num_rows, num_tokens = tokens.shape
        num_slots = next(iter(masks.values())).shape[-1]
        span = min(-(-num_slots // SPAN_SLOTS) * SPAN_SLOTS, capacity)
        size = (min(1 << (num_rows - 1).bit_length(), max_rows), num_tokens, span)
        recorded = self._recorded.get(size)
        if recorded is None:
            self._passes[size] += 1
            if self._passes[size] <= EAGER_PASSES:
                return None
            recorded = self._places(size, masks)
        _fill(recorded, tokens, positions, masks)
        if size not in self._recorded:
            try:
                recorded = self._recorded[size] = self._recorded_pass(size, recorded, layers)
            except Exception as error:  # whatever a model does that cannot be recorded, it still runs as usual
                self.failure = NO_ROOM if is_out_of_memory(error, surely=True) else first_line(error)
            if self.failure is not None:
                logger.warning("The %s's passes are not recorded as CUDA graphs: %s", self._role, self.failure)
                self._recorded.clear()
                if self._model.device.type == "cuda":
                    torch.cuda.empty_cache()
                return None
        hidden = recorded.replay()[:num_rows].clone()
        self.num_replays += 1
        for layer in slot_layers:
            layer.filled += num_tokens
        return hidden

    def _places(self, size: _Size, masks: Mapping[str, Tensor]) -> _Recorded:
        rows, num_tokens, span = size
        device = self._model.device
        ids = torch.zeros((rows, num_tokens), dtype=torch.int64, device=device)
        cursor = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        places = {kind: mask.new_zeros((rows, 1, num_tokens, span)) for kind, mask in masks.items()}
        return _Recorded(ids, ids.clone(), cursor, places, _not_recorded)

    def _recorded_pass(self, size: _Size, places: _Recorded, layers: Sequence[CacheLayer]) -> _Recorded:
        rows, _, span = size

        def run() -> Tensor:
            fixed = [
                FixedLayer(layer.buffers, rows, span, places.cursor) if isinstance(layer, SlotLayer) else DummyLayer()
                for layer in layers
            ]
            masks = places.masks if len(places.masks) > 1 else next(iter(places.masks.values()))
            return self._model.hidden(
                places.tokens,
                attention_mask=masks,
                position_ids=places.positions,
                past_key_values=Cache(layers=fixed),
            )

        if self._record is None:
            self._record = _recorder_of(self._model)
        self.num_recorded += 1
        return replace(places, replay=self._record(run))


def _not_recorded() -> Tensor:
    raise AssertionError("a pass is replayed before it is recorded")


def _fill(places: _Recorded, tokens: Tensor, positions: Tensor, masks: Mapping[str, Tensor]) -> None:
    """Put the inputs of R rows where the recorded pass reads them; the other rows see nothing but one of their own."""
    num_rows, num_tokens = tokens.shape
    num_slots = next(iter(masks.values())).shape[-1]
    torch.arange(num_slots - num_tokens, num_slots, out=places.cursor)
    places.tokens[:num_rows] = tokens
    places.positions[:num_rows] = positions
    for kind, mask in masks.items():
        place = places.masks[kind].fill_(torch.finfo(mask.dtype).min)
        place[:num_rows, :, :, :num_slots] = mask
        place[num_rows:, :, :, num_slots - 1] = 0.0
