"""A model of the hub loads; and where hub, connection, disk or memory is at fault, the message blames no model."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch

from qswitch.config import TeacherSection
from qswitch.errors import ModelError
from qswitch.models import messages, weight_files
from qswitch.models.load import load_teacher, load_tokenizer, read_config
from qswitch.models.messages import explained
from qswitch.models.pair import _generation_eos
from qswitch.models.references import resolve_reference, sentencepiece_files
from qswitch.models.runtime import Runtime
from qswitch.models.weight_files import bytes_to_download, weights_fingerprint
from qswitch.units import GIB
from tests.hub import NAME, ModelHub, serving
from tests.tiny import save_tiny

FP32 = Runtime(device=torch.device("cpu"), compute_dtype=torch.float32)
TEACHER = TeacherSection(model=NAME, precision="fp32")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    monkeypatch.setattr(messages, "_said", set())
    with serving(save_tiny(tmp_path / "published"), tmp_path / "cache", monkeypatch) as server:
        yield server


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """huggingface_hub waits a second before each of its attempts."""
    waited: list[float] = []
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", waited.append)
    return waited


def test_a_download_is_said_with_its_size_and_shown_by_the_hubs_bars(hub, caplog, monkeypatch):
    from huggingface_hub.utils import are_progress_bars_disabled

    shown: list[bool] = []
    download = huggingface_hub.file_download.http_get

    def watched(*args, **kwargs):
        shown.append(not are_progress_bars_disabled())
        return download(*args, **kwargs)

    monkeypatch.setattr("huggingface_hub.file_download.http_get", watched)
    load_tokenizer(TEACHER)
    assert shown and not any(shown), "small files are no news"
    shown.clear()
    load_teacher(TEACHER, FP32)
    assert shown and shown[0], "of the weights"
    size = (hub.folder / "model.safetensors").stat().st_size
    assert f"downloading {size / GIB:.2f} GiB of {NAME} into" in caplog.text
    assert are_progress_bars_disabled() is False, "as it was before"
    caplog.clear()
    load_teacher(TEACHER, FP32)
    assert "downloading" not in caplog.text


def publish_in_parts(hub: ModelHub) -> list[Path]:
    load_teacher(TEACHER, FP32).hf.save_pretrained(hub.folder, max_shard_size="100KB")
    (hub.folder / "model.safetensors").unlink(missing_ok=True)
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    return sorted(hub.folder.glob("model-*.safetensors"))


def test_of_weights_in_parts_only_those_that_are_not_here_are_counted(hub):
    parts = publish_in_parts(hub)
    resolved = resolve_reference(NAME)
    assert len(parts) > 2 and bytes_to_download(resolved) == sum(p.stat().st_size for p in parts)
    huggingface_hub.hf_hub_download(NAME, parts[1].name)
    assert bytes_to_download(resolved) == sum(p.stat().st_size for p in parts if p != parts[1])
    load_teacher(TEACHER, FP32)
    hub.asked.clear()
    assert bytes_to_download(resolved) == 0 and hub.asked == [], "the cache says it all"


@pytest.mark.parametrize("in_parts", [False, True])
def test_weights_in_the_cache_are_known_as_those_of_a_folder_once_they_are_all_there(hub, in_parts):
    names = [part.name for part in publish_in_parts(hub)] if in_parts else ["model.safetensors"]
    resolved = resolve_reference(NAME)
    for name in [weight_files.INDEX] * in_parts + names:
        assert weights_fingerprint(resolved) is None
        huggingface_hub.hf_hub_download(NAME, name)
    of_the_folder = weights_fingerprint(resolve_reference(str(hub.folder)))
    assert weights_fingerprint(resolved) == of_the_folder is not None


@pytest.mark.parametrize("num_lacking", [1, 2])
def test_parts_that_were_not_downloaded_are_no_fault_of_the_model(hub, monkeypatch, num_lacking):
    parts = publish_in_parts(hub)
    for name in ("config.json", weight_files.INDEX, *(part.name for part in parts[num_lacking:])):
        huggingface_hub.hf_hub_download(NAME, name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"its weights are not all in the local .* HF_HUB_OFFLINE is set"):
        load_teacher(TEACHER, FP32)


def test_a_tokenizer_that_was_not_downloaded_is_not_to_be_put_beside_the_weights(hub, monkeypatch):
    read_config(resolve_reference(NAME))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"tokenizer owner/name .* files are not all in .* HF_HUB_OFFLINE is set"):
        load_tokenizer(TEACHER)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    load_tokenizer(TEACHER)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as found, explained(NAME, "tokenizer"):
        raise ValueError("Couldn't instantiate the backend tokenizer. You need to have sentencepiece installed")
    assert "HF_HUB_OFFLINE" not in str(found.value), "it is here, and a library is not"


def test_a_download_without_a_terminal_says_now_and_then_that_it_goes_on(hub, caplog, monkeypatch):
    monkeypatch.setattr(weight_files, "SAY_EVERY_S", 0.001)
    load_teacher(TEACHER, FP32)
    assert re.search(r"downloading and loading .* GiB of owner/name, 0 s", caplog.text)


def test_a_connection_that_breaks_is_no_fault_of_the_model(hub, no_waiting):
    hub.breaks = "model.safetensors"
    with pytest.raises(
        ModelError, match=r"the connection to the hub failed \(RemoteProtocolError.*Run it again"
    ) as found:
        load_teacher(TEACHER, FP32)
    assert no_waiting and "safetensors weights" not in str(found.value)
    hub.breaks = None
    load_teacher(TEACHER, FP32)


def test_a_connection_that_breaks_in_config_json_is_explained_too(hub, no_waiting):
    hub.breaks = "config.json"
    with pytest.raises(ModelError, match="the connection to the hub failed"):
        read_config(resolve_reference(NAME))


def test_a_download_that_was_cut_off_is_no_model_without_weights(hub, monkeypatch):
    read_config(resolve_reference(NAME))  # config.json is here, the weights are not
    monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "1")  # transformers would ask a service of the hub for it
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"its weights are not all in the local .* HF_HUB_OFFLINE is set"):
        load_teacher(TEACHER, FP32)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.gated = True
    with pytest.raises(ModelError, match=f"gated: accept its licence at https://huggingface.co/{NAME}"):
        load_teacher(TEACHER, FP32)
    hub.gated = False
    (hub.folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="it has no safetensors weights"):
        load_teacher(TEACHER, FP32)


def test_without_a_network_weights_that_are_not_here_are_not_called_missing(hub, no_waiting):
    read_config(resolve_reference(NAME))
    hub.shutdown()
    hub.server_close()
    with pytest.raises(ModelError, match=r"the connection to the hub failed \(ConnectError"):
        load_teacher(TEACHER, FP32)


def test_a_hub_that_is_down_says_so(hub, no_waiting):
    read_config(resolve_reference(NAME))
    hub.status = 503
    with pytest.raises(ModelError, match="the hub answered with status 503"):
        load_teacher(TEACHER, FP32)


@pytest.mark.parametrize(("error", "said"), [
    (RuntimeError("unable to mmap 4976698672 bytes from file <model-00001-of-00004.safetensors>: Cannot allocate "
                  "memory (12)"), "no host memory"),
    (OSError(errno.ENOSPC, "No space left on device", "/cache/blobs/ab403f.incomplete"), "Free some space"),
    (RuntimeError("size mismatch: torch.Size([14013, 64])"), "size mismatch"),
    (ValueError("safetensors_rust says 401 things"), "401 things"),
])  # fmt: skip
def test_numbers_and_words_in_a_text_blame_nobody(error, said):
    with pytest.raises(ModelError, match=said) as found, explained("foo", "model"):
        raise error
    assert "gated" not in str(found.value) and "has no safetensors" not in str(found.value)


def test_end_tokens_are_lost_only_where_the_hub_says_that_there_are_none(hub, no_waiting, monkeypatch, caplog):
    section = TeacherSection(model=NAME)
    published = hub.folder / "generation_config.json"
    values = json.loads(published.read_text())
    published.write_text(json.dumps({**values, "eos_token_id": [2, 7]}))
    assert _generation_eos(section) == {2, 7}
    published.unlink()
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    read_config(resolve_reference(NAME))
    assert _generation_eos(section) == set() and not caplog.text, "most models have none"
    hub.gated = True  # and no token any more
    assert _generation_eos(section) == set() and not caplog.text
    hub.gated = False
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert _generation_eos(section) == set() and not caplog.text, "the cache knows that there is none"
    shutil.rmtree(Path(huggingface_hub.constants.HF_HUB_CACHE) / "models--owner--name" / ".no_exist")
    assert _generation_eos(section) == set() and "generation_config.json is not in the local" in caplog.text
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.gated = True
    assert _generation_eos(section) == set(), "what else there is of it may be in the cache"
    hub.gated = False
    published.write_text("{}")
    hub.breaks = published.name
    with pytest.raises(ModelError, match="the connection to the hub failed"):
        _generation_eos(section)


def test_a_merge_asks_for_the_sentencepiece_model_and_says_what_failed(hub, no_waiting, caplog):
    base = resolve_reference(NAME)
    read_config(base)
    hub.gated = True  # and no token any more: all else may be in the cache
    assert sentencepiece_files(base) == [] and "tokenizer.model is not in the local" in caplog.text
    hub.gated = False
    (hub.folder / "tokenizer.model").write_bytes(b"pieces")
    hub.breaks = "tokenizer.model"
    with pytest.raises(ModelError, match="the connection to the hub failed"):
        sentencepiece_files(base)
    hub.breaks = None
    assert [path.read_bytes() for path in sentencepiece_files(base)] == [b"pieces"]
