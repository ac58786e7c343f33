"""Models load in the precision asked for, or with a message that helps."""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qswitch.config import TeacherSection, TrainSection
from qswitch.errors import ModelError, is_out_of_memory
from qswitch.models import load, messages
from qswitch.models.language_model import LanguageModel
from qswitch.models.load import load_teacher, load_tokenizer, read_config, read_model
from qswitch.models.pair import _num_rows
from qswitch.models.quantise import check_stored
from qswitch.models.references import resolve_reference
from qswitch.models.runtime import Runtime, make_runtime
from qswitch.models.shrink import source_dtype
from qswitch.plan.families import shape_from_config
from qswitch.plan.machine import has_native_bf16_cpu
from qswitch.rollout.kv_probe import verify_kv
from tests.pretended_cuda import pretended_cuda
from tests.tiny import ARCHITECTURES, VOCAB_SIZE, save_tiny, tiny_model, tiny_tokenizer

FP32 = Runtime(device=torch.device("cpu"), compute_dtype=torch.float32)
IDS = torch.tensor([[5, 9, 30, 12, 44]])


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(messages, "_said", set())


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.hidden(IDS))


def test_runtime_auto_and_explicit(monkeypatch):
    runtime = make_runtime(TrainSection(device="cpu"))
    native = has_native_bf16_cpu()
    assert runtime.compute_dtype == (torch.bfloat16 if native else torch.float32)
    assert make_runtime(TrainSection(device="cpu", compute_dtype="fp64")).compute_dtype == torch.float64
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"train\.device=cpu"):
        make_runtime(TrainSection(device="cuda"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fp32_is_exact_and_frozen(tmp_path, arch):
    teacher = load_teacher(TeacherSection(model=str(save_tiny(tmp_path / arch, arch)), precision="fp32"), FP32)
    with torch.no_grad():
        expected = tiny_model(arch)(IDS).logits
    torch.testing.assert_close(logits(teacher), expected, atol=1e-5, rtol=1e-5)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_is_repacked_only_for_arithmetic_in_bf16(tmp_path, monkeypatch, dtype):
    import bitsandbytes as bnb

    # On a CPU with AVX-512 BF16 the packed product rounds to bf16 whatever the dtype of its input.
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    packed = []
    monkeypatch.setattr(bnb.nn.modules, "_convert_weight_packed_for_cpu", lambda w, s: packed.append(w) or (w, s))
    folder = save_tiny(tmp_path / "m")
    model = load_teacher(TeacherSection(model=str(folder), precision="nf4"), replace(FP32, compute_dtype=dtype))
    logits(model)
    assert bool(packed) == (dtype == torch.bfloat16)


@pytest.mark.parametrize(
    ("failure", "kind", "text"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            RuntimeError,
            "^CUDA out of memory",
        ),
        (ValueError("no kernel for this blocksize"), ModelError, "m cannot be loaded: .*no kernel for this blocksize"),
    ],
)
def test_what_fails_while_weights_are_quantised_is_what_the_user_hears(tmp_path, monkeypatch, failure, kind, text):
    """transformers keeps it for a report that nobody sees, loads the rest, and then refers to the report."""
    import bitsandbytes as bnb

    def fail(*_arguments: Any, **_options: Any) -> Any:
        raise failure

    monkeypatch.setattr(bnb.nn.Params4bit, "_quantize", fail)
    teacher = TeacherSection(model=str(save_tiny(tmp_path / "m")), precision="nf4")
    with pytest.raises(kind, match=text) as caught:
        load_teacher(teacher, FP32)
    assert is_out_of_memory(caught.value) is (kind is RuntimeError)


def test_nf4_layers_with_few_outputs_pass_on_any_cpu(tmp_path):
    """bitsandbytes cannot repack them where the CPU has AVX-512 BF16, and asserts in their first pass."""
    teacher = load_teacher(TeacherSection(model=str(save_tiny(tmp_path / "hybrid", "qwen3_5_text"))), FP32)
    few = [m for m in teacher.modules() if hasattr(m, "support_avx512bf16_for_cpu") and m.out_features % 32]
    assert few and not any(m.support_avx512bf16_for_cpu for m in few)
    assert torch.isfinite(logits(teacher)).all()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nf4_quantises_the_linears_only_and_stays_near(tmp_path, arch, monkeypatch):
    import bitsandbytes as bnb

    # The first pass, on CPUs with AVX-512 BF16, repacks weights and unpacks their nested scales.
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)
    # OPT projects embeddings of 32 up to 64: too narrow for a block, so it stays in full precision
    teacher = load_teacher(TeacherSection(model=str(save_tiny(tmp_path / arch, arch))), FP32, vocab_size=70)
    packed = [name for name, m in teacher.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(packed) >= 8 and not any("head" in name or "embed" in name for name in packed)
    assert all(m.weight.quant_state.nested for m in teacher.modules() if isinstance(m, bnb.nn.Linear4bit))
    with torch.no_grad():
        expected = tiny_model(arch)(IDS).logits[..., :70]
    got = logits(teacher)
    assert got.shape[-1] == 70
    error = (got - expected).pow(2).mean().sqrt() / expected.std()
    assert 0 < error < 0.6


def test_layers_that_the_cpu_kernel_cannot_pack_are_kept_from_it(tmp_path, monkeypatch):
    import bitsandbytes as bnb

    # As on a CPU with AVX-512 BF16, whose kernel packs 32 outputs together and refuses 72 of them by an assertion.
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    packed = []
    monkeypatch.setattr(
        bnb.nn.modules,
        "_convert_weight_packed_for_cpu",
        lambda w, state: (packed.append(state.shape[0]), (w, state))[1],
    )
    folder = save_tiny(tmp_path / "m", "deepseek_v2")
    runtime = replace(FP32, compute_dtype=torch.bfloat16)
    logits(load_teacher(TeacherSection(model=str(folder)), runtime))
    assert packed and all(rows % 32 == 0 for rows in packed)


def fp8_folder(folder):
    """A tiny model with its projections in FP8, one fp32 scale for each block of 128 x 128; and what they stand for."""
    from safetensors.torch import load_file, save_file

    save_tiny(folder, dtype=torch.bfloat16)
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        scale = tensors[name].float().abs().max() / 448  # the largest number of e4m3
        packed = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        blocks = [-(-size // 128) for size in packed.shape]
        tensors[name], tensors[f"{name}_scale_inv"] = packed, scale.expand(blocks).clone()
        meant[name] = packed.float() * scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return meant


def test_a_checkpoint_in_fp8_is_unpacked(tmp_path):
    meant = fp8_folder(tmp_path)
    teacher = load_teacher(TeacherSection(model=str(tmp_path), precision="bf16"), FP32)
    weights = dict(teacher.hf.named_parameters())
    for name, weight in meant.items():
        torch.testing.assert_close(weights[name].float(), weight, rtol=2**-7, atol=0)
    assert logits(teacher).isfinite().all()


@pytest.mark.parametrize("precision", ["stored", "nf4"])
def test_a_checkpoint_in_fp8_is_refused_where_it_cannot_be_read(tmp_path, precision):
    fp8_folder(tmp_path)
    with pytest.raises(ModelError, match="bf16, which unpacks"):
        load_teacher(TeacherSection(model=str(tmp_path), precision=precision), FP32)


@pytest.mark.parametrize(
    ("quantised", "compute_dtype", "capability", "kernels", "said"),
    [
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128},
            torch.bfloat16,
            (8, 6),
            True,
            r"train\.compute_dtype=fp16",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            torch.bfloat16,
            (8, 6),
            True,
            "8.9, and this has 8.6",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, torch.bfloat16, (8, 9), False, "of another version"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, torch.bfloat16, (8, 9), True, None),
        ({"quant_method": "mxfp4"}, torch.bfloat16, (8, 6), False, "of another version"),
    ],
)
def test_what_a_gpu_cannot_compute_with_as_it_is_stored_is_refused_before_it_is_read(
    tmp_path, monkeypatch, quantised, compute_dtype, capability, kernels, said
):
    folder = save_tiny(tmp_path / "m")
    edited = {**json.loads((folder / "config.json").read_text()), "quantization_config": quantised}
    (folder / "config.json").write_text(json.dumps(edited))
    real = importlib.util.find_spec
    installed = ("kernels", "triton", "gptqmodel")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in installed else real(name))
    monkeypatch.setattr("transformers.utils.is_kernels_available", lambda: kernels)
    config = read_config(resolve_reference(str(folder)))
    with pretended_cuda(capability=capability):
        runtime = Runtime(device=torch.device("cuda", 0), compute_dtype=compute_dtype)
        if said is None:
            assert check_stored(config, "m", "stored", runtime) is not None
            return
        with pytest.raises(ModelError, match=said):
            check_stored(config, "m", "stored", runtime)


def test_bf16_rounds_weights_but_computes_in_the_compute_dtype(tmp_path, caplog):
    folder = save_tiny(tmp_path / "m")
    teacher = load_teacher(TeacherSection(model=str(folder), precision="bf16"), FP32)
    assert teacher.head.linear.weight.dtype == torch.float32
    rounded = tiny_model()
    with torch.no_grad():
        for parameter in rounded.parameters():  # not the buffers: rotary frequencies stay in fp32
            parameter.copy_(parameter.to(torch.bfloat16))
        expected = rounded(IDS).logits
    torch.testing.assert_close(logits(teacher), expected, atol=1e-5, rtol=1e-5)
    assert "rounded to bf16" in caplog.text


def test_a_model_mostly_too_narrow_for_nf4_is_refused(tmp_path):
    folder = save_tiny(tmp_path / "m", hidden_size=48, intermediate_size=96)
    with pytest.raises(ModelError, match="multiple of 64"):
        load_teacher(TeacherSection(model=str(folder)), FP32)


def test_widths_that_do_not_fit_are_left_alone_and_said(tmp_path, caplog):
    import bitsandbytes as bnb

    folder = save_tiny(tmp_path / "m", intermediate_size=96)
    teacher = load_teacher(TeacherSection(model=str(folder)), FP32)
    kinds = {name.rpartition(".")[2]: type(m) for name, m in teacher.named_modules()}
    assert kinds["down_proj"] is torch.nn.Linear and kinds["up_proj"] is bnb.nn.Linear4bit
    assert caplog.text.count("down_proj") >= 1


def test_files_without_safetensors_are_explained(tmp_path):
    folder = save_tiny(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_teacher(TeacherSection(model=str(folder), precision="fp32"), FP32)


def test_missing_tensors_are_refused_not_filled_with_noise(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_tiny(tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="up_proj"):
        load_teacher(TeacherSection(model=str(folder), precision="fp32"), FP32)


def test_code_of_its_own_and_unknown_architectures_are_explained(tmp_path):
    folder = save_tiny(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "homemade",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_teacher(TeacherSection(model=str(folder), precision="fp32"), FP32)
    with pytest.raises(ModelError, match="trust_remote_code"):
        source_dtype(resolve_reference(str(folder)))
    with pytest.raises(ModelError, match="trust_remote_code"):
        _num_rows(TeacherSection(model=str(folder)))
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="architecture"):
        load_teacher(TeacherSection(model=str(folder), precision="fp32"), FP32)


def test_encoder_decoders_and_foreign_quantisation_are_refused(tmp_path):
    folder = tmp_path / "t5"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    with pytest.raises(ModelError, match="decoder-only"):
        load_teacher(TeacherSection(model=str(folder)), FP32)
    folder = save_tiny(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="gptq"):
        load_teacher(TeacherSection(model=str(folder)), FP32)


def test_tokenizers_pad_on_the_left_with_some_token(tmp_path):
    folder = save_tiny(tmp_path / "m")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(TeacherSection(model=str(folder)))
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def _with_vision(folder: Path, kind: str) -> Any:
    """A tiny random model with a vision tower, saved with a tokenizer."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "mistral3":
        values = {"text_config": {**text, "model_type": "ministral3", "tie_word_embeddings": False},
                  "vision_config": {**vision, "model_type": "pixtral", "head_dim": 16, "image_size": 32,
                                    "patch_size": 8}}  # fmt: skip
    else:
        further = {"model_type": "gemma4_text", "num_kv_shared_layers": 2, "sliding_window": 8, "global_head_dim": 32,
                   "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB_SIZE,
                   "use_double_wide_mlp": True, "final_logit_softcapping": 30.0,
                   "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
        values = {"text_config": {**text, **further, "num_key_value_heads": 1}, "audio_config": None,
                  "vision_config": {**vision, "model_type": "gemma4_vision", "num_key_value_heads": 2,
                                    "head_dim": 16}}  # fmt: skip
    config = AutoConfig.for_model(kind, **values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("layout", ["as saved", "model.language_model", "language_model.model"])
@pytest.mark.parametrize("kind", ["mistral3", "gemma4"])
def test_of_a_model_with_a_vision_tower_the_text_part_is_read(tmp_path, kind, layout):
    from safetensors.torch import load_file, save_file

    whole = _with_vision(tmp_path, kind)
    file = tmp_path / "model.safetensors"
    if layout != "as saved":
        renamed = {}
        for name, tensor in load_file(file).items():
            bare = name.replace("model.language_model.", "@.").replace("language_model.model.", "@.")
            head = "lm_head" if layout.startswith("model") else "language_model.lm_head"
            bare = bare.replace("language_model.lm_head", "lm_head").replace("lm_head", head)
            renamed[bare.replace("@.", f"{layout}.")] = tensor
        save_file(renamed, file, metadata={"format": "pt"})
    runtime = Runtime(device=torch.device("cpu"), compute_dtype=torch.float32)
    model = read_model(resolve_reference(str(tmp_path)), runtime, "fp32")
    assert type(model).__name__ == {"mistral3": "Ministral3ForCausalLM", "gemma4": "Gemma4ForCausalLM"}[kind]
    ids = torch.tensor([[1, 5, 9, 23, 11, 7, 30, 31, 32, 33, 40, 41]])
    with torch.no_grad():
        assert (model(ids).logits - whole(ids).logits).abs().max() < 1e-5
    values = json.loads((tmp_path / "config.json").read_text())
    assert shape_from_config(values).num_parameters == sum(p.numel() for p in model.parameters())
    verify_kv(LanguageModel(model, compute_dtype=torch.float32), blocks=True)


def test_what_a_spread_teacher_writes_lies_in_the_cache_and_goes_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("QSWITCH_CACHE", str(tmp_path / "cache"))
    # Room for the embedding: accelerate 1.13 and older refuse a model that is on disk as a whole.
    monkeypatch.setattr(load, "spread_limits", lambda *_: {"cpu": 300_000})
    resolved = resolve_reference(str(save_tiny(tmp_path / "m", "qwen3_moe")))  # its experts are stored otherwise
    model = read_model(resolved, FP32, "fp32", spread=100_000)
    assert list((tmp_path / "cache").glob(".scratch.*.partial/*experts*.safetensors"))
    with torch.no_grad():
        spread = model(input_ids=IDS).logits
    del model
    gc.collect()
    assert list((tmp_path / "cache").iterdir()) == []
    torch.testing.assert_close(spread, read_model(resolved, FP32, "fp32")(input_ids=IDS).logits, atol=1e-5, rtol=0)


def test_a_spread_teacher_gets_of_its_gpu_what_the_plan_leaves_it():
    with pretended_cuda(2):
        runtime = make_runtime(TrainSection(device="cuda"))
        limits = load.spread_limits(runtime, 12_345)
    assert limits.pop("cpu") > 2**28 and limits == {0: 12_345}


def test_int8_does_not_warn_in_every_layer_of_every_pass(tmp_path, caplog):
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    level = logger.level
    logger.setLevel(logging.NOTSET)
    folder = tmp_path / "m"
    resolved = resolve_reference(str(save_tiny(folder, "llama")))
    try:
        model = read_model(resolved, FP32, "int8")
        assert not _casts_said(model, caplog)
        model.save_pretrained(tmp_path / "packed")  # whose files are int8 themselves
        logger.setLevel(logging.NOTSET)
        assert _casts_said(model, caplog), "else nothing is silenced"
        model = read_model(resolve_reference(str(tmp_path / "packed")), FP32, "stored")
        assert not _casts_said(model, caplog)
    finally:
        logger.setLevel(level)


@torch.no_grad()
def _casts_said(model: Any, caplog: Any) -> int:
    """How often a pass warns of the casts of int8."""
    caplog.clear()
    model(input_ids=IDS)
    return sum("cast from" in record.message for record in caplog.records)
