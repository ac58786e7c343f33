"""Checkpoints that are quantised already: what config.json says of them, and what is said of a machine without the
package, before any weight is read."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from qswitch.cli import run
from qswitch.config import RunConfig
from qswitch.errors import ConfigError
from qswitch.layers import build_config
from qswitch.plan import machine, memory, stored
from qswitch.plan.families import shape_from_config
from qswitch.plan.scheduler import plan_run
from qswitch.plan.stored import problem_of, stored_quantisation
from qswitch.preflight import check_settings

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
     ("torchao", "torchao"), ("mxfp4", "triton 'transformers[kernels]'"), ("fp8", "triton 'transformers[kernels]'"),
     ("nf4", "bitsandbytes")],
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


@pytest.mark.parametrize(
    ("name", "capability", "computes"),
    [("fp8", (8, 6), False), ("fp8", (8, 9), True), ("fp8", (12, 0), True), ("mxfp4", (7, 0), False),
     ("mxfp4", (7, 5), True), ("gptq", (7, 0), True)],
)  # fmt: skip
def test_a_card_that_is_too_old_is_told_to_unpack(name, capability, computes, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    message = problem_of(of(name), "stored", device="cuda", capability=capability)
    assert (message is None) == computes
    if message is not None:
        assert "bf16, which unpacks them" in message and f"this has {capability[0]}.{capability[1]}" in message
        assert problem_of(of(name), "bf16", device="cuda", capability=capability) is None


def test_awq_on_a_gpu_takes_fp16(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    message = problem_of(of("awq"), "stored", device="cuda", compute_dtype="bf16")
    assert message is not None and "train.compute_dtype=fp16" in message
    assert problem_of(of("awq"), "stored", device="cuda", compute_dtype="fp16") is None
    assert problem_of(of("awq"), "stored", device="cpu", compute_dtype="bf16") is None
    assert problem_of(of("gptq"), "stored", device="cuda", compute_dtype="bf16") is None


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


def precision_chosen(name: str, *options: str, capsys) -> tuple[str, str]:
    run(["plan", "--teacher", name, "--student", "student", "--data", "data.jsonl", *options])
    printed = capsys.readouterr().err
    found = re.search(r"teacher\.precision=(\w+): (.*)", printed)
    assert found is not None, printed
    return found[1], found[2] + (" and fp16" if "train.compute_dtype=fp16" in printed else "")


def put_in(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], *, packages: bool) -> None:
    """A card, and the packages that stored weights take or none of them."""
    card = machine._DetectedGpu(11 * 2**30, "a card", capability)
    monkeypatch.setattr(machine, "_detect_gpu", lambda index=0, **_: card)
    real, theirs = importlib.util.find_spec, {name for names in stored.PACKAGES.values() for name in names}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: real(name) if name not in theirs else object() if packages else None
    )


@pytest.mark.parametrize(
    ("name", "capability", "packages", "chosen", "because"),
    [
        ("fp8", (8, 9), True, "stored", "stored quantised"),
        ("fp8", (8, 6), True, "bf16", "this has 8.6"),
        ("fp8", (8, 9), False, "bf16", "pip install triton 'transformers[kernels]'"),
        ("mxfp4", (8, 6), True, "stored", "stored quantised"),
        ("awq", (8, 6), True, "stored", "and fp16"),
        ("gptq", (8, 6), False, "stored", "stored quantised"),  # nothing else reads it: refused with the packages
    ],
)
@pytest.mark.parametrize("options", [(), ("--vram", "10GiB")], ids=["here", "within"])
def test_a_pair_is_stored_where_the_card_computes_with_it(
    folder, name, capability, packages, chosen, because, options, monkeypatch, capsys
):
    put_in(monkeypatch, capability, packages=packages)
    found, reason = precision_chosen(name, *options, capsys=capsys)
    assert found == chosen and because in reason
    assert ("and fp16" in reason) == (name == "awq")


@pytest.mark.parametrize(
    ("gpu", "chosen"), [("rtx3060-12gb", "bf16"), ("rtx4090-24gb", "stored"), ("rtx5060ti-16gb", "stored")]
)
def test_for_a_card_that_is_named_the_packages_here_say_nothing(folder, gpu, chosen, nothing_installed, capsys):
    assert precision_chosen("fp8", "--gpu", gpu, capsys=capsys)[0] == chosen


def test_what_is_chosen_for_awq_is_what_the_preflight_asks_for(folder, monkeypatch, capsys):
    put_in(monkeypatch, (8, 6), packages=True)
    pair = ["distill", "--teacher", "awq", "--student", "student", "--data", "data.jsonl", "--dry-run"]
    run(pair)
    assert "train.compute_dtype=fp16" not in capsys.readouterr().err.partition("error:")[2]
    assert run([*pair, "--set", "train.compute_dtype=bf16"]) == 2
    assert "Set train.compute_dtype=fp16" in capsys.readouterr().err.partition("error:")[2]


def of_teacher(name: str, **teacher: str) -> RunConfig:
    teacher = {"model": name, "precision": "stored", **teacher}
    return build_config({"teacher": teacher, "student": {"model": "student"}, "data": {"train": "data.jsonl"}})


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors", "torchao", "mxfp4"])
def test_a_teacher_whose_weights_nobody_can_move_is_not_swapped(folder, name):
    residencies = {
        plan_run(of_teacher(name), budget_bytes=gib * 2**30, device="cuda").choices["teacher.residency"]
        for gib in (4, 12, 24)
    }
    assert residencies == {"resident"}
    swapped = of_teacher(name, residency="swap")
    for action in (lambda: plan_run(swapped, device="cuda"), lambda: check_settings(swapped, elsewhere=True)):
        with pytest.raises(ConfigError, match=r"Set teacher\.residency=resident") as caught:
            action()
        assert ("teacher.precision=bf16" in str(caught.value)) == (name == "mxfp4")


@pytest.mark.parametrize(
    ("name", "precision"), [("fp8", "stored"), ("nf4", "nf4"), ("student", "nf4"), ("mxfp4", "bf16"), ("fp8", "bf16")]
)
def test_a_teacher_whose_weights_can_be_moved_is_swapped(folder, name, precision):
    config = of_teacher(name, precision=precision)
    smallest = plan_run(config, budget_bytes=2**30, device="cuda")
    assert smallest.choices["teacher.residency"] == "swap"
    swapped = of_teacher(name, precision=precision, residency="swap")
    assert plan_run(swapped, device="cuda").choices["teacher.residency"] == "swap"
    check_settings(swapped, elsewhere=True)
