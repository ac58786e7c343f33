"""Attention while decoding gives what copied heads give, and copies neither keys nor values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qswitch.models.attention import folded_attention
from qswitch.models.language_model import LanguageModel
from qswitch.rollout.attention_masks import ALIGNED_SLOTS, MaskMaker
from qswitch.rollout.kv_cache import KVState, Prompts
from tests.tiny import tiny_model


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation with memory of its own has made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("key_heads", [1, 2, 8])
def test_folded_heads_are_the_softmax_over_the_keys_of_their_group(num_tokens, key_heads):
    torch.manual_seed(num_tokens)
    rows, heads, slots, width = 2, 8, 40, 4
    q = torch.randn(rows, heads, num_tokens, width, dtype=torch.float64)
    k, v = (torch.randn(rows, key_heads, slots, width, dtype=torch.float64) for _ in range(2))
    allowed = torch.rand(rows, 1, num_tokens, slots) < 0.5
    allowed[..., 0] = True
    mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill_(~allowed, torch.finfo(torch.float64).min)
    module = torch.nn.Module()
    module.num_key_value_groups = heads // key_heads
    with Largest() as made:
        found, _ = folded_attention(module, q, k, v, mask, scaling=0.3)
    for row in range(rows):
        for head in range(heads):
            keys, values = k[row, head // (heads // key_heads)], v[row, head // (heads // key_heads)]
            for token in range(num_tokens):
                seen = allowed[row, 0, token]
                weights = torch.softmax(keys[seen] @ q[row, head, token] * 0.3, dim=0)
                torch.testing.assert_close(found[row, token, head], weights @ values[seen], rtol=1e-10, atol=1e-12)
    if key_heads < heads:
        assert made.elements < rows * heads * slots * width, "keys were copied for every query head"


def test_masks_are_added_and_their_rows_aligned():
    model = LanguageModel(tiny_model("qwen2"))
    slots = torch.tensor([[-1, 0, 1, 2, -1, 3, 4], [0, 1, 2, 3, 4, -1, 5]])
    (mask,) = MaskMaker(model)(slots, slots[:, -1:]).values()
    assert mask is not None and mask.dtype == torch.float32 and mask.shape == (2, 1, 1, 7)
    assert all(stride % ALIGNED_SLOTS == 0 for stride in mask.stride()[:-1]) and mask.stride(-1) == 1
    assert (mask[:, 0, 0] == 0).tolist() == (slots >= 0).tolist()


def test_a_model_folds_only_while_it_decodes():
    model = LanguageModel(tiny_model("qwen2"))
    names = []
    handle = model.backbone.register_forward_pre_hook(lambda *_: names.append(model.config._attn_implementation))
    state = KVState(model, 2, 64)
    ids = torch.ones((2, 4), dtype=torch.int64)
    with torch.no_grad():
        state.repack(np.arange(0), Prompts(ids, torch.ones_like(ids, dtype=torch.bool), np.full(2, 4)))
        model.hidden(ids)
    handle.remove()
    assert names == ["qswitch_folded", "sdpa"] and model.config._attn_implementation == "sdpa"
