"""Every format gives the same records; every fault stops with file, line, reason and remedy."""

import json
import subprocess
import sys

import pytest

from qswitch.config import DataSection
from qswitch.data.first_look import data_problems
from qswitch.data.records import load_records, training_records
from qswitch.data.turns import Message
from qswitch.errors import DataError
from qswitch.layers import build_config


def load(path, *, limit=None, **settings):
    data = DataSection(train=str(path), **settings)
    return load_records(data, data.train, limit=limit)


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def user(text):
    return (Message("user", text),)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"instruction": "Hi", "context": None, "response": "Hello"},
        {"prompt": "Hi", "response": "Hello"},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": "Hi", "output": "Hello"},
        {"question": "Hi", "answer": "Hello"},
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "response": "Hello"},
    ],
)
def test_formats_with_response(tmp_path, row):
    (record,) = load(write_lines(tmp_path / "a.jsonl", row))
    assert record.messages == user("Hi")
    expected = None if row.get("messages") and "response" in row else "Hello"
    assert record.response == expected
    assert record.source == f"{tmp_path / 'a.jsonl'} line 1"


@pytest.mark.parametrize("row", [{"prompt": "Hi"}, {"question": "Hi"}, {"text": "Hi"}, {"instruction": "Hi"}, "Hi"])
def test_prompts_alone(tmp_path, row):
    (record,) = load(write_lines(tmp_path / "a.jsonl", row))
    assert (record.messages, record.response) == (user("Hi"), None)


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"messages": [{"role": "system", "content": "One"}, {"role": "user", "content": "Hi"}]}, ("system",)),
        ({"messages": [{"role": "user", "content": "Hi"}]}, ()),
        ({"prompt": "Hi", "response": "Hello"}, ()),
        ({"prompt": "Hi", "response": "Hello", "output": "Bye"}, ("output",)),
        ({"instruction": "Hi", "input": "x", "output": "Hello", "text": "all of it"}, ("text",)),
        (
            {"prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A"}], "completion": "B"},
            ("completion",),
        ),
    ],
)
def test_a_column_that_does_not_reach_the_record_is_named_as_unused(tmp_path, row, unused):
    (record,) = load(write_lines(tmp_path / "a.jsonl", {**row, "system": "Two"}))
    expected = "One" if "system" in unused else "Two"
    assert record.messages[0] == Message("system", expected) and record.unused == unused


def test_instruction_and_input_stay_apart_for_alpaca(tmp_path):
    (record,) = load(write_lines(tmp_path / "a.jsonl", {"instruction": "Sum up.", "input": "A text.", "output": "T"}))
    assert record.messages == user("Sum up.\n\nA text.")
    assert (record.instruction, record.input) == ("Sum up.", "A text.")


def test_earlier_assistant_turns_stay_in_the_prompt(tmp_path):
    turns = [("system", "Be kind"), ("user", "Hi"), ("assistant", "Hello"), ("user", "Why?"), ("assistant", "So")]
    (record,) = load(
        write_lines(tmp_path / "a.jsonl", {"messages": [{"role": r, "content": c} for r, c in turns]}),
        system_prompt="unused",
    )
    assert [(m.role, m.content) for m in record.messages] == turns[:4]
    assert record.response == "So"


def test_system_prompt_and_system_column(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", {"prompt": "Hi"}, {"prompt": "Hi", "system": "Own"})
    first, second = load(file, system_prompt="Common")
    assert first.messages == (Message("system", "Common"), Message("user", "Hi"))
    assert second.messages[0] == Message("system", "Own")


def test_column_map_decides_before_the_usual_names(tmp_path):
    row = {"messages": "none", "frage": "Hi", "antwort": "Hello", "output": "wrong"}
    file = write_lines(tmp_path / "a.jsonl", row)
    (record,) = load(file, columns={"prompt": "frage", "output": "antwort"})
    assert (record.messages, record.response) == (user("Hi"), "Hello")


def test_numbers_become_the_text_that_was_written(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": 12345678901234567890123, "output": 0.10}\n', encoding="utf-8")
    (record,) = load(file)
    assert (record.messages, record.response) == (user("12345678901234567890123"), "0.10")


def test_max_new_tokens(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", {"prompt": "Hi", "max_new_tokens": 7}, {"prompt": "Ho"})
    assert [r.max_new_tokens for r in load(file)] == [7, None]


def test_json_list_wrapped_list_and_lines_under_the_name_json(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    for text in (json.dumps(rows), json.dumps({"data": rows}), "\n".join(map(json.dumps, rows))):
        file = tmp_path / "a.json"
        file.write_text(text, encoding="utf-8")
        assert [r.messages for r in load(file)] == [user("a"), user("b")]


def test_csv_keeps_leading_zeros_and_lines_inside_quotes(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes('\ufeffprompt,response\r\n"two\nlines",007\r\nlast,NA\r\n'.encode())
    first, last = load(file)
    assert (first.messages, first.response) == (user("two\nlines"), "007")
    assert (last.response, last.source) == ("NA", f"{file} line 4")


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_table_may_separate_its_cells_otherwise_than_its_name_says(tmp_path, delimiter, ending):
    """Excel writes semicolons where the comma is the decimal point."""
    file = tmp_path / f"a.{ending}"
    file.write_text(f'prompt{delimiter}response\n"one{delimiter} two"{delimiter}three, four\n'.replace(
        "three, four", '"three, four"'), encoding="utf-8")  # fmt: skip
    (record,) = load(file)
    assert (record.messages, record.response) == (user(f"one{delimiter} two"), "three, four")


def test_parquet_and_folder_and_list(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    turns = [{"role": "user", "content": "from parquet"}, {"role": "assistant", "content": "yes"}]
    parquet.write_table(pyarrow.table({"messages": [turns]}), folder / "b.parquet")
    write_lines(folder / "a.jsonl", {"prompt": "from lines"})
    (folder / "notes.xyz").write_text("not data")
    records = load_records(DataSection(train="unused"), [str(folder), str(folder / "a.jsonl")])
    assert [r.messages[0].content for r in records] == ["from lines", "from parquet", "from lines"]
    assert [r.id for r in records] == [0, 1, 2]
    assert records[1].response == "yes"

    (folder / "b.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"b\.parquet: not readable as parquet"):
        load(folder / "b.parquet")


def test_limit_reads_no_further(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a"}\nbroken\n', encoding="utf-8")
    assert len(load(file, limit=1)) == 1


def test_hub_failure_names_reference_and_remedy(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*args, **kwargs):
        raise ConnectionError("no route\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"owner/name is no file here.*no route.*HF_TOKEN"):
        load("owner/name")
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or [{"prompt": "Hi"}])
    (record,) = load("owner/name:main", split="test")
    assert calls == [(("owner/name", "main"), {"split": "test"})]
    assert record.source == "owner/name:main test record 1"


def test_demo_prompts():
    records = load("package:qswitch/data/demo_prompts.jsonl")
    texts = [r.text.casefold() for r in records]
    words = [len(t.split()) for t in texts]
    assert len(records) >= 240 and len(set(texts)) == len(texts)
    assert min(words) <= 5 and max(words) >= 90
    assert sum(bool(r.input) for r in records) >= 50


def test_reading_lines_imports_nothing_heavy(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", {"prompt": "Hi"})
    code = (
        "import sys; from qswitch.config import DataSection; from qswitch.data.records import load_records;"
        f"load_records(DataSection(train='x'), {str(file)!r});"
        "sys.exit(bool({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


GOOD = '{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{broken\n", "not valid JSON.*column 2.*mend"),
        ('{"prompt": NaN}\n', "NaN is not JSON"),
        ("7\n", "expected an object.*found int"),
        ('{"prompt": {"a": 1}}\n', "prompt must be text, found an object"),
        ('{"prompt": true}\n', "prompt must be text, found true or false"),
        ('{"prompt": "  "}\n', "the prompt is empty.*delete"),
        ('{"prompt": null}\n', r"the prompt is empty \(prompt is null\)"),
        ('{"prompt": "\\ud800"}\n', r"half a character \(U\+D800\)"),
        ('{"prompts": "a", "b": "c"}\n', "Columns: prompts, b;.*Nearest: prompt.*data.columns.prompt=prompts"),
        ('{"messages": "text"}\n', "messages must be a list of turns"),
        ('{"messages": ["text"]}\n', "messages turn 1 must be an object.*found text"),
        ('{"messages": [{"role": "user"}]}\n', "messages turn 1 needs role and content.*found role"),
        ('{"messages": [{"role": "tool", "content": "x"}]}\n', "messages holds no user turn"),
        ('{"messages": [{"role": "robot", "content": "x"}]}\n', "turn 1 has the role 'robot'"),
        ('{"messages": [{"role": "system", "content": "x"}]}\n', "ends with a turn of the system"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', "messages holds no user turn"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n', "not text"),
        ('{"prompt": "a", "max_new_tokens": 0}\n', "max_new_tokens must be a whole number from 1, found 0"),
    ],
)
def test_bad_line_names_file_and_line(tmp_path, text, reason):
    file = tmp_path / "bad.jsonl"
    file.write_text(GOOD + "\n" + text, encoding="utf-8")
    with pytest.raises(DataError, match=rf"bad\.jsonl line 3: .*({reason})"):
        load(file)


def test_not_utf8_names_the_line(tmp_path):
    for name, before in (("a.jsonl", b'{"prompt": "a"}\n'), ("a.csv", b"prompt\n")):
        (tmp_path / name).write_bytes(before + b"caf\xe9\n")
        with pytest.raises(DataError, match=rf"{name} line 2: not UTF-8 text \(byte 0xe9\).*iconv"):
            load(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prompt,output\na\n", r"line 2: 1 cells, but the header has 2 \(prompt, output\)"),
        ("prompt,prompt\na,b\n", "two columns have the same name"),
        ('prompt\n"open\n', "line 2: not valid CSV"),
        ("prompt\n", "holds no records"),
        ("", "is empty"),
    ],
)
def test_bad_csv(tmp_path, text, reason):
    file = tmp_path / "bad.csv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=rf"bad\.csv.*{reason}"):
        load(file)


def test_bad_json(tmp_path):
    file = tmp_path / "bad.json"
    file.write_text('[{"prompt": "a"},\n {"prompt" "b"}]', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.json line 2: not valid JSON"):
        load(file)
    file.write_text('[{"prompt": "a"}, {"prompt": ""}]', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.json record 2: the prompt is empty"):
        load(file)
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match="holds no records"):
        load(file)


def test_missing_file_names_the_nearest(tmp_path):
    write_lines(tmp_path / "prompts.jsonl", {"prompt": "a"})
    with pytest.raises(DataError, match=r"promts\.jsonl does not exist\. Did you mean .*prompts\.jsonl\?"):
        load(tmp_path / "promts.jsonl")
    with pytest.raises(DataError, match=r"Neither does its folder"):
        load(tmp_path / "nowhere" / "a.jsonl")
    with pytest.raises(DataError, match=r"files that end in \.docx are not read.*\.jsonl"):
        (tmp_path / "a.docx").write_text("x")
        load(tmp_path / "a.docx")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        load(tmp_path / "empty")


def test_package_reference_errors():
    with pytest.raises(DataError, match="no package named no_such_package"):
        load("package:no_such_package/a.jsonl")
    with pytest.raises(DataError, match="write it as package:MODULE/FILE"):
        load("package:qswitch")
    with pytest.raises(DataError, match=r"does not exist\. Did you mean .*demo_prompts\.jsonl"):
        load("package:qswitch/data/demo_prompt.jsonl")


def test_unknown_columns_list_what_is_there(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", {"question": "a", "reply": "b"})
    with pytest.raises(
        DataError, match=r"names the column questoin, but the columns are question, reply.*prompt=question"
    ):
        load(file, columns={"prompt": "questoin"})
    with pytest.raises(DataError, match=r"data.columns.response names the column replie.*response=reply"):
        load(file, columns={"response": "replie"})
    with pytest.raises(DataError, match=r"data\.columns\.promt is not a field.*data\.columns\.prompt"):
        load(file, columns={"promt": "question"})


def test_a_column_that_comes_late_is_no_misspelt_one(tmp_path):
    """JSON lines leave out what is empty, so only the end of the data says that a column is nowhere."""
    rows = [{"prompt": f"q{i}"} | ({"ctx": "be short"} if i >= 40 else {}) for i in range(60)]
    late, early = write_lines(tmp_path / "late.jsonl", *rows), write_lines(tmp_path / "early.jsonl", *rows[:9])
    data = DataSection(train=str(late), columns={"system": "ctx"})
    assert len(load_records(data, str(late), sample=32)) == 32 and len(load_records(data, str(late))) == 60
    for refused in ({"columns": {"system": "ctxt"}}, {"columns": {"system": "ctx"}, "limit": 40}):
        with pytest.raises(DataError, match="names the column ctx"):
            list(training_records(DataSection(train=str(late), **refused)))

    def pair_of(**settings):
        return build_config({"teacher": {"model": "t"}, "student": {"model": "s"}, "data": settings})

    both = pair_of(train=[str(early), str(late)], columns={"system": "ctx"})
    assert data_problems(both, 32) == [] and len(list(training_records(both.data))) == 69
    (problem,) = data_problems(pair_of(train=str(early), columns={"system": "ctx"}), 32)
    assert "names the column ctx, but the columns are prompt" in problem
    assert (
        len(data_problems(pair_of(train=[str(early), str(late)], weights=[1, 1], columns={"system": "ctx"}), 32)) == 1
    )
