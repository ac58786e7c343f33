"""Units of memory, and the largest numbers that a user can mean, defined once. Knows nothing else."""

GIB = 2**30
"""Bytes of one gibibyte."""

MAX_TOKENS = 2**20
"""Of a prompt or a response; no model's context is longer."""
MAX_ROWS = 65_536
"""Of a batch."""
MAX_COUNT = 10**9
"""Of steps, records and what is counted with them: more is a slip of the finger, and some loops would take for ever."""
