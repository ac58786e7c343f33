"""`method:` is a bundle of defaults: what it fills in, what wins over it, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qswitch.config import RunConfig
from qswitch.errors import ConfigError
from qswitch.layers import build_config, dump_config, set_layer
from qswitch.methods import FIXED, METHODS, OWNED, bundle_values
from qswitch.presets import load_run_config

MINIMAL = {"teacher": {"model": "big"}, "student": {"model": "small"}, "data": {"train": "prompts.jsonl"}}

# (policy, objective, divergence, scope, ground_truth_mix) as docs/methods.md has them; None: not read.
EXPECTED = {
    "switch": ("switch", "divergence", "skew_reverse_kl", "interventions", 0.0),
    "switch-paper": ("switch", "divergence", "skew_reverse_kl", "all", 0.5),
    "sft": (None, "cross_entropy", None, "all", 1.0),
    "kd": (None, "divergence", "forward_kl", "all", 1.0),
    "seqkd": ("teacher", "cross_entropy", None, "all", 0.0),
    "gkd": ("student", "divergence", "jsd", "all", 0.5),
    "imitkd": ("student", "divergence", "forward_kl", "all", 0.0),
    "distillm": ("student", "divergence", "skew_reverse_kl", "all", 0.0),
    "skd": ("skd", "divergence", "forward_kl", "all", 0.0),
    "adaswitch": ("adaswitch", "divergence", "skew_reverse_kl", "all", 0.0),
}


def build(*overrides: str) -> RunConfig:
    return build_config(MINIMAL, set_layer(list(overrides)))


@pytest.mark.parametrize("method", EXPECTED)
def test_a_method_fills_in_its_settings(method: str):
    policy, objective, divergence, scope, mix = EXPECTED[method]
    config = build(f"method={method}")
    found = (config.rollout.policy, config.loss.objective, config.loss.divergence, config.loss.scope)
    for value, expected in zip(found, (policy, objective, divergence, scope), strict=True):
        assert expected is None or value == expected
    assert config.data.ground_truth_mix == mix
    assert build_config(yaml.safe_load(dump_config(config))) == config


def test_gkd_weighs_its_jsd_like_the_published_code():
    assert build("method=gkd").loss.beta == 0.1


def test_only_sft_needs_no_teacher():
    assert [m for m in EXPECTED if not build(f"method={m}").needs_teacher] == ["sft"]


def test_written_settings_win_over_the_bundle():
    config = build("method=gkd", "loss.beta=0.5", "data.ground_truth_mix=0.25")
    assert (config.loss.beta, config.data.ground_truth_mix, config.loss.divergence) == (0.5, 0.25, "jsd")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["method=sft", "data.ground_truth_mix=0.5"], "data.ground_truth_mix"),
        (["method=sft", "loss.objective=divergence"], "loss.objective"),
        (["method=kd", "data.ground_truth_mix=0"], "data.ground_truth_mix"),
        (["method=gkd", "rollout.policy=switch"], "rollout.policy"),
        (["method=imitkd", "data.ground_truth_mix=0.5"], "data.ground_truth_mix"),
        (["method=switch", "rollout.policy=student"], "rollout.policy"),
        (["method=switch", "data.ground_truth_mix=1"], "data.ground_truth_mix"),
        (["method=seqkd", "rollout.policy=random"], "rollout.policy"),
        (["method=distillm", "data.adaptive_share=false"], "data.adaptive_share"),
        (["method=distillm", "data.ground_truth_mix=0.5"], "data.ground_truth_mix"),
        (["method=skd", "rollout.policy=adaswitch"], "rollout.policy"),
    ],
    ids=str,
)
def test_a_contradiction_is_refused_and_names_the_way_out(overrides: list[str], named: str):
    with pytest.raises(ConfigError, match="contradicts method") as caught:
        build(*overrides)
    assert any(named in problem for problem in caught.value.problems)


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=sft", "loss.divergence=jsd"],
        ["method=sft", "rollout.temperature=0.5"],
        ["method=sft", "rollout.policy=student"],
        ["method=seqkd", "loss.temperature=2"],
        ["data.share_tolerance_nats=0.2"],
        ["method=gkd", "rollout.replay_capacity=10"],
        ["method=custom", "rollout.policy=student", "loss.objective=cross_entropy"],
    ],
    ids=str,
)
def test_what_a_method_does_not_read_is_refused(overrides: list[str]):
    with pytest.raises(ConfigError):
        build(*overrides)


def test_settings_of_another_policy_without_a_method_are_custom():
    assert build().method == "switch"
    assert build("rollout.policy=student", "loss.scope=all").method == "custom"
    assert build("data.ground_truth_mix=1").method == "custom"


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="method = 'gdk'"):
        build("method=gdk")


def test_another_method_on_the_command_line_takes_the_files_method_settings_away(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    mine = {
        **MINIMAL,
        "beta": 0.3,
        "loss": {"divergence": "jsd", "chunk_tokens": 64},
        "rollout": {"decay_rate": 0.05, "max_new_tokens": 64},
    }
    file.write_text(yaml.safe_dump(mine))
    config = load_run_config(file, ["method=imitkd"])
    assert (config.rollout.policy, config.loss.divergence) == ("student", "forward_kl")
    assert (config.rollout.max_new_tokens, config.loss.chunk_tokens) == (64, 64), "not the method's business"
    assert load_run_config(file, ["method=switch"]).rollout.decay_rate == 0.05, "the same method keeps its settings"


def test_a_file_that_extends_another_may_change_its_method(tmp_path: Path):
    (tmp_path / "below.yaml").write_text(yaml.safe_dump({**MINIMAL, "method": "gkd", "loss": {"beta": 0.3}}))
    (tmp_path / "above.yaml").write_text("extends: below.yaml\nmethod: sft\n")
    assert load_run_config(tmp_path / "above.yaml").loss.objective == "cross_entropy"


def test_every_bundle_setting_belongs_to_a_method():
    """Else it would survive a change of method and turn up in another one."""
    for method in METHODS:
        assert {dotted for dotted, _ in bundle_values(method)} <= set(OWNED)
        assert set(FIXED[method]) <= {dotted for dotted, _ in bundle_values(method)}
