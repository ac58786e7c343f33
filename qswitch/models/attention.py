"""Attention while decoding: the query heads that share a key head are further queries of it, so nothing is copied.

With a mask, torch's fused kernels take no grouped heads, and transformers copies keys and values once for every query
head (for one token per row its newer versions do not). Folded this way the kernel sees as many heads as there are keys,
and reads each of them once. Knows no cache: it is told queries, keys, values and a mask that is added to the scores.

Letters: `R` rows, `H` query heads, `G` of them to a key head, `n` tokens of a pass, `S` slots, `W` width of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FOLDED = "qswitch_folded"
"""Name under which transformers knows it; a model has it only while it decodes."""


def folded_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Queries [R, H, n, W] over keys and values [R, H / G, S, W] with a mask [R, 1, n, S] -> [R, n, H, W], None.

    What it has no fold for (no mask, one mask per head, a bias by position) goes to transformers' own function.
    """
    if attention_mask is not None and attention_mask.is_floating_point() and attention_mask.dtype != query.dtype:
        casts = torch.is_autocast_enabled(query.device.type)  # which brings all of them to one dtype itself
        attention_mask = attention_mask if casts else attention_mask.to(query.dtype)
    rows, heads, num_tokens, _ = query.shape
    groups = heads // key.shape[1]
    folds = groups > 1 and attention_mask is not None and attention_mask.shape[1] == 1
    if not folds or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert attention_mask is not None
    queries = query.reshape(rows, key.shape[1], groups * num_tokens, query.shape[-1])
    mask = attention_mask if num_tokens == 1 else attention_mask.repeat(1, 1, groups, 1)
    output = scaled_dot_product_attention(queries, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return output.reshape(rows, heads, num_tokens, output.shape[-1]).transpose(1, 2).contiguous(), None


AttentionInterface.register(FOLDED, folded_attention)
AttentionMaskInterface.register(FOLDED, sdpa_mask)  # for passes whose mask transformers makes


@contextlib.contextmanager
def while_decoding(config: Any) -> Iterator[None]:
    """Let a model of this configuration, which runs with torch's sdpa, fold its heads within the block."""
    if config._attn_implementation != "sdpa":
        yield
        return
    config._attn_implementation = FOLDED
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
