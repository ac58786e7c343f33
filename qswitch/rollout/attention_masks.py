"""Which slots a token may see: masks made from the positions that the slots hold, one for each kind of layer.

transformers counts windows and chunks in slots, which is wrong as soon as rows are padded or have holes. Recurrent and
convolution layers take no such mask; they are told which tokens of a left-padded prompt are padding.

Letters: `R` rows, `n` tokens of a pass, `S` slots in use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qswitch.errors import ModelError
from qswitch.models.architecture import RECURRENT, layer_kinds
from qswitch.models.language_model import LanguageModel

ALIGNED_SLOTS = 8
"""Of 16 bits each, the 16 bytes at which torch's memory-efficient attention reads a row of a mask."""
EMPTY = -1
"""Position of a slot that no query may see: padding, or a draft that was taken back."""


class MaskMaker:
    """Makes the masks of one model.

    Raises:
        ModelError: the model attends in a way that no mask over slots can express, or its kernel takes no mask of ours.
    """

    def __init__(self, model: LanguageModel) -> None:
        name, attention = type(model.causal_model).__name__, model.config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise ModelError(
                f"{name} runs with {attention} attention, which takes no mask of its own for every row, as rollouts "
                "need. Load it with attn_implementation sdpa or eager."
            )
        self._kinds = layer_kinds(model.config, name)
        self._dtype = model.compute_dtype

    def __call__(self, slots: Tensor, positions: Tensor, padding: Tensor | None = None) -> dict[str, Tensor | None]:
        """What queries at `positions` int64 [R, n], the last n of `slots` int64 [R, S], may see: by kind [R, 1, n, S].

        Recurrent kinds get `padding` bool [R, n], the tokens that are live, or None where all of them are.
        """
        index = torch.arange(slots.shape[1], device=positions.device)
        own = index[None, None, :] == index[-positions.shape[1] :][None, :, None]
        slots, queries = slots[:, None, :], positions[:, :, None]
        # A padding query sees itself: a row of a softmax without any entry would be NaN.
        past = (slots != EMPTY) & (slots <= queries)
        masks: dict[str, Tensor | None] = {}
        for kind, sees in self._kinds.items():
            if kind in RECURRENT:
                masks[kind] = padding
            else:
                near = past if sees is None else past & sees(slots, queries)
                masks[kind] = self._for_attention((near | own)[:, None])
        return masks

    def as_model_takes_them(self, masks: dict[str, Tensor | None]) -> Any:
        """One mask as it is; several by their kinds, as transformers' models look them up."""
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _for_attention(self, allowed: Tensor) -> Tensor:
        """Numbers that are added to the scores, each row of them at an aligned place.

        torch's fused kernels would make them of truth values anew in every layer, and copy what is not aligned.
        """
        *shape, num_slots = allowed.shape
        width = -(-num_slots // ALIGNED_SLOTS) * ALIGNED_SLOTS
        added = torch.zeros((*shape, width), dtype=self._dtype, device=allowed.device)[..., :num_slots]
        return added.masked_fill_(~allowed, torch.finfo(self._dtype).min)
