"""The study's files are valid comparisons of what docs/study.md declares."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from qswitch.compare.spec import Comparison, read_comparison
from qswitch.config import known_keys, reader
from qswitch.evaluate.score_table import estimate
from qswitch.methods import OWNED
from qswitch.presets import load_run_config

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "benchmarks/study"


@pytest.fixture(autouse=True)
def prepared_data(tmp_path, monkeypatch):
    """The study's data is made by prepare.py and is not in the repository: its evaluation sets, elsewhere and short."""
    data = tmp_path / "benchmarks/study/data"
    data.mkdir(parents=True)
    for name in ("eval", "search", "test-dolly", "test-selfinst", "test-vicuna"):
        (data / f"{name}.jsonl").write_text('{"instruction": "Why?", "input": "", "output": "So."}\n')
    monkeypatch.chdir(tmp_path)


def script(name: str) -> ModuleType:
    """A program of the study, which is no package."""
    spec = importlib.util.spec_from_file_location(name, STUDY / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_core_is_what_the_page_declares():
    core = read_comparison(STUDY / "core.yaml")
    page = (ROOT / "docs/study.md").read_text(encoding="utf-8")
    assert {c.name for c in core.cells} >= {"switch", "gkd", "kd", "seqkd", "sft", "distillm", "skd"}
    assert {c.seed for c in core.cells} == {1, 2, 3} and core.baseline == "switch"
    switch = next(c.config for c in core.cells if c.name == "switch")
    assert (switch.loss.scope, switch.data.ground_truth_mix, switch.rollout.decay_rate) == ("all", 0.5, 0.1)
    assert f"{core.section.budget.amount:,.0f} response tokens" in page and core.section.budget.unit == "tokens"
    assert core.section.evaluate.limit == 192 and "first 192" in page
    test = core.section.test
    assert test is not None and test.against == ["gkd", "kd", "seqkd", "sft"]
    assert f"{test.margins['kl_nats']} nats of KL and {test.margins['rouge_l_teacher']} points of ROUGE-L" in page
    starts = {(str(c.config.student), str(c.config.teacher), c.config.train.learning_rate) for c in core.cells}
    assert len(starts) == 1, "one start and one learning rate for every method"


def test_every_ablation_changes_what_it_says():
    ablations = read_comparison(STUDY / "ablations.yaml")
    configs = {c.name: c.config for c in ablations.cells}
    rates = {name: configs[name].rollout.decay_rate for name in ("decay-1-5", "switch", "decay-1-15", "decay-1-25")}
    for name, steps in (("decay-1-5", 5), ("switch", 10), ("decay-1-15", 15), ("decay-1-25", 25)):
        assert abs(rates[name] * steps - 1) < 1e-5
    texts = {name: config.model_dump_json() for name, config in configs.items()}
    assert len(set(texts.values())) == len(texts), "no two cells are the same"
    assert configs["sft"].method == "sft", "the control is there"


def test_the_follow_up_takes_the_cores_rivals_as_they_are():
    core, followup = read_comparison(STUDY / "core.yaml"), read_comparison(STUDY / "followup.yaml")
    ours = {c.label: c.settings for c in followup.cells}
    for cell in core.cells:
        if cell.name != "distillm":
            assert ours[cell.label] == cell.settings
    alone = next(c for c in read_comparison(STUDY / "ablations.yaml").cells if c.name == "all-alone")
    assert ours[alone.label] == alone.settings
    assert followup.section.test == core.section.test


def test_the_recipe_of_the_student_makes_what_the_page_describes():
    config = load_run_config(STUDY / "heal.yaml")
    assert (config.method, config.loss.divergence, config.student.adapter) == ("kd", "forward_kl", "none")
    assert config.student.shrink_to_layers == 16 and config.train.max_steps == 550
    assert config.student.model == config.teacher.model, "cut out of the teacher"
    page = (ROOT / "docs/study.md").read_text(encoding="utf-8")
    assert "benchmarks/study/heal.yaml" in page and "550 steps of forward KL" in page


def test_recurring_records_are_left_out_however_they_are_written():
    prepare = script("prepare")
    train = [{"instruction": text} for text in ("Why  is the sky Blue?", "why is the sky green?", "What?")]
    kept = prepare.without_recurring(train, [{"instruction": "why is the sky blue?\n"}])
    assert [record["instruction"] for record in kept] == ["why is the sky green?", "What?"]


def test_search_and_test_share_no_prompt_and_training_has_none_of_either(tmp_path):
    prepare = script("prepare")
    records = [{"instruction": f"question {i}", "input": "", "output": "answer"} for i in range(200)]
    evaluation = [*records, {"instruction": "Question  3"}]  # asked again after the search's part
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(r) + "\n" for r in evaluation))
    (tmp_path / "vicuna.jsonl").write_text(json.dumps({"instruction": "from elsewhere"}) + "\n")
    train = [{"instruction": text} for text in ("question 5", "question 199", "From elsewhere", "a new one")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in train))
    out = tmp_path / "out"
    arguments = ["--train", "train.jsonl", "--eval", "eval.jsonl", "--vicuna", "vicuna.jsonl", "--teacher", "."]
    command = [sys.executable, str(STUDY / "prepare.py"), *arguments, "--output-dir", str(out)]
    subprocess.run(command, check=True, cwd=tmp_path)
    keys = {p.stem: [prepare.key(r) for r in prepare.read(p)] for p in out.glob("*.jsonl")}
    assert keys["search"] == [f"question {i}" for i in range(192)]
    assert keys["test-dolly"] == [f"question {i}" for i in range(192, 200)]
    assert keys["test-vicuna"] == ["from elsewhere"] and keys["train"] == ["a new one"]


def test_the_second_study_is_what_the_page_declares():
    search, test = read_comparison(STUDY / "search.yaml"), read_comparison(STUDY / "test.yaml")
    page = (ROOT / "docs/study.md").read_text(encoding="utf-8")
    finals = script("choose").FINAL_SEEDS
    assert [{c.seed for c in search.cells}, {*finals}, {c.seed for c in test.cells}] == [{1}, {2, 3}, {4, 5, 6}]
    for comparison, place in ((search, "first 64 records of the\nsearch"), (test, "first 96 records of each set")):
        assert place in page and f"first {comparison.section.evaluate.limit} records" in place
    for comparison in (search, test):
        assert f"{comparison.section.budget.amount:,.0f} response tokens" in page
    assert test.section.budget.amount >= 48_000 and test.section.evaluate.max_new_tokens == 512
    declared = test.section.test
    assert declared is not None and set(declared.against) == {"gkd", "kd", "seqkd", "skd", "distillm", "sft"}
    units = {"kl_nats": "nats of KL", "rouge_l_teacher": "points", "own_reverse_kl_nats": "nats of KL"}
    for metric, unit in units.items():
        assert f"{declared.margins[metric]:g} {unit}" in page
    asked = [set(c.section.evaluate.data) for c in (search, test)]
    assert not asked[0] & asked[1], "no set of the test is looked at by the search"
    for method in declared.against:
        rates = {c.config.train.learning_rate for c in search.cells if c.config.method == method}
        assert rates == {3e-4, 1e-3, 3e-3}, method
    assert {c.config.loss.beta for c in test.cells if c.name == "gkd"} == {0.1}


def results_of(figures: dict[str, tuple[float, float, float]]) -> dict:
    """results.json as far as the choice reads it: KL, ROUGE-L to the teacher and KL on the own text of every cell."""
    names = ("kl_nats", "rouge_l_teacher", "own_reverse_kl_nats")
    models = {
        cell: {"metrics": {n: {"all": {"mean": v}} for n, v in zip(names, values, strict=True)}}
        for cell, values in {**figures, "teacher": (0.0, 20.0, 0.0)}.items()
    }
    return {"cells": {name: {} for name in figures}, "sets": {"search": {"models": models}}}


def choose(tmp_path: Path, what: str, study: dict, figures: dict[str, tuple[float, float, float]]) -> Comparison:
    """What choose.py makes of a comparison with these figures."""
    folder = tmp_path / f"before-{what}"
    folder.mkdir(exist_ok=True)
    (folder / "compare.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    (folder / "results.json").write_text(json.dumps(results_of(figures)))
    output = tmp_path / f"{what}.yaml"
    command = [sys.executable, str(STUDY / "choose.py"), what, "--from", str(folder), "--output", str(output)]
    subprocess.run(command, check=True)
    return read_comparison(output)


def test_the_choice_follows_its_rule_and_its_files_are_comparisons(tmp_path):
    search = yaml.safe_load((STUDY / "search.yaml").read_text())
    figures = dict.fromkeys(search["cells"], (1.0, 11.0, 1.2))
    figures["seqkd-3e-3"] = (0.94, 11.0, 1.2)  # three margins better than at its other rates
    figures["random"] = (0.5, 20.0, 0.5)  # a control, however good
    figures["share-0.25"] = (0.92, 12.5, 1.2)  # ahead by 1, 1.5 and 0 margins: the second best counts
    figures["share-0.75"] = (0.80, 10.5, 1.2)  # better in one measure alone
    figures["mix-0.25"] = (0.93, 11.8, 1.19)  # better than the base, less than share-0.25
    figures["interventions"] = (0.85, 6.0, 0.9)  # far behind every rival in one measure
    configs = {c.name: c.config for c in choose(tmp_path, "finals", search, figures).cells}
    assert configs["seqkd"].train.learning_rate == 3e-3 and configs["gkd"].train.learning_rate == 1e-3
    assert configs.keys() == {
        "gkd", "kd", "seqkd", "skd", "distillm", "sft", "best-3e-4", "best-1e-3", "best-3e-3", "combined-3e-4",
        "combined-1e-3", "combined-3e-3", "reuse-2", "reuse-4", "jsd-reuse-4", "mix-reuse-4", "share-reuse-4",
    }  # fmt: skip
    assert configs["best-3e-4"].rollout.teacher_share == 0.25 and configs["best-3e-4"].data.ground_truth_mix == 0
    both = configs["combined-3e-3"]
    assert (both.rollout.teacher_share, both.data.ground_truth_mix, both.loss.scope) == (0.25, 0.25, "all")
    assert {c.seed for c in read_comparison(tmp_path / "finals.yaml").cells} == {2, 3}, "not the seed chosen by"

    last = dict.fromkeys(configs, (1.0, 11.0, 1.2))
    last["combined-3e-3"] = (0.9, 13.0, 1.1)
    test = choose(tmp_path, "test", yaml.safe_load((tmp_path / "finals.yaml").read_text()), last)
    chosen = {c.name: c.config for c in test.cells}
    recipe = chosen["recipe"]
    assert (recipe.rollout.teacher_share, recipe.data.ground_truth_mix, recipe.train.learning_rate) == (
        0.25,
        0.25,
        3e-3,
    )
    assert recipe.loss.divergence_teacher_tokens == "forward_kl" and chosen["seqkd"].train.learning_rate == 3e-3
    assert chosen["distillm"].train.eval_steps == 5 and test.section.test is not None
    assert "gkd-reuse" not in chosen, "there is nothing to control"


def test_gkd_has_the_reuse_of_the_recipe_as_a_control(tmp_path):
    search = yaml.safe_load((STUDY / "search.yaml").read_text())
    figures = dict.fromkeys(search["cells"], (1.0, 11.0, 1.2)) | {"gkd-3e-4": (0.9, 11.0, 1.2)}
    cells = [c.name for c in choose(tmp_path, "finals", search, figures).cells]
    last = dict.fromkeys(cells, (1.0, 11.0, 1.2)) | {"share-reuse-4": (0.8, 12.0, 1.0)}
    test = choose(tmp_path, "test", yaml.safe_load((tmp_path / "finals.yaml").read_text()), last)
    chosen = {c.name: c.config for c in test.cells if c.seed == 4}
    recipe, control = chosen["recipe"], chosen["gkd-reuse"]
    assert (recipe.rollout.reuse, recipe.rollout.teacher_share, recipe.loss.divergence) == (4, 0.75, "jsd")
    assert recipe.loss.divergence_teacher_tokens is None and recipe.train.learning_rate == 3e-3
    assert {c.seed for c in test.cells if c.name == "gkd-reuse"} == {4}
    same = chosen["gkd"].model_copy(update={"rollout": chosen["gkd"].rollout.model_copy(update={"reuse": 4})})
    assert control == same and control.train.learning_rate == 3e-4
    assert test.section.test is not None and "gkd-reuse" not in test.section.test.against


def test_all_cells_of_the_test_see_the_same_data_in_the_same_order(tmp_path):
    search = yaml.safe_load((STUDY / "search.yaml").read_text())
    finals = choose(tmp_path, "finals", search, dict.fromkeys(search["cells"], (1.0, 11.0, 1.2)))
    figures = dict.fromkeys((c.name for c in finals.cells), (1.0, 11.0, 1.2))
    test = choose(tmp_path, "test", yaml.safe_load((tmp_path / "finals.yaml").read_text()), figures)
    own = {*OWNED, "method", "train.learning_rate", "train.eval_steps", "train.eval_own_prompts", "rollout.reuse"}
    for comparison in (finals, test):
        shared = {
            c.name: {key: reader(c.config)(key) for key in known_keys() if key not in own}
            for c in comparison.cells
            if c.seed == comparison.cells[0].seed
        }
        assert shared.keys() == {c.name for c in comparison.cells}
        for name, values in shared.items():
            assert values == shared["gkd"], name


@pytest.mark.parametrize(("better", "expected"), [
    ({"mix-0.25": 2.0, "share-0.25": 1.0}, {"data.ground_truth_mix": 0.25, "rollout.teacher_share": 0.25}),
    # Of two cells about who writes, or about which divergence trains where, the better one.
    ({"relative": 2.0, "share-0.25": 1.0}, None),
    ({"forward-jsd": 2.0, "both-skew-reverse": 1.0}, None),
    ({"interventions": 2.0, "forward-jsd": 1.0, "reuse-2": 0.5}, {"loss.scope": "interventions", "rollout.reuse": 2}),
    # The best cell with another rate is no combination: the finals have every rate.
    ({"share-0.25": 2.0, "recipe-3e-3": 1.0}, None),
])  # fmt: skip
def test_a_combination_mixes_no_two_cells_of_one_decision(better, expected):
    program = script("choose")
    search, declared = (yaml.safe_load((STUDY / f"{name}.yaml").read_text()) for name in ("search", "test"))
    figures = dict.fromkeys(search["cells"], (1.0, 11.0, 1.2))
    figures |= {name: (1.0 - 0.02 * gain, 11.0 + gain, 1.2) for name, gain in better.items()}
    cells = program.finals(search, results_of(figures), declared)["cells"]
    best = {**search["cells"][next(iter(better))]["settings"], "train.learning_rate": 0.001}
    assert cells["best-1e-3"]["settings"] == best
    assert cells.get("combined-1e-3", {}).get("settings") == (expected and {**expected, "train.learning_rate": 0.001})


def test_the_target_needs_two_measures_and_nothing_behind():
    program = script("choose")
    declared = yaml.safe_load((STUDY / "test.yaml").read_text())
    against = declared["test"]["against"]
    metrics = list(declared["test"]["margins"])

    def judged(recipe: tuple[float, float, float], won: list[str], **others: tuple[float, float, float]) -> bool:
        figures = {**dict.fromkeys(against, (1.0, 11.0, 1.2)), **others, "recipe": recipe}
        results = results_of(figures)
        results["sets"]["search"]["test"] = [
            {"metric": m, "against": rival, "baseline_is": "better" if m in won else "undecided"}
            for m in metrics
            for rival in against
        ]
        return bool(program.target(results, declared)[0])

    two = metrics[:2]
    assert judged((0.9, 13.0, 1.2), two)
    assert not judged((0.9, 13.0, 1.2), two[:1]), "better in one measure alone"
    assert judged((0.9, 13.0, 1.22), two), "behind by less than the margin"
    assert not judged((0.9, 13.0, 1.25), two), "behind by more than the margin, whatever the verdict is"
    assert not judged((0.9, 13.0, 1.2), two, skd=(0.8, 11.0, 1.2)), "behind a rival that is not named"


def test_the_chain_stops_in_time_goes_on_and_repeats_no_choice(tmp_path, monkeypatch):
    chain = script("chain")
    with pytest.raises(chain.TimeIsUp):
        started = time.monotonic()
        chain.run([sys.executable, "-c", "import time; time.sleep(60)"], started + 0.5)
    assert time.monotonic() - started < 30
    ran: list[list[str]] = []

    def remember(command: list[str], deadline: float | None) -> None:
        ran.append(command)
        if "--output" in command:
            Path(command[command.index("--output") + 1]).write_text("chosen")

    monkeypatch.setattr(chain, "run", remember)
    chain.chain(tmp_path / "out", until="test", deadline=None)
    assert [Path(c[1]).name if c[1] != "-m" else Path(c[4]).stem for c in ran] == [
        "search", "choose.py", "finals", "choose.py", "test", "choose.py"
    ]  # fmt: skip
    ran.clear()
    chain.chain(tmp_path / "out", until="finals", deadline=None)
    assert [Path(c[4]).stem for c in ran] == ["search", "finals"], "what was chosen stays chosen"


def test_parts_of_the_test_are_its_cells_and_go_together_again(tmp_path):
    parts = script("parts")
    whole = {c.label: c.settings for c in read_comparison(STUDY / "test.yaml").cells}
    for number, (cells, seeds) in enumerate(((["sft", "recipe"], [4]), (["gkd", "sft"], [5, 6]))):
        folder, file = tmp_path / f"part-{number}", tmp_path / f"part-{number}.yaml"
        arguments = ["--cells", ",".join(cells), "--seeds", ",".join(map(str, seeds)), "--output", str(file)]
        command = [sys.executable, str(STUDY / "parts.py"), "split", str(STUDY / "test.yaml"), *arguments]
        subprocess.run(command, check=True)
        part = read_comparison(file)
        assert [c.label for c in part.cells] == [f"{name}-seed{seed}" for seed in seeds for name in cells]
        for cell in part.cells:
            assert cell.settings == whole[cell.label]
            for path in (f"cells/{cell.label}.json", f"cells/{cell.label}.start.json", f"eval/models/{cell.label}/a"):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(cell.label)
            (folder / "runs" / cell.label).mkdir(parents=True)
        (folder / "eval/teacher").mkdir()
        (folder / "eval/teacher/test-dolly.jsonl").write_text("what the teacher says")
        (folder / "eval/results.json").write_text(f"the table of part {number}")
        (folder / "eval/sets").mkdir()
        overlaps = {f"{name}-seed{seed}": number for name in cells for seed in seeds}
        (folder / "eval/sets/a.json").write_text(json.dumps({"ids": [0, 1], "overlaps_with_training": overlaps}))
    folders, target = [tmp_path / "part-0", tmp_path / "part-1"], tmp_path / "whole"
    assert parts.join(folders, target) == 6 == parts.join(folders, target), "again is no harm"
    assert (target / "eval/models/gkd-seed6/a").read_text() == "gkd-seed6"
    assert not (target / "eval/results.json").exists(), "qswitch compare writes it anew"
    assert (target / "runs/sft-seed4").resolve() == tmp_path / "part-0/runs/sft-seed4"
    overlaps = json.loads((target / "eval/sets/a.json").read_text())["overlaps_with_training"]
    assert overlaps == {cell: int(not cell.endswith("4")) for cell in overlaps} and len(overlaps) == 6
    (folders[1] / "eval/teacher/test-dolly.jsonl").write_text("what another teacher says")
    with pytest.raises(SystemExit, match="test-dolly"):
        parts.join(folders, tmp_path / "other")
    (folders[1] / "eval/sets/a.json").write_text(json.dumps({"ids": [0, 2], "overlaps_with_training": {}}))
    with pytest.raises(SystemExit, match="other records"):
        parts.join(folders, tmp_path / "third")


def test_published_figures_are_those_of_the_results_without_their_classes():
    seen = {"all": {"mean": 0.123456789, "records": 96}, "1-10": {"mean": 1.0}}
    results = {
        "models": {"gkd": {"metrics": {"kl_nats": seen}}},
        "overlaps_with_training": {},
        "test": [{"by": [1e-7]}],
    }
    expected = {"models": {"gkd": {"metrics": {"kl_nats": {"all": {"mean": 0.12346, "records": 96}}}}}}
    assert script("parts").without_details(results) == {**expected, "test": [{"by": [1e-7]}]}


def test_the_page_says_what_the_published_figures_of_the_test_say():
    results = json.loads((ROOT / "benchmarks/results/study-2-test.json").read_text(encoding="utf-8"))
    declared = yaml.safe_load((STUDY / "test.yaml").read_text(encoding="utf-8"))
    assert {name: one["seeds"] for name, one in results["cells"].items()} == {
        name: (cell or {}).get("seeds", declared["seeds"]) for name, cell in declared["cells"].items()
    }
    reached, against = script("choose").target(results, declared)
    page = (ROOT / "docs/study.md").read_text(encoding="utf-8")
    second = page[page.index("### Results of the test") :]
    assert not reached and "**The target is not reached.**" in second
    for reason in against:
        assert reason in " ".join(second.split())
    names = {
        "kl_nats": "KL on the teacher's text",
        "rouge_l_teacher": "ROUGE-L to teacher",
        "own_reverse_kl_nats": "KL on own text",
    }
    expected = [
        [names[v["metric"]], v["against"], estimate(v["difference"]), v["baseline_is"]]
        for name in ("test-dolly", "test-selfinst", "test-vicuna")
        for v in results["sets"][name]["test"]
    ]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in second.splitlines()]
    printed = [[*row[:3], row[-1]] for row in rows if len(row) == 7 and row[0] in names.values()]
    assert printed == expected and len(printed) == 54
