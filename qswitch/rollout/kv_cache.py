"""What a model remembers of the rows it is decoding: keys, values, which slots are live, the next positions.

The state of one model over one batch of left-padded rows. Knows nothing of sampling, policies or the other model. Slots
and positions are kept apart (a mask and explicit `position_ids`), because padding makes them differ.

Letters: `R` rows, `P` padded prompt length, `D` hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from qswitch.errors import ModelError
from qswitch.models.language_model import LanguageModel


def refuse_short_window(model: LanguageModel, max_tokens: int) -> None:
    """Refuse a sliding window shorter than prompt and response together.

    transformers counts slots where the window means positions, and padding makes them differ; a window that is never
    reached does no harm.

    Raises:
        ModelError: the window is shorter than `max_tokens`.
    """
    window = getattr(model.config, "sliding_window", None)
    if getattr(model.config, "use_sliding_window", True) and window is not None and window < max_tokens:
        raise ModelError(
            f"{type(model.causal_model).__name__} attends over a sliding window of {window} tokens, but a prompt and "
            f"its response may have {max_tokens}. Lower data.max_prompt_tokens or rollout.max_new_tokens until their "
            f"sum is at most {window}."
        )


class KVState:
    """Keys and values of `model` for R rows that advance together."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        # Built without the config on purpose: a sliding-window cache layer drops slots by count, which is wrong as
        # soon as padding makes slots and positions differ.
        self._cache = DynamicCache()
        self._mask: Tensor | None = None  # bool (R, slots)

    def prefill(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Read left-padded prompts: int64 [R, P], bool [R, P] -> final hidden state of each last token [R, D]."""
        assert self._mask is None, "prefill starts a state"
        self._mask = attention_mask.bool()
        positions = (self._mask.long().cumsum(dim=1) - 1).clamp_min(0)
        hidden = self._model.hidden(
            input_ids, attention_mask=self._mask.long(), position_ids=positions, past_key_values=self._cache
        )
        return hidden[:, -1]

    def advance(self, tokens: Tensor) -> Tensor:
        """Read one more token per row: int64 [R] -> its final hidden state [R, D]."""
        assert self._mask is not None, "prefill comes first"
        positions = self._mask.sum(dim=1, keepdim=True)
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        hidden = self._model.hidden(
            tokens[:, None], attention_mask=self._mask.long(), position_ids=positions, past_key_values=self._cache
        )
        return hidden[:, -1]

    def keep_rows(self, rows: Tensor) -> None:
        """Forget every row but `rows` (int64 indices), in that order."""
        assert self._mask is not None
        self._mask = self._mask[rows]
        self._cache.batch_select_indices(rows)
