"""How a checkpoint's weights are quantised already, by config.json alone: what it takes to read them, and how large
they are. Cold. Knows nothing of the quantisation that qswitch does itself while it reads a model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PACKAGES = {
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel",),
    "compressed-tensors": ("compressed_tensors",),
    "torchao": ("torchao",),
    "bitsandbytes": ("bitsandbytes",),
    "fp8": ("triton", "kernels"),
    "mxfp4": ("triton", "kernels"),
}
"""Method -> the modules with which transformers 5.23 reads its weights as they are, or computes with them; others are
its own to judge."""
PIP_NAMES = {"compressed_tensors": "compressed-tensors", "kernels": "'transformers[kernels]'"}
"""Module -> what pip is to install, where that is not its name; of kernels transformers takes some versions only."""
UNPACKED_BY_TRANSFORMERS = ("fp8", "mxfp4")
"""Methods that `precision: bf16` turns into bf16 while the weights are read, on any device and without a package."""
GPU_ONLY = {"fp8": (8, 9), "mxfp4": (7, 5)}
"""Method -> the CUDA compute capability from which its weights are computed with as they are; FP8's is an RTX 4060's
or an H100's. Elsewhere transformers would unpack them in silence, into twice or four times the memory."""
FP16_ONLY = ("awq",)
"""Methods whose bf16 transformers turns into fp16 on a GPU, for its kernels have no bf16."""
MOVABLE = ("bitsandbytes", "fp8")
"""Methods all of whose weights models/residency.py finds: in parameters, buffers and bitsandbytes' own objects. MXFP4's
experts lie in objects of triton_kernels; the kernels of GPTQ and AWQ may keep the address of a weight, and torchao's
tensors hold others."""
SCALE_BITS = 16
WHOLE_BITS = 16


@dataclass(frozen=True, slots=True)
class StoredQuantisation:
    """The quantization_config of a config.json."""

    method: str
    """quant_method: gptq, awq, compressed-tensors, fp8, mxfp4, torchao, bitsandbytes, ..."""
    bits: float
    """Of a weight in a linear layer, its share of the scales included."""
    expert_bits: float
    """Of a weight of experts that lie in one tensor."""
    bnb_precision: str | None
    """nf4, fp4 or int8 where bitsandbytes made the files."""

    @property
    def precision(self) -> str:
        """The setting that reads the weights as they are."""
        return self.bnb_precision if self.bnb_precision in ("nf4", "int8") else "stored"


def stored_quantisation(values: Mapping[str, Any]) -> StoredQuantisation | None:
    """What config.json says of it; None for weights that are not quantised."""
    found = values.get("quantization_config")
    if not isinstance(found, Mapping):
        return None
    method = str(found.get("quant_method") or ("bitsandbytes" if _of_bitsandbytes(found) else "unknown"))
    bits = _bits(method, found)
    experts = 4 + 8 / 32 if method == "mxfp4" else bits  # one scale of 8 bits for 32 weights
    return StoredQuantisation(method, WHOLE_BITS if method == "mxfp4" else bits, experts, _of_bitsandbytes(found))


def problem_of(
    stored: StoredQuantisation | None,
    precision: str,
    *,
    device: str | None,
    capability: tuple[int, int] | None = None,
    compute_dtype: str | None = None,
    trains: bool = False,
) -> str | None:
    """Why weights stored so cannot be read in `precision` on this machine, and what to do; None where they can.

    `device` is cuda or cpu, None for a machine that is not this one. `capability` is the card's, and `compute_dtype`
    the arithmetic of the run; None: not known. A model that `trains` has no setting to stay as it is stored.
    """
    if stored is None:
        return "its weights are not quantised. Set precision nf4 or bf16" if precision == "stored" else None
    unpacks = stored.method in UNPACKED_BY_TRANSFORMERS
    if precision == "bf16" and unpacks:
        return None
    if precision not in ("stored", stored.bnb_precision):
        ways = ["bf16, which unpacks it while reading"] if unpacks else []
        ways += [] if trains and stored.precision == "stored" else [stored.precision]
        remedy = f"Set the precision to {' or '.join(ways)}, or use" if ways else "Use"
        return (
            f"it is stored quantised ({stored.method}), but precision={precision} was asked for. {remedy} the "
            "unquantised model, which qswitch quantises while reading"
        )
    if device is None:
        return None
    unfit = unfit_device(stored, device, capability)
    if unfit is not None:
        return f"{unfit}. Set the precision to bf16, which unpacks them"
    missing = missing_packages(stored)
    if missing is not None:
        also = " Or set the precision to bf16, which unpacks them without it." if unpacks else ""
        return f"{missing}. Or use the unquantised model, which qswitch quantises while reading.{also}".rstrip(".")
    if stored.method in FP16_ONLY and device == "cuda" and compute_dtype == "bf16":
        return (
            f"on a GPU its weights ({stored.method}) are computed with in fp16, and this run computes in bf16. Set "
            "train.compute_dtype=fp16"
        )
    return None


def unfit_device(stored: StoredQuantisation, device: str, capability: tuple[int, int] | None) -> str | None:
    """Why a device cannot compute with weights as they are stored; None where it can, or its card is not known."""
    needed = GPU_ONLY.get(stored.method)
    if needed is None:
        return None
    if device != "cuda":
        return f"only a GPU computes with weights in {stored.method}"
    if capability is not None and capability < needed:
        has, takes = (".".join(map(str, version)) for version in (capability, needed))
        return (
            f"computing with weights in {stored.method} takes a GPU of compute capability {takes}, and this has {has}"
        )
    return None


def missing_packages(stored: StoredQuantisation) -> str | None:
    """Which packages weights need as they are stored and this machine does not have, with the command; None: none."""
    missing = [name for name in PACKAGES.get(stored.method, ()) if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    names = " and ".join(name.replace("_", "-") for name in missing)
    return (
        f"reading its weights ({stored.method}) needs {names}, not installed here: pip install "
        f"{' '.join(PIP_NAMES.get(name, name) for name in missing)}"
    )


def unmovable(stored: StoredQuantisation | None, precision: str) -> str | None:
    """Why a teacher cannot leave the device while the student trains, and what to do; None where it can."""
    if stored is None or precision != "stored" or stored.method in MOVABLE:
        return None
    unpacked = ", or teacher.precision=bf16, which unpacks them" if stored.method in UNPACKED_BY_TRANSFORMERS else ""
    return (
        f"teacher.residency=swap cannot take weights in {stored.method} from the GPU and bring them back whole. Set "
        f"teacher.residency=resident{unpacked}. The unquantised model can be swapped, also with teacher.precision=nf4."
    )


def _of_bitsandbytes(found: Mapping[str, Any]) -> str | None:
    if found.get("load_in_8bit"):
        return "int8"
    return str(found.get("bnb_4bit_quant_type", "fp4")) if found.get("load_in_4bit") else None


def _bits(method: str, found: Mapping[str, Any]) -> float:
    """Bits of a weight with its scale; 16 where the configuration does not say, so that a plan is too large at most."""
    if method == "bitsandbytes":
        return 8.1 if found.get("load_in_8bit") else 4.13 if found.get("bnb_4bit_use_double_quant") else 4.5
    if method in ("fp8", "fbgemm_fp8", "mxfp8"):
        return 8 + 32 / (128 * 128)  # fine-grained: an fp32 scale for a block of 128 x 128
    groups = found.get("config_groups")
    if isinstance(groups, Mapping):  # compressed-tensors: the widest of its groups
        weights = [group.get("weights") or {} for group in groups.values() if isinstance(group, Mapping)]
        return max(map(_group_bits, weights), default=WHOLE_BITS)
    if isinstance(found.get("bits"), int):  # GPTQ, AWQ
        size = found.get("group_size", found.get("q_group_size"))
        return _group_bits({"num_bits": found["bits"], "group_size": size})
    text = str(found.get("quant_type", "")).lower()  # torchao
    return 4.5 if "int4" in text or "4w" in text else 8.1 if "int8" in text or "float8" in text else WHOLE_BITS


def _group_bits(weights: Mapping[str, Any]) -> float:
    bits, size = weights.get("num_bits"), weights.get("group_size")
    if not isinstance(bits, int):
        return WHOLE_BITS
    # A group has a scale, and where it is not symmetric a zero as wide as a weight.
    return bits + ((SCALE_BITS + bits) / size if isinstance(size, int) and size > 0 else 0.1)
