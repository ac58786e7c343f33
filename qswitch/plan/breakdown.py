"""The parts of one run in bytes: which of them are alive in which phase, on the device, in host memory and on disk.

Pure; knows no budget and makes no choice (`scheduler.py`), and how a part is computed stands in `memory.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from qswitch.config import RunConfig
from qswitch.errors import ConfigError
from qswitch.launch import GRADIENT_BUCKET_BYTES
from qswitch.plan import memory
from qswitch.plan.cards import Card, best_split, further_cards
from qswitch.plan.machine import Machine
from qswitch.plan.shapes import ModelShape
from qswitch.units import GIB

PHASES = ("load", "rollout", "train", "validate")
"""Of every run. A student that is cut has `cut` before them, one that reads its teacher's text `write`."""


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Bytes of a run's parts, and the peak of each phase."""

    parts: dict[str, int]
    """Part -> bytes on the device that computes."""
    phases: dict[str, int]
    """cut and write where there are such, load, rollout, train, validate -> peak bytes on the device."""
    host: dict[str, int]
    """Part -> bytes in host memory beside a GPU; empty on a CPU, where the device is the host."""
    disk: dict[str, int]
    """Part -> bytes in the run directory and the model cache."""
    teacher_layers: tuple[int, ...]
    """Layers of the teacher on each of the process's GPUs."""
    further: tuple[Card, ...] = ()
    """The GPUs after the first, of a teacher that lies on several."""

    @property
    def fullest_phases(self) -> dict[str, int]:
        """Phase -> peak bytes of the device that holds most in it."""
        return {name: max(size, *(card.phases.get(name, 0) for card in self.further), 0)
                for name, size in self.phases.items()}  # fmt: skip

    @property
    def total_bytes(self) -> int:
        """The largest phase of the fullest device."""
        return max(self.fullest_phases.values())


def break_down(
    config: RunConfig, teacher: ModelShape, student: ModelShape, machine: Machine, processes: int = 1
) -> Breakdown:
    """The bytes of a configuration exactly as it is, in each of `processes` processes that share its sequences."""
    config = share_of(config, processes)
    if config.awaits_text:
        return _teacher_before(config, teacher, student, machine, processes)
    measured = partial(_break_down, config, teacher, student, machine, processes)
    num_gpus = config.teacher.num_gpus if config.needs_teacher and machine.device == "cuda" else 1
    if num_gpus == 1:
        return measured((teacher.num_layers,))

    def peaks(found: Breakdown) -> tuple[int, int]:
        return max(found.phases.values()), max(card.total_bytes for card in found.further)

    return best_split(teacher.num_layers, num_gpus, measured, peaks)


def _break_down(
    config: RunConfig,
    teacher: ModelShape,
    student: ModelShape,
    machine: Machine,
    processes: int,
    layers: tuple[int, ...],
) -> Breakdown:
    """The bytes of one process with so many of the teacher's layers on each of its GPUs."""
    here = teacher if len(layers) == 1 else teacher.with_layers(layers[0])
    on_gpu, b, acc = machine.device == "cuda", machine.compute_bytes, machine.accumulate_bytes
    section, train, rollout, cache = config.student, config.train, config.rollout, config.cache
    full = section.adapter == "none"
    precision: memory.Precision = "bf16" if section.precision == "auto" else section.precision
    vocab = student.vocab_size if config.passes_text else min(teacher.vocab_size, student.vocab_size)
    prompt, tokens = config.data.max_prompt_tokens, config.data.max_prompt_tokens + rollout.max_new_tokens
    micro, rows = train.per_device_train_batch_size, rollout.batch_size
    sequences = micro * train.gradient_accumulation_steps * rollout.steps_at_once

    # ------------------------------------------------------------------------------------------ what stays
    needed = config.needs_teacher  # SFT: no second model, no rollout
    teacher_bytes = memory.weight_bytes(here, config.teacher.precision, b, any_width=on_gpu) if needed else 0
    teacher_adapter_bytes = memory.attached_adapter_bytes(here, config.teacher, b) if needed else 0
    # The head scores cached hidden states and the held-out responses, so it never leaves.
    head_bytes = memory.head_bytes(teacher, config.teacher.precision, b) if needed else 0
    stored = config.learns_from_teacher and not needed  # its outputs are read from the store, chunk by chunk
    away_bytes = teacher_bytes + teacher_adapter_bytes - head_bytes if config.teacher.residency == "swap" else 0
    student_bytes = student.num_parameters * acc if full else memory.weight_bytes(student, precision, b, on_gpu)
    num_trainable = memory.trainable_parameters(student, section.adapter, section.lora)
    optimizer_bytes = memory.optimizer_bytes(num_trainable, train.optimizer, acc)
    # Rows stay until the last step that reads them; on a CPU both of the first tiers are the device.
    row_bytes = memory.cache_row_bytes(cache.format, teacher.hidden_size, vocab, cache.topk, b)
    held = _held_sequences(config, micro * train.gradient_accumulation_steps)
    caches = config.loss.objective == "divergence" and not stored
    rows_bytes = row_bytes * held * rollout.max_new_tokens if caches else 0
    on_device = min(rows_bytes, int(cache.device_budget_gib * GIB))
    # A pinned tensor takes a block of up to twice its size (memory.pinned_block_bytes).
    rounding, host_budget = 2 if on_gpu else 1, int(cache.host_budget_gib * GIB)
    on_host = min(rounding * (rows_bytes - on_device), host_budget)
    on_disk = max(rows_bytes - on_device - host_budget // rounding, 0)
    held_out_bytes = config.data.num_validation * rollout.max_new_tokens * teacher.hidden_size * b if needed else 0
    host = {
        "process": memory.PROCESS_BYTES,
        "teacher_copy": memory.pinned_bytes(away_bytes),
        "logit_cache": on_host,
        "held_out_teacher_outputs": held_out_bytes,
    }
    resident = {
        "cuda_context": memory.CUDA_CONTEXT_BYTES if on_gpu else 0,
        "teacher_weights": teacher_bytes,
        "teacher_adapter": teacher_adapter_bytes,
        "teacher_head": memory.head_bytes(teacher, "bf16", b) if stored else 0,
        "student_weights": student_bytes,
        "adapters": 0 if full else num_trainable * acc,
        "optimizer_state": optimizer_bytes,
        "logit_cache": on_device,
    }
    if not on_gpu:
        resident["logit_cache"] += host.pop("logit_cache")
        resident |= host
        host = {}

    # ------------------------------------------------------------------------------------------ each phase's own
    # Autocast keeps a copy of fp32 weights in the compute dtype for as long as a pass lasts.
    cast = student.num_parameters * b if full and b < acc else 0
    unpack_teacher = memory.dequantisation_bytes(teacher, config.teacher.precision, b)
    unpack_student = 0 if full else memory.dequantisation_bytes(student, precision, b)
    unpack_student += 0 if full else memory.dora_bytes(student, section.lora, b)
    student_load = memory.load_buffer_bytes(student, "fp32" if full else precision, b)
    load = {
        "load_buffer": max(
            memory.load_buffer_bytes(teacher, config.teacher.precision, b),
            student_load + student.cut_parameters * b,
        )
    }
    round_steps = _round_steps(config, vocab)
    slots = memory.cache_slots(prompt, rollout.max_new_tokens, round_steps - 1)
    decode = {
        "teacher_kv_cache": memory.kv_cache_bytes(here, rows, slots, b, drafts=round_steps > 1),
        "student_kv_cache": memory.kv_cache_bytes(student, rows, slots, b, drafts=round_steps > 1),
        "rollout_logits": memory.rollout_vocabulary_bytes(rows, round_steps, vocab, acc),
        "kept_hidden": memory.kept_hidden_bytes(teacher.hidden_size, sequences, rows, rollout.max_new_tokens, b),
        "prefill": max(
            memory.forward_bytes(teacher, rows, prompt, b), memory.forward_bytes(student, rows, prompt, b, not full)
        ),
        "dequantisation": max(unpack_teacher, unpack_student),
        "autocast_copies": cast,
    }
    # Small buffers are kept through training, with the passes that were recorded over them, where weights stay. The
    # states of recurrent layers are not recorded.
    recurrent = {name: bool(shape.state_bytes_per_row or shape.state_values_per_row)
                 for name, shape in (("teacher", teacher), ("student", student))}  # fmt: skip
    graphs = {"teacher": rollout.teacher_graphs == "auto" and len(layers) == 1 and not recurrent["teacher"],
              "student": rollout.student_graphs == "auto" and not recurrent["student"]}  # fmt: skip
    in_place = {"teacher": config.teacher.residency == "resident", "student": not full}
    buffers = {"teacher": memory.kv_buffer_bytes(teacher, rows, slots, b),
               "student": memory.kv_buffer_bytes(student, rows, slots, b)}  # fmt: skip
    recorded = {
        "teacher": memory.recorded_pass_bytes(teacher, rows, round_steps, b, unpack_teacher),
        "student": memory.recorded_pass_bytes(student, rows, round_steps, b, unpack_student, not full),
    }
    used = [name for name in recorded if graphs[name] and on_gpu and needed and config.writes_rollouts]
    decode["recorded_passes"] = sum(recorded[name] for name in used)
    kept = sum(
        buffers[name] + recorded[name] for name in used if in_place[name] and buffers[name] <= memory.KEPT_BUFFER_BYTES
    )
    if not needed:
        load["load_buffer"] = student_load + student.cut_parameters * b
        decode = dict.fromkeys(decode, 0)
    # The language-model loss runs over blocks of its own.
    corpus = config.data.lm_corpus is not None
    length = max(tokens, config.loss.lm_passage_tokens if corpus else 0)
    positions = micro * (length if corpus else rollout.max_new_tokens)
    activations = memory.activation_bytes(
        student, micro, length, b, section.adapter, section.lora, section.gradient_checkpointing
    )
    chunk = memory.loss_chunk_bytes(
        positions, config.loss.chunk_tokens, vocab, acc, differs_by_writer=config.loss.differs_by_writer
    )
    learn = {
        "gradients": num_trainable * acc,
        "activations": activations,
        "loss_chunk": chunk,
        "head_gradient": memory.head_gradient_bytes(student, section.adapter, section.lora, b, acc),
        "kept_kv_buffers": kept,
    }
    if processes > 1:
        learn["added_gradients"] = min(GRADIENT_BUCKET_BYTES, num_trainable * acc)
    backward = activations + chunk + learn["head_gradient"] + unpack_student + cast
    validate = (
        memory.forward_bytes(student, rows, tokens, b, not full)
        + memory.loss_chunk_bytes(rows * rollout.max_new_tokens, config.loss.chunk_tokens, vocab, acc)
        + rows * rollout.max_new_tokens * (teacher.hidden_size + student.hidden_size) * b
        + unpack_student
        + cast
    )
    # Responses that the teacher did not see being written are scored in one pass over whole sequences.
    scores = config.reads_responses or rollout.policy == "student"
    scores = scores and caches
    score = memory.forward_bytes(teacher, micro, tokens, b) + unpack_teacher if scores else 0
    moving = {
        "load": load["load_buffer"],
        "rollout": max(sum(decode.values()), score),
        "train": learn["gradients"] + max(backward, learn.get("added_gradients", 0)) + kept,
        "validate": validate + kept,
    }

    # ------------------------------------------------------------------------------------------ together
    stays = sum(resident.values())
    base = {"load": stays - resident["logit_cache"] - optimizer_bytes, "rollout": stays, "train": stays - away_bytes,
            "validate": stays - away_bytes}  # fmt: skip
    allowance = {name: int(size * memory.FRAGMENTATION_SHARE) for name, size in moving.items()}
    phases = {name: base[name] + moving[name] + allowance[name] for name in PHASES}
    fragmentation = _allowance_at_peak(phases, allowance)
    parts = {**resident, **load, **decode, **learn, "validation": validate, "fragmentation": fragmentation}
    if section.shrink_to_layers is not None:
        cut = memory.cut_bytes(student)
        if on_gpu:  # in host memory, before anything else is there
            host["cut"] = max(0, cut - sum(size for name, size in host.items() if name != "process"))
        else:
            parts["cut"] = cut
            allowance["cut"] = int(cut * memory.FRAGMENTATION_SHARE)
            phases = {"cut": memory.PROCESS_BYTES + cut + allowance["cut"], **phases}
            parts["fragmentation"] = _allowance_at_peak(phases, allowance)
    disk = {
        "logit_cache": on_disk,
        "checkpoints": _checkpoint_bytes(config, num_trainable * acc, optimizer_bytes),
        "student_base": student.num_parameters * 2 if section.shrink_to_layers is not None else 0,
    }
    further = further_cards(
        config, teacher, machine, layers, rows=rows, slots=slots, drafts=round_steps > 1,
        pass_tokens=max(rows * prompt, micro * tokens if scores else 0),
    )  # fmt: skip
    return Breakdown(parts, phases, host, disk, layers, further)


def _allowance_at_peak(phases: dict[str, int], allowance: dict[str, int]) -> int:
    return allowance[max(phases, key=phases.__getitem__)]


def _teacher_before(
    config: RunConfig, teacher: ModelShape, student: ModelShape, machine: Machine, processes: int
) -> Breakdown:
    """The bytes of a run whose teacher writes everything as text, and leaves before the student comes.

    Raises:
        ConfigError: the teacher is to lie on several GPUs.
    """
    if config.teacher.num_gpus > 1:
        raise ConfigError(
            f"teacher.num_gpus={config.teacher.num_gpus} is not for a teacher with another tokenizer than the student, "
            "which writes text and leaves before the student comes. Leave it out."
        )
    half = config.model_copy(update={"data": config.data.model_copy(update={"ground_truth_mix": 1.0})})
    learning = break_down(half, teacher, student, machine, processes=1)
    on_gpu, b = machine.device == "cuda", machine.compute_bytes
    weights = {
        "teacher_weights": memory.weight_bytes(teacher, config.teacher.precision, b, any_width=on_gpu),
        "teacher_adapter": memory.attached_adapter_bytes(teacher, config.teacher, b),
    }
    rows, prompt = config.rollout.batch_size, config.data.max_prompt_tokens
    names = {"kv_cache": "teacher_kv_cache", "logits": "rollout_logits", "forward": "prefill"}
    decode = teacher_writes(config, teacher, teacher.vocab_size, machine, rows, read_tokens=prompt)
    decode = {names.get(name, name): size for name, size in decode.items()}
    buffer = memory.load_buffer_bytes(teacher, config.teacher.precision, b)
    moving = max(buffer, sum(decode.values()))
    allowance = int(moving * memory.FRAGMENTATION_SHARE)
    fixed = memory.CUDA_CONTEXT_BYTES if on_gpu else memory.PROCESS_BYTES
    phases = {"write": fixed + sum(weights.values()) + moving + allowance, **learning.phases}
    parts = learning.parts | weights
    parts |= {name: max(size, parts[name]) for name, size in {**decode, "load_buffer": buffer}.items()}
    if phases["write"] == max(phases.values()):
        parts["fragmentation"] = allowance
    return Breakdown(parts, phases, learning.host, learning.disk, (teacher.num_layers,))


def teacher_writes(
    config: RunConfig, teacher: ModelShape, vocab_size: int, machine: Machine, rows: int, *, read_tokens: int
) -> dict[str, int]:
    """What a teacher that writes alone takes beside its weights; `read_tokens` of a row at most in one pass."""
    b, new = machine.compute_bytes, config.rollout.max_new_tokens
    slots = memory.cache_slots(config.data.max_prompt_tokens, new, 0)
    return {
        "kv_cache": memory.kv_cache_bytes(teacher, rows, slots, b, drafts=False),
        "logits": memory.rollout_vocabulary_bytes(rows, 1, vocab_size, machine.accumulate_bytes),
        "forward": memory.forward_bytes(teacher, rows, read_tokens, b),
        "dequantisation": memory.dequantisation_bytes(teacher, config.teacher.precision, b),
    }


def share_of(config: RunConfig, processes: int) -> RunConfig:
    """What one of several processes does: its share of a step's sequences, and of the held-out prompts."""
    if processes == 1:
        return config
    train, data = config.train, config.data
    sequences = -(-train.sequences_per_step // processes)
    micro = min(train.per_device_train_batch_size, sequences)
    own = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": -(-sequences // micro)}
    held_out = {"num_validation": -(-data.num_validation // processes)}
    return config.model_copy(update={"train": train.model_copy(update=own), "data": data.model_copy(update=held_out)})


def _round_steps(config: RunConfig, vocab_size: int) -> int:
    """Steps of the longest round: the drafts and the token after them; 1 where one model writes alone."""
    rollout = config.rollout
    if rollout.policy in ("student", "teacher"):
        return 1
    if rollout.block_tokens != "auto":
        drafts = rollout.block_tokens
    else:
        a_step = memory.ROUND_SCRATCH_BYTES_PER_LOGIT * rollout.batch_size * vocab_size
        drafts = max(0, min(memory.ROUND_SCRATCH_BYTES // a_step - 1, memory.MAX_AUTO_DRAFTS))
    return min(drafts + 1, rollout.max_new_tokens)


def _held_sequences(config: RunConfig, per_step: int) -> int:
    """Sequences whose teacher outputs are cached at once: those just written, and those that will train again."""
    rollout = config.rollout
    again = 0
    if config.data.adaptive_share:
        again = rollout.replay_capacity
    elif rollout.reuse > 1:
        again = min(rollout.replay_capacity, per_step * (rollout.reuse - 1))
    return per_step * rollout.steps_at_once + again


def _checkpoint_bytes(config: RunConfig, trained_bytes: int, optimizer_bytes: int) -> int:
    """Kept checkpoints, the best, the one being written, and the final weights."""
    kept = min(config.train.save_total_limit, -(-config.train.max_steps // config.train.save_steps)) + 2
    return kept * (trained_bytes + optimizer_bytes) + trained_bytes
