"""Cutting layers keeps the rest of the function, the order and the files."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qswitch.errors import ModelError
from qswitch.models import shrink
from qswitch.models.decoder_layers import find_layers
from qswitch.models.shrink import keep_layers, shrink_to_folder
from tests.tiny import ARCHITECTURES, save_tiny, tiny_model

EVERY = (*ARCHITECTURES, "cohere", "granite", "phi")
IDS = torch.arange(4, 20).reshape(1, -1)


@pytest.mark.parametrize("arch", EVERY)
@torch.no_grad()
def test_keeping_every_layer_keeps_the_logits(arch):
    hf = tiny_model(arch, layers=4)
    new = keep_layers(hf, [0, 1, 2, 3])
    assert torch.equal(new(IDS).logits, hf(IDS).logits)


@pytest.mark.parametrize("arch", EVERY)
@torch.no_grad()
def test_a_cut_model_equals_the_model_whose_other_layers_pass_their_input_on(arch):
    hf = tiny_model(arch, layers=4)
    kept = (0, 3)
    new = keep_layers(hf, kept)
    assert new.config.num_hidden_layers == 2
    _, layers = find_layers(hf)
    for index, layer in enumerate(layers):
        if index not in kept:
            layer.register_forward_hook(lambda m, a, k, out: _input_of(a, k, out), with_kwargs=True)
    torch.testing.assert_close(new(IDS).logits, hf(IDS, use_cache=False).logits, atol=1e-5, rtol=1e-5)


def _input_of(arguments, keywords, output):
    hidden = arguments[0] if arguments else keywords["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@pytest.mark.parametrize("arch", EVERY)
@torch.no_grad()
def test_a_cut_model_decodes_with_a_cache(arch):
    new = keep_layers(tiny_model(arch, layers=4), [1, 3])
    out = new(IDS[:, :8], use_cache=True)
    last = new(IDS[:, 8:9], past_key_values=out.past_key_values).logits[:, -1]
    torch.testing.assert_close(last, new(IDS[:, :9]).logits[:, -1], atol=2e-5, rtol=1e-4)


def test_per_layer_settings_move_with_their_layer():
    hf = tiny_model("gemma2", layers=4)
    kinds = hf.config.layer_types
    new = keep_layers(hf, [1, 2, 3])
    assert new.config.layer_types == kinds[1:]
    assert [layer.self_attn.layer_idx for layer in new.model.layers] == [0, 1, 2]


def test_a_folder_is_complete_and_in_the_dtype_of_the_source(tmp_path):
    source = save_tiny(tmp_path / "m", "qwen2", layers=4, dtype=torch.bfloat16)
    (source / "tokenizer.model").write_bytes(b"pieces")
    report = shrink_to_folder(str(source), 2, tmp_path / "out" / "small")
    assert len(report.kept) == 2 and sorted(report.kept + report.dropped) == [0, 1, 2, 3]
    assert report.parameters_after < report.parameters_before
    stored = json.loads((report.output_dir / "shrink.json").read_text(encoding="utf-8"))
    assert stored["kept"] == list(report.kept) and stored["kl_nats"] == report.kl_nats > 0
    small = AutoModelForCausalLM.from_pretrained(report.output_dir)
    assert small.dtype == torch.bfloat16 and small.num_parameters() == report.parameters_after
    assert AutoTokenizer.from_pretrained(report.output_dir).chat_template
    assert (report.output_dir / "generation_config.json").is_file()
    assert (report.output_dir / "tokenizer.model").read_bytes() == b"pieces", "which a GGUF file of the cut model needs"
    assert json.loads((report.output_dir / "config.json").read_text())["rope_theta"] == 10000.0
    assert [p.name for p in report.output_dir.parent.iterdir()] == ["small"]
    with pytest.raises(ModelError, match="not empty"):
        shrink_to_folder(str(source), 2, report.output_dir)


@torch.no_grad()
def test_a_bf16_model_keeps_its_fp32_rotary_frequencies(tmp_path):
    folder = save_tiny(tmp_path / "m", layers=2, dtype=torch.bfloat16)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    new = keep_layers(hf, [0, 1])
    assert new.dtype == torch.bfloat16 and torch.equal(new(IDS).logits, hf(IDS).logits)


def test_what_the_hub_may_refuse_is_asked_before_the_layers_are_chosen(tmp_path, monkeypatch):
    """The choice takes minutes, and would be lost."""

    def breaks(_):
        raise ModelError("the connection to the hub failed")

    source = save_tiny(tmp_path / "m", "qwen2", layers=4)
    monkeypatch.setattr(shrink, "sentencepiece_files", breaks)
    monkeypatch.setattr(shrink, "choose_layers", lambda *_, **__: pytest.fail("layers were chosen"))
    with pytest.raises(ModelError, match="the connection to the hub failed"):
        shrink.shrink_to_folder(str(source), 2, tmp_path / "out")
