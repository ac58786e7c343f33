"""How many bytes of tensors a piece of code keeps alive at once, by a dispatch mode; also on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made inside the mode and that are still alive: now, and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.largest_bytes = 0
        self._paused = False
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is made inside is never counted."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if self._paused or id(storage) in given or storage in self._known:
                continue
            self._known.add(storage)
            num_bytes = storage.nbytes()
            weakref.finalize(storage, self._free, num_bytes)
            self.live_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            self.largest_bytes = max(self.largest_bytes, num_bytes)
        return result

    def _free(self, num_bytes: int) -> None:
        self.live_bytes -= num_bytes
