"""Where models live and in which dtype they compute, resolved for this machine."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import shorten

import torch

from qswitch.config import TrainSection
from qswitch.errors import ModelError
from qswitch.launch import launched
from qswitch.plan.machine import detected_gpu, failed_driver, gpu_dtype, has_native_bf16_cpu

DRIVERS = {"12": 525, "13": 580}
"""Major version of CUDA -> the oldest branch of the Linux driver that runs it (NVIDIA's compatibility table)."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """Where models live and in which dtype they compute."""

    device: torch.device
    compute_dtype: torch.dtype


def make_runtime(train: TrainSection) -> Runtime:
    """Device and arithmetic of a run, `auto` resolved for this machine; of several processes each has its own GPU.

    Raises:
        ModelError: torch cannot use a GPU that is asked for, or that nvidia-smi shows, or there are more processes than
            GPUs; with the reason.
    """
    available = torch.cuda.is_available()
    if train.device != "cpu" and not available:
        reason = unusable_gpu()
        if reason is not None:
            raise ModelError(f"{reason} To compute on the CPU instead: train.device=cpu, or CUDA_VISIBLE_DEVICES= .")
        if train.device == "cuda":
            raise ModelError(
                f"train.device=cuda, but torch {torch.__version__} sees no GPU. Install a CUDA build of torch and "
                "check nvidia-smi, or set train.device=cpu."
            )
    if available and train.device != "cpu":  # with its number, which some functions of torch.cuda insist on
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        device = torch.device("cpu")
    launch = launched()
    if device.type == "cuda" and launch.count > 1:
        if launch.local_rank >= torch.cuda.device_count():
            raise ModelError(
                f"{launch.local_count} processes were started on this machine, but torch sees "
                f"{torch.cuda.device_count()} GPUs, so process {launch.rank} has none. Start as many as there are GPUs."
            )
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
    if train.compute_dtype != "auto":
        return Runtime(device=device, compute_dtype=DTYPES[train.compute_dtype])
    return Runtime(device=device, compute_dtype=native_dtype(device))


def unusable_gpu() -> str | None:
    """Why torch cannot use the GPU that nvidia-smi shows, or would if it did not fail, and the remedy; else None."""
    if torch.cuda.is_available():
        return None
    shown = detected_gpu()
    if shown is None:
        return failed_driver()
    if torch.version.cuda is None:
        return f"nvidia-smi shows {shown}, but torch {torch.__version__} is built without CUDA. Install a CUDA build."
    try:
        torch.cuda.init()
        reason = "it finds no device"
    except (RuntimeError, AssertionError) as error:
        reason = shorten(str(error), 200, placeholder="").rstrip(". ")
    build = f"torch {torch.__version__} for CUDA {torch.version.cuda}"
    found = f"nvidia-smi shows {shown}, but {build} cannot use it: {reason}."
    needed = DRIVERS.get(torch.version.cuda.partition(".")[0])
    if needed is None or "too old" not in reason:
        return found
    return (
        f"{found} CUDA {torch.version.cuda} needs driver {needed} or later: update it, or install torch for an older "
        'CUDA; what to install is under "sees no GPU" in '
        "https://github.com/qswitch/qswitch/blob/main/docs/troubleshooting.md"
    )


def native_dtype(device: torch.device) -> torch.dtype:
    """The narrowest arithmetic that the device has in hardware; elsewhere bf16 is up to 25 times slower than fp32."""
    if device.type == "cuda":
        return DTYPES[gpu_dtype(torch.cuda.get_device_capability(device))]
    return torch.bfloat16 if has_native_bf16_cpu() else torch.float32
