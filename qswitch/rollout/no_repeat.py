"""Which tokens would repeat an n-gram that the sequence already holds (`no_repeat_ngram_size` of transformers).

The evaluation protocol of the SWITCH paper's code bans repeated 6-grams; training never does. Pure, over token ids.

Letters: `R` rows, `L` padded length, `V` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def banned_tokens(sequences: Tensor, lengths: Tensor, ngram_size: int, vocab_size: int) -> Tensor:
    """Tokens that must not come next: int64 [R, L], int64 [R] -> bool [R, V].

    Row r holds prompt and response so far in its first `lengths[r]` slots; what stands behind them is ignored. A token
    is banned where it would complete an n-gram of `ngram_size` tokens for the second time, as
    `transformers.NoRepeatNGramLogitsProcessor` does on the unpadded row. Ids from V on are never drawn and are ignored.

    Raises:
        ValueError: ngram_size is below 1.
    """
    if ngram_size < 1:
        raise ValueError(f"ngram_size must be at least 1, got {ngram_size}")
    num_rows, width = sequences.shape
    banned = torch.zeros((num_rows, vocab_size + 1), dtype=torch.bool, device=sequences.device)
    if width >= ngram_size:
        windows = sequences.unfold(1, ngram_size, 1)  # (R, L - n + 1, n)
        last = torch.arange(ngram_size - 1, device=sequences.device) - (ngram_size - 1)
        tail = sequences.gather(1, (lengths[:, None] + last).clamp_min(0))  # (R, n - 1)
        ends = torch.arange(ngram_size, width + 1, device=sequences.device)
        repeats = (windows[..., :-1] == tail[:, None]).all(dim=-1) & (ends <= lengths[:, None])
        # Column V takes what is not to be banned, so that one scatter does for all rows.
        completions = torch.where(repeats, windows[..., -1], vocab_size).clamp_max(vocab_size)
        banned.scatter_(1, completions, True)
    return banned[:, :vocab_size]
