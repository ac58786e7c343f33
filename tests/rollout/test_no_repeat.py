"""Banned n-grams against transformers' own logits processor, alone and inside a rollout."""

from __future__ import annotations

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor

from qswitch.models.language_model import LanguageModel
from qswitch.rollout.decode import RolloutRequest, rollout
from qswitch.rollout.no_repeat import banned_tokens
from qswitch.rollout.policy import StudentPolicy, SwitchPolicy, Threshold
from tests.tiny import VOCAB_SIZE, tiny_model

SMALL_VOCABULARY = 2
"""Few tokens, so that n-grams repeat by themselves."""


@pytest.mark.parametrize("ngram_size", [1, 2, 3, 6])
def test_bans_what_transformers_bans(ngram_size: int):
    generator = torch.Generator().manual_seed(ngram_size)
    width = 60
    lengths = torch.tensor([60, 59, 31, 7, 6, 5, 2, 1])
    sequences = torch.randint(0, SMALL_VOCABULARY, (len(lengths), width), generator=generator)
    ours = banned_tokens(sequences, lengths, ngram_size, SMALL_VOCABULARY)
    processor = NoRepeatNGramLogitsProcessor(ngram_size)
    for row, length in enumerate(lengths.tolist()):
        scores = processor(sequences[row : row + 1, :length], torch.zeros(1, SMALL_VOCABULARY))
        assert ours[row].tolist() == scores[0].isinf().tolist(), (row, length)
    assert ours.any() and not ours.all()


def test_padding_behind_the_row_bans_nothing_and_padded_vocabulary_ids_are_ignored():
    sequences = torch.tensor([[1, 2, 3, 1, 2, 9, 9, 9], [5, 5, 5, 5, 0, 0, 0, 0]])
    banned = banned_tokens(sequences, torch.tensor([5, 4]), 3, vocab_size=5)
    assert banned.tolist() == [[False, False, False, True, False], [False] * 5]


def test_a_rollout_repeats_no_ngram_and_does_not_depend_on_the_batch():
    model = LanguageModel(tiny_model("llama", seed=3, dtype=torch.float64))
    requests = [RolloutRequest(i, 0, [5 + i, 6, 7, 5 + i][: 2 + i % 3], 40) for i in range(5)]

    def write(batch_size: int, ngram_size: int) -> list[list[int]]:
        written, _ = rollout(
            requests, teacher=None, student=model, policy=StudentPolicy(), seed=1, temperature=0.0, eos_ids=[],
            pad_id=0, batch_size=batch_size, keep="nothing", no_repeat_ngram_size=ngram_size,
        )  # fmt: skip
        return [r.prompt_ids + r.response_ids for r in written]

    def repeats(row: list[int], n: int) -> bool:
        grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
        return len(set(grams)) < len(grams)

    assert any(repeats(row, 2) for row in write(5, 0)), "greedy tiny models loop; else this test shows nothing"
    together = write(5, 2)
    assert not any(repeats(row, 2) for row in together)
    assert together == write(1, 2)

    # The same tokens as transformers' generate with its processor.
    for request, row in zip(requests, together, strict=True):
        prompt = torch.tensor([request.prompt_ids])
        expected = model.hf.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False,
            no_repeat_ngram_size=2, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert row == expected[0].tolist()
    assert VOCAB_SIZE > 40


def test_two_writers_are_refused():
    model = LanguageModel(tiny_model())
    policy = SwitchPolicy(Threshold("constant", 1.0, 0.1, 0.2, 4))
    with pytest.raises(ValueError, match="single writer"):
        rollout(
            [RolloutRequest(0, 0, [5], 4)], teacher=model, student=model, policy=policy, seed=0, temperature=1.0,
            eos_ids=[2], pad_id=0, batch_size=1, keep="nothing", no_repeat_ngram_size=6,
        )  # fmt: skip
