"""Bytes of each part against real tensors of small models, and laws that hold for any size."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qswitch.config import LoraSection
from qswitch.plan import memory
from qswitch.plan.families import shape_from_config
from qswitch.units import GIB
from tests.live import LiveBytes

TINY = {"model_type": "llama", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 320,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128}  # fmt: skip
ODD = {**TINY, "intermediate_size": 344}  # down_proj reads 344 features, no multiple of 64

# config.json of https://huggingface.co/meta-llama/Llama-2-7b-hf (the same numbers in microsoft/Olive's
# examples/llm/config.py), meta-llama/Llama-3.1-8B (oumi's configs/recipes/llama3_1) and Qwen/Qwen2.5-7B.
LLAMA_2_7B = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
              "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}  # fmt: skip
LLAMA_31_8B = {**LLAMA_2_7B, "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}
# Qwen's two matrices of 152,064 x 3,584 in bf16 are 2.03 GiB, its 6.53 billion linear weights at 0.516 byte 3.14: 5.17.
QWEN_25_7B = {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
              "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}  # fmt: skip
SHAPE = shape_from_config(TINY)
LORA = LoraSection(r=8)


@pytest.mark.parametrize(
    ("values", "low", "high"), [(LLAMA_2_7B, 3.6, 3.9), (LLAMA_31_8B, 5.3, 5.6), (QWEN_25_7B, 5.15, 5.5)]
)
def test_nf4_teachers_have_their_known_size(values, low, high):
    assert low <= memory.weight_bytes(shape_from_config(values), "nf4", 2) / GIB <= high


def tensor_bytes(parameter):
    """A parameter and whatever bitsandbytes keeps beside it."""
    tensors = [parameter]
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    if getattr(parameter, "SCB", None) is not None:
        tensors.append(parameter.SCB)
    return sum(t.numel() * t.element_size() for t in tensors)


def quantised(values, folder, **options):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    pytest.importorskip("bitsandbytes")
    config = AutoConfig.for_model(**values)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=BitsAndBytesConfig(**options)
    )


GPT2 = {"model_type": "gpt2", "vocab_size": 512, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}
OPT = {**TINY, "model_type": "opt", "ffn_dim": 320, "word_embed_proj_dim": 128}


@pytest.mark.parametrize(
    "values",
    [
        TINY,
        GPT2,
        OPT,
        {**TINY, "model_type": "qwen2", "tie_word_embeddings": True},
        {**TINY, "model_type": "gemma2", "head_dim": 32},
        {**TINY, "model_type": "phi"},
        {**TINY, "model_type": "phi3", "pad_token_id": 0},
    ],
    ids=lambda v: v["model_type"],
)
def test_nf4_bytes_equal_those_of_bitsandbytes_part_by_part(values, tmp_path):
    model = quantised(values, tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    shape = shape_from_config(values)
    parts = {"linears": 0, "other": 0}
    bias_of_linear = {m.bias for m in model.modules() if type(m).__name__ == "Linear4bit" and m.bias is not None}
    for parameter in model.parameters():
        linear = hasattr(parameter, "quant_state") or parameter in bias_of_linear
        parts["linears" if linear else "other"] += tensor_bytes(parameter)
    planned_linears = sum(memory.linear_bytes(m, "nf4", 2) for m in shape.linears)
    assert planned_linears == pytest.approx(parts["linears"], rel=0.02)
    assert shape.other_parameters * 2 == pytest.approx(parts["other"], rel=0.02)
    assert memory.weight_bytes(shape, "nf4", 2) == pytest.approx(sum(parts.values()), rel=0.02)


def test_int8_bytes_are_near_those_of_bitsandbytes(tmp_path):
    model = quantised(TINY, tmp_path, load_in_8bit=True)
    found = sum(tensor_bytes(p) for p in model.parameters())
    assert memory.weight_bytes(SHAPE, "int8", 2) == pytest.approx(found, rel=0.02)


def test_odd_widths_stay_unquantised_on_cpu_only():
    shape = shape_from_config(ODD)
    on_cpu, on_gpu = (memory.weight_bytes(shape, "nf4", 4, any_width=w) for w in (False, True))
    down = next(m for m in shape.layer_linears if m.name == "down_proj")
    assert on_cpu - on_gpu == shape.num_layers * (down.parameters * 4 - memory.nf4_linear_bytes(down, 4, True))


def test_plain_weights_take_their_dtype():
    assert memory.weight_bytes(SHAPE, "bf16", 2) == 2 * SHAPE.num_parameters
    assert memory.weight_bytes(SHAPE, "bf16", 4) == 4 * SHAPE.num_parameters  # kept in the compute dtype
    assert memory.weight_bytes(SHAPE, "fp32", 2) == 4 * SHAPE.num_parameters


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        {"use_dora": True},
        {"layers_to_transform": [0, 2]},
        {"rank_pattern": {"down_proj": 3}},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_adapter_parameters_equal_those_of_peft(options):
    import peft
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    lora = LoraSection(**options)
    targets = lora.target_modules
    if targets == "all-linear":
        targets = sorted({m.name for m in SHAPE.layer_linears})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY))
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=lora.r,
                target_modules=targets,
                use_dora=lora.use_dora,
                layers_to_transform=lora.layers_to_transform,
                rank_pattern=lora.rank_pattern,
                modules_to_save=lora.modules_to_save or None,
            ),
        )
    expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.lora_parameters(SHAPE, lora) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["q_proj", "gate_proj", "down_proj"])
def test_dora_takes_beside_a_pass_what_tensors_of_peft_take(name, dtype):
    import peft
    import torch

    module = next(m for m in SHAPE.layer_linears if m.name == name)
    peaks = []
    for use_dora in (False, True):
        weight = torch.nn.Linear(module.in_features, module.out_features, bias=False, dtype=getattr(torch, dtype))
        wrapped = torch.nn.ModuleDict({name: weight})
        peft.get_peft_model(wrapped, peft.LoraConfig(r=8, target_modules=[name], use_dora=use_dora))
        x = torch.randn(1, module.in_features, dtype=getattr(torch, dtype))
        with LiveBytes() as live:
            wrapped[name](x).sum().backward()
        peaks.append(live.peak)
    lora = LoraSection(r=8, target_modules=[name], use_dora=True)
    planned = memory.dora_bytes(SHAPE, lora, 4 if dtype == "float32" else 2)
    assert peaks[1] - peaks[0] == pytest.approx(planned, rel=0.05)
    assert memory.dora_bytes(SHAPE, LoraSection(), 2) == 0


@pytest.mark.parametrize("compute", [None, "bfloat16"])
def test_a_head_that_trains_takes_its_gradient_chunk_by_chunk(compute):
    """At the second of two accumulated batches, so that the gradient itself is there already."""
    import torch

    from qswitch.distill.loss import language_model_loss

    peaks = {}
    for trains in (True, False):
        head = torch.nn.Linear(SHAPE.hidden_size, SHAPE.vocab_size, bias=False).requires_grad_(trains)
        for _ in range(2):
            hidden = torch.randn(8, SHAPE.hidden_size, requires_grad=True)
            with LiveBytes() as live, torch.autocast("cpu", torch.bfloat16, enabled=compute is not None):
                labels = torch.zeros(8, dtype=torch.int64)
                language_model_loss(hidden, head, labels, normalizer=8.0, chunk_tokens=4).backward()
        peaks[trains] = live.peak
    planned = memory.head_gradient_bytes(SHAPE, "none", LORA, 4 if compute is None else 2, 4)
    assert peaks[True] - peaks[False] == pytest.approx(planned, rel=0.1)
    assert memory.head_gradient_bytes(SHAPE, "lora", LORA, 2, 4) == 0
    assert memory.head_gradient_bytes(SHAPE, "lora", LoraSection(modules_to_save=["lm_head"]), 2, 4) > 0


def test_optimizer_state_is_that_of_adamw():
    import torch

    weight = torch.nn.Parameter(torch.zeros(1000))
    weight.grad = torch.zeros(1000)
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    moments = sum(t.numel() * t.element_size() for k, t in optimizer.state[weight].items() if k.startswith("exp"))
    assert memory.optimizer_bytes(1000, "adamw") == moments
    assert memory.optimizer_bytes(1000, "paged_adamw_8bit") < moments / 3.9


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kv_cache_bytes_are_those_of_transformers(dtype):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY)).to(getattr(torch, dtype))
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.zeros((3, 20), dtype=torch.int64), past_key_values=cache)
    found = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    width = 2 if dtype == "bfloat16" else 4
    assert memory.kv_buffer_bytes(SHAPE, 3, 20, width) == found
    keys_of_a_layer = found // (2 * SHAPE.num_layers)
    assert memory.kv_cache_bytes(SHAPE, 3, 20, width) == found + keys_of_a_layer


def saved_bytes(values, width, adapter, lora, rows, tokens):
    """Bytes that autograd holds for the backward pass of the backbone, storages counted once, parameters not at all."""
    import peft
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    model.to(torch.bfloat16 if width == 2 else torch.float32)
    if adapter == "lora":
        model.requires_grad_(False)
        shape = shape_from_config(values)
        config = peft.LoraConfig(
            r=lora.r, target_modules=sorted({m.name for m in shape.layer_linears}), fan_in_fan_out="gpt2" in str(values)
        )
        model = peft.get_peft_model(model, config)  # adapters in fp32
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    body = model.get_base_model().base_model if adapter == "lora" else model.base_model
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        body(torch.ones((rows, tokens), dtype=torch.int64), use_cache=False).last_hidden_state.float().sum()
    return sum(s.nbytes() for s in storages.values())


def shares_heads_in_one_kernel():
    """Whether attention of heads that share keys is one kernel on a CPU, as it is on a card in every torch."""
    import torch
    from torch.nn.attention import SDPBackend

    queries, keys = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16)
    chosen = torch._fused_sdp_choice(queries, keys, keys, is_causal=True, enable_gqa=True)
    return chosen != SDPBackend.MATH.value


@pytest.mark.parametrize(
    ("values", "width", "adapter"),
    [
        (TINY, 2, "lora"),
        (TINY, 4, "lora"),
        (TINY, 4, "none"),
        ({**TINY, "model_type": "qwen2"}, 2, "lora"),
        ({**TINY, "model_type": "phi3", "pad_token_id": 0}, 2, "lora"),
        ({**GPT2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}, 2, "lora"),
        ({**OPT, "dropout": 0.0}, 2, "lora"),
        ({**TINY, "model_type": "phi"}, 2, "lora"),
        ({**TINY, "model_type": "gemma2", "head_dim": 32, "attn_implementation": "eager"}, 2, "lora"),
    ],
    ids=lambda v: v["model_type"] if isinstance(v, dict) else str(v),
)
def test_activation_formula_is_near_what_autograd_saves(values, width, adapter):
    """Differences between two depths, so that embeddings and the last norm do not count."""
    rows, tokens = 4, 48
    key = "n_layer" if values["model_type"] == "gpt2" else "num_hidden_layers"
    if "num_key_value_heads" in values and "attn_implementation" not in values and not shares_heads_in_one_kernel():
        pytest.skip("this torch has no fused attention on a CPU where heads share keys, and saves all scores")
    few, many = ({**values, key: n} for n in (1, 3))
    per_layer = (
        saved_bytes(many, width, adapter, LORA, rows, tokens) - saved_bytes(few, width, adapter, LORA, rows, tokens)
    ) / 2
    planned = memory.layer_activation_bytes(shape_from_config(values), rows, tokens, width, adapter, LORA)
    assert 0.95 <= planned / per_layer <= 1.25


def test_checkpointing_saves_memory_where_there_are_layers_to_drop():
    shape = shape_from_config(LLAMA_2_7B)
    plain, recomputed = (memory.activation_bytes(shape, 4, 512, 2, "lora", LORA, c) for c in (False, True))
    assert recomputed < plain / 8


def test_cache_rows_have_their_published_sizes():
    assert memory.cache_row_bytes("hidden", 4096, 128256, 64, 2) == 8 * 1024
    assert memory.cache_row_bytes("topk", 4096, 128256, 64, 2) == 64 * 8 + 4


def test_the_longest_block_is_that_of_the_engine():
    from qswitch.layers import build_config
    from qswitch.plan.breakdown import _round_steps
    from qswitch.rollout import block_length

    assert memory.MAX_AUTO_DRAFTS == block_length.MAX_BLOCK_TOKENS
    for rows in (1, 2, 8, 32, 100):
        for vocab in (32000, 152064):
            config = build_config({
                "teacher": {"model": "a"}, "student": {"model": "b"}, "data": {"train": "c"},
                "rollout": {"batch_size": rows},
            })  # fmt: skip
            assert _round_steps(config, vocab) == block_length.drafts_within_scratch(rows, vocab) + 1


size = st.integers(1, 64)


@settings(max_examples=60, deadline=None)
@given(rows=size, tokens=size, more=st.integers(1, 8), vocab=st.integers(256, 200_000), checkpointing=st.booleans())
def test_every_part_grows_with_rows_length_and_vocabulary(rows, tokens, more, vocab, checkpointing):
    def activations(r, t):
        return memory.activation_bytes(SHAPE, r, t, 2, "lora", LORA, checkpointing)

    for part in (
        lambda r, t: memory.kv_cache_bytes(SHAPE, r, t, 2),
        lambda r, t: memory.forward_bytes(SHAPE, r, t, 2),
        activations,
    ):
        assert part(rows, tokens) < part(rows + more, tokens)
        assert part(rows, tokens) < part(rows, tokens + more)
    assert memory.rollout_vocabulary_bytes(rows, 5, vocab) < memory.rollout_vocabulary_bytes(rows, 5, vocab + more)
    assert memory.rollout_vocabulary_bytes(rows, 1, vocab) < memory.rollout_vocabulary_bytes(rows, 1 + more, vocab)
    assert memory.loss_chunk_bytes(tokens, 128, vocab) < memory.loss_chunk_bytes(tokens, 128, vocab + more)
    larger = shape_from_config({**TINY, "vocab_size": vocab + more})
    assert memory.weight_bytes(shape_from_config({**TINY, "vocab_size": vocab}), "nf4", 2) < memory.weight_bytes(
        larger, "nf4", 2
    )


def test_the_constants_of_a_cut_are_those_of_the_choice_of_layers():
    from qswitch.models.decoder_layers import CHUNK_POSITIONS
    from qswitch.models.layer_choice import MAX_POSITIONS, MAX_ROW_TOKENS, calibration

    assert memory.CUT_ROW_TOKENS == MAX_ROW_TOKENS
    assert (memory.CUT_POSITIONS, memory.CUT_CHUNK_POSITIONS) == (MAX_POSITIONS, CHUNK_POSITIONS)
    assert len(calibration("choose")) == memory.CUT_ROWS_CHOOSING
    assert len(calibration("check")) == memory.CUT_ROWS_CHECKING
