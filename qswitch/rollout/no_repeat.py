"""Which tokens would repeat an n-gram that the sequence already holds (`no_repeat_ngram_size` of transformers).

The evaluation protocol of the SWITCH paper's code bans repeated 6-grams; training never does.
Knows token ids and nothing else.

Letters: `R` rows, `L` padded length, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qswitch.rollout.transfer import to_device


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


class NoRepeat:
    """Prompt and response of up to `num_places` rows, from the first column on, and what they must not write next."""

    def __init__(
        self, num_places: int, longest_prompt: int, longest_response: int, ngram_size: int, device: torch.device
    ) -> None:
        self._ngram_size, self._longest_prompt = ngram_size, longest_prompt
        width = longest_prompt + longest_response + 1
        self._sequences = torch.zeros((num_places, width), dtype=torch.int64, device=device)
        self._prompt_lengths = torch.zeros(num_places, dtype=torch.int64, device=device)

    def open(self, places: Tensor, prompts: Sequence[list[int]]) -> None:
        """Begin anew at `places` int64 [R] with these prompts."""
        padded = [prompt + [0] * (self._longest_prompt - len(prompt)) for prompt in prompts]
        self._sequences[places, : self._longest_prompt] = to_device(padded, places.device)
        self._prompt_lengths[places] = to_device([len(prompt) for prompt in prompts], places.device)

    def write(self, places: Tensor, steps: Tensor, tokens: Tensor) -> None:
        """Remember the tokens of these response steps: int64 [R] each."""
        self._sequences[places, self._prompt_lengths[places] + steps] = tokens

    def without_repeats(self, log_probs: Tensor, places: Tensor, steps: Tensor) -> Tensor:
        """Log-probabilities [R, V] of these steps, tokens that would repeat an n-gram made impossible."""
        lengths = self._prompt_lengths[places] + steps
        banned = banned_tokens(self._sequences[places], lengths, self._ngram_size, log_probs.shape[-1])
        return log_probs.masked_fill(banned, float("-inf"))
