"""Which of several weighted sets gives the next prompt. Pure arithmetic; knows no prompts."""

from __future__ import annotations

from collections.abc import Sequence


def furthest_behind(weights: Sequence[float], given: Sequence[int]) -> int:
    """The set that gives next, after each has `given` so many: the one furthest behind its share; of equal ones the
    first."""
    whole, total = sum(weights), sum(given) + 1
    return max(range(len(weights)), key=lambda i: (total * (weights[i] / whole) - given[i], -i))


def shares_of(num: int, weights: Sequence[float]) -> list[int]:
    """How many of `num` prompts each set gives, by its weight within one."""
    given = [0] * len(weights)
    for _ in range(num):
        given[furthest_behind(weights, given)] += 1
    return given


def most_held_out(num_prompts: int) -> int:
    """A fifth of a set's prompts, at least one; but one always stays to be trained on."""
    return min(max(1, num_prompts // 5), max(0, num_prompts - 1))
