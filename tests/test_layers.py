"""Layers: the same settings make the same run, whichever door they come through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qswitch.cli import run
from qswitch.compare.spec import read_comparison
from qswitch.config import RunConfig, known_keys
from qswitch.errors import ConfigError
from qswitch.layers import build_config, by_section, dump_config, set_layer, stack
from qswitch.presets import load_preset, load_run_config
from qswitch.units import UNLIMITED_STEPS
from tests.test_rules import value_that_is_not

MINIMAL = {"teacher": {"model": "big"}, "student": {"model": "small"}, "data": {"train": "prompts.jsonl"}}
BASE = {
    **MINIMAL,
    "rollout": {"decay_rate": 0.3, "max_new_tokens": 64},
    "student": {"model": "small", "lora": {"r": 8, "rank_pattern": {"q_proj": 4}}},
    "train": {"learning_rate": 3e-4, "eval_steps": 7, "max_steps": 9},
    "seed": 1,
}
# Every setting is at most once among a draw's; mappings, null, on/off and numbers that YAML reads as text are there.
CHOICES: dict[str, list[Any]] = {
    "method": ["gkd", "kd", "sft", "distillm", None],
    "rollout.decay_rate": [0.2, 1e-5, None],
    "rollout.student_graphs": [False, "off", "auto", None],
    "loss": [{"temperature": 2.0, "chunk_tokens": 64}, {"chunk_tokens": None}, None],
    "student.lora": [{"alpha": 4}, {"rank_pattern": {"k_proj": 2}}, {"rank_pattern": {"q_proj": None}}, None],
    "data.columns": [{"prompt": "question"}, {}, None],
    "train": [{"eval_steps": 5}, {"eval_steps": None, "learning_rate": 1e-5}, None],
    "optim": ["adamw", None],
    "report_to": ["wandb", ["tensorboard"], "none", None],
}


@st.composite
def written_settings(draw: st.DrawFn) -> dict[str, Any]:
    keys = draw(st.lists(st.sampled_from(sorted(CHOICES)), unique=True, max_size=5))
    if "train" in keys:  # they are the same section, and null for all of it leaves no room for one of them
        keys = [key for key in keys if key not in ("optim", "report_to")]
    return {key: draw(st.sampled_from(CHOICES[key])) for key in keys}


def outcome(build: Any) -> RunConfig | list[str]:
    try:
        return build()
    except ConfigError as error:
        return error.problems


def through_every_door(folder: Path, monkeypatch: pytest.MonkeyPatch, written: dict[str, Any]) -> None:
    """The same settings over `BASE` by file, dotted or not, by preset, by --set in either order, and by a cell."""
    base = folder / "base.yaml"
    base.write_text(yaml.safe_dump(BASE))
    texts = [f"{key}={json.dumps(value)}" for key, value in written.items()]

    by_file, dotted = folder / "mine.yaml", folder / "dotted.yaml"
    by_file.write_text(yaml.safe_dump({"extends": "base.yaml", **by_section(written)}))
    dotted.write_text(yaml.safe_dump({"extends": "base", **written}))  # "base" is a preset here
    with monkeypatch.context() as patch:
        patch.setattr("qswitch.presets.presets_folder", lambda: folder)
        found = [
            outcome(lambda: load_run_config(by_file)),
            outcome(lambda: load_run_config("dotted")),
            outcome(lambda: load_run_config("base", texts)),
            outcome(lambda: load_run_config(base, list(reversed(texts)))),
            outcome(lambda: build_config(BASE, written)),
        ]
    assert all(one == found[0] for one in found), written

    # The budget of a comparison is its last layer, so it is the last layer of the others too.
    budget = {"seed": 1, "train": {"max_steps": 9, "num_epochs": None}}
    comparison, questions = folder / "comparison.yaml", folder / "questions.jsonl"
    questions.write_text('{"prompt": "why", "response": "so"}\n')
    comparison.write_text(yaml.safe_dump({
        "run": "base.yaml", "budget": {"unit": "steps", "amount": 9}, "evaluate": {"data": [str(questions)]},
        "cells": {"only": {"settings": written}, "control": {"settings": {"method": "sft"}}},
    }))  # fmt: skip
    cells = outcome(lambda: next(c.config for c in read_comparison(comparison).cells if c.name == "only"))
    expected = outcome(lambda: build_config(BASE, written, budget))
    if isinstance(expected, RunConfig) and isinstance(cells, list):  # one may differ between runs only
        assert all("for every cell" in problem for problem in cells), written
    else:
        assert cells == expected if isinstance(expected, RunConfig) else isinstance(cells, list), written


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(written=written_settings())
def test_one_configuration_through_every_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: dict[str, Any]):
    through_every_door(tmp_path, monkeypatch, written)


@pytest.mark.parametrize("key", [key for key in known_keys() if key != "about.twin"])
def test_every_setting_comes_through_every_door_alike(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    through_every_door(tmp_path, monkeypatch, {key: value_that_is_not(build_config(BASE), key)})
    through_every_door(tmp_path, monkeypatch, {key: None})


def test_a_mapping_on_the_command_line_merges_like_one_in_a_file():
    config = load_run_config("llama-7b-to-1b", ["train={max_steps: 60}", "student.lora={r: 8}"])
    preset = load_run_config("llama-7b-to-1b")
    assert (config.train.max_steps, config.student.lora.r) == (60, 8)
    assert config.train.learning_rate == preset.train.learning_rate
    assert config.student.lora.alpha == preset.student.lora.alpha


def test_null_restores_the_default_of_the_method_and_of_the_class():
    assert build_config(BASE, set_layer(["rollout.decay_rate=null"])).rollout.decay_rate == 0.1
    gkd = build_config(
        {**MINIMAL, "method": "gkd", "loss": {"divergence": "forward_kl"}}, {"loss": {"divergence": None}}
    )
    assert gkd.loss.divergence == "jsd"
    assert build_config(BASE, set_layer(["train="])).train == build_config(MINIMAL).train


@pytest.mark.parametrize(("text", "value"), [("off", "off"), ("no", "off"), ("false", "off"), ("auto", "auto")])
def test_on_off_settings_understand_what_yaml_reads_as_a_boolean(text: str, value: str):
    assert build_config(MINIMAL, set_layer([f"rollout.student_graphs={text}"])).rollout.student_graphs == value


@pytest.mark.parametrize(
    ("override", "key"),
    [("lr=2e-4", "train.learning_rate"), ("train.lr=2e-4", "train.learning_rate"),
     ("student.lora.lora_r=2", "student.lora.r"), ("student.lora_r=2", "student.lora.r")],
)  # fmt: skip
def test_an_alias_is_understood_in_its_own_section_too(override: str, key: str):
    value = yaml.safe_load(override.partition("=")[2])
    assert build_config(MINIMAL, set_layer([override])) == build_config(MINIMAL, {key: value})


def test_epochs_take_the_place_of_steps():
    for name in ("epochs", "num_train_epochs", "train.num_epochs"):
        config = load_run_config("llama-7b-to-1b", [f"{name}=3"])
        assert (config.train.num_epochs, config.train.max_steps) == (3, 200), "the preset's steps are not inherited"
    with pytest.raises(ConfigError, match=r"train\.max_steps has no effect with train\.num_epochs"):
        build_config(MINIMAL, {"epochs": 3, "max_steps": 50})


def test_a_budget_of_tokens_or_seconds_takes_the_place_of_steps():
    for limit in ("max_tokens", "max_seconds"):
        night = load_run_config("qwen2.5-7b-to-1.5b", [f"train.{limit}=28800"])
        assert night.train.step_limit is None, "the preset's 1,000 steps are not inherited"
        assert load_run_config("qwen2.5-7b-to-1.5b", [f"train.{limit}=9", "train.max_steps=7"]).train.step_limit == 7
        again = build_config(yaml.safe_load(dump_config(night)))
        assert again == night and again.train.step_limit is None, "RUN/config.yaml says the same"


LIMITS = {"max_steps": 40, "num_epochs": 2.0, "max_tokens": 5000, "max_seconds": 60.0}


@pytest.mark.parametrize("below", LIMITS)
@pytest.mark.parametrize("above", LIMITS)
def test_the_highest_place_that_names_a_limit_says_all_of_them(below: str, above: str):
    """Whatever a place below said, in a file or as a whole written configuration."""
    file = {**MINIMAL, "train": {below: LIMITS[below]}}
    alone = build_config(MINIMAL, {f"train.{above}": 7})
    assert build_config(file, {f"train.{above}": 7}) == alone
    assert build_config(yaml.safe_load(dump_config(build_config(file))), {f"train.{above}": 7}) == alone
    assert build_config(file, {"train.save_steps": 9}).train.model_copy(update={"save_steps": 50}) == (
        build_config(file).train
    ), "who names none changes none"


def test_no_limit_is_no_number_of_steps_where_the_budget_is_taken_back():
    night = yaml.safe_load(dump_config(build_config(MINIMAL, {"train.max_tokens": 5000})))
    assert night["train"]["max_steps"] == UNLIMITED_STEPS
    for taken_back in ({"train": {"max_tokens": None}}, {"train": {"max_tokens": None, "save_steps": 50}}):
        assert build_config(night, taken_back).train == build_config(MINIMAL).train, "the default ends it"
    both = build_config(MINIMAL, {"train": {"max_tokens": 5000, "max_steps": 40}})
    assert build_config(yaml.safe_load(dump_config(both)), {"train": {"max_tokens": None}}).train.max_steps == 40
    other = build_config(night, {"train": {"max_tokens": None, "max_seconds": 60}}).train
    assert (other.step_limit, other.max_tokens, other.max_seconds) == (None, None, 60)
    texts = {**MINIMAL, "train": {"max_tokens": "5e3", "max_steps": "4e1"}}
    assert build_config(texts, {"train.save_steps": 3}).train.max_steps == 40


def test_temperature_is_two_settings_of_which_one_must_be_named():
    """DistillationConfig of TRL samples and learns at it, GKDConfig samples."""
    with pytest.raises(ConfigError, match=r"set rollout.temperature for sampling.*loss.temperature for the loss"):
        build_config(MINIMAL, {"temperature": 2})


def test_a_pattern_with_dots_is_one_key():
    config = build_config(MINIMAL, set_layer(["student.lora.rank_pattern.layers.0.q_proj=8"]))
    assert config.student.lora.rank_pattern == {"layers.0.q_proj": 8}


@pytest.mark.parametrize("number", ["1e3", "1000", "1000.0"])
def test_a_number_is_a_number_in_every_spelling(number: str, tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(MINIMAL) + f"train:\n  max_steps: {number}\n")
    assert load_run_config(file).train.max_steps == 1000
    assert build_config(MINIMAL, set_layer([f"train.max_steps={number}"])).train.max_steps == 1000


def test_text_that_looks_like_a_number_stays_text():
    assert build_config(MINIMAL, set_layer(["teacher.revision=1e4"])).teacher.revision == "1e4"


def test_of_two_options_for_one_setting_the_later_counts():
    assert set_layer(["train.max_steps=1", "max_steps=2", "train={eval_steps: 3}"]) == {
        "train": {"max_steps": 2, "eval_steps": 3}
    }


@pytest.mark.parametrize(
    ("below", "above", "gone"),
    [
        ({"rollout": {"decay_rate": 0.3}}, {"rollout": {"schedule": "constant"}}, "rollout.decay_rate"),
        ({"cache": {"format": "topk", "topk": 8}}, {"cache": {"format": "hidden"}}, "cache.topk"),
        ({"cache": {"device_budget_gib": 2}}, {"method": "sft"}, "cache"),
        ({"student": {"lora": {"r": 4}}}, {"student": {"adapter": "none"}}, "student.lora"),
        ({"data": {"lm_corpus": "a", "lm_corpus_tokens": 9}}, {"data": {"lm_corpus": None}}, "data.lm_corpus_tokens"),
        ({"teacher": {"model": "a", "shape": {"x": 1}}}, {"teacher": {"model": "b"}}, "teacher.shape"),
        ({"teacher": {"model": "a", "revision": "v1"}}, {"teacher": {"model": "b"}}, "teacher.revision"),
        ({"teacher": {"model": "a", "adapter": "x"}}, {"teacher": {"model": "b"}}, "teacher.adapter"),
        ({"student": {"model": "a", "init_adapter": "x"}}, {"student": {"model": "b"}}, "student.init_adapter"),
        (
            {"student": {"model": "a", "trust_remote_code": True}}, {"student": {"model": "b"}},
            "student.trust_remote_code",
        ),
        ({"loss": {"alpha": 0.3}}, {"loss": {"divergence": "jsd"}}, "loss.alpha"),
        ({"method": "gkd", "loss": {"beta": 0.3}}, {"method": "adaswitch"}, "loss.beta"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_layer_makes_meaningless_is_not_inherited(below: dict, above: dict, gone: str):
    result = stack(below, above)
    for part in gone.split("."):
        if part not in result:
            return
        result = result[part]
    assert result == {}


def test_what_a_layer_says_itself_is_not_dropped():
    with pytest.raises(ConfigError, match=r"rollout\.decay_rate has no effect with schedule constant"):
        build_config(MINIMAL, {"rollout": {"schedule": "constant", "decay_rate": 0.3}})
    with pytest.raises(ConfigError, match=r"rollout\.decay_rate has no effect with method=kd"):
        build_config({**MINIMAL, "method": "kd"}, {"rollout": {"decay_rate": 0.3}})


def test_the_ungated_twin_keeps_the_shape_and_another_model_does_not():
    assert load_preset("llama-7b-to-1b-open")["teacher"]["shape"] == load_preset("llama-7b-to-1b")["teacher"]["shape"]
    assert "shape" not in stack(load_preset("llama-7b-to-1b"), {"teacher": {"model": "org/other"}})["teacher"]


# Bad values for the doors of this module: one message, exit 2, and the message says where.
BAD = [
    ("train=5", "train = 5"),
    ("train=[1]", "train = [1]"),
    ("train.max_steps={a: 1}", "train.max_steps"),
    ("rollout.student_graphs=on", "rollout.student_graphs"),
    ("rollout.student_graphs=true", "rollout.student_graphs"),
    ("train.max_steps=yes", "train.max_steps = true: expected a number"),
    ("train.learning_rate=fast", "train.learning_rate = 'fast'"),
    ("report_to=comet", "train.report_to"),
    ("lmbda=0.5", "1 - lmbda"),
    ("batch_size=4", "train.per_device_train_batch_size"),
    ("loss.lr=1", "Did you mean train.learning_rate?"),
    ("student.lora.rank_pattern={'[': 3}", "no regular expression"),
    ("student.lora.rank_pattern=3", "student.lora.rank_pattern"),
    ("method=[gkd]", "method = ['gkd']"),
    ("method=off", "method = False"),
    ("train.max_steps=1e400", "train.max_steps"),
    ("extends=smollm2-demo", "extends is not a setting"),
    ("a..b=1", "a is not a setting"),
    ("data.train={a: b}", "data.train"),
    ("seed=-1", "seed = -1"),
    ("=", "write it as section.key=value"),
    ("train.max_steps=5 5", "train.max_steps"),
]


@pytest.mark.parametrize(("override", "said"), BAD, ids=[text for text, _ in BAD])
def test_a_bad_value_is_one_message(override: str, said: str, capsys: pytest.CaptureFixture[str]):
    assert run(["plan", "--preset", "smollm2-demo", "--set", override]) == 2
    printed = capsys.readouterr().err
    assert printed.count("error:") == 1 and said in printed and "Traceback" not in printed


def test_a_file_that_says_one_setting_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**MINIMAL, "train": 5, "lr": 1e-3}))
    assert run(["plan", "--config", str(file)]) == 2
    assert "train is written twice" in capsys.readouterr().err
