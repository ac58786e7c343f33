"""The trained student as a plain Hugging Face model: adapter merged into the unquantised base, then proved equal.

Merging into 4-bit weights would round twice, so the base is always read unquantised here. The saved folder is read back
with transformers alone and compared with base + adapter on prompts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import GenerationConfig

from qswitch.aside import folder_aside
from qswitch.config import RunConfig
from qswitch.data.gather import make_encoder
from qswitch.data.template import template_source
from qswitch.errors import ModelError, PlanError, QSwitchError
from qswitch.export.card import model_card, reference_names
from qswitch.export.merge_report import (
    MAX_KL_NATS,
    MAX_MERGE_ERROR,
    MERGED_FOLDER,
    REPORT_FILE,
    MergeReport,
    read_merge_report,
    source_of,
    training_summary,
)
from qswitch.models.architecture import plain_experts
from qswitch.models.host_memory import bound_kernel_cache, return_freed_memory
from qswitch.models.language_model import LanguageModel
from qswitch.models.load import read_model, read_plain, read_tokenizer
from qswitch.models.pair import load_pair_tokenizer
from qswitch.models.references import ResolvedModel, resolve_reference, sentencepiece_files
from qswitch.models.runtime import Runtime
from qswitch.models.shrink import CALIBRATION_PROMPTS, refuse_non_empty, write_model_files
from qswitch.models.student import attach_lora, load_adapter
from qswitch.plan.machine import detect_budget_bytes
from qswitch.plan.model_files import shape_for
from qswitch.plan.shapes import ModelShape
from qswitch.run_dir import RunDir
from qswitch.units import GIB

logger = logging.getLogger(__name__)

MERGE_ALLOWANCE_BYTES = 256 * 2**20
"""Host memory of a merge beside weights and logits: tokenizer, kernels and their buffers."""


def merge_run(
    run_path: Path | str,
    output_dir: Path | str | None = None,
    *,
    dtype: Literal["bf16", "fp32"] = "bf16",
    prompts: Sequence[str] | None = None,
    notify: Callable[[str], None] = logger.info,
) -> MergeReport:
    """Merge RUN/adapter (or the latest checkpoint's) into its unquantised base and save a plain model folder.

    The folder is RUN/merged where none is named. One that holds this very merge already is left as it is. `notify` is
    told what is being done, of which each part takes minutes for a large student.

    Runs on the CPU and needs the memory that `merge_bytes` forecasts, 6 bytes a parameter and more for a large
    vocabulary.

    Raises:
        PlanError: the memory is not there; nothing was read.
        RunDirError: run_path is no run directory, or holds no adapter that is as it was written.
        ModelError: output_dir is not empty, or merging changes the logits (then nothing is written).
    """
    run_dir = RunDir.open(Path(run_path))
    config = run_dir.config
    adapter = run_dir.trained_weights()
    output_dir = run_dir.path / MERGED_FOLDER if output_dir is None else Path(output_dir)
    done = read_merge_report(output_dir)
    if done is not None:
        if done.dtype != dtype or not done.is_of(run_dir, adapter):
            raise ModelError(
                f"{output_dir} holds another merge of this run: of other weights or figures, another tokenizer or "
                "template, or with another --dtype. Remove it first, or name another --output-dir."
            )
        logger.info("%s holds this merge already", output_dir)
        _warn_of(done)
        return done
    refuse_non_empty(output_dir)
    source = source_of(run_dir, adapter)
    base = _base(config, run_dir)
    tokenizer, end_tokens = _as_asked(config, adapter)
    copies = sentencepiece_files(base)
    # Before the first pass: else glibc and oneDNN keep two bytes for every byte of the model.
    return_freed_memory()
    bound_kernel_cache()
    texts = list(CALIBRATION_PROMPTS if prompts is None else prompts)
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
    _refuse_what_does_not_fit(config, [row.shape[1] for row in ids])

    notify(f"reading {base.name} in fp32, with {adapter}")
    reference = _trained(config, base, adapter)
    notify(f"computing its logits on {len(ids)} prompts, in fp32 and in fp64")
    before, before_exact = _logits(reference.hf, ids), _exact_logits(reference.hf, ids)
    merged = reference.hf.merge_and_unload(safe_merge=True) if config.student.adapter == "lora" else reference.hf
    notify("computing those of the merged weights")
    pass_rounding = _largest_difference(before, before_exact)
    difference = _largest_difference(before, _logits(merged, ids))
    merge_error = _largest_difference(before_exact, _exact_logits(merged, ids))
    if not merge_error <= MAX_MERGE_ERROR:
        raise ModelError(
            f"The merge changes logits by up to {merge_error:.3g} (limit {MAX_MERGE_ERROR:g}), so nothing was written. "
            "Load the adapter with peft instead, and please report the adapter settings."
        )
    _restore_hidden_config(merged, base)
    if end_tokens is not None and merged.generation_config is not None:
        merged.generation_config.eos_token_id = end_tokens
    merged.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    card = model_card(config, base.name, training_summary(run_dir, adapter), merge_error, dtype)
    notify(f"writing {output_dir}")
    with folder_aside(output_dir) as partial:  # with its report, without which the next call would find a stranger
        write_model_files(merged, tokenizer, partial, {"README.md": card}, copies=copies)
        del merged, reference
        notify("reading it back, and comparing it with the adapter")
        kl_nats = _kl_nats(before, _logits(read_plain(partial, config.student.trust_remote_code), ids))
        report = MergeReport(
            output_dir=output_dir,
            max_logit_difference=difference,
            pass_rounding=pass_rounding,
            merge_error=merge_error,
            kl_nats=kl_nats,
            num_prompts=len(ids),
            dtype=dtype,
            source_sha256=source,
        )
        text = json.dumps({**asdict(report), "output_dir": None}, indent=1) + "\n"
        (partial / REPORT_FILE).write_text(text, encoding="utf-8")
    _warn_of(report)
    return report


def _warn_of(report: MergeReport) -> None:
    if not report.agrees:
        logger.warning(
            "The model saved in %s differs from base + adapter by KL %.3g nats (limit %g). Compare them with `qswitch "
            "eval` before use.",
            report.dtype,
            report.kl_nats,
            MAX_KL_NATS,
        )


def _refuse_what_does_not_fit(config: RunConfig, prompt_tokens: Sequence[int]) -> None:
    """A host that runs out of memory ends the process without a word, so what it lacks is said before."""
    try:
        shape = shape_for(config.student)
    except QSwitchError:  # an architecture that cannot be planned merges all the same
        return
    needed = merge_bytes(shape, prompt_tokens)
    available, source = detect_budget_bytes("cpu")
    if needed > available:
        raise PlanError(
            f"Merging reads the student unquantised and compares it with the adapter: {needed / GIB:.1f} GiB for "
            f"{shape.num_parameters / 1e6:.0f} M parameters and {shape.vocab_size} token ids, and "
            f"{available / GIB:.1f} are free ({source}). Close other programs, or merge on a machine with more memory: "
            "the run directory is all it needs."
        )


def merge_bytes(shape: ModelShape, prompt_tokens: Sequence[int]) -> int:
    """Host memory of a merge that is checked on prompts of these lengths; benchmarks/merge_memory.py measures it.

    Either of two moments is the highest. While the merged weights are compared in fp64: all weights in fp32, the
    widest part once more in fp64, and the logits of the prompts, of which one fp32 and two padded fp64 copies stand
    there. When the saved model is read back: its weights in fp32 with the mapped bf16 file behind them, and the logits
    of both models in fp32.
    """
    tokens, longest = sum(prompt_tokens), max(prompt_tokens)
    padded = longest * len(prompt_tokens)
    layer = sum(linear.parameters for linear in shape.layer_linears)
    comparing = (
        4 * shape.num_parameters
        + 8 * max(layer, shape.embedding_parameters)
        + (4 * tokens + 2 * 8 * padded + 2 * 8 * longest) * shape.vocab_size
    )
    reading = 6 * shape.num_parameters + (2 * 4 * tokens + 5 * 8 * longest) * shape.vocab_size
    return max(comparing, reading) + MERGE_ALLOWANCE_BYTES


def _base(config: RunConfig, run_dir: RunDir) -> ResolvedModel:
    """The student's base: the one cut into the run directory, else what student.model names."""
    if run_dir.student_base_path.is_dir():
        source = Path(reference_names(config.student.model)[0]).name.removesuffix(".gguf")
        return ResolvedModel(str(run_dir.student_base_path), None, f"{source}-{config.student.shrink_to_layers}-layers")
    return resolve_reference(config.student.model, config.student.revision)


def _as_asked(config: RunConfig, adapter: Path) -> tuple[Any, int | list[int] | None]:
    """The student's tokenizer with the chat template of the run, and the tokens at which the run ends responses.

    Both lie beside a finished adapter. A checkpoint has its weights alone, so the run's settings say them again.
    """
    if (adapter / "tokenizer_config.json").is_file():
        tokenizer = read_tokenizer(ResolvedModel(str(adapter), None, adapter.name), config.student.trust_remote_code)
        written = (adapter / "generation_config.json").is_file()  # older runs have none
        return tokenizer, GenerationConfig.from_pretrained(adapter).eos_token_id if written else None
    pair = load_pair_tokenizer(config)
    pair.student.chat_template = template_source(make_encoder(config, pair))
    return pair.student, pair.eos_token_id


def _trained(config: RunConfig, base: ResolvedModel, adapter: Path) -> LanguageModel:
    """Base + trained weights in fp32 on the CPU, in eval mode."""
    runtime = Runtime(device=torch.device("cpu"), compute_dtype=torch.float32)
    # bf16: the rounding that training saw. A base stored in bf16 is the same in both.
    precision = "bf16" if config.student.precision == "bf16" and config.student.adapter == "lora" else "fp32"
    hf = read_model(base, runtime, precision, config.student.trust_remote_code)
    if config.student.adapter == "lora":
        hf = attach_lora(hf, config.student.lora, seed=config.seed)
    model = LanguageModel(hf)
    load_adapter(model, adapter)
    return model.eval()


@torch.no_grad()
def _logits(hf: Any, ids: Sequence[Tensor]) -> list[Tensor]:
    """Logits [n, V] of every prompt, fp32."""
    return [hf(input_ids=row, use_cache=False).logits[0].float() for row in ids]


def _exact_logits(hf: Any, ids: Sequence[Tensor]) -> list[Tensor]:
    """Logits [n, V] of the same fp32 weights with fp64 arithmetic.

    Each part goes to fp64 for its own pass and back, which loses nothing, so that the whole model never stands there in
    eight bytes a weight. All prompts share one pass, and that way: nothing attends to the padding on their right.
    """
    lengths = [row.shape[1] for row in ids]
    padded = torch.zeros((len(ids), max(lengths)), dtype=torch.int64)
    for i, row in enumerate(ids):
        padded[i, : lengths[i]] = row[0]
    handles = []
    for part in _parts(hf):
        handles.append(part.register_forward_pre_hook(lambda module, _: module.to(torch.float64) and None))
        handles.append(part.register_forward_hook(lambda module, *_: module.to(torch.float32) and None))
    try:
        with torch.no_grad(), plain_experts(hf):
            logits = hf(input_ids=padded, use_cache=False).logits
            return [one[:length] for one, length in zip(logits, lengths, strict=True)]
    finally:
        for handle in handles:
            handle.remove()
        hf.to(torch.float32)


def _parts(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Modules that hold all weights between them and read none but their own: each layer as one, the rest singly."""
    whole = isinstance(module, BaseTunerLayer) or any(True for _ in module.parameters(recurse=False))
    if whole or not any(True for _ in module.children()):
        yield module
        return
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from child
        else:
            yield from _parts(child)


def _largest_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def _kl_nats(p_logits: Sequence[Tensor], q_logits: Sequence[Tensor]) -> float:
    """KL(p || q), mean over all tokens."""
    total, tokens = 0.0, 0
    for p, q in zip(p_logits, q_logits, strict=True):
        p_log, q_log = p.double().log_softmax(-1), q.double().log_softmax(-1)
        total += (p_log.exp() * (p_log - q_log)).sum().item()
        tokens += p.shape[0]
    return max(total / tokens, 0.0)


def _restore_hidden_config(merged: Any, base: ResolvedModel) -> None:
    """The saved config must not name where this machine keeps the base."""
    merged.config._name_or_path = base.name
