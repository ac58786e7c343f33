"""ROUGE-L, buckets, intervals and diversity against direct computations."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from rouge_score import rouge_scorer

from qswitch.distill.own_text import repeated_share
from qswitch.errors import ConfigError
from qswitch.evaluate.figures import OWN_TEXT_COLUMNS
from qswitch.evaluate.intervals import CONFIDENCE, Estimate, mean_interval, paired_difference, standard_deviation
from qswitch.evaluate.protocol import make_protocol
from qswitch.evaluate.rouge import rouge_l
from qswitch.evaluate.scores import combine_scores, compare_positions, compare_scores, distinct_n, score_set
from qswitch.evaluate.testset import bucket_of


def test_rouge_l_is_the_library_to_the_last_digit_and_takes_the_best_reference():
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    rng = random.Random(1)
    words = ["running", "runs", "run", "the", "dogs", "dog", "quickly", "quick", "over", "7", "é"]

    def text() -> str:
        return " ".join(rng.choices(words, k=rng.randint(0, 12)))

    for _ in range(200):
        response, references = text(), [text() for _ in range(rng.randint(1, 3))]
        expected = max(100 * scorer.score(reference, response)["rougeL"].fmeasure for reference in references)
        assert rouge_l(response, references) == expected
    assert rouge_l("runs", ["running"]) == 100.0, "stemming"
    with pytest.raises(ValueError, match="at least one"):
        rouge_l("a", [])


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(0, "1-10"), (1, "1-10"), (10, "1-10"), (11, "11-50"), (50, "11-50"), (51, "51+")]
)
def test_buckets(tokens: int, bucket: str):
    assert bucket_of(tokens) == bucket


def all_resamples(values: list[float], weights: list[float]) -> np.ndarray:
    """The bootstrap distribution itself, by enumeration of every resample."""
    rows = np.array(list(itertools.product(range(len(values)), repeat=len(values))))
    v, w = np.array(values)[rows], np.array(weights)[rows]
    return (v * w).sum(axis=1) / w.sum(axis=1)


@pytest.mark.parametrize("weights", [[1, 1, 1, 1, 1, 1], [1, 5, 2, 9, 1, 3]])
def test_the_interval_is_the_bootstrap_percentile_by_enumeration(weights):
    values = [3.0, 10.0, 4.5, 7.0, 0.0, 6.0]
    exact = all_resamples(values, weights)  # 6^6 resamples
    found = mean_interval(values, weights)
    tail = (1 - CONFIDENCE) / 2
    assert found.mean == pytest.approx(np.average(values, weights=weights))
    assert found.records == 6
    # 10,000 draws of a discrete distribution: its quantile at levels within 4 standard errors of the wanted one.
    slack = 4 * math.sqrt(tail * (1 - tail) / 10_000)
    assert np.quantile(exact, tail - slack) - 1e-9 <= found.low <= np.quantile(exact, tail + slack) + 1e-9
    assert np.quantile(exact, 1 - tail - slack) - 1e-9 <= found.high <= np.quantile(exact, 1 - tail + slack) + 1e-9
    assert mean_interval(values, weights) == found, "the same scores, the same interval"


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(120):
        interval = mean_interval(rng.normal(5.0, 2.0, size=60).tolist())
        covered += interval.low <= 5.0 <= interval.high
    assert 0.88 <= covered / 120 <= 1.0


def test_pairing_removes_what_the_records_share():
    rng = np.random.default_rng(1)
    hard = rng.normal(30, 20, size=80)
    first, second = hard + rng.normal(0, 1, 80), hard + 1 + rng.normal(0, 1, 80)
    paired = paired_difference(second.tolist(), first.tolist())
    assert paired.low > 0 and paired.mean == pytest.approx(float((second - first).mean()))
    alone = mean_interval(second.tolist())
    assert (paired.high - paired.low) < 0.1 * (alone.high - alone.low)
    with pytest.raises(ValueError, match="same records"):
        paired_difference([1.0], [1.0, 2.0])


def test_degenerate_samples():
    assert mean_interval([4.0]) == Estimate(4.0, None, None, 1)
    assert mean_interval([2.0, 2.0, 2.0]) == Estimate(2.0, 2.0, 2.0, 3)
    assert standard_deviation([1.0]) is None and standard_deviation([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    with pytest.raises(ValueError, match="no mean"):
        mean_interval([])


def test_distinct_n_counts_ngrams_of_all_texts():
    assert distinct_n(["a b a", "a b"], 1) == 2 / 5
    assert distinct_n(["a b a", "a b"], 2) == 2 / 3
    assert distinct_n(["", "a"], 2) == 0.0


def response(i: int, seed: int, text: str, score: float, tokens: int = 4) -> dict:
    return {"id": i, "seed": seed, "response": text, "tokens": tokens, "ended": True, "rouge_l": score}


def test_scores_average_seeds_within_a_record_and_weigh_kl_by_tokens():
    rows = [
        response(0, 1, "a b", 10.0), response(0, 2, "a c", 20.0),
        response(1, 1, "d", 50.0), response(1, 2, "d", 70.0), response(2, 1, "e", 0.0), response(2, 2, "e", 0.0),
    ]  # fmt: skip
    measured = [
        {"id": 0, "tokens": 1, "kl_nats": 1.0, "top1_agreement": 0.0},
        {"id": 1, "tokens": 3, "kl_nats": 3.0, "top1_agreement": 1.0},
        {"id": 2, "tokens": 4, "kl_nats": 2.0, "top1_agreement": 0.5},
    ]
    lengths = {0: 5, 1: 20, 2: 12}
    scores = score_set(
        rows,
        measured,
        reference_tokens=lengths,
        teacher_responses={0: {"response": "a b"}, 1: {"response": "x"}, 2: {"response": "e"}},
    )
    result = scores.to_dict()["metrics"]
    assert result["rouge_l"]["all"]["mean"] == pytest.approx((15 + 60 + 0) / 3)
    assert result["rouge_l"]["1-10"]["mean"] == 15.0 and result["rouge_l"]["1-10"]["records"] == 1
    assert result["rouge_l"]["11-50"]["mean"] == 30.0 and "51+" not in result["rouge_l"]
    assert result["kl_nats"]["all"]["mean"] == pytest.approx((1 * 1 + 3 * 3 + 4 * 2) / 8)
    assert result["top1_agreement"]["all"]["mean"] == pytest.approx((0 + 3 + 2) / 8)
    assert result["rouge_l_teacher"]["all"]["mean"] == pytest.approx((75 + 0 + 100) / 3)
    # The seeds' means are 20 and 30.
    assert scores.seed_deviation == pytest.approx(math.sqrt(50))
    assert scores.distinct_1 == pytest.approx((4 / 4 + 4 / 4) / 2)

    worse = score_set(
        [r | {"rouge_l": r["rouge_l"] + 5} for r in rows], measured, reference_tokens=lengths, teacher_responses={}
    )
    difference = compare_scores(worse, scores)
    assert difference["rouge_l"]["all"] == {"mean": 5.0, "low": 5.0, "high": 5.0, "records": 3}
    assert difference["kl_nats"]["all"]["mean"] == 0.0 and "rouge_l_teacher" not in difference


def test_protocols_say_what_was_changed():
    paper, changes = make_protocol("paper")
    assert paper.seeds == (10, 20, 30, 40, 50) and paper.no_repeat_ngram_size == 6 and not changes
    assert (paper.temperature, paper.template, paper.max_new_tokens) == (1.0, "alpaca", 256)
    changed, changes = make_protocol("paper", seeds=(1,), max_new_tokens=None)
    assert changed.seeds == (1,) and changes == ["seeds is (1,) instead of (10, 20, 30, 40, 50)"]
    for name, values, message in [
        ("paperr", {}, "no protocol"),
        ("greedy", {"seeds": (1, 2)}, "same for every seed"),
        ("paper", {"seeds": (1, 1)}, "all different"),
        ("paper", {"temperature": -1.0}, "from 0"),
        ("paper", {"temperature": float("nan")}, "from 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            make_protocol(name, **values)


def test_own_responses_are_scored_by_record_by_position_and_over_seeds():
    def own(scale: float, long: bool) -> dict:
        first, second = [32, 8 if long else 0, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0]
        rows = [{"id": i, "seed": 1, "response": "", "tokens": sum(n), "ended": i == 0, "response_ids": [1, 2, 3]}
                for i, n in enumerate((first, second))]  # fmt: skip
        distances = [
            {"id": i, "tokens": n, "reverse_kl_nats": [scale * x for x in n], "jsd_bits": [x / 2 for x in n],
             "log_ratio_nats": [-scale * x * (1 + k) for k, x in enumerate(n)]}
            for i, n in enumerate((first, second))
        ]  # fmt: skip
        return {"own_responses": rows, "own_distances": distances}

    answers = [response(0, 1, "a", 1.0), response(1, 1, "b", 1.0)]
    teachers = {0: {"response": "a", "tokens": 10}, 1: {"response": "b", "tokens": 30}}
    scored = [
        score_set(answers, [], reference_tokens={}, teacher_responses=teachers, **own(scale, long))
        for scale, long in ((1.0, True), (3.0, False))
    ]
    assert scored[0].metrics["own_reverse_kl_nats"].values == {0: 1.0, 1: 1.0}
    assert scored[0].metrics["own_log_ratio_nats"].values[0] == pytest.approx(-(32 + 2 * 8) / 40)
    result = scored[0].to_dict()["own"]
    assert result["response_tokens"] == 22.0
    whole = {name: scored[0].to_dict()["metrics"][name]["all"] for name in OWN_TEXT_COLUMNS}
    assert whole["own_length_ratio"]["mean"] == pytest.approx(44 / 40), "of all the teacher's tokens"
    assert whole["own_ended_share"]["mean"] == 0.5 and whole["own_repetition"]["mean"] == 0.0
    assert whole["own_length_ratio"]["low"] == pytest.approx(4 / 30) and whole["own_length_ratio"]["high"] == 4.0
    between = compare_positions(scored[1], scored[0])
    assert list(between) == ["0-31"], "the other wrote nothing further on"
    assert between["0-31"]["own_reverse_kl_nats"]["mean"] == 2.0 and between["0-31"]["own_jsd_bits"]["mean"] == 0.0
    assert list(result["positions"]) == ["0-31", "32-63"]
    assert result["positions"]["32-63"]["own_log_ratio_nats"] == {"mean": -2.0, "low": None, "high": None, "records": 1}
    both = combine_scores(scored)
    assert both.metrics["own_reverse_kl_nats"].values == {0: 2.0, 1: 2.0}
    assert both.own.positions["32-63"]["own_reverse_kl_nats"].values == {0: 1.0}, "one seed wrote so far"
    assert both.own.positions["0-31"]["own_reverse_kl_nats"].weights == {0: 64.0, 1: 8.0}


def test_a_repeated_share_counts_what_stood_before():
    assert repeated_share([1, 2, 3, 4, 5], 4) == 0.0
    assert repeated_share([1, 2, 3, 4] * 3, 4) == pytest.approx(1 - 4 / 9)
    assert repeated_share([1, 2], 4) == 0.0
