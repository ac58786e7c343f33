"""How many processes a command was started as, and which of them this one is: what torchrun and accelerate say.

Cold: reads the environment and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from qswitch.errors import ConfigError

VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets beside WORLD_SIZE, and every process needs to find the others."""
GRADIENT_BUCKET_BYTES = 64 * 2**20
"""Several processes add up their gradients so many bytes at a time, in a copy of them."""


@dataclass(frozen=True, slots=True)
class Launch:
    """This process among those of one command."""

    count: int = 1
    """Processes on all machines."""
    rank: int = 0
    """This one's number, from 0."""
    local_rank: int = 0
    """Its number on this machine, which is also that of its GPU."""
    local_count: int = 1
    """Processes on this machine."""


def launched(environment: Mapping[str, str] | None = None) -> Launch:
    """What the launcher says; one process where there was none.

    Raises:
        ConfigError: the environment says of several processes, and not how they find each other.
    """
    known = os.environ if environment is None else environment
    if known.get("WORLD_SIZE", "1") == "1":
        return Launch()
    missing = [name for name in VARIABLES if not known.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={known['WORLD_SIZE']} says of several processes, but {', '.join(missing)} is not set. Start "
            "them with accelerate launch or torchrun, or unset WORLD_SIZE."
        )
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    try:
        count, rank, local_rank = (int(known[name]) for name in names)
        local_count = int(known.get("LOCAL_WORLD_SIZE", count))
    except ValueError:
        said = ", ".join(f"{name}={known[name]}" for name in names)
        raise ConfigError(f"{said}: each must be a number. Start with accelerate launch or torchrun.") from None
    return Launch(count, rank, local_rank, local_count)
