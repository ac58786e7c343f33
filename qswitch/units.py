"""Units of memory, defined once. Knows nothing else."""

GIB = 2**30
"""Bytes of one gibibyte."""
