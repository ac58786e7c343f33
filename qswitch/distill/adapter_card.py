"""README.md of RUN/adapter, in the layout of the hub, and what it shares with the card of a merged model.

Knows no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qswitch.config import RunConfig
from qswitch.data.compression import data_suffix
from qswitch.data.files import RECORD_SUFFIXES, TEXT_SUFFIXES
from qswitch.hub import HUB_ID
from qswitch.outside import user_path
from qswitch.preset_index import read_index

UNKNOWN = "licence not known; check it before sharing"
WORSE = "**Training made it worse by this figure: no validation was below the one before the first step.**"
OWN = "a local file or folder; say here whose it is and how it may be used"


def how_trained(config: RunConfig, summary: Mapping[str, Any]) -> str:
    """The method, who wrote the responses, the loss, the steps, and of which of them the weights are, as Markdown."""
    rollout, loss, steps = config.rollout, config.loss, summary.get("steps")
    responses = ""
    if config.writes_rollouts:
        schedule = f" (schedule `{rollout.schedule}`)" if rollout.policy == "switch" else ""
        written = summary.get("rollout_batches", steps)
        some = f" in {written} of {steps} batches" if written != steps else ""
        responses = f"responses by the policy `{rollout.policy}`{schedule}{some}, "
    imitates = loss.objective == "divergence"
    learnt = f"`{loss.divergence}` over `{loss.scope}`" if imitates else "`cross_entropy`"
    how = f"method `{config.method}`, {responses}loss {learnt}"
    if steps is None:
        return how
    best, processes = summary.get("best_step", steps), summary.get("processes", 1)
    by = f" in {processes} processes" if processes > 1 else ""
    which = f"; these are the weights of step {best}, whose validation was the best" if best != steps else ""
    return f"{how}, {steps} steps{by}{which}"


def got_worse(summary: Mapping[str, Any]) -> bool:
    """Whether the run's figure is higher after training than before."""
    pairs = (("kl_before_nats", "kl_after_nats"), ("response_loss_before_nats", "response_loss_after_nats"))
    found = [(summary.get(before), summary.get(after)) for before, after in pairs]
    return any(before is not None and after is not None and after > before for before, after in found)


def licence_lines(config: RunConfig) -> list[str]:
    """A line for every model and data set that the run used: its licence, or that nobody has told it."""
    uses_teacher = config.learns_from_teacher or config.passes_text
    models = [config.teacher.model, config.teacher.adapter] if uses_teacher else []
    models += [config.student.model, config.student.init_adapter]
    data = [*_entries(config.data.train), *_entries(config.data.lm_corpus)]
    lines = [_licence_line(config, places) for places in [*map(_entries, models), *([one] for one in data)] if places]
    return list(dict.fromkeys(lines))


def known_licence(config: RunConfig, places: list[str]) -> tuple[str, str] | None:
    """(name, licence) of a model or data set that lies at any of `places`; None where neither settings nor a preset
    tell. A subset (`owner/name:subset`) has the licence of its data set."""
    licences = {name: licence for preset in read_index() for name, licence in preset.licences.items()}
    licences |= config.about.licences
    names = [name for place in places for name in (place, place.partition(":")[0])]
    return next(((name, licences[name]) for name in names if name in licences), None)


def _licence_line(config: RunConfig, places: list[str]) -> str:
    known = known_licence(config, places)
    if known is not None:
        name, licence = known
        return f"- {shown_reference(name)}: {licence}"
    return f"- {' or '.join(map(shown_reference, places))}: {OWN if all(map(_is_local, places)) else UNKNOWN}"


def _entries(reference: str | list[str] | None) -> list[str]:
    return [reference] if isinstance(reference, str) else list(reference or ())


def shown_reference(reference: str) -> str:
    """A reference for people: a file or folder by its last part only, since its path is of one machine."""
    return user_path(reference).resolve().name if _is_local(reference) else reference


def _is_local(reference: str) -> bool:
    """Whether a reference is a path, by its form too: the card may be written when or where the file is not there."""
    if reference.startswith("package:"):
        return False
    path = user_path(reference)
    is_file_name = data_suffix(path) in RECORD_SUFFIXES + TEXT_SUFFIXES
    return path.exists() or is_file_name or HUB_ID.fullmatch(reference.partition(":")[0]) is None


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
        f"Trained with qswitch (preset `{config.about.name}`): {how_trained(config, summary)}.{credit}",
        "",
        f"| {figure}, nats per token, {summary['validation_prompts']} held-out prompts | |",
        "|---|---|",
        f"| before | {before:.4f} |",
        f"| after | {after:.4f} |",
        "",
        *([WORSE, ""] if got_worse(summary) else []),
        f"Trained on {summary['device']} with {summary['peak_gib']:.2f} GiB of memory at its peak "
        f"({summary['planned_gib']:.2f} planned).",
        "",
        "Licences of what it is made from:",
        *licence_lines(config),
        "",
    ]
    return "\n".join(lines)
