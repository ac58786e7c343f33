"""Which layers of a decoder-only model matter least, and the same model without them.

Where a family has no small sibling this makes the student: layers that change the hidden state least are dropped; the
tokenizer, embeddings, norms and head stay. The cut model is worse until it is trained. Knows nothing of runs.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qswitch.aside import folder_aside
from qswitch.config import ModelReference
from qswitch.errors import ModelError
from qswitch.models.load import read_model, read_tokenizer
from qswitch.models.messages import quiet
from qswitch.models.references import resolve_reference
from qswitch.models.runtime import Runtime

logger = logging.getLogger(__name__)

CALIBRATION_PROMPTS = (
    "Explain in a few sentences why the sky looks blue during the day and red in the evening.",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle. It was a stormy night, and",
    "Question: What is the capital of Australia, and why is it not Sydney?\nAnswer: The capital is Canberra.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n\nprint(",
    "To make bread you need flour, water, salt and yeast. First mix the flour and the salt, then add the yeast and",
    "Summarise: The meeting was moved from Tuesday to Thursday because two members were ill. The budget was approved.",
    "A train leaves at 9:15 and arrives at 11:40. How long does the trip take? It takes two hours and 25 minutes.",
    "Dear Ms Weber, thank you for your letter of 3 March. We are sorry that your order arrived damaged and",
)
"""Text of varied kind on which layers are scored when the caller has none."""

MAX_PROMPT_TOKENS = 256
NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShrinkReport:
    """What a cut kept and what it cost in size."""

    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    scores: tuple[float, ...]
    """Per layer of the original, 1 - cosine of its input and output, mean over tokens; small means dispensable."""
    parameters_before: int
    parameters_after: int
    output_dir: Path


@torch.no_grad()
def layer_scores(hf: Any, prompts_ids: Sequence[Sequence[int] | Tensor]) -> list[float]:
    """1 - cosine between the hidden state before and after each layer, mean over all tokens of the prompts.

    Computed in fp32 whatever the weights are kept in.

    Raises:
        ModelError: there are no prompts, or the decoder layers cannot be found.
    """
    _, layers = find_layers(hf)
    rows = [torch.as_tensor(ids, dtype=torch.long).reshape(1, -1) for ids in prompts_ids]
    rows = [row for row in rows if row.numel()]
    if not rows:
        raise ModelError("Scoring layers needs at least one prompt that is not empty.")
    device = next(hf.parameters()).device
    sums = [0.0] * len(layers)

    def record(index: int):
        def hook(_module: nn.Module, arguments: tuple, keywords: dict, output: Any) -> None:
            before = arguments[0] if arguments else keywords["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
            sums[index] += (1 - cosine).sum().item()

        return hook

    handles = [layer.register_forward_hook(record(i), with_kwargs=True) for i, layer in enumerate(layers)]
    was_training = hf.training
    hf.eval()
    try:
        with _computing_in_fp32(hf, layers):
            for row in rows:
                hf.base_model(input_ids=row.to(device), use_cache=False)
    finally:
        hf.train(was_training)
        for handle in handles:
            handle.remove()
    num_tokens = sum(row.numel() for row in rows)
    return [total / num_tokens for total in sums]


@contextlib.contextmanager
def _computing_in_fp32(hf: Any, layers: nn.ModuleList) -> Iterator[None]:
    """Narrower weights are widened layer by layer while they are used: a 7B model in bf16 needs one layer more memory,
    where widening it whole would need 14 GiB more. The narrow tensors themselves come back afterwards."""
    narrow: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def widen(module: nn.Module, recurse: bool = True) -> None:
        narrow[module] = [(p, p.data) for p in module.parameters(recurse) if p.dtype in NARROW]
        for parameter, data in narrow[module]:
            parameter.data = data.float()

    def restore(module: nn.Module) -> None:
        for parameter, data in narrow.pop(module):
            parameter.data = data

    def widen_output(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        return output.float() if output.dtype in NARROW else output

    inside = {id(m) for layer in layers for m in layer.modules()}
    handles = []
    try:
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(lambda module, _: widen(module)))
            handles.append(layer.register_forward_hook(lambda module, *_: restore(module)))
        for module in hf.base_model.modules():
            if id(module) in inside:
                continue
            if isinstance(module, nn.Embedding):  # a table is too large to widen, what is read from it is not
                handles.append(module.register_forward_hook(widen_output))
            else:
                widen(module, recurse=False)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in list(narrow):
            restore(module)


def shrink(hf: Any, prompts_ids: Sequence[Sequence[int] | Tensor], num_layers: int) -> tuple[Any, list[int]]:
    """A new model of `num_layers` layers in the same dtype, and the original indices it kept, in order.

    Drops the layers with the lowest `layer_scores`. Tensors are copies; `hf` stays as it is.

    Raises:
        ModelError: num_layers is below 1 or above the model's, or the architecture cannot be cut.
    """
    new, kept, _ = _shrink(hf, prompts_ids, num_layers)
    return new, kept


def _shrink(
    hf: Any, prompts_ids: Sequence[Sequence[int] | Tensor], num_layers: int
) -> tuple[Any, list[int], list[float]]:
    _, layers = find_layers(hf)
    if not 1 <= num_layers <= len(layers):
        raise ModelError(f"{type(hf).__name__} has {len(layers)} layers, so {num_layers} cannot be kept.")
    scores = layer_scores(hf, prompts_ids)
    by_importance = sorted(range(len(layers)), key=lambda i: (-scores[i], i))
    kept = sorted(by_importance[:num_layers])
    return keep_layers(hf, kept), kept, scores


def keep_layers(hf: Any, kept: Sequence[int]) -> Any:
    """A fresh model holding only the given layers, built from a corrected config so that layer indices are right.

    Raises:
        ModelError: the weights do not fit the shorter configuration.
    """
    prefix, layers = find_layers(hf)
    config = _short_config(hf.config, kept, len(layers))
    pattern = re.compile(rf"^{re.escape(prefix)}\.(\d+)\.")
    position = {old: new for new, old in enumerate(kept)}
    state = {}
    for name, tensor in hf.state_dict().items():
        match = pattern.match(name)
        if match is None:
            state[name] = tensor
        elif int(match.group(1)) in position:
            state[f"{prefix}.{position[int(match.group(1))]}.{name[match.end() :]}"] = tensor
    dtype = next(p.dtype for p in hf.parameters() if p.is_floating_point())
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as from_pretrained does: narrow weights from the start, rotary frequencies in fp32
    try:
        with torch.random.fork_rng(devices=[]):
            new = type(hf)(config)
    finally:
        torch.set_default_dtype(before)
    new = new.to(next(hf.parameters()).device)
    missing, unexpected = new.load_state_dict(state, strict=False)
    tied = set(new.all_tied_weights_keys or {}) if hasattr(new, "all_tied_weights_keys") else set()
    missing = [name for name in missing if name not in tied]
    if missing or unexpected:
        raise ModelError(
            f"{type(hf).__name__} cannot be cut: after it {len(missing)} tensors are missing {missing[:2]}, "
            f"{len(unexpected)} left over {list(unexpected)[:2]}."
        )
    new.tie_weights()
    if getattr(hf, "generation_config", None) is not None:
        new.generation_config = copy.deepcopy(hf.generation_config)
    return new.train(hf.training)


def find_layers(hf: Any) -> tuple[str, nn.ModuleList]:
    """(name, module list) of the decoder layers: the outermost list that is as long as the config says.

    Raises:
        ModelError: there is none.
    """
    expected = hf.config.get_text_config().num_hidden_layers
    found = [(n, m) for n, m in hf.named_modules() if isinstance(m, nn.ModuleList) and len(m) == expected]
    if not found:
        raise ModelError(f"{type(hf).__name__}: no list of {expected} decoder layers found, so it cannot be cut.")
    return min(found, key=lambda item: item[0].count("."))


def _short_config(config: Any, kept: Sequence[int], num_before: int) -> Any:
    """The configuration for the kept layers; per-layer lists (layer_types and the like) are cut the same way."""
    values = copy.deepcopy(config.to_dict())
    per_layer = {
        name: [value[i] for i in kept]
        for name, value in values.items()
        if isinstance(value, list) and len(value) == num_before and ("layer" in name or name == "no_rope_layers")
    }
    depth = getattr(type(config), "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")  # n_layer of GPT-2
    short = type(config).from_dict({**values, **per_layer, depth: len(kept)})
    if getattr(config, "max_window_layers", None) is not None:  # Qwen2: from this index on, layers slide
        short.max_window_layers = sum(i < config.max_window_layers for i in kept)
    short._attn_implementation = config._attn_implementation
    return short


def shrink_to_folder(
    reference: ModelReference,
    num_layers: int,
    output_dir: Path | str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    prompts: Sequence[str] | None = None,
) -> ShrinkReport:
    """Cut a model and write it as a Hugging Face folder with tokenizer and generation config, complete or not at all.

    Scored in fp32 on CPU on `prompts` (default: CALIBRATION_PROMPTS), saved in the dtype of the source. A bf16 model
    takes host memory for itself, its cut and one layer in fp32; others are widened whole.

    Raises:
        ModelError: the model cannot be had or cut, or output_dir exists and is not empty.
    """
    output_dir = Path(output_dir)
    refuse_non_empty(output_dir)
    resolved = resolve_reference(reference, revision)
    tokenizer = read_tokenizer(resolved, trust_remote_code)
    stored = source_dtype(resolved, trust_remote_code)
    narrow = stored == torch.bfloat16
    runtime = Runtime(device=torch.device("cpu"), compute_dtype=torch.bfloat16 if narrow else torch.float32)
    model = read_model(resolved, runtime, "bf16" if narrow else "fp32", trust_remote_code)
    texts = CALIBRATION_PROMPTS if prompts is None else prompts
    ids = [tokenizer(text)["input_ids"][:MAX_PROMPT_TOKENS] for text in texts]
    small, kept, scores = _shrink(model, ids, num_layers)
    small.to(stored)
    write_model_folder(small, tokenizer, output_dir)
    report = ShrinkReport(
        kept=tuple(kept),
        dropped=tuple(i for i in range(len(scores)) if i not in kept),
        scores=tuple(scores),
        parameters_before=model.num_parameters(),
        parameters_after=small.num_parameters(),
        output_dir=output_dir,
    )
    logger.info("%s: kept layers %s of %d", resolved.name, list(kept), len(scores))
    return report


def source_dtype(resolved: Any, trust_remote_code: bool = False) -> torch.dtype:
    """The dtype a model is stored in, as its config says; fp32 where it says nothing."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(resolved.path, revision=resolved.revision, trust_remote_code=trust_remote_code)
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def refuse_non_empty(output_dir: Path) -> None:
    """Never write into a folder that holds something.

    Raises:
        ModelError: output_dir is a file, or a folder that is not empty.
    """
    if output_dir.is_file():
        raise ModelError(f"{output_dir} is a file. Give a new folder.")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise ModelError(f"{output_dir} is not empty. Give a new folder, or remove it first.")


def write_model_folder(
    hf: Any,
    tokenizer: Any,
    output_dir: Path,
    extra: dict[str, str] | None = None,
    *,
    copies: Sequence[Path] = (),
) -> None:
    """Save model, tokenizer, chat template, generation config, `extra` text files and `copies`, all or nothing."""
    try:
        with folder_aside(output_dir) as partial:
            with quiet():
                hf.save_pretrained(partial, safe_serialization=True)
                tokenizer.save_pretrained(partial)
            for name, text in (extra or {}).items():
                (partial / name).write_text(text, encoding="utf-8")
            for path in copies:
                shutil.copyfile(path, partial / path.name)
    except OSError as error:
        raise ModelError(f"{output_dir} cannot be written: {error}. Check the path and the free space.") from error
