"""The table of a comparison: differences by seed, verdicts of a declared test."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from qswitch.compare.results_table import comparison_results, declared_test, render_comparison
from qswitch.compare.spec import TestSection, read_comparison
from qswitch.evaluate.scores import Metric, SetScores
from tests.compare.comparisons import write_comparison


def test_differences_are_over_the_seeds_that_both_have(tmp_path: Path):
    """Slow has seed 1 alone: its difference is that of seed 1, whatever the other seeds of the baseline do."""
    cells = {"switch": {}, "slow": {"settings": {"rollout.decay_rate": 0.04}, "seeds": [1]},
             "other": {"settings": {"rollout.decay_rate": 0.2}, "seeds": [7]}}  # fmt: skip
    comparison = read_comparison(write_comparison(tmp_path, seeds=[1, 2], cells=cells))
    kl = {"switch-seed1": 2.0, "switch-seed2": 5.0, "slow-seed1": 2.5, "other-seed7": 1.0, "sft-seed1": 3.0,
          "sft-seed2": 3.0, "teacher": 0.0, "untrained": 4.0}  # fmt: skip
    eval_dir = write_measured(tmp_path / "eval", kl)
    saved = {"summary": {"steps": 2}, "teacher_share": None}
    finished = [(cell, saved) for cell in comparison.cells]
    results = comparison_results(eval_dir, comparison, finished, ["teacher", "untrained"], {})
    one = results["sets"]["q"]
    means = {name: v["kl_nats"]["all"]["mean"] for name, v in one["differences"].items()}
    assert means == pytest.approx({"slow": 0.5, "sft": 3.0 - 3.5, "teacher": -3.5, "untrained": 0.5})
    assert one["difference_seeds"] == {"slow": [1], "sft": [1, 2], "teacher": [1, 2], "untrained": [1, 2]}
    assert one["models"]["other"]["seeds"] == [7] and one["models"]["teacher"]["seeds"] == []
    table = render_comparison(results)
    assert "| slow (1 seed) | all |" in table and "| sft (2 seeds) | all |" in table and "| other (" not in table
    assert "over the training seeds that both have" in table


def write_measured(folder: Path, kl: dict[str, float]) -> Path:
    """An evaluation of four records in which each model has one KL everywhere."""
    (folder / "sets").mkdir(parents=True)
    (folder / "sets/q.json").write_text(json.dumps({"ids": [0, 1, 2, 3], "reference_tokens": {}}), encoding="utf-8")
    for name, value in kl.items():
        (folder / "models" / name).mkdir(parents=True)
        answers = [{"id": i, "seed": 0, "response": "so", "tokens": 2, "ended": True} for i in range(4)]
        distances = [{"id": i, "tokens": 2, "kl_nats": value, "top1_agreement": 0.5} for i in range(4)]
        for ending, rows in (("jsonl", answers), ("teacher.jsonl", distances)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"models/{name}/q.{ending}").write_text(text, encoding="utf-8")
    return folder


def scores(values: list[float]) -> SetScores:
    metric = Metric(dict(enumerate(values)), None)
    return SetScores({"kl_nats": metric, "rouge_l": metric}, {}, None, 1, 1.0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("shift", "verdict"), [(0.5, "better"), (-0.5, "worse"), (0.0, "equivalent"), (0.195, "undecided")]
)
def test_verdicts_follow_the_interval_the_margin_and_every_seed(shift: float, verdict: str):
    noise = [0.02 * (i % 7 - 3) for i in range(70)]
    base = [2.0 + 0.5 * (i % 5) for i in range(70)]
    ours = [scores(base), scores(base)]
    theirs = [scores([b + shift + n for b, n in zip(base, noise, strict=True)])] * 2
    test = TestSection(against=["gkd", "kd"], margins={"kl_nats": 0.2, "rouge_l": 0.2})
    seeds = {"switch": [1, 2], "gkd": [1, 2]}
    cells = {"switch": dict(enumerate(ours, 1)), "gkd": dict(enumerate(theirs, 1))}
    (kl, rouge) = declared_test(test, "switch", cells, seeds)
    assert (kl["metric"], kl["against"], kl["level"]) == ("kl_nats", "gkd", 0.975)
    assert kl["baseline_is"] == verdict and kl["difference"]["mean"] == pytest.approx(shift, abs=1e-9)
    # More ROUGE-L is better, more KL is worse.
    mirrored = {"better": "worse", "worse": "better"}
    assert rouge["baseline_is"] == mirrored.get(verdict, verdict)


def test_the_interval_shares_the_level_among_the_rivals_and_weights_records():
    """Against the normal approximation: 2.2414 standard errors at 97.5 %, where 95 % would have 1.96."""
    noise = [0.02 * (i % 7 - 3) for i in range(700)]
    weights = {i: 1.0 + 9.0 * (i % 7 == 6) for i in range(700)}  # the records with the largest difference count tenfold

    def cell(values: list[float]) -> SetScores:
        metrics = {
            "kl_nats": Metric(dict(enumerate(values)), weights),
            "rouge_l": Metric(dict(enumerate(values)), None),
        }
        return SetScores(metrics, {}, None, 1, 1.0, 1.0, 0.0, 0.0)

    cells = {"switch": {1: cell([0.0] * 700)}, "gkd": {1: cell(noise)}}
    test = TestSection(against=["gkd", "kd"], margins={"rouge_l": 0.2, "kl_nats": 0.2})
    (rouge, kl) = declared_test(test, "switch", cells, {"switch": [1], "gkd": [1]})
    difference = rouge["difference"]
    half = 2.2414 * statistics.pstdev(noise) / math.sqrt(700)
    assert (difference["high"] - difference["low"]) / 2 == pytest.approx(half, rel=0.06)
    weighted = sum(n * w for n, w in zip(noise, weights.values(), strict=True)) / sum(weights.values())
    assert kl["difference"]["mean"] == pytest.approx(weighted) and abs(weighted) > 0.02
    assert rouge["difference"]["mean"] == pytest.approx(0.0, abs=1e-9)


def test_one_seed_against_the_rest_leaves_it_undecided():
    base = [2.0] * 20
    ours, theirs = [scores(base)] * 2, [scores([4.0] * 20), scores([1.9] * 20)]
    test = TestSection(against=["gkd"], margins={"kl_nats": 0.2})
    cells = {"switch": dict(enumerate(ours, 1)), "gkd": dict(enumerate(theirs, 1))}
    (verdict,) = declared_test(test, "switch", cells, {"switch": [1, 2], "gkd": [1, 2]})
    assert verdict["difference"]["low"] > 0 and verdict["baseline_is"] == "undecided"


def test_no_verdict_before_every_declared_seed_is_there_and_seeds_meet_their_own():
    test = TestSection(against=["gkd"], margins={"kl_nats": 0.2})
    cells = {"switch": {1: scores([2.0] * 20), 2: scores([3.0] * 20)}, "gkd": {2: scores([4.0] * 20)}}
    (verdict,) = declared_test(test, "switch", cells, {"switch": [1, 2], "gkd": [1, 2]})
    assert verdict["baseline_is"] == "unfinished" and verdict["by_seed"] == [1.0]
    assert verdict["difference"]["mean"] == 1.0, "of the seed that both have"
    cells["gkd"] = {3: scores([4.0] * 20)}
    assert declared_test(test, "switch", cells, {"switch": [1, 2], "gkd": [3]}) == []


def test_a_control_meets_every_seed():
    test = TestSection(against=["untrained"], margins={"kl_nats": 0.01})
    cells = {
        "switch": {n: scores([v] * 20) for n, v in ((1, 2.0), (2, 2.45), (3, 2.0))},
        "untrained": {0: scores([2.4] * 20)},
    }
    (verdict,) = declared_test(test, "switch", cells, {"switch": [1, 2, 3], "untrained": []})
    assert verdict["by_seed"] == pytest.approx([0.4, -0.05, 0.4]) and verdict["baseline_is"] == "undecided"
    # Student's t with two degrees of freedom: mean 0.25, deviation 0.2598, 4.3027 standard errors.
    assert verdict["seed_interval"] == pytest.approx((0.25 - 0.6454, 0.25 + 0.6454), abs=1e-3)
