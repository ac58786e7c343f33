"""Do recorded passes pay on this machine, and are they right? Tried once for each model, before a run begins.

Letters: `R` rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from qswitch.errors import is_out_of_memory
from qswitch.models.language_model import LanguageModel
from qswitch.rollout.kv_cache import KVState, Prompts
from qswitch.rollout.step_graph import EAGER_PASSES, NO_ROOM, Record, StepGraphs

WORTHWHILE = 0.9
"""Share of a usual pass's time that a replayed one must stay below."""


@dataclass(frozen=True)
class GraphTrial:
    """RUN/student_graphs.json and RUN/teacher_graphs.json: whether recorded passes are right and faster here."""

    used: bool
    reason: str
    rows: int
    usual_seconds: float | None = None
    """A pass of each of the numbers of tokens that were tried, as usual; head, noise and draw apart."""
    replayed_seconds: float | None = None
    difference: float | None = None
    """Largest difference of the states, relative to their size."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def try_graphs(
    model: LanguageModel,
    num_rows: int,
    *,
    tokens: Sequence[int] = (1,),
    record: Record | None = None,
    repeats: int = 8,
) -> GraphTrial:
    """Compare and time recorded passes over so many `tokens` a row against usual ones; leaves nothing behind."""
    if record is None and model.device.type != "cuda":
        return GraphTrial(False, f"no CUDA graphs on {model.device.type}", num_rows)
    graphs = StepGraphs(model, record)
    passes = EAGER_PASSES + 1 + repeats
    num_slots = 8 + passes * sum(tokens)
    usual, replayed = (KVState(model, num_rows, num_slots, graphs=g) for g in (None, graphs))
    if usual.is_recurrent:
        return GraphTrial(False, "the states of recurrent layers are not recorded", num_rows)
    training = model.training
    model.eval()
    prompt = torch.arange(num_rows * 8, device=model.device).view(num_rows, 8) % model.vocab_size
    ones = torch.ones((num_rows, max(8, *tokens)), dtype=torch.bool, device=model.device)
    worst, seconds = 0.0, {"usual": 0.0, "replayed": 0.0}
    try:
        for state in (usual, replayed):
            state.repack(np.arange(0), Prompts(prompt, ones[:, :8], np.full(num_rows, 8)))
        for n in tokens:
            best = dict.fromkeys(seconds, float("inf"))
            for turn in range(passes):
                block = prompt[:, turn % 8, None].expand(-1, n).contiguous()
                states = {}
                for name, state in (("usual", usual), ("replayed", replayed)):
                    started = time.perf_counter()
                    states[name] = state.append(block, ones[:, :n], np.full(num_rows, n))
                    if model.device.type == "cuda":
                        torch.cuda.synchronize(model.device)
                    if turn > EAGER_PASSES:  # that one was recorded
                        best[name] = min(best[name], time.perf_counter() - started)
                plain = states["usual"].double()
                size = plain.norm(dim=-1).clamp_min(1e-12)
                worst = max(worst, ((states["replayed"].double() - plain).norm(dim=-1) / size).max().item())
            seconds = {name: seconds[name] + best[name] for name in seconds}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return GraphTrial(False, NO_ROOM, num_rows)
    finally:
        model.train(training)
    if graphs.failure is not None:
        return GraphTrial(False, graphs.failure, num_rows)
    tolerance = 5e-2 if model.compute_dtype in (torch.bfloat16, torch.float16) else 1e-4
    figures = {"usual_seconds": seconds["usual"], "replayed_seconds": seconds["replayed"], "difference": worst}
    if not worst <= tolerance:
        return GraphTrial(False, f"recorded passes differ by {worst:.3g} of the states' size", num_rows, **figures)
    if seconds["replayed"] > WORTHWHILE * seconds["usual"]:
        return GraphTrial(False, "recorded passes are not faster here", num_rows, **figures)
    return GraphTrial(True, "recorded passes are faster and the same", num_rows, **figures)
