"""Cutting layers keeps the rest of the function, the order and the files."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qswitch.errors import ModelError
from qswitch.models.shrink import find_layers, keep_layers, layer_scores, shrink, shrink_to_folder
from tests.tiny import ARCHITECTURES, save_tiny, tiny_model

EVERY = (*ARCHITECTURES, "cohere", "granite", "phi")
PROMPTS = [[5, 9, 30, 12, 44], torch.tensor([6, 8, 31])]
IDS = torch.arange(4, 20).reshape(1, -1)


@pytest.mark.parametrize("arch", EVERY)
@torch.no_grad()
def test_keeping_every_layer_keeps_the_logits(arch):
    hf = tiny_model(arch, layers=4)
    new, kept = shrink(hf, PROMPTS, 4)
    assert kept == [0, 1, 2, 3]
    assert torch.equal(new(IDS).logits, hf(IDS).logits)


@pytest.mark.parametrize("arch", EVERY)
@torch.no_grad()
def test_a_cut_model_equals_the_model_whose_other_layers_pass_their_input_on(arch):
    hf = tiny_model(arch, layers=4)
    new, kept = shrink(hf, PROMPTS, 2)
    assert kept == sorted(kept) and len(kept) == new.config.num_hidden_layers == 2
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


@pytest.mark.parametrize("arch", EVERY)
@torch.no_grad()
def test_layers_of_a_bf16_model_are_scored_in_fp32_and_stay_as_they_are(arch):
    narrow, wide = tiny_model(arch, layers=4), tiny_model(arch, layers=4)
    for a, b in zip(narrow.parameters(), wide.parameters(), strict=True):
        a.data = a.to(torch.bfloat16)  # not the buffers: from_pretrained keeps rotary frequencies in fp32
        b.copy_(a)
    before = {name: (p.data_ptr(), p.clone()) for name, p in narrow.named_parameters()}
    tolerance = 1e-2 if arch == "gemma2" else 1e-6  # Gemma scales its embeddings in the dtype of the weights
    assert layer_scores(narrow, PROMPTS) == pytest.approx(layer_scores(wide, PROMPTS), rel=tolerance, abs=1e-7)
    for name, parameter in narrow.named_parameters():
        assert parameter.data_ptr() == before[name][0] and torch.equal(parameter, before[name][1])
    new, kept = shrink(narrow, PROMPTS, 2)
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16} and kept == shrink(wide, PROMPTS, 2)[1]


def test_per_layer_settings_move_with_their_layer():
    hf = tiny_model("gemma2", layers=4)
    kinds = hf.config.layer_types
    new = keep_layers(hf, [1, 2, 3])
    assert new.config.layer_types == kinds[1:]
    assert [layer.self_attn.layer_idx for layer in new.model.layers] == [0, 1, 2]


def test_the_layer_that_does_nothing_goes_first():
    hf = tiny_model("llama", layers=4)
    with torch.no_grad():
        hf.model.layers[2].self_attn.o_proj.weight.mul_(1e-3)
        hf.model.layers[2].mlp.down_proj.weight.mul_(1e-3)
    scores = layer_scores(hf, PROMPTS)
    assert min(range(4), key=scores.__getitem__) == 2
    assert shrink(hf, PROMPTS, 3)[1] == [0, 1, 3]


@pytest.mark.parametrize("num_layers", [0, 5])
def test_impossible_sizes_are_refused(num_layers):
    with pytest.raises(ModelError, match="4 layers"):
        shrink(tiny_model(layers=4), PROMPTS, num_layers)


def test_a_folder_is_complete_and_in_the_dtype_of_the_source(tmp_path):
    source = save_tiny(tmp_path / "m", "qwen2", layers=4, dtype=torch.bfloat16)
    report = shrink_to_folder(str(source), 2, tmp_path / "out" / "small")
    assert len(report.kept) == 2 and sorted(report.kept + report.dropped) == [0, 1, 2, 3]
    assert len(report.scores) == 4 and report.parameters_after < report.parameters_before
    small = AutoModelForCausalLM.from_pretrained(report.output_dir)
    assert small.dtype == torch.bfloat16 and small.num_parameters() == report.parameters_after
    assert AutoTokenizer.from_pretrained(report.output_dir).chat_template
    assert (report.output_dir / "generation_config.json").is_file()
    assert [p.name for p in report.output_dir.parent.iterdir()] == ["small"]
    with pytest.raises(ModelError, match="not empty"):
        shrink_to_folder(str(source), 2, report.output_dir)


@torch.no_grad()
def test_a_bf16_model_keeps_its_fp32_rotary_frequencies(tmp_path):
    folder = save_tiny(tmp_path / "m", layers=2, dtype=torch.bfloat16)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    new = keep_layers(hf, [0, 1])
    assert new.dtype == torch.bfloat16 and torch.equal(new(IDS).logits, hf(IDS).logits)
