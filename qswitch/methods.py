"""Which settings a method stands for: every method is a few defaults over the same trainer.

`method: gkd` fills in what the user left open; settings that are written win, and what would make the method another
one is refused (`rules.py`). Where the values come from is in docs/methods.md. Cold: plain values, no pydantic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

DEFAULT = "switch"
CUSTOM = "custom"
"""No bundle and no rules: the sections say it all."""

METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "switch": {"rollout": {"policy": "switch"}, "loss": {"objective": "divergence"}},
    # Every value of the paper in words, so that it stays what it is when a default moves.
    "switch-paper": {
        "rollout": {"policy": "switch", "schedule": "exponential", "tau_0": 1.0, "decay_rate": 0.1},
        "loss": {"objective": "divergence", "divergence": "skew_reverse_kl", "alpha": 0.1, "scope": "all"},
        "data": {"ground_truth_mix": 0.5},
    },
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
    "switch-paper": ("rollout.policy", "loss.objective", "loss.scope"),
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
    "rollout.relative_decay",
    "rollout.expected_tokens",
    "rollout.teacher_share",
    "rollout.constant_threshold",
    "rollout.teacher_probability",
    "rollout.mixture_teacher_weight",
    "rollout.skd_top_k",
    "rollout.adaswitch_factor",
    "rollout.adaswitch_window",
    "loss.objective",
    "loss.divergence",
    "loss.divergence_teacher_tokens",
    "loss.divergence_student_tokens",
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
    """(dotted setting, value) pairs of a method; none of an unknown one."""
    for section, values in METHODS.get(method, {}).items():
        for key, value in values.items():
            yield f"{section}.{key}", value


def method_of(values: Mapping[str, Any]) -> str:
    """The method that settings by section name; without one, SWITCH's settings are `switch` and any others `custom`."""
    if isinstance(values.get("method"), str):
        return str(values["method"])
    own = dict(bundle_values(DEFAULT))
    written = {
        f"{name}.{key}": value
        for name, section in values.items()
        if isinstance(section, Mapping)
        for key, value in section.items()
    }
    others = any(written.get(setting, own[setting]) != own[setting] for setting in FIXED[DEFAULT])
    return CUSTOM if others or written.get("data.ground_truth_mix") == 1 else DEFAULT
