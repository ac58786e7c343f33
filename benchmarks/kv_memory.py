"""Key-value caches of a rollout call: bytes of the buffers against the plan, and what an allocator reserves for them.

    python -m benchmarks.kv_memory buffers  [--output benchmarks/results/kv_buffers.json]
    python -m benchmarks.kv_memory reserved [--output benchmarks/results/kv_reserved.json]

`buffers` runs rollouts of small random models in four settings of rows, lengths and drafts, and divides what the caches
of both models hold by what the plan counts. `reserved` records every allocation and release of one call with a model of
32 layers, multiplies the sizes so that its keys and values are those of a 7B model in bf16, and runs them through the
rules of torch's caching allocator (`caching_allocator.py`). It uses nothing but `rollout`, so it runs at older commits
too: the figures before and after come from the same program.
"""

from __future__ import annotations

import argparse
import random
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.caching_allocator import replay
from benchmarks.provenance import publish
from qswitch.models.language_model import LanguageModel
from qswitch.rollout.block_length import FixedBlock
from qswitch.rollout.decode import RolloutRequest, rollout
from qswitch.rollout.policy import SwitchPolicy, Threshold

GIB = 2**30
VOCAB = 64
WIDTH = 64
SCALE = 4096 / WIDTH * 2 / 4
"""From a width of 64 in fp32 to one of 4096 in bf16."""


class Events(TorchDispatchMode):
    """(key, bytes) of every storage that operations make, and (key, 0) when it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in given and storage not in self._known and storage.nbytes():
                    self._known.add(storage)
                    key = len(self.events)
                    self.events.append((key, storage.nbytes()))
                    weakref.finalize(storage, self.events.append, (key, 0))
        return result


def small_model(layers: int, seed: int) -> LanguageModel:
    """A random Llama of width 64 with as many key-value heads as heads."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return LanguageModel(model)


def write(pair: tuple[LanguageModel, LanguageModel], *, rows: int, prompt: int, new: int, drafts: int) -> None:
    """A call with twice as many requests as rows, so that rows end and others join; to the limit or to an end token."""
    rng = random.Random(3)
    lengths = [prompt, *(rng.randint(prompt // 4, prompt) for _ in range(2 * rows - 1))]
    requests = [RolloutRequest(i, 0, [rng.randrange(3, VOCAB) for _ in range(n)], new) for i, n in enumerate(lengths)]
    rollout(
        requests, teacher=pair[0], student=pair[1], seed=5, temperature=1.0, eos_ids=[2], pad_id=0, batch_size=rows,
        policy=SwitchPolicy(Threshold("exponential", 0.9, 0.05, 0.2, new)), keep="nothing", blocks=FixedBlock(drafts),
    )  # fmt: skip


SETTINGS = (
    {"rows": 4, "prompt": 40, "new": 48, "drafts": 0},
    {"rows": 8, "prompt": 100, "new": 64, "drafts": 4},
    {"rows": 2, "prompt": 150, "new": 40, "drafts": 9},
    {"rows": 12, "prompt": 30, "new": 100, "drafts": 2},
)


def buffers(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes that the caches of both models hold over bytes that the plan counts, for each setting."""
    from qswitch.plan import memory
    from qswitch.plan.families import shape_from_config
    from qswitch.rollout import kv_cache

    pair = small_model(3, 1), small_model(2, 2)
    held: list[int] = []
    original = kv_cache.KVState.begin_block

    def begin_block(state: kv_cache.KVState, num_steps: int) -> None:
        held.append(state.buffer_bytes)
        original(state, num_steps)

    results = []
    with mock.patch.object(kv_cache.KVState, "begin_block", begin_block):
        for setting in SETTINGS:
            held.clear()
            write(pair, **setting)
            slots = memory.cache_slots(setting["prompt"], setting["new"], setting["drafts"])
            planned = [
                memory.kv_buffer_bytes(shape_from_config(model.config.to_dict()), setting["rows"], slots, 4)
                for model in pair
            ]
            assert len(set(held)) == 2, "each model's buffers keep their size for the whole call"
            ratio = sum(set(held)) / sum(planned)
            results.append({**setting, "slots": slots, "buffer_bytes": sum(set(held)), "planned_bytes": sum(planned),
                            "buffers_over_plan": round(ratio, 4)})  # fmt: skip
    return {"settings": results}


def reserved(args: argparse.Namespace) -> dict[str, Any]:
    """Peaks of live and reserved bytes of one call, everything that its operations allocate."""
    pair = small_model(32, 1), small_model(4, 2)
    setting = {"rows": args.rows, "prompt": args.prompt, "new": args.new, "drafts": args.drafts}
    with Events() as recorded:
        write(pair, **setting)
    allocator = replay(recorded.events, SCALE)
    return {
        **setting,
        "layers": {"teacher": 32, "student": 4},
        "scale": SCALE,
        "events": len(recorded.events),
        "peak_live_gib": round(allocator.peak_live_bytes / GIB, 3),
        "peak_reserved_gib": round(allocator.peak_reserved_bytes / GIB, 3),
        "reserved_over_live": round(allocator.peak_reserved_bytes / allocator.peak_live_bytes, 3),
        "segments": allocator.num_segments,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["buffers", "reserved"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    publish({"buffers": buffers, "reserved": reserved}[args.what](args), args.output)


if __name__ == "__main__":
    main()
