"""Units of memory and of loss, and the largest numbers that a user can mean, defined once. Knows nothing else."""

import math

GIB = 2**30
"""Bytes of one gibibyte."""

MAX_TOKENS = 2**20
"""Of a prompt or a response; no model's context is longer."""
MAX_ROWS = 65_536
"""Of a batch."""
MAX_COUNT = 10**9
"""Of steps, records and what is counted with them: more is a slip of the finger, and some loops would take for ever."""
UNLIMITED_STEPS = 10**6
"""Optimizer steps from which on train.max_steps is no limit beside one of tokens or seconds. Where nobody has written a
number of steps, a configuration holds this one."""


def bits_per_byte(nats_per_token: float | None, num_tokens: int | None, num_bytes: int | None) -> float | None:
    """A loss that does not depend on how the text is cut into tokens; None where something of it is not known."""
    if nats_per_token is None or not num_tokens or not num_bytes:
        return None
    return nats_per_token * num_tokens / (math.log(2) * num_bytes)
