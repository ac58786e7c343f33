"""How long one optimizer step takes, for putting candidates in order; no promise of seconds.

A pass costs the larger of its memory traffic and its arithmetic, and a fixed time per layer for issuing its kernels.
The card's bandwidth and arithmetic are its maker's figures (`machine.py`); the other constants were measured on a CPU,
by benchmarks/pass_times.py, because no GPU was at hand. A test compares them with its result,
benchmarks/results/pass_times-cpu.json.
"""

from __future__ import annotations

from qswitch.config import RunConfig
from qswitch.plan import memory
from qswitch.plan.machine import Machine
from qswitch.plan.shapes import ModelShape

PASS_OVERHEAD_S_PER_LAYER = 7.3e-4
"""Python and dispatcher time of one layer in one pass, whatever its width: why few large passes beat many small ones.
`overhead_s_per_layer` of the result; on a GPU the same Python runs, and a kernel launch of a few us comes on top."""
BACKWARD_OVER_FORWARD = {"lora": 1.45, "none": 2.15}
"""`backward_over_forward` of the result: time of a backward pass in forward passes, with adapters and with every weight
trained."""
PCIE_BYTES_PER_S = 12e9
"""Upload of a swapped teacher from pinned memory: three quarters of PCIe 4.0 x8 (16 GB/s by its specification), the
link of RTX 4060-class cards; x16 cards are faster. Not measured by this project."""


TYPICAL_DRAFTS = 3
KEPT_DRAFT_SHARE = 0.6
"""A round of the engine with block_tokens=auto, for the number of its passes: assumptions, which move every candidate
alike; the engine itself measures both (rollout/block_length.py)."""


def _typical_drafts(config: RunConfig) -> int:
    if config.rollout.policy in ("student", "teacher"):
        return 0
    drafts = config.rollout.block_tokens
    return drafts if drafts != "auto" else TYPICAL_DRAFTS


def pass_seconds(shape: ModelShape, precision: memory.Precision, tokens: int, kv_bytes: int, machine: Machine) -> float:
    """One pass without gradients over `tokens` tokens that reads `kv_bytes` of keys and values.

    bitsandbytes multiplies one token with the packed 4-bit weight; for several it first unpacks the whole weight
    (`matmul_4bit`), which writes and reads it once in the compute dtype.
    """
    b = machine.compute_bytes
    traffic = memory.weight_bytes(shape, precision, b) + kv_bytes
    if precision in ("nf4", "int8") and tokens > 1:
        traffic += 2 * shape.linear_weight_parameters * b
    arithmetic = 2 * shape.linear_weight_parameters * tokens
    slower = max(traffic / machine.gpu.bandwidth_bytes_per_s, arithmetic / machine.gpu.flops)
    return PASS_OVERHEAD_S_PER_LAYER * shape.num_layers + slower


def step_seconds(config: RunConfig, teacher: ModelShape, student: ModelShape, machine: Machine) -> float:
    """One optimizer step: its share of a round of rollouts with half-filled caches, and the learning."""
    b, rollout, train = machine.compute_bytes, config.rollout, config.train
    student_precision: memory.Precision = "bf16" if config.student.precision == "auto" else config.student.precision
    tokens = config.data.max_prompt_tokens + rollout.max_new_tokens
    micro, steps = train.per_device_train_batch_size, train.gradient_accumulation_steps
    sequences = micro * steps * rollout.round_steps
    rows = min(rollout.batch_size, sequences)
    drafts = _typical_drafts(config)
    written = (1 - KEPT_DRAFT_SHARE ** (drafts + 1)) / (1 - KEPT_DRAFT_SHARE)
    decode_s = 0.0
    rounds: tuple[tuple[ModelShape, memory.Precision, int, int], ...] = (
        (teacher, config.teacher.precision, 1, drafts + 1),
        (student, student_precision, drafts + 1, 1),
    )
    for shape, precision, times, length in rounds:
        kv_bytes = memory.kv_cache_bytes(shape, rows, tokens // 2 + 1, b)
        decode_s += times * pass_seconds(shape, precision, rows * length, kv_bytes, machine)
    decode_s *= -(-sequences // rows) * rollout.max_new_tokens / written
    if config.teacher.residency == "swap":
        away = memory.weight_bytes(teacher, config.teacher.precision, b) - memory.head_bytes(
            teacher, config.teacher.precision, b
        )
        decode_s += away / PCIE_BYTES_PER_S

    forward_s = pass_seconds(student, student_precision, micro * tokens, 0, machine)
    passes = 1 + BACKWARD_OVER_FORWARD[config.student.adapter] + int(config.student.gradient_checkpointing)
    learn_s = steps * passes * forward_s
    chunks = steps * -(-micro * rollout.max_new_tokens // config.loss.chunk_tokens)
    learn_s += chunks * PASS_OVERHEAD_S_PER_LAYER  # a chunk issues about as many kernels as a layer
    if config.cache.device_budget_gib == 0:
        learn_s += steps * PASS_OVERHEAD_S_PER_LAYER  # rows come from host memory; overlapped but for the first
    return decode_s / rollout.round_steps + learn_s
