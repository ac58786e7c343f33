"""The rows that are being written: one object, so that nobody filters their arrays one by one.

A row is one request that is in mid-response. What passes and masks need of it lies on the device, what decides about
rounds and refills lies on the host, and the two that lie on both sides, place and step, advance together: on the device
within the round, on the host when the round's answer arrives. Knows no model and no policy.

Letters: `R` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from qswitch.rollout import noise
from qswitch.rollout.requests import RolloutRequest, Sampling
from qswitch.rollout.transfer import to_device


@dataclass(slots=True)
class HostRows:
    """What the host knows of each row: numpy arrays [R]."""

    place: np.ndarray
    """int64: the row's place in the buffers of `responses.py`, the same until it ends."""
    request: np.ndarray
    """int64: index of its request."""
    step: np.ndarray
    """int64: the response step that is written next."""
    limit: np.ndarray
    """int64: response tokens that the request allows."""
    student_left: np.ndarray
    """bool: the student has missed tokens of the row, so it is not asked about it again."""
    in_tail: np.ndarray
    """bool: the teacher writes the rest, whatever the student would say."""


@dataclass(slots=True)
class DeviceRows:
    """What the device knows of each row: int64 tensors [R]."""

    place: Tensor
    step: Tensor
    limit: Tensor
    key: Tensor
    """Key of the rollout's noise."""


@dataclass(slots=True)
class Rows:
    """The live rows, in the order in which every pass reads them."""

    host: HostRows
    device: DeviceRows

    def __len__(self) -> int:
        return len(self.host.place)

    @classmethod
    def starting(
        cls,
        indices: Sequence[int],
        requests: Sequence[RolloutRequest],
        places: Sequence[int],
        *,
        sampling: Sampling,
        tail_start: float,
        device: torch.device,
    ) -> Rows:
        """Rows at response step 0: `requests` with their indices and the places they are given."""
        limits = [request.max_new_tokens for request in requests]
        zeros = np.zeros(len(indices), dtype=np.int64)
        place = to_device(places, device)
        key = noise.row_keys(
            sampling.seed,
            to_device([r.example_id for r in requests], device),
            to_device([r.visit for r in requests], device),
        )
        return cls(
            HostRows(
                place=np.array(places, dtype=np.int64),
                request=np.array(indices, dtype=np.int64),
                step=zeros,
                limit=np.array(limits, dtype=np.int64),
                student_left=zeros.astype(bool),
                in_tail=zeros >= tail_start,
            ),
            DeviceRows(place, torch.zeros_like(place), to_device(limits, device), key),
        )

    def select(self, kept: np.ndarray) -> Rows:
        """Only the rows `kept` (indices), in that order."""
        index = to_device(kept, self.device.place.device)
        return Rows(
            HostRows(*(getattr(self.host, f.name)[kept] for f in fields(HostRows))),
            DeviceRows(*(getattr(self.device, f.name)[index] for f in fields(DeviceRows))),
        )

    def join(self, others: Rows) -> Rows:
        """These rows, and `others` behind them."""
        return Rows(
            HostRows(
                *(np.concatenate([getattr(self.host, f.name), getattr(others.host, f.name)]) for f in fields(HostRows))
            ),
            DeviceRows(
                *(torch.cat([getattr(self.device, f.name), getattr(others.device, f.name)]) for f in fields(DeviceRows))
            ),
        )
