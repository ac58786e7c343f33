"""What a process that runs models holds of the host's memory, and how to make it give back what it does not need.

On a CPU the allocators below torch keep far more than is live; docs/architecture.md has the figures. Knows no model.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import torch

_M_MMAP_THRESHOLD = -3
"""malloc.h: requests from this size on are mapped, and unmapped when freed."""
_SMALL_MMAP_THRESHOLD = 2**17
"""Where glibc starts. At 1 MiB a training pass over eight rows of 200 tokens left 0.4 GiB more behind."""
_LARGE_MMAP_THRESHOLD = 2**25
"""The largest that glibc takes, and where its own, moving threshold ends up."""


def release_memory(device: torch.device) -> None:
    """Give back what is no longer referenced: reference cycles, the allocator's cache, glibc's free lists."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        trim_heap()


def trim_heap() -> None:
    """Let glibc give back the pages of its free lists.

    Decoding leaves holes of many sizes in the heap. Training fills them again, whatever the mapping threshold, and a
    hole that is freed stays resident: after a demo's first micro-batch 0.9 GiB of the heap were free and held. So
    it is called where a pass has left most, before the loss and after a micro-batch; it takes 40 to 80 ms in the demo.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def return_freed_memory() -> None:
    """Let glibc give every freed tensor above 128 KiB back at once, on a CPU.

    By default it keeps blocks of up to 32 MiB and cannot use them again for aligned requests of the same size: a pass
    whose tensors take 1.6 GiB left the process at 3.1. With a fixed threshold the process holds 1.7.
    """
    _set_mmap_threshold(_SMALL_MMAP_THRESHOLD)


def bound_kernel_cache() -> None:
    """Keep oneDNN, on a CPU, from holding a kernel with its buffers for each of the last 1,024 shapes of a product.

    Batches of rollouts have ever new shapes: a demo run grew by 70 MiB a step. Read at the first product of the
    process; a value that the user has set stands.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


@contextlib.contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """On a CPU, let glibc keep freed tensors while the block runs: decoding asks for the same sizes at every token.

    Fresh pages for each of them took 1.6 to 2.2 times the time of a decoding pass. All goes back at the end, because
    the peak is in training.
    """
    if device.type != "cpu":
        yield
        return
    _set_mmap_threshold(_LARGE_MMAP_THRESHOLD)
    try:
        yield
    finally:
        return_freed_memory()
        release_memory(device)


def _set_mmap_threshold(num_bytes: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, num_bytes)


def resident_bytes() -> int:
    """What the process holds in host memory now."""
    import resource

    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # no /proc: the peak, an upper bound
