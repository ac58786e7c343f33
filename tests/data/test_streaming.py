"""Data larger than memory trains as data in memory does: same records, exact order, same faults, little memory."""

import gzip
import itertools
import json
import subprocess
import sys

import pytest

from qswitch.config import DataSection
from qswitch.data.gather import gather_prompts
from qswitch.data.loader import LARGEST_SHUFFLED_LIST, Mixture, Permutation, PromptLoader, PromptsInMemory
from qswitch.data.streaming import StreamedPrompts, build_index, json_lines_files
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


def gathered(train, **changes):
    data = {"train": train, "num_validation": 3, **changes}
    config = build_config({"teacher": {"model": "t"}, "student": {"model": "s"}, "data": data,
                           "rollout": {"max_new_tokens": 16}})  # fmt: skip
    return gather_prompts(config, PromptEncoder(tiny_tokenizer(), "plain"))


def contents(found):
    loader = PromptLoader(found.train, 7)
    taken = [loader.next(1)[0] for _ in range(found.report.training_prompts)]
    return sorted((p.text, tuple(p.response_ids), visit) for p, visit in taken)


def test_streamed_prompts_are_those_in_memory(tmp_path):
    path = write(tmp_path / "a.jsonl", [*rows(20), None, {"prompt": "last", "response": "one"}])
    memory, streamed = gathered(str(path)), gathered(str(path), streaming=True)
    assert streamed.report.records == memory.report.records == 21
    assert streamed.report.training_prompts == memory.report.training_prompts == 18
    everything = {"last", *(f"say {i}" for i in range(20))}
    for found in (memory, streamed):
        trained, held_out = {text for text, _, _ in contents(found)}, {p.text for p in found.held_out}
        assert len(held_out) == 3 and not trained & held_out and trained | held_out == everything
        assert all(visit == 0 for _, _, visit in contents(found))
    by_text = {p.text: p.response_ids for p in memory.train}
    assert all(ids == tuple(by_text[text]) for text, ids, _ in contents(streamed) if text in by_text)


def test_a_validation_file_takes_no_records_from_the_count(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(20))
    validation = write(tmp_path / "v.jsonl", [*rows(4), {"prompt": "elsewhere", "response": "yes"}])
    report = gathered(str(path), streaming=True, validation=str(validation)).report
    assert (report.training_prompts, report.held_out_prompts) == (20, 3)


def test_a_streamed_order_resumes_exactly(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(30))
    loader = PromptLoader(gathered(str(path), streaming=True).train, 3)
    loader.next(11)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = [(p.example_id, v) for p, v in loader.next(60)]
    again = PromptLoader(gathered(str(path), streaming=True).train, 3)
    again.load_state_dict(state)
    assert [(p.example_id, v) for p, v in again.next(60)] == expected


def test_other_content_is_told_on_resume(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(30))
    state = PromptLoader(gathered(str(path), streaming=True).train, 3).state_dict()
    write(path, [*rows(29), {"prompt": "say 29", "response": "it is 92"}])
    with pytest.raises(DataError, match="changed since the checkpoint"):
        PromptLoader(gathered(str(path), streaming=True).train, 3).load_state_dict(state)


@pytest.mark.parametrize("ending", ["jsonl.gz", "csv"])
def test_other_formats_are_written_out_as_lines_first(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    if ending == "csv":
        path.write_text("prompt,response\n" + "".join(f"say {i},it is {i}\n" for i in range(12)))
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows(12)).encode()))
    plain = write(tmp_path / "plain.jsonl", rows(12))
    assert contents(gathered(str(path), streaming=True)) == contents(gathered(str(plain), streaming=True))


def test_a_bad_line_is_found_before_training_with_its_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "fine"}\n\n{"prompt": }\n')
    with pytest.raises(DataError, match=r"a\.jsonl line 3: not valid JSON"):
        gathered(str(path), streaming=True)
    assert not list((tmp_path / "cache" / "data").glob("*.partial"))


def test_oddities_are_counted(tmp_path, caplog):
    found = {}
    odd = [*rows(8), {"prompt": "say 1", "response": "it is 1"}, {"prompt": "x", "response": " "}, {"prompt": "y"}]
    path = write(tmp_path / "a.jsonl", odd)
    for streaming in (False, True):
        caplog.clear()
        report = gathered(str(path), streaming=streaming).report
        found[streaming] = (report.records, report.duplicates, report.empty_responses, report.without_response)
        assert "repeat the prompt and response" in caplog.text and "responses are empty" in caplog.text
    assert found[False] == found[True] == (11, 1, 1, 2)


def test_too_long_and_held_out_records_are_skipped_on_the_way(tmp_path):
    path = write(tmp_path / "a.jsonl", [*rows(6), {"prompt": "x" * 90, "response": "y"}])
    held = write(tmp_path / "v.jsonl", [{"prompt": "say 2"}])
    found = gathered(str(path), streaming=True, validation=str(held), max_prompt_tokens=40)
    loader = PromptLoader(found.train, 0)
    assert {p.text for p, _ in loader.next(20)} == {f"say {i}" for i in (0, 1, 3, 4, 5)}


def test_a_set_without_any_usable_prompt_ends(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "x" * 90}])
    data = DataSection(train=str(path), max_prompt_tokens=5)
    (file,) = json_lines_files(str(path), "train", tmp_path / "c")
    index = build_index(file, data, seed=0, num_lowest=0, folder=tmp_path / "c")
    prompts = StreamedPrompts([index], PromptEncoder(tiny_tokenizer(), "plain"), data, seed=0, max_response_tokens=8)
    with pytest.raises(DataError, match="None of 1 records is left"):
        PromptLoader(prompts, 0).next(1)


# ------------------------------------------------------------------------------------------------------ order, mixture


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 64, 1000, 4097])
def test_a_permutation_holds_every_index_once(size):
    order = Permutation(size, "key")
    assert sorted(order[i] for i in range(size)) == list(range(size))


def test_permutations_of_other_keys_differ_and_look_random():
    size = 20_000
    first, second = ([Permutation(size, key)[i] for i in range(size)] for key in ("a", "b"))
    assert sum(x == y for x, y in zip(first, second, strict=True)) < 10
    # Of a random permutation half of the neighbours rise, and the mean step is a third of the size.
    steps = [b - a for a, b in itertools.pairwise(first)]
    assert abs(sum(s > 0 for s in steps) / len(steps) - 0.5) < 0.02
    assert abs(sum(abs(s) for s in steps) / len(steps) / size - 1 / 3) < 0.02


def test_a_large_set_takes_the_permutation_and_a_small_one_the_shuffle():
    from qswitch.data.loader import _EpochOrder

    assert isinstance(_EpochOrder(LARGEST_SHUFFLED_LIST + 1, 0, 0).order, Permutation)
    assert isinstance(_EpochOrder(10, 0, 0).order, list)


def in_memory(first, n):
    return PromptsInMemory([Prompt(first + i, [1], None, str(first + i)) for i in range(n)])


def test_a_mixture_gives_every_set_its_share_at_every_moment():
    mixture = Mixture([in_memory(0, 10), in_memory(100, 50), in_memory(1000, 3)], [5, 3, 2])
    loader = PromptLoader(mixture, 1)
    taken = [0, 0, 0]
    for n in range(1, 201):
        prompt, _ = loader.next(1)[0]
        taken[0 if prompt.example_id < 100 else 1 if prompt.example_id < 1000 else 2] += 1
        assert all(abs(t - n * w / 10) <= 1 for t, w in zip(taken, (5, 3, 2), strict=True))
    assert taken == [100, 60, 40]


def test_in_a_mixture_no_example_is_visited_twice_in_the_same_way_and_it_resumes():
    def make():
        return PromptLoader(Mixture([in_memory(0, 4), in_memory(100, 9)], [1, 2]), 5)

    loader = make()
    taken = [(p.example_id, v) for p, v in loader.next(50)]
    assert len(set(taken)) == 50
    state = json.loads(json.dumps(loader.state_dict()))
    expected = loader.next(30)
    again = make()
    again.load_state_dict(state)
    assert again.next(30) == expected


def test_weights_of_the_configuration_make_the_mixture(tmp_path):
    a, b = write(tmp_path / "a.jsonl", rows(12)), write(tmp_path / "b.jsonl", [{"prompt": f"B {i}"} for i in range(40)])
    for streaming in (False, True):
        found = gathered([str(a), str(b)], weights=[3, 1], streaming=streaming)
        taken = [p.text[0] for p, _ in PromptLoader(found.train, 0).next(80)]
        assert (taken.count("s"), taken.count("B")) == (60, 20)


def test_a_long_file_streams_in_constant_memory(tmp_path):
    """Ten times the records, about the same memory: measured in processes of their own, counting no mapped file."""
    code = (
        "import sys, json\n"
        "from pathlib import Path\n"
        "from qswitch.config import DataSection\n"
        "from qswitch.data.streaming import build_index\n"
        "def anonymous():\n"
        "    text = Path('/proc/self/smaps_rollup').read_text()\n"
        "    return int(next(l for l in text.splitlines() if l.startswith('Anonymous:')).split()[1])\n"
        "data = DataSection(train=sys.argv[1])\n"
        "before = anonymous()\n"
        "index = build_index(Path(sys.argv[1]), data, seed=0, num_lowest=8, folder=Path(sys.argv[2]))\n"
        "print(index.counts.records, anonymous() - before)\n"
    )
    used = {}
    for n in (3_000, 30_000):
        path = write(tmp_path / f"{n}.jsonl", ({"prompt": f"question {i} " + "x" * 100} for i in range(n)))
        arguments = [sys.executable, "-c", code, str(path), str(tmp_path / f"index-{n}")]
        answer = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
        records, used[n] = map(int, answer.split())
        assert records == n
    assert used[30_000] - used[3_000] < 3_000, f"KiB: {used}; the 27,000 further records alone are 3.5 MB of text"
