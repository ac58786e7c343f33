"""How long a step and a run take, for putting candidates in order and for a first idea of hours; no promise.

A pass costs the larger of its memory traffic and its arithmetic, and a fixed time per layer for issuing its kernels.
The card's bandwidth and arithmetic are its maker's figures (`machine.py`); the other constants were measured on a CPU,
by benchmarks/pass_times.py, because no GPU was at hand. A test compares them with its result,
benchmarks/results/pass_times-cpu.json.
"""

from __future__ import annotations

import math

from qswitch.config import RunConfig
from qswitch.plan import memory
from qswitch.plan.breakdown import share_of
from qswitch.plan.machine import Dtype, Gpu, Machine
from qswitch.plan.shapes import LinearShape, ModelShape

PASS_OVERHEAD_S_PER_LAYER = 7.3e-4
"""Python and dispatcher time of one layer in one pass, whatever its width: why few large passes beat many small ones.
`overhead_s_per_layer` of the result; on a GPU the same Python runs, and a kernel launch of a few us comes on top."""
BACKWARD_OVER_FORWARD = {"lora": 1.45, "none": 2.15}
"""`backward_over_forward` of the result: time of a backward pass in forward passes, with adapters and with every weight
trained."""
PCIE_BYTES_PER_S = 12e9
"""Upload of a swapped teacher from pinned memory: three quarters of PCIe 4.0 x8 (16 GB/s by its specification), the
link of RTX 4060-class cards; x16 cards are faster. Not measured by this project."""


FUSED_ALWAYS_TOKENS = 4
"""Tokens that bitsandbytes multiplies with a packed 4-bit weight whatever its shape."""

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

    bitsandbytes multiplies up to some number of tokens with the packed 4-bit weight (`fused_tokens`); for more it first
    unpacks the whole weight, which writes and reads it once in the compute dtype. int8 weights are used as stored.
    """
    b = machine.compute_bytes
    traffic = memory.weight_bytes(shape, precision, b) + kv_bytes
    if precision == "nf4":
        unpacked = sum(
            count * module.weight_parameters
            for module, count in shape.counted_linears.items()
            if tokens > fused_tokens(module, machine.gpu, machine.compute_dtype)
        )
        traffic += 2 * unpacked * b
    arithmetic = 2 * shape.linear_weight_parameters * tokens
    slower = max(traffic / machine.gpu.bandwidth_bytes_per_s, arithmetic / machine.gpu.flops)
    return PASS_OVERHEAD_S_PER_LAYER * shape.num_layers + slower


def fused_tokens(module: LinearShape, gpu: Gpu, compute_dtype: Dtype) -> int:
    """The most tokens of a product that bitsandbytes makes with the packed weight of a layer; exact up to 512 tokens.

    The thresholds of `gemm_4bit` in bitsandbytes 0.50 (backends/cuda/ops.py), for the architectures of the table of
    cards in their 16-bit dtype; in fp32, and on Turing in bf16, it has a fused kernel for fewer than 8 tokens.
    tests/plan/test_cost.py compares them.
    """
    narrow = compute_dtype == "fp16" if gpu.capability == (7, 5) else compute_dtype in ("bf16", "fp16")
    if not narrow or module.in_features % memory.NF4_BLOCK:
        return 7 if module.in_features % memory.NF4_BLOCK == 0 else 0
    inputs, outputs, multiprocessors = module.in_features, module.out_features, gpu.num_multiprocessors
    waves = -(-outputs // 64) / multiprocessors
    blocks = -(-outputs // 64)
    if gpu.capability == (7, 5):
        return _fused_on_turing(inputs, outputs, waves)
    if inputs * outputs < 4 * 2**20:
        if inputs * 2 < outputs:
            return 192 if waves < 1 and blocks * inputs > multiprocessors * 320 else 320
        if waves <= 1 / 4:
            return 32 if inputs < outputs else 23
        return 16 if waves <= 1 / 2 else FUSED_ALWAYS_TOKENS
    if gpu.capability == (8, 6):
        return 128 if waves >= 1 else 64 if blocks >= multiprocessors // 2 else 16
    if waves >= 3:
        return 256
    if waves >= 2:
        return 128
    if gpu.capability == (12, 0):
        if waves >= 4 / 5:
            return 96 if inputs >= outputs else 64
        if blocks >= multiprocessors // 2:
            return 64 if inputs * 2 >= outputs and blocks >= 128 else 8
        return 16 if inputs > outputs * 2 and blocks > 64 else 8
    if waves >= 4 / 5:
        if inputs > outputs * 2 or blocks >= 200:
            return 128
        return (128 if multiprocessors >= 60 else 32) if inputs >= outputs else 64
    if blocks >= multiprocessors // 2:
        return 64 if inputs > outputs * 2 else 8 if blocks >= 64 else 32
    if inputs > outputs and blocks <= 48:
        return 12 if inputs >= outputs * 3 else 10
    return 16 if inputs > outputs * 2 or blocks < 48 else 8


def _fused_on_turing(inputs: int, outputs: int, waves: float) -> int:
    """`fused_tokens` of compute capability 7.5; small layers of half a wave to a whole one unpack 5 to 8 tokens, which
    is not told apart here."""
    if inputs * outputs >= 4 * 2**20:
        if waves >= 3:
            return 128 if inputs < outputs else 64
        return 64 if waves >= 1 / 2 else 32
    if inputs * 2 < outputs:
        if waves >= 3 or inputs < 704:
            return 320
        return 64 if inputs >= 1024 else 96
    return 64 if waves < 1 else FUSED_ALWAYS_TOKENS


def run_seconds(
    config: RunConfig, teacher: ModelShape, student: ModelShape, machine: Machine, processes: int = 1
) -> float:
    """A whole run: its steps, and its validations with the responses that the teacher writes for them once.

    `processes` share the work, each on a card like `machine.gpu`.
    """
    whole, config = config, share_of(config, processes)
    train, rollout = config.train, config.rollout
    student_precision = _student_precision(config)
    b, rows = machine.compute_bytes, rollout.batch_size
    tokens = config.data.max_prompt_tokens + rollout.max_new_tokens
    batches = -(-config.data.num_validation // rows)
    trained = memory.trainable_parameters(student, config.student.adapter, config.student.lora)
    together = reduce_seconds(trained * machine.accumulate_bytes, processes)
    one_step = step_seconds(config, teacher, student, machine) + together
    num_steps, _ = expected_steps(whole, one_step)
    validations = 1 + -(-num_steps // train.eval_steps)
    seconds = num_steps * one_step
    seconds += validations * batches * pass_seconds(student, student_precision, rows * tokens, 0, machine)
    if config.needs_teacher:
        kv_bytes = memory.kv_buffer_bytes(teacher, rows, tokens // 2 + 1, b)
        one = pass_seconds(teacher, config.teacher.precision, rows, kv_bytes, machine)
        seconds += batches * rollout.max_new_tokens * one
    return seconds


def expected_steps(config: RunConfig, seconds_of_a_step: float | None) -> tuple[int, str]:
    """Steps until the first limit of the run, where every response has its full length, and that setting of train.

    Without the seconds of a step max_seconds ends nothing.
    """
    train = config.train
    steps = {"max_steps": train.max_steps}
    if train.max_tokens is not None:
        steps["max_tokens"] = math.ceil(train.max_tokens / (config.prompts_per_step * config.rollout.max_new_tokens))
    if train.max_seconds is not None and seconds_of_a_step is not None:
        steps["max_seconds"] = math.ceil(train.max_seconds / seconds_of_a_step)
    first = min(steps, key=steps.__getitem__)
    return steps[first], first


def reduce_seconds(gradient_bytes: int, processes: int, bytes_per_s: float = PCIE_BYTES_PER_S) -> float:
    """Adding up the gradients of several processes in a ring, in which each link carries nearly twice their bytes."""
    return 2 * (processes - 1) / processes * gradient_bytes / bytes_per_s


def _student_precision(config: RunConfig) -> memory.Precision:
    return "bf16" if config.student.precision == "auto" else config.student.precision


def step_seconds(config: RunConfig, teacher: ModelShape, student: ModelShape, machine: Machine) -> float:
    """One optimizer step: its share of the rollouts, with half-filled caches, and the learning."""
    b, rollout, train = machine.compute_bytes, config.rollout, config.train
    student_precision = _student_precision(config)
    tokens = config.data.max_prompt_tokens + rollout.max_new_tokens
    micro, steps = train.per_device_train_batch_size, train.gradient_accumulation_steps
    sequences = micro * steps * rollout.steps_at_once
    rows = min(rollout.batch_size, sequences)
    drafts = _typical_drafts(config)
    written = (1 - KEPT_DRAFT_SHARE ** (drafts + 1)) / (1 - KEPT_DRAFT_SHARE)
    decode_s = 0.0
    decoding: tuple[tuple[ModelShape, memory.Precision, int, int], ...] = (
        (teacher, config.teacher.precision, 1, drafts + 1),
        (student, student_precision, drafts + 1, 1),
    )
    for shape, precision, times, length in decoding[: 1 if rollout.policy == "teacher" else None]:
        kv_bytes = memory.kv_buffer_bytes(shape, rows, tokens // 2 + 1, b)
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
    fresh_share = (1 - config.data.ground_truth_mix) / rollout.reuse if config.needs_teacher else 0.0
    return fresh_share * decode_s / rollout.steps_at_once + learn_s
