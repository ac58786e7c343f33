"""How a model's linear layers become NF4 or int8 while it is read, and which of them stay as they are."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qswitch.errors import ModelError
from qswitch.models.messages import first_line, quiet, say_once
from qswitch.models.references import ResolvedModel
from qswitch.models.runtime import DTYPES, Runtime
from qswitch.plan.stored import PACKAGES, StoredQuantisation, problem_of, stored_quantisation

QUANTISED = ("nf4", "fp4", "int8")
"""Precisions that bitsandbytes makes; fp4 is for comparing with nf4 (`qswitch fidelity`), no setting offers it."""
QUANT_BLOCK = 64
"""bitsandbytes on CPU reads 4-bit weights in blocks of this many inputs."""


CPU_ROWS = 32
"""The kernel of bitsandbytes for CPUs with AVX-512 BF16 packs so many outputs together."""


def keep_from_repacking(model: nn.Module, *, trains: bool, compute_dtype: torch.dtype | None = None) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in no-grad CPU passes where that goes wrong.

    On a CPU with AVX-512 BF16 the first such pass repacks the weight. In a model that `trains`, the next training pass
    then gives no input gradient, without any error; in another `compute_dtype` than bf16 the packed product still
    rounds to bf16, by the number of its rows; and a layer whose number of outputs is no multiple of CPU_ROWS is refused
    by an assertion (bitsandbytes 0.50).
    """
    wrong = trains or compute_dtype not in (None, torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu") and (wrong or module.out_features % CPU_ROWS):
            module.support_avx512bf16_for_cpu = False


def silence_int8() -> None:
    """bitsandbytes says in every layer of every pass that int8 multiplies in fp16; docs/evaluation.md says it once."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def check_stored(config: Any, name: str, precision: str, runtime: Runtime) -> StoredQuantisation | None:
    """How the files themselves are quantised, seen to be readable in `precision`; None where they are not.

    Decided by the configuration: by our own table, then by what transformers says of this machine.

    Raises:
        ModelError: this precision is another one, a package is missing, or the device cannot compute with it, or not in
            the run's arithmetic.
    """
    from transformers.quantizers import AutoHfQuantizer
    from transformers.utils import is_kernels_available

    device = runtime.device
    stored = stored_quantisation(config.to_dict())
    problem = problem_of(
        stored,
        precision,
        device=device.type,
        capability=torch.cuda.get_device_capability(device) if stored and device.type == "cuda" else None,
        compute_dtype=next((name for name, dtype in DTYPES.items() if dtype == runtime.compute_dtype), None),
    )
    if problem is None and stored is not None and precision == "stored":
        try:
            if "kernels" in PACKAGES.get(stored.method, ()) and not is_kernels_available():
                raise ImportError("the installed kernels is of another version: pip install 'transformers[kernels]'")
            with quiet():
                quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
                quantizer.validate_environment(device_map={"": device})
        except (ImportError, RuntimeError, ValueError) as error:
            problem = f"transformers cannot read its weights ({stored.method}): {first_line(error).rstrip('.')}"
    if problem is not None:
        raise ModelError(f"{name}: {problem}.")
    return stored


def quantization_config(meta: Any, resolved: ResolvedModel, precision: str, runtime: Runtime) -> Any:
    """What tells transformers to quantise a model while reading it; `meta` is that model on the meta device."""
    from transformers import BitsAndBytesConfig

    skip = unquantised_modules(meta, resolved, precision, runtime)
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=precision,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=runtime.compute_dtype,
        llm_int8_skip_modules=skip,
    )


def unquantised_modules(meta: Any, resolved: ResolvedModel, precision: str, runtime: Runtime) -> list[str]:
    """Names of linears left in full precision: the head, and on CPU those whose input width NF4 cannot block.

    Experts that lie in one tensor are no linear layers for bitsandbytes; that is said, because it takes memory.
    """
    head = meta.get_output_embeddings()
    heads = [name for name, module in meta.named_modules() if module is head]
    _say_what_stays(meta, resolved, precision)
    if precision == "int8" or runtime.device.type != "cpu":
        return heads
    widths = {name: width for name, width, _ in _linears(meta) if name not in heads and width % QUANT_BLOCK}
    if not widths:
        return heads
    sizes = {name: size for name, _, size in _linears(meta) if name not in heads}
    odd = sum(sizes[name] for name in widths)
    shown = ", ".join(f"{name} ({width})" for name, width in list(widths.items())[:3])
    if odd > sum(sizes.values()) / 2:
        raise ModelError(
            f"{resolved.name} cannot be {precision} on a CPU: {len(widths)} of {len(sizes)} linear layers have an "
            f"input width that is no multiple of {QUANT_BLOCK}, for example {shown}. Set precision=bf16 or fp32, or "
            "use a GPU."
        )
    say_once(
        f"{resolved.name}: {len(widths)} of {len(sizes)} linear layers stay unquantised, their input width is no "
        f"multiple of {QUANT_BLOCK}: {shown}"
    )
    return [*heads, *widths]


def _say_what_stays(meta: Any, resolved: ResolvedModel, precision: str) -> None:
    """Say where experts keep most of a model in full precision."""
    total = sum(p.numel() for p in meta.parameters())
    experts = sum(p.numel() for name, p in meta.named_parameters() if p.dim() == 3 and "expert" in name)
    if experts > total / 2:
        say_once(
            f"{resolved.name}: {experts / total:.0%} of the weights are experts in tensors of their own, which "
            f"bitsandbytes does not pack: they stay in the compute dtype, and {precision} saves little"
        )


def _linears(model: nn.Module) -> Iterator[tuple[str, int, int]]:
    """(name, input width, number of weights) of each linear layer, GPT-2's Conv1D included."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module.in_features, module.weight.numel()
        elif type(module).__name__ == "Conv1D":
            yield name, module.weight.shape[0], module.weight.numel()
