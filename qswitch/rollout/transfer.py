"""Copies between host and device that make nobody wait; the one that the host does wait for is in `engine.py`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qswitch.pinned import host_buffer


def to_device(values: np.ndarray | Sequence[int] | Sequence[list[int]], device: torch.device) -> Tensor:
    """Host values on the device, integers as int64 and truth values as bool. What is copied may change afterwards."""
    array = np.asarray(values)
    return upload(torch.from_numpy(array if array.dtype == bool else array.astype(np.int64)), device)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, through pinned memory where it can be had.

    From pageable memory CUDA may wait for the stream, that is for every pass that was launched before.
    """
    if device.type != "cuda":
        return values.to(device)
    return host_buffer(values.shape, values.dtype, pinned=True).copy_(values).to(device, non_blocking=True)


def to_host(values: Tensor) -> Tensor:
    """Start a copy to the host that is complete when the device next answers."""
    if values.device.type != "cuda":
        return values
    return host_buffer(values.shape, values.dtype, pinned=True).copy_(values, non_blocking=True)


class OnEachDevice:
    """An index that tensors of several devices read: on each device one copy, made when it is first asked for."""

    def __init__(self, index: Tensor) -> None:
        self._copies = {index.device: index}

    def on(self, device: torch.device) -> Tensor:
        """The index there; from another GPU nobody waits for it."""
        if device not in self._copies:
            index = next(iter(self._copies.values()))
            self._copies[device] = index.to(device, non_blocking=True)
        return self._copies[device]
