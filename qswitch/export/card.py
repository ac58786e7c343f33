"""README.md of an exported model: what it is, from what, how it was trained, its figures, how to load it.

The hub shows it as the model card. Knows no weights.
"""

from __future__ import annotations

import json
from typing import Any

from qswitch.config import RunConfig
from qswitch.distill.adapter_card import (
    WORSE,
    got_worse,
    how_trained,
    known_licence,
    licence_lines,
    shown_reference,
)
from qswitch.hub import is_hub_id

HUB_LICENCES = ("Apache-2.0", "MIT")
"""Licences of the presets that the hub knows by name; it refuses a card with another one in its license field."""


def model_card(config: RunConfig, name: str, summary: dict[str, Any], merge_error: float, dtype: str) -> str:
    """The card of a model called `name`; `merge_error` is the largest logit difference that merging made."""
    teacher, student = _named(config.teacher.model), _named(config.student.model)
    _, licence = known_licence(config, reference_names(config.student.model)) or ("", None)
    header = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if licence in HUB_LICENCES:
        header.append(f"license: {licence.lower()}")
    elif licence:
        header += ["license: other", f"license_name: {licence}"]
    base = next((name for name in reference_names(config.student.model) if is_hub_id(name)), None)
    if base is not None:
        header.append(f"base_model: {base}")
    header += ["tags:", "- distillation", f"- {config.method}", "- qswitch", "---", ""]
    cut = f", cut to {config.student.shrink_to_layers} layers" if config.student.shrink_to_layers else ""
    system = config.data.system_prompt
    lines = [
        f"# {name}, distilled with qswitch",
        "",
        f"- Student: {student}{cut}",
        *([f"- Teacher: {teacher} ({config.teacher.precision})"] if config.learns_from_teacher else []),
        f"- Training: {how_trained(config, summary)}",
        *([f"- System message of every prompt: {json.dumps(system, ensure_ascii=False)}"] if system else []),
        f"- Adapter: {_adapter_line(config)}; weights saved in {dtype}",
        f"- Merge check: merging changed logits by at most {merge_error:.2g} against base + adapter",
    ]
    figures = {
        "kl_before_nats": "KL(teacher \\|\\| student) before, nats per token, held-out prompts",
        "kl_after_nats": "the same after training",
        "response_loss_before_nats": "cross-entropy of held-out responses before, nats per token",
        "response_loss_after_nats": "the same after training",
        "seconds": "seconds of training",
        "peak_gib": "memory of the training at its peak, GiB",
    }
    known = [f"| {label} | {summary[key]:.4g} |" for key, label in figures.items() if _is_number(summary.get(key))]
    if known:
        lines += ["", "| figure | value |", "|---|---|", *known]
    if got_worse(summary):
        lines += ["", WORSE]
    lines += ["", "Licences of what it is made from:", "", *licence_lines(config)]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        "",
        'question = [{"role": "user", "content": "Why is the sky blue?"}]',
        'inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", '
        "return_dict=True)",
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0]))",
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
    return " or ".join(f"`{shown_reference(name)}`" for name in reference_names(reference))
