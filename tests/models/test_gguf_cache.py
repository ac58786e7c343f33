"""A GGUF file that cannot be read is explained, and leaves nothing behind."""

from __future__ import annotations

import threading
import time

import pytest

from qswitch.errors import ModelError
from qswitch.models import gguf_cache
from qswitch.models.references import resolve_reference


def test_gguf_without_the_package_names_it(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setenv("QSWITCH_CACHE", str(tmp_path / "cache"))
    real = gguf_cache.importlib.util.find_spec
    monkeypatch.setattr(gguf_cache.importlib.util, "find_spec", lambda n, *a: None if n == "gguf" else real(n, *a))
    with pytest.raises(ModelError, match=r"pip install gguf"):
        resolve_reference(str(path))


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
