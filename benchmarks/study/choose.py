"""Which recipe and which rates go on, by the rule that docs/study.md declares: reads results, writes a study file.

    python benchmarks/study/choose.py finals --from OUT/search --output OUT/finals.yaml
    python benchmarks/study/choose.py test --from OUT/finals --output OUT/test.yaml
    python benchmarks/study/choose.py target --from OUT/test

The folders are those of `qswitch compare`; cells are read where their figures are, so that a study file which changed
in between moves no choice. Knows no model: it compares means over records and seeds in units of the margins of
test.yaml. A rival goes on with the rate whose three figures are best in sum. A recipe is as good as its second best
gain over GKD and SeqKD, each the lesser of the two, provided that it is behind no rival by more than a margin; if every
recipe is behind one, the least. `target` says whether the test's recipe reached what docs/study.md declared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qswitch.evaluate.figures import BETTER
from qswitch.methods import OWNED
from qswitch.run_dir import write_atomically

HERE = Path(__file__).resolve().parent
NAMED = ("gkd", "seqkd")
"""The rivals that the target names."""
BASE = "recipe"
RATE = "train.learning_rate"
FACTORS = (
    {"loss.divergence", "loss.divergence_teacher_tokens", "loss.scope"},
    {"rollout.teacher_share", "rollout.schedule"},
)
"""Settings that are one decision together, which divergence trains where and who writes: of each, a combination takes
those of one cell, since those of two would make a third, which may have been searched and found worse."""
RATES = {"3e-4": 0.0003, "1e-3": 0.001, "3e-3": 0.003}
JSD = {"loss.divergence": "jsd", "loss.divergence_teacher_tokens": None}
FURTHER: dict[str, dict[str, Any]] = {
    "reuse-2": {"rollout.reuse": 2},
    "reuse-4": {"rollout.reuse": 4},
    "jsd-reuse-4": {"rollout.reuse": 4, **JSD},
    "mix-reuse-4": {"rollout.reuse": 4, **JSD, "data.ground_truth_mix": 0.5},
    "share-reuse-4": {"rollout.reuse": 4, **JSD, "rollout.teacher_share": 0.75},
}
"""Cells of the finals that the search did not have, beside those that the rule takes from it: what it found to move
most, the highest rate and training again on a rollout, together. docs/study.md, "Changes", says when they were added
and what was known then."""
CONTROL = "gkd-reuse"
"""GKD with the recipe's rollout.reuse, where it has one: in the table of the test and in no verdict."""
FINAL_SEEDS = [2, 3]
"""Seeds that the search did not choose by, so that a cell which was lucky there is not chosen for its luck."""

Settings = dict[str, Any]
Figures = Mapping[str, float]
"""Metric -> mean in units of its margin, signed so that more is better."""


def figures_of(results: Mapping[str, Any], margins: Mapping[str, float]) -> dict[str, Figures]:
    """Cell -> its figures on the first set of a comparison."""
    models = next(iter(results["sets"].values()))["models"]
    return {
        name: {m: BETTER[m] * values["metrics"][m]["all"]["mean"] / margin for m, margin in margins.items()}
        for name, values in models.items()
        if name in results["cells"]
    }


def method_of(settings: Settings) -> str:
    """The method of a cell; what names none is SWITCH."""
    return str(settings.get("method", "switch"))


def best_rates(cells: Mapping[str, Settings], figures: Mapping[str, Figures], rivals: list[str]) -> dict[str, str]:
    """Rival -> the name of its best cell; a tie goes to the cell that is named first."""
    best: dict[str, str] = {}
    for name, settings in cells.items():
        method = method_of(settings)
        if method not in rivals or name not in figures:
            continue
        if method not in best or sum(figures[name].values()) > sum(figures[best[method]].values()):
            best[method] = name
    return best


def score(own: Figures, rivals: Mapping[str, Figures]) -> tuple[bool, float]:
    """(behind no rival by more than a margin, how far ahead in units of margins); more is better."""
    gains = {m: min(own[m] - rivals[name][m] for name in NAMED) for m in own}
    worst = min(own[m] - rival[m] for rival in rivals.values() for m in own)
    return (True, sorted(gains.values())[-2]) if worst >= -1 else (False, worst)


def factors(settings: Settings) -> set[str]:
    """The decisions that these settings are part of, each by the name of its first setting."""
    return {next((min(group) for group in FACTORS if key in group), key) for key in settings}


def combined(cells: Mapping[str, Settings], scores: Mapping[str, tuple[bool, float]]) -> Settings:
    """The changes that beat the base, together: of those that change the same decision, the best one's."""
    merged: Settings = {}
    for name in sorted(cells, key=lambda one: scores[one], reverse=True):
        if scores[name] > scores[BASE] and not factors(cells[name]) & factors(merged):
            merged |= cells[name]
    return merged


def read_cells(study: Mapping[str, Any]) -> dict[str, Settings]:
    """Cell -> the settings that it changes."""
    return {name: dict((cell or {}).get("settings") or {}) for name, cell in study["cells"].items()}


def without_rate(settings: Settings) -> Settings:
    return {key: value for key, value in settings.items() if key != RATE}


def finals(search: Mapping[str, Any], results: Mapping[str, Any], declared: Mapping[str, Any]) -> dict[str, Any]:
    """The study file of the finals: the best recipe and the combination, each with every rate; rivals at their own."""
    cells, figures = read_cells(search), figures_of(results, declared["test"]["margins"])
    rates = best_rates(cells, figures, declared["test"]["against"])
    rivals = {method: figures[name] for method, name in rates.items()}
    recipes = {n: s for n, s in cells.items() if method_of(s) == "switch" and n in figures}
    scores = {name: score(figures[name], rivals) for name in recipes}
    best = max(scores, key=lambda name: scores[name])
    found = {"best": without_rate(recipes[best]), "combined": without_rate(combined(recipes, scores))}
    if found["combined"] == found["best"]:
        del found["combined"]
    about = {"best": f"{best} of the search", "combined": "every change that helped"}
    new = {
        f"{name}-{label}": {"about": about[name], "settings": {**settings, RATE: rate}}
        for name, settings in found.items()
        for label, rate in RATES.items()
    }
    further = {name: {"settings": {**settings, RATE: RATES["3e-3"]}} for name, settings in FURTHER.items()}
    kept = {method: {"settings": cells[name]} for method, name in rates.items()}
    return {**search, "cells": {**kept, **new, **further}, "baseline": "gkd", "seeds": FINAL_SEEDS}


def test(last: Mapping[str, Any], results: Mapping[str, Any], declared: Mapping[str, Any]) -> dict[str, Any]:
    """The study file of the test: the best recipe of the finals as `recipe`, and every rival at its own rate.

    What the finals set for all of their cells is part of the recipe only where a method owns the setting: the data is
    that of the test for every cell.
    """
    cells, figures = read_cells(last), figures_of(results, declared["test"]["margins"])
    rivals = {name: figures[name] for name in declared["test"]["against"]}
    scores = {name: score(figures[name], rivals) for name in cells if name in figures and name not in rivals}
    best = max(scores, key=lambda name: scores[name])
    shared = {key: value for key, value in last["settings"].items() if key in OWNED or key == "method"}
    recipe = {key: value for key, value in {**shared, **cells[best]}.items() if value is not None}
    chosen = {name: {"settings": cells[name]} for name in rivals}
    own = {BASE: {"about": f"{best} of the finals", "settings": recipe}}
    control = {}
    if "rollout.reuse" in recipe:
        again = {**cells["gkd"], "rollout.reuse": recipe["rollout.reuse"]}
        control[CONTROL] = {"about": "a control, in no test", "settings": again, "seeds": declared["seeds"][:1]}
    declared_cells = {name: cell for name, cell in declared["cells"].items() if name != CONTROL}
    return {**declared, "cells": {**declared_cells, **chosen, **own, **control}}


def target(results: Mapping[str, Any], declared: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """(whether it is reached, what stands against it), decided on the first set by its verdicts and means.

    Reached: the recipe's mean is behind that of no rival by more than a margin in any measure, and its verdict is
    better, in at least two measures, against both of the named rivals.
    """
    margins = declared["test"]["margins"]
    figures = figures_of(results, margins)
    against = [
        f"behind {rival} by {figures[rival][metric] - figures[BASE][metric]:.2f} margins in {metric}"
        for rival in declared["test"]["against"]
        for metric in margins
        if figures[BASE][metric] < figures[rival][metric] - 1
    ]
    verdicts = {(v["metric"], v["against"]): v["baseline_is"] for v in next(iter(results["sets"].values()))["test"]}
    won = [metric for metric in margins if all(verdicts[metric, rival] == "better" for rival in NAMED)]
    if len(won) < 2:
        against.append(f"better than both {' and '.join(NAMED)} in {len(won)} of {len(margins)} measures: {won}")
    return not against, against


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("finals", "test", "target"))
    parser.add_argument("--from", dest="folder", type=Path, required=True, help="output folder of the part before")
    parser.add_argument("--output", type=Path, help="study file to write")
    arguments = parser.parse_args()
    study = yaml.safe_load((arguments.folder / "compare.yaml").read_text(encoding="utf-8"))
    results = json.loads((arguments.folder / "results.json").read_text(encoding="utf-8"))
    declared = yaml.safe_load((HERE / "test.yaml").read_text(encoding="utf-8"))
    if arguments.what == "target":
        reached, against = target(results, declared)
        print("target reached" if reached else "target not reached: " + "; ".join(against))
        return
    if arguments.output is None:
        parser.error(f"{arguments.what} needs --output")
    chosen = (finals if arguments.what == "finals" else test)(study, results, declared)
    chosen["run"] = str(HERE / "base.yaml")
    write_atomically(arguments.output, yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True))
    print(f"wrote {arguments.output}: {', '.join(chosen['cells'])}")


if __name__ == "__main__":
    main()
