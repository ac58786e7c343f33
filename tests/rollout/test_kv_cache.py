"""The key-value state against plain passes, and the refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qswitch.errors import ModelError
from qswitch.models.language_model import LanguageModel
from qswitch.rollout.kv_cache import KVState, attention_windows
from qswitch.rollout.kv_probe import verify_kv
from qswitch.rollout.slot_layer import GROWTH_SLOTS
from tests.tiny import ARCHITECTURES, tiny_model


def plain(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        tokens = torch.tensor([ids])
        return model.hidden(tokens, torch.ones_like(tokens), torch.arange(len(ids))[None])[0, -1]


def read(state: KVState, rows: list[list[int | None]]) -> torch.Tensor:
    ids = torch.tensor([[i or 0 for i in row] for row in rows])
    live = torch.tensor([[i is not None for i in row] for row in rows])
    with torch.no_grad():
        return state.append(ids, live, live.sum(dim=1).numpy())[:, -1]


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "gemma3", "phi", "cohere", "granite"])
@pytest.mark.parametrize("blocks", [True, False])
def test_the_probe_passes_for_every_architecture(arch, blocks):
    model = LanguageModel(tiny_model(arch))
    model.train()
    verify_kv(model, blocks=blocks)
    assert model.training


def test_states_survive_taking_back_packing_joining_and_growing():
    model = LanguageModel(tiny_model("mistral", dtype=torch.float64))
    state = KVState(model, 3)
    texts = [[5, 6, 7], [8], [9, 10]]
    read(state, [[5, 6, 7], [None, None, 8], [None, 9, 10]])
    read(state, [[11, 12], [13, 14], [15, 16]])
    state.take_back(2, torch.tensor([2, 1, 0]), np.array([2, 1, 0]), np.array([2, 2, 2]))
    texts = [[5, 6, 7, 11, 12], [8, 13], [9, 10]]
    assert state.num_slots == 5
    assert state.hole_share == pytest.approx((0 + 1 + 2) / 9)

    newcomer = KVState(model, 1)
    read(newcomer, [[20, 21, 22, 23, 24, 25, 26]])
    state.repack(np.array([2, 0]), newcomer)
    texts = [texts[2], texts[0], [20, 21, 22, 23, 24, 25, 26]]
    assert (state.num_rows, state.num_slots, state.hole_share) == (3, 7, 0.0)

    for step in range(GROWTH_SLOTS + 3):  # beyond one chunk of room, and far beyond the sliding window
        tokens = [(7 * step + 3 * row) % 40 + 4 for row in range(3)]
        hidden = read(state, [[t] for t in tokens])
        texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
    for row in range(3):
        torch.testing.assert_close(hidden[row], plain(model, texts[row]), rtol=0, atol=1e-10)


def test_a_state_that_has_read_nothing_can_be_joined():
    model = LanguageModel(tiny_model("llama", dtype=torch.float64))
    state = KVState(model, 1)
    read(state, [[5, 6]])
    state.repack(np.array([0]), KVState(model, 1))
    hidden = read(state, [[7], [8]])
    torch.testing.assert_close(hidden[0], plain(model, [5, 6, 7]), rtol=0, atol=1e-10)
    torch.testing.assert_close(hidden[1], plain(model, [8]), rtol=0, atol=1e-10)


class Forgetful(LanguageModel):
    """As a recurrent model would: it keeps what it has read, whatever is masked later."""

    def hidden(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        if past_key_values is not None and past_key_values.get_seq_length():
            attention_mask = attention_mask | True
        return super().hidden(input_ids, attention_mask, position_ids, past_key_values, **kwargs)


def test_a_model_that_cannot_take_back_is_refused_and_the_sequential_engine_named():
    model = Forgetful(tiny_model("llama"))
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot take back.*rollout\.block_tokens=0, the sequential"):
        verify_kv(model, blocks=True)
    with pytest.raises(ModelError, match="left-padded batch"):
        verify_kv(model, blocks=False)


def test_windows_by_kind_of_layer():
    assert attention_windows(LanguageModel(tiny_model("llama"))) == {"full_attention": None}
    assert attention_windows(LanguageModel(tiny_model("mistral"))) == {"sliding_attention": 8}
    assert attention_windows(LanguageModel(tiny_model("gemma2"))) == {"full_attention": None, "sliding_attention": 8}
    model = LanguageModel(tiny_model("llama"))
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ModelError, match="chunked_attention"):
        attention_windows(model)
    model.config.layer_types = None
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="sdpa or eager"):
        attention_windows(model)


def test_packing_anew_holds_one_layer_twice_and_no_more():
    """The plan counts one layer's copy; a whole second cache would not fit beside the first."""
    from benchmarks.live_bytes import LiveBytes

    hf = tiny_model("llama", num_hidden_layers=8, dtype=torch.float32).eval()
    model = LanguageModel(hf)
    state = KVState(model, 8)
    ids = torch.ones((8, 200), dtype=torch.int64)
    with torch.no_grad(), LiveBytes() as live:
        state.append(ids, torch.ones_like(ids, dtype=torch.bool), np.full(8, 200))
        layer_bytes = 2 * state._cache.layers[0]._keys.numel() * state._cache.layers[0]._keys.element_size()
        before = live.peak_bytes = live.live_bytes
        assert before > 8 * layer_bytes
        state.repack(np.arange(7))
    assert live.peak_bytes - before < 2.5 * layer_bytes, "8 layers were packed"
