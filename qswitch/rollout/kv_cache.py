"""What a model remembers of the rows it is decoding: keys, values, and which position every slot holds.

The state of one model over a batch of rows that advance by different amounts. A *slot* is a place in the cache, a
*position* a place in the text. They differ, because prompts are left-padded and drafts that were taken back leave
holes, so every pass gets explicit `position_ids` and a 4-D mask made from the positions of the slots, one per kind of
attention layer: exact for sliding windows too, which transformers counts in slots. Knows nothing of sampling, policies
or the other model.

Letters: `R` rows, `n` tokens of a pass, `S` slots in use, `D` hidden width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from qswitch.errors import ModelError
from qswitch.models.language_model import LanguageModel
from qswitch.rollout.slot_layer import SlotLayer
from qswitch.rollout.step_graph import StepGraphs

EMPTY = -1
"""Position of a slot that no query may see: padding, or a draft that was taken back."""
MAX_HOLE_SHARE = 0.25
"""Holes, as a share of the live slots, beyond which a state is packed anew."""


class KVState:
    """Keys and values of `model` for R rows; with `graphs`, passes of one token per row are replayed.

    Raises:
        ModelError: the model has a kind of attention whose past cannot be masked slot by slot.
    """

    def __init__(self, model: LanguageModel, num_rows: int, *, graphs: StepGraphs | None = None) -> None:
        self._model = model
        self._graphs = graphs
        self._windows = attention_windows(model)
        self._cache = Cache(layer_class_to_replicate=SlotLayer)
        # On the device: int64 (R, S) position held by each slot, or EMPTY; int64 (R,) tokens read.
        self._slots = torch.empty((num_rows, 0), dtype=torch.int64, device=model.device)
        self._lengths = torch.zeros(num_rows, dtype=torch.int64, device=model.device)
        # The same in numbers that the host knows without asking the device: where each row starts, what it holds.
        self._first = np.zeros(num_rows, dtype=np.int64)
        self._live = np.zeros(num_rows, dtype=np.int64)

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self._live)

    @property
    def num_slots(self) -> int:
        """S."""
        return self._slots.shape[1]

    @property
    def replays(self) -> bool:
        """Whether passes of one token per row are recorded and replayed."""
        return self._graphs is not None

    @property
    def hole_share(self) -> float:
        """Dead slots behind a row's first live one, as a share of all live slots; left padding is no hole."""
        return float((self.num_slots - self._first - self._live).sum() / max(self._live.sum(), 1))

    def append(self, tokens: Tensor, live: Tensor, live_counts: np.ndarray) -> Tensor:
        """Read `n` more tokens per row: int64 [R, n], bool [R, n] -> their final hidden states [R, n, D].

        Tokens that are not live are padding: they are read to keep the shape and never seen again. `live_counts` is
        `live.sum(1)`, which the caller knows without asking the device.
        """
        num_tokens = tokens.shape[1]
        order = live.long().cumsum(dim=1)
        positions = torch.where(live, self._lengths[:, None] + order - 1, EMPTY)
        fresh = self._live == 0
        self._first[fresh] = self.num_slots + num_tokens - live_counts[fresh]
        self._live += live_counts
        self._slots = torch.cat([self._slots, positions], dim=1)
        self._lengths = self._lengths + order[:, -1]
        masks, position_ids = self._masks(positions), positions.clamp_min(0)
        if self._graphs is not None and num_tokens == 1 and self._cache.layers:
            hidden = self._graphs.step(self._cache.layers, tokens, position_ids, masks)
            if hidden is not None:
                return hidden
        return self._model.hidden(
            tokens,
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            position_ids=position_ids,
            past_key_values=self._cache,
        )

    def take_back(self, num_appended: int, kept: Tensor, kept_counts: np.ndarray, live_counts: np.ndarray) -> None:
        """Of the last `num_appended` slots, whose live tokens come first, keep only the first `kept` int64 [R] a row.

        On the host, `kept_counts` is the same as `kept`, and `live_counts` says how many of those slots were live.
        """
        tail = self._slots[:, self.num_slots - num_appended :]
        rejected = (tail != EMPTY) & (torch.arange(num_appended, device=tail.device) >= kept[:, None])
        self._lengths = self._lengths - rejected.sum(dim=1)
        unused = num_appended - int(kept_counts.max(initial=0))  # trailing slots that no row needs
        tail = tail.masked_fill(rejected, EMPTY)[:, : num_appended - unused]
        self._slots = torch.cat([self._slots[:, : self.num_slots - num_appended], tail], dim=1)
        self._live -= live_counts - kept_counts
        if unused:
            self._cache.crop(-unused)

    def repack(self, rows: np.ndarray, newcomers: KVState | None = None) -> None:
        """Keep only `rows` (indices, in that order), append the rows of `newcomers`, and leave no holes."""
        parts: list[tuple[KVState, np.ndarray]] = [(self, rows)]
        if newcomers is not None:
            parts.append((newcomers, np.arange(newcomers.num_rows)))
        live = np.concatenate([state._live[kept] for state, kept in parts])
        width = int(live.max(initial=0))
        device = self._slots.device
        slots, indices = [], []
        for state, kept in parts:
            index = torch.from_numpy(kept).to(device)
            held = state._slots[index]
            # A stable sort by "is live" puts the live slots last and keeps their order.
            order = torch.sort((held != EMPTY).long(), dim=1, stable=True).indices
            order = order[:, max(held.shape[1] - width, 0) :]
            packed = torch.full((len(kept), width), EMPTY, dtype=torch.int64, device=device)
            if order.shape[1]:
                packed[:, width - order.shape[1] :] = held.gather(1, order)
            slots.append(packed)
            indices.append((index, order))
        cache = Cache(layer_class_to_replicate=SlotLayer)
        for i in range(max(len(state._cache.layers) for state, _ in parts)):
            held = [state._cache.layers[i] if state._cache.layers else None for state, _ in parts]
            like = next(layer for layer in held if layer is not None)
            layer = like.repacked(
                [(layer, index, order) for layer, (index, order) in zip(held, indices, strict=True)], width
            )
            # One by one: the old layer's bytes go before the next new one's come.
            for state, _ in parts:
                if state._cache.layers:
                    state._cache.layers[i] = None
            del held, like
            if self._graphs is not None:
                self._graphs.keep(i, layer)
            cache.layers.append(layer)
        self._cache = cache
        self._slots = torch.cat(slots)
        self._lengths = torch.cat(
            [state._lengths[index] for (state, _), (index, _) in zip(parts, indices, strict=True)]
        )
        self._live, self._first = live, width - live

    def _masks(self, positions: Tensor) -> dict[str, Tensor]:
        """What the queries at `positions` [R, n] may see, by kind of attention layer: [R, 1, n, S]."""
        slots, queries = self._slots[:, None, :], positions[:, :, None]
        index = torch.arange(self.num_slots, device=positions.device)
        own = index[None, None, :] == index[-positions.shape[1] :][None, :, None]
        # A padding query sees itself: a row of a softmax without any entry would be NaN.
        past = ((slots != EMPTY) & (slots <= queries)) | own
        masks = {}
        for kind, window in self._windows.items():
            allowed = past if window is None else past & ((slots > queries - window) | own)
            masks[kind] = self._for_attention(allowed[:, None])
        return masks

    def _for_attention(self, allowed: Tensor) -> Tensor:
        """Boolean for scaled_dot_product_attention; added to the scores in eager attention."""
        if self._model.config._attn_implementation == "sdpa":
            return allowed
        dtype = self._model.compute_dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
            ~allowed, torch.finfo(dtype).min
        )


def attention_windows(model: LanguageModel) -> dict[str, int | None]:
    """Kind of attention layer -> how many positions it looks back; None: all of them.

    Raises:
        ModelError: a kind that no mask over slots can express.
    """
    config = model.config
    name = type(model.causal_model).__name__
    attention = getattr(config, "_attn_implementation", "eager")
    if attention not in ("sdpa", "eager"):
        raise ModelError(
            f"{name} runs with {attention} attention, which takes no mask of its own for every row, as rollouts need. "
            "Load it with attn_implementation sdpa or eager."
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = set(getattr(config, "layer_types", None) or [])
    if not kinds:
        return {"sliding_attention" if window else "full_attention": window}
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise ModelError(
            f"{name} has layers of the kind {', '.join(sorted(unknown))}, whose past cannot be masked slot by slot. "
            "Use a model with full or sliding-window attention."
        )
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}
