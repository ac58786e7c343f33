"""The trained student as a plain Hugging Face model: adapter merged into the unquantised base, then proved equal.

Merging into 4-bit weights would round twice, so the base is always read unquantised here. The saved folder is read back
with transformers alone and compared with base + adapter on prompts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import GenerationConfig

from qswitch.config import RunConfig
from qswitch.errors import ModelError, QSwitchError
from qswitch.models.host_memory import bound_kernel_cache, return_freed_memory
from qswitch.models.language_model import LanguageModel
from qswitch.models.load import read_model, read_tokenizer
from qswitch.models.messages import quiet
from qswitch.models.references import ResolvedModel, resolve_reference
from qswitch.models.runtime import Runtime
from qswitch.models.shrink import CALIBRATION_PROMPTS, refuse_non_empty, write_model_folder
from qswitch.models.student import attach_lora, load_adapter
from qswitch.plan.machine import detect_budget_bytes
from qswitch.plan.shapes import shape_for
from qswitch.run_dir import RunDir
from qswitch.units import GIB

logger = logging.getLogger(__name__)

MAX_MERGE_ERROR = 1e-4
"""Largest logit difference of the fp32 merge against base + adapter, passes in fp64; above it nothing is written."""
MAX_KL_NATS = 1e-3
"""Of the saved model against base + adapter."""
MERGE_ALLOWANCE_BYTES = 700 * 2**20
"""Host memory of a merge beside weights: libraries, logits, kernels; benchmarks/merge_memory.py measures the whole."""


HUB_LICENCES = ("Apache-2.0", "MIT")
"""Licences of the presets that the hub knows by name; it refuses a card with another one in its license field."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeReport:
    """Where the merged model is, and how far it is from base + adapter."""

    output_dir: Path
    max_logit_difference: float
    """Largest |logit difference| between base + adapter and the fp32 merge, passes in fp32."""
    pass_rounding: float
    """Largest |logit difference| of base + adapter between fp32 and fp64 arithmetic: what an fp32 pass rounds by
    itself, and so what `max_logit_difference` may contain without any fault in the merge."""
    merge_error: float
    """The same fp32 weights with passes in fp64: what merging itself changed."""
    kl_nats: float
    """KL(base + adapter || saved model), mean over the tokens of the prompts, both computed in fp32."""
    num_prompts: int
    dtype: str

    @property
    def agrees(self) -> bool:
        """Whether merge error and KL are within their limits."""
        return self.merge_error <= MAX_MERGE_ERROR and self.kl_nats <= MAX_KL_NATS


def merge_run(
    run_path: Path | str,
    output_dir: Path | str,
    *,
    dtype: Literal["bf16", "fp32"] = "bf16",
    prompts: Sequence[str] | None = None,
) -> MergeReport:
    """Merge RUN/adapter (or the latest checkpoint's) into its unquantised base and save a plain model folder.

    Runs on the CPU and needs 4 bytes of memory per parameter and 8 more for each of the largest tensor; where less is
    free it says so and goes on, since swap may have room.

    Raises:
        RunDirError: run_path is no run directory.
        ModelError: no adapter yet, output_dir is not empty, or merging changes the logits (then nothing is written).
    """
    output_dir = Path(output_dir)
    refuse_non_empty(output_dir)
    run_dir = RunDir.open(Path(run_path))
    config = run_dir.config
    adapter = _adapter_folder(run_dir)
    base = _base(config, run_dir)
    tokenizer = _student_tokenizer(config, adapter, base)
    _warn_of_memory(config)
    # Before the first pass: else glibc and oneDNN keep two bytes for every byte of the model.
    return_freed_memory()
    bound_kernel_cache()
    texts = list(CALIBRATION_PROMPTS if prompts is None else prompts)
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]

    reference = _trained(config, base, adapter)
    before, before_exact = _logits(reference.hf, ids), _exact_logits(reference.hf, ids)
    merged = reference.hf.merge_and_unload(safe_merge=True) if config.student.adapter == "lora" else reference.hf
    pass_rounding = _largest_difference(before, before_exact)
    difference = _largest_difference(before, _logits(merged, ids))
    merge_error = _largest_difference(before_exact, _exact_logits(merged, ids))
    if not merge_error <= MAX_MERGE_ERROR:
        raise ModelError(
            f"The merge changes logits by up to {merge_error:.3g} (limit {MAX_MERGE_ERROR:g}), so nothing was written. "
            "Load the adapter with peft instead, and please report the adapter settings."
        )
    _restore_hidden_config(merged, base)
    _set_end_tokens(merged, adapter)
    merged.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    card = model_card(config, base, _summary(run_dir), merge_error, dtype)
    write_model_folder(merged, tokenizer, output_dir, {"README.md": card})
    del merged, reference

    kl_nats = _kl_nats(before, _logits(_plain(output_dir), ids))
    report = MergeReport(
        output_dir=output_dir,
        max_logit_difference=difference,
        pass_rounding=pass_rounding,
        merge_error=merge_error,
        kl_nats=kl_nats,
        num_prompts=len(ids),
        dtype=dtype,
    )
    if not report.agrees:
        logger.warning(
            "The model saved in %s differs from base + adapter by KL %.3g nats (limit %g). Compare them with `qswitch "
            "eval` before use.",
            dtype,
            kl_nats,
            MAX_KL_NATS,
        )
    return report


def _warn_of_memory(config: RunConfig) -> None:
    """A host that runs out of memory ends the process without a word, so what it lacks is said before."""
    try:
        shape = shape_for(config.student)
        needed = 4 * shape.num_parameters + 8 * shape.largest_tensor_parameters + MERGE_ALLOWANCE_BYTES
    except QSwitchError:  # an architecture that cannot be planned merges all the same
        return
    available, source = detect_budget_bytes("cpu")
    if needed > available:
        logger.warning(
            "Merging reads the student unquantised: about %.1f GiB, and %.1f are free (%s). Close other programs, or "
            "merge on a machine with more memory: the run directory is all it needs.",
            needed / GIB,
            available / GIB,
            source,
        )


def _set_end_tokens(merged: Any, adapter: Path) -> None:
    """The tokens at which the run ended responses, the teacher's among them; a bare checkpoint has the base's."""
    if (adapter / "generation_config.json").is_file() and merged.generation_config is not None:
        merged.generation_config.eos_token_id = GenerationConfig.from_pretrained(adapter).eos_token_id


def _adapter_folder(run_dir: RunDir) -> Path:
    if run_dir.adapter_path.is_dir():
        return run_dir.adapter_path
    latest = run_dir.latest_checkpoint()
    if latest is None:
        raise ModelError(f"{run_dir.path} holds no adapter yet. Wait for its first checkpoint, or resume the run.")
    logger.warning("The run has not finished; merging the adapter of %s", latest.name)
    return latest / "adapter"


def _base(config: RunConfig, run_dir: RunDir) -> ResolvedModel:
    """The student's base: the one cut into the run directory, else what student.model names."""
    if run_dir.student_base_path.is_dir():
        source = Path(_names(config.student.model)[0]).name.removesuffix(".gguf")
        return ResolvedModel(str(run_dir.student_base_path), None, f"{source}-{config.student.shrink_to_layers}-layers")
    return resolve_reference(config.student.model, config.student.revision)


def _student_tokenizer(config: RunConfig, adapter: Path, base: ResolvedModel) -> Any:
    """The tokenizer saved with the adapter carries the chat template of the run; a bare checkpoint has the base's."""
    if (adapter / "tokenizer_config.json").is_file():
        return read_tokenizer(ResolvedModel(str(adapter), None, adapter.name), config.student.trust_remote_code)
    return read_tokenizer(base, config.student.trust_remote_code)


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


def _plain(folder: Path) -> Any:
    """The saved folder as anyone would read it, in fp32."""
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


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
        with torch.no_grad():
            logits = hf(input_ids=padded, use_cache=False).logits
            return [one[:length].clone() for one, length in zip(logits, lengths, strict=True)]
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


def _summary(run_dir: RunDir) -> dict[str, Any]:
    if not run_dir.summary_path.is_file():
        return {}
    return json.loads(run_dir.summary_path.read_text(encoding="utf-8"))


def model_card(config: RunConfig, base: ResolvedModel, summary: dict[str, Any], merge_error: float, dtype: str) -> str:
    """README.md of the merged model: what it is, from what, how it was trained, its figures, how to load it."""
    teacher, student = _named(config.teacher.model), _named(config.student.model)
    licences = config.about.licences
    licence = next((licences[name] for name in _names(config.student.model) if name in licences), None)
    header = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if licence in HUB_LICENCES:
        header.append(f"license: {licence.lower()}")
    elif licence:
        header += ["license: other", f"license_name: {licence}"]
    header += ["tags:", "- distillation", "- qswitch", "---", ""]
    rollout, loss = config.rollout, config.loss
    cut = f", cut to {config.student.shrink_to_layers} layers" if config.student.shrink_to_layers else ""
    unknown = "that of the student model; check it, and that of the teacher, before sharing"
    lines = [
        f"# {base.name}, distilled with qswitch",
        "",
        f"- Student: {student}{cut}",
        f"- Teacher: {teacher} ({config.teacher.precision})",
        f"- Licence: {licence or unknown}",
        f"- Method: rollout policy `{rollout.policy}`"
        + (f", schedule `{rollout.schedule}`" if rollout.policy == "switch" else "")
        + f", loss `{loss.divergence}` over `{loss.scope}`, {config.train.max_steps} steps",
        f"- Adapter: {_adapter_line(config)}; weights saved in {dtype}",
        f"- Merge check: merging changed logits by at most {merge_error:.2g} against base + adapter",
    ]
    figures = {
        "kl_before_nats": "KL(teacher || student) before, nats per token, held-out prompts",
        "kl_after_nats": "the same after training",
        "steps": "optimizer steps",
        "seconds": "seconds of training",
    }
    known = [f"| {label} | {summary[key]:.4g} |" for key, label in figures.items() if _is_number(summary.get(key))]
    if known:
        lines += ["", "| figure | value |", "|---|---|", *known]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        "```",
        "",
    ]
    return "\n".join([*header, *lines])


def _adapter_line(config: RunConfig) -> str:
    if config.student.adapter == "none":
        return "none, every weight was trained"
    lora = config.student.lora
    kind = "DoRA" if lora.use_dora else "LoRA"
    return f"{kind} r={lora.r} alpha={lora.alpha:g}, merged into the unquantised base"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _names(reference: str | list[str]) -> list[str]:
    return [reference] if isinstance(reference, str) else list(reference)


def _named(reference: str | list[str]) -> str:
    """References for people: a local folder by its last part only."""
    shown = [Path(name).name if Path(name).expanduser().is_dir() else name for name in _names(reference)]
    return " or ".join(f"`{name}`" for name in shown)
