"""Several processes that do one run: what they tell each other, and how all end when one does.

A run in one process is a `Processes()`, whose methods return at once what this process has. With several, every process
knows the same order of prompts, the same buffers and the same weights; each writes and learns its share of a step's
sequences, and what one of them must decide is decided by the first. All talk is in step: each process calls the same
methods in the same order. Whatever may fail in one process only is done inside `everyone` or the methods
built on it, which raise in all processes what was raised in one, so that nobody waits for a process that has given up.

torch.distributed carries the messages (gloo; nccl for tensors on a GPU). Nothing of a run is known here. Cold until
several processes meet.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from qswitch.errors import ConfigError, ProcessLostError, QSwitchError
from qswitch.launch import GRADIENT_BUCKET_BYTES, Launch, launched

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

MEET_S = 300.0
"""How long a process waits for the others to start."""
TALK_S = 7 * 24 * 3600.0
"""How long one message may take: a process may tokenise for hours meanwhile. That one has ended is known otherwise."""
LEAVE_S = 8.0
"""After another process has ended: how long this one may take to end by itself, with its message."""
_KEEPALIVE_S = 5
"""Between signs of life that the kernel asks of a silent machine; after three without an answer it counts as gone."""


class Processes:
    """The processes of a run, seen from one of them. Without arguments: this one alone."""

    def __init__(self, launch: Launch | None = None, group: Any = None) -> None:
        launch = launch or Launch()
        self.rank, self.count, self._is_first_here = launch.rank, launch.count, launch.local_rank == 0
        self._group, self._gpu_group = group, None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes, says and decides."""
        return self.rank == 0

    # ---------------------------------------------------------------- values

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank.

        Raises:
            ProcessLostError: another process has ended.
        """
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        with _while_all_live():
            dist.all_gather_object(found, value, group=self._group)
        return found

    def gather_to_first(self, value: T) -> list[T]:
        """In the first process the value of every process, by rank; in the others their own alone."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] | None = [None] * self.count if self.is_first else None
        with _while_all_live():
            dist.gather_object(value, found, dst=0, group=self._group)
        return [value] if found is None else found

    def everyone(self, action: Callable[[], T]) -> list[T]:
        """The result of `action` of every process, by rank; what fails in one fails in all.

        Raises:
            QSwitchError: what `action` raised in the first of the processes in which it failed.
            ProcessLostError: another process has ended, or `action` raised something else there.
        """
        if self.count == 1:
            return [action()]
        mine: Exception | None = None
        outcome: tuple[bool, Any]
        try:
            outcome = (True, action())
        except Exception as error:
            mine, outcome = error, (False, _portable(error, self.rank))
        found: list[tuple[bool, Any]] = self.gather(outcome)
        failed = next((rank for rank, (done, _) in enumerate(found) if not done), None)
        if failed is None:
            return [value for _, value in found]
        if failed == self.rank:
            assert mine is not None
            raise mine
        raise found[failed][1]

    def from_first(self, action: Callable[[], T]) -> T:
        """The first process's result of `action`, in every process; raises as `everyone`."""
        return self.everyone(lambda: action() if self.is_first else None)[0]  # type: ignore[return-value]

    def each(self, action: Callable[[], T]) -> T:
        """This process's own result of `action`; raises as `everyone`."""
        found: list[T] = []
        self.everyone(lambda: found.append(action()))
        return found[0]

    def in_turn(self, action: Callable[[], T]) -> T:
        """As `each`, but the first process of each machine goes ahead, and the others find the files it has made."""
        found: list[T] = []
        for is_turn in (self._is_first_here, not self._is_first_here):
            self.everyone((lambda: found.append(action())) if is_turn else (lambda: None))
        return found[0]

    # ---------------------------------------------------------------- work

    def divide(self, costs: Sequence[float]) -> list[int]:
        """Which process does which piece of work: ranks, one per cost. Numbers of pieces differ by one at most.

        The most expensive first, each to the process that has least so far and room left. Which one that is does not
        depend on who asks.
        """
        owners = [0] * len(costs)
        if self.count == 1:
            return owners
        room, extra = divmod(len(costs), self.count)
        load, num = [0.0] * self.count, [0] * self.count
        for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            larger = sum(n > room for n in num)  # of those that may do one more, at most `extra`
            free = [r for r in range(self.count) if num[r] < room or (num[r] == room and larger < extra)]
            owners[piece] = chosen = min(free, key=lambda r: (load[r], r))
            load[chosen] += costs[piece]
            num[chosen] += 1
        return owners

    # ---------------------------------------------------------------- tensors

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Let every process have the sum of all processes' gradients, the same bits in each.

        A parameter that has a gradient in no process keeps none. Called once a step, after the last micro-batch: the
        wrapper DistributedDataParallel adds up inside every backward pass, and would wait for ever for a process with
        fewer micro-batches, or with no token to learn from.
        """
        if self.count == 1:
            return
        import torch

        device = parameters[0].device
        num_with = torch.tensor([float(p.grad is not None) for p in parameters], device=device)
        self._all_reduce(num_with)
        moved = [p for p, num in zip(parameters, num_with.tolist(), strict=True) if num]
        for bucket in _buckets(moved):
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([part.flatten() for part in parts])
            self._all_reduce(flat)
            for parameter, summed in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.copy_(summed.view_as(parameter))

    def copy_from_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite the tensors of every process with those of the first."""
        if self.count == 1:
            return
        import torch
        import torch.distributed as dist

        with torch.no_grad(), _while_all_live():
            for tensor in tensors:
                carried = tensor.detach().contiguous()
                dist.broadcast(carried, src=0, group=self._group_of(carried))
                tensor.copy_(carried)

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        import torch.distributed as dist

        with _while_all_live():
            dist.all_reduce(tensor, group=self._group_of(tensor))

    def _group_of(self, tensor: torch.Tensor) -> Any:
        """gloo for a tensor in host memory; nccl for one on a GPU, begun when it is first needed."""
        if tensor.device.type == "cpu":
            return self._group
        if self._gpu_group is None:
            import torch.distributed as dist

            self._gpu_group = dist.new_group(backend="nccl")
        return self._gpu_group


class _OtherProcessError(ProcessLostError):
    """What is raised where another process failed with an error that is not the user's to mend."""


def _portable(error: Exception, rank: int) -> Exception:
    """The error as another process can raise it."""
    if isinstance(error, QSwitchError):
        with contextlib.suppress(Exception):
            copy = pickle.loads(pickle.dumps(error))
            if str(copy) == str(error):
                return copy
    return _OtherProcessError(f"Process {rank} failed with {type(error).__name__}: {str(error)[:200]}")


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """The parameters in their order, those of one dtype together, up to GRADIENT_BUCKET_BYTES at a time."""
    by_dtype: dict[Any, list[Any]] = {}
    for parameter in parameters:
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for same in by_dtype.values():
        bucket: list[Any] = []
        size = 0
        for parameter in same:
            own = parameter.numel() * parameter.element_size()
            if bucket and size + own > GRADIENT_BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(parameter)
            size += own
        yield bucket


@contextlib.contextmanager
def _while_all_live() -> Iterator[None]:
    """torch says of a connection that broke what only its developers understand."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLostError(
            "Another process of this run has ended, so this one ends too. Its own message says why; go on from the "
            f"newest checkpoint with --resume. ({' '.join(str(error).split())[:160]})"
        ) from None


# ------------------------------------------------------------------------------------------------------ coming together

_joined: Processes | None = None
_voice: Any = None


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """The processes that the launcher started, met; this one alone where there is no launcher.

    Of several that fail for the same reason one is to say so: the error of the others has `said_elsewhere`. A block
    within a block is the same processes.

    Raises:
        ConfigError: they do not find each other.
    """
    global _joined, _voice
    launch = launched()
    if launch.count == 1 or _joined is not None:
        yield _joined or Processes()
        return
    processes = Processes(launch, _meet(launch))
    watch = None
    try:
        watch = _Watch(launch, processes)
        _joined, _voice = processes, _open_voice(launch, processes)
        yield processes
        processes.gather(None)  # whoever is done waits: the others still read what it holds
    except BaseException as error:
        if isinstance(error, ProcessLostError):
            time.sleep(1.0)  # the process that failed knows more
        if not _is_first_to_speak() and isinstance(error, QSwitchError):
            error.said_elsewhere = True
            time.sleep(1.0)  # launchers end all when one has ended: let the one that speaks do so
        raise
    finally:
        if watch is not None:
            watch.close()
        _joined = None
        _part()


def _meet(launch: Launch) -> Any:
    """The group in which messages may take their time.

    Raises:
        ConfigError: the others are not there.
    """
    import torch.distributed as dist

    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=MEET_S))
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        if "EADDRINUSE" in text or "address already in use" in text:
            raise ConfigError(
                f"{where} is in use by another program, so the processes cannot meet there. Choose another port: "
                "accelerate launch --main_process_port, or torchrun --master-port."
            ) from None
        raise ConfigError(
            f"Process {launch.rank} of {launch.count} did not meet the others at {where} within {MEET_S:.0f} s "
            f"({text[:160]}). Start as many processes as WORLD_SIZE says, with the same address and port, which every "
            "machine must reach."
        ) from None
    return dist.new_group(timeout=datetime.timedelta(seconds=TALK_S), backend="gloo")


def _part() -> None:
    import torch.distributed as dist

    with contextlib.suppress(Exception):
        dist.destroy_process_group()


def _open_voice(launch: Launch, processes: Processes) -> Any:
    """A counter that all processes share, by which one of them becomes the one that speaks."""
    import torch.distributed as dist

    def store(port: int, host: str, is_master: bool) -> Any:
        wait = datetime.timedelta(seconds=10)
        return dist.TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=wait)

    host = os.environ["MASTER_ADDR"]
    own = store(0, host, True) if launch.rank == 0 else None
    port = processes.gather(None if own is None else own.port)[0]
    assert port is not None
    return own or store(port, host, False)


def _is_first_to_speak() -> bool:
    try:
        return bool(_voice.add("spoke", 1) == 1)
    except Exception:  # the process that holds the counter has ended
        return True


class _Watch:
    """Ends this process when another one has ended, however long it would have computed on.

    Every process holds a connection to the first, which the kernel closes when its process ends, killed or not; a
    machine that is gone is found by keep-alive probes. No Python has to run for a process to count as alive.
    """

    def __init__(self, launch: Launch, processes: Processes) -> None:
        self._closing = False
        self._sockets: list[socket.socket] = []
        server = None
        if launch.rank == 0:
            server = socket.create_server(("", 0), backlog=launch.count)
            server.settimeout(MEET_S)
        port = processes.gather(None if server is None else server.getsockname()[1])[0]
        if server is None:
            self._sockets.append(socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=MEET_S))
        else:
            self._sockets += [server.accept()[0] for _ in range(launch.count - 1)]
            server.close()
        for connection in self._sockets:
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in (("TCP_KEEPIDLE", _KEEPALIVE_S), ("TCP_KEEPINTVL", _KEEPALIVE_S), ("TCP_KEEPCNT", 3)):
                if hasattr(socket, option):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        threading.Thread(target=self._run, name="qswitch-processes", daemon=True).start()

    def close(self) -> None:
        """From now on the others may end."""
        self._closing = True
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.close()

    def _run(self) -> None:
        with contextlib.suppress(OSError, ValueError), selectors.DefaultSelector() as selector:
            for connection in self._sockets:
                selector.register(connection, selectors.EVENT_READ)
            while not selector.select(timeout=1.0):  # nobody ever sends anything: what can be read is the end
                if self._closing:
                    return
        if self._closing:
            return
        time.sleep(LEAVE_S)
        if not self._closing:
            print(
                "error: Another process of this run has ended, so this one ends too. Go on from the newest checkpoint "
                "with --resume.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(2)
