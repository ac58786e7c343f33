"""Times of passes by the plan's cost model (`qswitch/plan/cost.py`), for `benchmarks.rollout simulate`: by arithmetic
from a card's published figures, **not measured**.

A pass takes the larger of its memory traffic and its arithmetic, with the thresholds at which bitsandbytes unpacks a
4-bit weight, and the time in which Python issues its kernels, or none where passes are recorded as CUDA graphs. Caches
are half full.
"""

from __future__ import annotations

from qswitch.plan import cost
from qswitch.plan.machine import GPUS, Machine
from qswitch.plan.memory import Precision, kv_buffer_bytes
from qswitch.plan.scheduler import model_shapes
from qswitch.plan.shapes import ModelShape
from qswitch.presets import load_run_config
from qswitch.rollout.block_length import PassTimes

ROWS = (1, 4, 8, 16, 32)
TOKENS = (1, 2, 5, 9, 17)
SLOTS = 192
"""Half of prompts of 128 tokens and responses of 256."""


def planned_pass_times(preset: str, gpu: str, *, recorded: bool) -> PassTimes:
    """The table of a preset's pair on a card."""
    config = load_run_config(preset)
    shapes = model_shapes(config)
    machine = Machine("cuda", "bf16", GPUS[gpu])

    def seconds(shape: ModelShape, precision: Precision, rows: int, tokens: int) -> float:
        kv_bytes = kv_buffer_bytes(shape, rows, SLOTS, machine.compute_bytes)
        issuing = cost.PASS_OVERHEAD_S_PER_LAYER * shape.num_layers if recorded else 0.0
        return cost.pass_seconds(shape, precision, rows * tokens, kv_bytes, machine) - issuing

    return PassTimes(
        rows=ROWS,
        tokens=TOKENS,
        teacher=tuple(tuple(seconds(shapes[0], config.teacher.precision, r, n) for n in TOKENS) for r in ROWS),
        student=tuple(seconds(shapes[1], "bf16", r, 1) for r in ROWS),
        device=f"{gpu}, by the plan's arithmetic, passes {'recorded' if recorded else 'issued by Python'}",
    )
