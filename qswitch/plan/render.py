"""How a plan is shown to people. Formatting only."""

from __future__ import annotations

from typing import Any

from qswitch.plan.run_plan import Plan
from qswitch.units import GIB


def render(plan: Plan) -> str:
    """A plain table: parts, phases, choices, host and disk, verdict, notes."""
    lines = ["Memory plan, GiB (2**30 bytes)"]
    breakdown = plan.breakdown
    sections: list[tuple[str, dict[str, int]]] = [("parts", plan.parts), ("peak per phase", plan.phases)]
    if breakdown.host:
        sections.append((f"host memory, {plan.host_bytes / GIB:.2f} in all", breakdown.host))
    sections.append((f"disk, {plan.disk_bytes / GIB:.2f} in all", breakdown.disk))
    values = {name: str(value) for name, value in plan.choices.items()}
    width = max(map(len, [*(name for _, group in sections for name in group), *values]))
    for title, group in sections:
        lines += ["", title] + [f"  {name:<{width}}  {size / GIB:8.2f}" for name, size in group.items()]
    lines += ["", "choices"] + [f"  {name:<{width}}  {value:>8}" for name, value in values.items()]
    verdict = f"total {plan.total_gib:.2f} GiB"
    if plan.budget_bytes is not None:
        verdict += f", budget {plan.budget_bytes / GIB:.2f}: {'fits' if plan.fits else 'does not fit'}"
    lines += ["", verdict]
    if plan.next_better is not None:
        size, share = plan.next_better
        lines.append(f"next better budget: {size / GIB:.1f} GiB, where a step takes about {share:.0%} of the time")
    return "\n".join([*lines, *(f"- {note}" for note in plan.notes)])


SHORT_NAMES = {
    "CUDA context": ("cuda_context",),
    "process": ("process",),
    "teacher": ("teacher_weights", "teacher_adapter", "teacher_copy"),
    "student": ("student_weights", "adapters", "optimizer_state"),
    "logit cache": ("logit_cache",),
    "KV caches": ("teacher_kv_cache", "student_kv_cache"),
    "logits": ("rollout_logits",),
    "activations": ("activations",),
    "gradients": ("gradients",),
    "loss": ("loss_chunk",),
    "workspace": ("dequantisation", "prefill", "kept_hidden"),
    "load buffer": ("load_buffer",),
}
_ALWAYS = {"CUDA context", "process", "teacher", "student"}
_PHASE_NAMES = {
    "load": {"load buffer"},
    "rollout": {"KV caches", "logits", "workspace", "logit cache"},
    "train": {"activations", "gradients", "loss", "logit cache"},
    "validate": {"logit cache"},
}


def shortage(plan: Plan, which: str = "even at its smallest") -> str:
    """What a plan that does not fit needs, part by part, against the budget; `which` says of what sizes it is."""
    assert plan.budget_bytes is not None, "a plan without a budget always fits"
    phase = max(plan.phases, key=plan.phases.__getitem__)
    shown = _ALWAYS | _PHASE_NAMES[phase]
    sizes = {label: sum(plan.parts.get(p, 0) for p in names) for label, names in SHORT_NAMES.items() if label in shown}
    listed = ", ".join(f"{label} {size / GIB:.1f}" for label, size in sizes.items() if size >= 0.05 * GIB)
    return (
        f"The plan needs {plan.total_gib:.2f} GiB in its {phase} phase {which} ({listed}); "
        f"the budget is {plan.budget_bytes / GIB:.2f}."
    )


_SHORT_CHOICES = {
    "teacher.residency": "swap",
    "rollout.batch_size": "rows {}",
    "train.per_device_train_batch_size": "micro-batch {}",
    "student.gradient_checkpointing": "checkpointing",
    "loss.chunk_tokens": "chunk {}",
    "cache.device_budget_gib": "cache on host",
}


def render_overview(rows: list[dict[str, Any]]) -> str:
    """`plan_overview` as one block a preset: per budget whether it runs as written, with which changes, or not."""
    lines = ["Every preset on a GPU of 6 to 24 GiB (memory in GiB, free to the program)"]
    for row in rows:
        lines += ["", f"{row['name']}: {row['as_written_gib']:.1f} as written"]
        for cell in row["budgets"]:
            if not cell["fits"]:
                verdict = f"no: needs {cell['total_gib']:.1f} at its smallest"
            elif not cell["changed"]:
                verdict = "as written"
            else:
                changed = cell["changed"]
                verdict = ", ".join(text.format(changed[k]) for k, text in _SHORT_CHOICES.items() if k in changed)
            lines.append(f"  {cell['budget_gib']:>4}  {verdict}")
    return "\n".join(lines)
