"""A teacher whose layers lie on several GPUs of one process: how many on each, and what the further GPUs hold.

The first GPU holds all else: the student, its training, the cache, and of the teacher embedding, last norm and head.
Arithmetic over shapes, as `breakdown.py`; what the first GPU holds is counted there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeVar

from qswitch.config import RunConfig
from qswitch.plan import memory
from qswitch.plan.machine import Machine
from qswitch.plan.shapes import ModelShape

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Card:
    """A further GPU, which holds layers of the teacher and nothing else."""

    parts: dict[str, int]
    """Part -> bytes."""
    phases: dict[str, int]
    """load, rollout -> peak bytes."""

    @property
    def total_bytes(self) -> int:
        return max(self.phases.values())


def even_split(num_layers: int, num_gpus: int) -> tuple[int, ...]:
    """Layers of each GPU, differing by one at most; the first ones hold fewer, since they hold other things too."""
    each, over = divmod(num_layers, num_gpus)
    return tuple(each + (i >= num_gpus - over) for i in range(num_gpus))


def best_split(
    num_layers: int, num_gpus: int, measured: Callable[[tuple[int, ...]], T], peaks: Callable[[T], tuple[int, int]]
) -> T:
    """What is `measured` of the split whose fullest GPU holds least.

    `peaks` are the bytes of the first GPU, which grow with its layers, and of the fullest of the others, which shrink.
    """

    def with_first(num: int) -> T:
        return measured((num, *even_split(num_layers - num, num_gpus - 1)))

    low, high = 0, num_layers
    while low < high:
        middle = (low + high) // 2
        first, others = peaks(with_first(middle))
        low, high = (low, middle) if first >= others else (middle + 1, high)
    return min((with_first(num) for num in {max(low - 1, 0), low}), key=lambda found: max(peaks(found)))


def further_cards(
    config: RunConfig,
    teacher: ModelShape,
    machine: Machine,
    layers: tuple[int, ...],
    *,
    rows: int,
    slots: int,
    pass_tokens: int,
    drafts: bool,
) -> tuple[Card, ...]:
    """What each GPU after the first holds while `rows` sequences are written in `slots` slots.

    `pass_tokens` are read together in the largest pass, over all rows. `layers` are those of every GPU.
    """
    b, precision = machine.compute_bytes, config.teacher.precision
    cards = []
    for begin, end in pairwise(accumulate(layers)):
        # What a model of the first layers takes, less that of those before: exact also where layers differ.
        until, before = teacher.with_layers(end), teacher.with_layers(begin)
        parts = {
            "cuda_context": memory.CUDA_CONTEXT_BYTES,
            "teacher_weights": memory.weight_bytes(until, precision, b) - memory.weight_bytes(before, precision, b),
            "teacher_adapter": memory.attached_adapter_bytes(until, config.teacher, b)
            - memory.attached_adapter_bytes(before, config.teacher, b),
        }
        stays = sum(parts.values())
        load = {"load_buffer": memory.load_buffer_bytes(teacher, precision, b)}
        decode = {
            "teacher_kv_cache": memory.kv_cache_bytes(until, rows, slots, b, drafts=drafts)
            - memory.kv_buffer_bytes(before, rows, slots, b)
            - memory.state_bytes(before, rows, b) * (2 if drafts else 1),
            "prefill": memory.forward_bytes(teacher, 1, pass_tokens, b),
            "dequantisation": memory.dequantisation_bytes(teacher, precision, b),
        }
        moving = {"load": sum(load.values()), "rollout": sum(decode.values())}
        allowance = {name: int(size * memory.FRAGMENTATION_SHARE) for name, size in moving.items()}
        phases = {name: stays + moving[name] + allowance[name] for name in moving}
        parts |= {**load, **decode, "fragmentation": allowance[max(phases, key=phases.__getitem__)]}
        cards.append(Card(parts, phases))
    return tuple(cards)
