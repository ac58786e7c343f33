"""Scores of one model on one set, and the paired difference of two models. Pure: rows in, figures out.

A record's score is the mean over its seeds; intervals are over records. KL and agreement on the teacher's responses are
token means, so a record weighs as many tokens as the teacher wrote. On a model's own responses every record weighs the
same, since models write responses of different lengths; by position it weighs the tokens that it has there.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qswitch.distill.own_text import POSITIONS, position_name, repeated_share
from qswitch.evaluate.figures import OWN_COLUMNS
from qswitch.evaluate.intervals import Estimate, mean_interval, paired_difference, standard_deviation
from qswitch.evaluate.rouge import rouge_l
from qswitch.evaluate.testset import BUCKETS, bucket_of


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure per record."""

    values: dict[int, float]
    """Record id -> value."""
    weights: dict[int, float] | None
    """Record id -> tokens; None: every record counts the same."""

    @property
    def overall(self) -> float:
        """The mean over all records."""
        weights = self.weights or dict.fromkeys(self.values, 1.0)
        return sum(v * weights[i] for i, v in self.values.items()) / sum(weights[i] for i in self.values)

    def estimate(self, ids: Sequence[int]) -> Estimate:
        """Mean over the records `ids`."""
        weights = None if self.weights is None else [self.weights[i] for i in ids]
        return mean_interval([self.values[i] for i in ids], weights)


@dataclass(frozen=True, slots=True)
class SetScores:
    """Everything measured of one model on one set."""

    metrics: dict[str, Metric]
    buckets: dict[int, str]
    """Record id -> bucket of its reference length."""
    seed_deviation: float | None
    """Standard deviation of ROUGE-L over the seeds' means."""
    responses: int
    response_tokens: float
    """Mean, end token included."""
    ended_share: float
    """Responses that ended before the limit."""
    distinct_1: float
    distinct_2: float
    """Distinct words and pairs of words / all of them, within a seed, mean over seeds (Li et al. 2016)."""
    own: OwnScores | None = None
    """Of the model's own responses at temperature 1, where a teacher was measured against."""

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return {
            "metrics": {
                name: {"all": asdict(metric.estimate(sorted(metric.values)))}
                | {bucket: asdict(metric.estimate(ids)) for bucket, ids in _by_bucket(metric, self.buckets)}
                for name, metric in self.metrics.items()
            },
            "rouge_l_seed_deviation": self.seed_deviation,
            "responses": self.responses,
            "response_tokens": self.response_tokens,
            "ended_share": self.ended_share,
            "distinct_1": self.distinct_1,
            "distinct_2": self.distinct_2,
            "own": None if self.own is None else self.own.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class OwnScores:
    """A model's own responses, one a record, beside the teacher's."""

    response_tokens: float
    """Mean, end token included."""
    positions: dict[str, dict[str, Metric]]
    """Response positions, for instance `32-63` -> metric -> one figure per record that is so long."""

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return {
            "response_tokens": self.response_tokens,
            "positions": {
                name: {metric: asdict(one.estimate(sorted(one.values))) for metric, one in metrics.items()}
                for name, metrics in self.positions.items()
            },
        }


def score_own(
    responses: Sequence[Mapping[str, Any]],
    distances: Sequence[Mapping[str, Any]],
    *,
    teacher_tokens: Mapping[int, float],
) -> tuple[dict[str, Metric], OwnScores]:
    """Metrics per record, and the rest, of a model's own responses and the teacher's distances from them.

    Args:
        teacher_tokens: record id -> length of the teacher's own response.
    """
    metrics = {
        "own_ended_share": Metric({row["id"]: float(bool(row["ended"])) for row in responses}, None),
        "own_repetition": Metric({row["id"]: repeated_share(row["response_ids"], 4) for row in responses}, None),
    }
    if lengths := {row["id"]: teacher_tokens[row["id"]] for row in responses if row["id"] in teacher_tokens}:
        ratios = {row["id"]: row["tokens"] / lengths[row["id"]] for row in responses if row["id"] in lengths}
        metrics["own_length_ratio"] = Metric(ratios, lengths)
    positions: dict[str, dict[str, Metric]] = {}
    for metric in OWN_COLUMNS:
        key = metric.removeprefix("own_")
        metrics[metric] = Metric({row["id"]: sum(row[key]) / sum(row["tokens"]) for row in distances}, None)
        for k, (first, last) in enumerate(POSITIONS):
            reached = [row for row in distances if row["tokens"][k]]
            if reached:
                positions.setdefault(position_name(first, last), {})[metric] = Metric(
                    {row["id"]: row[key][k] / row["tokens"][k] for row in reached},
                    {row["id"]: float(row["tokens"][k]) for row in reached},
                )
    return metrics, OwnScores(_mean([row["tokens"] for row in responses]), positions)


def score_set(
    responses: Sequence[Mapping[str, Any]],
    distances: Sequence[Mapping[str, Any]],
    *,
    reference_tokens: Mapping[int, int],
    teacher_responses: Mapping[int, Mapping[str, Any]],
    own_responses: Sequence[Mapping[str, Any]] = (),
    own_distances: Sequence[Mapping[str, Any]] = (),
) -> SetScores:
    """Scores from the stored rows of a model: responses, and distances from the teacher where it was measured.

    Args:
        teacher_responses: record id -> the stored row of the teacher's own response.
    """
    by_seed: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for row in responses:
        by_seed[row["seed"]].append(row)
    metrics: dict[str, Metric] = {}
    scored = [row for row in responses if "rouge_l" in row]
    if scored:
        metrics["rouge_l"] = Metric(_mean_by_record(scored, lambda row: row["rouge_l"]), None)
    if teacher_responses:
        metrics["rouge_l_teacher"] = Metric(
            _mean_by_record(
                responses, lambda row: rouge_l(row["response"], [teacher_responses[row["id"]]["response"]])
            ),
            None,
        )
    if distances:
        tokens = {row["id"]: float(row["tokens"]) for row in distances}
        for name in ("kl_nats", "top1_agreement"):
            metrics[name] = Metric({row["id"]: row[name] for row in distances}, tokens)
    own = None
    if own_distances:
        lengths = {i: float(row["tokens"]) for i, row in teacher_responses.items()}
        own_metrics, own = score_own(own_responses, own_distances, teacher_tokens=lengths)
        metrics |= own_metrics
    seed_means = [
        sum(r["rouge_l"] for r in rows if "rouge_l" in r) / max(1, sum("rouge_l" in r for r in rows))
        for rows in by_seed.values()
    ]
    count = len(responses)
    return SetScores(
        metrics=metrics,
        buckets={i: bucket_of(n) for i, n in reference_tokens.items()},
        seed_deviation=standard_deviation(seed_means) if scored else None,
        responses=count,
        response_tokens=sum(row["tokens"] for row in responses) / count,
        ended_share=sum(bool(row["ended"]) for row in responses) / count,
        distinct_1=_mean([distinct_n([r["response"] for r in rows], 1) for rows in by_seed.values()]),
        distinct_2=_mean([distinct_n([r["response"] for r in rows], 2) for rows in by_seed.values()]),
        own=own,
    )


def combine_scores(scores: Sequence[SetScores]) -> SetScores:
    """One model trained with several seeds: the mean of every record's figure over them.

    Raises:
        ValueError: the seeds were not measured on the same records.
    """
    first = scores[0]
    metrics = {}
    for name, metric in first.metrics.items():
        if any(one.metrics[name].values.keys() != metric.values.keys() for one in scores):
            raise ValueError(f"{name} was measured on other records with another seed")
        metrics[name] = Metric(
            {i: _mean([one.metrics[name].values[i] for one in scores]) for i in metric.values}, metric.weights
        )
    deviations = [one.seed_deviation for one in scores if one.seed_deviation is not None]
    return SetScores(
        metrics=metrics,
        buckets=first.buckets,
        seed_deviation=_mean(deviations) if deviations else None,
        responses=sum(one.responses for one in scores),
        response_tokens=_mean([one.response_tokens for one in scores]),
        ended_share=_mean([one.ended_share for one in scores]),
        distinct_1=_mean([one.distinct_1 for one in scores]),
        distinct_2=_mean([one.distinct_2 for one in scores]),
        own=_combine_own([one.own for one in scores if one.own is not None]),
    )


def _combine_own(own: Sequence[OwnScores]) -> OwnScores | None:
    if not own:
        return None
    names = sorted({name for one in own for name in one.positions}, key=lambda name: int(re.split(r"[-+]", name)[0]))
    return OwnScores(
        response_tokens=_mean([one.response_tokens for one in own]),
        positions={
            name: {m: _pool([one.positions[name][m] for one in own if name in one.positions]) for m in OWN_COLUMNS}
            for name in names
        },
    )


def _pool(metrics: Sequence[Metric]) -> Metric:
    """Token means over several responses to a record."""
    values: dict[int, float] = defaultdict(float)
    weights: dict[int, float] = defaultdict(float)
    for metric in metrics:
        for i, value in metric.values.items():
            weight = 1.0 if metric.weights is None else metric.weights[i]
            values[i] += value * weight
            weights[i] += weight
    return Metric({i: value / weights[i] for i, value in values.items()}, dict(weights))


def compare_scores(ours: SetScores, first: SetScores) -> dict[str, Any]:
    """Paired differences ours - first over the records that both have, in all and by bucket, for results.json."""
    result: dict[str, Any] = {}
    for name, metric in ours.metrics.items():
        other = first.metrics.get(name)
        if other is None:
            continue
        shared = Metric({i: v for i, v in metric.values.items() if i in other.values}, metric.weights)
        groups = [("all", sorted(shared.values)), *_by_bucket(shared, ours.buckets)]
        result[name] = {
            bucket: asdict(
                paired_difference(
                    [metric.values[i] for i in ids],
                    [other.values[i] for i in ids],
                    None if metric.weights is None else [metric.weights[i] for i in ids],
                )
            )
            for bucket, ids in groups
            if ids
        }
    return result


def compare_positions(ours: SetScores, first: SetScores) -> dict[str, Any]:
    """Paired differences ours - first on the models' own responses, by position, for results.json.

    Over the records whose responses reach the position with both models; every one of them weighs the same, since the
    two models wrote different numbers of tokens there.
    """
    if ours.own is None or first.own is None:
        return {}
    result: dict[str, Any] = {}
    for position, metrics in ours.own.positions.items():
        for name, metric in metrics.items():
            other = first.own.positions.get(position, {}).get(name)
            ids = sorted(metric.values.keys() & other.values.keys()) if other is not None else []
            if other is not None and ids:
                difference = paired_difference([metric.values[i] for i in ids], [other.values[i] for i in ids])
                result.setdefault(position, {})[name] = asdict(difference)
    return result


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words / all n-grams of the texts together, in [0, 1]; 0 where there is none."""
    grams = [tuple(words[i : i + n]) for words in (text.split() for text in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _by_bucket(metric: Metric, buckets: Mapping[int, str]) -> list[tuple[str, list[int]]]:
    groups: dict[str, list[int]] = {name: [] for name, _, _ in BUCKETS}
    for i in sorted(metric.values):
        if i in buckets:
            groups[buckets[i]].append(i)
    return [(name, ids) for name, ids in groups.items() if ids]


def _mean_by_record(rows: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]) -> dict[int, float]:
    found: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        found[row["id"]].append(value(row))
    return {i: _mean(values) for i, values in found.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
