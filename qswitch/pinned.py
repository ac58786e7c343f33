"""Host memory for copies to and from a GPU: pinned where it can be had."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

logger = logging.getLogger(__name__)

_said: set[str] = set()


def host_buffer(shape: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
    """Uninitialised host memory, pinned where that is asked for and can be had.

    Where it cannot (a container's limit on locked memory, or too little of it) the memory is pageable, which is said
    once: copies to and from the device are then slower, and the host waits for them.
    """
    if pinned:
        try:
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            if reason not in _said:
                _said.add(reason)
                logger.warning(
                    "host memory cannot be pinned (%s), so copies to and from the GPU are slower: raise the limit on "
                    "locked memory (ulimit -l; under WSL2 memory= in .wslconfig), or free host memory",
                    reason,
                )
    return torch.empty(tuple(shape), dtype=dtype)
