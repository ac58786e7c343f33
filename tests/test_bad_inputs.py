"""A corpus of bad inputs: each ends with exit code 2 and one message that names the place, the reason and the remedy.

No traceback, no run directory left behind. A case lists texts that the message must hold, in this order of meaning:
where, what is wrong, what to do. The file is long because it is one table, so that a new case is a row.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml

from qswitch.cli import run
from tests.tiny import CHARACTERS, save_tiny, save_tiny_pair, tiny_config, tiny_tokenizer

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CALLS = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}
GOOD = "".join(json.dumps({"prompt": f"say {i}", "response": f"it is {i}"}) + "\n" for i in range(10))


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A folder in which everything is right; cases copy what they break."""
    folder = tmp_path_factory.mktemp("sound")
    save_tiny_pair(folder)
    (folder / "good.jsonl").write_text(GOOD)
    values = {
        "teacher": {"model": str(folder / "teacher"), "precision": "fp32"},
        "student": {"model": str(folder / "student"), "precision": "fp32", "lora": {"r": 2, "alpha": 2}},
        "data": {"train": str(folder / "good.jsonl"), "num_validation": 2},
        "rollout": {"max_new_tokens": 8},
        "train": {"device": "cpu", "compute_dtype": "fp32", "max_steps": 1, "per_device_train_batch_size": 2,
                  "gradient_accumulation_steps": 1},
    }  # fmt: skip
    (folder / "good.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QSWITCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def refused(arguments: list[str], expected: tuple[str, ...], capsys) -> str:
    before = set(Path.cwd().rglob("*"))
    assert run(arguments) == 2
    printed = capsys.readouterr().err
    errors = [i for i, line in enumerate(printed.splitlines()) if line.startswith("error: ")]
    assert len(errors) == 1, printed
    message = "\n".join(printed.splitlines()[errors[0] :])
    assert "Traceback" not in message
    for text in expected:
        assert text in message, f"{text!r} is not in:\n{message}"
    assert set(Path.cwd().rglob("*")) == before, "something was left behind"
    return message


def distill(sound: Path, *overrides: str) -> list[str]:
    options = [option for override in overrides for option in ("--set", override)]
    return ["distill", "--config", str(sound / "good.yaml"), "--output-dir", "run", *options]


def test_the_sound_folder_is_sound(sound, here):
    assert run(distill(sound)) == 0


# ---------------------------------------------------------------------------------------------------------- data files

LINE = {"prompt": "fine"}


def lines(*rows: Any) -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in (LINE, *rows)).encode()


DATA: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "empty file": ("d.jsonl", b"", ("d.jsonl", "is empty", "Put at least one record")),
    "blank lines only": ("d.jsonl", b"\n \n\n", ("d.jsonl", "holds no records", "name another file")),
    "broken JSON": ("d.jsonl", lines("{"), ("d.jsonl line 2", "not valid JSON", "mend or delete this line")),
    "two objects on a line": ("d.jsonl", lines('{"prompt": "a"} {}'), ("line 2", "Extra data", "one object a line")),
    "a number": ("d.jsonl", lines("12"), ("d.jsonl line 2", "found int", 'such as {"prompt": "..."}')),
    "a list": ("d.jsonl", lines("[1]"), ("d.jsonl line 2", "found list", "expected an object")),
    "a JSON array under the name of lines": (
        "d.jsonl",
        json.dumps([{"prompt": "a"}, {"prompt": "b"}]).encode(),
        ("d.jsonl line 1", "one JSON array", "Rename it to end in .json"),
    ),
    "a JSON array over several lines": (
        "d.jsonl",
        b'[\n{"prompt": "a"}\n]\n',
        ("d.jsonl line 1", "one JSON array", "Rename it to end in .json"),
    ),
    "NaN": ("d.jsonl", lines('{"prompt": NaN}'), ("d.jsonl line 2", "NaN is not JSON", "Mend or delete")),
    "Latin-1": ("d.jsonl", b'{"prompt": "Gr\xfc\xdfe"}\n', ("d.jsonl line 1", "not UTF-8", "iconv")),
    "UTF-16": ("d.jsonl", GOOD.encode("utf-16"), ("d.jsonl line 1", "not UTF-8", "Save the file as UTF-8")),
    "no prompt column": ("d.jsonl", lines({"frage": "x"}), ("line 2", "no prompt found", "data.columns.prompt=frage")),
    "misspelt column": ("d.jsonl", lines({"promt": "x"}), ("line 2", "Nearest: prompt", "data.columns")),
    "empty prompt": ("d.jsonl", lines({"prompt": " "}), ("line 2", "the prompt is empty", "delete this record")),
    "null prompt": ("d.jsonl", lines({"prompt": None}), ("line 2", "prompt is null", "Fill it in")),
    "object as prompt": ("d.jsonl", lines({"prompt": {}}), ("line 2", "must be text, found an object", "Mend")),
    "truth as prompt": ("d.jsonl", lines({"prompt": True}), ("line 2", "found true or false", "Mend")),
    "half a character": ("d.jsonl", lines('{"prompt": "\\ud83d"}'), ("line 2", "half a character", "escape")),
    "object as response": (
        "d.jsonl",
        lines({"prompt": "a", "response": {}}),
        ("line 2", "response must be text", "Mend"),
    ),
    "two response turns": (
        "d.jsonl",
        lines({"prompt": "a", "completion": [{"role": "assistant", "content": "x"}] * 2}),
        ("line 2", "one assistant turn", "data.columns.messages"),
    ),
    "object as messages": ("d.jsonl", lines({"messages": {}}), ("line 2", "a list of turns, found an object", "Mend")),
    "text as messages": ("d.jsonl", lines({"messages": "Hi"}), ("line 2", "found text", "column name prompt")),
    "no turns": ("d.jsonl", lines({"messages": []}), ("line 2", "no user turn", "Add the question")),
    "text as a turn": ("d.jsonl", lines({"messages": ["Hi"]}), ("line 2", "messages turn 1", "role and content")),
    "turn without content": (
        "d.jsonl",
        lines({"messages": [{"role": "user"}]}),
        ("line 2", "messages turn 1 needs role and content", "Mend"),
    ),
    "unknown role": (
        "d.jsonl",
        lines({"messages": [{"role": "boss", "content": "x"}]}),
        ("line 2", "the role 'boss'", "Use system, user, assistant or tool"),
    ),
    "image": (
        "d.jsonl",
        lines({"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
        ("line 2", "not text (an image?)", "Keep text only"),
    ),
    "only the assistant speaks": (
        "d.jsonl",
        lines({"messages": [{"role": "assistant", "content": "x"}]}),
        ("line 2", "no user turn", "Add"),
    ),
    "ends with the system": (
        "d.jsonl",
        lines({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}),
        ("line 2", "ends with a turn of the system", "must end with the user's"),
    ),
    "no room for a token": (
        "d.jsonl",
        lines({"prompt": "a", "max_new_tokens": 0}),
        ("line 2", "max_new_tokens", "a whole number from 1"),
    ),
    "words for a number": (
        "d.jsonl",
        lines({"prompt": "a", "max_new_tokens": "many"}),
        ("line 2", "found 'many'", "a whole number from 1"),
    ),
    "broken json file": ("d.json", b'[{"prompt": "a"},', ("d.json line 1", "not valid JSON", "Mend the file")),
    "number in a json file": ("d.json", b"3", ("d.json", "expected a list of objects", "found int")),
    "csv with a cell too many": (
        "d.csv",
        b"prompt\na,b\n",
        ("d.csv line 2", "2 cells, but the header has 1", "quotes"),
    ),
    "csv with equal columns": ("d.csv", b"prompt,prompt\na,b\n", ("d.csv line 1", "the same name", "Rename one")),
    "csv without end of quote": ("d.csv", b'prompt\n"a\n', ("d.csv line 2", "not valid CSV", "Check the quotes")),
    "csv in Latin-1": ("d.csv", b"prompt\nfine\n\xfc\n", ("d.csv line 3", "not UTF-8", "iconv")),
    "csv with a header only": ("d.csv", b"prompt\n", ("d.csv", "holds no records", "Put at least one")),
    "no parquet": ("d.parquet", b"PAR1 no", ("d.parquet", "not readable as parquet", "Write the file anew")),
    "a Word file": ("d.docx", b"PK", ("d.docx", "end in .docx are not read", "Use .jsonl")),
    "gzip cut off": ("d.jsonl.gz", gzip.compress(GOOD.encode())[:40], ("d.jsonl.gz", "cut off", "Copy or download")),
    "no gzip": ("d.jsonl.gz", b"plain text", ("d.jsonl.gz", "damaged or cut off", "again")),
    "bzip2 cut off": ("d.jsonl.bz2", bz2.compress(GOOD.encode())[:40], ("d.jsonl.bz2", "cut off", "again")),
    "no zstandard": ("d.jsonl.zst", b"plain text, none", ("d.jsonl.zst", "damaged or cut off", "again")),
    "zstandard cut off": (
        "d.jsonl.zst",
        pyarrow.compress(GOOD.encode() * 40, "zstd", asbytes=True)[:40],
        ("d.jsonl.zst", "cut off", "again"),
    ),
    "compressed parquet": ("d.parquet.gz", gzip.compress(b"x"), ("d.parquet.gz", "is not read from", "Unpack it")),
    "bad line in a compressed file": (
        "d.jsonl.gz",
        gzip.compress(lines("{")),
        ("d.jsonl.gz line 2", "not valid JSON", "mend or delete"),
    ),
    # Conversations, tools and preferences
    "preference pair": (
        "d.jsonl",
        lines({"prompt": "a", "chosen": "b", "rejected": "c"}),
        ("line 2", "learns from no preferences", "data.columns.response=chosen"),
    ),
    "preference between conversations": (
        "d.jsonl",
        lines({"chosen": TURNS, "rejected": TURNS}),
        ("line 2", "learns from no preferences", "data.columns.messages=chosen"),
    ),
    "answer with a verdict": (
        "d.jsonl",
        lines({"prompt": "a", "completion": "b", "label": False}),
        ("line 2", "a label that is true or false", "data.columns.response=completion"),
    ),
    "call that the template leaves out": (
        "d.jsonl",
        lines({"messages": [TURNS[0], CALLS]}) + GOOD.encode(),
        ("line 2", "no place for tool_calls", "data.template"),
    ),
    "call without a name": (
        "d.jsonl",
        lines({"messages": [TURNS[0], {"role": "assistant", "tool_calls": [{"arguments": {}}]}]}),
        ("line 2", "turn 2 holds a tool call without the name", "Mend"),
    ),
    "call with a list of arguments": (
        "d.jsonl",
        lines({"messages": [TURNS[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}]}),
        ("line 2", "calls f with a list", "must be an object"),
    ),
    "call with broken arguments": (
        "d.jsonl",
        lines({"messages": [TURNS[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}),
        ("line 2", "arguments of f is text that is no JSON", "Mend"),
    ),
    "calls as a number": (
        "d.jsonl",
        lines({"messages": [TURNS[0], {"role": "assistant", "tool_calls": 3}]}),
        ("line 2", "tool_calls must be a list of calls, found a number", "Mend"),
    ),
    "user who calls": (
        "d.jsonl",
        lines({"messages": [{**CALLS, "role": "user"}, TURNS[1]]}),
        ("line 2", "tool_calls in a turn of the user", "Only the assistant"),
    ),
    "tool before any question": (
        "d.jsonl",
        lines({"messages": [{"role": "tool", "content": "21"}, TURNS[1]]}),
        ("line 2", "holds no user turn", "Add the question"),
    ),
    "tools as an object": (
        "d.jsonl",
        lines({"prompt": "a", "tools": {"name": "f"}}),
        ("line 2", "tools must be a list of tools", "found an object"),
    ),
    "tool without a name": (
        "d.jsonl",
        lines({"prompt": "a", "tools": [{"type": "function"}]}),
        ("line 2", "tools entry 1 is no tool", "needs a name"),
    ),
    "tools as other text": (
        "d.jsonl",
        lines({"prompt": "a", "tools": "the usual ones"}),
        ("line 2", "tools is text that is no JSON", "Mend"),
    ),
    "template arguments as a list": (
        "d.jsonl",
        lines({"prompt": "a", "chat_template_kwargs": [1]}),
        ("line 2", "chat_template_kwargs must be an object", "found a list"),
    ),
    "template argument that is ours": (
        "d.jsonl",
        lines({"prompt": "a", "chat_template_kwargs": {"tokenize": True}}),
        ("line 2", "chat_template_kwargs holds tokenize", "Remove it"),
    ),
    "half a character in the thinking": (
        "d.jsonl",
        lines({"messages": [TURNS[0], {**TURNS[1], "reasoning_content": "\ud800"}]}),
        ("line 2", "turn 2 reasoning_content holds half a character", "Mend"),
    ),
    "conversation as a response": (
        "d.jsonl",
        lines({"prompt": "a", "response": TURNS}),
        ("line 2", "one assistant turn, found 2 turns", "data.columns.messages=response"),
    ),
    "one prompt": ("d.jsonl", lines(), ("nothing to hold out", "1 distinct prompts", "data.validation")),
    "only long prompts": (
        "d.jsonl",
        (json.dumps({"prompt": "x" * 400}) + "\n").encode() * 3,
        ("data.max_prompt_tokens=256", "all 3 are longer", "Raise data.max_prompt_tokens"),
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_data_file(case, sound, here, capsys):
    name, content, expected = DATA[case]
    (here / name).write_bytes(content)
    refused(distill(sound, f"data.train={name}"), expected, capsys)


@pytest.mark.parametrize("case", ["no prompt column", "Latin-1", "preference pair", "tools as an object"])
def test_a_dry_run_reads_the_first_rows(case, sound, here, capsys):
    name, content, expected = DATA[case]
    (here / name).write_bytes(content)
    refused([*distill(sound, f"data.train={name}"), "--dry-run"], expected, capsys)


# ------------------------------------------------------------------------------------------------- settings of the data


def write_lines(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare_folders(here: Path) -> None:
    (here / "good.jsonl").write_text(GOOD)
    (here / "empty").mkdir()
    for split in ("train", "test"):
        (here / "splits").mkdir(exist_ok=True)
        (here / "splits" / f"{split}.jsonl").write_text(GOOD)
    (here / "saved").mkdir()
    (here / "saved" / "state.json").write_text("nonsense")
    write_lines(here / "prompts.jsonl", *({"prompt": f"say {i}"} for i in range(10)))
    write_lines(here / "titled.jsonl", {"title": "no text in it"})
    (here / "short.txt").write_text("too short")
    (here / "endless.jinja").write_text("{% for m in messages %}{{ m.content }}")
    (here / "silent.jinja").write_text("always the same")
    (here / "raising.jinja").write_text("{{ raise_exception('no') }}")


SETTINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "file that is not there": (("data.train=god.jsonl",), ("god.jsonl does not exist", "Did you mean", "good.jsonl")),
    "folder that is not there": (
        ("data.train=no/where.jsonl",),
        ("no/where.jsonl", "Neither does its folder", "start"),
    ),
    "empty folder": (("data.train=empty",), ("The folder empty", "holds no data file", ".jsonl")),
    "folder without the split": (
        ("data.train=splits", "data.split=validation"),
        ("splits", "test, train", "validation"),
    ),
    "saved data set that is none": (("data.train=saved",), ("saved", "not readable as a saved data set", "anew")),
    "unknown package": (
        ("data.train=package:no_such_package/a.jsonl",),
        ("no_such_package", "installed", "Install it"),
    ),
    "half a package reference": (("data.train=package:json",), ("package:json", "package:MODULE/FILE", "write it as")),
    "no data": (("data.train=[]",), ("data.train", "No data file is named", "Set data.train")),
    "unknown field of the column map": (
        ("data.columns={promt: prompt}",),
        ("data.columns.promt", "Did you mean", "prompt"),
    ),
    "column that is not there": (("data.columns={prompt: promt}",), ("data.columns.prompt", "promt", "Did you mean")),
    "nobody left to train on": (
        ("data.train=good.jsonl", "data.validation=good.jsonl", "data.num_validation=99"),
        ("Every training prompt", "data.validation", "Name another file"),
    ),
    "validation that is not there": (
        ("data.validation=dev.jsonl",),
        ("data.validation", "does not exist", "Did you mean"),
    ),
    "responses wanted, none there": (
        ("method=kd", "data.train=prompts.jsonl"),
        ("method=kd", "line 1 has none", "Add them"),
    ),
    "some ground truth, none there": (
        ("data.ground_truth_mix=0.5", "data.train=prompts.jsonl"),
        ("0.5", "has none", "set data.ground_truth_mix=0"),
    ),
    "weights without partners": (("data.weights=[1, 2]",), ("data.weights", "2 entries, but data.train 1", "Give one")),
    "negative weight": (
        ("data.train=[a.jsonl, b.jsonl]", "data.weights=[1, -1]"),
        ("data.weights", "above 0", "Remove the entries"),
    ),
    "weight of a single file": (("data.weights=[1]",), ("data.weights", "no effect", "Remove it")),
    "split of a validation that is not there": (
        ("data.validation_split=dev",),
        ("data.validation_split", "no effect", "set"),
    ),
    "corpus that is not there": (("data.lm_corpus=corpus.txt",), ("data.lm_corpus", "does not exist", "Did you mean")),
    "corpus without text": (
        ("data.lm_corpus=titled.jsonl",),
        ("titled.jsonl line 1", "needs a column text", "Columns"),
    ),
    "corpus shorter than a block": (
        ("data.lm_corpus=short.txt",),
        ("data.lm_corpus", "less than one passage", "Add text"),
    ),
    "template that is not there": (
        ("data.template=no.jinja",),
        ("data.template=no.jinja", "no such file", "Use teacher"),
    ),
    "template that is no Jinja": (
        ("data.template=endless.jinja",),
        ("endless.jinja", "not a usable", "Mend the template"),
    ),
    "template that says nothing": (("data.template=silent.jinja",), ("silent.jinja", "leaves out", "must print")),
    "template that refuses": (("data.template=raising.jinja",), ("raising.jinja", "not a usable", "Mend the template")),
    "template argument that nothing reads": (
        ("data.template_kwargs={enable_thinking: false}",),
        ("data.template_kwargs.enable_thinking", "does not read it", "Remove it"),
    ),
    "template argument for a fixed layout": (
        ("data.template=alpaca", "data.template_kwargs={enable_thinking: false}"),
        ("data.template_kwargs has no effect", "data.template=alpaca", "Remove it"),
    ),
    "template argument that is not the user's": (
        ("data.template_kwargs={messages: []}",),
        ("data.template_kwargs", "messages is not for the template", "Remove it"),
    ),
    "template argument without a name": (
        ("data.template_kwargs={'enable thinking': false}",),
        ("data.template_kwargs", "'enable thinking' is no name", "letters, digits and _"),
    ),
    "end token that is not there": (
        ("data.end_tokens=['</S>']",),
        ("data.end_tokens names </S>", "does not have", "Did you mean </s>?"),
    ),
    "end token without letters": (("data.end_tokens=['']",), ("data.end_tokens", "must be a token", "<end_of_turn>")),
    "setting of before": (("data.streaming=true",), ("data.streaming is not a setting", "any size", "Remove it")),
    "file without a name": (("data.train=''",), ("data.train", "name of a file is empty", "Name a file")),
    "more held out than anybody has": (
        ("data.num_validation=1000000000",),
        ("data.num_validation = 1000000000", "less than or equal to 100000"),
    ),
    "limit of nothing": (("data.limit=0",), ("data.limit", "greater than or equal to 1", "= 0")),
    # Training and rollout settings
    "unknown section": (("trian.max_steps=3",), ("trian", "not a setting", "Did you mean train?")),
    "unknown key": (("train.max_step=3",), ("train.max_step", "not a setting", "Did you mean train.max_steps?")),
    "text for a number": (("train.max_steps=many",), ("train.max_steps", "'many'", "valid integer")),
    "yes for a number": (("train.max_steps=true",), ("train.max_steps = true", "expected a number")),
    "another trainer's 4 bits": (("load_in_4bit=true",), ("load_in_4bit", "teacher.precision=nf4")),
    "another trainer's dtype": (("train.bf16=true",), ("train.bf16 is not a setting", "train.compute_dtype=bf16")),
    "rank of a module that is not there": (
        ("student.lora.rank_pattern={foo: 3}",),
        ("student.lora.rank_pattern names foo", "does not have", "Its linear modules are"),
    ),
    "alpha of a path that is not there": (
        ("student.lora.alpha_pattern={'layers.9.self_attn.q_proj': 3}",),
        ("student.lora.alpha_pattern names layers.9.", "no module that has an adapter", "write a name"),
    ),
    "rank of a module without an adapter": (
        ("student.lora.target_modules=[q_proj]", "student.lora.rank_pattern={k_proj: 3}"),
        ("student.lora.rank_pattern names k_proj", "no module that has an adapter", "They are q_proj"),
    ),
    "pattern that is none": (
        ("student.lora.rank_pattern={'q_proj(': 3}",),
        ("student.lora.rank_pattern", "is no regular expression", "write a module's name"),
    ),
    "rank of nothing": (
        ("student.lora.rank_pattern={q_proj: 0}",),
        ("rank_pattern.q_proj", "greater than or equal"),
    ),
    "negative learning rate": (("learning_rate=-1",), ("train.learning_rate", "-1", "greater than 0")),
    "section as a number": (("train=3",), ("train", "3", "valid dictionary")),
    "unknown policy": (("rollout.policy=ouija",), ("rollout.policy", "'ouija'", "'switch'")),
    "unknown method": (("method=magic",), ("method", "'magic'", "'switch'")),
    "method against itself": (
        ("method=sft", "data.ground_truth_mix=0.5"),
        ("data.ground_truth_mix", "contradicts", "Remove it"),
    ),
    "nothing to learn": (
        ("rollout.policy=student",),
        ("loss.scope=interventions", "means nothing", "Set loss.scope=all"),
    ),
    "setting of another schedule": (
        ("rollout.schedule=linear", "rollout.decay_rate=0.5"),
        ("rollout.decay_rate", "no effect", "change the schedule"),
    ),
    "all warm-up": (("train.warmup_steps=9",), ("train.warmup_steps (9)", "below train.max_steps (1)", "must be")),
    "8-bit optimizer on a CPU": (
        ("optim=paged_adamw_8bit",),
        ("train.optimizer", "needs a GPU", "Set train.optimizer=adamw"),
    ),
    "4-bit weights in full": (
        ("student.adapter=none", "student.lora={}", "student.precision=nf4"),
        ("student.precision=nf4", "cannot be trained in full", "student.adapter=lora"),
    ),
    "unknown tracker": (("report_to=[mlflow]",), ("train.report_to", "'mlflow'", "'tensorboard'")),
    "more than the context": (("max_new_tokens=500",), ("rollout.max_new_tokens", "context of 512", "Lower one")),
    "a GPU that is not there": (("train.device=cuda",), ("train.device=cuda", "GPU", "train.device=cpu")),
    # Models named in the settings
    "model that is not there": (("teacher.model=no where",), ("teacher.model", "no where", "there is no such folder")),
    "folder without a model": (("student.model=empty",), ("student.model", "empty", "config.json")),
    "more layers than there are": (
        ("student.shrink_to_layers=9",),
        ("student.shrink_to_layers is 9", "2 layers", "Lower it"),
    ),
    "adapter on a layer that is not there": (
        ("student.lora.layers_to_transform=[0, 9]",),
        ("student.lora.layers_to_transform names layer 9", "2 layers, 0 to 1", "Remove it"),
    ),
    "adapter on modules that are not there": (
        ("student.lora.target_modules=[qkv]",),
        ("student.lora.target_modules", "does not have", "Its linear modules are"),
    ),
    "adapter on one of several names that is not there": (
        ("lora_target_modules=q_proj, vproj",),
        ("student.lora.target_modules names vproj", "Its linear modules are"),
    ),
    "adapter of the teacher that is not there": (
        ("teacher.adapter=gone",),
        ("teacher.adapter=gone", "no such folder", "Name"),
    ),
    "adapter to start from that is not there": (
        ("student.init_adapter=empty",),
        ("student.init_adapter=empty", "adapter_config.json", "Name a PEFT"),
    ),
    "nf4 in fp64": (("teacher.precision=nf4", "train.compute_dtype=fp64"), ("teacher.precision=nf4", "fp64", "fp32")),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_setting(case, sound, here, capsys):
    prepare_folders(here)
    overrides, expected = SETTINGS[case]
    refused(distill(sound, *overrides), expected, capsys)


# -------------------------------------------------------------------------------------------------- configuration files


def write_config(here: Path, text: str | bytes) -> list[str]:
    (here / "c.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    return ["distill", "--config", "c.yaml"]


CONFIGS: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "broken YAML": ("train: [1,\nteacher", ("c.yaml, line", "not valid YAML")),
    "tab": ("train:\n\tmax_steps: 3", ("c.yaml, line 2", "not valid YAML")),
    "list": ("- a\n- b", ("c.yaml", "expected settings", "found list")),
    "empty": ("", ("c.yaml", "expected settings", "found NoneType")),
    "not UTF-8": (b"about: {name: \xfc}", ("c.yaml", "not UTF-8")),
    "sections missing": ("seed: 3", ("teacher is missing", "student is missing", "data is missing", "--set")),
    "section as text": ("teacher: big\nstudent: small\ndata: x", ("c.yaml", "teacher = 'big'", "valid dictionary")),
    "circle": ("extends: c.yaml", ("c.yaml", "extend each other in a circle")),
    "extends nothing": ("extends: nowhere.yaml", ("nowhere.yaml", "does not exist")),
    "extends an unknown preset": ("extends: smolm2-demo", ("smolm2-demo", "Did you mean smollm2-demo?")),
    "extends a number": ("extends: 3", ("extends = 3", "name one preset or file")),
    "alias against its setting": (
        "learning_rate: 1\ntrain: {learning_rate: 2}",
        ("train.learning_rate is written twice", "keep one"),
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configuration_file(case, here, capsys):
    text, expected = CONFIGS[case]
    arguments = write_config(here, text)
    refused(arguments, expected, capsys)


COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "neither preset nor file": (["distill"], ("--preset NAME or --config FILE", "qswitch presets list")),
    "both": (["distill", "--preset", "smollm2-demo", "--config", "x.yaml"], ("Name either", "presets list")),
    "unknown preset": (["plan", "--preset", "lama"], ("no preset 'lama'", "presets list")),
    "preset as a file": (["distill", "--config", "smollm2-demo"], ("expected a .yaml file", "write --preset")),
    "folder as a file": (["distill", "--config", "f.yaml"], ("f.yaml is a folder, not a file",)),
    "override without a value": (
        ["plan", "--preset", "smollm2-demo", "--set", "seed"],
        ("'seed'", "section.key=value"),
    ),
    "override that is no YAML": (["plan", "--preset", "smollm2-demo", "--set", "seed=["], ("not valid YAML", "quotes")),
    "size of nothing": (
        ["plan", "--preset", "smollm2-demo", "--vram", "none"],
        ("'none' is not a memory size", "12GiB"),
    ),
    "resume what is not there": (["distill", "--resume", "gone"], ("gone does not exist", "Name the folder")),
    "resume what is no run": (["distill", "--resume", "f.yaml"], ("no config.yaml", "Name the folder")),
    "resume with a preset": (["distill", "--resume", "x", "--preset", "y"], ("own config.yaml", "leave --preset")),
    "run over another": (
        ["distill", "--preset", "smollm2-demo", "--output-dir", "full"],
        ("full is not empty", "Empty it"),
    ),
    "run into a file": (
        ["distill", "--preset", "smollm2-demo", "--output-dir", "full/x"],
        ("full/x is a file", "another"),
    ),
    "merge what is not there": (["merge", "gone", "--output-dir", "m"], ("gone does not exist", "Name the folder")),
    "answer of what is not there": (["generate", "gone", "--prompt", "x"], ("gone does not exist", "Name the folder")),
    "shrink what is not there": (
        ["shrink", "./gone", "--layers", "1", "--output-dir", "s"],
        ("gone", "no such folder"),
    ),
    "fine-tune an int8 teacher": (
        ["sft", "--preset", "smollm2-demo", "--model", "teacher", "--set", "teacher.precision=int8"],
        ("teacher.precision=int8", "cannot be fine-tuned", "nf4"),
    ),
    "copy a preset to text": (["presets", "copy", "smollm2-demo", "a.txt"], ("a.txt", ".yaml ending")),
    "copy a preset over a file": (
        ["presets", "copy", "smollm2-demo", "full/x.yaml"],
        ("exists already", "another name"),
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_command(case, here, capsys):
    (here / "f.yaml").mkdir()
    (here / "full").mkdir()
    for name in ("x", "x.yaml"):
        (here / "full" / name).write_text("something")
    arguments, expected = COMMANDS[case]
    refused(arguments, expected, capsys)


# ----------------------------------------------------------------------------------------------- models and tokenizers

Break = Callable[[Path], None]


def edited(name: str, **changes: Any) -> Break:
    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        values.update(changes)
        (folder / name).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return change


def written(name: str, content: bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(content) and None  # type: ignore[func-returns-value]


def removed(*names: str) -> Break:
    return lambda folder: [(folder / name).unlink() for name in names] and None  # type: ignore[func-returns-value]


def cut(name: str) -> Break:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1000]) and None  # type: ignore[func-returns-value]


def other_tokenizer(**changes: Any) -> Break:
    def change(folder: Path) -> None:
        eos = changes.pop("eos", "</s>")
        tokenizer = tiny_tokenizer(**changes)
        tokenizer.eos_token = eos
        tokenizer.save_pretrained(folder)

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def fewer_rows(folder: Path) -> None:
    shutil.rmtree(folder)
    save_tiny(folder, vocab_size=40)


def another_family(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(tiny_config("gpt2").to_dict()))


MODELS: dict[str, tuple[str, Break, tuple[str, ...]]] = {
    "broken config.json": ("teacher", written("config.json", b"{"), ("config.json", "cannot be read")),
    "config.json with a list": ("teacher", written("config.json", b"[]"), ("config.json", "not a model configuration")),
    "unknown architecture": (
        "student",
        edited("config.json", model_type="abacus"),
        ("student.model", "abacus", "does not know it", "student.shape"),
    ),
    "encoder and decoder": ("teacher", edited("config.json", model_type="t5"), ("teacher.model", "encoder-decoder")),
    "width missing": ("teacher", edited("config.json", hidden_size=None), ("hidden_size",)),
    "no weights": ("student", removed("model.safetensors"), ("student", "has none", "Copy or download")),
    "weights cut off": ("student", cut("model.safetensors"), ("model.safetensors", "its header describes", "again")),
    "pickled weights": ("student", pickled, ("student", "reads no pickle", "Convert it")),
    "more layers than weights": (
        "student",
        edited("config.json", num_hidden_layers=3),
        ("student", "lack", "complete"),
    ),
    "weights of another family": ("student", another_family, ("student", "lack", "complete causal language model")),
    "already quantised": (
        "teacher",
        edited("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        ("teacher", "stored quantised (gptq)", "Set the precision to stored, or use the unquantised model"),
    ),
    "code of its own": (
        "teacher",
        edited("config.json", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}, model_type="own"),
        ("teacher", "own", "teacher.shape"),
    ),
    "short context": ("student", edited("config.json", max_position_embeddings=100), ("context of 100", "Lower one")),
    "no tokenizer": (
        "student",
        removed("tokenizer.json", "tokenizer_config.json"),
        ("tokenizer", "student", "cannot be loaded", "Put the tokenizer.json"),
    ),
    "broken tokenizer": (
        "student",
        written("tokenizer.json", b"{}"),
        ("tokenizer", "student", "cannot be loaded", "Put the tokenizer.json"),
    ),
    "another vocabulary": (
        "student",
        other_tokenizer(characters=CHARACTERS[::-1]),
        ("different vocabularies", "First", "teacher's family"),
    ),
    "smaller vocabulary": (
        "student",
        other_tokenizer(characters=CHARACTERS[:-5]),
        ("different vocabularies", "72", "qswitch shrink"),
    ),
    "head without rows for all": ("student", fewer_rows, ("head has 40 rows", "ids up to", "Use the tokenizer")),
    "another end": (
        "student",
        other_tokenizer(eos="<unk>"),
        ("ends a response with", "<unk>", "data.allow_eos_mismatch"),
    ),
    "broken chat template": (
        "teacher",
        other_tokenizer(chat_template="{% for"),
        ("data.template=teacher", "not a usable", "Mend"),
    ),
    "chat template without the user": (
        "teacher",
        other_tokenizer(chat_template="Hello"),
        ("data.template=teacher", "leaves out", "must print"),
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_model(case, sound, here, capsys):
    role, damage, expected = MODELS[case]
    shutil.copytree(sound / role, here / role)
    if "end" in case:  # the generation config would name the old one
        with contextlib.suppress(FileNotFoundError):
            (here / role / "generation_config.json").unlink()
    damage(here / role)
    refused(distill(sound, f"{role}.model={here / role}"), expected, capsys)


def test_gguf_that_is_none(sound, here, capsys):
    (here / "model.gguf").write_bytes(b"GGUF, or so it says")
    shape = ["teacher.shape=" + json.dumps(tiny_config().to_dict())]
    refused(distill(sound, "teacher.model=model.gguf", *shape), ("model.gguf", "cannot be read as a GGUF"), capsys)


def test_the_corpus_is_as_large_as_promised():
    assert sum(map(len, (DATA, SETTINGS, CONFIGS, COMMANDS, MODELS))) >= 80


# ------------------------------------------------------------------------------------------------------ damaged files


@pytest.fixture
def adapter(sound, here, capsys) -> Path:
    """A trained adapter, as a run leaves it."""
    assert run(distill(sound)) == 0
    folder = here.parent / "adapter"
    shutil.copytree(here / "run" / "adapter", folder)
    shutil.rmtree(here / "run")
    capsys.readouterr()
    return folder


def test_a_damaged_adapter_is_reported_before_the_run(sound, adapter, here, capsys):
    (adapter / "adapter_model.safetensors").write_bytes(b"broken" * 100)
    for setting in ("student.init_adapter", "teacher.adapter"):
        refused(
            distill(sound, f"{setting}={adapter}"), (setting, "is no safetensors file", "Download it again"), capsys
        )


def test_a_damaged_only_checkpoint_is_named_with_what_is_wrong_with_it(sound, here, capsys):
    assert run(distill(sound, "train.max_steps=1", "train.save_steps=1")) == 0
    checkpoint = max((here / "run" / "checkpoints").iterdir())
    for name in ("adapter/adapter_model.safetensors", "state.pt"):
        sound_bytes = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(b"broken" * 100)
        capsys.readouterr()
        (here / "run" / "summary.json").unlink(missing_ok=True)
        assert run(["distill", "--resume", "run"]) == 2
        message = capsys.readouterr().err
        assert f"{checkpoint.name}: {name} has 600 bytes" in re.sub(r"\s+", " ", message) and "new run" in message
        assert "Traceback" not in message
        (checkpoint / name).write_bytes(sound_bytes)


@pytest.mark.parametrize(
    ("text", "reason"), [('{"eos_token_id": "x"}', "eos_token_id is 'x'"), ("{", "not valid JSON")]
)
def test_a_bad_generation_config_is_named(sound, here, tmp_path, capsys, text, reason):
    folder = tmp_path / "teacher"
    shutil.copytree(sound / "teacher", folder)
    (folder / "generation_config.json").write_text(text)
    refused(distill(sound, f"teacher.model={folder}"), ("generation_config.json", reason), capsys)


@pytest.mark.parametrize("setting", ["train.learning_rate=.inf", "data.weights=[.nan]", "rollout.decay_rate=.inf"])
def test_numbers_are_finite(sound, here, capsys, setting):
    refused(distill(sound, setting), (setting.partition("=")[0], "finite"), capsys)
