"""ROUGE-L of a response, by the library that the papers of this field use. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any


@cache
def _scorer() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(response: str, references: Sequence[str]) -> float:
    """F1 of ROUGE-L x 100 with Porter stemming, the maximum over the references: in [0, 100].

    Raises:
        ValueError: there is no reference.
    """
    if not references:
        raise ValueError("ROUGE-L needs at least one reference")
    return 100.0 * _scorer().score_multi(list(references), response)["rougeL"].fmeasure
