"""A decoder-only model without some of its layers, and as a folder.

Where a family has no small sibling this makes the student: the layers that `layer_choice` finds dispensable are
dropped; the tokenizer, embeddings, norms and head stay. The cut model is worse until it is trained. Knows nothing of
runs.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qswitch.aside import folder_aside
from qswitch.config import ModelReference
from qswitch.errors import ModelError
from qswitch.models.decoder_layers import find_layers
from qswitch.models.layer_choice import calibration, choose_layers, kl_of_choice, scored_rows
from qswitch.models.load import read_config, read_model, read_tokenizer
from qswitch.models.messages import quiet
from qswitch.models.older_readers import add_older_keys
from qswitch.models.references import resolve_reference, sentencepiece_files
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
"""Short texts of varied kind, on which a model that was written is compared with the one it was made of."""

SHRINK_REPORT = "shrink.json"
"""In the folder of a cut model: its ShrinkReport."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShrinkReport:
    """What a cut kept, and what it cost."""

    source: str
    """Name of the model that was cut."""
    kept: tuple[int, ...]
    """Layers of the source, in order."""
    dropped: tuple[int, ...]
    kl_nats: float
    """KL(source || cut) per token, on this project's examples that the choice of layers has not seen."""
    kl_nats_at_choice: float
    """The same on the examples by which they were chosen."""
    seconds: float
    """What the choice took."""
    parameters_before: int
    parameters_after: int
    output_dir: Path

    def summary(self) -> str:
        """One line for people."""
        return (
            f"{len(self.kept)} of {len(self.kept) + len(self.dropped)} layers kept, "
            f"{self.parameters_before / 1e6:.1f} M -> {self.parameters_after / 1e6:.1f} M parameters; dropped "
            f"{', '.join(map(str, self.dropped)) or 'none'}; KL(whole || cut) {self.kl_nats:.2f} nats/token on "
            "text that the choice has not seen"
        )


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
    notify: Callable[[str], None] | None = None,
) -> ShrinkReport:
    """Cut a model and write it as a Hugging Face folder with tokenizer and generation config, complete or not at all.

    Layers are chosen in fp32 on CPU by this project's own examples, and the model is saved in the dtype of
    the source, with its report as shrink.json. A bf16 model takes host memory for itself and its cut, and before the
    cut for one layer and the head in fp32; others are widened whole.

    Raises:
        ModelError: the model cannot be had or cut, or output_dir exists and is not empty.
    """
    output_dir = Path(output_dir)
    refuse_non_empty(output_dir)
    resolved = resolve_reference(reference, revision)
    tokenizer = read_tokenizer(resolved, trust_remote_code)
    copies = sentencepiece_files(resolved)  # before the minutes that the choice of layers takes: it may need the hub
    stored = source_dtype(resolved, trust_remote_code)
    narrow = stored == torch.bfloat16
    runtime = Runtime(device=torch.device("cpu"), compute_dtype=torch.bfloat16 if narrow else torch.float32)
    model = read_model(resolved, runtime, "bf16" if narrow else "fp32", trust_remote_code)
    rows = scored_rows(tokenizer, calibration("choose"))
    choice = choose_layers(model, rows, num_layers, notify=notify)
    small = keep_layers(model, choice.kept)
    report = ShrinkReport(
        source=resolved.name,
        kept=choice.kept,
        dropped=choice.dropped,
        kl_nats=kl_of_choice(model, scored_rows(tokenizer, calibration("check")), choice.kept),
        kl_nats_at_choice=choice.kl_nats,
        seconds=round(choice.seconds, 1),
        parameters_before=model.num_parameters(),
        parameters_after=small.num_parameters(),
        output_dir=output_dir,
    )
    small.to(stored)
    text = json.dumps({**asdict(report), "output_dir": output_dir.name}, indent=1, ensure_ascii=False) + "\n"
    write_model_folder(small, tokenizer, output_dir, {SHRINK_REPORT: text}, copies=copies)
    logger.info("%s: %s", resolved.name, report.summary())
    return report


def source_dtype(resolved: Any, trust_remote_code: bool = False) -> torch.dtype:
    """The dtype a model is stored in, as its config says; fp32 where it says nothing."""
    dtype = getattr(read_config(resolved, trust_remote_code), "dtype", None)
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
    hf: Any, tokenizer: Any, output_dir: Path, extra: dict[str, str] | None = None, *, copies: Sequence[Path] = ()
) -> None:
    """As `write_model_files`, into a new folder, all or nothing.

    Raises:
        ModelError: the folder cannot be written.
    """
    try:
        with folder_aside(output_dir) as partial:
            write_model_files(hf, tokenizer, partial, extra, copies=copies)
    except OSError as error:
        raise ModelError(f"{output_dir} cannot be written: {error}. Check the path and the free space.") from error


def write_model_files(
    hf: Any, tokenizer: Any, folder: Path, extra: dict[str, str] | None = None, *, copies: Sequence[Path] = ()
) -> None:
    """Save model, tokenizer, chat template, generation config, `extra` text files and `copies` into a folder."""
    with quiet():
        hf.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
    add_older_keys(folder)
    for name, text in (extra or {}).items():
        (folder / name).write_text(text, encoding="utf-8")
    for path in copies:
        shutil.copyfile(path, folder / path.name)
