"""A GGUF file that cannot be read is explained, and leaves nothing behind."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from qswitch.errors import ModelError
from qswitch.layers import build_config
from qswitch.models import gguf_cache
from qswitch.models.references import resolve_reference
from qswitch.preflight import settings_problems
from tests.tiny import save_tiny_pair


@pytest.fixture
def without_gguf(tmp_path, monkeypatch) -> Path:
    """A file that is no more than its name, where the gguf package is not installed."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setenv("QSWITCH_CACHE", str(tmp_path / "cache"))
    real = gguf_cache.importlib.util.find_spec
    monkeypatch.setattr(gguf_cache.importlib.util, "find_spec", lambda n, *a: None if n == "gguf" else real(n, *a))
    return path


def test_gguf_without_the_package_names_it(without_gguf):
    with pytest.raises(ModelError, match=r"reading m\.gguf needs the gguf package: pip install gguf"):
        resolve_reference(str(without_gguf))


def test_a_file_that_cannot_be_read_here_is_passed_over_for_the_next_reference(without_gguf, tmp_path):
    save_tiny_pair(tmp_path)
    found = resolve_reference([str(without_gguf), str(tmp_path / "student")])
    assert found.path == str(tmp_path / "student")


def test_the_package_is_missed_before_anything_is_loaded(without_gguf, tmp_path):
    save_tiny_pair(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    values = {"teacher": {"model": str(without_gguf), "precision": "bf16"},
              "student": {"model": str(tmp_path / "student")}, "data": {"train": str(tmp_path / "data.jsonl")},
              "train": {"device": "cpu"}}  # fmt: skip
    said = "teacher.model: reading m.gguf needs the gguf package: pip install gguf sentencepiece protobuf."
    assert said in settings_problems(build_config(values))
    assert said not in settings_problems(build_config(values), elsewhere=True)
    folder = gguf_cache.converted_folder(without_gguf)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert said not in settings_problems(build_config(values)), "it was converted before"


def test_a_broken_gguf_file_is_explained_and_leaves_nothing(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF but not really, only bytes" * 10)
    monkeypatch.setenv("QSWITCH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="cannot be converted"):
        resolve_reference(str(path))
    assert not list((tmp_path / "cache").rglob("*"))


def test_a_long_conversion_says_how_far_it_is(monkeypatch, caplog):
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = reader.tqdm
    monkeypatch.setattr(gguf_cache, "PROGRESS_EVERY_S", 0.0)
    with gguf_cache.gguf_progress("converting m.gguf"):
        assert list(reader.tqdm(range(4), desc="theirs")) == [0, 1, 2, 3]
    assert [r.getMessage() for r in caplog.records] == [f"converting m.gguf: {n} %" for n in (0, 25, 50, 75)]
    caplog.clear()
    with gguf_cache.gguf_progress():
        assert list(reader.tqdm(range(4))) == [0, 1, 2, 3]
    assert not caplog.records and reader.tqdm is bar


def test_a_long_conversion_of_the_tokenizer_is_not_silent(monkeypatch, tmp_path, caplog):
    import transformers

    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("QSWITCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_cache, "PROGRESS_EVERY_S", 0.01)

    def slow(**_: object) -> None:
        time.sleep(0.1)
        raise OSError("no tokenizer in it")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", slow)
    with pytest.raises(ModelError, match="no tokenizer in it"):
        resolve_reference(str(tmp_path / "m.gguf"))
    said = [r.getMessage() for r in caplog.records if "its tokenizer" in r.getMessage()]
    assert said and said[0].startswith("converting m.gguf: its tokenizer, 0 s")
    assert threading.active_count() == 1 or not any("say" in t.name for t in threading.enumerate())
