"""What a comparison's file may say, and what is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qswitch import cli
from qswitch.compare.spec import read_comparison
from qswitch.errors import ConfigError
from tests.compare.comparisons import swap_two_tokens, write_comparison


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
        (
            {"cells": {"switch": {}, "b": {"settings": {"data.template": "alpaca"}}}},
            r"has another data.template than switch.*Name a template in evaluate.template",
        ),
        (
            {
                "cells": {"switch": {}, "b": {"settings": {"data.system_prompt": "Be brief."}}},
                "evaluate": {"data": ["questions.jsonl"], "template": "alpaca"},
            },
            r"has another data.system_prompt than switch, but all answer the same prompts\. Set it in settings",
        ),
        (
            {
                "cells": {"switch": {}, "b": {"settings": {"data.template_kwargs": {"enable_thinking": False}}}},
                "evaluate": {"data": ["questions.jsonl"], "template": "teacher"},
            },
            "has another data.template_kwargs than switch",
        ),
        (
            {"test": {"against": ["gkd", "sft", "gkd"], "margins": {"kl_nats": 1}}},
            "test.against: gkd is named twice",
        ),
        (
            {"cells": {"switch": {}, "short": {"settings": {"train.max_tokens": 50}}}},
            "cells.short: train.max_tokens is the budget's",
        ),
        (
            {"cells": {"switch": {}, "short": {"settings": {"train": {"max_steps": 1}}}}},
            "train.max_steps is the budget",
        ),
        (
            {"settings": {"method": "seqkd", "student.tokenizer": "own"}, "cells": {"a": {}, "b": {}}},
            r"^[^\n]*study.yaml: teacher and student have different tokenizers.*qswitch eval RUN RUN --data FILE$",
        ),
    ],
)
def test_mistakes_are_found_before_anything_starts(tmp_path: Path, changes, message):
    path = write_comparison(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        read_comparison(path)
    assert cli.run(["compare", str(path), "--output-dir", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_two_tokenizers_are_told_by_the_files_before_anything_is_trained(tmp_path: Path):
    cells = {"a": {}, "b": {"settings": {"train.learning_rate": 1e-4}}}
    path = write_comparison(tmp_path, settings={"method": "seqkd"}, cells=cells)
    read_comparison(path)
    swap_two_tokens(tmp_path / "pair/student/tokenizer.json")
    with pytest.raises(ConfigError, match="teacher and student have different tokenizers"):
        read_comparison(path)


def test_a_template_of_the_evaluation_makes_cells_with_other_ones_alike(tmp_path: Path):
    cells = {"a": {"settings": {"data.template": "plain"}}, "b": {}}
    evaluate = {"data": [str(tmp_path / "questions.jsonl")], "template": "alpaca"}
    read_comparison(write_comparison(tmp_path, cells=cells, evaluate=evaluate))
    with pytest.raises(ConfigError, match=r"has another data.template than a"):
        read_comparison(write_comparison(tmp_path, cells=cells, evaluate=evaluate | {"template": "own"}))
    # Of a cell that was trained with the template itself, its kwargs count.
    cells["b"] = {"settings": {"data.template": "alpaca"}}
    read_comparison(write_comparison(tmp_path, cells=cells, evaluate=evaluate | {"protocol": "paper"}))


@pytest.mark.parametrize(
    ("budget", "limits"),
    [({"unit": "steps", "amount": 1000}, (1000, None, None)), ({"unit": "tokens", "amount": 5}, (None, 5, None)),
     ({"unit": "seconds", "amount": 7.5}, (None, None, 7.5))],
)  # fmt: skip
def test_no_limit_of_the_shared_settings_ends_a_cell_before_its_budget(tmp_path: Path, budget, limits):
    shared = {"train.max_tokens": 50, "train.max_seconds": 60}
    comparison = read_comparison(write_comparison(tmp_path, settings=shared, budget=budget))
    for cell in comparison.cells:
        train = cell.config.train
        assert (train.max_tokens, train.max_seconds, train.num_epochs) == (*limits[1:], None)
        assert train.max_steps == (limits[0] or 1_000_000)


def test_a_warm_up_in_steps_becomes_the_share_of_the_budget_that_it_is_of_the_shared_run(tmp_path: Path):
    shared = {"train.max_steps": 1000, "train.warmup_steps": 50}
    cells = {"switch": {}, "longer": {"settings": {"train.warmup_steps": 200}}, "own": {"settings": {
        "train.warmup_steps": 0.1}}}  # fmt: skip
    tokens = {"unit": "tokens", "amount": 20_000}
    comparison = read_comparison(write_comparison(tmp_path, settings=shared, budget=tokens, cells=cells))
    found = {cell.name: cell.config.train.warmup_steps for cell in comparison.cells}
    assert found == {"switch": 0.05, "longer": 0.2, "own": 0.1, "sft": 0.05}
    said = "train.warmup_steps=50 of train.max_steps=1000 is taken as a share of the budget, 0.05"
    assert f"switch: {said}" in comparison.notes and not any(note.startswith("own") for note in comparison.notes)
    steps = read_comparison(write_comparison(tmp_path, settings=shared, budget={"unit": "steps", "amount": 100}))
    assert {cell.config.train.num_warmup_steps for cell in steps.cells} == {50} and not steps.notes


def test_a_cell_with_nothing_behind_its_name_changes_nothing(tmp_path: Path):
    comparison = read_comparison(
        write_comparison(tmp_path, cells={"switch": None, "gkd": {"settings": {"method": "gkd"}}})
    )
    assert comparison.baseline == "switch"
    assert comparison.cells[0].config == read_comparison(write_comparison(tmp_path)).cells[0].config


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
