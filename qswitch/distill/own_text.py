"""What is measured on a model's own responses without any model: positions, repetition. Cold and pure."""

from __future__ import annotations

from collections.abc import Sequence

POSITIONS = ((0, 32), (32, 64), (64, 128), (128, 256), (256, 512), (512, None))
"""Response positions that are measured apart, first and one past the last."""


def position_name(first: int, last: int | None) -> str:
    """`32-63`, or `512+`."""
    return f"{first}+" if last is None else f"{first}-{last - 1}"


def repeated_share(ids: Sequence[int], n: int) -> float:
    """Share of the n-grams of token ids that stood before in the same response, in [0, 1]; 0 where there is none."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
