"""Checkpoints that are quantised already: what config.json says of them, and what is said of a machine without the
package, before any weight is read."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from qswitch.cli import run
from qswitch.plan import memory, stored
from qswitch.plan.families import shape_from_config
from qswitch.plan.stored import problem_of, stored_quantisation

LLAMA = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
         "num_hidden_layers": 32, "num_attention_heads": 32}  # fmt: skip
GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 128, "type": "int"}}
CONFIGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
    "compressed-tensors": {"quant_method": "compressed-tensors", "config_groups": {"group_0": GROUP}},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4"},
    "torchao": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}


def of(name: str) -> stored.StoredQuantisation:
    found = stored_quantisation({**LLAMA, "quantization_config": CONFIGS[name]})
    assert found is not None
    return found


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)


@pytest.mark.parametrize(
    ("name", "low", "high"),  # GiB of Llama-2-7B: its hub repositories in GPTQ and AWQ hold 3.6 to 3.7
    [("gptq", 3.5, 3.8), ("awq", 3.5, 3.8), ("compressed-tensors", 3.5, 3.8), ("fp8", 6.3, 6.6), ("torchao", 3.5, 4.1)],
)
def test_a_stored_teacher_has_its_size(name, low, high):
    shape = shape_from_config({**LLAMA, "quantization_config": CONFIGS[name]})
    assert low < memory.weight_bytes(shape, "stored", 2) / 2**30 < high


def test_only_the_experts_of_mxfp4_are_packed():
    assert (of("mxfp4").bits, of("mxfp4").expert_bits) == (16, 4.25)  # 4 bits, and 8 of scale for 32 weights


@pytest.mark.parametrize(
    ("name", "package"),
    [("gptq", "optimum gptqmodel"), ("awq", "gptqmodel"), ("compressed-tensors", "compressed-tensors"),
     ("torchao", "torchao"), ("mxfp4", "triton kernels"), ("nf4", "bitsandbytes")],
)  # fmt: skip
def test_a_missing_package_is_named(name, package, nothing_installed):
    found = of(name)
    message = problem_of(found, found.precision, device="cuda")
    assert message is not None and f"pip install {package}" in message
    assert problem_of(found, found.precision, device=None) is None, "nothing is known of another machine"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_precision_that_is_not_the_files_is_refused_with_the_one_that_is(name):
    found = of(name)
    message = problem_of(found, "int8", device="cuda")
    assert message is not None and f"stored quantised ({found.method})" in message
    assert f"{found.precision}, or use the unquantised model" in message
    unpacks = name in ("fp8", "mxfp4")
    assert ("bf16, which unpacks it" in message) == unpacks
    assert (problem_of(found, "bf16", device="cpu") is None) == unpacks
    trains = problem_of(found, "auto", device="cuda", trains=True)
    assert trains is not None and " or stored" not in trains


@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_a_cpu_is_told_to_unpack(name):
    message = problem_of(of(name), "stored", device="cpu")
    assert message is not None and "only a GPU computes" in message and "bf16, which unpacks them" in message


def test_weights_that_are_not_quantised_are_not_stored_so():
    assert stored_quantisation(LLAMA) is None
    assert problem_of(None, "nf4", device="cpu") is None
    assert "its weights are not quantised" in str(problem_of(None, "stored", device="cpu"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"prompt": "a"}\n' * 9)
    for name in ("student", *CONFIGS):
        values = {**LLAMA, "max_position_embeddings": 2048}
        if name != "student":
            values["quantization_config"] = CONFIGS[name]
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(values))
    return tmp_path


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors", "torchao"])
def test_a_dry_run_names_the_package(folder, name, nothing_installed, capsys):
    assert run(["distill", "--teacher", name, "--student", "student", "--data", "data.jsonl", "--dry-run"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("error:") == 1 and "pip install" in printed and f"({name}) needs" in printed


@pytest.mark.parametrize(
    ("name", "chosen"),
    [("gptq", "stored"), ("awq", "stored"), ("fp8", "stored"), ("nf4", "nf4"), ("torchao", "stored")],
)
def test_a_pair_is_planned_as_its_files_are(folder, name, chosen, capsys):
    pair = ["--teacher", name, "--student", "student", "--data", "data.jsonl"]
    assert run(["plan", *pair, "--gpu", "rtx4090-24gb"]) in (0, 3)
    assert f"teacher.precision={chosen}: its weights are stored quantised" in capsys.readouterr().err
