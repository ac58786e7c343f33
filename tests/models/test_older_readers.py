"""What a written folder says to transformers 4 is what its publishers' files say, and changes nothing for version 5.

Version 4 is not installed here; `benchmarks.older_readers` lets it read folders with and without the keys.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, Gemma3TextConfig, LlamaConfig, Phi3Config, PhiConfig

from qswitch.models.older_readers import add_older_keys
from tests.families import CHANGES
from tests.tiny import ARCHITECTURES, tiny_config, tiny_tokenizer

LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
FACTORS = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
PUBLISHED = {
    # As the config.json of Llama 3.2, Qwen 2.5, Gemma 3, Phi 3 (128k) and Phi 2 on the hub have them.
    "llama3.2": (LlamaConfig, {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    "plain": (LlamaConfig, {"rope_theta": 1000000.0}),
    "gemma3": (Gemma3TextConfig, {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
                                  "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "phi3": (Phi3Config, {"rope_theta": 10000.0, "rope_scaling": {"type": "longrope", **FACTORS},
                          "original_max_position_embeddings": 4096}),
    "phi2": (PhiConfig, {"rope_theta": 10000.0, "partial_rotary_factor": 0.4}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_positions_are_said_in_the_words_of_the_published_files(tmp_path, name):
    kind, published = PUBLISHED[name]
    kind(**json.loads(json.dumps(published))).save_pretrained(tmp_path)
    add_older_keys(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written.get(key) for key in published} == published


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "llama3", "gemma3", "phi", "phi3", "cohere", "granite", *CHANGES])
def test_transformers_5_reads_the_same_configuration_as_before(tmp_path, arch):
    tiny_config(arch, dtype=torch.bfloat16).save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    add_older_keys(tmp_path)
    after = AutoConfig.from_pretrained(tmp_path).to_dict()
    # Phi 3 keeps this one beside rope_parameters, too, where it is given there.
    assert {**before, "partial_rotary_factor": None} == {**after, "partial_rotary_factor": None}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_tokenizer_has_a_class_and_a_list_that_both_know(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<tool>", "</tool>"]})
    tokenizer.save_pretrained(tmp_path)
    before = AutoTokenizer.from_pretrained(tmp_path)
    add_older_keys(tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in written
    assert written["additional_special_tokens"] == ["<tool>", "</tool>"]
    assert written["model_input_names"] == ["input_ids", "attention_mask"], "version 4 would add token_type_ids"
    after = AutoTokenizer.from_pretrained(tmp_path)
    text = "Hello<tool>you</tool></s>"
    assert type(after) is type(before) and after(text)["input_ids"] == before(text)["input_ids"]
    assert after.extra_special_tokens == before.extra_special_tokens == ["<tool>", "</tool>"]
    assert after.chat_template == before.chat_template and after.special_tokens_map == before.special_tokens_map


def test_a_folder_without_these_files_stays_as_it_is(tmp_path):
    add_older_keys(tmp_path)
    assert list(tmp_path.iterdir()) == []
