"""Both model cards give the licences of what the run used, and of nothing else."""

import gzip

import pytest
import yaml

from qswitch.distill.adapter_card import OWN, UNKNOWN, WORSE, adapter_card, licence_lines
from qswitch.export.card import model_card
from qswitch.layers import build_config
from qswitch.preset_index import read_index
from qswitch.presets import load_run_config

PRESET = "qwen2.5-7b-to-1.5b"
TEACHER, STUDENT = "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"
DOLLY = "databricks/databricks-dolly-15k"
SUMMARY = {
    "student": "s", "teacher": "t", "steps": 3, "validation_prompts": 2, "device": "cpu", "peak_gib": 1.0,
    "planned_gib": 1.0, "kl_before_nats": 2.0, "kl_after_nats": 1.0, "response_loss_before_nats": 2.0,
    "response_loss_after_nats": 1.0,
}  # fmt: skip


def config_of(preset=PRESET, **above):
    return build_config(load_run_config(preset).model_dump(exclude_unset=True), above)


def cards(config, summary=SUMMARY):
    return adapter_card(config, summary), model_card(config, "name", summary, 0.0, "bf16")


def listed(card):
    return [line for line in card.partition("Licences of what it is made from:")[2].splitlines()
            if line.startswith("- ")]  # fmt: skip


def test_a_preset_as_it_is_lists_its_models_and_its_data():
    for card in cards(config_of()):
        assert listed(card) == [f"- {TEACHER}: Apache-2.0", f"- {STUDENT}: Apache-2.0", f"- {DOLLY}: CC-BY-SA-3.0"]


def test_what_was_overridden_is_not_claimed_and_what_replaced_it_is_named(tmp_path):
    mine = tmp_path / "mine.jsonl.gz"
    mine.write_bytes(gzip.compress(b'{"prompt": "a"}\n'))
    config = config_of(student={"model": "foo/noncommercial-0.5b"}, data={"train": [str(mine), "own/set:part"]})
    for card in cards(config):
        assert listed(card) == [
            f"- {TEACHER}: Apache-2.0",
            f"- foo/noncommercial-0.5b: {UNKNOWN}",
            f"- mine.jsonl.gz: {OWN}",
            f"- own/set:part: {UNKNOWN}",
        ]
        assert STUDENT not in card and "dolly" not in card and str(tmp_path) not in card
    assert "license" not in yaml.safe_load(cards(config)[1].split("---")[1])
    mine.unlink()  # it need not be there any more when the run is merged
    assert f"- mine.jsonl.gz: {OWN}" in licence_lines(config)


def test_settings_tell_a_licence_also_of_a_folder_and_of_a_subset(tmp_path):
    told = {"foo/small": "Gemma Terms of Use", str(tmp_path): "CC0-1.0", "own/set": "ODC-BY"}
    data = {"train": ["own/set:part", str(tmp_path)]}
    config = config_of(about={"licences": told}, student={"model": ["package:x/y.gguf", "foo/small"]}, data=data)
    assert licence_lines(config) == [
        f"- {TEACHER}: Apache-2.0",
        "- foo/small: Gemma Terms of Use",
        "- own/set: ODC-BY",
        f"- {tmp_path.name}: CC0-1.0",
    ]
    header = yaml.safe_load(cards(config)[1].split("---")[1])
    assert (header["license"], header["license_name"]) == ("other", "Gemma Terms of Use")


def test_cards_say_of_which_step_the_weights_are_and_who_wrote_how_many_batches():
    config = config_of()
    for card in cards(config):
        assert ", 3 steps" in card and "weights of step" not in card and "batches" not in card and WORSE not in card
    told = {**SUMMARY, "steps": 1000, "best_step": 100, "processes": 2, "rollout_batches": 600}
    worse = {**told, "kl_before_nats": 0.5, "kl_after_nats": 0.7}
    for summary in (told, worse):
        for card in cards(config, summary):
            assert "1000 steps in 2 processes; these are the weights of step 100, whose validation was the best" in card
            assert "`) in 600 of 1000 batches, loss" in card
            assert (WORSE in card) == (summary is worse)


def test_without_a_preset_the_licences_that_any_preset_tells_are_known():
    config = build_config({"teacher": {"model": TEACHER}, "student": {"model": STUDENT}, "data": {"train": "x.jsonl"}})
    assert not config.about.licences
    assert licence_lines(config) == [f"- {TEACHER}: Apache-2.0", f"- {STUDENT}: Apache-2.0", f"- x.jsonl: {OWN}"]
    assert yaml.safe_load(cards(config)[1].split("---")[1])["license"] == "apache-2.0"


def test_a_teacher_is_named_where_it_taught_and_a_corpus_where_it_was_read(tmp_path):
    assert not any(TEACHER in line for line in licence_lines(config_of(method="sft")))
    assert any(TEACHER in line for line in licence_lines(config_of(method="seqkd")))
    adapted = licence_lines(config_of(teacher={"adapter": str(tmp_path / "run")}))
    assert f"- run: {OWN}" in adapted and len(adapted) == 4
    paper = "opt-2.7b-to-125m"
    assert "- Skylion007/openwebtext: CC0-1.0" in licence_lines(load_run_config(paper))
    assert not any("openwebtext" in line for line in licence_lines(config_of(paper, data={"lm_corpus": None})))


@pytest.mark.parametrize("name", [preset.name for preset in read_index()])
def test_every_preset_knows_the_licences_of_all_it_uses(name):
    config = load_run_config(name)
    lines = licence_lines(config)
    assert lines and not any(UNKNOWN in line or OWN in line for line in lines)
    assert {line[2:].rpartition(": ")[0] for line in lines} <= set(config.about.licences)


def test_the_demo_s_cut_student_is_named_once():
    assert licence_lines(load_run_config("smollm2-demo")) == [
        "- HuggingFaceTB/SmolLM2-135M-Instruct: Apache-2.0",
        "- package:qswitch/data/demo_prompts.jsonl: Apache-2.0",
    ]
