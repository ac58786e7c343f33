"""How responses are written for an evaluation: the named protocols, and what of one was changed. Cold."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from qswitch.errors import ConfigError
from qswitch.units import MAX_TOKENS


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """Sampling, template and limits of an evaluation."""

    name: str
    seeds: tuple[int, ...]
    """One response per record and seed."""
    temperature: float
    """0 is greedy; then one seed does."""
    no_repeat_ngram_size: int
    """No n-gram of prompt and response is written twice; 0 bans nothing."""
    template: str | None
    """As data.template; None: the one the first model was trained with, else its chat template."""
    max_prompt_tokens: int
    """Records with a longer prompt are left out and counted."""
    max_new_tokens: int
    """Response limit, tokens."""


PROTOCOLS = {
    "paper": Protocol(
        name="paper",
        seeds=(10, 20, 30, 40, 50),
        temperature=1.0,
        no_repeat_ngram_size=6,
        template="alpaca",
        max_prompt_tokens=256,
        max_new_tokens=256,
    ),
    "greedy": Protocol(
        name="greedy",
        seeds=(0,),
        temperature=0.0,
        no_repeat_ngram_size=0,
        template=None,
        max_prompt_tokens=1024,
        max_new_tokens=256,
    ),
}


def make_protocol(name: str, **changes: Any) -> tuple[Protocol, list[str]]:
    """A named protocol with the changes that are not None, and one line for each that departs from it.

    Raises:
        ConfigError: no such protocol, no seed, or greedy responses with several seeds.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"There is no protocol {name!r}. Known: {', '.join(PROTOCOLS)}.")
    named = PROTOCOLS[name]
    given = {key: value for key, value in changes.items() if value is not None}
    protocol = replace(named, **given)
    if not protocol.seeds or len(set(protocol.seeds)) < len(protocol.seeds):
        raise ConfigError(f"The seeds {list(protocol.seeds)} must be at least one, all different.")
    for limit in ("max_new_tokens", "max_prompt_tokens"):
        if not 1 <= getattr(protocol, limit) <= MAX_TOKENS:
            raise ConfigError(f"{limit} is {getattr(protocol, limit)}. Give a number from 1 to {MAX_TOKENS}.")
    if any(seed < 0 for seed in protocol.seeds):
        raise ConfigError(f"The seeds {list(protocol.seeds)}: seeds are from 0 on.")
    if not (math.isfinite(protocol.temperature) and protocol.temperature >= 0):
        raise ConfigError(f"The temperature is {protocol.temperature}. Give a number from 0 (greedy) on.")
    if protocol.temperature == 0 and len(protocol.seeds) > 1:
        raise ConfigError("Greedy responses are the same for every seed. Give one seed, or a temperature above 0.")
    departures = [
        f"{field.name} is {getattr(protocol, field.name)} instead of {getattr(named, field.name)}"
        for field in fields(named)
        if getattr(protocol, field.name) != getattr(named, field.name)
    ]
    return protocol, departures
