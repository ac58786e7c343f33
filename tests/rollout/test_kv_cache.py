"""The key-value state against plain passes, and the refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qswitch.errors import ModelError
from qswitch.models.architecture import layer_kinds
from qswitch.models.language_model import LanguageModel
from qswitch.rollout.attention_masks import MaskMaker
from qswitch.rollout.cache_layers import SlotBuffers
from qswitch.rollout.kv_cache import KVState, Prompts
from qswitch.rollout.kv_probe import verify_kv
from tests.tiny import ARCHITECTURES, tiny_model


def plain(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        tokens = torch.tensor([ids])
        return model.hidden(tokens, torch.ones_like(tokens), torch.arange(len(ids))[None])[0, -1]


def tensors(rows: list[list[int | None]]) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """(ids, live, live counts) of rows whose None is padding."""
    live = torch.tensor([[i is not None for i in row] for row in rows])
    return torch.tensor([[i or 0 for i in row] for row in rows]), live, live.sum(dim=1).numpy()


def read(state: KVState, rows: list[list[int | None]]) -> torch.Tensor:
    with torch.no_grad():
        return state.append(*tensors(rows))[:, -1]


def join(state: KVState, rows: list[list[int | None]], kept: tuple[int, ...] = ()) -> None:
    with torch.no_grad():
        state.repack(np.array(kept, dtype=np.int64), Prompts(*tensors(rows)))


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "gemma3", "phi", "cohere", "granite"])
@pytest.mark.parametrize("blocks", [True, False])
def test_the_probe_passes_for_every_architecture(arch, blocks):
    model = LanguageModel(tiny_model(arch))
    model.train()
    verify_kv(model, blocks=blocks)
    assert model.training


def test_states_survive_taking_back_packing_and_joining():
    model = LanguageModel(tiny_model("mistral", dtype=torch.float64))
    state = KVState(model, 3, 80)
    texts = [[5, 6, 7], [8], [9, 10]]
    join(state, [[5, 6, 7], [None, None, 8], [None, 9, 10]])
    state.begin_block(2)
    read(state, [[11, 12], [13, 14], [15, 16]])
    state.take_back(2, torch.tensor([2, 1, 0]), np.array([2, 1, 0]), np.array([2, 2, 2]))
    texts = [[5, 6, 7, 11, 12], [8, 13], [9, 10]]
    assert state.num_slots == 5
    assert state.hole_share == pytest.approx((0 + 1 + 2) / 9)

    join(state, [[20, 21, 22, 23, 24, 25, 26]], kept=(2, 0))
    texts = [texts[2], texts[0], [20, 21, 22, 23, 24, 25, 26]]
    assert (state.num_rows, state.num_slots, state.hole_share) == (3, 7, 0.0)

    for step in range(67):  # far beyond the sliding window
        tokens = [(7 * step + 3 * row) % 40 + 4 for row in range(3)]
        hidden = read(state, [[t] for t in tokens])
        texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
    for row in range(3):
        torch.testing.assert_close(hidden[row], plain(model, texts[row]), rtol=0, atol=1e-10)


def test_rows_that_have_read_nothing_can_join():
    model = LanguageModel(tiny_model("llama", dtype=torch.float64))
    state = KVState(model, 2, 8)
    join(state, [[5, 6]])
    join(state, [[]], kept=(0,))
    hidden = read(state, [[7], [8]])
    torch.testing.assert_close(hidden[0], plain(model, [5, 6, 7]), rtol=0, atol=1e-10)
    torch.testing.assert_close(hidden[1], plain(model, [8]), rtol=0, atol=1e-10)


def test_a_block_that_finds_no_room_packs_the_rows_anew():
    """The buffers hold the longest row and one block; holes go before they run out."""
    model = LanguageModel(tiny_model("llama", dtype=torch.float64))
    state = KVState(model, 2, 9)
    join(state, [[5, 6], [7, 8]])
    texts = [[5, 6], [7, 8]]
    for turn in range(3):  # each row writes two tokens and then one, so that both leave holes
        kept = np.array([2, 1] if turn % 2 else [1, 2])
        state.begin_block(3)
        block = [[10 + turn, 20 + turn, 30], [40 + turn, 50 + turn, 31]]
        read(state, block)
        state.take_back(3, torch.from_numpy(kept), kept, np.array([3, 3]))
        texts = [text + row[:k] for text, row, k in zip(texts, block, kept, strict=True)]
    state.begin_block(1)
    hidden = read(state, [[60], [61]])
    for row, text in enumerate(texts):
        torch.testing.assert_close(hidden[row], plain(model, [*text, 60 + row]), rtol=0, atol=1e-10)
    assert state.num_slots <= 9


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
def test_states_lie_in_the_arithmetic_of_the_passes_and_nothing_else_changes(arch, monkeypatch):
    """An fp32 embedding under autocast makes fp32 keys of rotary positions; attention rounds them in either case."""
    model = LanguageModel(tiny_model(arch), compute_dtype=torch.bfloat16).eval()

    def states() -> tuple[list[torch.Tensor], set[torch.dtype]]:
        state = KVState(model, 2, 40)
        join(state, [[5, 6, 7], [None, 8, 9]])
        found = [read(state, [[10 + i], [20 + i]]) for i in range(6)]
        buffers = [layer.buffers for layer in state._slot_layers]
        return found, {x.dtype for b in buffers for x in (b.keys, b.values)}

    ours, dtypes = states()
    assert dtypes == {torch.bfloat16}

    def as_they_come(self: SlotBuffers, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self.keys is None:
            room = (self._num_rows, keys.shape[1], self._num_slots, keys.shape[3])
            self.keys, self.values = keys.new_zeros(room), values.new_zeros(room)

    monkeypatch.setattr(SlotBuffers, "allocate", as_they_come)
    plain_ones, wider = states()
    assert all(torch.equal(a, b) for a, b in zip(ours, plain_ones, strict=True))
    assert (torch.float32 in wider) == (arch != "gpt2"), "gpt2 has no rotary positions"


class Forgetful(LanguageModel):
    """As a recurrent model would: it keeps what it has read, whatever is masked later."""

    def hidden(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        if past_key_values is not None and past_key_values.get_seq_length():
            attention_mask = torch.zeros_like(attention_mask)  # added to the scores: nothing is masked
        return super().hidden(input_ids, attention_mask, position_ids, past_key_values, **kwargs)


def test_a_model_that_cannot_take_back_is_refused_and_the_sequential_engine_named():
    model = Forgetful(tiny_model("llama"))
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot take back.*rollout\.block_tokens=0, the sequential"):
        verify_kv(model, blocks=True)
    with pytest.raises(ModelError, match="left-padded batch"):
        verify_kv(model, blocks=False)


def seen(arch: str) -> dict[str, list[int] | None]:
    """Kind of layer -> the slots, out of positions 0 to 19, that a query at position 19 finds near enough."""
    slots, query = torch.arange(20)[None, None], torch.tensor([[[19]]])
    kinds = layer_kinds(tiny_model(arch).config, "it")
    return {
        kind: near if near is None else near(slots, query)[0, 0].nonzero()[:, 0].tolist()
        for kind, near in kinds.items()
    }


def test_masks_by_kind_of_layer():
    window = list(range(12, 20))
    assert seen("llama") == {"full_attention": None}
    assert seen("mistral") == {"sliding_attention": window}
    assert seen("gemma2") == {"full_attention": None, "sliding_attention": window}
    model = LanguageModel(tiny_model("llama"))
    model.config.layer_types = ["full_attention", "compressed_attention"]
    with pytest.raises(ModelError, match="compressed_attention"):
        layer_kinds(model.config, "it")
    model.config.layer_types = None
    model.config.attention_chunk_size = 8
    (near,) = layer_kinds(model.config, "it").values()
    assert near(torch.arange(20), torch.tensor(19)).nonzero()[:, 0].tolist() == [16, 17, 18, 19]
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="sdpa or eager"):
        MaskMaker(model)


def test_packing_and_joining_hold_a_part_of_one_layer_twice_and_no_more():
    """The plan counts one layer's keys; neither a second cache nor newcomers would fit beside it."""
    from benchmarks.live_bytes import LiveBytes

    hf = tiny_model("llama", num_hidden_layers=8, dtype=torch.float32).eval()
    model = LanguageModel(hf)
    state = KVState(model, 8, 256)
    ids = torch.ones((8, 200), dtype=torch.int64)
    ones = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad(), LiveBytes() as live:
        state.repack(np.arange(0), Prompts(ids, ones, np.full(8, 200)))
        layer_bytes = state.buffer_bytes // 8
        assert state.buffer_bytes == 8 * 2 * 8 * 256 * 2 * 16 * 4, (
            "layers, keys and values, rows, slots, heads, width, fp32"
        )
        before = live.peak_bytes = live.live_bytes
        assert before > state.buffer_bytes
        state.repack(np.arange(7))
        assert live.peak_bytes - before < 1.0 * layer_bytes, "8 layers were packed"
        live.peak_bytes = live.live_bytes
        state.repack(np.arange(7), Prompts(ids[:1, :50], ones[:1, :50], np.full(1, 50)))
        assert live.peak_bytes - before < 1.0 * layer_bytes, "a row joined"
        assert state.buffer_bytes == 8 * layer_bytes
