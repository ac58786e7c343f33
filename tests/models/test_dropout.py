"""A base model's own dropout: found where it acts, set everywhere, gone from training passes when it is 0."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig

from qswitch.errors import ModelError
from qswitch.models.dropout import dropout_of, set_dropout
from qswitch.models.runtime import make_runtime
from qswitch.models.student import load_student
from tests.distill.test_trainer import folders, settings
from tests.tiny import tiny_config

__all__ = ["folders"]


def model_of(name: str):
    if name == "falcon":
        return AutoModelForCausalLM.from_config(
            FalconConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                         attention_dropout=0.1, hidden_dropout=0.1)
        )  # fmt: skip
    return AutoModelForCausalLM.from_config(tiny_config(name))


def twice(model) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of two training passes over one input."""
    model.train()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        return model(ids).logits, model(ids).logits


@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon"])
def test_dropout_is_found_and_switched_off(name):
    model = model_of(name)
    assert set(dropout_of(model).values()) == {0.1}
    assert not torch.equal(*twice(model))
    set_dropout(model, 0.0)
    assert dropout_of(model) == {}
    assert torch.equal(*twice(model))


def test_another_probability_takes_the_place_of_the_models_own():
    model = model_of("gpt2")
    places = dropout_of(model)
    set_dropout(model, 0.3)
    assert dropout_of(model) == dict.fromkeys(places, 0.3)


def test_a_model_without_dropout_has_none_to_set():
    model = model_of("llama")
    assert dropout_of(model) == {} and torch.equal(*twice(model))
    set_dropout(model, 0.0)
    with pytest.raises(ModelError, match=r"no dropout of its own.*lora\.dropout"):
        set_dropout(model, 0.1)


def test_the_students_setting_reaches_its_base_and_not_its_adapter(tmp_path):
    from tests.tiny import save_tiny_pair

    folders = (*save_tiny_pair(tmp_path, "gpt2"), tmp_path / "data.jsonl")
    lora = {"r": 4, "alpha": 8, "dropout": 0.25}
    for setting, expected in ((None, {0.1}), (0.0, set()), (0.4, {0.4})):
        config = settings(folders, student__base_dropout=setting, student__lora=lora)
        student = load_student(config, make_runtime(config.train))
        assert set(dropout_of(student).values()) == expected
        assert any(m.p == 0.25 for m in student.modules() if isinstance(m, torch.nn.Dropout)), "the adapter's stays"
