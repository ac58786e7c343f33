"""Configuration: every problem at once, nothing without effect, a docstring for every field."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

from qswitch import config as config_module
from qswitch.config import LoraSection, RunConfig, known_keys
from qswitch.errors import ConfigError
from qswitch.layers import ALIASES, build_config, dump_config, set_layer, stack

MINIMAL = {"teacher": {"model": "big"}, "student": {"model": "small"}, "data": {"train": "prompts.jsonl"}}


def build(*overrides: str) -> RunConfig:
    return build_config(MINIMAL, set_layer(list(overrides)))


def refused(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build(*overrides)
    return caught.value.problems


def test_a_resolved_configuration_builds_an_equal_one():
    config = build("train.learning_rate=3e-4", "rollout.schedule=linear", "student.lora.r=64")
    assert build_config(yaml.safe_load(dump_config(config))) == config


def test_overrides_are_yaml_and_scientific_notation_is_a_number():
    config = build("train.learning_rate=1e-4", "data.train=[a.jsonl, b.jsonl]", "teacher.revision=main")
    assert config.train.learning_rate == 1e-4
    assert config.data.train == ["a.jsonl", "b.jsonl"]
    assert config.teacher.revision == "main"


def test_stacking_leaves_the_layers_alone():
    stack(MINIMAL, {"teacher": {"model": "other"}})
    assert MINIMAL["teacher"] == {"model": "big"}


@pytest.mark.parametrize("override", ["train.max_steps", "=3", "train.max_steps=[1"])
def test_a_malformed_override_is_named(override: str):
    assert len(refused(override)) == 1
    assert repr(override) in refused(override)[0]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("train.max_step=3", "train.max_steps"),
        ("rollout.decay=0.2", "rollout.decay_rate"),
        ("student.lora.rank_patern={}", "student.lora.rank_pattern"),
        ("trian.max_steps=3", "train"),
        ("learning_rat=1", "learning_rate"),
        ("loss.decay_rate=0.2", "rollout.decay_rate"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_spelling(wrong: str, right: str):
    (problem,) = refused(wrong)
    assert f"Did you mean {right}?" in problem


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("train.epoch=3", "Did you mean train.num_epochs?"),
        ("precision=bf16", "Did you mean teacher.precision or student.precision?"),
        ("lora.r=3", "Did you mean student.lora?"),
        ("method=gdk", "Did you mean gkd?"),
        ("teacher.precision=nf3", "Did you mean nf4?"),
        ("packing=true", "share a micro-batch"),
        ("sequence_len=512", "set data.max_prompt_tokens and rollout.max_new_tokens"),
        ("val_set_size=0.1", "set data.num_validation"),
        ("finetuning_type=full", "student.adapter=none"),
        ("use_vllm=true", "Remove it"),
        ("attn_implementation=flash_attention_2", "scaled_dot_product_attention"),
        ("student.lora.rank=8", "set student.lora.r"),
    ],
)
def test_a_setting_of_another_tool_is_answered(wrong: str, said: str):
    (problem,) = refused(wrong)
    assert said in problem


@pytest.mark.parametrize(
    "wrong", ["gamma=1", "quantization=4", "nonsense=1", "train.batch=3", "student.lora.layers_x=1"]
)
def test_no_suggestion_is_better_than_a_wrong_one(wrong: str):
    (problem,) = refused(wrong)
    assert "Did you mean" not in problem and "Known here: " in problem


def test_all_problems_are_reported_at_once():
    problems = refused("train.max_steps=0", "rollout.tau_0=2", "loss.divergence=kl", "nonsense=1")
    for key in ("train.max_steps", "rollout.tau_0", "loss.divergence", "nonsense"):
        assert any(key in problem for problem in problems), key


def test_a_missing_setting_is_named():
    with pytest.raises(ConfigError, match=r"data\.train is missing"):
        build_config({"teacher": {"model": "big"}, "student": {"model": "small"}, "data": {}})


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.policy=student", "loss.scope=all", "rollout.tau_0=0.5"],
        ["rollout.schedule=constant", "rollout.decay_rate=0.3"],
        ["rollout.schedule=linear", "rollout.decay_rate=0.3"],
        ["rollout.teacher_probability=0.1"],
        ["rollout.policy=student"],
        ["rollout.policy=mixture"],
        ["loss.divergence=forward_kl", "loss.alpha=0.3"],
        ["loss.beta=0.3"],
        ["cache.format=topk", "loss.temperature=2"],
        ["cache.topk=8"],
        ["loss.lm_coefficient=2"],
        ["student.adapter=none", "student.precision=nf4"],
        ["student.adapter=none", "student.lora.r=8"],
        ["train.max_steps=10", "train.warmup_steps=10"],
        ["train.device=cpu", "train.optimizer=paged_adamw_8bit"],
    ],
    ids=" ".join,
)
def test_a_setting_without_effect_is_refused(overrides: list[str]):
    assert len(refused(*overrides)) == 1


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_an_alias_of_the_hugging_face_tools_names_an_existing_setting(alias: str):
    assert ALIASES[alias] in known_keys()


def test_aliases_work_in_files_and_overrides():
    assert build("lora_r=8").student.lora.r == 8
    assert build_config({**MINIMAL, "per_device_train_batch_size": 2}).train.per_device_train_batch_size == 2


def test_an_alias_beside_its_setting_with_another_value_is_refused():
    with pytest.raises(ConfigError, match="keep one"):
        build_config({**MINIMAL, "learning_rate": 1e-3, "train": {"learning_rate": 1e-4}})


def test_every_field_has_a_docstring():
    """Read from the source: nothing is paid for it at start-up."""
    tree = ast.parse(Path(config_module.__file__).read_text(encoding="utf-8"))
    checked = 0
    for section in [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name.endswith("Section")]:
        for field, following in zip(section.body, [*section.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                checked += 1
                name = f"{section.name}.{ast.unparse(field.target)}"
                assert isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant), name
    assert checked > 70


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("q_proj", ["q_proj"]),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("self_attn.q_proj, lm_head", ["self_attn.q_proj", "lm_head"]),
        ("all-linear", "all-linear"),
        (r"model\.layers\.\d+\.mlp\..*", r"model\.layers\.\d+\.mlp\..*"),
    ],
)
def test_names_of_modules_are_a_list_and_an_expression_stays_one(written: str, read: str | list[str]):
    assert LoraSection(target_modules=written).target_modules == read
