"""README.md of RUN/adapter, in the layout of the hub, and what it shares with the card of a merged model.

Knows no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qswitch.config import RunConfig


def how_trained(config: RunConfig) -> str:
    """The method, who wrote the responses, and the loss, in a line of Markdown."""
    rollout, loss = config.rollout, config.loss
    schedule = f" (schedule `{rollout.schedule}`)" if rollout.policy == "switch" else ""
    responses = f"responses by the policy `{rollout.policy}`{schedule}, " if config.writes_rollouts else ""
    imitates = loss.objective == "divergence"
    learnt = f"`{loss.divergence}` over `{loss.scope}`" if imitates else "`cross_entropy`"
    return f"method `{config.method}`, {responses}loss {learnt}"


def by_processes(summary: Mapping[str, Any]) -> str:
    """Continues a sentence about the training with the number of its processes, where there were several."""
    count = summary.get("processes", 1)
    return f" in {count} processes" if count > 1 else ""


def licence_lines(config: RunConfig) -> list[str]:
    """The licence of every model and data set that the preset names, a local folder by its last part only."""
    licences = config.about.licences.items()
    known = [f"- {Path(name).name if Path(name).is_dir() else name}: {licence}" for name, licence in licences]
    return known or ["- No preset names them. Check those of the student, the teacher and the data before sharing."]


def adapter_card(config: RunConfig, summary: Mapping[str, Any]) -> str:
    """The model card of RUN/adapter, Hugging Face layout; `summary` is what RUN/summary.json holds."""
    if config.learns_from_teacher:
        made = f"distilled from {summary['teacher']}"
        figure, before, after = "KL(teacher \\|\\| student)", summary["kl_before_nats"], summary["kl_after_nats"]
    else:
        made = f"distilled from the text of {summary['teacher']}" if config.passes_text else "fine-tuned"
        figure, before, after = (
            "Cross-entropy of the responses",
            summary["response_loss_before_nats"],
            summary["response_loss_after_nats"],
        )
    switches = config.writes_rollouts and config.rollout.policy == "switch"
    credit = " SWITCH is by Koo et al., Findings of NAACL 2025." if switches else ""
    lines = [
        "---",
        "library_name: peft",
        f"tags: [distillation, {config.method}, qswitch]",
        "---",
        f"# {summary['student']}, {made}",
        "",
        f"Trained with qswitch (preset `{config.about.name}`): {how_trained(config)}, "
        f"{summary['steps']} steps{by_processes(summary)}.{credit}",
        "",
        f"| {figure}, nats per token, {summary['validation_prompts']} held-out prompts | |",
        "|---|---|",
        f"| before | {before:.4f} |",
        f"| after | {after:.4f} |",
        "",
        f"Trained on {summary['device']} with {summary['peak_gib']:.2f} GiB of memory at its peak "
        f"({summary['planned_gib']:.2f} planned).",
        "",
        "Licences of what it is made from:",
        *licence_lines(config),
        "",
    ]
    return "\n".join(lines)
