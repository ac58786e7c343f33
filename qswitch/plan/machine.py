"""What a plan is made for: the device and its arithmetic, how much memory it has, and how fast it is.

Knows no model and no configuration beyond train.device and train.compute_dtype.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qswitch.config import TrainSection
from qswitch.errors import ConfigError
from qswitch.launch import launched
from qswitch.units import GIB

Device = Literal["cuda", "cpu"]

# nvidia-smi counts cards by their slot, CUDA the fastest first unless it is told before it begins: "GPU 0" is to be one
# card. Where a notebook used CUDA before, or has set another order, the names of the two may differ.
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")

DRIVER_RESERVE_BYTES = 400 * 2**20
"""Of a card's nominal memory, what no program gets: the driver's reserve (nvidia-smi -q calls it "Reserved"; 200 to 400
MiB on 12 to 24 GiB cards) and a text console. A desktop on the same card takes up to 1 GiB more. An allowance, not
measured by this project."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A consumer card as its maker specifies it."""

    nominal_gib: int
    bandwidth_bytes_per_s: float
    flops: float
    """bf16 (Turing: fp16) matrix products with fp32 accumulation, without sparsity: on GeForce cards twice the fp32
    rate from Ampere on, four times on Turing."""
    num_multiprocessors: int
    capability: tuple[int, int]
    """CUDA compute capability."""
    drives_screens: bool = True

    @property
    def free_bytes(self) -> int:
        """What a program finds on a card without a desktop."""
        return self.nominal_gib * GIB - DRIVER_RESERVE_BYTES


# Memory, bandwidth, fp32 rate, multiprocessors: NVIDIA's product pages and its Turing, Ampere GA102, Ada and Blackwell
# papers. A T4's memory is that with its error correction, which notebook services leave on.
GPUS = {
    "rtx2060-6gb": Gpu(6, 336e9, 25.8e12, 30, (7, 5)),
    "rtx2060-12gb": Gpu(12, 336e9, 28.7e12, 34, (7, 5)),
    "rtx2060super-8gb": Gpu(8, 448e9, 28.7e12, 34, (7, 5)),
    "rtx2070super-8gb": Gpu(8, 448e9, 36.2e12, 40, (7, 5)),
    "rtx2080super-8gb": Gpu(8, 496e9, 44.6e12, 48, (7, 5)),
    "rtx2070-8gb": Gpu(8, 448e9, 29.9e12, 36, (7, 5)),
    "rtx2080-8gb": Gpu(8, 448e9, 40.3e12, 46, (7, 5)),
    "rtx2080ti-11gb": Gpu(11, 616e9, 53.8e12, 68, (7, 5)),
    "tesla-t4-15gb": Gpu(15, 320e9, 65.0e12, 40, (7, 5), drives_screens=False),
    "rtx3050-6gb": Gpu(6, 168e9, 13.6e12, 18, (8, 6)),
    "rtx3050-8gb": Gpu(8, 224e9, 18.2e12, 20, (8, 6)),
    "rtx4050-laptop-6gb": Gpu(6, 192e9, 18.0e12, 20, (8, 9)),
    "rtx3060ti-8gb": Gpu(8, 448e9, 32.4e12, 38, (8, 6)),
    "rtx3070-8gb": Gpu(8, 448e9, 40.6e12, 46, (8, 6)),
    "rtx3070ti-8gb": Gpu(8, 608e9, 43.5e12, 48, (8, 6)),
    "rtx4060-8gb": Gpu(8, 272e9, 30.2e12, 24, (8, 9)),
    "rtx4060ti-8gb": Gpu(8, 288e9, 44.2e12, 34, (8, 9)),
    "rtx5060ti-8gb": Gpu(8, 448e9, 47.4e12, 36, (12, 0)),
    "rtx5060-8gb": Gpu(8, 448e9, 38.4e12, 30, (12, 0)),
    "rtx3080-10gb": Gpu(10, 760e9, 59.5e12, 68, (8, 6)),
    "rtx3060-12gb": Gpu(12, 360e9, 25.4e12, 28, (8, 6)),
    "rtx3080-12gb": Gpu(12, 912e9, 61.3e12, 70, (8, 6)),
    "rtx3080ti-12gb": Gpu(12, 912e9, 68.2e12, 80, (8, 6)),
    "rtx4070-12gb": Gpu(12, 504e9, 58.2e12, 46, (8, 9)),
    "rtx4070super-12gb": Gpu(12, 504e9, 71.0e12, 56, (8, 9)),
    "rtx4070ti-12gb": Gpu(12, 504e9, 80.2e12, 60, (8, 9)),
    "rtx5070-12gb": Gpu(12, 672e9, 61.7e12, 48, (12, 0)),
    "rtx4060ti-16gb": Gpu(16, 288e9, 44.2e12, 34, (8, 9)),
    "rtx5060ti-16gb": Gpu(16, 448e9, 47.4e12, 36, (12, 0)),
    "rtx4080-16gb": Gpu(16, 717e9, 97.4e12, 76, (8, 9)),
    "rtx4070tisuper-16gb": Gpu(16, 672e9, 88.2e12, 66, (8, 9)),
    "rtx4080super-16gb": Gpu(16, 736e9, 104.4e12, 80, (8, 9)),
    "rtx5070ti-16gb": Gpu(16, 896e9, 87.9e12, 70, (12, 0)),
    "rtx5080-16gb": Gpu(16, 960e9, 112.6e12, 84, (12, 0)),
    "rtx3090-24gb": Gpu(24, 936e9, 71.2e12, 82, (8, 6)),
    "rtx3090ti-24gb": Gpu(24, 1008e9, 80.0e12, 84, (8, 6)),
    "rtx4090-24gb": Gpu(24, 1008e9, 165.2e12, 128, (8, 9)),
    "rtx5090-32gb": Gpu(32, 1792e9, 209.6e12, 170, (12, 0)),
}
REFERENCE_GPU = GPUS["rtx3060-12gb"]
"""The card whose times order the candidates where none is named."""


Dtype = Literal["bf16", "fp16", "fp32", "fp64"]


@dataclass(frozen=True, slots=True)
class Machine:
    """What bytes and seconds depend on beside the models."""

    device: Device
    compute_dtype: Dtype
    """The arithmetic of both models."""
    gpu: Gpu = REFERENCE_GPU
    """Whose times are used, also for a CPU: only the order of candidates depends on it."""
    capability: tuple[int, int] | None = None
    """The card's CUDA compute capability, where the driver or the card's name says it."""

    @property
    def compute_bytes(self) -> int:
        """Width of the compute dtype."""
        return {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}[self.compute_dtype]

    @property
    def accumulate_bytes(self) -> int:
        """Width of log-probabilities, losses and trainable weights: 8 with fp64 arithmetic, else 4."""
        return 8 if self.compute_dtype == "fp64" else 4


def gpu_dtype(capability: tuple[int, int]) -> Dtype:
    """What train.compute_dtype=auto is on a card of a CUDA compute capability.

    bf16 from Ampere (8.0) on. Volta and Turing (7.0, 7.5: V100, T4, RTX 2060 to 2080) multiply fp16 in their tensor
    cores and have no bf16; older cards have neither.
    """
    if capability >= (8, 0):
        return "bf16"
    return "fp16" if capability >= (7, 0) else "fp32"


@dataclass(frozen=True, slots=True)
class Budget:
    """How much memory a plan may take, and where the figure is from."""

    num_bytes: int
    origin: str
    device: Device | None = None
    """The device that the budget belongs to; None: whatever train.device finds here."""
    gpu: Gpu | None = None


def parse_size(text: str | int | float) -> int:
    """Bytes of "12GiB", "12GB", "512MiB" or "12". Every unit is binary: a "12 GB" card has 12 GiB; no unit means GiB.

    Raises:
        ConfigError: no such size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])i?b?)?\s*", str(text), re.IGNORECASE)
    size = int(float(match[1]) * 2 ** {"k": 10, "m": 20, "g": 30, "t": 40}[(match[2] or "g").lower()]) if match else 0
    if size < 1:
        raise ConfigError(f"{text!r} is not a memory size. Write it as 12GiB, 512MiB, or 12 (GiB).")
    return size


def find_budget(train: TrainSection, *, vram: str | None = None, gpu: str | None = None, num_gpus: int = 1) -> Budget:
    """The named budget, else a named card's free memory, else what this machine has free; both: so much of that card.

    A named budget or card is a GPU's, also where this machine has none, unless train.device is cpu. Of `num_gpus` it is
    that of each, so of those here what the fullest has left.

    Raises:
        ConfigError: the card is not in the table or has less than the budget, or nothing can be found out.
    """
    if gpu is not None:
        card = GPUS.get(gpu.lower())
        if card is None:
            near = _cards_like(gpu)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(
                f"--gpu {gpu} is not in the table.{hint} Known: {', '.join(GPUS)}. Or give --vram; the hours are then "
                "those of an RTX 3060."
            )
        if vram is not None:
            if (size := parse_size(vram)) > card.nominal_gib * GIB:
                raise ConfigError(f"--vram {vram} is more than the {card.nominal_gib} GiB of {gpu}. Lower it.")
            return Budget(size, f"--vram {vram} of {gpu}", "cuda", card)
        free = f"{card.free_bytes / GIB:.1f} of {card.nominal_gib} GiB are free to a program on {gpu}"
        return Budget(card.free_bytes, free, "cuda", card)
    if vram is not None:
        return Budget(parse_size(vram), f"--vram {vram}", None if train.device == "cpu" else "cuda")
    size, origin = detect_budget_bytes(train.device, num_gpus)
    return Budget(size, origin)


LIKE_ENOUGH = 0.85
"""Similarity of two models with one number, above which one may be meant by the other's name: a 3060 laptop is no 3060.
"""


def _cards_like(name: str) -> list[str]:
    """The cards of the table that a name may mean: those with its model number whose model resembles it most; of
    several memories that which it says, else all. Another model number is another card."""
    written = _model(name.lower().replace("gb", ""))
    said = re.fullmatch(r"([a-z]*)(\d{4}|(?<=t)4)([a-z]*)(\d*)", written)
    if said is None:
        return []
    before, number, after, memory = said.groups()

    def unlike(card: str) -> float:
        return -difflib.SequenceMatcher(None, _model(card.rpartition("-")[0]), before + number + after).ratio()

    cards = sorted((card for card in GPUS if re.search(rf"(rtx|t){number}(?!\d)", card)), key=unlike)
    nearest = [card for card in cards if unlike(card) == unlike(cards[0]) < -LIKE_ENOUGH]
    return [card for card in nearest if card.endswith(f"-{memory}gb")] or nearest


def _model(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|rtx|[^a-z0-9]", "", name)


def detect_budget_bytes(device: Literal["auto", "cuda", "cpu"] = "auto", num_gpus: int = 1) -> tuple[int, str]:
    """Free memory of the GPU that torch will use, else what the host can still give: (bytes, where it is from).

    Of the first `num_gpus` GPUs the one that has least.

    Of several processes on this machine each has a GPU of its own, or an equal part of the host's memory.

    Raises:
        ConfigError: nothing can be found out, there are fewer GPUs, or one is a slice, whose memory nobody tells.
    """
    if device != "cpu":
        gpus = [gpu for gpu in (_detect_gpu(), *map(_detect_gpu, range(1, num_gpus))) if gpu is not None]
        if 0 < len(gpus) < num_gpus:
            raise ConfigError(
                f"teacher.num_gpus={num_gpus}, but nvidia-smi shows {len(gpus)} to this process. Lower it, or see "
                "CUDA_VISIBLE_DEVICES."
            )
        for gpu in gpus:
            if gpu.free_bytes is None:
                raise ConfigError(
                    f"{gpu.label} is cut into slices (MIG), and nvidia-smi tells the free memory of the whole card "
                    "only, so that this slice's is not known. Give it, a little below what its name in nvidia-smi -L "
                    "says: for MIG 1g.10gb, --vram 9GiB."
                )
        sizes = [(gpu.free_bytes, gpu.label) for gpu in gpus if gpu.free_bytes is not None]
        if sizes:
            size, label = min(sizes)
            return size, f"free memory of {label} (nvidia-smi)"
        if device == "cuda":
            raise ConfigError(
                "train.device=cuda, but no GPU answers to nvidia-smi. Give the budget, for example --vram 12GiB, or "
                "set train.device=cpu."
            )
    available, origin = _host_available_bytes()
    if device == "auto" and (failure := failed_driver()) is not None:
        origin = f"{origin}; {failure.rstrip('.')}"
    limit = _control_group_free_bytes()
    if limit is not None and (available is None or limit < available):
        available, origin = limit, "free memory of the container (cgroup)"
    if available is None:
        raise ConfigError("The free memory of this machine cannot be read. Give the budget, for example 12GiB.")
    num = launched().local_count
    if num > 1:  # which have loaded torch by now, to find each other; the plan counts that again
        available, origin = available // num + _resident_bytes(), f"{origin}, one of {num} equal parts"
    return available, origin


def _resident_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


@dataclass(frozen=True, slots=True)
class _DetectedGpu:
    free_bytes: int | None
    """None for a slice of a card (MIG), which `nvidia-smi --query-gpu` does not know."""
    label: str
    capability: tuple[int, int] | None
    """CUDA compute capability; None where the driver is too old to say."""


_seen_gpus: dict[tuple[str, str | None], _DetectedGpu] = {}
"""What nvidia-smi said last, by its path and by which GPU it was asked for."""


def _detect_gpu(index: int | None = None, *, is_fresh: bool = True) -> _DetectedGpu | None:
    """This process's GPU (torch's cuda:0 where there is one process), or that of an index, as nvidia-smi sees it; cold,
    since torch takes seconds and a CUDA context.

    Its free memory is asked for anew where `is_fresh`; name and capability stay, and a call of nvidia-smi takes up to
    seconds where the driver is loaded for it alone.

    CUDA_VISIBLE_DEVICES is read as CUDA reads it: indices or UUIDs, one for each process; empty or -1 hides all.
    A slice (MIG) is named by a UUID of its own, or by the index of a card that is cut, whose first slice CUDA takes
    then. nvidia-smi asks cards only: a slice's name and capability are those of the card that its UUID names, in the
    form of drivers before 470, or else of the first card.
    Both count by the bus, unless CUDA_DEVICE_ORDER was set otherwise or CUDA began before; the name is in the label.
    """
    program = _nvidia_smi()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    index = launched().local_rank if index is None else index
    first: str | None = str(index) if index else None
    if visible is not None:
        first = visible.split(",")[index].strip() if index < len(visible.split(",")) else ""
    if program is None or first in ("", "-1"):
        return None
    if not is_fresh and (program, first) in _seen_gpus:
        return _seen_gpus[program, first]
    if not is_fresh and _failed.get(program) is not None:
        return None
    card = first
    if first is not None and first.startswith("MIG-"):
        card = first[len("MIG-") :].partition("/")[0] if first.startswith("MIG-GPU-") else None
    chosen = [] if card is None else [f"--id={card}"]
    # Drivers before 510 know no compute_cap, those before 450 no MIG; one that answers nothing is no GPU.
    for fields in ("memory.free,name,compute_cap,mig.mode.current", "memory.free,name,mig.mode.current",
                   "memory.free,name"):  # fmt: skip
        query = [program, *chosen, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
            values = (value.strip() for value in answer.splitlines()[0].split(","))
            said = dict(zip(fields.split(","), values, strict=False))
            known = re.fullmatch(r"(\d+)\.(\d+)", said.get("compute_cap", ""))
            is_slice = (first or "").startswith("MIG-") or said.get("mig.mode.current") == "Enabled"
            which = "the first GPU" if first is None else f"GPU {first}"
            _seen_gpus[program, first] = _DetectedGpu(
                None if is_slice else int(said["memory.free"]) * 2**20,
                f"{which}, {said['name']}",
                (int(known[1]), int(known[2])) if known else None,
            )
            _failed.pop(program, None)
            return _seen_gpus[program, first]
        except subprocess.CalledProcessError as error:
            said_last = f"{error.stdout}{error.stderr}".strip().partition("\n")[0].rstrip(". ")
            _failed[program] = None if error.returncode == NO_DEVICES else f"exit code {error.returncode}: {said_last}"
        except subprocess.TimeoutExpired as error:
            _failed[program] = f"no answer in {error.timeout:.0f} s"
            return None  # another list of fields would take as long
        except (OSError, ValueError, LookupError):
            _failed[program] = None
    return None


NO_DEVICES = 6
"""Exit code of nvidia-smi where there is no such GPU, or none."""
_failed: dict[str, str | None] = {}
"""How an nvidia-smi, by its path, failed when it was asked last."""


def failed_driver() -> str | None:
    """That nvidia-smi is there and fails, so that nobody can tell whether there is a GPU; None where it answers."""
    program = _nvidia_smi()
    if program is None or _detect_gpu(is_fresh=False) is not None or _failed.get(program) is None:
        return None
    return (
        f"nvidia-smi fails ({_failed[program]}), so nobody can tell what is free on a GPU that may be here. After an "
        "update of the driver restart the machine."
    )


def _nvidia_smi() -> str | None:
    """Its path; under WSL2 it lies where a login shell alone looks."""
    return shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=str(WSL_PROGRAMS))


WSL_PROGRAMS = Path("/usr/lib/wsl/lib")


def detected_gpu() -> str | None:
    """The GPU that nvidia-smi shows and CUDA_VISIBLE_DEVICES leaves, with its driver's version; None without one."""
    gpu, program = _detect_gpu(), _nvidia_smi()
    if gpu is None or program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return gpu.label
    return f"{gpu.label}, driver {answer.splitlines()[0].strip()}" if answer.strip() else gpu.label


def _host_available_bytes() -> tuple[int | None, str]:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None, ""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return (int(match[1]) * 1024 if match else None), "available host memory (/proc/meminfo)"


CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Where a container sees its own limits (cgroup v2)."""


def _control_group_free_bytes() -> int | None:
    """What a container may still take; None without a limit.

    The kernel counts the pages of files that were read as used. It drops those that nothing has touched twice before it
    refuses memory, so they are free (Kubernetes' working set leaves out the same). Its figures are not of one moment.
    """
    try:
        limit, used = (int((CONTROL_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):
        return None  # no limit ("max"), or another hierarchy
    try:
        match = re.search(r"^inactive_file (\d+)$", (CONTROL_GROUP / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return max(1, min(limit, limit - used + (int(match[1]) if match else 0)))


def has_native_bf16_cpu() -> bool:
    """Whether this CPU multiplies bf16 in hardware."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return re.search(r"\b(avx512_bf16|amx_bf16)\b", flags) is not None


def describe_machine(
    train: TrainSection, device: Literal["auto", "cuda", "cpu"] | None = None, gpu: Gpu | None = None
) -> Machine:
    """Device and arithmetic to plan for; `device` overrides train.device (planning for a GPU one does not have)."""
    wanted = device or train.device
    here = _detect_gpu(is_fresh=False) if wanted == "auto" or (wanted == "cuda" and device is None) else None
    if wanted == "auto":
        wanted = "cuda" if here is not None else "cpu"
    card = gpu or (None if here is None else _card_called(here.label))
    dtype = train.compute_dtype
    by_name = None if card is None else card.capability
    capability = ((here and here.capability) or by_name) if wanted == "cuda" else None
    if dtype == "auto" and wanted == "cuda":
        # What neither the driver nor the card's name says is taken for the reference card's.
        dtype = gpu_dtype(capability or REFERENCE_GPU.capability)
    elif dtype == "auto":
        dtype = "bf16" if has_native_bf16_cpu() else "fp32"
    return Machine(wanted, dtype, card or REFERENCE_GPU, capability)


def _card_called(label: str) -> Gpu | None:
    """The card of the table that nvidia-smi's name means; of two with one name the smaller."""
    name = re.sub(r"[^a-z0-9]", "", label.lower())
    fits = [card for card in GPUS if card.rpartition("-")[0].replace("-", "") in name]
    if not fits:
        return None
    return GPUS[max(fits, key=lambda card: (len(card.rpartition("-")[0]), -GPUS[card].nominal_gib))]
