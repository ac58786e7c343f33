"""Equal maps and equal encodings pass, whatever the padding; anything else names the first difference."""

from __future__ import annotations

import pytest
from transformers import AddedToken

from qswitch.errors import ModelError, TokenizerMismatchError
from qswitch.models import messages
from qswitch.models.vocab import check_tokenizers
from tests.tiny import CHARACTERS, VOCAB_SIZE, tiny_tokenizer


def test_padded_vocabularies_share_the_smaller_range():
    tokenizer = tiny_tokenizer()
    rows = {"teacher_rows": VOCAB_SIZE + 53, "student_rows": VOCAB_SIZE + 21}
    assert check_tokenizers(tokenizer, tiny_tokenizer(), **rows) == VOCAB_SIZE + 21
    assert check_tokenizers(tokenizer, tokenizer, teacher_rows=VOCAB_SIZE, student_rows=VOCAB_SIZE) == VOCAB_SIZE


def test_equal_sizes_with_other_ids_are_refused_and_shown():
    swapped = CHARACTERS.replace("a", "\0").replace("b", "a").replace("\0", "b")
    with pytest.raises(TokenizerMismatchError, match=r"'a' \(teacher id 4, student id 5\)"):
        check_tokenizers(tiny_tokenizer(), tiny_tokenizer(swapped), teacher_rows=99, student_rows=99)


def test_equal_maps_with_another_normaliser_are_refused_and_shown():
    from tokenizers import normalizers

    lower = tiny_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(TokenizerMismatchError, match="The quick brown"):
        check_tokenizers(tiny_tokenizer(), lower, teacher_rows=99, student_rows=99)


def test_a_head_smaller_than_the_tokenizer_is_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ModelError, match="student's head has 70 rows") as refused:
        check_tokenizers(tokenizer, tokenizer, teacher_rows=99, student_rows=70)
    assert not isinstance(refused.value, TokenizerMismatchError), "no other method would help"


def with_special(*tokens: str, special: bool = True):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=special) for token in tokens], special_tokens=special)
    return tokenizer


LLAMA_3 = ("<|eot_id|>", "<|reserved_special_token_4|>", "<|reserved_special_token_5|>")
LLAMA_3_1 = ("<|eot_id|>", "<|eom_id|>", "<|reserved_special_token_2|>")


def test_special_tokens_that_one_model_holds_in_reserve_may_have_a_name_in_the_other(caplog, monkeypatch):
    monkeypatch.setattr(messages, "_said", set())
    rows = {"teacher_rows": VOCAB_SIZE + 3, "student_rows": VOCAB_SIZE + 3}
    assert check_tokenizers(with_special(*LLAMA_3), with_special(*LLAMA_3_1), **rows) == VOCAB_SIZE + 3
    assert "2 special tokens have other names" in caplog.text and "<|eom_id|>" in caplog.text
    for other in (with_special("<|eom_id|>", *LLAMA_3[1:]), with_special(*LLAMA_3[:2]),
                  with_special(*LLAMA_3_1, special=False)):  # fmt: skip
        with pytest.raises(TokenizerMismatchError, match="different vocabularies"):
            check_tokenizers(with_special(*LLAMA_3), other, **rows)
