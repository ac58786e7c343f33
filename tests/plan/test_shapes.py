import http.server
import json
import math
import threading

import pytest

from qswitch.config import StudentSection, TeacherSection
from qswitch.errors import ConfigError
from qswitch.plan.shapes import shape_for, shape_from_config

BASE = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip

CONFIGS = {
    "llama": {"model_type": "llama", **BASE},
    "llama-bias": {"model_type": "llama", **BASE, "attention_bias": True, "mlp_bias": True},
    "smollm2": {"model_type": "llama", **BASE, "tie_word_embeddings": True},
    "llama-2 without num_key_value_heads": {"model_type": "llama", **BASE, "num_key_value_heads": None},
    "mistral": {"model_type": "mistral", **BASE, "head_dim": 32},
    "qwen2": {"model_type": "qwen2", **BASE},
    "qwen3": {"model_type": "qwen3", **BASE, "head_dim": 32},
    "gemma2": {"model_type": "gemma2", **BASE, "head_dim": 32},
    "gemma3": {"model_type": "gemma3_text", **BASE, "head_dim": 32},
    "phi3": {"model_type": "phi3", **BASE, "pad_token_id": 0},
    "phi": {"model_type": "phi", **BASE},
    "phi-qk": {"model_type": "phi", **BASE, "qk_layernorm": True},
    "gpt2": {"model_type": "gpt2", "vocab_size": 512, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "opt": {"model_type": "opt", **BASE, "ffn_dim": 256, "word_embed_proj_dim": 64},
    "opt-350m": {"model_type": "opt", **BASE, "ffn_dim": 256, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
}


def meta_model(values):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {k: v for k, v in values.items() if v is not None}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_equal_those_of_the_class_part_by_part(name):
    import torch
    from transformers.pytorch_utils import Conv1D

    model, shape = meta_model(CONFIGS[name]), shape_from_config(CONFIGS[name])
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head]
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert len(shape.linears) == len(linears)
    assert shape.linear_weight_parameters == sum(m.weight.numel() for m in linears)
    norms = [m for m in model.modules() if type(m).__name__.endswith("Norm")]
    assert shape.norm_parameters == sum(p.numel() for m in norms for p in m.parameters())
    assert shape.tied == (head.weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize("name", CONFIGS)
def test_linear_names_and_sizes_are_those_of_the_class(name):
    import torch
    from transformers.pytorch_utils import Conv1D

    found = []
    for path, module in meta_model(CONFIGS[name]).named_modules():
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            found.append((path.rpartition(".")[2], module.in_features, module.out_features, module.bias is not None))
        elif isinstance(module, Conv1D):
            found.append((path.rpartition(".")[2], *module.weight.shape, True))
    expected = [(m.name, m.in_features, m.out_features, m.bias) for m in shape_from_config(CONFIGS[name]).linears]
    assert sorted(found) == sorted(expected)


def test_published_sizes():
    # config.json values of meta-llama/Llama-2-7b-hf, Llama-3.1-8B and Qwen/Qwen2.5-7B; their model cards say 6.74,
    # 8.03 and 7.62 billion parameters.
    llama2 = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
              "num_hidden_layers": 32, "num_attention_heads": 32}  # fmt: skip
    llama3 = {**llama2, "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}
    qwen = {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
            "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}  # fmt: skip
    for values, billions in ((llama2, 6.738), (llama3, 8.030), (qwen, 7.616)):
        assert math.isclose(shape_from_config(values).num_parameters / 1e9, billions, abs_tol=5e-4)


def test_a_tower_is_read_from_text_config():
    nested = {"model_type": "gemma3", "text_config": CONFIGS["gemma3"]}
    assert shape_from_config(nested) == shape_from_config(CONFIGS["gemma3"])


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
        ("package:m/f.gguf", "no installed package's file"),
        ("./nowhere", "there is no such folder"),
        ("./empty", "the folder has no config.json"),
        ("./adapter", "an adapter, no model"),
        ("./weights.safetensors", "a file; name the folder"),
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
        with pytest.raises(ConfigError, match="gated: accept its licence"):
            shape_for(TeacherSection(model="org/gated"))
        with pytest.raises(ConfigError, match="check its spelling"):
            shape_for(TeacherSection(model="org/typo"))
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(ConfigError, match="did not answer"):
        shape_for(TeacherSection(model="org/open"))
    assert not list(tmp_path.iterdir())  # nothing was kept


def test_bad_shapes_are_explained():
    with pytest.raises(ConfigError, match="model_type 'mamba'"):
        shape_from_config({"model_type": "mamba"})
    with pytest.raises(ConfigError, match="needs intermediate_size"):
        shape_from_config({k: v for k, v in CONFIGS["llama"].items() if k != "intermediate_size"})
    with pytest.raises(ConfigError, match=r"teacher\.shape\.vocab_size = -1"):
        shape_for(TeacherSection(model="a/b", shape={**CONFIGS["llama"], "vocab_size": -1}))
