"""What a model remembers of the rows it is decoding: keys, values and states, and which position every slot holds.

The state of one model over a batch of rows that advance by different amounts. A *slot* is a place in the cache, a
*position* a place in the text. They differ, because prompts are left-padded and drafts that were taken back leave
holes, so every pass gets explicit `position_ids` and a 4-D mask made from the positions of the slots, one per kind of
attention layer: exact for sliding windows too, which transformers counts in slots.

A recurrent or convolution layer has no slots to mask: what it has read is mixed into one state. So a block begins with
a copy of these states, and where only a part of it stands, the states go back and read that part again: a rejected
draft leaves no trace. Knows nothing of the noise, of policies or of the other model.

Letters: `R` rows, `n` tokens of a pass, `P` longest prompt of those that join, `S` slots in use, `D` hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from qswitch.models.language_model import LanguageModel
from qswitch.rollout.attention_masks import EMPTY, MaskMaker
from qswitch.rollout.cache_layers import (
    SlotLayer,
    copied,
    joined,
    layer_makers,
    mixed,
    recurrent_states,
    selected,
    set_recurrent_states,
)
from qswitch.rollout.step_graph import StepGraphs
from qswitch.rollout.transfer import OnEachDevice, to_device

MAX_HOLE_SHARE = 0.25
"""Holes, as a share of the live slots, beyond which a state is packed anew."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Rows that join: left-padded token ids int64 [r, P], which are live bool [r, P], and on the host how many."""

    ids: Tensor
    live: Tensor
    live_counts: np.ndarray


class KVState:
    """What `model` remembers of up to `max_rows` rows of at most `num_slots` slots; it has no rows at first.

    All memory for keys and values is allocated with the first prompts and kept. With `graphs`, passes over tokens that
    follow are replayed; no other state may use the same graphs meanwhile.

    Raises:
        ModelError: the model remembers something, or attends in a way, that cannot be kept row by row.
    """

    def __init__(
        self, model: LanguageModel, max_rows: int, num_slots: int, *, graphs: StepGraphs | None = None
    ) -> None:
        self._model, self._capacity = model, num_slots
        self._masks = MaskMaker(model)
        self._makers = (
            layer_makers(model, max_rows, num_slots) if graphs is None else graphs.layer_makers(max_rows, num_slots)
        )
        self._layers = [make() for make in self._makers]
        self._slot_layers = [layer for layer in self._layers if isinstance(layer, SlotLayer)]
        self.is_recurrent = bool(recurrent_states(self._layers))
        self._graphs = None if self.is_recurrent else graphs
        # On the device: int64 (R, S) position held by each slot, or EMPTY; int64 (R,) tokens read.
        self._slots = torch.empty((0, 0), dtype=torch.int64, device=model.device)
        self._lengths = torch.zeros(0, dtype=torch.int64, device=model.device)
        # The same in numbers that the host knows without asking the device: where each row starts, what it holds.
        self._first = np.zeros(0, dtype=np.int64)
        self._live = np.zeros(0, dtype=np.int64)
        # Of a model with recurrent layers: its states when the block began, and what it has read since.
        self._before: list[Tensor | None] | None = None
        self._read: list[Tensor] = []
        self.num_rereads = 0
        """Passes over what stood of a block, after recurrent states had to go back."""

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self._live)

    @property
    def num_slots(self) -> int:
        """S."""
        return self._slots.shape[1]

    @property
    def buffer_bytes(self) -> int:
        """Keys and values of all layers, as allocated."""
        return sum(layer.buffers.num_bytes for layer in self._slot_layers)

    @property
    def replays(self) -> bool:
        """Whether passes are recorded and replayed."""
        return self._graphs is not None

    @property
    def hole_share(self) -> float:
        """Dead slots behind a row's first live one, as a share of all live slots; left padding is no hole."""
        return float((self.num_slots - self._first - self._live).sum() / max(self._live.sum(), 1))

    # ---------------------------------------------------------------- reading

    def begin_block(self, num_steps: int) -> None:
        """Make room for a block of `num_steps` tokens a row, and remember where it begins.

        The next `append`s are of this block, until `take_back` says what of it stands. Without it, `take_back` has
        nothing to go back to: a block of one step, all of which stands, does without.
        """
        if self.num_slots + num_steps > self._capacity:
            self.repack(np.arange(self.num_rows))
        self._read = []
        self._before = copied(recurrent_states(self._layers)) if self.is_recurrent and num_steps > 1 else None

    def append(self, tokens: Tensor, live: Tensor, live_counts: np.ndarray) -> Tensor:
        """Read `n` more tokens per row: int64 [R, n], bool [R, n] -> their final hidden states [R, n, D].

        The live tokens of a row come first; the others are padding: they are read to keep the shape and never seen
        again. `live_counts` is `live.sum(1)`, which the caller knows without asking the device.
        """
        positions = self._advance(live, live_counts)
        masks, position_ids = self._masks(self._slots, positions), positions.clamp_min(0)
        if self._before is not None:
            self._read.append(tokens)
        if self._graphs is not None:
            hidden = self._graphs.step(self._layers, tokens, position_ids, masks)
            if hidden is not None:
                return hidden
        stays = self.is_recurrent and not live_counts.all()
        before = copied(recurrent_states(self._layers)) if stays else []
        hidden = self._model.hidden(
            tokens,
            attention_mask=self._masks.as_model_takes_them(masks),
            position_ids=position_ids,
            past_key_values=Cache(layers=self._layers),
        )
        if stays:
            set_recurrent_states(self._layers, mixed(live[:, 0], recurrent_states(self._layers), before))
        return hidden

    def _advance(self, live: Tensor, live_counts: np.ndarray) -> Tensor:
        """Take `n` slots into use for tokens bool [R, n]; their positions int64 [R, n]."""
        order = live.long().cumsum(dim=1)
        positions = torch.where(live, self._lengths[:, None] + order - 1, EMPTY)
        fresh = self._live == 0
        self._first[fresh] = self.num_slots
        self._live = self._live + live_counts
        self._slots = torch.cat([self._slots, positions], dim=1)
        self._lengths = self._lengths + order[:, -1]
        return positions

    def take_back(self, num_appended: int, kept: Tensor, kept_counts: np.ndarray, live_counts: np.ndarray) -> None:
        """Of the last `num_appended` slots, whose live tokens come first, keep only the first `kept` int64 [R] a row.

        On the host, `kept_counts` is the same as `kept`, and `live_counts` says how many of those slots were live.
        """
        if self.is_recurrent:
            # Read one by one, tokens that are not live leave no trace; in one pass they do.
            one_by_one = len(self._read) == num_appended
            stands = kept_counts == (live_counts if one_by_one or num_appended == 1 else num_appended)
            if not (stands | (kept_counts == 0)).all():
                self._read_again(num_appended, kept, kept_counts, live_counts)
                return
            if not stands.all():
                assert self._before is not None, "take_back without begin_block"
                new_rows = to_device(stands, kept.device)
                set_recurrent_states(self._layers, mixed(new_rows, recurrent_states(self._layers), self._before))
            self._before = None
        self._drop(num_appended, kept, kept_counts, live_counts)

    def _drop(self, num_appended: int, kept: Tensor, kept_counts: np.ndarray, live_counts: np.ndarray) -> None:
        tail = self._slots[:, self.num_slots - num_appended :]
        rejected = (tail != EMPTY) & (torch.arange(num_appended, device=tail.device) >= kept[:, None])
        self._lengths = self._lengths - rejected.sum(dim=1)
        unused = num_appended - int(kept_counts.max(initial=0))  # trailing slots that no row needs
        tail = tail.masked_fill(rejected, EMPTY)[:, : num_appended - unused]
        self._slots = torch.cat([self._slots[:, : self.num_slots - num_appended], tail], dim=1)
        self._live = self._live - (live_counts - kept_counts)
        for layer in self._slot_layers:
            layer.filled = self.num_slots

    def _read_again(self, num_appended: int, kept: Tensor, kept_counts: np.ndarray, live_counts: np.ndarray) -> None:
        """Go back to where the block began and read what stands: one pass for each different number of tokens."""
        assert self._before is not None, "take_back without begin_block"
        tokens = torch.cat(self._read, dim=1)
        self._drop(num_appended, torch.zeros_like(kept), np.zeros_like(kept_counts), live_counts)
        set_recurrent_states(self._layers, self._before)
        self._before = None
        begin = 0
        for end in sorted({int(count) for count in kept_counts if count}):
            # Every row reads all of a stretch or nothing of it, so no padding gets into a state.
            live = (kept >= end)[:, None].expand(-1, end - begin)
            self.append(tokens[:, begin:end], live, (kept_counts >= end) * (end - begin))
            self.num_rereads += 1
            begin = end

    # ---------------------------------------------------------------- rows come and go

    def repack(self, rows: np.ndarray, prompts: Prompts | None = None) -> None:
        """Keep only `rows` (indices, in that order), leave no holes, and let the rows of `prompts` join behind them."""
        device = self._slots.device
        counts = prompts.live_counts if prompts is not None else np.zeros(0, dtype=np.int64)
        live = np.concatenate([self._live[rows], counts])
        width = int(live.max(initial=0))
        index = to_device(rows, device)
        held = self._slots[index]
        # A stable sort by "is live" puts the live slots last and keeps their order.
        order = torch.sort((held != EMPTY).long(), dim=1, stable=True).indices
        order = order[:, max(held.shape[1] - width, 0) :]
        slots = torch.full((len(live), width), EMPTY, dtype=torch.int64, device=device)
        if order.shape[1]:
            slots[: len(rows), width - order.shape[1] :] = held.gather(1, order)
        rows_everywhere, order_everywhere = OnEachDevice(index), OnEachDevice(order)
        for layer in self._slot_layers:
            layer.buffers.pack(rows_everywhere, order_everywhere, width)
            layer.filled = width
        if self.is_recurrent:
            set_recurrent_states(self._layers, selected(recurrent_states(self._layers), rows_everywhere))
        self._lengths = self._lengths[index]
        self._live, self._first = live, width - live
        self._slots = slots
        if prompts is not None:
            self._lengths = torch.cat([self._lengths, prompts.live.sum(dim=1)])
            self._read_prompts(prompts, len(rows), width)

    def _read_prompts(self, prompts: Prompts, first_row: int, width: int) -> None:
        """Read left-padded prompts into the rows from `first_row` on, so that they end at slot `width`."""
        num_rows, length = prompts.ids.shape
        layers = [make(first_row=first_row, start=width - length) for make in self._makers]
        if length:
            positions = torch.where(prompts.live, prompts.live.long().cumsum(dim=1) - 1, EMPTY)
            self._slots[first_row:, width - length :] = positions
            masks = self._masks(positions, positions, padding=prompts.live)
            self._model.hidden(
                prompts.ids,
                attention_mask=self._masks.as_model_takes_them(masks),
                position_ids=positions.clamp_min(0),
                past_key_values=Cache(layers=layers),
            )
        if self.is_recurrent:
            states = joined(recurrent_states(self._layers), first_row, recurrent_states(layers), num_rows)
            set_recurrent_states(self._layers, states)
