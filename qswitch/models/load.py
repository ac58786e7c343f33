"""How a tokenizer, and a model in a given precision, come from a reference. Knows nothing of training."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qswitch.aside import scratch
from qswitch.config import StudentSection, TeacherSection
from qswitch.errors import ModelError
from qswitch.models.architecture import on_meta
from qswitch.models.finite import require_finite
from qswitch.models.gguf_cache import cache_folder
from qswitch.models.gpus import begin_on, device_map, gpus_of_teacher
from qswitch.models.language_model import LanguageModel, verify_head
from qswitch.models.messages import explained, first_line, quiet, reported, say_once
from qswitch.models.quantise import QUANTISED, check_stored, keep_from_repacking, quantization_config, silence_int8
from qswitch.models.references import ResolvedModel, resolve_reference
from qswitch.models.runtime import Runtime
from qswitch.models.weight_files import check_weight_files, download_shown
from qswitch.plan.adapters import find_adapter
from qswitch.plan.counted import text_part, unusable_because

ModelSection = TeacherSection | StudentSection


def load_tokenizer(section: ModelSection) -> Any:
    """The tokenizer of a teacher or student, padding on the left, with a pad token.

    Raises:
        ModelError: it cannot be had or read.
    """
    return read_tokenizer(resolve_reference(section.model, section.revision), section.trust_remote_code)


def read_tokenizer(resolved: ResolvedModel, trust_remote_code: bool = False) -> Any:
    """As `load_tokenizer`, of a resolved model."""
    from transformers import AutoTokenizer

    with quiet(), explained(resolved.name, "tokenizer", resolved.revision):
        tokenizer = AutoTokenizer.from_pretrained(
            resolved.path, revision=resolved.revision, trust_remote_code=trust_remote_code
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"The tokenizer of {resolved.name} has neither a pad nor an EOS token.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_teacher(
    teacher: TeacherSection,
    runtime: Runtime,
    *,
    vocab_size: int | None = None,
    spread: int = 0,
    layers: Sequence[int] | None = None,
) -> LanguageModel:
    """The teacher, frozen and in eval mode, in `teacher.precision`, with its fine-tuned adapter if it has one.

    Layers beyond `spread` bytes, where that is not 0, wait in host memory, and on disk, for their turn on the device.
    With `teacher.num_gpus` above 1, `layers` says how many lie on each GPU; None: as many as on the others.

    Raises:
        ModelError: it cannot be found, read, quantised, or is no decoder-only model; there are too few GPUs.
    """
    if spread and (teacher.precision in (*QUANTISED, "stored") or teacher.adapter is not None):
        raise ModelError(
            "Layers that come and go cannot be quantised or have an adapter beside them. Leave --spread out, or set "
            "teacher.precision=bf16 and use a merged teacher."
        )
    gpus = gpus_of_teacher(teacher, runtime)
    if spread and len(gpus) > 1:
        raise ModelError("--spread is for one GPU. Leave it out, or teacher.num_gpus.")
    hf = load_base(teacher, runtime, teacher.precision, spread=spread, gpus=gpus, layers=layers)
    if teacher.adapter is not None:
        folder = find_adapter(teacher.adapter, "teacher.adapter")
        hf = with_adapter(hf, folder, merge=teacher.precision not in (*QUANTISED, "stored"), runtime=runtime)
    model = LanguageModel(hf, vocab_size=vocab_size, compute_dtype=runtime.compute_dtype)
    model.requires_grad_(False)
    model.eval()
    verify_head(model)
    return model


def with_adapter(hf: Any, folder: Path, *, merge: bool, runtime: Runtime) -> Any:
    """The model with a trained PEFT adapter: merged into its weights, or attached beside them in the compute dtype.

    Quantised weights keep the adapter beside them: merging would round it away (peft issues 1043, 2321).

    Raises:
        ModelError: the adapter does not belong to this model.
    """
    import peft

    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of names that transformers is about to rename
            warnings.filterwarnings("error", message=".*missing adapter keys")  # peft only warns of a bad fit
            wrapped = peft.PeftModel.from_pretrained(
                hf,
                str(folder),
                is_trainable=False,
                autocast_adapter_dtype=False,
                torch_device=str(runtime.device),  # peft's own guess is the first GPU, also of a run on the CPU
            )
    except (OSError, ValueError, KeyError, RuntimeError, UserWarning) as error:
        raise ModelError(
            f"teacher.adapter={folder} does not fit {type(hf).__name__}: {first_line(error)} Use the adapter that was "
            "trained on this model."
        ) from None
    remedy = "Train it again, or use another adapter."
    require_finite(wrapped.named_parameters(), f"teacher.adapter={folder}", remedy)
    if merge:
        return wrapped.merge_and_unload(safe_merge=True)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name and parameter.is_floating_point():
            parameter.data = parameter.data.to(runtime.compute_dtype)
    return wrapped


def context_tokens(section: ModelSection) -> int:
    """The longest sequence that a model was made for, by its configuration; sys.maxsize where it does not say.

    Raises:
        ModelError: it cannot be had or read.
    """
    return read_context_tokens(resolve_reference(section.model, section.revision), section.trust_remote_code)


def read_context_tokens(resolved: ResolvedModel, trust_remote_code: bool = False) -> int:
    """As `context_tokens`, of a resolved model."""
    config = read_config(resolved, trust_remote_code).get_text_config()
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def read_config(resolved: ResolvedModel, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a resolved model.

    Raises:
        ModelError: it cannot be had or read.
    """
    from transformers import AutoConfig

    with quiet(), explained(resolved.name, "model", resolved.revision):
        return AutoConfig.from_pretrained(
            resolved.path, revision=resolved.revision, trust_remote_code=trust_remote_code
        )


def read_plain(folder: Path, trust_remote_code: bool = False) -> Any:
    """A written model folder as anyone would read it, in fp32 on the CPU and in eval mode.

    With the attention that a run has: transformers before 5.23 reads Gemma 2 with one that leaves its cap out.

    Raises:
        ModelError: it cannot be read.
    """
    from transformers import AutoModelForCausalLM

    written = ResolvedModel(str(folder), None, folder.name)
    attention = attention_kind(read_config(written, trust_remote_code))
    with quiet(), explained(written.name, "model"):
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention, trust_remote_code=trust_remote_code
        ).eval()


def load_base(
    section: ModelSection,
    runtime: Runtime,
    precision: str | None = None,
    *,
    base_path: Path | None = None,
    spread: int = 0,
    gpus: Sequence[int] = (),
    layers: Sequence[int] | None = None,
) -> Any:
    """The transformers model of a section, on the device, in its or the given precision.

    `base_path` names a folder to read instead of `section.model`. For the rest see `read_model`.

    Raises:
        ModelError: as `load_teacher`.
    """
    if base_path is not None:
        resolved = ResolvedModel(str(base_path), None, base_path.name)
    else:
        resolved = resolve_reference(section.model, section.revision)
    precision = resolve_precision(precision or section.precision, runtime)
    return read_model(resolved, runtime, precision, section.trust_remote_code, spread=spread, gpus=gpus, layers=layers)


def resolve_precision(precision: str, runtime: Runtime) -> str:
    """`auto` is bf16 where the run computes in 16 bits, else fp32."""
    if precision == "auto":
        return "bf16" if runtime.compute_dtype in (torch.bfloat16, torch.float16) else "fp32"
    return precision


TEXT_WEIGHTS = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
}
"""Names of the text's weights in a checkpoint with several towers, in either layout -> in the language model alone."""


def read_model(
    resolved: ResolvedModel,
    runtime: Runtime,
    precision: str,
    trust_remote_code: bool = False,
    *,
    spread: int = 0,
    gpus: Sequence[int] = (),
    layers: Sequence[int] | None = None,
) -> Any:
    """Read a resolved model in a precision, checked to be a complete decoder-only model.

    Layers beyond `spread` bytes, where that is not 0, wait elsewhere; over several `gpus` lie so many `layers` on each.

    Weights asked for in bf16 where the run computes wider are rounded to bf16 and then kept in the compute dtype (said
    once): a CPU without bf16 units is 25 times slower in it. Where the run computes in fp16 they are read as fp16.
    """
    from transformers import AutoModelForCausalLM

    # "main" in words: with None transformers does not look for the hub's own conversion of pickled weights (OPT).
    common = {"revision": resolved.revision or "main", "trust_remote_code": trust_remote_code}
    config = read_config(resolved, trust_remote_code)
    reason = unusable_because(config)
    if reason is not None:
        raise ModelError(f"{resolved.name} ({config.model_type}) cannot be distilled here: {reason}")

    check_weight_files(resolved)
    whole, config = config, text_part(config)
    meta = on_meta(config, resolved.name, trust_remote_code)

    options: dict[str, Any] = {"use_safetensors": True, "attn_implementation": attention_kind(config), **common}
    if config is not whole:
        if getattr(whole, "quantization_config", None) is not None:
            config.quantization_config = whole.quantization_config
        options |= {"config": config, "key_mapping": TEXT_WEIGHTS}
        say_once(f"{resolved.name}: of this {whole.model_type} model the text part is used ({config.model_type})")
    if precision in (*QUANTISED, "stored") or runtime.device.type == "cuda":
        options["device_map"] = {"": runtime.device}  # tensor by tensor; a model never lies in host memory as a whole
    if len(gpus) > 1:
        options["device_map"] = device_map(meta, gpus, layers)
    narrow = torch.float16 if runtime.compute_dtype == torch.float16 else torch.bfloat16
    load_dtype = {"bf16": narrow, "fp32": torch.float32}.get(precision, runtime.compute_dtype)
    stored = check_stored(config, resolved.name, precision, runtime)
    if precision == "int8" or (stored is not None and stored.method == "bitsandbytes"):
        silence_int8()
    if stored is not None and precision == "bf16":
        config.quantization_config = {**_as_mapping(config.quantization_config), "dequantize": True}
        options["config"] = config
    if precision in QUANTISED:
        if runtime.compute_dtype == torch.float64:
            raise ModelError(f"precision={precision} cannot compute in fp64. Set precision=fp32.")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ModelError(f"precision={precision} needs bitsandbytes: pip install bitsandbytes")
        if stored is None:
            options["quantization_config"] = quantization_config(meta, resolved, precision, runtime)
    with contextlib.ExitStack() as offloaded:
        if spread:
            folder = str(offloaded.enter_context(scratch(cache_folder())))  # the system's own may lie in memory
            options |= {"device_map": "auto", "max_memory": spread_limits(runtime, spread), "offload_folder": folder}
            load_dtype = runtime.compute_dtype
        with quiet(), explained(resolved.name, "model", resolved.revision), download_shown(resolved), reported():
            model, info = AutoModelForCausalLM.from_pretrained(
                resolved.path, dtype=load_dtype, output_loading_info=True, **options
            )
        if spread:
            weakref.finalize(model, offloaded.pop_all().close)  # the files go with the model
    missing = sorted(info.get("missing_keys", ()))
    if missing or info.get("mismatched_keys"):
        raise ModelError(
            f"{resolved.name}: the files lack {len(missing)} tensors of a {type(model).__name__} (for example "
            f"{', '.join(missing[:3]) or info.get('mismatched_keys')}). Use a complete causal language model."
        )
    if len(gpus) > 1:
        begin_on(model, gpus[0])
    if not spread and precision == "bf16" and runtime.compute_dtype in (torch.float32, torch.float64):
        wide = str(runtime.compute_dtype).removeprefix("torch.")
        say_once(
            f"{resolved.name}: weights are rounded to bf16 but kept in {wide}, the compute dtype "
            "(train.compute_dtype=bf16 keeps them in 2 bytes)"
        )
        model = model.to(runtime.compute_dtype)
    elif precision == "fp32" and runtime.compute_dtype == torch.float64:
        model = model.to(torch.float64)
        model.set_experts_implementation("eager")  # the grouped product of experts has no fp64
    if precision not in (*QUANTISED, "stored") and not spread and len(gpus) <= 1:
        model = model.to(runtime.device)
    keep_from_repacking(model, trains=False, compute_dtype=runtime.compute_dtype)
    remedy = "Download or convert the model again."
    if load_dtype == torch.float16:
        remedy = "fp16 holds nothing above 65,504: set train.compute_dtype=fp32, or download the model again."
    require_finite(model.named_parameters(), resolved.name, remedy)
    return model


def _as_mapping(values: Any) -> dict[str, Any]:
    return dict(values if isinstance(values, dict) else values.to_dict())


def spread_limits(runtime: Runtime, num_bytes: int) -> dict[int | str, int]:
    """Bytes of layers that each place may hold: the device so many, a layer that passes by among them."""
    from accelerate.utils import get_max_memory

    limits: dict[int | str, int] = {"cpu": int(get_max_memory()["cpu"])}
    if runtime.device.type == "cuda":  # one GPU: key-value caches stay with the layers that computed them
        limits[runtime.device.index or 0] = num_bytes
    return limits


def attention_kind(config: Any) -> str | None:
    """eager where the architecture caps its attention scores (Gemma 2), which the fused kernels would leave out.

    None lets transformers choose: sdpa, or eager where an architecture has no sdpa (gpt-oss, with its sinks).
    """
    return "eager" if getattr(config, "attn_logit_softcapping", None) is not None else None
