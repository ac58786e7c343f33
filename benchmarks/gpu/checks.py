"""Stage 0: does this card do what the tests say on a CPU? Minutes, small tensors, nothing on disk.

Kernels of bitsandbytes against unpacked weights, attention with our masks, noise bit for bit, CUDA graphs against usual
passes, copies that make the host wait, the memory cap.
"""

from __future__ import annotations

import collections
import gc
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.passes import state_of
from benchmarks.gpu.report import GIB, Context, Report
from benchmarks.gpu.timing import host_and_device_ms
from qswitch.distill.recovery import limit_device_memory
from qswitch.doctor import examine
from qswitch.errors import is_out_of_memory
from qswitch.models.host_memory import release_memory
from qswitch.models.language_model import LanguageModel
from qswitch.models.quantise import keep_from_repacking
from qswitch.models.residency import SLAB_BYTES
from qswitch.plan import cost
from qswitch.plan.machine import REFERENCE_GPU, Gpu, detect_budget_bytes
from qswitch.plan.memory import CUDA_CONTEXT_BYTES
from qswitch.plan.shapes import LinearShape
from qswitch.rollout import noise
from qswitch.rollout.block_length import FixedBlock
from qswitch.rollout.decode import RolloutRequest, rollout
from qswitch.rollout.graph_trial import try_graphs
from qswitch.rollout.kv_probe import verify_kv
from qswitch.rollout.policy import SwitchPolicy, Threshold
from qswitch.rollout.step_graph import EAGER_PASSES, StepGraphs
from tests.tiny import tiny_model

LAYERS = {"7B query": (4096, 4096), "7B gate": (4096, 11008), "7B down": (11008, 4096), "1.1B key": (2048, 256)}
"""(inputs, outputs) of linear layers."""
TINY_LAYERS = {"wide": (128, 256), "narrow": (256, 128)}
TOKENS = (1, 4, 8, 32, 40, 72, 160, 512)
ARCHITECTURES = ("llama", "gpt2", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "granite", "cohere")


def run(context: Context, report: Report) -> None:
    """Every check of the stage."""
    report.measure("machine", partial(machine, context))
    report.measure("noise", partial(keyed_noise, context))
    for name, (inputs, outputs) in (TINY_LAYERS if context.tiny else LAYERS).items():
        report.measure(f"nf4 {name}", partial(nf4_layer, context, inputs, outputs))
    for key_heads in (32, 4):
        report.measure(f"attention, {key_heads} key heads", partial(attention, context, key_heads))
    for architecture in ARCHITECTURES[:2] if context.tiny else ARCHITECTURES:
        report.measure(f"decode {architecture}", partial(decode, context, architecture))
    report.measure("graphs that stay", partial(graphs_that_stay, context))
    report.measure("blocking copies", partial(blocking_copies, context))
    report.measure("uploads", partial(uploads, context))
    report.measure("memory cap", partial(memory_cap, context))


def machine(context: Context) -> dict[str, Any]:
    """Versions and device, as `qswitch doctor` sees them, and what the CUDA context takes."""
    found = {"doctor": {k: v for k, v in examine().items() if k != "hub"}}
    if context.device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(context.device)
    free, total = torch.cuda.mem_get_info(context.device)
    outside = total - free - torch.cuda.memory_reserved(context.device)
    return {
        **found,
        "name": properties.name,
        "capability": torch.cuda.get_device_capability(context.device),
        "multiprocessors": properties.multi_processor_count,
        "total_gib": round(total / GIB, 3),
        "nvidia_smi_free_gib": round(detect_budget_bytes("cuda")[0] / GIB, 3),
        "outside_allocator_gib": round(outside / GIB, 3),
        "planned_context_gib": round(CUDA_CONTEXT_BYTES / GIB, 3),
    }


def keyed_noise(context: Context) -> dict[str, Any]:
    """Hashes must be the same bits as on a CPU; the logarithms may differ in their last place."""
    ids = torch.arange(64)
    here, there = (noise.row_keys(7, ids.to(d), (ids % 3).to(d)) for d in ("cpu", context.device))
    steps = torch.arange(64)
    keys = [noise.step_keys(k, steps.to(k.device)) for k in (here, there)]
    uniforms = [noise.uniform(k).cpu() for k in keys]
    gumbels = [noise.gumbel(k, 4096).cpu() for k in keys]
    difference = (gumbels[0] - gumbels[1]).abs().max().item()
    if not torch.equal(keys[0], keys[1].cpu()) or not torch.equal(*uniforms):
        raise AssertionError("the keys of the noise differ from those on the CPU")
    same = (gumbels[0].argmax(-1) == gumbels[1].argmax(-1)).float().mean().item()
    return {"largest_gumbel_difference": difference, "share_of_same_winners": same}


def nf4_layer(context: Context, inputs: int, outputs: int) -> dict[str, Any]:
    """A packed product against the same weights unpacked, by tokens; and what the plan takes for fused."""
    import bitsandbytes as bnb

    dtype = torch.float32 if context.device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    plain = torch.nn.Linear(inputs, outputs, bias=False)
    layer = bnb.nn.Linear4bit(inputs, outputs, bias=False, quant_type="nf4", compute_dtype=dtype,
                              compress_statistics=True)  # fmt: skip
    layer.load_state_dict(plain.state_dict())
    layer = layer.to(context.device)
    keep_from_repacking(layer, trains=True)
    unpacked = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
    rows = []
    with torch.no_grad():
        for tokens in TOKENS[:3] if context.tiny else TOKENS:
            x = torch.randn(tokens, inputs, device=context.device, dtype=dtype)
            exact = x.double() @ unpacked.double().T
            error = ((layer(x).double() - exact).norm() / exact.norm()).item()
            if not error < 2e-2:
                raise AssertionError(f"{tokens} tokens: the packed product is {error:.3g} off")
            alone = layer(x[:1])
            rows.append(
                {
                    "tokens": tokens,
                    "error": error,
                    "error_of_unpacked": ((x @ unpacked.T).double() - exact).norm().item() / exact.norm().item(),
                    "first_row_as_alone": torch.equal(layer(x)[:1], alone),
                    "packed": host_and_device_ms(partial(layer, x), context.device),
                    "unpacked": host_and_device_ms(partial(torch.matmul, x, unpacked.T), context.device),
                }
            )
    gpu = _gpu(context)
    fused = cost.fused_tokens(LinearShape("layer", inputs, outputs), gpu, "fp32" if dtype == torch.float32 else "bf16")
    return {"by_tokens": rows, "fused_tokens_of_the_plan": fused}


def _gpu(context: Context) -> Gpu:
    """A card with this one's multiprocessors and capability, for the thresholds of bitsandbytes."""
    if context.device.type != "cuda":
        return REFERENCE_GPU
    properties = torch.cuda.get_device_properties(context.device)
    return Gpu(0, 1.0, 1.0, properties.multi_processor_count, torch.cuda.get_device_capability(context.device))


def attention(context: Context, key_heads: int) -> dict[str, Any]:
    """Attention of 8 rows over 512 slots: masks boolean or added, slots aligned or not, heads shared or copied."""
    heads, width, rows = (8, 16, 2) if context.tiny else (32, 64, 8)
    key_heads = min(key_heads, heads)
    dtype = torch.float32 if context.device.type == "cpu" else torch.bfloat16
    results: dict[str, Any] = {}
    for tokens in (1, 5):
        for slots in (64,) if context.tiny else (512, 509):
            q = torch.randn(rows, heads, tokens, width, device=context.device, dtype=dtype)
            k, v = (torch.randn(rows, key_heads, slots, width, device=context.device, dtype=dtype) for _ in range(2))
            allowed = torch.rand(rows, 1, tokens, slots, device=context.device) < 0.8
            allowed[..., -1] = True
            added = torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)
            groups = heads // key_heads
            ways = {
                "boolean": partial(_repeated, q, k, v, allowed, groups),
                "added": partial(_repeated, q, k, v, added, groups),
                "added, groups folded": partial(_folded, q, k, v, added, groups),
            }
            expected = ways["boolean"]().double()
            for way, run_it in ways.items():
                difference = (run_it().double() - expected).abs().max().item()
                if not difference < 5e-2:
                    raise AssertionError(f"{way}, {tokens} tokens, {slots} slots: differs by {difference:.3g}")
                results[f"{way}, {tokens} tokens, {slots} slots"] = {
                    "difference": difference, **host_and_device_ms(run_it, context.device)
                }  # fmt: skip
    return results


def _repeated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, groups: int) -> Tensor:
    """Keys and values copied for every query head, as transformers does where a mask is given."""
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _folded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, groups: int) -> Tensor:
    """The query heads of a key head as further queries of it: nothing is copied."""
    rows, heads, tokens, width = q.shape
    queries = q.view(rows, heads // groups, groups * tokens, width)
    return scaled_dot_product_attention(queries, k, v, attn_mask=mask.repeat(1, 1, groups, 1)).reshape(q.shape)


def decode(context: Context, architecture: str) -> dict[str, Any]:
    """Rows of different length together as alone, drafts taken back, CUDA graphs as usual passes; fp32."""
    model = LanguageModel(tiny_model(architecture, dtype=torch.float32).to(context.device).eval())
    verify_kv(model, blocks=True)
    trial = try_graphs(model, 5)
    if context.device.type == "cuda" and trial.difference is None:
        raise AssertionError(f"passes are not recorded: {trial.reason}")
    return {"graphs": trial.to_dict()}


@torch.no_grad()
def graphs_that_stay(context: Context) -> dict[str, Any]:
    """One model's graphs go, as a teacher's do after each rollout; the other's must not need anything of theirs."""
    on_gpu, steps = context.device.type == "cuda", EAGER_PASSES + 6
    size = {} if context.tiny else {"hidden_size": 1024, "intermediate_size": 2816}
    dtype = torch.bfloat16 if on_gpu else torch.float32
    models = [LanguageModel(tiny_model("llama", seed=s, dtype=dtype, **size).to(context.device).eval()) for s in (1, 2)]
    graphs = [StepGraphs(model, None if on_gpu else _repeated_call) for model in models]
    states = [state_of(model, 4, 8, 2 * steps, g) for model, g in zip(models, graphs, strict=True)]
    usual = state_of(models[1], 4, 8, 2 * steps)
    ids = torch.ones((4, 1), dtype=torch.int64, device=context.device)
    read = (ids, torch.ones_like(ids, dtype=torch.bool), np.ones(4, dtype=np.int64))
    for _ in range(steps):
        for state in (*states, usual):
            state.append(*read)
    before = graphs[1].num_replays
    graphs[0].forget()
    del states[0]
    gc.collect()
    release_memory(context.device)
    filled = [torch.full((2**20,), float("nan"), device=context.device) for _ in range(2 if context.tiny else 64)]
    worst = 0.0
    for _ in range(steps):
        found, expected = (state.append(*read).double() for state in (states[0], usual))
        worst = max(worst, ((found - expected).norm() / expected.norm()).item())
    if graphs[1].failure is not None or graphs[1].num_replays < before + steps or not worst < 5e-2:
        raise AssertionError(
            f"{graphs[1].num_replays - before} of {steps} passes replayed, {worst:.3g} from usual ones; "
            f"{graphs[1].failure}"
        )
    return {"difference": worst, "replays": graphs[1].num_replays, "filled_mib": 4 * len(filled)}


def _repeated_call(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What a CUDA graph does, where there is none: its answer lies in one place."""
    place = run()
    return lambda: place.copy_(run())


def blocking_copies(context: Context) -> dict[str, Any]:
    """Times that the host waits for the device in rollouts, by place; at most one a round is meant."""
    context.needs_gpu()
    pair = [LanguageModel(tiny_model("llama", seed=s).to(context.device).eval()) for s in (1, 2)]
    requests = [RolloutRequest(i, 0, [4 + i % 9] * (3 + i % 5), 24) for i in range(12)]
    by_place: collections.Counter[str] = collections.Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" not in str(message):
            return
        frames = [f for f in traceback.extract_stack() if "/qswitch/" in f.filename]
        if frames:
            by_place[f"{frames[-1].filename.rpartition('/qswitch/')[2]}:{frames[-1].lineno}"] += 1

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(), mock.patch.object(warnings, "showwarning", note):
            warnings.simplefilter("always")
            _, stats = rollout(
                requests, teacher=pair[0], student=pair[1], seed=1, temperature=1.0, eos_ids=[2], pad_id=0,
                policy=SwitchPolicy(Threshold("exponential", 1.0, 0.3, 0.2, 24)), batch_size=4,
                keep="interventions", blocks=FixedBlock(2),
            )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"rounds": stats.rounds, "waits": sum(by_place.values()), "by_place": dict(by_place.most_common())}


def uploads(context: Context) -> dict[str, Any]:
    """Bytes a second from host to device, pinned and pageable: what a swapped teacher's return costs."""
    context.needs_gpu()
    there = torch.empty(SLAB_BYTES, dtype=torch.uint8, device=context.device)
    found = {}
    for kind, pinned in (("pinned", True), ("pageable", False)):
        here = torch.zeros(SLAB_BYTES, dtype=torch.uint8, pin_memory=pinned)
        times = host_and_device_ms(partial(there.copy_, here, non_blocking=True), context.device)
        found[f"{kind}_gb_per_s"] = round(SLAB_BYTES / times["whole_ms"] / 1e6, 2)
    return {**found, "planned_gb_per_s": cost.PCIE_BYTES_PER_S / 1e9}


def memory_cap(context: Context) -> dict[str, Any]:
    """An allocation beyond the budget fails, and one within it does not."""
    context.needs_gpu()
    room = min(2 * GIB, torch.cuda.get_device_properties(context.device).total_memory // 4)
    budget = CUDA_CONTEXT_BYTES + torch.cuda.memory_reserved(context.device) + room
    limit_device_memory(context.device, budget, CUDA_CONTEXT_BYTES)
    try:
        torch.empty(room // 2, dtype=torch.uint8, device=context.device)
        try:
            torch.empty(2 * room, dtype=torch.uint8, device=context.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return {"budget_gib": budget / GIB, "beyond": str(error)[:300]}
        raise AssertionError(f"{2 * room / GIB:.1f} GiB were allocated where {room / GIB:.1f} were left")
    finally:
        release_memory(context.device)
        torch.cuda.set_per_process_memory_fraction(1.0, context.device)
