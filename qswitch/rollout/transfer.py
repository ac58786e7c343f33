"""Copies between host and device that make nobody wait; the one that the host does wait for is in `engine.py`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray | Sequence[int] | Sequence[list[int]], device: torch.device) -> Tensor:
    """Host values on the device, integers as int64 and truth values as bool. What is copied may change afterwards.

    From pageable memory CUDA takes its own copy before it returns; to wait for the device as well, as a plain copy
    does, would hold up every round.
    """
    array = np.asarray(values)
    return torch.from_numpy(array if array.dtype == bool else array.astype(np.int64)).to(device, non_blocking=True)


def to_host(values: Tensor) -> Tensor:
    """Start a copy to the host that is complete when the device next answers."""
    if values.device.type != "cuda":
        return values
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
