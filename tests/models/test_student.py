"""What trains, how it starts, and that it goes to a folder and back without losing a bit."""

from __future__ import annotations

import pytest
import torch

from qswitch.config import RunConfig
from qswitch.errors import ModelError
from qswitch.layers import build_config
from qswitch.models.runtime import Runtime
from qswitch.models.student import (
    load_adapter,
    load_student,
    save_adapter,
)
from tests.tiny import ARCHITECTURES, save_tiny, tiny_model, trainable_state

CPU = torch.device("cpu")
FP32 = Runtime(device=CPU, compute_dtype=torch.float32)
BF16 = Runtime(device=CPU, compute_dtype=torch.bfloat16)
IDS = torch.tensor([[5, 9, 30, 12, 44, 8], [6, 8, 31, 11, 40, 9]])


def config_for(folder, seed: int = 42, **student) -> RunConfig:
    return build_config(
        {
            "teacher": {"model": str(folder)},
            "student": {"model": str(folder), **student},
            "data": {"train": "x.jsonl"},
            "seed": seed,
        }
    )


def perturb(model) -> None:
    """Move every trainable weight, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def rollout(model) -> None:
    """No-grad cached passes in eval mode, as a rollout does them."""
    from transformers import DynamicCache

    model.eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for step in range(IDS.shape[1]):
            model.logits(model.hidden(IDS[:, step : step + 1], torch.ones(2, step + 1), None, cache))
    assert cache.get_seq_length() == IDS.shape[1]
    model.train()


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits = model.logits(model.hidden(IDS, torch.ones_like(IDS))).float()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("precision", "runtime"), [("bf16", BF16), ("nf4", FP32), ("nf4", BF16), ("fp32", FP32), ("fp32", BF16)]
)
def test_a_rollout_before_a_step_changes_no_gradient(tmp_path, precision, runtime, checkpointing):
    config = config_for(save_tiny(tmp_path / "m"), precision=precision, gradient_checkpointing=checkpointing)
    model = load_student(config, runtime)
    perturb(model)
    alone = gradients(model)
    rollout(model)
    after = gradients(model)
    assert alone.keys() == after.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(alone[name], after[name]) for name in alone)
    lowest = [g for name, g in alone.items() if ".layers.0." in name]
    assert all(g.abs().max() > 0 for g in lowest), "the gradient does not reach the first layer"


def test_bitsandbytes_may_not_repack_a_student(tmp_path, monkeypatch):
    import bitsandbytes as bnb

    # As on a CPU with AVX-512 BF16, where the first no-grad pass would repack the weight.
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    repacked = []
    monkeypatch.setattr(bnb.nn.modules, "_convert_weight_packed_for_cpu", lambda *a: repacked.append(a) or a)
    model = load_student(config_for(save_tiny(tmp_path / "m"), precision="nf4"), FP32)
    rollout(model)
    assert not repacked
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in model.modules())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_adapters_start_neutral_in_fp32_on_every_linear_but_the_head(tmp_path, arch, precision):
    model = load_student(config_for(save_tiny(tmp_path / "m", arch), precision=precision), FP32, vocab_size=70)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) >= 16 and all("lora_" in name for name in trained)
    assert not any("lm_head" in name or "embed_tokens" in name for name in trained)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    if precision == "fp32":
        model.eval()
        with torch.no_grad():
            got, expected = model.logits(model.hidden(IDS)), tiny_model(arch)(IDS).logits[..., :70]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_seed_alone_decides_how_adapters_start(tmp_path):
    folder = save_tiny(tmp_path / "m")

    def start(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(3)  # the global stream is somewhere else each time
        return trainable_state(load_student(config_for(folder, seed=seed), FP32))

    before = torch.get_rng_state()
    first, again, other = start(1), start(1), start(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    torch.set_rng_state(before)


def test_a_card_that_torch_cannot_use_leaves_a_student_on_the_cpu_alone(tmp_path, monkeypatch):
    """Before CUDA begins torch counts the cards that the driver shows, also where the driver is too old for it."""
    folder = save_tiny(tmp_path / "m")
    expected = trainable_state(load_student(config_for(folder), FP32))

    def too_old(*_):
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "_lazy_init", too_old)
    found = trainable_state(load_student(config_for(folder), FP32))
    assert found and all(torch.equal(found[name], expected[name]) for name in expected)


LORAS = [
    {},
    {"use_dora": True, "r": 4},
    {"use_rslora": True, "dropout": 0.1, "target_modules": ["q_proj", "down_proj"]},
    {"modules_to_save": ["norm"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "lm_head"], "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}},
    {"init_lora_weights": "gaussian", "modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("lora", LORAS)
def test_an_adapter_comes_back_bit_for_bit_and_plain_peft_reads_it(tmp_path, lora):
    import peft
    from transformers import AutoModelForCausalLM

    folder = save_tiny(tmp_path / "m")
    config = config_for(folder, lora=lora)
    model = load_student(config, FP32)
    perturb(model)
    save_adapter(model, tmp_path / "adapter")
    fresh = load_student(config, FP32)
    load_adapter(fresh, tmp_path / "adapter")
    wanted, got = trainable_state(model), trainable_state(fresh)
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[name], got[name]) for name in wanted)
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=IDS).logits, model.logits(model.hidden(IDS)), atol=1e-5, rtol=1e-5)
    assert plain.peft_config["default"].base_model_name_or_path == str(folder)


@pytest.mark.parametrize(
    ("precision", "whole"),
    [("bf16", "norm"), ("bf16", "embed_tokens"), ("bf16", "down_proj"), ("nf4", "norm"), ("nf4", "input_layernorm")],
)
def test_modules_that_train_in_fp32_beside_adapters_go_with_a_base_in_16_bits(tmp_path, precision, whole):
    """As on every GPU; the trained copy equals the base's, so the logits do too, but for the rounding."""
    folder = save_tiny(tmp_path / "m", dtype=torch.bfloat16)
    lora = {"modules_to_save": [whole], "target_modules": ["q_proj", "v_proj"]}
    model = load_student(config_for(folder, precision=precision, lora=lora), BF16)  # which verifies the head
    plain = load_student(config_for(folder, precision=precision, lora={**lora, "modules_to_save": []}), BF16)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and ".modules_to_save." in n}
    assert trained and all(p.dtype == torch.float32 for p in trained.values())
    with torch.no_grad():
        got, expected = (m.eval().logits(m.hidden(IDS)) for m in (model, plain))
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected.float(), atol=0.03 * expected.abs().max().item(), rtol=0)
    rollout(model)
    found = gradients(model)
    assert all(found[name].abs().max() > 0 for name in trained)


def test_every_lora_setting_reaches_peft(tmp_path):
    lora = {"r": 5, "alpha": 7.0, "dropout": 0.25, "use_rslora": True, "rank_pattern": {"q_proj": 3},
            "alpha_pattern": {"q_proj": 9.0}, "layers_to_transform": [0], "modules_to_save": ["norm"]}  # fmt: skip
    model = load_student(config_for(save_tiny(tmp_path / "m"), lora=lora), FP32)
    got = model.hf.peft_config["default"]
    assert (got.r, got.lora_alpha, got.lora_dropout, got.use_rslora) == (5, 7.0, 0.25, True)
    assert (got.rank_pattern, got.alpha_pattern) == ({"q_proj": 3}, {"q_proj": 9.0})
    assert got.layers_to_transform == [0] and list(got.modules_to_save) == ["norm"]
    ranks = {n.split(".lora_A")[0].rpartition(".")[2]: p.shape[0] for n, p in model.named_parameters() if "lora_A" in n}
    assert ranks["q_proj"] == 3 and ranks["k_proj"] == 5


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_full_training_keeps_every_weight_in_fp32_and_comes_back(tmp_path, arch):
    folder = save_tiny(tmp_path / "m", arch, dtype=torch.bfloat16)
    config = config_for(folder, adapter="none", precision="bf16")
    model = load_student(config, BF16)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert all(g is not None for g in gradients(model).values())
    perturb(model)
    save_adapter(model, tmp_path / "full")
    fresh = load_student(config, BF16)
    load_adapter(fresh, tmp_path / "full")
    wanted, got = trainable_state(model), trainable_state(fresh)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_state_of_another_student_is_refused(tmp_path):
    folder = save_tiny(tmp_path / "m")
    small, large = (load_student(config_for(folder, lora={"r": r}), FP32) for r in (4, 8))
    save_adapter(small, tmp_path / "adapter")
    with pytest.raises(ModelError, match="configuration it was written with"):
        load_adapter(large, tmp_path / "adapter")
    with pytest.raises(ModelError, match="adapter_model"):
        load_adapter(small, tmp_path)


def test_an_adapter_on_a_tied_head_is_refused(tmp_path):
    folder = save_tiny(tmp_path / "m", "qwen2")
    for lora in ({"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["embed_tokens"]}):
        with pytest.raises(ModelError, match="tied"):
            load_student(config_for(folder, lora=lora), FP32)


def test_unknown_target_modules_name_the_known_ones(tmp_path):
    with pytest.raises(ModelError, match="q_proj"):
        load_student(config_for(save_tiny(tmp_path / "m"), lora={"target_modules": ["attention_thing"]}), FP32)
    with pytest.raises(ModelError, match=r"modules_to_save names thing.*q_proj"):
        load_student(config_for(save_tiny(tmp_path / "n"), lora={"modules_to_save": ["thing"]}), FP32)


def test_an_existing_base_path_is_read_instead_of_the_model(tmp_path):
    folder = save_tiny(tmp_path / "m", layers=3)
    base = save_tiny(tmp_path / "run" / "student", layers=1)
    config = config_for(folder)
    assert load_student(config, FP32, base_path=base).config.num_hidden_layers == 1
    assert load_student(config, FP32, base_path=tmp_path / "absent").config.num_hidden_layers == 3


def test_names_that_peft_takes_for_experts_get_no_adapter(tmp_path):
    """One adapter on all experts is many times the parameters, and not on the dense layer that was meant."""
    folder = save_tiny(tmp_path / "m", "glm4_moe")
    model = load_student(config_for(folder), FP32)
    adapted = {n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not model.hf.peft_config["default"].target_parameters
    with pytest.raises(ModelError, match=r"takes for the experts of .* Remove down_proj, gate_proj, up_proj"):
        load_student(config_for(folder, lora={"r": 2, "target_modules": ["q_proj", "gate_proj", "up_proj"]}), FP32)
