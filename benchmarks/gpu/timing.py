"""How long something takes on the host, which issues it, and on the device, which does it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def host_and_device_ms(run: Callable[[], Any], device: torch.device, repeats: int = 5) -> dict[str, float]:
    """Fewest milliseconds of `repeats` calls: until the call returned, and until the device was done.

    Between calls the device is idle, so the first is the time of issuing: where it is the longer one, kernels wait for
    Python. On a CPU both are the same.
    """
    run()
    run()
    host, whole = float("inf"), float("inf")
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        run()
        issued = time.perf_counter()
        _wait(device)
        host, whole = min(host, issued - started), min(whole, time.perf_counter() - started)
    return {"host_ms": round(host * 1e3, 4), "whole_ms": round(whole * 1e3, 4)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
