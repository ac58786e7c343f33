"""`qswitch compare`: cells from one start, one budget, no finished cell twice, verdicts of a declared test."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from qswitch import cli
from qswitch.compare.cells import CellFailed, compare
from qswitch.compare.results_table import declared_test
from qswitch.compare.spec import TestSection, read_comparison
from qswitch.errors import ConfigError, RunDirError
from qswitch.evaluate.scores import Metric, SetScores
from tests.evaluate.runs import WORDS, write_test_set
from tests.tiny import save_tiny_pair


def write_comparison(folder: Path, name: str = "study", **changes: Any) -> Path:
    """`name`.yaml with a base configuration, data and a tiny pair beside it."""
    if not (folder / "pair").exists():
        save_tiny_pair(folder / "pair")
        lines = [{"prompt": f"tell {w} {i}", "response": f"{w} is it"} for i, w in enumerate(WORDS)]
        (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_test_set(folder / "questions.jsonl")
    base = {
        "teacher": {"model": str(folder / "pair/teacher"), "precision": "fp32"},
        "student": {"model": str(folder / "pair/student"), "precision": "fp32", "lora": {"r": 4, "alpha": 8}},
        "data": {"train": str(folder / "train.jsonl"), "num_validation": 3},
        "rollout": {"max_new_tokens": 8, "batch_size": 4},
        "train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 5e-3,
                  "eval_steps": 100, "save_steps": 1, "device": "cpu", "compute_dtype": "fp32"},
    }  # fmt: skip
    (folder / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    values: dict[str, Any] = {
        "run": "base.yaml",
        "budget": {"unit": "steps", "amount": 2},
        "seeds": [1],
        "cells": {"switch": {}, "gkd": {"settings": {"method": "gkd"}}},
        "evaluate": {"data": [str(folder / "questions.jsonl")], "max_new_tokens": 8, "limit": 5},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False), encoding="utf-8")
    return path


class Launcher:
    """Runs commands in this process and remembers them; stops as Ctrl-C would before the n-th."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.commands: list[list[str]] = []
        self.stop_at = stop_at

    def __call__(self, arguments: Sequence[str]) -> int:
        if len(self.commands) == self.stop_at:
            raise KeyboardInterrupt
        self.commands.append(list(arguments))
        return cli.run(list(arguments))

    def kinds(self) -> list[str]:
        return [f"{c[0]} {Path(c[1].partition('=')[2] or c[1]).name}" for c in self.commands]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path, dict[str, Any]]:
    """(file, output folder, results) of a comparison that is finished: tests go on from a copy of its output."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_comparison(folder)
    return path, folder / "out", compare(path, folder / "out", launch=Launcher(), say=lambda _: None)


def test_an_interrupted_comparison_goes_on_and_repeats_no_finished_cell(tmp_path: Path, capsys, monkeypatch):
    path, out = write_comparison(tmp_path), tmp_path / "out"
    first = Launcher(stop_at=5)  # switch trained and scored, and the controls; gkd trained
    with pytest.raises(KeyboardInterrupt):
        compare(path, out, launch=first, say=lambda _: None)
    assert first.kinds() == [
        "distill --config", "eval switch-seed1", "eval switch-seed1:teacher", "eval switch-seed1:base",
        "distill --config",
    ]  # fmt: skip
    finished = out / "cells/switch-seed1.json"
    before = finished.read_bytes(), finished.stat().st_mtime_ns
    assert not (out / "cells/gkd-seed1.json").exists()
    assert "switch" in (out / "results.md").read_text(encoding="utf-8"), "the table so far"

    # The run of gkd is stopped in mid-run: it resumes from its checkpoint instead of starting anew.
    run_path = out / "runs/gkd-seed1"
    (run_path / "summary.json").unlink()
    shutil.rmtree(run_path / "checkpoints/step-000002")
    second = Launcher()
    results = compare(path, out, launch=second, say=lambda _: None)
    commands = [(c[0], c[1].rpartition("/")[2]) for c in second.commands]
    assert second.commands[0] == ["distill", "--resume", str(run_path)]
    assert commands[1:] == [("eval", "gkd-seed1"), ("distill", "--config"), ("eval", "sft-seed1")]
    assert (finished.read_bytes(), finished.stat().st_mtime_ns) == before
    one = results["sets"]["questions"]
    assert "The declared test" not in (out / "results.md").read_text(encoding="utf-8"), "none was declared"
    assert list(one["models"]) == ["switch", "gkd", "sft", "teacher", "untrained"]
    assert set(one["differences"]) == {"gkd", "sft", "teacher", "untrained"}
    assert abs(one["models"]["teacher"]["metrics"]["kl_nats"]["all"]["mean"]) < 1e-6
    paired = one["differences"]["gkd"]["kl_nats"]["all"]["mean"]
    means = {name: one["models"][name]["metrics"]["kl_nats"]["all"]["mean"] for name in ("switch", "gkd")}
    assert paired == pytest.approx(means["gkd"] - means["switch"])
    assert results["cells"]["gkd"]["steps"] == 2 and results["cells"]["sft"]["rollout_tokens"] == 0
    assert 0 <= results["cells"]["switch"]["teacher_share"] <= 1
    metrics = [json.loads(line) for line in (run_path / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == [1, 2]

    # Finished: nothing is started.
    third = Launcher()
    again = compare(path, out, launch=third, say=lambda _: None)
    assert third.commands == [] and again["sets"] == results["sets"]
    protocol = (out / "results.md").read_text(encoding="utf-8")
    assert "Protocol greedy: seeds" in protocol and "responses up to 8 tokens" in protocol
    assert "Differs from that protocol: max_new_tokens" in protocol and "Teacher: " in protocol

    # Another budget is another comparison; a new cell is not.
    with pytest.raises(RunDirError, match=r"switch-seed1 with other settings \(budget.amount, train.max_steps\)"):
        compare(write_comparison(tmp_path, budget={"unit": "steps", "amount": 3}), out, say=lambda _: None)


def test_one_seed_of_every_cell_comes_before_the_next(tmp_path: Path):
    cells = {"switch": {}, "gkd": {"settings": {"method": "gkd"}, "seeds": [7]}, "sft": {"settings": {"method": "sft"}}}
    comparison = read_comparison(write_comparison(tmp_path, seeds=[1, 2], cells=cells))
    assert [c.label for c in comparison.cells] == [
        "switch-seed1",
        "gkd-seed7",
        "sft-seed1",
        "switch-seed2",
        "sft-seed2",
    ]


def test_a_cell_of_another_version_counts_unless_a_value_differs(tmp_path: Path):
    (cell, *_) = read_comparison(write_comparison(tmp_path)).cells
    saved = json.loads(json.dumps(cell.settings))
    assert cell.changed(saved) == []
    assert cell.changed(saved | {"train.learning_rate": 1.0}) == ["train.learning_rate"], "a default or a file changed"
    older = {key: value for key, value in saved.items() if key != "train.max_grad_norm"}
    assert cell.changed(older) == [], "a setting that was new since then, at its default"
    older = {key: value for key, value in saved.items() if key != "train.learning_rate"}
    assert cell.changed(older) == ["train.learning_rate"], "one that this cell sets"
    assert cell.changed(saved | {"train.gone": 3}) == [], "a setting that is no more"


@pytest.mark.parametrize(("unit", "amount"), [("tokens", 60), ("seconds", 0.001)])
def test_budgets_of_tokens_and_seconds_end_a_run(tmp_path: Path, unit: str, amount: float):
    cells = {"sft": {"settings": {"method": "sft"}}, "switch": {}}
    path = write_comparison(tmp_path, budget={"unit": unit, "amount": amount}, cells=cells)
    results = compare(path, tmp_path / "out", launch=Launcher(), say=lambda _: None)
    cells = results["cells"]
    if unit == "seconds":
        assert cells["sft"]["steps"] == cells["switch"]["steps"] == 1, "the step that reaches the budget is the last"
        return
    for name, key in (("sft", "trained_tokens"), ("switch", "rollout_tokens")):
        metrics = (tmp_path / f"out/runs/{name}-seed1/metrics.jsonl").read_text().splitlines()
        spent = [
            m["loss_tokens"] if name == "sft" else m["rollout_tokens"] for m in map(json.loads, metrics) if "loss" in m
        ]
        assert sum(spent) == cells[name][key] >= amount > sum(spent[:-1]), "no step more and none fewer"
        rates = [m["learning_rate"] for m in map(json.loads, metrics) if "loss" in m]
        assert rates == sorted(rates, reverse=True) and rates[-1] < 0.2 * 5e-3, "the schedule follows the budget"


def test_the_declared_test_stands_in_the_table(tmp_path: Path):
    cells = {"switch": {}, "sft": {"settings": {"method": "sft"}}}
    path = write_comparison(tmp_path, cells=cells, test={"against": ["sft"], "margins": {"kl_nats": 0.5}})
    compare(path, tmp_path / "out", launch=Launcher(), say=lambda _: None)
    table = (tmp_path / "out/results.md").read_text(encoding="utf-8")
    (row,) = [line for line in table.partition("The declared test")[2].splitlines() if line.startswith("| KL")]
    assert "| sft |" in row and "| 0.5 |" in row
    assert any(verdict in row for verdict in ("better", "worse", "equivalent", "undecided"))


def test_a_failing_cell_stops_with_what_to_do_and_keeps_the_others(tmp_path: Path, capsys):
    path = write_comparison(tmp_path, cells={"switch": {}, "broken": {"settings": {"data.train": "nowhere.jsonl"}}})
    with pytest.raises(CellFailed, match=r"training of broken-seed1 ended with code 2.*qswitch distill --config"):
        compare(path, tmp_path / "out", launch=Launcher(), say=lambda _: None)
    assert (tmp_path / "out/cells/switch-seed1.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": {"unit": "hours", "amount": 2}}, "budget.unit"),
        ({"cellls": {}}, "cellls is not a setting"),
        (
            {"cells": {"gkd": {"seed": 7}}},
            "cells.gkd.seed is not a setting of a comparison. Known: settings, seeds, about.",
        ),
        ({"cells": {"a": {"settings": {"rollout.decay_rat": 1}}}}, "Did you mean rollout.decay_rate"),
        ({"cells": {"a b!": {}}}, "use letters"),
        ({"baseline": "c"}, "there is no cell c"),
        ({"cells": {"sft": {}}}, "not the SFT control"),
        ({"test": {"against": ["x"], "margins": {"kl_nats": 0.1}}}, "there is no cell x"),
        ({"test": {"against": ["gkd"], "margins": {"kl": 0.1}}}, "choose among"),
        # Good where it is as the teacher's: neither way is better.
        ({"test": {"against": ["gkd"], "margins": {"own_repetition": 0.1}}}, "choose among"),
        ({"run": "missing.yaml"}, "does not exist"),
        ({"cells": {"teacher": {}}}, "the name of a control"),
        ({"seeds": [1, 1]}, "a seed is named twice"),
        ({"test": {"against": ["switch"], "margins": {"kl_nats": 0.1}}}, "is the baseline itself"),
        ({"test": {"against": ["gkd"], "margins": {"kl_nats": 0}}}, "must be above 0"),
        ({"cells": {"-a": {}}}, "a letter or digit first"),
        (
            {"cells": {"switch": {}, "gkd": {"seeds": [7]}}, "test": {"against": ["gkd"], "margins": {"kl_nats": 1}}},
            "has other training seeds than switch",
        ),
        (
            {"cells": {"switch": {}, "b": {"settings": {"student.shrink_to_layers": 1}}}},
            r"starts from another student than switch \(student.shrink_to_layers\)",
        ),
        ({"evaluate": {"data": ["nowhere.jsonl"]}}, "evaluate.data: nowhere.jsonl does not exist"),
        (
            {"cells": {"switch": {}, "b": {"settings": {"teacher.precision": "bf16"}}}},
            "has another teacher than switch",
        ),
        ({"cells": {"switch": {}, "b": {"settings": {"data.template": "alpaca"}}}}, "has another data.template"),
    ],
)
def test_mistakes_are_found_before_anything_starts(tmp_path: Path, changes, message):
    path = write_comparison(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        read_comparison(path)
    assert cli.run(["compare", str(path), "--output-dir", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


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


def test_what_is_measured_against_another_teacher_or_lost_is_measured_anew(tmp_path: Path, finished):
    path, out = finished[0], shutil.copytree(finished[1], tmp_path / "out")
    before = finished[2]
    # As if a later cell had been scored against another teacher: its responses are marked, the others' distances not.
    (out / "eval/models/gkd-seed1/teacher.txt").write_text("another\n")
    (out / "eval/models/sft-seed1/questions.jsonl").unlink()
    launcher = Launcher()
    after = compare(path, out, launch=launcher, say=lambda _: None)
    assert launcher.kinds() == ["eval gkd-seed1", "eval sft-seed1"] and after["sets"] == before["sets"]


def test_the_table_says_which_cells_were_trained_on_what_they_are_asked(tmp_path: Path, finished):
    path, out = finished[0], tmp_path / "out"
    shutil.copytree(finished[1], out)
    kept = out / "eval/sets/questions.json"
    content = json.loads(kept.read_text(encoding="utf-8"))
    cells = dict.fromkeys(("switch-seed1", "gkd-seed1", "sft-seed1"), 0)
    assert content["overlaps_with_training"] == cells and content["left_out"] == 0, "each by an evaluation of its own"

    def table(**changes: Any) -> str:
        kept.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not None}), encoding="utf-8")
        compare(path, out, launch=Launcher(stop_at=0), say=lambda _: None)
        return (out / "results.md").read_text(encoding="utf-8")

    seen = cells | {"switch-seed1": 2, "gkd-seed1": 2, "gone-seed1": 3}
    text = table(overlaps_with_training=seen, left_out=4)
    assert (
        "## questions (5 records, 4 left out)\n\n2 of 5 prompts are also in the training data of switch, gkd," in text
    )
    earlier = table(overlaps_with_training=None, left_out=None)
    assert "## questions (5 records)\n" in earlier and "training data of" not in earlier


def test_another_evaluation_of_the_same_runs_trains_nothing(tmp_path: Path, finished):
    folder, out = finished[0].parent, shutil.copytree(finished[1], tmp_path / "out")
    evaluate = {"data": [str(folder / "questions.jsonl")], "max_new_tokens": 8, "limit": 4}
    path = write_comparison(folder, "shorter", evaluate=evaluate)
    with pytest.raises(RunDirError, match=r"scored with other settings \(evaluate.limit\).*the runs stay"):
        compare(path, out, launch=Launcher(), say=lambda _: None)
    shutil.rmtree(out / "eval")
    for file in (out / "cells").glob("*.json"):
        if not file.name.endswith(".start.json"):
            file.unlink()
    launcher = Launcher()
    results = compare(path, out, launch=launcher, say=lambda _: None)
    assert {c[0] for c in launcher.commands} == {"eval"} and results["sets"]["questions"]["records"] == 4


def test_data_without_responses_has_no_sft_row_and_other_failures_stop(tmp_path: Path):
    path = write_comparison(tmp_path, cells={"switch": {}})
    lines = [{"prompt": f"tell {i}"} for i in range(len(WORDS))]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = compare(path, tmp_path / "out", launch=Launcher(), say=lambda _: None)
    assert "sft-seed1 could not start" in results["failed"]["sft-seed1"]
    assert set(results["sets"]["questions"]["models"]) == {"switch", "teacher", "untrained"}

    # Refused before it begins for another reason, it is missed; so is a run that fails later.
    class Refused(Launcher):
        def __call__(self, arguments: Sequence[str]) -> int:
            return 2 if "sft-seed1" in " ".join(arguments) else super().__call__(arguments)

    refused = tmp_path / "refused"
    refused.mkdir()
    with pytest.raises(CellFailed, match="training of sft-seed1 ended with code 2"):
        compare(
            write_comparison(refused, cells={"switch": {}}), tmp_path / "out3", launch=Refused(), say=lambda _: None
        )

    class Broken(Launcher):
        def __call__(self, arguments: Sequence[str]) -> int:
            code = super().__call__(arguments)
            return 2 if "sft-seed1" in " ".join(arguments) else code  # as out of memory in its third step

    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(CellFailed, match="training of sft-seed1 ended with code 2"):
        compare(write_comparison(other), tmp_path / "out2", launch=Broken(), say=lambda _: None)


def test_a_fine_tuned_teacher_that_is_swapped_can_be_compared(tmp_path: Path):
    settings = {"teacher.adapter": "runs/teacher", "teacher.residency": "swap", "rollout.steps_at_once": 4}
    cells = {"switch": {}, "gkd": {"settings": {"method": "gkd"}}}
    comparison = read_comparison(write_comparison(tmp_path, settings=settings, cells=cells))
    sft = next(c.config for c in comparison.cells if c.name == "sft")
    assert sft.teacher.adapter == "runs/teacher", "what RUN:teacher is measured with"
    assert (sft.teacher.residency, sft.rollout.steps_at_once) == ("resident", 1)


def test_a_cell_names_its_method_as_a_file_would(tmp_path: Path):
    settings = {"method": "switch", "rollout.decay_rate": 0.04, "loss.scope": "all", "rollout.reuse": 2}
    cells = {"switch": {}, "same": {"settings": {"method": "switch"}}, "gkd": {"settings": {"method": "gkd"}}}
    comparison = read_comparison(write_comparison(tmp_path, settings=settings, cells=cells))
    configs = {c.name: c.config for c in comparison.cells}
    assert configs["same"] == configs["switch"] and configs["same"].rollout.decay_rate == 0.04
    assert configs["gkd"].rollout.decay_rate == 0.1 and configs["sft"].rollout.reuse == 1, "others forget this one's"


def test_two_commands_do_not_write_into_one_folder(tmp_path: Path, capsys):
    from qswitch.run_dir import locked

    path, out = write_comparison(tmp_path), tmp_path / "out"
    out.mkdir()
    with locked(out):
        assert cli.run(["compare", str(path), "--output-dir", str(out)]) == 2
    assert "Another qswitch command is writing to" in capsys.readouterr().err
    run_path = tmp_path / "run"
    train = ["distill", "--config", str(tmp_path / "base.yaml"), "--set", "train.max_steps=2", "--set",
             "train.eval_steps=2"]  # fmt: skip
    assert cli.run([*train, "--output-dir", str(run_path)]) == 0
    asked = ["eval", str(run_path), "--data", str(tmp_path / "questions.jsonl"), "--no-teacher", "--limit", "1"]
    assert cli.run(asked) == 0
    with locked(run_path), locked(run_path / "eval/greedy"):
        assert cli.run(["distill", "--resume", str(run_path)]) == 2 and cli.run(asked) == 2
    assert cli.run(asked) == 0


def test_finished_cells_without_their_runs_keep_their_controls(tmp_path: Path, finished, capsys):
    path, out = finished[0], shutil.copytree(finished[1], tmp_path / "out")
    before = finished[2]
    shutil.rmtree(out / "runs")
    launcher = Launcher()
    assert compare(path, out, launch=launcher, say=lambda _: None) == before and not launcher.commands
    shutil.rmtree(out / "eval/models/untrained")
    with pytest.raises(CellFailed, match=r"control untrained .* Delete .*switch-seed1.json"):
        compare(path, out, launch=launcher, say=lambda _: None)
    (out / "cells/switch-seed1.json").unlink()
    assert list(compare(path, out, launch=launcher, say=lambda _: None)["sets"]["questions"]["models"]) == list(
        before["sets"]["questions"]["models"]
    )


def test_what_evaluate_says_reaches_every_evaluation(tmp_path: Path):
    evaluate = {"data": [str(tmp_path / "questions.jsonl")], "max_new_tokens": 6, "limit": 3, "split": "validation",
                "device": "cpu", "batch_size": 2}  # fmt: skip
    launcher = Launcher()
    path = write_comparison(tmp_path, evaluate=evaluate)
    compare(path, tmp_path / "out", launch=launcher, say=lambda _: None)
    evaluations = [" ".join(c) for c in launcher.commands if c[0] == "eval"]
    assert len(evaluations) == 5, "three cells and two controls"
    for words in evaluations:
        assert "--split validation --batch-size 2 --device cpu" in words and "--max-new-tokens 6 --limit 3" in words
    settings = read_comparison(tmp_path / "study.yaml").cells[0].settings
    assert settings["evaluate.split"] == "validation" and "evaluate.device" not in settings


def test_a_cell_is_a_process_of_its_own(tmp_path: Path, monkeypatch):
    """The default launcher starts `qswitch` itself and hands its exit code back."""
    from qswitch.compare.cells import launch_process

    assert launch_process(["presets", "list"]) == 0
    assert launch_process(["presets", "show", "nothing"]) == 2


def test_the_process_that_waits_holds_no_gpu():
    """A CUDA context takes hundreds of MiB; the comparing process never loads torch."""
    import subprocess
    import sys

    code = "import qswitch.compare.cells, sys; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "False", result.stderr
