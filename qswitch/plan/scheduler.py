"""Which sizes fit a memory budget, and which of those run fastest.

Arithmetic over shapes: neither weights nor a GPU are needed. Knows nothing of how the parts are computed (`memory.py`).
The configuration's values are upper bounds; what is lowered keeps the effective batch, so a plan changes time and
memory and never what is learnt.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qswitch.config import RunConfig, StudentSection, TrainSection
from qswitch.errors import ConfigError, PlanError
from qswitch.plan import memory
from qswitch.plan.shapes import ModelShape, shape_for

GIB = memory.GIB

# Only the order of the candidates depends on these. Published figures of one card of the class that qswitch is for (RTX
# 3060 12 GB: 360 GB/s memory bandwidth, 25.6 TFLOP/s bf16 with fp32 accumulation); not measured by this project.
REFERENCE_BANDWIDTH_BYTES_PER_S = 360e9
REFERENCE_FLOPS = 25.6e12
PASS_OVERHEAD_S_PER_LAYER = 1e-4
"""Launching one layer's kernels from Python, about ten of 10 us; what makes many small passes slower than few."""
CHECKPOINTING_COST = 4 / 3
"""A second forward pass where forward : backward is 1 : 2."""

MIN_CHUNK_TOKENS = 32
"""Smaller loss chunks save little and starve the matrix product."""

Device = Literal["cuda", "cpu"]


@dataclass(frozen=True, slots=True)
class Machine:
    """What the bytes depend on beside the models."""

    device: Device
    compute_bytes: int
    """Width of the compute dtype."""
    accumulate_bytes: int
    """Width of log-probabilities, losses and trainable weights: 8 with fp64 arithmetic, else 4."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes of a run's parts, the peak of each phase, and the sizes they belong to."""

    parts: dict[str, int]
    """Part -> bytes on the device that computes."""
    phases: dict[str, int]
    """load, rollout, train, validate -> peak bytes."""
    choices: dict[str, Any]
    """Dotted setting -> chosen value."""
    total_bytes: int
    """The largest phase."""
    budget_bytes: int | None
    fits: bool
    notes: tuple[str, ...]
    """What is assumed, and what was lowered."""
    config: RunConfig
    """With the choices written in."""
    host_bytes: int = 0
    """Cached rows in host memory beside the device."""
    disk_bytes: int = 0
    """Cached rows in the run directory."""

    @property
    def total_gib(self) -> float:
        return self.total_bytes / GIB

    def to_dict(self) -> dict[str, Any]:
        """For `qswitch plan --json` and RUN/plan.json: sizes in GiB (2**30 bytes)."""
        return {
            "fits": self.fits,
            "budget_gib": None if self.budget_bytes is None else _gib(self.budget_bytes),
            "total_gib": _gib(self.total_bytes),
            "parts": {name: _gib(size) for name, size in self.parts.items()},
            "choices": dict(self.choices),
            "phases": {name: _gib(size) for name, size in self.phases.items()},
            "host_gib": _gib(self.host_bytes),
            "disk_gib": _gib(self.disk_bytes),
            "notes": list(self.notes),
        }

    def render(self) -> str:
        """A plain table: parts, phases, choices, verdict, notes."""
        lines = ["Memory plan, GiB (2**30 bytes)"]
        sections = (("parts", self.parts), ("peak per phase", self.phases))
        values: dict[str, str] = {name: str(value) for name, value in self.choices.items()}
        width = max(len(name) for group in (self.parts, self.phases, values) for name in group)
        for title, group in sections:
            lines += ["", title] + [f"  {name:<{width}}  {size / GIB:8.2f}" for name, size in group.items()]
        lines += ["", "choices"] + [f"  {name:<{width}}  {value:>8}" for name, value in values.items()]
        verdict = f"total {self.total_gib:.2f} GiB"
        if self.budget_bytes is not None:
            verdict += f", budget {self.budget_bytes / GIB:.2f}: {'fits' if self.fits else 'does not fit'}"
        lines += ["", verdict]
        if self.host_bytes or self.disk_bytes:
            lines.append(
                f"beside it: host memory {self.host_bytes / GIB:.2f} GiB, disk {self.disk_bytes / GIB:.2f} GiB"
            )
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)])


def _gib(size_bytes: int) -> float:
    return round(size_bytes / GIB, 4)


# ---------------------------------------------------------------------------------------------------------- the machine


def parse_size(text: str | int | float) -> int:
    """Bytes of "12GiB", "12GB", "512MiB" or "12". Every unit is binary: a "12 GB" card has 12 GiB; no unit means GiB.

    Raises:
        ConfigError: no such size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])i?b?)?\s*", str(text), re.IGNORECASE)
    size = int(float(match[1]) * 2 ** {"k": 10, "m": 20, "g": 30, "t": 40}[(match[2] or "g").lower()]) if match else 0
    if size < 1:
        raise ConfigError(f"{text!r} is not a memory size. Write it as 12GiB, 512MiB, or 12 (GiB).")
    return size


def detect_budget_bytes(device: Literal["auto", "cuda", "cpu"] = "auto") -> tuple[int, str]:
    """Free memory of the first GPU, else what the host can still give: (bytes, where the figure is from)."""
    if device != "cpu":
        gpu = _gpu_free_bytes()
        if gpu is not None:
            return gpu, "free memory of the first GPU (nvidia-smi)"
        if device == "cuda":
            raise ConfigError(
                "train.device=cuda, but no GPU answers to nvidia-smi. Give the budget, for example --vram 12GiB, or "
                "set train.device=cpu."
            )
    available, source = _host_available_bytes()
    limit = _control_group_free_bytes()
    if limit is not None and (available is None or limit < available):
        available, source = limit, "free memory of the container (cgroup)"
    if available is None:
        raise ConfigError("The free memory of this machine cannot be read. Give the budget, for example 12GiB.")
    return available, source


def _gpu_free_bytes() -> int | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        return int(answer.split()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None  # a driver that does not answer is a machine without a GPU


def _host_available_bytes() -> tuple[int | None, str]:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None, ""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return (int(match[1]) * 1024 if match else None), "available host memory (/proc/meminfo)"


def _control_group_free_bytes() -> int | None:
    root = Path("/sys/fs/cgroup")
    try:
        return max(1, int((root / "memory.max").read_text()) - int((root / "memory.current").read_text()))
    except (OSError, ValueError):
        return None  # no limit ("max"), or another hierarchy


def _has_native_bf16_cpu() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return re.search(r"\b(avx512_bf16|amx_bf16)\b", flags) is not None


def describe_machine(train: TrainSection, device: Literal["auto", "cuda", "cpu"] | None = None) -> Machine:
    """Device and arithmetic to plan for; `device` overrides train.device (planning for a GPU one does not have)."""
    wanted = device or train.device
    if wanted == "auto":
        wanted = "cuda" if _gpu_free_bytes() is not None else "cpu"
    dtype = train.compute_dtype
    if dtype == "auto":
        dtype = "bf16" if wanted == "cuda" or _has_native_bf16_cpu() else "fp32"
    compute_bytes = {"bf16": 2, "fp32": 4, "fp64": 8}[dtype]
    return Machine(device=wanted, compute_bytes=compute_bytes, accumulate_bytes=8 if dtype == "fp64" else 4)


# ------------------------------------------------------------------------------------------------------------- one plan


def measure(config: RunConfig, teacher: ModelShape, student: ModelShape, machine: Machine) -> Plan:
    """The bytes of a configuration exactly as it is; pure. No budget: the plan is said to fit."""
    parts, phases, host_bytes, disk_bytes = _sizes(config, teacher, student, machine)
    return Plan(
        parts=parts, phases=phases, choices=_choices(config), total_bytes=max(phases.values()), budget_bytes=None,
        fits=True, notes=(), config=config, host_bytes=host_bytes, disk_bytes=disk_bytes,
    )  # fmt: skip


def _sizes(
    config: RunConfig, teacher: ModelShape, student: ModelShape, machine: Machine
) -> tuple[dict[str, int], dict[str, int], int, int]:
    on_gpu, b, acc = machine.device == "cuda", machine.compute_bytes, machine.accumulate_bytes
    section, train, rollout, cache = config.student, config.train, config.rollout, config.cache
    full = section.adapter == "none"
    precision: memory.Precision = "bf16" if section.precision == "auto" else section.precision
    vocab = min(teacher.vocab_size, student.vocab_size)
    tokens = config.data.max_prompt_tokens + rollout.max_new_tokens
    micro, rows = train.per_device_train_batch_size, rollout.batch_size
    sequences = micro * train.gradient_accumulation_steps

    # Resident. Rows of the last optimizer step stay until the next one has been rolled out.
    student_weights = (
        student.num_parameters * acc if full else memory.weight_bytes(student, precision, b, any_width=on_gpu)
    )
    num_trainable = memory.trainable_parameters(student, section.adapter, section.lora)
    row_bytes = memory.cache_row_bytes(cache.format, teacher.hidden_size, vocab, cache.topk, b)
    wanted = row_bytes * sequences * rollout.max_new_tokens if config.loss.objective == "divergence" else 0
    on_device = min(wanted, int(cache.device_budget_gib * GIB))
    on_host = min(wanted - on_device, int(cache.host_budget_gib * GIB))
    on_disk = wanted - on_device - on_host
    if not on_gpu:  # the device is the host
        on_device, on_host = on_device + on_host, 0
    resident = {
        "cuda_context": memory.CUDA_CONTEXT_BYTES if on_gpu else 0,
        "teacher_weights": (
            memory.weight_bytes(teacher, config.teacher.precision, b, any_width=on_gpu) if config.needs_teacher else 0
        ),
        "teacher_adapter": memory.attached_adapter_bytes(teacher, config.teacher, b) if config.needs_teacher else 0,
        "student_weights": student_weights,
        "adapters": 0 if full else num_trainable * acc,
        "optimizer_state": memory.optimizer_bytes(num_trainable, train.optimizer, acc),
        "logit_cache": on_device,
    }

    # Each phase's own. Autocast keeps a copy of fp32 weights in the compute dtype for as long as a pass lasts.
    cast = student.num_parameters * b if full and b < acc else 0
    unpack_teacher = memory.dequantisation_bytes(teacher, config.teacher.precision, b)
    unpack_student = 0 if full else memory.dequantisation_bytes(student, precision, b)
    prompt = config.data.max_prompt_tokens
    student_load = memory.load_buffer_bytes(student, "fp32" if full else precision, b)
    load = {
        "load_buffer": max(
            memory.load_buffer_bytes(teacher, config.teacher.precision, b),
            student_load + _cut_layers_bytes(section, student, b),
        )
    }
    decode = {
        "teacher_kv_cache": memory.kv_cache_bytes(teacher, rows, tokens, b),
        "student_kv_cache": memory.kv_cache_bytes(student, rows, tokens, b),
        "rollout_logits": memory.rollout_vocabulary_bytes(rows, vocab, acc),
        "kept_hidden": memory.kept_hidden_bytes(teacher.hidden_size, sequences, rows, rollout.max_new_tokens, b),
        "prefill": max(memory.forward_bytes(m, rows, prompt, b) for m in (teacher, student)),
        "dequantisation": max(unpack_teacher, unpack_student),
        "autocast_copies": cast,
    }
    if not config.needs_teacher:  # SFT: no second model, no rollout
        load["load_buffer"] = student_load + _cut_layers_bytes(section, student, b)
        decode = dict.fromkeys(decode, 0)
    # The language-model loss runs over blocks of its own, one per row.
    length = max(tokens, config.loss.lm_block_tokens if config.data.lm_corpus is not None else 0)
    positions = micro * (length if config.data.lm_corpus is not None else rollout.max_new_tokens)
    activations = memory.activation_bytes(
        student, micro, length, b, section.adapter, section.lora, section.gradient_checkpointing
    )
    chunk = memory.loss_chunk_bytes(positions, config.loss.chunk_tokens, vocab, acc)
    learn = {
        "gradients": num_trainable * acc,
        "activations": activations,
        "loss_chunk": chunk,
        "optimizer_step": memory.optimizer_step_bytes(num_trainable, train.optimizer, acc),
    }
    backward = activations + chunk + unpack_student + cast
    validate = (
        memory.forward_bytes(student, rows, tokens, b)
        + memory.loss_chunk_bytes(rows * rollout.max_new_tokens, config.loss.chunk_tokens, vocab, acc)
        + rows * rollout.max_new_tokens * (teacher.hidden_size + student.hidden_size) * b
        + unpack_student
        + cast
    )
    # Responses that the teacher did not see being written are scored in one pass over whole sequences.
    scores = config.reads_responses or rollout.policy not in ("switch", "teacher", "random", "mixture")
    scores = scores and config.loss.objective == "divergence"
    score = memory.forward_bytes(teacher, rows, tokens, b) + unpack_teacher if scores else 0

    stays = dict.fromkeys(("rollout", "train", "validate"), sum(resident.values()))
    stays["load"] = stays["train"] - resident["logit_cache"] - resident["optimizer_state"]  # neither exists yet
    moving = {
        "load": load["load_buffer"],
        "rollout": max(sum(decode.values()), score),
        "train": learn["gradients"] + max(backward, learn["optimizer_step"]),
        "validate": validate,
    }
    allowance = {name: int(size * memory.FRAGMENTATION_SHARE) for name, size in moving.items()}
    phases = {name: stays[name] + size + allowance[name] for name, size in moving.items()}
    largest = max(phases, key=phases.__getitem__)
    parts = {**resident, **load, **decode, **learn, "validation": validate, "fragmentation": allowance[largest]}
    return parts, phases, on_host, on_disk


def _cut_layers_bytes(section: StudentSection, student: ModelShape, compute_bytes: int) -> int:
    """Layers that are read with the base and then dropped: while loading, the model is still whole."""
    if section.shrink_to_layers is None:
        return 0
    whole = shape_for(section.model_copy(update={"shrink_to_layers": None}))
    return (whole.num_parameters - student.num_parameters) * compute_bytes


def _choices(config: RunConfig) -> dict[str, Any]:
    return {
        "rollout.batch_size": config.rollout.batch_size,
        "train.per_device_train_batch_size": config.train.per_device_train_batch_size,
        "train.gradient_accumulation_steps": config.train.gradient_accumulation_steps,
        "student.gradient_checkpointing": config.student.gradient_checkpointing,
        "loss.chunk_tokens": config.loss.chunk_tokens,
        "cache.format": config.cache.format,
        "cache.device_budget_gib": config.cache.device_budget_gib,
    }


def _with(config: RunConfig, choices: dict[str, Any]) -> RunConfig:
    """The configuration with dotted settings replaced; every other value, and whether it was written, is kept."""
    by_section: dict[str, dict[str, Any]] = {}
    for dotted, value in choices.items():
        name, _, field = dotted.partition(".")
        if getattr(getattr(config, name), field) != value:
            by_section.setdefault(name, {})[field] = value
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in by_section.items()}
    )


# -------------------------------------------------------------------------------------------------------- the scheduler


def plan_run(
    config: RunConfig,
    *,
    budget_bytes: int | None = None,
    device: Literal["auto", "cuda", "cpu"] | None = None,
) -> Plan:
    """The fastest plan within `budget_bytes`; without a budget the configuration as it is.

    `device` plans for another machine than train.device would find here (`plan --vram` plans for a GPU). Where nothing
    fits, the smallest plan is returned with fits=False (`require_fit` turns it into the error).

    Raises:
        ConfigError: the shape of a model is not known.
    """
    teacher, student = _shapes(config)
    machine = describe_machine(config.train, device)
    asked = measure(config, teacher, student, machine)
    best, notes = asked, _notes(config, machine)
    if budget_bytes is not None and asked.total_bytes > budget_bytes:
        plans = [measure(c, teacher, student, machine) for c in _candidates(config)]
        fitting = [p for p in plans if p.total_bytes <= budget_bytes]
        if fitting:
            best = min(fitting, key=lambda p: (step_seconds(p.config, teacher, student, machine), p.total_bytes))
        else:
            best = min(plans, key=lambda p: p.total_bytes)
        changes = [f"{k} {asked.choices[k]} -> {v}" for k, v in best.choices.items() if v != asked.choices[k]]
        if fitting:
            notes.append(f"As written it needs {asked.total_gib:.2f} GiB; changed to fit: {', '.join(changes)}.")
    fits = budget_bytes is None or best.total_bytes <= budget_bytes
    return replace(best, budget_bytes=budget_bytes, fits=fits, notes=tuple(notes))


def _shapes(config: RunConfig) -> tuple[ModelShape, ModelShape]:
    """Teacher's and student's shape, with the problems of both in one error."""
    problems, shapes = [], []
    for section in (config.teacher, config.student):
        try:
            shapes.append(shape_for(section))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return shapes[0], shapes[1]


def _candidates(config: RunConfig) -> Iterator[RunConfig]:
    """Every combination at or below the configuration's sizes, with the same effective batch."""
    micro = config.train.per_device_train_batch_size
    effective = micro * config.train.gradient_accumulation_steps
    checkpointing = [True] if config.student.gradient_checkpointing else [False, True]
    chunks = sorted(
        {max(min(config.loss.chunk_tokens, MIN_CHUNK_TOKENS), config.loss.chunk_tokens // n) for n in (1, 2, 4)}
    )
    for rows in _row_counts(config.rollout.batch_size, effective):
        for size in [n for n in range(1, micro + 1) if effective % n == 0]:
            for recompute in checkpointing:
                for chunk in chunks:
                    for device_budget in {config.cache.device_budget_gib, 0.0}:
                        yield _with(config, {
                            "rollout.batch_size": rows,
                            "train.per_device_train_batch_size": size,
                            "train.gradient_accumulation_steps": effective // size,
                            "student.gradient_checkpointing": recompute,
                            "loss.chunk_tokens": chunk,
                            "cache.device_budget_gib": device_budget,
                        })  # fmt: skip


def _row_counts(most: int, sequences: int) -> list[int]:
    """The fewest rows for each number of rollout batches per step: more rows would only take memory."""
    return sorted({min(most, -(-sequences // n)) for n in range(1, sequences + 1)})


def step_seconds(config: RunConfig, teacher: ModelShape, student: ModelShape, machine: Machine) -> float:
    """Seconds of one optimizer step on the reference card, for ordering candidates only.

    Decoding reads every weight and half-filled KV caches once per token step; training is 2 FLOP per weight and token
    forward, the same backward for input gradients, once more where weights are trained; and a fixed cost per pass.
    """
    b = machine.compute_bytes
    tokens = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    micro, steps = config.train.per_device_train_batch_size, config.train.gradient_accumulation_steps
    rows = min(config.rollout.batch_size, micro * steps)
    batches = -(-micro * steps // rows)
    pass_overhead = PASS_OVERHEAD_S_PER_LAYER * (teacher.num_layers + student.num_layers)
    read = memory.weight_bytes(teacher, config.teacher.precision, b) + memory.weight_bytes(student, "bf16", b)
    read += sum(memory.kv_cache_bytes(m, rows, tokens // 2 + 1, b) for m in (teacher, student))
    decode_s = batches * config.rollout.max_new_tokens * (read / REFERENCE_BANDWIDTH_BYTES_PER_S + pass_overhead)

    factor = 4.0 if config.student.adapter == "lora" else 6.0
    factor *= CHECKPOINTING_COST if config.student.gradient_checkpointing else 1
    learn_s = factor * student.num_parameters * micro * steps * tokens / REFERENCE_FLOPS
    learn_s += steps * 3 * PASS_OVERHEAD_S_PER_LAYER * student.num_layers
    chunks = steps * -(-micro * config.rollout.max_new_tokens // config.loss.chunk_tokens)
    learn_s += chunks * PASS_OVERHEAD_S_PER_LAYER  # a chunk launches about as many kernels as a layer
    if config.cache.device_budget_gib == 0:
        learn_s += steps * PASS_OVERHEAD_S_PER_LAYER  # rows come from host memory; overlapped but for the first
    return decode_s + learn_s


def _notes(config: RunConfig, machine: Machine) -> list[str]:
    names = {2: "bf16", 4: "fp32", 8: "fp64"}
    where = "a GPU" if machine.device == "cuda" else "the CPU"
    notes = [f"Planned for {where}, arithmetic in {names[machine.compute_bytes]}."]
    if machine.device == "cuda":
        context = memory.CUDA_CONTEXT_BYTES / GIB
        notes.append(
            f"Unmeasured on a GPU: CUDA context ({context:.1f} GiB), activations and the "
            f"{memory.FRAGMENTATION_SHARE:.0%} fragmentation allowance are estimates."
        )
    else:
        notes.append("The Python process and its libraries, well under 1 GiB, are not counted.")
        if machine.compute_bytes == 4 and "bf16" in (config.teacher.precision, config.student.precision):
            notes.append("This CPU has no bf16 units: weights in bf16 are kept in fp32, 4 bytes each.")
    notes.append("The cache is planned for a teacher that writes every token, an upper bound.")
    if config.student.adapter == "lora" and config.student.lora.use_dora:
        notes.append("DoRA's norm computation is counted in the activations only.")
    return notes


def apply_plan(config: RunConfig, plan: Plan) -> RunConfig:
    """The configuration with the plan's choices written in."""
    return _with(config, plan.choices)


def require_fit(plan: Plan) -> None:
    """Nothing, or the error that says what is needed and what would fit.

    Raises:
        PlanError: the plan does not fit; exit code 3.
    """
    if not plan.fits:
        raise PlanError(explain_no_fit(plan))


SHORT_NAMES = {
    "CUDA context": ("cuda_context",),
    "teacher": ("teacher_weights", "teacher_adapter"),
    "student": ("student_weights", "adapters", "optimizer_state"),
    "logit cache": ("logit_cache",),
    "KV caches": ("teacher_kv_cache", "student_kv_cache"),
    "logits": ("rollout_logits",),
    "activations": ("activations",),
    "gradients": ("gradients",),
    "loss": ("loss_chunk",),
    "workspace": ("dequantisation", "prefill", "kept_hidden"),
    "load buffer": ("load_buffer",),
}
_PHASE_NAMES = {
    "load": {"load buffer"},
    "rollout": {"KV caches", "logits", "workspace", "logit cache"},
    "train": {"activations", "gradients", "loss", "logit cache"},
    "validate": {"logit cache"},
}


def explain_no_fit(plan: Plan) -> str:
    """What the smallest plan needs, part by part, against the budget, and the settings that would fit."""
    assert plan.budget_bytes is not None, "a plan without a budget always fits"
    phase = max(plan.phases, key=plan.phases.__getitem__)
    shown = {"CUDA context", "teacher", "student"} | _PHASE_NAMES[phase]
    sizes = {label: sum(plan.parts[p] for p in names) for label, names in SHORT_NAMES.items() if label in shown}
    listed = ", ".join(f"{label} {size / GIB:.1f}" for label, size in sizes.items() if size >= 0.05 * GIB)
    head = (
        f"The plan needs {plan.total_gib:.1f} GiB in its {phase} phase even at its smallest ({listed}); "
        f"the budget is {plan.budget_bytes / GIB:.1f}."
    )
    remedies = list(_remedies(plan))
    if not remedies:
        remedies = [f"choose a smaller teacher or give at least {plan.total_gib:.1f} GiB"]
    text = ", or ".join(remedies)
    return f"{head}\n{text[0].upper()}{text[1:]}."


def _remedies(plan: Plan) -> Iterator[str]:
    """Single changes that make the smallest plan fit, each tried."""
    config, budget = plan.config, plan.budget_bytes or 0
    machine = describe_machine(config.train, "cuda" if plan.parts["cuda_context"] else "cpu")

    def fits(changes: dict[str, Any]) -> bool:
        changed = _with(config, changes)
        return measure(changed, *_shapes(changed), machine).total_bytes <= budget

    if config.teacher.precision != "nf4" and fits({"teacher.precision": "nf4"}):
        yield f"set teacher.precision=nf4 (now {config.teacher.precision})"
    for key in ("rollout.max_new_tokens", "data.max_prompt_tokens"):
        section, _, field = key.partition(".")
        now = getattr(getattr(config, section), field)
        low, high = 0, now - 1  # the largest value that fits lies in [low, high]; 0 stands for none
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits({key: middle}) else (low, middle - 1)
        rounded = low // 16 * 16 or low
        if rounded >= 16:
            yield f"lower {key} from {now} to {rounded}"
    student = config.student
    if student.adapter == "none":
        if fits({"student.adapter": "lora"}):
            yield "set student.adapter=lora"
    elif student.precision != "nf4" and fits({"student.precision": "nf4"}):
        yield "set student.precision=nf4"
    if config.train.optimizer == "adamw" and machine.device == "cuda" and fits({"train.optimizer": "paged_adamw_8bit"}):
        yield "set train.optimizer=paged_adamw_8bit"
