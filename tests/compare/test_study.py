"""The study's files are valid comparisons of what docs/study.md declares."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from qswitch.compare.spec import read_comparison
from qswitch.presets import load_run_config

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "benchmarks/study"


@pytest.fixture(autouse=True)
def prepared_data(tmp_path, monkeypatch):
    """The study's data is made by prepare.py and is not in the repository: its evaluation set, elsewhere and empty."""
    data = tmp_path / "benchmarks/study/data"
    data.mkdir(parents=True)
    (data / "eval.jsonl").touch()
    monkeypatch.chdir(tmp_path)


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
    spec = importlib.util.spec_from_file_location("prepare", STUDY / "prepare.py")
    assert spec is not None and spec.loader is not None
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    train = [{"instruction": text} for text in ("Why  is the sky Blue?", "why is the sky green?", "What?")]
    kept = prepare.without_recurring(train, [{"instruction": "why is the sky blue?\n"}])
    assert [record["instruction"] for record in kept] == ["why is the sky green?", "What?"]
