"""Which recipe and which rates go on, by the rule that docs/study.md declares: reads results, writes a study file.

    python benchmarks/study/choose.py finals --search OUT/search/results.json --output OUT/finals.yaml
    python benchmarks/study/choose.py test --search OUT/search/results.json --finals OUT/finals/results.json \\
        --output OUT/test.yaml

Knows no model: it compares means over records and seeds in units of the margins of test.yaml. A rival goes on with the
rate whose three figures are best in sum. A recipe is as good as its second best gain over GKD and SeqKD, each the
lesser of the two, provided that it is behind no rival by more than a margin; if every recipe is behind one, the least.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
SIGN = {"kl_nats": -1, "own_reverse_kl_nats": -1, "rouge_l_teacher": 1}
"""Metric -> which way is better."""
NAMED = ("gkd", "seqkd")
"""The rivals that the target names."""
BASE = "recipe"
RATES = {"3e-4": 0.0003, "1e-3": 0.001, "3e-3": 0.003}
FINAL_SEEDS = [2, 3]
"""Seeds that the search did not choose by, so that a cell which was lucky there is not chosen for its luck."""

Settings = dict[str, Any]
Figures = Mapping[str, float]
"""Metric -> mean in units of its margin, signed so that more is better."""


def figures_of(results: Mapping[str, Any], margins: Mapping[str, float]) -> dict[str, Figures]:
    """Cell -> its figures on the first set of a comparison."""
    models = next(iter(results["sets"].values()))["models"]
    return {
        name: {m: SIGN[m] * values["metrics"][m]["all"]["mean"] / margin for m, margin in margins.items()}
        for name, values in models.items()
        if name in results["cells"]
    }


def best_rates(cells: Mapping[str, Settings], figures: Mapping[str, Figures]) -> dict[str, str]:
    """Method of a rival -> the name of its best cell; a tie goes to the cell that is named first."""
    best: dict[str, str] = {}
    for name, settings in cells.items():
        method = settings.get("method", "switch")
        if method == "switch" or name not in figures:
            continue
        if method not in best or sum(figures[name].values()) > sum(figures[best[method]].values()):
            best[method] = name
    return best


def score(own: Figures, rivals: Mapping[str, Figures]) -> tuple[bool, float]:
    """(behind no rival by more than a margin, how far ahead in units of margins); more is better."""
    gains = {m: min(own[m] - rivals[name][m] for name in NAMED) for m in own}
    worst = min(own[m] - rival[m] for rival in rivals.values() for m in own)
    return (True, sorted(gains.values())[-2]) if worst >= -1 else (False, worst)


def combined(cells: Mapping[str, Settings], scores: Mapping[str, tuple[bool, float]]) -> Settings:
    """The changes that beat the base, together: of all cells that change the same settings, the best one's values."""
    by_factor: dict[frozenset[str], str] = {}
    for name, settings in cells.items():
        factor = frozenset(settings)
        if name == BASE or not factor or scores[name] <= scores[BASE]:
            continue
        if factor not in by_factor or scores[name] > scores[by_factor[factor]]:
            by_factor[factor] = name
    merged: Settings = {}
    for name in sorted(by_factor.values(), key=lambda one: scores[one]):  # where two disagree, the better one's stands
        merged |= cells[name]
    return merged


def read_cells(study: Mapping[str, Any]) -> dict[str, Settings]:
    """Cell -> the settings that it changes."""
    return {name: dict((cell or {}).get("settings") or {}) for name, cell in study["cells"].items()}


def finals(search: Mapping[str, Any], results: Mapping[str, Any], margins: Mapping[str, float]) -> dict[str, Any]:
    """The study file of the finals: the best recipe and the combination, each with every rate; rivals at their own."""
    cells, figures = read_cells(search), figures_of(results, margins)
    rates = best_rates(cells, figures)
    rivals = {method: figures[name] for method, name in rates.items()}
    recipes = {n: s for n, s in cells.items() if s.get("method", "switch") == "switch" and n in figures}
    scores = {name: score(figures[name], rivals) for name in recipes}
    best = max(scores, key=lambda name: scores[name])
    found = {"best": recipes[best], "combined": combined(recipes, scores)}
    if found["combined"] == found["best"]:
        del found["combined"]
    about = {"best": f"{best} of the search", "combined": "every change that helped"}
    new = {
        f"{name}-{label}": {"about": about[name], "settings": {**settings, "train.learning_rate": rate}}
        for name, settings in found.items()
        for label, rate in RATES.items()
    }
    kept = {method: {"settings": cells[name]} for method, name in rates.items()}
    return {**search, "cells": {**kept, **new}, "baseline": "gkd", "seeds": FINAL_SEEDS}


def test(
    declared: Mapping[str, Any], last: Mapping[str, Any], results: Mapping[str, Any], margins: Mapping[str, float]
) -> dict[str, Any]:
    """The study file of the test: the best recipe of the finals as `recipe`, and every rival at its own rate."""
    cells, figures = read_cells(last), figures_of(results, margins)
    rivals = {name: figures[name] for name in cells if cells[name].get("method", "switch") != "switch"}
    scores = {name: score(figures[name], rivals) for name in figures if name not in rivals and name in cells}
    best = max(scores, key=lambda name: scores[name])
    recipe = {key: value for key, value in {**last["settings"], **cells[best]}.items() if value is not None}
    chosen = {name: {"settings": cells[name]} for name in rivals}
    own = {BASE: {"about": f"{best} of the finals", "settings": recipe}}
    return {**declared, "cells": {**declared["cells"], **chosen, **own}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("finals", "test"))
    parser.add_argument("--search", type=Path, required=True, help="results.json of the search")
    parser.add_argument("--finals", type=Path, help="results.json of the finals")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    search = yaml.safe_load((HERE / "search.yaml").read_text(encoding="utf-8"))
    declared = yaml.safe_load((HERE / "test.yaml").read_text(encoding="utf-8"))
    margins = declared["test"]["margins"]
    last = finals(search, json.loads(arguments.search.read_text(encoding="utf-8")), margins)
    if arguments.what == "test":
        if arguments.finals is None:
            parser.error("test needs --finals")
        last = test(declared, last, json.loads(arguments.finals.read_text(encoding="utf-8")), margins)
    last["run"] = str(HERE / "base.yaml")
    arguments.output.write_text(yaml.safe_dump(last, sort_keys=False, allow_unicode=True), encoding="utf-8")
    print(f"wrote {arguments.output}: {', '.join(last['cells'])}")


if __name__ == "__main__":
    main()
