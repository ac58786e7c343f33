"""The header that is read here is the one that the gguf package reads, and makes the shape of the class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qswitch.plan.families import shape_from_config
from qswitch.plan.gguf_header import config_of_gguf, read_header, tokens_of_gguf
from tests.plan.test_shape_table import CONFIGS

gguf = pytest.importorskip("gguf")

NAMES = {"attn_q": (64, 64), "attn_k": (64, 32), "attn_v": (64, 32), "attn_output": (64, 64), "ffn_gate": (64, 176),
         "ffn_up": (64, 176), "ffn_down": (176, 64), "attn_norm": (64,), "ffn_norm": (64,)}  # fmt: skip


def write(path: Path, architecture: str = "llama", tied: bool = True) -> dict[str, tuple[int, ...]]:
    """A GGUF file of the tiny llama of the families' test; the sizes of its tensors, as ggml orders them."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(3)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(176)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_bool("general.odd", True)
    writer.add_token_list([f"token {i} \u00e9" for i in range(512)])
    writer.add_token_scores([float(i) for i in range(512)])
    shapes = {"token_embd.weight": (64, 512), "output_norm.weight": (64,)}
    shapes |= {f"blk.{i}.{name}.weight": shape for i in range(3) for name, shape in NAMES.items()}
    if not tied:
        shapes["output.weight"] = (64, 512)
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape[::-1], dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return shapes


def test_the_header_equals_that_of_the_gguf_package(tmp_path):
    shapes = write(tmp_path / "model.gguf")
    values, tensors = read_header(tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert tensors == shapes == {t.name: tuple(t.shape.tolist()) for t in reader.tensors}
    expected = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert set(values) == set(expected)
    for name, field in expected.items():
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            assert len(values[name]) == len(field.data)
        else:
            assert values[name] == field.contents()


def test_the_vocabulary_is_read_where_it_is_asked_for(tmp_path):
    write(tmp_path / "model.gguf")
    assert tokens_of_gguf(tmp_path / "model.gguf") == [f"token {i} \u00e9" for i in range(512)]
    scores = read_header(tmp_path / "model.gguf", items_of="tokenizer.ggml.scores")[0]["tokenizer.ggml.scores"]
    assert scores == [float(i) for i in range(512)]


@pytest.mark.parametrize("tied", [True, False])
def test_its_shape_has_the_parameters_of_the_file(tmp_path, tied):
    shapes = write(tmp_path / "model.gguf", tied=tied)
    shape = shape_from_config(config_of_gguf(tmp_path / "model.gguf"))
    assert shape.num_parameters == sum(int(np.prod(s)) for s in shapes.values())
    assert shape.linears == shape_from_config({**CONFIGS["llama"], "tie_word_embeddings": tied}).linears


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    """A plan asks for the shape of a cut student at every candidate."""
    from qswitch.plan import gguf_header

    reads = []
    read = gguf_header.read_header
    monkeypatch.setattr(gguf_header, "read_header", lambda path: (reads.append(path), read(path))[1])
    path = tmp_path / "model.gguf"
    write(path)
    assert config_of_gguf(path) == config_of_gguf(path) and len(reads) == 1
    write(path, tied=False)
    assert not config_of_gguf(path)["tie_word_embeddings"] and len(reads) == 2
