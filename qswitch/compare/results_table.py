"""The table of a comparison: from the stored responses and distances of its models to figures with intervals.

A cell's figure is the mean over its training seeds of each record, with an interval over records; the spread over seeds
stands beside it. Cold and pure but for reading the evaluation's files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qswitch.compare.spec import SFT_ABOUT, Cell, Comparison, TestSection
from qswitch.evaluate.figures import BETTER, COLUMNS, OWN_COLUMNS
from qswitch.evaluate.intervals import Estimate, paired_difference, standard_deviation
from qswitch.evaluate.score_table import (
    estimate,
    markdown_table,
    overlap_notes,
    own_difference_tables,
    own_tables,
    protocol_line,
    records_text,
)
from qswitch.evaluate.scores import SetScores, combine_scores, compare_positions, compare_scores, score_set
from qswitch.evaluate.store import Lines
from qswitch.evaluate.versions import versions
from qswitch.outside import read_json
from qswitch.state_files import DistanceLine, OwnDistanceLine, ResponseLine, SetFile


def comparison_results(
    eval_dir: Path,
    comparison: Comparison,
    finished: Sequence[tuple[Cell, Mapping[str, Any]]],
    controls: Sequence[str],
    failed: Mapping[str, str],
) -> dict[str, Any]:
    """results.json of a comparison, of the cells that are there."""
    section = comparison.section
    by_cell: dict[str, list[tuple[Cell, Mapping[str, Any]]]] = {}
    for cell, saved in finished:
        by_cell.setdefault(cell.name, []).append((cell, saved))
    measured, last = (_optional(eval_dir / name, dict) for name in ("eval.json", "results.json"))
    results: dict[str, Any] = {
        "budget": section.budget.model_dump(),
        "evaluation": {key: measured[key] for key in ("protocol", "sets", "limit", "teacher") if key in measured}
        | {key: last[key] for key in ("departures",) if key in last},
        "baseline": comparison.baseline,
        "cells": {name: _cost(members, section.cells.get(name)) for name, members in by_cell.items()},
        "failed": dict(failed),
        "sets": {},
        "versions": versions(),
    }
    for path in sorted((eval_dir / "sets").glob("*.json")):
        content = read_json(path, SetFile)
        labels = {name: {cell.seed: cell.label for cell, _ in members} for name, members in by_cell.items()}
        labels |= {name: {0: name} for name in controls}
        scores: dict[str, SetScores] = {}
        by_seed: dict[str, dict[int, SetScores]] = {}
        deviations: dict[str, dict[str, float | None]] = {}
        for name, members in labels.items():
            own = {n: s for n, label in members.items() if (s := _scores(eval_dir, path.stem, label, content))}
            if not own:
                continue
            found = list(own.values())
            scores[name], by_seed[name] = combine_scores(found), own
            deviations[name] = {
                metric: standard_deviation([one.metrics[metric].overall for one in found])
                for metric in found[0].metrics
            }
        if not scores:
            continue
        paired = {
            name: pairs
            for name in scores
            if name != comparison.baseline
            and (pairs := pairs_of_seeds(by_seed.get(comparison.baseline, {}), by_seed[name], name in controls))
        }
        sides = {
            name: [combine_scores(side) for side in zip(*pairs.values(), strict=True)] for name, pairs in paired.items()
        }
        seen = content.get("overlaps_with_training", {})
        results["sets"][path.stem] = {
            "records": len(content["ids"]),
            "left_out": content.get("left_out", 0),
            "overlaps_with_training": {n: seen[x] for n, m in labels.items() for x in m.values() if x in seen},
            "models": {
                name: one.to_dict()
                | {"seed_deviation": deviations[name], "seeds": [n for n in by_seed[name] if name not in controls]}
                for name, one in scores.items()
            },
            "differences": {name: compare_scores(other, own) for name, (own, other) in sides.items()},
            "difference_seeds": {name: list(pairs) for name, pairs in paired.items()},
            "position_differences": {name: compare_positions(other, own) for name, (own, other) in sides.items()},
            "test": []
            if section.test is None
            else declared_test(section.test, comparison.baseline, by_seed, {n: comparison.seeds_of(n) for n in labels}),
        }
    return results


def _optional(path: Path, kind: type[Any]) -> dict[str, Any]:
    return read_json(path, kind) if path.is_file() else {}


def pairs_of_seeds(
    baseline: Mapping[int, SetScores], other: Mapping[int, SetScores], is_control: bool
) -> dict[int, tuple[SetScores, SetScores]]:
    """Training seed -> (the baseline's figures, the other's), of the seeds that both have.

    A control is one model, which meets every seed of the baseline.
    """
    if is_control:
        return {seed: (own, other[0]) for seed, own in baseline.items()}
    return {seed: (own, other[seed]) for seed, own in baseline.items() if seed in other}


def seed_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """95 % t-interval of the mean of one difference per training seed; None below two."""
    if len(differences) < 2:
        return None
    if max(differences) == min(differences):
        return differences[0], differences[0]
    from scipy import stats

    interval = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    return float(interval.low), float(interval.high)


def declared_test(
    test: TestSection,
    baseline: str,
    by_seed: Mapping[str, Mapping[int, SetScores]],
    declared: Mapping[str, Sequence[int]],
) -> list[dict[str, Any]]:
    """The verdicts of a declared test, one per metric and cell, of the cells that are there.

    The difference other - baseline is paired by record, each model the mean over the training seeds that both have; the
    interval is at level 1 - 5 % / number of cells tested against. With d signed so that above zero means the baseline
    is better:

    better      the interval is above zero, d at least the margin, and d above zero for every pair of seeds
    worse       the mirror image
    equivalent  the interval lies within the margin on both sides
    undecided   anything else
    unfinished  a training seed that was `declared` for either cell is not there yet

    Pairs of seeds are those of `pairs_of_seeds`; where there is none, there is no verdict.

    Beside each verdict stands a 95 % t-interval of the mean difference over the pairs of seeds, which says what the
    interval over records cannot: how much another training seed may change it.
    """
    level = 1 - 0.05 / len(test.against)
    verdicts = []
    ours = by_seed.get(baseline)
    for metric, margin in test.margins.items():
        sign = -BETTER[metric]
        for name in test.against:
            theirs = by_seed.get(name)
            if not ours or not theirs or any(metric not in s.metrics for s in (*ours.values(), *theirs.values())):
                continue
            pairs = pairs_of_seeds(ours, theirs, is_control=not declared.get(name)).values()
            if not pairs:
                continue
            mine, other = (combine_scores(side).metrics[metric] for side in zip(*pairs, strict=True))
            ids = sorted(mine.values.keys() & other.values.keys())
            weights = None if other.weights is None else [other.weights[i] for i in ids]
            difference = paired_difference(
                [other.values[i] for i in ids], [mine.values[i] for i in ids], weights, confidence=level
            )
            seeds = [one.metrics[metric].overall - own.metrics[metric].overall for own, one in pairs]
            finished = set(declared.get(baseline, ())) <= ours.keys() and set(declared.get(name, ())) <= theirs.keys()
            verdicts.append(
                {
                    "metric": metric,
                    "margin": margin,
                    "against": name,
                    "level": level,
                    "difference": asdict(difference),
                    "seed_interval": seed_interval(seeds),
                    "by_seed": seeds,
                    "baseline_is": _verdict(difference, margin, [sign * d for d in seeds], sign)
                    if finished
                    else "unfinished",
                }
            )
    return verdicts


def _verdict(difference: Estimate, margin: float, signed_seeds: Sequence[float], sign: int) -> str:
    if difference.low is None or difference.high is None:
        return "undecided"
    low, high = sorted((sign * difference.low, sign * difference.high))
    mean = sign * difference.mean
    if low > 0 and mean >= margin and all(d > 0 for d in signed_seeds):
        return "better"
    if high < 0 and -mean >= margin and all(d < 0 for d in signed_seeds):
        return "worse"
    return "equivalent" if -margin < low and high < margin else "undecided"


def _cost(members: Sequence[tuple[Cell, Mapping[str, Any]]], section: Any) -> dict[str, Any]:
    summaries = [saved["summary"] for _, saved in members]

    def mean(key: str) -> float | None:
        values = [s[key] for s in summaries if s.get(key) is not None]
        return sum(values) / len(values) if values else None

    shares = [saved["teacher_share"] for _, saved in members if saved["teacher_share"] is not None]
    return {
        "about": section.about if section is not None else SFT_ABOUT,
        "seeds": [cell.seed for cell, _ in members],
        "teacher_share": sum(shares) / len(shares) if shares else None,
    } | {
        key: mean(key)
        for key in ("steps", "rollout_tokens", "trained_tokens", "seconds", "peak_gib", "steps_without_loss")
    }


def _scores(eval_dir: Path, set_name: str, label: str, content: Mapping[str, Any]) -> SetScores | None:
    asked = set(content["ids"])

    def rows(path: str, kind: type[Any], *key: str) -> list[dict[str, Any]]:
        return [row for row in Lines(eval_dir / path, key, kind).rows.values() if row["id"] in asked]

    model = f"models/{label}/{set_name}"
    answers = rows(f"{model}.jsonl", ResponseLine, "id", "seed")
    if not answers:
        return None
    return score_set(
        answers,
        rows(f"{model}.teacher.jsonl", DistanceLine, "id"),
        reference_tokens={int(i): n for i, n in content["reference_tokens"].items()},
        teacher_responses={row["id"]: row for row in rows(f"teacher/{set_name}.jsonl", ResponseLine, "id")},
        own_responses=rows(f"{model}.own.jsonl", ResponseLine, "id"),
        own_distances=rows(f"{model}.own.teacher.jsonl", OwnDistanceLine, "id"),
    )


def render_comparison(results: Mapping[str, Any]) -> str:
    """results.json of a comparison as markdown."""
    budget = results["budget"]
    parts = [
        f"Budget of every cell: {budget['amount']:g} {budget['unit']}. Brackets: 95 % bootstrap intervals over "
        "records, of means over the training seeds.\n"
    ]
    evaluation = results["evaluation"]
    if "protocol" in evaluation:
        parts.append(protocol_line(evaluation["protocol"], evaluation.get("departures", ())))
        if evaluation.get("teacher"):
            parts.append(f"Teacher: {evaluation['teacher']}; its own responses at temperature 1 are the yardstick.\n")
    for name, one in results["sets"].items():
        models = one["models"]
        present = [m for m in COLUMNS if any(m in v["metrics"] for v in models.values())]
        header = [
            "",
            "seeds",
            *(COLUMNS[m] for m in present),
            "KL, deviation over seeds",
            "ROUGE-L to teacher, deviation over seeds",
            "tokens",
            "distinct-2",
        ]
        rows = [
            [
                model,
                str(len(v["seeds"]) or ""),
                *(estimate(v["metrics"].get(m, {}).get("all")) for m in present),
                _figure(v["seed_deviation"].get("kl_nats"), ".3f"),
                _figure(v["seed_deviation"].get("rouge_l_teacher"), ".2f"),
                f"{v['response_tokens']:.0f}",
                f"{v['distinct_2']:.3f}",
            ]
            for model, v in models.items()
        ]
        parts += [
            f"## {name} ({records_text(one)})\n",
            *(f"{note}\n" for note in overlap_notes(one["records"], one["overlaps_with_training"])),
        ]
        parts.append(markdown_table(header, rows))
        parts += filter(None, [own_tables(models)])
        one = one | _with_number_of_seeds(one)
        buckets = list(dict.fromkeys(b for v in one["differences"].values() for m in v.values() for b in m))
        rows = [
            [
                model,
                bucket,
                str(max((v[m][bucket]["records"] for m in present if bucket in v.get(m, {})), default=0)),
                *(estimate(v.get(m, {}).get(bucket)) for m in present),
            ]
            for model, v in one["differences"].items()
            for bucket in buckets
        ]
        if rows:
            parts.append(
                f"Paired differences from {results['baseline']} (below zero: lower than {results['baseline']}), over "
                f"the training seeds that both have, counted in brackets; a control meets each of "
                f"{results['baseline']}:\n\n"
                + markdown_table(["", "reference tokens", "records", *(COLUMNS[m] for m in present)], rows)
            )
        parts += filter(None, [own_difference_tables(one, results["baseline"])])
        if one["test"]:
            parts.append(_test_table(one["test"], results["baseline"]))
    header = [
        "cell",
        "seeds",
        "steps",
        "generated tokens",
        "trained tokens",
        "teacher writes",
        "seconds",
        "peak, GiB",
        "",
    ]
    rows = [
        [
            name,
            str(len(one["seeds"])),
            _figure(one["steps"], ".0f"),
            _figure(one["rollout_tokens"], ",.0f"),
            _figure(one["trained_tokens"], ",.0f"),
            _figure(one["teacher_share"], ".0%"),
            _figure(one["seconds"], ".0f"),
            _figure(one["peak_gib"], ".2f"),
            one["about"],
        ]
        for name, one in results["cells"].items()
    ]
    parts.append("## Cost, mean over seeds\n\n" + markdown_table(header, rows))
    parts += [f"{label} is missing: {reason}\n" for label, reason in results["failed"].items()]
    return "\n".join(parts)


def _with_number_of_seeds(one: Mapping[str, Any]) -> dict[str, Any]:
    """The differences of a set under names that say over how many training seeds they are."""
    counts = {name: len(seeds) for name, seeds in one["difference_seeds"].items()}
    return {
        key: {f"{name} ({counts[name]} seed{'s' * (counts[name] > 1)})": v for name, v in one[key].items()}
        for key in ("differences", "position_differences")
    }


def _test_table(verdicts: Sequence[Mapping[str, Any]], baseline: str) -> str:
    level = verdicts[0]["level"]
    header = ["metric", "against", f"its difference from {baseline}", "by seed", "95 % over seeds", "margin",
              f"{baseline} is"]  # fmt: skip
    rows = [
        [
            (COLUMNS | OWN_COLUMNS)[v["metric"]],
            v["against"],
            estimate(v["difference"]),
            ", ".join(f"{d:.3f}" for d in v["by_seed"]),
            "" if v["seed_interval"] is None else "[{:.3f}, {:.3f}]".format(*v["seed_interval"]),
            f"{v['margin']:g}",
            v["baseline_is"],
        ]
        for v in verdicts
    ]
    return f"The declared test, intervals at {level:.2%}:\n\n" + markdown_table(header, rows)


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
