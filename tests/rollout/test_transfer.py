"""Copies between host and device arrive, and nobody waits for them where host memory can be pinned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qswitch import pinned
from qswitch.rollout.transfer import to_device, to_host, upload
from tests.pretended_cuda import CUDA, pretended_cuda


@pytest.mark.parametrize("limited", [False, True])
def test_copies_arrive_also_where_no_memory_can_be_pinned(limited, monkeypatch, caplog):
    """As in a container with a limit on locked memory: slower, and said once, instead of an error in a rollout."""
    original = torch.empty

    def empty(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory and limited:
            raise RuntimeError("CUDA error: out of memory")
        return original(*shape, pin_memory=pin_memory, **options)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(pinned, "_said", set())
    with pretended_cuda() as seen:
        there = [to_device([3, 1, 2], CUDA), to_device([[True, False]], CUDA), upload(torch.ones(2, 3), CUDA)]
        assert all(tensor.device == CUDA for tensor in there)
        here = to_host(there[2] * 2)
        assert here.device.type == "cpu" and (seen.num_waits == 0) is not limited
        seen.land()  # the device answers
        assert here.tolist() == [[2.0] * 3] * 2
        assert there[0].tolist() == [3, 1, 2] and there[1].tolist() == [[True, False]]
    assert sum("cannot be pinned" in record.message for record in caplog.records) == limited
