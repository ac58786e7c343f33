"""Stage 3: passes of a 7B teacher and a 1.1B student by rows and tokens, issued by the host and done by the device.

Where `host_ms` is the longer part of `whole_ms`, kernels wait for Python and recorded passes pay; where it is the
shorter one, they do not. `planned_ms` is what the cost model says for this card, or for its reference card.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.loading import load_pair, pair_config
from benchmarks.gpu.report import Context, Report
from benchmarks.gpu.timing import host_and_device_ms
from qswitch.models.language_model import LanguageModel
from qswitch.plan import cost
from qswitch.plan.machine import describe_machine
from qswitch.plan.memory import Precision, kv_buffer_bytes
from qswitch.plan.scheduler import model_shapes
from qswitch.rollout.decode import inference
from qswitch.rollout.kv_cache import KVState, Prompts
from qswitch.rollout.step_graph import EAGER_PASSES, StepGraphs

ROWS = (1, 4, 8, 16, 32)
TOKENS = (1, 2, 4, 8, 16)


def run(context: Context, report: Report) -> None:
    """The NF4 teacher and the student in one process, then the teacher in bf16."""
    pair: list[LanguageModel] = []

    def load(precision: str) -> dict[str, Any]:
        pair[:] = load_pair(context, precision)
        return {}

    rows = ROWS[:2] if context.tiny else ROWS
    tokens = TOKENS[:2] if context.tiny else TOKENS
    report.load("load nf4", partial(load, "nf4"))
    for r in rows:
        for n in tokens:
            report.measure(f"teacher nf4, {r} rows, {n} tokens", partial(timed, context, pair, "nf4", r, n))
        report.measure(f"student, {r} rows", partial(timed, context, pair, None, r, 1))
        for role, index in (("student", 1), ("teacher nf4", 0)):
            report.measure(f"{role}, {r} rows, recorded", partial(recorded, context, pair, index, r))
    pair.clear()
    report.load("load bf16", partial(load, "bf16"))
    for r in rows:
        for n in tokens[:1] + tokens[-1:]:
            report.measure(f"teacher bf16, {r} rows, {n} tokens", partial(timed, context, pair, "bf16", r, n))


def state_of(model: LanguageModel, rows: int, read: int, room: int, graphs: StepGraphs | None = None) -> KVState:
    """A state whose rows have read `read` tokens and may read `room` more."""
    state = KVState(model, rows, read + room, graphs=graphs)
    ids = torch.arange(rows * read, device=model.device).view(rows, read) % model.vocab_size
    state.repack(np.arange(0), Prompts(ids, torch.ones_like(ids, dtype=torch.bool), np.full(rows, read)))
    return state


def timed(
    context: Context, pair: list[LanguageModel], precision: Precision | None, rows: int, tokens: int
) -> dict[str, Any]:
    """A pass over `tokens` tokens of `rows` rows behind a past of half a prompt and response, head included: of the
    teacher in `precision`, or of the student where that is None."""
    read = 16 if context.tiny else 256
    config = pair_config(context)
    model, shape = pair[0 if precision else 1], model_shapes(config)[0 if precision else 1]
    machine = describe_machine(config.train)
    kv_bytes = kv_buffer_bytes(shape, rows, read + tokens, machine.compute_bytes)
    planned = cost.pass_seconds(shape, precision or "bf16", rows * tokens, kv_bytes, machine)
    with inference(model):
        state = state_of(model, rows, read, tokens)
        ids = torch.ones((rows, tokens), dtype=torch.int64, device=context.device)
        live, counts = torch.ones_like(ids, dtype=torch.bool), np.full(rows, tokens)
        nothing = torch.zeros(rows, dtype=torch.int64, device=context.device)

        def once() -> None:
            state.begin_block(tokens)
            model.logits(state.append(ids, live, counts))
            state.take_back(tokens, nothing, np.zeros(rows, dtype=np.int64), counts)

        times = host_and_device_ms(once, context.device, 2 if context.tiny else 5)
    return {**times, "planned_ms": round(planned * 1e3, 3)}


def recorded(context: Context, pair: list[LanguageModel], index: int, rows: int) -> dict[str, Any]:
    """The same pass over one token, replayed as a CUDA graph, head and mask as usual."""
    context.needs_gpu()
    model, read = pair[index], 256
    with inference(model):
        graphs = StepGraphs(model)
        state = state_of(model, rows, read, 8, graphs)
        ids = torch.ones((rows, 1), dtype=torch.int64, device=context.device)
        live, counts = torch.ones_like(ids, dtype=torch.bool), np.ones(rows, dtype=np.int64)
        nothing = torch.zeros(rows, dtype=torch.int64, device=context.device)

        def once() -> None:
            state.begin_block(1)
            model.logits(state.append(ids, live, counts))
            state.take_back(1, nothing, np.zeros(rows, dtype=np.int64), counts)

        for _ in range(EAGER_PASSES):
            once()
        before = torch.cuda.memory_reserved(context.device)
        times = host_and_device_ms(once, context.device)
        if graphs.failure is not None or not graphs.num_replays:
            raise AssertionError(f"passes are not recorded: {graphs.failure}")
    scratch = torch.cuda.memory_reserved(context.device) - before
    return {**times, "replays": graphs.num_replays, "scratch_mib": round(scratch / 2**20, 1)}
