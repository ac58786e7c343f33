"""README.md of an exported model: what it is, from what, how it was trained, its figures, how to load it.

The hub shows it as the model card. Knows no weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qswitch.config import RunConfig

HUB_LICENCES = ("Apache-2.0", "MIT")
"""Licences of the presets that the hub knows by name; it refuses a card with another one in its license field."""


def model_card(config: RunConfig, name: str, summary: dict[str, Any], merge_error: float, dtype: str) -> str:
    """The card of a model called `name`; `merge_error` is the largest logit difference that merging made."""
    teacher, student = _named(config.teacher.model), _named(config.student.model)
    licences = config.about.licences
    licence = next((licences[name] for name in reference_names(config.student.model) if name in licences), None)
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
        f"# {name}, distilled with qswitch",
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


def reference_names(reference: str | list[str]) -> list[str]:
    return [reference] if isinstance(reference, str) else list(reference)


def _named(reference: str | list[str]) -> str:
    """References for people: a local folder by its last part only."""
    shown = [Path(name).name if Path(name).expanduser().is_dir() else name for name in reference_names(reference)]
    return " or ".join(f"`{name}`" for name in shown)
