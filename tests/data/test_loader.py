"""Laws of the order: seeded, complete, resumable."""

import json
import random

import pytest
import torch

from qswitch.data.loader import Mixture, PassageLoader, PromptLoader, load_corpus_tokens
from qswitch.data.template import Prompt
from qswitch.errors import DataError


def prompts(n, repeat=1):
    return [Prompt(i, [i + 1], None, f"text {i // repeat}") for i in range(n)]


def ids(taken):
    return [(p.example_id, visit) for p, visit in taken]


def test_same_seed_same_order_other_seed_another():
    first, second, other = (PromptLoader(prompts(20), seed) for seed in (1, 1, 2))
    order = ids(first.next(45))
    assert order == ids(second.next(45))
    assert order != ids(other.next(45))


def test_order_ignores_call_sizes_and_global_random_state():
    whole, parts = PromptLoader(prompts(7), 3), PromptLoader(prompts(7), 3)
    expected = ids(whole.next(30))
    got = []
    for n in (1, 9, 5, 15):
        random.seed(n)
        torch.manual_seed(n)
        got += ids(parts.next(n))
    assert got == expected


def test_each_epoch_covers_all_once_and_visit_counts_earlier_ones():
    loader = PromptLoader(prompts(6), 0)
    epochs = [ids(loader.next(6)) for _ in range(4)]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == [(i, number) for i in range(6)]
    assert len({tuple(i for i, _ in epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("stop", [0, 1, 5, 6, 7, 13])
def test_resumed_equals_uninterrupted(stop):
    loader = PromptLoader(prompts(6), 5)
    if stop:
        loader.next(stop)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = ids(loader.next(20))
    resumed = PromptLoader(prompts(6), 5)
    resumed.next(3)
    resumed.load_state_dict(state)
    assert ids(resumed.next(20)) == expected


def test_state_of_other_data_is_refused():
    state = PromptLoader(prompts(6), 5).state_dict()
    changed = [*prompts(5), Prompt(5, [99], None, "new")]
    for loader, name in (
        (PromptLoader(prompts(7), 5), "size was 6, is 7"),
        (PromptLoader(prompts(6), 4), "seed was 5, is 4"),
        (PromptLoader(changed, 5), "fingerprint"),
    ):
        with pytest.raises(DataError, match=f"The data changed since the checkpoint.*{name}"):
            loader.load_state_dict(state)


def test_parallel_sets_of_one_size_come_in_orders_of_their_own():
    """Two answers to each prompt, in two files: a step has the prompts that it seems to have."""
    for num in (2, 3):
        loader = PromptLoader(Mixture([prompts(100) for _ in range(num)], [1] * num), 3)
        taken = [prompt.example_id for prompt, _ in loader.next(20 * num)]
        by_set = [taken[i::num] for i in range(num)]
        assert len(set(map(tuple, by_set))) == num
        assert sum(len(set(row)) == num for row in zip(*by_set, strict=True)) >= 17
        alone = [prompt.example_id for prompt, _ in PromptLoader(prompts(100), 3).next(20)]
        assert by_set[0] == alone, "the first set's order is that of a set alone"


def test_loader_limits():
    with pytest.raises(DataError, match="no prompt to train on"):
        PromptLoader([], 0)
    with pytest.raises(ValueError, match="at least 1"):
        PromptLoader(prompts(2), 0).next(0)


def test_blocks_cover_the_corpus_once_an_epoch_and_resume():
    corpus = torch.arange(23)
    loader = PassageLoader(corpus, 5, seed=0)
    epoch = loader.next(4)
    assert epoch.shape == (4, 5) and epoch.dtype == torch.long
    assert sorted(epoch.flatten().tolist()) == list(range(20))
    loader.next(3)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = loader.next(9)
    resumed = PassageLoader(corpus, 5, seed=0)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.next(9), expected)
    with pytest.raises(DataError, match="data changed"):
        PassageLoader(corpus + 1, 5, seed=0).load_state_dict(state)
    with pytest.raises(DataError, match=r"23 tokens, less than one passage of loss\.lm_passage_tokens=24"):
        PassageLoader(corpus, 24, seed=0)


class CharTokenizer:
    eos_token_id = 0

    def __call__(self, texts, **kwargs):
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


def test_a_corpus_is_read_no_further_than_needed(tmp_path, monkeypatch):
    lines = ['{"text": "abcd"}\n'] * 300
    path = tmp_path / "c.jsonl"
    path.write_text("".join(lines) + "this line is no JSON\n", encoding="utf-8")
    assert load_corpus_tokens(str(path), CharTokenizer(), max_tokens=7).tolist() == [97, 98, 99, 100, 0, 97, 98]
    with pytest.raises(DataError, match="line 301: not valid JSON"):
        load_corpus_tokens(str(path), CharTokenizer(), max_tokens=5 * 300 + 1)


def test_corpus_tokens_end_every_document(tmp_path):
    (tmp_path / "a.txt").write_text("ab", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "c"}\n{"text": " "}\n{"text": "d"}\n', encoding="utf-8")
    tokens = load_corpus_tokens(str(tmp_path), CharTokenizer())
    assert tokens.tolist() == [97, 98, 0, 99, 0, 100, 0]
    (tmp_path / "b.jsonl").write_text('{"txt": "c"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"b\.jsonl line 1: data\.lm_corpus needs a column text.*Columns: txt"):
        load_corpus_tokens(str(tmp_path), CharTokenizer())
    (tmp_path / "a.txt").write_text("  ", encoding="utf-8")
    with pytest.raises(DataError, match="holds no text"):
        load_corpus_tokens(str(tmp_path / "a.txt"), CharTokenizer())
