"""A CUDA device that is pretended on a CPU, so that mixed devices and waits of the host are found without a card.

Tensors that claim to lie on cuda:0, or on cuda:1 where several cards are asked for, are CPU tensors whose storage is
marked. A dispatch mode follows the marks through every operation: one that mixes tensors of two cards, or marked and
unmarked ones, raises `MixedDevicesError`, and every time the host would
have to wait for the device (a copy that blocks, `item`, a boolean index) is counted by the line of qswitch that asked.
While a pretended capture runs, such a wait, and any copy between the two sides, raises `CaptureError`.

It knows what torch documents of these rules, not what a driver does: speed, streams and memory are not pretended. It is
one file of over 450 lines because all of it reads the same marks.
"""

from __future__ import annotations

import collections
import contextlib
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.utils._device
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.cuda._utils import _get_device_index
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30
CUDA = torch.device("cuda", 0)
_real_device = torch._C.TensorBase.device  # type: ignore[attr-defined]

WAITING = {
    "_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2",
    "unique_consecutive", "bincount", "repeat_interleave",
}  # fmt: skip
"""Operations whose result the host, or the size of the next allocation, depends on."""
VIEWS = {
    "detach", "view", "t", "transpose", "permute", "slice", "select", "expand", "unsqueeze", "squeeze", "as_strided",
    "alias", "_unsafe_view", "split", "unbind", "_reshape_alias", "split_with_sizes", "unfold", "lift_fresh",
}  # fmt: skip
"""Operations without a kernel."""


class MixedDevicesError(AssertionError):
    """An operation over tensors of different places."""


class CaptureError(RuntimeError):
    """What CUDA refuses while a graph is captured."""


@dataclass
class Pretended:
    """What happened on the pretended device."""

    waits: collections.Counter[str] = field(default_factory=collections.Counter)
    """By "kind at file:line", how often the host waited."""
    uploads: collections.Counter[str] = field(default_factory=collections.Counter)
    """The same of copies that nobody waits for."""
    launches: collections.Counter[str] = field(default_factory=collections.Counter)
    """Operations that start a kernel, by name; those of a replayed capture apart."""
    replayed_launches: int = 0
    captures: int = 0
    memory_fractions: list[tuple[float, int]] = field(default_factory=list)
    """What the process was told to keep within, and on which card, each time."""
    capturing: bool = False
    replaying: bool = False
    marked: weakref.WeakKeyDictionary[Any, int] = field(default_factory=weakref.WeakKeyDictionary)
    """Storages that claim to lie on a card, and on which."""
    _sent: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Host memory and what it will hold; of two copies into one place the first lands last, and nobody makes two."""

    @property
    def held_bytes(self) -> int:
        """Of tensors that lie on the cards now."""
        return sum(storage.nbytes() for storage in self.marked)

    @property
    def num_waits(self) -> int:
        return sum(self.waits.values())

    @property
    def num_launches(self) -> int:
        return sum(self.launches.values())

    def wait(self, what: str) -> None:
        """Count a wait of the host, or refuse it within a capture."""
        place = _place()
        if self.capturing:
            raise CaptureError(f"{what} at {place}: operation not permitted when stream is capturing")
        self.waits[f"{what} at {place}"] += 1
        self.land()

    def send(self, target: Tensor) -> None:
        """Host memory that a copy nobody waits for was to fill: it holds anything until the device answers."""
        self._sent.append((target, target.clone()))
        target.fill_(float("nan") if target.is_floating_point() else target.dtype == torch.bool or 99)

    def land(self) -> None:
        """The device has answered."""
        while self._sent:
            target, values = self._sent.pop()
            target.copy_(values)

    def copy(self, source: str, target: str, blocks: bool) -> None:
        """Count a copy between places; from or to host memory that is not pinned, CUDA may wait for the stream."""
        kind = f"copy {source} to {target}"
        if blocks or self.capturing:
            self.wait(kind)
        else:
            self.uploads[f"{kind} at {_place()}"] += 1

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """In place of step_graph.CudaRecorder: captures a call, and repeats it over its fixed places."""
        run()
        self.captures += 1
        self.capturing = True
        try:
            output = run()
        finally:
            self.capturing = False

        def replay() -> Tensor:
            self.replaying = True
            try:
                output.copy_(run())
            finally:
                self.replaying = False
            return output

        return replay


def _place() -> str:
    """The innermost line of qswitch on the stack; else of any installed package beside torch."""
    frame: Any = sys._getframe(2)
    other = "elsewhere"
    while frame is not None:
        name = frame.f_code.co_filename
        if "/qswitch/" in name and "/site-packages/" not in name:
            return f"{name.rpartition('/qswitch/')[2]}:{frame.f_lineno}"
        if other == "elsewhere" and "site-packages/" in name and "site-packages/torch/" not in name:
            other = f"{name.rpartition('site-packages/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return other


class _Device(TorchDispatchMode):
    """Follows the marks; see the module's docstring."""

    def __init__(self, seen: Pretended) -> None:
        super().__init__()
        self.seen = seen
        self.marked = seen.marked
        self.pinned: weakref.WeakSet[Any] = weakref.WeakSet()
        self.inside = 0
        self.moving = False
        self.attending = "cpu"
        """Where the queries lie whose attention is computed now."""

    def side(self, tensor: Tensor) -> str:
        """cuda:0, cuda:1 or cpu; meta and others as they are."""
        kind = _real_device.__get__(tensor).type
        if kind != "cpu" or self.inside:
            return str(kind)
        index = self.marked.get(tensor.untyped_storage())
        return "cpu" if index is None else f"cuda:{index}"

    def mark(self, tensor: Tensor, side: str) -> Tensor:
        self.marked[tensor.untyped_storage()] = torch.device(side).index
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func._schema.name.partition("::")[2]
        wanted = None
        if kwargs.get("device") is not None:
            wanted = _side_of(torch.device(kwargs["device"]))
            if wanted.startswith("cuda"):
                kwargs["device"] = torch.device("cpu")
            elif wanted == "cpu" and name == "_to_copy" and not self.moving:
                wanted = None  # a change of dtype inside autograd, which sees the real device
        pinned = kwargs.get("pin_memory")
        if pinned:
            kwargs["pin_memory"] = False
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        sides = [self.side(t) for t in tensors]
        self._check(func, name, args, kwargs, tensors, sides)
        on_device = next((side for side in sides if side.startswith("cuda")), None)
        in_backward = torch._C._current_graph_task_id() != -1
        if on_device is not None and wanted != "cpu":
            self._count_waits(name, args)
        self.inside += 1
        try:
            result = func(*args, **kwargs)
        finally:
            self.inside -= 1
        if pinned:
            self.pinned.add(result.untyped_storage())
        if name == "_to_copy" and wanted is not None and "meta" not in (wanted, sides[0]) and wanted != sides[0]:
            # From a device torch makes the host memory itself, pinned, and returns before it is filled.
            sends = bool(kwargs.get("non_blocking")) and wanted == "cpu"
            uploads = kwargs.get("non_blocking") and tensors[0].untyped_storage() in self.pinned
            self.seen.copy(_kind(sides[0]), _kind(wanted), "cpu" in (wanted, sides[0]) and not (sends or uploads))
            if sends:
                self.seen.send(result)
        comes_down = name == "copy_" and (sides[0], _kind(sides[-1])) == ("cpu", "cuda")
        if comes_down and _non_blocking(args, kwargs) and tensors[0].untyped_storage() in self.pinned:
            self.seen.send(result)
        goes_to = wanted or on_device
        if not tensors and goes_to in (None, "cpu") and (in_backward or self.attending.startswith("cuda")):
            # Torch itself makes it like a tensor whose real device is the CPU.
            goes_to = "cuda:0" if in_backward else self.attending
        if goes_to is not None and goes_to.startswith("cuda") and name not in ("copy_", "set_"):
            for output in tree_leaves(result):
                if isinstance(output, Tensor) and _real_device.__get__(output).type == "cpu":
                    self.mark(output, goes_to)
            if name not in VIEWS:
                if self.seen.replaying:
                    self.seen.replayed_launches += 1
                else:
                    self.seen.launches[name] += 1
        return result

    def _check(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], sides: list[str]) -> None:
        """Mixed devices raise, but for copies, the host's numbers without dimensions, and an index of the host's."""
        places = set(sides) - {"meta"}
        if len(places) < 2:
            return
        if name == "copy_":
            source, target = self.side(args[1]), self.side(args[0])
            non_blocking = _non_blocking(args, kwargs)
            on_host = [tensor for tensor, side in ((args[1], source), (args[0], target)) if side == "cpu"]
            blocks = any(not (non_blocking and tensor.untyped_storage() in self.pinned) for tensor in on_host)
            self.seen.copy(_kind(source), _kind(target), blocks)
            return
        if name in ("_to_copy", "set_"):
            return
        if name in ("index", "index_put_", "_index_put_impl_") and sides[0] != "cpu":
            indices = {self.side(i) for i in args[1] if isinstance(i, Tensor)}
            if "cpu" in indices:
                self.seen.wait(f"upload of an index ({name})")
            if indices <= {"cpu", sides[0]}:
                return  # a number that is written becomes a tensor on the device
        mixed = {s for tensor, s in zip(tensors, sides, strict=True) if s != "meta" and (tensor.dim() or s != "cpu")}
        if len(mixed) > 1:
            if torch._C._current_graph_task_id() != -1:
                for tensor in tensors:
                    self.mark(tensor, "cuda:0")  # as above: made by autograd itself
                return
            shapes = [(side, tuple(t.shape), str(t.dtype)) for t, side in zip(tensors, sides, strict=True)]
            raise MixedDevicesError(f"{func} over {shapes} at {_place()}")

    def _count_waits(self, name: str, args: Any) -> None:
        if name in WAITING:
            self.seen.wait(name)
        elif name in ("index", "index_put_", "_index_put_impl_") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]
        ):
            self.seen.wait("boolean index")

    # ---------------------------------------------------------------- what torch's Python part decides by itself

    def move(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`Tensor.to` between the places."""
        if self.inside:
            return _to(tensor, *args, **kwargs)
        if args and isinstance(args[0], Tensor):
            return self.move(tensor, args[0].device, args[0].dtype)
        if args and type(args[0]) is int:
            return self.move(tensor, torch.device("cuda", args[0]), *args[1:], **kwargs)
        parsed = {k: v for k, v in kwargs.items() if k != "copy"}
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **parsed)
        here, copy = tensor.device, bool(kwargs.get("copy"))
        if device is None or "meta" in (device.type, here.type):
            if device is not None and device.type == "cuda":  # out of nothing
                return torch.empty_like(tensor, dtype=dtype, device=device)
            return _to(tensor, *args, **kwargs)
        if _side_of(device) == _side_of(here):
            return _to(tensor, dtype or tensor.dtype, copy=copy)
        return _Moved.apply(tensor, self, device, dtype or tensor.dtype, bool(non_blocking))


def _non_blocking(args: Any, kwargs: Any) -> bool:
    return bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2]))


def _side_of(device: torch.device) -> str:
    """cuda without a number is the first card."""
    return f"cuda:{device.index or 0}" if device.type == "cuda" else device.type


def _kind(side: str) -> str:
    return side.partition(":")[0]


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mode: _Device, device: Any, dtype: Any, non_blocking: bool) -> Tensor:
        ctx.source, ctx.dtype = tensor.device, tensor.dtype
        mode.moving = True
        try:
            return torch.ops.aten._to_copy(tensor, dtype=dtype, device=device, non_blocking=non_blocking)
        finally:
            mode.moving = False

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.to(ctx.source).to(ctx.dtype), None, None, None, None


_to = Tensor.to


@contextlib.contextmanager
def pretended_cuda(cards: int = 1, capability: tuple[int, int] = (8, 6)) -> Iterator[Pretended]:
    """Within the block torch sees so many cards of 12 GiB, which are pretended; yields what happens on them.

    The arithmetic is the CPU's whatever the compute capability: only what is chosen by it differs.
    """
    from qswitch.plan import machine
    from qswitch.rollout import step_graph

    torch.utils._device._device_constructors()  # kept for the process: not to be read first while all is patched
    seen = Pretended()
    mode = _Device(seen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a dispatch mode belongs to one thread
        _patch_tensors(patch, mode)
        _patch_cuda(patch, seen, cards, capability)
        card = machine._DetectedGpu(11 * GIB, "pretended", capability)
        patch.setattr(machine, "_detect_gpu", lambda index=0, **_: card if index < cards else None)
        patch.setattr(step_graph, "CudaRecorder", lambda: seen.record)
        AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the device of the process
        try:
            with mode:
                yield seen
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def _patch_tensors(patch: pytest.MonkeyPatch, mode: _Device) -> None:
    def device(tensor: Tensor) -> torch.device:
        side = mode.side(tensor)
        return torch.device(side) if side.startswith("cuda") else _real_device.__get__(tensor)

    def read(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def reads(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if mode.side(tensor) not in ("cpu", "meta"):
                if name == "numpy":
                    raise MixedDevicesError(f"numpy() of a tensor on the device at {_place()}")
                mode.seen.wait(name)
            return original(tensor, *args, **kwargs)

        return reads

    def pinned(tensor: Tensor, *_: Any) -> Tensor:
        if mode.side(tensor) not in ("cpu", "meta"):
            raise MixedDevicesError(f"pin_memory() of a tensor on the device at {_place()}")
        copy = tensor.clone()
        mode.pinned.add(copy.untyped_storage())
        return copy

    attention = torch.nn.functional.scaled_dot_product_attention

    def attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Where torch has no kernel for the CPU, it makes the causal mask and multiplies, all of it seen here."""
        outer, mode.attending = mode.attending, mode.side(query)
        try:
            return attention(query, *args, **kwargs)
        finally:
            mode.attending = outer

    patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    storage_device = torch._C.StorageBase.device  # type: ignore[attr-defined]
    patch.setattr(Tensor, "device", property(device), raising=False)
    patch.setattr(Tensor, "is_cuda", property(lambda t: mode.side(t) not in ("cpu", "meta")), raising=False)
    patch.setattr(
        torch.UntypedStorage, "device",
        property(lambda s: torch.device("cuda", mode.marked[s]) if s in mode.marked else storage_device.__get__(s)),
        raising=False,
    )  # fmt: skip
    patch.setattr(Tensor, "to", lambda t, *a, **k: mode.move(t, *a, **k))
    patch.setattr(Tensor, "cpu", lambda t, *a, **k: mode.move(t, "cpu"))
    patch.setattr(Tensor, "cuda", lambda t, *a, **k: mode.move(t, CUDA))
    patch.setattr(Tensor, "pin_memory", pinned)
    for name in ("tolist", "numpy"):
        patch.setattr(Tensor, name, read(name))
    for name in ("tensor", "as_tensor"):
        patch.setattr(torch, name, _made_on_either_side(getattr(torch, name)))


def _made_on_either_side(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.tensor and torch.as_tensor, which would ask the driver before any dispatch."""

    def made(data: Any, *args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        if device is None and isinstance(data, Tensor):
            device = data.device
        if device is None or torch.device(device).type != "cuda":
            return make(data, *args, device=device, **kwargs) if device is not None else make(data, *args, **kwargs)
        host = data if isinstance(data, Tensor) else make(data, *args, **kwargs)
        return host.to(device, kwargs.get("dtype") or host.dtype)

    return made


_OF_DEVICE = {
    "get_device_capability", "get_device_properties", "get_device_name", "max_memory_allocated", "memory_allocated",
    "memory_reserved", "max_memory_reserved", "mem_get_info", "reset_peak_memory_stats", "memory_stats",
}  # fmt: skip
"""What takes a device, also one without a number; torch refuses any but a CUDA device there."""


def _answers(answer: Any, *, of_device: bool) -> Callable[..., Any]:
    def answers(*arguments: Any, **options: Any) -> Any:
        if of_device:
            _get_device_index(options.get("device", arguments[0] if arguments else None), optional=True)
        return answer

    return answers


def _patch_cuda(patch: pytest.MonkeyPatch, seen: Pretended, cards: int, capability: tuple[int, int]) -> None:
    """What qswitch and its libraries ask of torch.cuda; of random states there is only the CPU's."""

    properties = types.SimpleNamespace(
        total_memory=12 * GIB, name="pretended", major=capability[0], minor=capability[1], multi_processor_count=28
    )
    answers: dict[str, Any] = {
        "is_available": True, "device_count": cards, "current_device": 0, "is_initialized": True,
        "_is_in_bad_fork": False, "set_device": None, "get_device_capability": capability,
        "get_device_properties": properties,
        "get_device_name": "pretended", "max_memory_allocated": 0, "memory_allocated": 0, "memory_reserved": 0,
        "max_memory_reserved": 0, "mem_get_info": (11 * GIB, 12 * GIB), "get_rng_state_all": [], "init": None,
        "set_rng_state_all": None, "set_rng_state": None, "manual_seed": None, "manual_seed_all": None,
        "_lazy_init": None, "is_bf16_supported": capability >= (8, 0),
        "reset_peak_memory_stats": None, "empty_cache": None, "memory_stats": {},
        "get_sync_debug_mode": 0, "set_sync_debug_mode": None,
    }  # fmt: skip
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, _answers(answer, of_device=name in _OF_DEVICE), raising=False)
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: seen.capturing)

    def set_per_process_memory_fraction(fraction: float, device: Any = None) -> None:
        seen.memory_fractions.append((fraction, 0 if device is None else _get_device_index(device)))

    patch.setattr(torch.cuda, "set_per_process_memory_fraction", set_per_process_memory_fraction)
    patch.setattr(torch.cuda, "synchronize", lambda device=None: seen.land())
    made_generator = torch.Generator
    patch.setattr(torch, "Generator", lambda device="cpu": made_generator())
    patch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state())
    for name in ("_exchange_device", "_maybe_exchange_device"):  # of torch.cuda.device, which stays as it is
        patch.setattr(torch.cuda, name, lambda _: 0)
    # Asks the driver for a stream, which a build of torch for CUDA does not find on a machine without a GPU.
    patch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda _: None, raising=False)
    fork = torch.random.fork_rng
    patch.setattr(torch.random, "fork_rng", lambda devices=(), enabled=True, **_: fork(devices=[], enabled=enabled))
    made = torch.autocast.__init__
    patch.setattr(
        torch.autocast, "__init__",
        lambda self, device_type, *a, **k: made(self, "cpu" if device_type == "cuda" else device_type, *a, **k),
    )  # fmt: skip
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        original = getattr(torch, name)
        patch.setattr(torch, name, lambda *_, original=original: original("cpu"))
