"""The table of token ids: used again exactly while nothing changed, never half-written, bounded, larger than memory."""

import json
import os
import signal
import time
import tracemalloc

import pyarrow
import pytest

from qswitch.config import DataSection
from qswitch.data import prompt_table as table_module
from qswitch.data.prompt_table import PromptTable, prompt_table
from qswitch.data.template import PromptEncoder
from qswitch.errors import DataError
from tests.tiny import tiny_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QSWITCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def write(path, num, text="say"):
    path.write_text("".join(json.dumps({"prompt": f"{text} {i}"}) + "\n" for i in range(num)))
    return path


def made(path, *, encoder=None, notes=None, limit=None, **data):
    """The table, and whether it was tokenised now."""
    heard = [] if notes is None else notes
    section = DataSection(train=str(path), **data)
    encoder = encoder or PromptEncoder(tiny_tokenizer(), "plain")
    found = prompt_table(section.train, section, encoder, split="train", limit=limit, notify=lambda *n: heard.append(n))
    return PromptTable(found, max_prompt_tokens=99, max_response_tokens=9), any(n[0] == "tokenising" for n in heard)


def test_prompts_are_those_of_the_encoder(tmp_path):
    path = tmp_path / "a.jsonl"
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "And?"), ("assistant", "No")]
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in turns], "max_new_tokens": 7},
        {"prompt": "alone"},
        {"prompt": "blank", "response": ""},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = PromptEncoder(tiny_tokenizer(), "plain")
    from qswitch.data.records import load_records

    expected = encoder.encode_batch(load_records(DataSection(train=str(path)), str(path)))
    found, _ = made(path, encoder=encoder)
    assert list(found) == found[:3] == expected
    assert found[-1] == expected[-1] and expected[0].earlier_turns


def test_a_table_is_used_again_until_what_it_depends_on_changes(tmp_path):
    path = write(tmp_path / "a.jsonl", 5)
    assert made(path)[1]
    assert not made(path)[1]
    assert not made(path, max_prompt_tokens=7, num_validation=2)[1], "limits apply when the table is read"
    changes = {
        "template": lambda: made(path, encoder=PromptEncoder(tiny_tokenizer(), "alpaca")),
        "tokenizer": lambda: made(path, encoder=PromptEncoder(tiny_tokenizer("abcsay 0123456789"), "plain")),
        "end": lambda: made(path, encoder=PromptEncoder(tiny_tokenizer(), "plain", end_token_ids=[5])),
        "system": lambda: made(path, system_prompt="Be brief."),
        "limit": lambda: made(path, limit=3),
    }
    for name, make in changes.items():
        assert make()[1], name
    write(path, 6)
    assert made(path)[1] and len(made(path)[0]) == 6


def test_a_line_that_cannot_be_read_leaves_no_table(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", 3000)
    path.write_text(path.read_text() + '{"prompt": }\n')
    notes = []
    with pytest.raises(DataError, match=r"a\.jsonl line 3001: not valid JSON"):
        made(path, notes=notes)
    assert not any(n[0] == "tokenising" for n in notes), "found before anything is tokenised"
    assert not list(cache.rglob("*.arrow")) and not list(cache.rglob("*.incomplete"))


def test_a_kill_in_the_middle_leaves_nothing_that_is_used(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", 6_000)

    class Killed(list):
        def append(self, note):
            if note[0] == "tokenising" and note[1] > 3_000:
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            made(path, notes=Killed())
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert list(cache.rglob("*.incomplete")), "it had begun to write"
    found, tokenised = made(path)
    assert tokenised and len(found) == 6_000 and found[-1].text == "say 5999"
    assert not list(cache.rglob("*.incomplete"))


def test_the_cache_is_swept(tmp_path, cache, monkeypatch):
    made(write(tmp_path / "old.jsonl", 5))
    (old,) = cache.iterdir()
    (cache / "killed" / "x.incomplete").mkdir(parents=True)
    (cache / "writing" / "x.incomplete").mkdir(parents=True)
    long_ago = time.time() - 2 * table_module.ABANDONED_AFTER_S
    for path in (cache / "killed", *old.rglob("*"), old):
        os.utime(path, (long_ago, long_ago))
    made(write(tmp_path / "new.jsonl", 5))
    assert old.exists() and (cache / "writing").exists() and not (cache / "killed").exists()
    monkeypatch.setattr(table_module, "KEPT_BYTES", 1)
    assert made(write(tmp_path / "newest.jsonl", 5))[0][0].text == "say 0"
    assert not old.exists(), "the tables used longest ago make room"


def test_four_times_the_records_take_about_the_same_memory(tmp_path):
    """Python's objects at their peak, beside a few bytes a record; Arrow's buffers are on disk."""
    peaks = {}
    for num in (2_000, 8_000):
        path = write(tmp_path / f"{num}.jsonl", num, "x" * 60)
        tracemalloc.start()
        prompts, _ = made(path)
        peaks[num] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(prompts) == num
        assert pyarrow.total_allocated_bytes() < 1_000_000
    assert peaks[8_000] - peaks[2_000] < 500_000, f"bytes: {peaks}; as lists, 6,000 prompts of 66 ids take 3 MB"
