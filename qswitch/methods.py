"""Which settings a method stands for: every method is a few defaults over the same trainer.

`method: gkd` fills in what the user left open; settings that are written win, and what would make the method another
one is refused (`config.py`). Where the values come from is in docs/methods.md. Cold: plain values, no pydantic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

DEFAULT = "switch"
CUSTOM = "custom"
"""No bundle and no rules: the sections say it all."""

METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "switch": {"rollout": {"policy": "switch"}, "loss": {"objective": "divergence"}},
    "sft": {"loss": {"objective": "cross_entropy", "scope": "all"}, "data": {"ground_truth_mix": 1.0}},
    "kd": {
        "loss": {"objective": "divergence", "divergence": "forward_kl", "scope": "all"},
        "data": {"ground_truth_mix": 1.0},
    },
    "seqkd": {
        "rollout": {"policy": "teacher"},
        "loss": {"objective": "cross_entropy", "scope": "all"},
        "data": {"ground_truth_mix": 0.0},
    },
    "gkd": {
        "rollout": {"policy": "student"},
        "loss": {"objective": "divergence", "divergence": "jsd", "beta": 0.1, "scope": "all"},
        "data": {"ground_truth_mix": 0.5},
    },
    "imitkd": {
        "rollout": {"policy": "student"},
        "loss": {"objective": "divergence", "divergence": "forward_kl", "scope": "all"},
        "data": {"ground_truth_mix": 0.0},
    },
    "distillm": {
        # Its buffer has no limit of age.
        "rollout": {"policy": "student", "replay_capacity": 1000, "replay_max_age_steps": 1_000_000},
        "loss": {"objective": "divergence", "divergence": "skew_reverse_kl", "alpha": 0.1, "scope": "all"},
        "data": {"adaptive_share": True, "ground_truth_mix": 0.0},
    },
    "skd": {
        "rollout": {"policy": "skd"},
        "loss": {"objective": "divergence", "divergence": "forward_kl", "scope": "all"},
        "data": {"ground_truth_mix": 0.0},
    },
    "adaswitch": {
        "rollout": {"policy": "adaswitch"},
        "loss": {"objective": "divergence", "scope": "all"},
        "data": {"ground_truth_mix": 0.0},
    },
    CUSTOM: {},
}

FIXED: dict[str, tuple[str, ...]] = {
    "switch": ("rollout.policy", "loss.objective"),
    "sft": ("loss.objective", "data.ground_truth_mix"),
    "kd": ("loss.objective", "data.ground_truth_mix"),
    "seqkd": ("rollout.policy", "loss.objective", "data.ground_truth_mix"),
    "gkd": ("rollout.policy", "loss.objective"),
    "imitkd": ("rollout.policy", "loss.objective", "data.ground_truth_mix"),
    "distillm": ("rollout.policy", "loss.objective", "data.adaptive_share", "data.ground_truth_mix"),
    "skd": ("rollout.policy", "loss.objective"),
    "adaswitch": ("rollout.policy", "loss.objective"),
    CUSTOM: (),
}
"""What makes the method this method: other values for these are a contradiction."""

OWNED = (
    "rollout.policy",
    "rollout.schedule",
    "rollout.tau_0",
    "rollout.decay_rate",
    "rollout.constant_threshold",
    "rollout.teacher_probability",
    "rollout.mixture_teacher_weight",
    "rollout.skd_top_k",
    "rollout.adaswitch_factor",
    "rollout.adaswitch_window",
    "loss.objective",
    "loss.divergence",
    "loss.alpha",
    "loss.beta",
    "loss.scope",
    "rollout.replay_capacity",
    "rollout.replay_max_age_steps",
    "data.ground_truth_mix",
    "data.adaptive_share",
    "data.share_tolerance_nats",
)
"""Settings that say what a method is. A file or --set that names another method takes those of the file below away."""


def writes_rollouts(method: str) -> bool:
    """Whether the method is one of responses that a model writes."""
    return "rollout.policy" in FIXED[method]


def bundle_values(method: str) -> Iterator[tuple[str, Any]]:
    """(dotted setting, value) pairs of a method."""
    for section, values in METHODS[method].items():
        for key, value in values.items():
            yield f"{section}.{key}", value


def with_bundle(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the defaults of their method filled in where nothing is written.

    An unknown method is left for the schema to refuse. Without `method`, settings that are SWITCH's are `switch`, and
    any others `custom`.
    """
    values = dict(values)
    if values.get("method") is None:
        data = values.get("data")
        no_rollouts = isinstance(data, Mapping) and data.get("ground_truth_mix") == 1
        values["method"] = CUSTOM if no_rollouts or any(contradictions(DEFAULT, values)) else DEFAULT
    for section, defaults in METHODS.get(values["method"], {}).items() if isinstance(values["method"], str) else ():
        written = values.get(section)
        if written is None or isinstance(written, Mapping):
            values[section] = {**defaults, **(written or {})}
    return values


def contradictions(method: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(dotted setting, written value, the method's value) for every written setting that the method fixes otherwise."""
    own = dict(bundle_values(method))
    for dotted in FIXED[method]:
        section, _, key = dotted.partition(".")
        written = values.get(section)
        if isinstance(written, Mapping) and key in written and written[key] != own[dotted]:
            yield dotted, written[key], own[dotted]


_UNREAD = {
    "sft": ("rollout.temperature", "rollout.reuse", "rollout.round_steps", "loss.temperature", "teacher.residency"),
    "kd": ("rollout.temperature", "rollout.reuse"),
    "distillm": ("rollout.reuse",),
    "seqkd": ("loss.temperature",),
}
"""Settings of no method's own that a method has no use for."""


def forget_method(values: Mapping[str, Any], method: Any, aliases: Mapping[str, str]) -> dict[str, Any]:
    """`values` of a lower file without what belongs to its method, if the file above names another `method`."""
    if method is None or method == values.get("method", DEFAULT):
        return dict(values)
    gone = (*OWNED, *_UNREAD.get(method, ()))
    kept = {name: value for name, value in values.items() if aliases.get(name) not in gone}
    for dotted in gone:
        section, _, key = dotted.partition(".")
        if isinstance(kept.get(section), Mapping) and key in kept[section]:
            kept[section] = {name: value for name, value in kept[section].items() if name != key}
    return kept
