"""Whether weights are numbers. Knows no model class."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from qswitch.errors import ModelError


def require_finite(tensors: Iterable[tuple[str, Tensor]], where: str, remedy: str) -> None:
    """Nothing, or an error that names the first tensor of `where` with NaN or infinity in it, and the remedy.

    The scales of packed weights count as theirs. One sum a tensor, so nothing of a weight's size is allocated but where
    8-bit weights have to be unpacked for it.

    Raises:
        ModelError: a weight is not finite.
    """
    for name, tensor in tensors:
        state = getattr(tensor, "quant_state", None)
        values = tensor if state is None else state.absmax
        if not values.is_floating_point() or values.is_meta:
            continue
        if type(values.data) is not Tensor:  # a checkpoint of torchao, whose tensors know few operations
            values = values.dequantize()
        elif values.element_size() == 1:  # FP8 has no sum
            values = values.float()
        total = values.detach().sum(dtype=torch.float64 if values.dtype == torch.float64 else torch.float32)
        if not torch.isfinite(total):
            raise ModelError(f"{where}: its weights are not all numbers; {name} holds NaN or infinity. {remedy}")
