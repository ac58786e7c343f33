"""What ends a run, where several places may say so: the highest that names one limit says all of them.

A run is ended by optimizer steps (or the epochs that they are counted from), response tokens or seconds, whichever is
reached first. `layers.stack` applies the rule; here it is told to somebody who goes on with a run. Cold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qswitch import rules
from qswitch.config import RunConfig


def lost_limits(before: RunConfig, now: RunConfig, said: Mapping[str, Any]) -> str | None:
    """What ended a run and does so no longer because `said`, dotted setting -> value, names another limit; for the
    user. None where nothing is lost, or only what `said` takes back by name."""
    ours, theirs = _in_force(now), _in_force(before)
    lost = [f"{name}={value}" for name, value in theirs.items() if name not in ours and name not in said]
    if not lost:
        return None
    named = " and ".join(name for name in ours if name in said)
    return (
        f"{' and '.join(lost)} no longer ends the run: --set names {named}, and who names one limit says all of them. "
        "Name both to keep both."
    )


def _in_force(config: RunConfig) -> dict[str, Any]:
    train = config.train
    limits = {"max_steps": train.step_limit, "max_tokens": train.max_tokens, "max_seconds": train.max_seconds}
    return {f"train.{name}": value for name, value in limits.items() if value is not None}


def shown(key: str, settings: Mapping[str, Any]) -> Any:
    """The value of a setting; of a number of steps that ends nothing, that it does not."""
    return settings[key] if key != "train.max_steps" or rules.has_step_limit(settings.get) else "no limit"
