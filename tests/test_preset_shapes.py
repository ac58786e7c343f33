"""Each shape block is the published model: built as the real class without weights, it has the published size."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qswitch.plan.families import shape_from_config
from qswitch.presets import load_run_config, preset_names

# Read in stored copies of public files, by source:
KERAS = "keras-team/keras-hub, keras_hub/src/models/*/*_presets.py, `params`"
HUB = "safetensors.total of https://huggingface.co/api/models/<id>, as public scripts have recorded it"
SHARED = "safetensors.total of the hub, as scripts of several repositories on GitHub have recorded it"
GIMMICK = "floschne/gimmick, get_model_sizes(), from HfApi.get_safetensors_metadata"
PUBLISHED = {
    "openai-community/gpt2": (124_439_808, KERAS),
    "openai-community/gpt2-medium": (354_823_168, KERAS),
    "openai-community/gpt2-large": (774_030_080, KERAS),
    "openai-community/gpt2-xl": (1_557_611_200, KERAS),
    "facebook/opt-125m": (125_237_760, KERAS),
    "facebook/opt-350m": (331_196_416, "benchmark scripts for MeZO-style training of OPT-350M"),
    "facebook/opt-1.3b": (1_315_753_984, KERAS),
    "facebook/opt-2.7b": (2_651_596_800, "metadata of fine-tuned OPT-2.7B checkpoints"),
    "openlm-research/open_llama_3b_v2": (3_426_473_600, "size tables of OpenLLaMA-3B upcycling"),
    "openlm-research/open_llama_7b_v2": (6_738_415_616, "as Llama 7B, whose shape it has"),
    "meta-llama/Llama-2-7b-chat-hf": (6_738_417_664, HUB),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (1_100_048_384, HUB),
    "meta-llama/Llama-3.1-8B-Instruct": (8_030_261_248, HUB),
    "meta-llama/Llama-3.2-3B-Instruct": (3_212_749_824, HUB),
    "meta-llama/Llama-3.2-1B-Instruct": (1_235_814_400, HUB),
    "Qwen/Qwen2.5-0.5B-Instruct": (494_032_768, GIMMICK),
    "Qwen/Qwen2.5-1.5B-Instruct": (1_543_714_304, GIMMICK),
    "Qwen/Qwen2.5-3B-Instruct": (3_085_938_688, GIMMICK),
    "Qwen/Qwen2.5-7B-Instruct": (7_615_616_512, GIMMICK),
    "Qwen/Qwen2.5-32B-Instruct": (32_763_876_352, GIMMICK),
    # The hub counts 0.75 B and 2.03 B for these two, whose files hold the tied head a second time.
    "Qwen/Qwen3-0.6B": (596_049_920, KERAS),
    "Qwen/Qwen3-1.7B": (1_720_574_976, KERAS),
    "Qwen/Qwen3-8B": (8_190_735_360, KERAS),
    "Qwen/Qwen3-14B": (14_768_307_200, KERAS),
    "Qwen/Qwen3-4B-Instruct-2507": (4_022_468_096, "as Qwen3-4B, whose shape it has: " + KERAS),
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": (1_543_714_304, "as Qwen2.5-1.5B-Instruct, whose shape it has"),
    "Qwen/Qwen2.5-Coder-7B-Instruct": (7_615_616_512, "as Qwen2.5-7B-Instruct, whose shape it has"),
    # keras-hub counts the vision tower too, which is not read here: 100,592,896 and 333,514,240 by transformers' class.
    "Qwen/Qwen3.5-0.8B": (852_985_920 - 100_592_896, KERAS),
    "Qwen/Qwen3.5-4B": (4_539_265_536 - 333_514_240, KERAS),
    "google/gemma-2-2b-it": (2_614_341_888, KERAS),
    "google/gemma-2-9b-it": (9_241_705_984, KERAS),
    "google/gemma-3-270m-it": (268_098_176, KERAS),
    "google/gemma-3-1b-it": (999_885_952, KERAS),
    "allenai/OLMo-2-0425-1B-Instruct": (1_484_916_736, SHARED),
    "allenai/OLMo-2-1124-7B-Instruct": (7_298_011_136, "model_bits of OLMo 3 7B, whose tensors it has, in " + SHARED),
    "microsoft/Phi-4-mini-instruct": (3_836_021_760, SHARED),
    "HuggingFaceTB/SmolLM3-3B": (3_075_098_624, SHARED),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (134_515_008, HUB),
    "HuggingFaceTB/SmolLM2-360M-Instruct": (361_821_120, HUB),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": (1_711_376_384, HUB),
    "mistralai/Mistral-7B-Instruct-v0.3": (7_248_023_552, HUB),
    # The hub counts the vision tower too, 420,083,712 and 428,472,320 by transformers' class, and the 476 scales of 8B.
    "mistralai/Ministral-3-3B-Instruct-2512-BF16": (3_849_090_048 - 420_083_712, SHARED),
    "mistralai/Ministral-3-8B-Instruct-2512-BF16": (8_918_026_716 - 428_472_320 - 476, SHARED),
    # Likewise the towers and what joins them to the text; keys and values of the last layers, which share them and read
    # none of their own; one scale a layer.
    "google/gemma-4-E2B-it": (5_123_178_051 - 475_728_160 - 18_880_512 - 35, SHARED),
    "google/gemma-4-E4B-it": (7_996_156_490 - 478_087_456 - 55_055_616 - 42, SHARED),
}


def cited_shapes() -> dict[str, dict]:
    """Model id -> shape block, of every model whose source a preset cites."""
    found = {}
    for name in preset_names():
        config = load_run_config(name)
        for section in (config.teacher, config.student):
            for model in [section.model] if isinstance(section.model, str) else section.model:
                if model in config.about.shape_sources:
                    assert found.setdefault(model, section.shape) == section.shape, f"two shapes of {model}"
    return found


SHAPES = cited_shapes()


def test_every_shape_is_compared_with_a_published_size():
    assert set(SHAPES) == set(PUBLISHED)


@pytest.mark.parametrize("model", SHAPES)
def test_the_real_class_has_the_published_size(model: str):
    shape = SHAPES[model]
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    parameters = sum(p.numel() for p in built.parameters())
    published, source = PUBLISHED[model]
    assert parameters == pytest.approx(published, rel=5e-3), source
    assert shape_from_config(shape).num_parameters == parameters, "the planner counts otherwise"
