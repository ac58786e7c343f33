"""From data settings to disjoint prompt sets: the same from every format, counted, in shares, resumable."""

import gzip
import json
import random

import pytest

from qswitch.config import DataSection
from qswitch.data.gather import gather_prompts, held_out_rank
from qswitch.data.loader import Mixture, PromptLoader
from qswitch.data.records import training_records
from qswitch.data.template import Prompt, PromptEncoder
from qswitch.errors import DataError
from qswitch.layers import build_config
from tests.tiny import tiny_tokenizer


def write(path, rows):
    path.write_text("".join((json.dumps(row) if row is not None else "") + "\n" for row in rows), encoding="utf-8")
    return path


def rows(n):
    return [{"prompt": f"say {i}", "response": f"it is {i}"} for i in range(n)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QSWITCH_CACHE", str(tmp_path / "cache"))


def gathered(train, max_new_tokens=16, seed=0, **changes):
    data = {"train": str(train) if not isinstance(train, list) else train, "num_validation": 3, **changes}
    config = build_config({"teacher": {"model": "t"}, "student": {"model": "s"}, "data": data, "seed": seed,
                           "rollout": {"max_new_tokens": max_new_tokens}})  # fmt: skip
    return gather_prompts(config, PromptEncoder(tiny_tokenizer(), "plain"))


def texts(prompts):
    return [p.text for p in prompts]


def contents(found):
    return [(p.example_id, p.text, tuple(p.prompt_ids), tuple(p.response_ids or ())) for p in found.train]


@pytest.mark.parametrize("ending", ["jsonl.gz", "csv"])
def test_every_format_gives_the_same_prompts(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    if ending == "csv":
        path.write_text("prompt,response\n" + "".join(f"say {i},it is {i}\n" for i in range(12)))
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows(12)).encode()))
    plain, other = gathered(write(tmp_path / "plain.jsonl", rows(12))), gathered(path)
    assert contents(other) == contents(plain)
    assert other.held_out == plain.held_out


def test_the_split_against_the_rule_in_words(tmp_path):
    """Of the distinct texts those with the lowest draws are held out; whatever repeats one leaves training."""
    data = [{"prompt": f"text {i // 2}"} for i in range(80)]
    found = gathered(write(tmp_path / "a.jsonl", data), num_validation=6)
    draws = sorted({f"text {i}" for i in range(40)}, key=held_out_rank)
    assert texts(found.held_out) == draws[:6], "in the order of the draw"
    assert all(p.example_id % 2 == 0 for p in found.held_out), "the first record of a text"
    assert set(texts(found.train)) == set(draws[6:]) and len(found.train) == 68


def test_the_split_depends_on_the_text_only(tmp_path):
    data = [{"prompt": f"text {i}"} for i in range(50)]

    def held_out(rows, **changes):
        return texts(gathered(write(tmp_path / "a.jsonl", rows), **{"num_validation": 5, **changes}).held_out)

    assert held_out(data, seed=1) == held_out(data[::-1], seed=2)
    assert held_out(data, num_validation=3) == held_out(data)[:3]
    assert len(set(held_out(data)) & set(held_out([*data, {"prompt": "text 50"}]))) >= 4


def test_a_small_set_gives_a_fifth_of_its_different_prompts(tmp_path):
    same = write(tmp_path / "a.jsonl", [{"prompt": f"text {i % 12}"} for i in range(120)])
    found = gathered(same, num_validation=8)
    assert len(found.held_out) == 2 and len(found.train) == 100
    with pytest.raises(DataError, match=r"num_validation=8 finds nothing to hold out: the data has 1 distinct"):
        gathered(write(tmp_path / "a.jsonl", [{"prompt": "text"}] * 9), num_validation=8)


def test_of_a_validation_file_a_sample_is_scored_and_nothing_is_trained_on(tmp_path):
    """A file in the order of its tasks; both, and all rows of it in training too."""
    given = [{"prompt": f"{task} {i}"} for task in ("sum", "translate") for i in range(60)]
    held = write(tmp_path / "v.jsonl", given)
    train = write(tmp_path / "a.jsonl", [*given, *rows(7), *given])
    found, other = (gathered(train, validation=str(held), num_validation=20, seed=seed) for seed in (1, 2))
    assert set(texts(found.train)) == {f"say {i}" for i in range(7)} and found.report.also_held_out == 240
    assert texts(found.held_out) == sorted((row["prompt"] for row in given), key=held_out_rank)[:20]
    for some in (found.held_out, found.held_out[:8]):
        assert {text.split()[0] for text in texts(some)} == {"sum", "translate"}
    assert found.held_out == other.held_out
    write(held, [*given, *given])
    again = gathered(train, validation=str(held), num_validation=20)
    assert texts(again.held_out) == texts(found.held_out), "a text that stands there twice is scored once"


def test_every_weighted_set_holds_out_its_share(tmp_path):
    files = [write(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i}"} for i in range(num)])
             for name, num in (("big", 900), ("mine", 100), ("tiny", 10))]  # fmt: skip
    found = gathered([str(f) for f in files], weights=[2, 1, 1], num_validation=32)
    names = [text.split()[0] for text in texts(found.held_out)]
    assert {name: names.count(name) for name in names} == {"big": 16, "mine": 8, "tiny": 2}, "tiny gives a fifth"
    assert texts(found.held_out) == sorted(texts(found.held_out), key=held_out_rank)
    assert [len(s) for s in found.train.sets] == [884, 92, 8]
    trained = {text for s in found.train.sets for text in texts(s)}
    assert not trained & set(texts(found.held_out))


@pytest.mark.parametrize(("num", "held", "by_set"), [(12, 12, (6, 6)), (80, 20, (20, 0))])
def test_parallel_weighted_sets_hold_out_other_prompts_and_lose_a_fifth_at_most(tmp_path, num, held, by_set):
    """The same prompts with other responses: each set holds out records of its own, of which both lose the prompt."""
    files = [write(tmp_path / f"{n}.jsonl", [{"prompt": f"say {i}", "response": f"{n} {i}"} for i in range(100)])
             for n in range(2)]  # fmt: skip
    found = gathered([str(f) for f in files], weights=[1, 1], num_validation=num)
    assert len(found.held_out) == len(set(texts(found.held_out))) == held
    assert tuple(sum(p.example_id // 100 == n for p in found.held_out) for n in range(2)) == by_set
    assert [len(s) for s in found.train.sets] == [100 - held] * 2


@pytest.mark.parametrize("small", [1, 2, 3, 30])
def test_a_set_loses_a_fifth_at_most_also_to_a_set_after_it(tmp_path, small):
    """A small set that a later, larger one contains: what the larger one holds out leaves the small one too."""
    for draw in range(20):
        own = [{"prompt": f"say {draw} {i}"} for i in range(small)]
        more = [{"prompt": f"tell {draw} {i}"} for i in range(60)]
        files = [write(tmp_path / "small.jsonl", own), write(tmp_path / "big.jsonl", [*own, *more])]
        found = gathered([str(f) for f in files], weights=[1, 1], num_validation=20)
        lost = [before - len(after) for before, after in zip((small, small + 60), found.train.sets, strict=True)]
        assert lost[0] <= min(max(1, small // 5), small - 1) and lost[1] <= (small + 60) // 5
        assert sum(p.example_id >= small for p in found.held_out) == 10, "the larger one gives its share all the same"


def test_oddities_are_counted_and_said(tmp_path, caplog):
    odd = [
        *rows(8),
        {"prompt": "say 1", "response": "it is 1"},
        {"prompt": "blank", "response": " "},
        {"prompt": "none"},
        {"prompt": "x" * 41, "response": "y"},
        {"prompt": "long", "response": "z" * 20},
        {"prompt": "own limit", "response": "a", "max_new_tokens": 99},
    ]
    held = write(tmp_path / "v.jsonl", [{"prompt": "say 2"}, {"prompt": "elsewhere", "response": "yes"}])
    found = gathered(write(tmp_path / "a.jsonl", odd), validation=str(held), max_prompt_tokens=40)
    report = found.report.to_dict()
    assert report == {
        "records": 14, "training_prompts": 12, "held_out_prompts": 2, "duplicates": 1, "empty_responses": 1,
        "without_response": 2, "too_long": 1, "truncated_responses": 1, "capped_limits": 1, "also_held_out": 1,
        "longest_prompt_tokens": 9, "unused_fields": {},
    }  # fmt: skip
    by_text = {p.text: p for p in found.train}
    assert len(by_text["long"].response_ids) == 16 and 2 not in by_text["long"].response_ids, "cut, without its end"
    assert by_text["own limit"].max_new_tokens == 16, "its own limit never exceeds the planned one"
    assert by_text["blank"].response_ids is None and by_text["none"].response_ids is None
    assert [r.getMessage() for r in caplog.records] == [
        "Dropped 1 of 14 prompts longer than data.max_prompt_tokens=40 (the longest has 41 tokens).",
        "Cut 1 responses to 16 tokens; they end without an end token.",
        "1 of 14 responses are empty and count as none.",
        "Lowered max_new_tokens of 1 records to rollout.max_new_tokens=16, for which the memory is planned.",
        "1 of 14 records repeat the prompt and response of another one; they are kept.",
        "Left out 1 training prompts that data.validation has too.",
    ]


def test_nothing_left_is_an_error(tmp_path):
    long = write(tmp_path / "a.jsonl", [{"prompt": "123456"}])
    with pytest.raises(DataError, match=r"all 1 are longer than data\.max_prompt_tokens=2 \(the longest has 6 tokens"):
        gathered(long, max_prompt_tokens=2)
    with pytest.raises(DataError, match=r"Every training prompt is also in data\.validation"):
        gathered(long, validation=str(long))


def test_a_run_resumes_with_the_prompt_that_was_next(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(30))
    loader = PromptLoader(gathered(path).train, 3)
    loader.next(11)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = [(p.example_id, v) for p, v in loader.next(60)]
    again = PromptLoader(gathered(path).train, 3)
    again.load_state_dict(state)
    assert [(p.example_id, v) for p, v in again.next(60)] == expected
    moved = PromptLoader(gathered(write(tmp_path / "moved.jsonl", rows(30))).train, 3)
    moved.load_state_dict(state)
    assert [(p.example_id, v) for p, v in moved.next(60)] == expected, "the same content under another name"


def test_other_content_is_told_on_resume(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(30))
    state = PromptLoader(gathered(path).train, 3).state_dict()
    for changed in ([*rows(29), {"prompt": "say 29", "response": "it is 92"}], rows(30)[::-1]):
        other = gathered(write(path, changed))
        with pytest.raises(DataError, match="changed since the checkpoint"):
            PromptLoader(other.train, 3).load_state_dict(state)


def test_the_order_is_the_seeded_shuffle_of_the_kept_prompts(tmp_path):
    found = gathered(write(tmp_path / "a.jsonl", rows(30)))
    expected = []
    for epoch in range(2):
        order = list(range(27))
        random.Random(f"5:{epoch}").shuffle(order)
        expected += [(found.train[i].example_id, epoch) for i in order]
    assert [(p.example_id, visit) for p, visit in PromptLoader(found.train, 5).next(54)] == expected


# ------------------------------------------------------------------------------------------------------------- mixture


def some_prompts(first, n):
    return [Prompt(first + i, [1], None, str(first + i)) for i in range(n)]


def test_a_mixture_gives_every_set_its_share_at_every_moment():
    mixture = Mixture([some_prompts(0, 10), some_prompts(100, 50), some_prompts(1000, 3)], [5, 3, 2])
    loader = PromptLoader(mixture, 1)
    taken = [0, 0, 0]
    for n in range(1, 201):
        prompt, _ = loader.next(1)[0]
        taken[0 if prompt.example_id < 100 else 1 if prompt.example_id < 1000 else 2] += 1
        assert all(abs(t - n * w / 10) <= 1 for t, w in zip(taken, (5, 3, 2), strict=True))
    assert taken == [100, 60, 40]


def test_in_a_mixture_no_example_is_visited_twice_in_the_same_way_and_it_resumes():
    def make():
        return PromptLoader(Mixture([some_prompts(0, 4), some_prompts(100, 9)], [1, 2]), 5)

    loader = make()
    taken = [(p.example_id, v) for p, v in loader.next(50)]
    assert len(set(taken)) == 50
    state = json.loads(json.dumps(loader.state_dict()))
    expected = loader.next(30)
    again = make()
    again.load_state_dict(state)
    assert again.next(30) == expected


@pytest.mark.parametrize("weights", [None, [1, 1]])
def test_training_records_are_those_that_are_gathered(tmp_path, weights):
    files = [str(write(tmp_path / f"{n}.jsonl", [{"prompt": f"{n} of {i}"} for i in range(n)])) for n in (9, 7)]
    found = gathered(files, weights=weights, limit=8)
    train = [found.train] if weights is None else found.train.sets
    gathered_texts = [text for prompts in (*train, found.held_out) for text in texts(prompts)]
    records = list(training_records(DataSection(train=files, weights=weights, limit=8)))
    assert sorted(record.messages[-1].content for record in records) == sorted(gathered_texts)
    assert len(records) == (8 if weights is None else 15)


def test_weights_of_the_configuration_make_the_mixture(tmp_path):
    a, b = write(tmp_path / "a.jsonl", rows(12)), write(tmp_path / "b.jsonl", [{"prompt": f"B {i}"} for i in range(40)])
    found = gathered([str(a), str(b)], weights=[3, 1])
    taken = PromptLoader(found.train, 0).next(80)
    everything = [*(p for p, _ in taken), *found.held_out]
    assert all((p.text[0] == "B") == (p.example_id >= 12) for p in everything), "numbered through over both"
    kinds = [p.text[0] for p, _ in taken]
    assert (kinds.count("s"), kinds.count("B")) == (60, 20)
