"""Files as users have them: compressed, in folders with splits, saved by datasets, on the hub."""

import bz2
import gzip
import json
import lzma

import datasets
import pyarrow
import pytest

from qswitch.config import DataSection
from qswitch.data.records import load_records
from qswitch.data.sources import iter_rows
from qswitch.errors import DataError

LINES = "".join(json.dumps({"prompt": f"say {i}", "response": f"it is {i}"}) + "\n" for i in range(5))


def zstd(content):
    return pyarrow.compress(content, "zstd", asbytes=True)


def prompts(reference, **options):
    return [row.fields["prompt"] for row in iter_rows(str(reference), **options)]


@pytest.mark.parametrize(
    ("ending", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)],
)
def test_a_compressed_file_reads_like_the_plain_one(tmp_path, ending, compress):
    path = tmp_path / f"data.jsonl{ending}"
    path.write_bytes(compress(LINES.encode()))
    assert prompts(path) == [f"say {i}" for i in range(5)]
    assert [row.where for row in iter_rows(str(path))][2] == f"{path} line 3"
    table = tmp_path / f"table.csv{ending}"
    table.write_bytes(compress(b'prompt,response\n"two\nlines",007\n'))
    (row,) = iter_rows(str(table))
    assert row.fields == {"prompt": "two\nlines", "response": "007"}


@pytest.mark.parametrize(
    ("ending", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)],
)
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"not compressed at all"], ids=["cut", "no"])
def test_a_damaged_compressed_file_is_named(tmp_path, ending, compress, damage):
    path = tmp_path / f"data.jsonl{ending}"
    path.write_bytes(damage(compress((LINES * 500).encode())))
    with pytest.raises(DataError, match=rf"data\.jsonl{ending}.*damaged or cut off"):
        list(iter_rows(str(path)))


@pytest.mark.parametrize("text", ["prompt;response\rwhy;so\r", "prompt;response\r\nwhy;so\r\n"])
def test_a_csv_may_end_its_lines_as_old_systems_did(tmp_path, text):
    (tmp_path / "a.csv").write_bytes(text.encode())
    assert [row.fields for row in iter_rows(str(tmp_path / "a.csv"))] == [{"prompt": "why", "response": "so"}]


def test_a_csv_of_control_characters_is_one_message(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\r\x00")
    with pytest.raises(DataError):
        list(iter_rows(str(tmp_path / "a.csv")))


def test_a_csv_that_is_not_utf8_is_named_with_its_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt\nfine\nGr\xfc\xdfe\n")
    with pytest.raises(DataError, match=r"a\.csv line 3: not UTF-8"):
        list(iter_rows(str(path)))


def test_a_folder_whose_names_tell_splits_apart_gives_one_split(tmp_path, caplog):
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000.jsonl", "validation.jsonl"):
        (tmp_path / name).write_text(json.dumps({"prompt": name}) + "\n")
    assert prompts(tmp_path) == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert "read 2 of its 4 files" in caplog.text
    assert prompts(tmp_path, split="test") == ["test-00000.jsonl"]


@pytest.mark.parametrize(
    ("names", "split", "read"),
    [
        (["prompts.jsonl", "test.jsonl"], "train", ["prompts.jsonl"]),
        (["prompts.jsonl", "test.jsonl"], "test", ["test.jsonl"]),
        (["prompts.jsonl", "test.jsonl", "train.jsonl"], "train", ["prompts.jsonl", "train.jsonl"]),
        (["prompts.jsonl", "test.jsonl", "train.jsonl"], "test", ["test.jsonl"]),
        (["prompts.jsonl", "train.jsonl"], "train", ["prompts.jsonl", "train.jsonl"]),
        (["test-0.jsonl", "test-1.jsonl"], "train", ["test-0.jsonl", "test-1.jsonl"]),
        (["test-0.jsonl", "test-1.jsonl"], "test", ["test-0.jsonl", "test-1.jsonl"]),
    ],
)
def test_one_name_of_another_split_is_enough_to_leave_that_file_out(tmp_path, caplog, names, split, read):
    for name in names:
        (tmp_path / name).write_text(json.dumps({"prompt": name}) + "\n")
    assert prompts(tmp_path, split=split) == read
    is_other = all(name.startswith("test") for name in names) and split != "test"
    assert (f"read {len(read)} of its {len(names)} files" in caplog.text) == (len(read) < len(names))
    assert ("its files are of the split test; they are read as train" in caplog.text) == is_other


def test_a_split_that_no_file_is_of_is_refused_with_those_there_are(tmp_path):
    for name in ("prompts.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(json.dumps({"prompt": name}) + "\n")
    with pytest.raises(DataError, match=r"the splits test, train, but none of validation\. Set data\.split"):
        prompts(tmp_path, split="validation")


def test_a_folder_of_plain_names_is_read_whole(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "training_notes.jsonl"):
        (tmp_path / name).write_text(json.dumps({"prompt": name}) + "\n")
    assert len(prompts(tmp_path)) == 3


def test_documents_of_a_corpus_have_no_splits(tmp_path):
    for name in ("training.md", "test.md"):
        (tmp_path / name).write_text(name)
    assert len(list(iter_rows(str(tmp_path), text_files=True))) == 2


def test_a_saved_data_set_gives_its_split(tmp_path):
    parts = {
        name: datasets.Dataset.from_list([{"prompt": f"{name} {i}"} for i in range(3)]) for name in ("train", "dev")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    parts["train"].save_to_disk(tmp_path / "one")
    assert prompts(tmp_path / "both", split="dev") == ["dev 0", "dev 1", "dev 2"]
    assert prompts(tmp_path / "one") == ["train 0", "train 1", "train 2"]
    with pytest.raises(DataError, match="has the splits train, dev, but not test"):
        prompts(tmp_path / "both", split="test")


def test_a_hub_id_is_asked_for_its_subset_and_split(monkeypatch):
    asked = []

    def load_dataset(name, configuration=None, *, split):
        asked.append((name, configuration, split))
        return [{"prompt": f"{split} of {configuration}"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = DataSection(train="owner/name:subset", validation="owner/name", validation_split="dev")
    assert load_records(data, data.train)[0].text == "user: train of subset"
    assert load_records(data, data.validation, split=data.validation_split)[0].text == "user: dev of None"
    assert asked == [("owner/name", "subset", "train"), ("owner/name", None, "dev")]


def test_a_hub_data_set_with_a_script_is_read_from_the_hub_s_own_conversion(monkeypatch):
    asked = []

    def load_dataset(name, configuration, *, split, streaming, revision=None):
        asked.append(revision)
        if revision is None:
            raise RuntimeError(f"Dataset scripts are no longer supported, but found {name}.py")
        return [{"prompt": f"{split} of {configuration}"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [row.fields for row in iter_rows("owner/old", stream_hub=True)] == [{"prompt": "train of None"}]
    assert asked == [None, "refs/convert/parquet"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("has_script", [False, True])
def test_the_real_library_takes_what_a_hub_data_set_is_asked_for(tmp_path, monkeypatch, stream, has_script):
    """On a folder laid out as on the hub, which stands in for the name alone."""
    folder = tmp_path / "hub"
    for configuration in ("main", "other"):
        (folder / configuration).mkdir(parents=True)
        for split in ("train", "test"):
            (folder / configuration / f"{split}.jsonl").write_text(json.dumps({"prompt": configuration + split}) + "\n")
    names = [{"config_name": name, "data_files": [{"split": split, "path": f"{name}/{split}.jsonl"}
                                                  for split in ("train", "test")]}
             for name in ("main", "other")]  # fmt: skip
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(names)}\n---\n")
    real, asked = datasets.load_dataset, []

    def load_dataset(name, *positional, **options):
        asked.append(options)
        if has_script and len(asked) == 1:
            raise RuntimeError(f"Dataset scripts are no longer supported, but found {name}.py")
        return real(str(folder), *positional, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert prompts("owner/name:other", split="test", stream_hub=stream) == ["othertest"]
    assert len(asked) == 1 + has_script


def test_a_stream_that_breaks_off_says_where_and_what_helps(monkeypatch):
    def stream():
        yield {"prompt": "the first"}
        raise ConnectionError("Connection reset by peer\nand more")

    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: stream())
    rows = iter_rows("owner/name", stream_hub=True)
    assert next(rows).fields == {"prompt": "the first"}
    with pytest.raises(DataError, match=r"beyond record 1 of train: Connection reset by peer\. Run it again"):
        next(rows)


@pytest.mark.parametrize("is_stream", [True, False])
def test_memory_that_runs_out_is_no_broken_connection(monkeypatch, is_stream):
    def fail(*_arguments, **_options):
        raise MemoryError

    rows = map(fail, [0])  # a stream that fails when it is read
    monkeypatch.setattr(datasets, "load_dataset", (lambda *_arguments, **_options: rows) if is_stream else fail)
    with pytest.raises(MemoryError):
        next(iter_rows("owner/name", stream_hub=is_stream))


def test_splits_in_outer_folders_metadata_and_hidden_folders(tmp_path):
    for folder in ("train/en", "test/en", "train/.ipynb_checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.jsonl").write_text('{"prompt": "' + folder + '"}\n')
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}')
    assert [row.fields["prompt"] for row in iter_rows(str(tmp_path))] == ["train/en"]


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, {"messages"}),
        ({"version": 1, "data": [{"prompt": "a"}]}, {"prompt"}),
        ({"prompt": "a", "tags": [{"x": 1}]}, {"prompt", "tags"}),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "clock"}]}, {"messages", "tools"}),
        ({"prompt": [{"role": "user", "content": "a"}], "answer": "b"}, {"prompt", "answer"}),
        ({"dialog": [{"from": "human", "value": "a"}], "id": 7}, {"dialog", "id"}),
        ({"data": [{"role": "doctor", "prompt": "a"}]}, {"role", "prompt"}),
    ],
)
def test_a_json_object_is_a_wrapper_or_a_record(tmp_path, content, columns):
    (tmp_path / "a.json").write_text(json.dumps(content))
    (row,) = iter_rows(str(tmp_path / "a.json"))
    assert set(row.fields) == columns


@pytest.mark.parametrize("header", ["prompt;response, long", '"prompt";"response, if any"'])
def test_a_comma_in_a_column_name_does_not_part_it(tmp_path, header):
    (tmp_path / "a.csv").write_text(header + "\none;two\n")
    (row,) = iter_rows(str(tmp_path / "a.csv"))
    assert list(row.fields.values()) == ["one", "two"]


def test_utf16_is_told_by_its_mark(tmp_path):
    (tmp_path / "a.csv").write_bytes("prompt\nx\n".encode("utf-16"))
    with pytest.raises(DataError, match="iconv -f UTF-16"):
        list(iter_rows(str(tmp_path / "a.csv")))
