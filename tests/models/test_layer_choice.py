"""A layer goes where the output stays nearest; the figure is the KL of the model that is then built."""

from __future__ import annotations

import pytest
import torch

from qswitch.errors import ModelError
from qswitch.models.decoder_layers import LayerStack, ScoredRow, computing_in_fp32, find_layers
from qswitch.models.layer_choice import MAX_TRIED, calibration, choices, choose_layers, kl_of_choice, scored_rows
from qswitch.models.shrink import keep_layers
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

EVERY = (*ARCHITECTURES, "cohere", "granite", "phi", "gemma3", "qwen3", "phi3")
ROWS = [ScoredRow((5, 9, 30, 12, 44, 17, 8), 2), ScoredRow((6, 8, 31, 40), 0)]


def lively_model(arch: str, layers: int):
    """Random layers big enough that the output notices which of them are missing."""
    hf = tiny_model(arch, layers=layers)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in find_layers(hf)[1]:
            for parameter in layer.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return hf


@torch.no_grad()
def kl_by_hand(whole, cut) -> float:
    total, tokens = 0.0, 0
    for row in ROWS:
        ids = torch.tensor([row.ids])
        p, q = (model(ids).logits[0, row.first :].double().log_softmax(-1) for model in (whole, cut))
        total += float((p.exp() * (p - q)).sum())
        tokens += len(p)
    return total / tokens


@pytest.mark.parametrize("arch", EVERY)
def test_the_score_is_the_kl_of_the_model_that_is_built(arch):
    hf = lively_model(arch, 4)
    for kept in ([0, 1, 2, 3], [0, 3], [1, 2], [3]):
        expected = kl_by_hand(hf, keep_layers(hf, kept))
        assert kl_of_choice(hf, ROWS, kept) == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_no_layer_that_could_go_instead_is_cheaper(num_layers):
    hf = lively_model("llama", MAX_TRIED)
    choice = choose_layers(hf, ROWS, num_layers)
    kept = list(range(MAX_TRIED))
    while len(kept) > num_layers:  # with so few layers each of them is tried
        scores = {i: kl_by_hand(hf, keep_layers(hf, [j for j in kept if j != i])) for i in kept}
        kept.remove(min(scores, key=scores.__getitem__))
    greedy = kl_by_hand(hf, keep_layers(hf, kept))
    found = kl_by_hand(hf, keep_layers(hf, choice.kept))
    assert sorted(choice.kept + choice.dropped) == list(range(MAX_TRIED)) and len(choice.kept) == num_layers
    assert found == pytest.approx(choice.kl_nats, rel=1e-3) and found <= greedy * 1.001


def test_a_run_of_layers_that_goes_cheaply_together_is_found():
    hf = lively_model("llama", 12)
    with torch.no_grad():  # what layer 5 adds, layer 6 takes away, and each alone is dear
        five, six = hf.model.layers[5], hf.model.layers[6]
        six.load_state_dict(five.state_dict())
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            six.get_submodule(name).weight.neg_()
            for layer in (five, six):
                layer.get_submodule(name).weight.mul_(0.1)
    assert choose_layers(hf, ROWS, 10).dropped == (5, 6)


def test_several_sizes_at_once_are_what_each_is_alone():
    hf = lively_model("llama", 6)
    together = choices(hf, ROWS, [5, 3, 6])
    assert [c.kept for c in together] == [choose_layers(hf, ROWS, n).kept for n in (5, 3, 6)]
    assert together[2].dropped == () and together[2].kl_nats == pytest.approx(0, abs=1e-6)


def test_the_same_layers_every_time():
    hf = lively_model("qwen2", 6)
    first, again = choose_layers(hf, ROWS, 3), choose_layers(hf, ROWS, 3)
    assert first.kept == again.kept and first.kl_nats == again.kl_nats


def test_a_last_layer_goes_only_where_the_output_says_so():
    hf = lively_model("llama", 4)
    with torch.no_grad():
        for index in (1, 3):
            hf.model.layers[index].self_attn.o_proj.weight.mul_(1e-3)
            hf.model.layers[index].mlp.down_proj.weight.mul_(1e-3 if index == 3 else 2e-3)
    assert choose_layers(hf, ROWS, 3).dropped == (3,)
    with torch.no_grad():
        hf.model.layers[3].mlp.down_proj.weight.mul_(1e4)
    assert choose_layers(hf, ROWS, 3).dropped == (1,)


@pytest.mark.parametrize("arch", EVERY)
@torch.no_grad()
def test_a_bf16_model_is_scored_in_fp32_and_stays_as_it_is(arch):
    narrow, wide = lively_model(arch, 3), lively_model(arch, 3)
    for a, b in zip(narrow.parameters(), wide.parameters(), strict=True):
        a.data = a.to(torch.bfloat16)  # not the buffers: from_pretrained keeps rotary frequencies in fp32
        b.copy_(a)
    before = {name: (p.data_ptr(), p.clone()) for name, p in narrow.named_parameters()}
    tolerance = 2e-2 if arch.startswith("gemma") else 1e-4  # Gemma scales its embeddings in the dtype of the weights
    assert kl_of_choice(narrow, ROWS, [0, 2]) == pytest.approx(kl_of_choice(wide, ROWS, [0, 2]), rel=tolerance)
    for name, parameter in narrow.named_parameters():
        assert parameter.data_ptr() == before[name][0] and torch.equal(parameter, before[name][1])
    assert narrow.training == wide.training
    cut = keep_layers(narrow, choose_layers(narrow, ROWS, 2).kept)
    assert {p.dtype for p in cut.parameters()} == {torch.bfloat16}


def test_layers_that_pass_each_other_more_than_the_hidden_state_are_refused():
    hf = lively_model("llama", 3)
    seen: list[torch.Tensor] = []
    layers = find_layers(hf)[1]
    layers[0].register_forward_hook(lambda _m, _a, out: seen.append(out))

    class Looks(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, hidden_states, **keywords):
            return self.layer(hidden_states, **keywords) + len(seen)

    layers[2] = Looks(layers[2])
    with computing_in_fp32(hf), pytest.raises(ModelError, match="pass each other more than the hidden state"):
        LayerStack(hf, ROWS, max_positions=8)


@pytest.mark.parametrize("num_layers", [0, 5])
def test_impossible_sizes_are_refused(num_layers):
    with pytest.raises(ModelError, match="4 layers"):
        choose_layers(tiny_model(layers=4), ROWS, num_layers)


def test_examples_are_plain_text():
    tokenizer = tiny_tokenizer()
    (row,) = scored_rows(tokenizer, [("hi", "ok")])
    assert tokenizer.decode(row.ids) == "hi\nok" and row.first == 0
    with pytest.raises(ModelError, match="at least one example"):
        scored_rows(tokenizer, [])


def test_the_choice_and_its_check_share_no_example():
    choose, check = calibration("choose"), calibration("check")
    assert choose and check and not {prompt for prompt, _ in choose} & {prompt for prompt, _ in check}


def test_progress_is_told(monkeypatch):
    monkeypatch.setattr("qswitch.models.layer_choice.SAY_EVERY_S", 0.0)
    lines = []
    choose_layers(lively_model("llama", 3), ROWS, 1, notify=lines.append)
    assert any("1 of 3 tried" in line for line in lines) and any("1 left, to be 1; KL" in line for line in lines)
