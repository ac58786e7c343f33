"""The model that trains: the base in its precision, adapters attached, and its trained weights to and from a folder.

Knows nothing of optimizers, steps or rollouts.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qswitch.config import LoraSection, RunConfig
from qswitch.errors import FileError, ModelError
from qswitch.models.dropout import set_dropout
from qswitch.models.finite import require_finite
from qswitch.models.language_model import LanguageModel, verify_head
from qswitch.models.load import load_base, resolve_precision
from qswitch.models.messages import quiet
from qswitch.models.quantise import keep_from_repacking
from qswitch.models.runtime import Runtime
from qswitch.outside import read_json
from qswitch.plan.counted import names_of_experts

logger = logging.getLogger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
FULL_WEIGHTS = "model.safetensors"


def load_student(
    config: RunConfig, runtime: Runtime, *, vocab_size: int | None = None, base_path: Path | None = None
) -> LanguageModel:
    """The student as `config.student` describes it, trainable weights in fp32, in train mode.

    `base_path` is read instead of `student.model` where it exists (a base that was shrunk into the run directory). With
    fp64 arithmetic the trainable weights are fp64. Adapters start from `config.seed` and from nothing else.

    Raises:
        ModelError: the base cannot be had or read, or the adapter settings do not fit it.
    """
    student = config.student
    full = student.adapter == "none"
    base = base_path if base_path is not None and base_path.exists() else None
    precision = resolve_precision(student.precision, runtime)
    # Trained in full, weights are kept in fp32 (bf16 loses small updates); `precision: bf16` only rounds the start.
    hf = load_base(student, runtime, precision, base_path=base)
    keep_from_repacking(hf, trains=True)
    if student.base_dropout is not None:
        set_dropout(hf, student.base_dropout)
    trainable_dtype = torch.float64 if runtime.compute_dtype == torch.float64 else torch.float32
    if full:
        hf.to(trainable_dtype)
        hf.requires_grad_(True)
    else:
        hf.requires_grad_(False)
        hf = attach_lora(hf, student.lora, seed=config.seed, dtype=trainable_dtype)
        if base is not None:
            _set_base_path(hf, str(base.resolve()))
    model = LanguageModel(hf, vocab_size=vocab_size, compute_dtype=runtime.compute_dtype)
    if student.gradient_checkpointing:
        # Rollouts run in eval mode, where transformers checkpoints nothing and so keeps the KV cache.
        with warnings.catch_warnings():  # newer transformers calls it activation_checkpointing_enable
            warnings.simplefilter("ignore", FutureWarning)
            model.causal_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    verify_head(model)
    model.train()
    return model


def attach_lora(hf: Any, lora: LoraSection, *, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """Inject LoRA adapters as `lora` says and return the PeftModel; adapter weights in `dtype`, started from `seed`.

    Raises:
        ModelError: the settings do not fit the model, or would adapt a head tied to the input embedding.
    """
    import peft

    head = hf.get_output_embeddings()
    head_names = [name for name, module in hf.named_modules() if module is head]
    tied = _is_tied(hf)
    is_conv1d = any(type(module).__name__ == "Conv1D" for module in hf.modules())
    embedding_names = [name for name, module in hf.named_modules() if module is hf.get_input_embeddings()]
    own = [*head_names, *embedding_names]
    listed = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    for name in [*listed, *lora.modules_to_save]:
        if tied and any(full == name or full.endswith(f".{name}") for full in own):
            raise ModelError(
                f"student.lora names {name}, but this model's head is tied to its input embedding: an adapter on one "
                "would silently change or lose the other when merged. Remove it, or use student.adapter=none."
            )
    modules = [name for name, _ in hf.named_modules()]
    for name in lora.modules_to_save:
        if not any(full == name or full.endswith(f".{name}") for full in modules):
            raise ModelError(
                f"student.lora.modules_to_save names {name}, which {type(hf).__name__} does not have. Its linear "
                f"modules are {', '.join(_module_kinds(hf))}; norms and embeddings may be named too."
            )
    options: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": lora.target_modules,
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
        "init_lora_weights": lora.init_lora_weights,
        "modules_to_save": lora.modules_to_save or None,
        "layers_to_transform": lora.layers_to_transform,
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": dict(lora.alpha_pattern),
        "fan_in_fan_out": is_conv1d,
    }
    if lora.target_modules == "all-linear":
        # Spelled out rather than left to peft: layers_to_transform refuses the word, and the head must stay out.
        names = linear_suffixes(hf, excluded=set(head_names))
        options["target_modules"] = sorted(names - set(names_of_experts(hf, names)))
    kinds = _module_kinds(hf)
    # A card that torch cannot use (a driver too old for it) is counted all the same, and has no random state to keep.
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.device("cuda", i) for i in range(usable)]
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of names that transformers is about to rename
            warnings.filterwarnings("ignore", ".*did not match any targeted module")  # refused below
            torch.manual_seed(seed)
            wrapped = peft.get_peft_model(hf, peft.LoraConfig(**options), autocast_adapter_dtype=False)
    except (ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
        raise ModelError(
            f"student.lora does not fit {type(hf).__name__}: {text[:300]} Its linear modules are {', '.join(kinds)}."
        ) from error
    if wrapped.peft_config["default"].target_parameters:
        raise ModelError(
            f"student.lora.target_modules names modules that peft takes for the experts of {type(hf).__name__}. "
            f"Remove {', '.join(names_of_experts(hf, kinds))}."
        )
    _refuse_idle_patterns(wrapped, lora)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            if not parameter.is_floating_point():
                raise ModelError(f"{name} is stored quantised and cannot be trained. Remove it from modules_to_save.")
            parameter.data = parameter.data.to(dtype)
    keep_from_repacking(wrapped, trains=True)
    return wrapped


def _refuse_idle_patterns(wrapped: Any, lora: LoraSection) -> None:
    """A rank or alpha for modules that have no adapter would change nothing, and peft says nothing of it."""
    adapted = [name for name, m in wrapped.base_model.model.named_modules() if hasattr(m, "lora_A")]
    for setting, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for pattern in patterns:
            expression = re.compile(rf"(.*\.)?({pattern})$")  # as peft reads it
            if not any(expression.match(name) for name in adapted):
                kinds = ", ".join(sorted({name.rpartition(".")[2] for name in adapted}))
                raise ModelError(
                    f"student.lora.{setting} names {pattern}, which matches no module that has an adapter. They are "
                    f"{kinds}; write a name, or a regular expression for the end of a path."
                )


def linear_suffixes(hf: Any, excluded: set[str]) -> set[str]:
    """Last name parts of every linear layer (q_proj, c_attn, ...) outside `excluded`."""
    suffixes = set()
    for name, module in hf.named_modules():
        if name and name not in excluded and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            suffixes.add(name.rpartition(".")[2])
    return suffixes - {name.rpartition(".")[2] for name in excluded}


def _module_kinds(hf: Any) -> list[str]:
    return sorted(linear_suffixes(hf, excluded=set()))


def _is_tied(hf: Any) -> bool:
    head, embedding = hf.get_output_embeddings(), hf.get_input_embeddings()
    return head is embedding or head.weight is embedding.weight


def _set_base_path(wrapped: Any, path: str) -> None:
    for peft_config in wrapped.peft_config.values():
        peft_config.base_model_name_or_path = path


# ------------------------------------------------------------------------------------------------------- checkpoints


def save_adapter(model: LanguageModel, folder: Path) -> None:
    """Write the trained weights to `folder`, in fp32 as trained: PEFT's layout, or a whole model without adapters.

    `adapter_config.json` names the base as it was given, an existing folder by its absolute path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not is_adapter(model):
        with quiet():
            model.causal_model.save_pretrained(folder, safe_serialization=True)
        return
    before = {name: c.base_model_name_or_path for name, c in model.hf.peft_config.items()}
    try:
        for peft_config in model.hf.peft_config.values():
            base = peft_config.base_model_name_or_path
            if base and os.path.isdir(base):
                peft_config.base_model_name_or_path = str(Path(base).resolve())
        # save_embedding_layers=False: "auto" asks the hub whether the vocabulary was resized.
        model.hf.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    finally:
        for name, peft_config in model.hf.peft_config.items():
            peft_config.base_model_name_or_path = before[name]


def load_adapter(model: LanguageModel, folder: Path) -> None:
    """Read weights written by `save_adapter` back into the same modules, bit for bit.

    Raises:
        ModelError: files are missing, or belong to a model or adapter of another shape.
    """
    if not is_adapter(model):
        state: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            state |= _read_weights(path)
        if not state:
            raise ModelError(f"{folder} has no {FULL_WEIGHTS}.")
        own = dict(model.causal_model.named_parameters())
        _same_names(set(own), set(state), str(folder))
    else:
        path = folder / ADAPTER_WEIGHTS
        if not path.is_file():
            raise ModelError(f"{folder} has no {ADAPTER_WEIGHTS}.")
        state = _read_weights(path)
        own = _adapter_parameters(model.hf)
        _same_names(set(own), set(state), str(path))
    with torch.no_grad():
        for name, parameter in own.items():
            _copy(name, parameter, state[name])


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read ({error}). Copy it again, or train it anew.") from error
    require_finite(weights.items(), str(path), "Use another checkpoint, or train it anew.")
    return weights


def is_adapter(model: LanguageModel) -> bool:
    """Whether the model trains adapters rather than its own weights."""
    return hasattr(model.hf, "peft_config")


def _adapter_parameters(wrapped: Any) -> dict[str, nn.Parameter]:
    """Key in adapter_model.safetensors -> the live parameter it belongs to."""
    from peft import get_peft_model_state_dict

    by_storage = {p.data_ptr(): p for p in wrapped.parameters() if p.requires_grad and p.numel()}
    saved = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    strangers = [name for name, tensor in saved.items() if tensor.data_ptr() not in by_storage]
    assert not strangers, f"peft saves tensors that do not train: {strangers[:3]}"
    return {name: by_storage[tensor.data_ptr()] for name, tensor in saved.items()}


def _same_names(own: set[str], saved: set[str], where: str) -> None:
    if own != saved:
        raise ModelError(
            f"{where} does not belong to this student: {len(own - saved)} tensors are missing "
            f"{sorted(own - saved)[:2]}, {len(saved - own)} are unknown {sorted(saved - own)[:2]}. "
            "Use the configuration it was written with."
        )


def _copy(name: str, parameter: nn.Parameter, saved: Tensor) -> None:
    if parameter.shape != saved.shape or parameter.dtype != saved.dtype:
        raise ModelError(
            f"{name} is {tuple(saved.shape)} {saved.dtype} in the file and {tuple(parameter.shape)} {parameter.dtype} "
            "in the student. Use the configuration it was written with."
        )
    parameter.copy_(saved)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a PEFT folder.

    Raises:
        ModelError: it is missing or no JSON.
    """
    path = folder / ADAPTER_CONFIG
    try:
        return read_json(path, dict[str, Any])
    except FileError as error:
        raise ModelError(str(error)) from None
