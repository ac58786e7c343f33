"""Rules: for every method, changing a setting changes what the run does, or is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest

import qswitch
from qswitch.config import RunConfig, Section, default_of, known_keys, reader, section_at
from qswitch.errors import ConfigError
from qswitch.layers import build_config
from qswitch.methods import METHODS
from qswitch.rules import CONFLICTS, UNREAD, unread
from qswitch.run import distill
from tests.tiny import save_tiny_pair

PACKAGE = Path(qswitch.__file__).parent
MINIMAL = {"teacher": {"model": "big"}, "student": {"model": "small"}, "data": {"train": "prompts.jsonl"}}
SETTINGS_CODE = ("config.py", "rules.py", "layers.py", "presets.py")
"""What handles settings without doing anything because of them; a forecast of memory (plan/) does nothing either."""
CONSUMED_ELSEWHERE = {
    "about.description": "preset_info.py",
    "about.licences": "distill/adapter_card.py",
    "about.gated": "preflight.py",
    "about.twin": "preflight.py",
    "about.paper": "preset_info.py",
    "about.vram": "preset_info.py",
    "about.shape_sources": "preset_info.py",
    "about.name": "distill/adapter_card.py",
    # With a method that loads no teacher: what `qswitch eval RUN` measures the distance from.
    "teacher.precision": "evaluate/subjects.py",
    "teacher.adapter": "evaluate/subjects.py",
    # Models and text that this test's run does not have.
    "student.shape": "preflight.py",
    "teacher.shape": "preflight.py",
    # Turned into steps before training.
    "train.num_epochs": "run.py",
    # DistiLLM's first batches are the data's own.
    "rollout.reuse": "distill/supply.py",
    "rollout.temperature": "distill/supply.py",
}
"""Settings whose consumer does not run in a training run of two small local models -> the file that reads them."""


def another(kind: Any, value: Any) -> Any:
    """A valid value of a field's type that is not `value`."""
    origin = get_origin(kind)
    if origin is Annotated:
        return another(get_args(kind)[0], value)
    if origin in (Union, UnionType):
        members = [k for k in get_args(kind) if k is not type(None)]
        return another(next((k for k in members if get_origin(k) is not Literal), members[0]), value)
    if origin is Literal:
        return next(word for word in reversed(get_args(kind)) if word != value)
    if kind is bool:
        return not value
    if kind is int:
        return value + 1 if isinstance(value, int) else 1
    if kind is float:
        return value * 2 if value == 1e-7 else value * 0.5 if isinstance(value, float) and value else 0.25
    if kind is str:
        return f"{value}-other"
    if origin is list:
        return [another(get_args(kind)[0], 0.5)]
    assert origin is dict, kind
    return {"some": another(get_args(kind)[1], 3)} if get_args(kind)[1] is not Any else {"some": 3}


def value_that_is_not(config: RunConfig, key: str) -> Any:
    """A valid value for a dotted setting, other than the one it has."""
    section, _, name = key.rpartition(".")
    model = section_at(section)
    assert model is not None
    return another(model.model_fields[name].annotation, reader(config)(key))


def names(problem: str, key: str) -> bool:
    """Whether a problem begins with a setting, with its value or not, or with a section that it is in."""
    named = problem.split()[0].partition("=")[0]
    return f"{key}.".startswith(f"{named}.")


def changed(method: str, key: str) -> RunConfig | list[str]:
    """The configuration of a method with one setting changed, or why it is refused."""
    value = value_that_is_not(build_config({**MINIMAL, "method": method}), key)
    try:
        return build_config({**MINIMAL, "method": method}, {key: value})
    except ConfigError as error:
        return error.problems


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pair")
    save_tiny_pair(path)
    rows = [{"prompt": f"say {'abcdefghij'[i % 10] * (1 + i % 7)}", "response": f"it is {i}"} for i in range(12)]
    (path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "held.jsonl").write_text("".join(json.dumps({**row, "prompt": row["prompt"] + "?"}) + "\n" for row in rows))
    (path / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    return path


@pytest.fixture(params=sorted(set(METHODS) - {"custom"}))
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def consumers(method: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Setting -> files of the package that read it in a run of the method, two steps long."""
    config = build_config({
        "method": method,
        "teacher": {"model": str(folder / "teacher"), "precision": "fp32"},
        "student": {"model": str(folder / "student"), "precision": "fp32", "lora": {"r": 2}},
        "data": {"train": str(folder / "data.jsonl"), "validation": str(folder / "held.jsonl"), "num_validation": 2,
                 "lm_corpus": str(folder / "corpus.txt")},
        # The teacher writes much of SWITCH's few tokens, so that there is a loss.
        "rollout": {"max_new_tokens": 6, "batch_size": 2} | ({"decay_rate": 5.0} if method == "switch" else {}),
        "loss": {"lm_passage_tokens": 16},
        "train": {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "device": "cpu",
                  "compute_dtype": "fp32", "eval_steps": 2, "save_steps": 2},
    })  # fmt: skip
    read: dict[tuple[type, str], set[str]] = {}
    plain: Callable[[Any, str], Any] = Section.__getattribute__

    def watched(self: Section, name: str) -> Any:
        caller = Path(sys._getframe(1).f_code.co_filename)
        if caller.is_relative_to(PACKAGE):
            read.setdefault((type(self), name), set()).add(caller.relative_to(PACKAGE).as_posix())
        return plain(self, name)

    monkeypatch.setattr(Section, "__getattribute__", watched)
    distill(config, tmp_path / "run")
    monkeypatch.undo()
    found = {}
    for key in known_keys():
        section, _, name = key.rpartition(".")
        files = read.get((section_at(section), name), set())
        found[key] = {f for f in files if f not in SETTINGS_CODE and not f.startswith("plan/")}
    return found


def test_a_changed_setting_is_read_by_the_run_or_refused(method: str, consumers: dict[str, set[str]]):
    for key in known_keys():
        result = changed(method, key)
        if isinstance(result, list):
            assert any(names(problem, key) for problem in result), (key, result)
            assert not any("Input should" in problem for problem in result), f"{key} was given no valid value"
        elif not consumers[key]:
            assert key in CONSUMED_ELSEWHERE, f"method {method} accepts {key} and nothing in its run reads it"


@pytest.mark.parametrize(("key", "file"), CONSUMED_ELSEWHERE.items())
def test_the_consumer_named_for_a_setting_reads_it(key: str, file: str):
    assert f".{key.rpartition('.')[2]}" in (PACKAGE / file).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("method", "setting", "value"),
    [
        ("kd", "loss.scope", "interventions"),
        ("kd", "rollout.decay_rate", 0.2),
        ("kd", "rollout.block_tokens", 4),
        ("kd", "rollout.student_graphs", "off"),
        ("seqkd", "loss.scope", "interventions"),
        ("seqkd", "cache.format", "topk"),
        ("seqkd", "cache.host_budget_gib", 1.0),
        ("seqkd", "rollout.block_tokens", 0),
        ("sft", "cache.format", "topk"),
        ("sft", "cache.device_budget_gib", 1.0),
        ("sft", "rollout.tau_0", 0.5),
        ("sft", "rollout.steps_at_once", 2),
        ("sft", "teacher.residency", "swap"),
        ("imitkd", "rollout.block_tokens", 4),
        ("distillm", "rollout.reuse", 2),
        ("distillm", "data.ground_truth_mix", 0.5),
        ("sft", "data.adaptive_share", True),
        ("gkd", "data.adaptive_share", True),
        ("gkd", "rollout.skd_top_k", 3),
        ("skd", "rollout.decay_rate", 0.2),
        ("switch", "data.lm_corpus_tokens", 9),
    ],
)
def test_a_setting_without_effect_is_refused_in_one_message(method: str, setting: str, value: Any):
    with pytest.raises(ConfigError) as caught:
        build_config({**MINIMAL, "method": method, setting: value})
    (problem,) = caught.value.problems
    assert names(problem, setting) and problem.endswith(".")


@pytest.mark.parametrize("method", ["kd", "seqkd"])
@pytest.mark.parametrize("setting", ["rollout.teacher_graphs", "rollout.temperature", "cache.format"])
def test_a_run_from_stored_responses_refuses_what_only_a_teacher_in_memory_reads(method: str, setting: str):
    base = {**MINIMAL, "method": method}
    values = {"teacher.responses": "store", setting: value_that_is_not(build_config(base), setting)}
    with pytest.raises(ConfigError, match=rf"{setting.partition('.')[0]}[a-z_.]* has no effect"):
        build_config(base, values)


@pytest.mark.parametrize("key", [k for rule in UNREAD for k in rule.settings])
def test_a_rule_names_what_exists(key: str):
    assert key in known_keys() or section_at(key) is not None


def test_every_rule_speaks_somewhere():
    """A condition that never fails would be a row without use; every message's values can be filled in."""
    configs = [build_config({**MINIMAL, "method": m}) for m in METHODS]
    configs += [
        build_config(MINIMAL, {"rollout": {"schedule": schedule}}) for schedule in ("linear", "constant", "growth")
    ]
    others: list[dict[str, Any]] = [{"student.adapter": "none"}, {"data.template": "alpaca"}, {"epochs": 1},
                                   {"method": "kd", "teacher.responses": "store"},
                                   {"method": "seqkd", "student.tokenizer": "own"},
                                   {"loss.divergence_teacher_tokens": "forward_kl"}]  # fmt: skip
    configs += [build_config(MINIMAL, other) for other in others]
    said = [text for config in configs for text in unread(reader(config)).values()]
    assert said and not any("{" in text for text in said)
    silent = [rule.settings for rule in UNREAD if all(rule.read_when(reader(config)) for config in configs)]
    assert not silent
    assert all(not conflict.when(reader(config)) for conflict in CONFLICTS for config in configs)


CONTRADICTIONS: list[tuple[str, dict[str, Any]]] = [
    ("teacher.responses cannot be used", {"method": "switch", "teacher.responses": "store"}),
    ("student.tokenizer=own cannot be combined", {"method": "gkd", "student.tokenizer": "own"}),
    ("teacher.responses holds tokens", {"method": "seqkd", "student.tokenizer": "own", "teacher.responses": "store"}),
    ("data.ground_truth_mix=1 contradicts", {"method": "switch", "data.ground_truth_mix": 1.0}),
    ("data.adaptive_share contradicts", {"method": "gkd", "data.adaptive_share": True}),
    ("rollout.steps_at_once=2 cannot be combined", {"rollout.steps_at_once": 2, "rollout.reuse": 2}),
    ("rollout.reuse=17 is out of reach with 16 sequences", {"rollout.reuse": 17}),
    (
        "rollout.reuse=8 with data.ground_truth_mix=0.5 takes about 16 steps",
        {"method": "gkd", "rollout.reuse": 8, "rollout.replay_max_age_steps": 15},
    ),
    (
        "loss.objective=cross_entropy with rollout.policy=student",
        {"method": "custom", "loss.objective": "cross_entropy", "rollout.policy": "student"},
    ),
    (
        "loss.scope=interventions means nothing",
        {"method": "custom", "rollout.policy": "student", "loss.scope": "interventions"},
    ),
    (
        "rollout.teacher_share adapts",
        {"rollout.teacher_share": 0.5, "rollout.schedule": "constant", "rollout.constant_threshold": 0.0},
    ),
    ("cache.format=topk holds", {"cache.format": "topk", "loss.temperature": 2.0}),
    ("data.weights has 3 entries", {"data.train": ["a", "b"], "data.weights": [1.0, 1.0, 1.0]}),
    ("data.weights = [1.0, 0.0]: every weight", {"data.train": ["a", "b"], "data.weights": [1.0, 0.0]}),
    ("data.weights has no effect with one entry", {"data.weights": [1.0]}),
    ("student.precision=nf4 cannot be trained", {"student.adapter": "none", "student.precision": "nf4"}),
    ("train.warmup_steps (7) must be below", {"train.warmup_steps": 7, "train.max_steps": 7}),
    ("train.warmup_steps=1 counts steps", {"train.warmup_steps": 1, "train.max_tokens": 900, "train.max_steps": 7}),
    (
        "Between two tokenizers the teacher writes before the student learns",
        {"method": "seqkd", "student.tokenizer": "own", "train.max_seconds": 60},
    ),
    ("teacher.residency=swap cannot be", {"teacher.num_gpus": 2, "teacher.residency": "swap"}),
    ("teacher.num_gpus=2 needs GPUs", {"teacher.num_gpus": 2, "train.device": "cpu"}),
    ("train.optimizer=paged_adamw_8bit needs", {"train.optimizer": "paged_adamw_8bit", "train.device": "cpu"}),
]
"""Beginning of what is said -> settings that contradict each other, in the order of CONFLICTS."""


@pytest.mark.parametrize(("says", "settings"), CONTRADICTIONS, ids=[says for says, _ in CONTRADICTIONS])
def test_settings_that_contradict_each_other_are_refused(says: str, settings: dict[str, Any]):
    with pytest.raises(ConfigError) as caught:
        build_config(MINIMAL, settings)
    assert any(problem.startswith(says) for problem in caught.value.problems), caught.value.problems


def test_no_contradiction_is_left_out():
    assert len(CONTRADICTIONS) == len(CONFLICTS)


def test_a_resolved_configuration_has_no_setting_that_differs_without_effect():
    for method in METHODS:
        config = build_config({**MINIMAL, "method": method})
        assert all(reader(config)(key) == default_of(key, method) for key in known_keys() if key not in
                   ("method", "teacher.model", "student.model", "data.train"))  # fmt: skip
