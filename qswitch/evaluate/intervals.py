"""How sure a mean over records is: bootstrap intervals over records, paired where two models saw the same ones.

Percentile bootstrap through scipy. Records are the unit: the responses of several seeds to one prompt are averaged
first, since they are not independent. Knows no model and no file.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
_SEED = 20_250_429
"""Fixed: the same scores always give the same interval."""
_BATCH_VALUES = 20_000_000
"""Resampled values held at a time, 8 bytes each."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its interval, 95 % unless asked otherwise."""

    mean: float
    low: float | None
    """None with fewer than two records."""
    high: float | None
    records: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.3g}"
        digits = 2 if abs(self.mean) >= 1 else 3
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def mean_interval(
    values: Sequence[float], weights: Sequence[float] | None = None, *, confidence: float = CONFIDENCE
) -> Estimate:
    """Mean of one value per record, weighted by `weights` (tokens per record for a token mean).

    Raises:
        ValueError: no values, or other numbers of values and weights.
    """
    array = np.asarray(values, dtype=np.float64)
    weight = np.ones_like(array) if weights is None else np.asarray(weights, dtype=np.float64)
    if array.size == 0 or array.shape != weight.shape:
        raise ValueError(f"{array.size} values with {weight.size} weights give no mean")
    mean = float((array * weight).sum() / weight.sum())
    if array.size < 2:
        return Estimate(mean, None, None, int(array.size))
    if np.ptp(array) == 0:
        return Estimate(mean, mean, mean, int(array.size))
    from scipy import stats

    def ratio(weighted: np.ndarray, total: np.ndarray, axis: int = -1) -> np.ndarray:
        return weighted.sum(axis=axis) / total.sum(axis=axis)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        interval = stats.bootstrap(
            (array * weight, weight),
            ratio,
            paired=True,
            n_resamples=NUM_RESAMPLES,
            batch=max(1, _BATCH_VALUES // array.size),
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(_SEED),
        ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), int(array.size))


def paired_difference(
    ours: Sequence[float],
    theirs: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Mean of ours - theirs over the same records in the same order, with its interval.

    Raises:
        ValueError: other numbers of records.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"A paired comparison needs the same records, not {len(ours)} and {len(theirs)}")
    return mean_interval([a - b for a, b in zip(ours, theirs, strict=True)], weights, confidence=confidence)


def standard_deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation, for instance of the means of several seeds; None for fewer than two."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
