"""A frozen model that can leave its device, so that its bytes serve something else meanwhile.

Its weights never change, so one copy in host memory (pinned beside a GPU) is made once; leaving only frees, returning
is one upload. Storages are emptied in place: tied weights, 4-bit scales and whatever else shares them come back with
them. On a CPU the same code frees and reloads real bytes. Knows nothing of training; `plan` counts its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qswitch.models.language_model import LanguageModel
from qswitch.pinned import host_buffer

SLAB_BYTES = 256 * 2**20
"""Size of one piece of the host copy. torch rounds a pinned request up to a power of two (CachingHostAllocator), which
would double a copy of 4.1 GiB; whole slabs lose nothing, and the last one at most half of itself."""


class SwappedModel:
    """Takes a model from its device and brings it back; its head always stays.

    Raises:
        ValueError: the model has weights that train, which a fixed copy would lose.
    """

    def __init__(self, model: LanguageModel) -> None:
        if any(p.requires_grad for p in model.hf.parameters()):
            raise ValueError("only a frozen model can be swapped: its copy is made once")
        self.is_resident = True
        storages = _own_storages(model.hf)  # first: it may give the head another address
        head = {t.untyped_storage().data_ptr() for t in _tensors(model.head.linear)}
        self._storages = [s for s in storages if s.data_ptr() not in head]
        self._sizes = [s.nbytes() for s in self._storages]
        self._slabs = _host_slabs(self.num_bytes, pinned=model.device.type == "cuda")
        self._copy_all(to_host=True)
        self._device = model.device
        for module in {model.hf, model.causal_model, model.backbone}:
            module.register_forward_pre_hook(self._refuse_while_away)

    @property
    def num_bytes(self) -> int:
        """What leaving frees on the device."""
        return sum(self._sizes)

    @property
    def host_bytes(self) -> int:
        """What the copy takes in host memory."""
        return sum(len(slab) for slab in self._slabs)

    def leave(self) -> None:
        """Free the weights on the device; a second call does nothing."""
        if not self.is_resident:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a pass that is still queued reads them
        self.is_resident = False
        for storage in self._storages:
            storage.resize_(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # as whole segments, so that other sizes fit into them

    def come_back(self) -> None:
        """Load the weights, the same bytes as ever; a second call does nothing.

        Raises:
            torch.OutOfMemoryError: the device has no room; the model is away as before.
        """
        if self.is_resident:
            return
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what training has freed, also in segments that are too small
        try:
            for storage, size in zip(self._storages, self._sizes, strict=True):
                storage.resize_(size)
        except RuntimeError:
            for storage in self._storages:
                storage.resize_(0)
            raise
        self._copy_all(to_host=False)
        self.is_resident = True

    def _copy_all(self, *, to_host: bool) -> None:
        """Storages and slabs are the same bytes in the same order, cut at different places."""
        slabs = iter(self._slabs)
        slab = torch.empty(0, dtype=torch.uint8)
        for storage in self._storages:
            content = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            while len(content):
                if not len(slab):
                    slab = next(slabs)
                n = min(len(content), len(slab))
                if to_host:
                    slab[:n].copy_(content[:n])
                else:
                    content[:n].copy_(slab[:n], non_blocking=True)
                content, slab = content[n:], slab[n:]

    def _refuse_while_away(self, *_: Any) -> None:
        assert self.is_resident, "a pass of the teacher while it is off the device: come_back() first"


def _host_slabs(num_bytes: int, *, pinned: bool) -> list[Tensor]:
    sizes = [SLAB_BYTES] * (num_bytes // SLAB_BYTES)
    if num_bytes % SLAB_BYTES:
        sizes.append(num_bytes % SLAB_BYTES)
    return [host_buffer([size], torch.uint8, pinned=pinned) for size in sizes]


def _own_storages(model: nn.Module) -> list[torch.UntypedStorage]:
    """Every storage of a model once. What cannot be resized (a mapped file) is first copied into memory of its own."""
    found: dict[int, torch.UntypedStorage] = {}
    moved: dict[int, torch.UntypedStorage] = {}
    for tensor in _tensors(model):
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            continue
        if not storage.resizable():
            address = storage.data_ptr()
            if address not in moved:
                moved[address] = storage.clone()
            storage = moved[address]
            with torch.no_grad():
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
                    storage, tensor.storage_offset(), tensor.shape, tensor.stride()
                )
        found[storage.data_ptr()] = storage
    return list(found.values())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a module holds: parameters, buffers, and what bitsandbytes keeps beside its weights."""
    for part in module.modules():
        for tensor in [*part._parameters.values(), *part._buffers.values()]:
            if tensor is not None:
                yield from _with_quantisation(tensor)
        for value in vars(part).values():
            if _is_bitsandbytes(value):
                yield from _with_quantisation(value)


def _with_quantisation(value: Any) -> Iterator[Tensor]:
    """A tensor, or an object of bitsandbytes (QuantState, MatmulLtState), with the tensors in its attributes."""
    if isinstance(value, Tensor):
        yield value
    for inner in vars(value).values() if hasattr(value, "__dict__") else ():
        if isinstance(inner, Tensor) or _is_bitsandbytes(inner):
            yield from _with_quantisation(inner)


def _is_bitsandbytes(value: Any) -> bool:
    return type(value).__module__.startswith("bitsandbytes") and not isinstance(value, nn.Module)
