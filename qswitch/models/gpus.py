"""A teacher whose layers lie on several GPUs: which GPUs, and which module on which.

transformers reads each tensor onto its GPU by such a map, and accelerate's hooks bring what a module is given to the
GPU of the module. The embedding, the last norm, the head and whatever else is no layer are on the first GPU, where the
student and the cache of teacher outputs are. Keys and values stay where their layer is (`rollout/cache_layers.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from qswitch.config import TeacherSection
from qswitch.errors import ModelError
from qswitch.models.decoder_layers import find_layers
from qswitch.models.runtime import Runtime
from qswitch.plan.cards import even_split


def gpus_of_teacher(teacher: TeacherSection, runtime: Runtime) -> list[int]:
    """Indices of the GPUs over which the teacher lies, the run's own first; empty where it is as every model.

    Raises:
        ModelError: there are not so many.
    """
    if teacher.num_gpus == 1:
        return []
    seen = torch.cuda.device_count() if runtime.device.type == "cuda" else 0
    if seen < teacher.num_gpus:
        raise ModelError(
            f"teacher.num_gpus={teacher.num_gpus}, but there are {seen} GPUs to compute on. Lower it, or see "
            "CUDA_VISIBLE_DEVICES."
        )
    return list(range(teacher.num_gpus))


def device_map(causal: Any, gpus: Sequence[int], layers: Sequence[int] | None = None) -> dict[str, torch.device]:
    """Name of every module that is placed as a whole -> its GPU, for a causal model, which may be without weights.

    `layers` of each GPU, in the order of the model; None: equally many.

    Raises:
        ModelError: its layers are not found.
    """
    name, found = find_layers(causal)
    numbers = even_split(len(found), len(gpus)) if layers is None else layers
    assert sum(numbers) == len(found) and len(numbers) == len(gpus), (numbers, len(found), gpus)
    owners = [gpu for gpu, number in zip(gpus, numbers, strict=True) for _ in range(number)]
    others = dict.fromkeys(_beside(causal, name), torch.device("cuda", gpus[0]))
    return others | {f"{name}.{i}": torch.device("cuda", gpu) for i, gpu in enumerate(owners)}


def begin_on(causal: Any, gpu: int) -> None:
    """Let a model that was read by a `device_map` take its inputs on this GPU; accelerate takes any of the map."""
    if hasattr(causal, "_hf_hook"):  # not where the map names one GPU alone
        causal._hf_hook.execution_device = torch.device("cuda", gpu)


def _beside(module: nn.Module, layers: str, prefix: str = "") -> Iterator[str]:
    """Names of the modules beside the list of layers, at each level down to it, and of tensors that no module has."""
    for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        yield f"{prefix}{name}"
    for name, child in module.named_children():
        if layers.startswith(f"{prefix}{name}."):
            yield from _beside(child, layers, f"{prefix}{name}.")
        elif f"{prefix}{name}" != layers:
            yield f"{prefix}{name}"
