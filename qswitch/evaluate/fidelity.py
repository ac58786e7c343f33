"""What quantising the teacher does to it: how far each precision is from the bf16 teacher, and whether SWITCH notices.

Two texts are read by every precision: the bf16 teacher's own responses, for KL(bf16 || precision) and top-1 agreement,
and SWITCH rollouts of the bf16 teacher with the student, for the divergence from the student and the interventions. All
precisions read the same tokens, so a difference is that of the weights and not of another sample.

Letters: `T` response tokens, `D` hidden width, `V` shared vocabulary.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from qswitch.config import RolloutSection, RunConfig, TeacherSection
from qswitch.data.gather import load_prompts
from qswitch.distill.answers import doubt_of_held_out
from qswitch.distill.recovery import BatchRows, keep_to_free_memory
from qswitch.distill.teacher_distance import CHUNK_TOKENS, detached_head, head_on
from qswitch.divergence import divergence, jsd_bits
from qswitch.errors import ConfigError, ModelError, PlanError, is_out_of_memory
from qswitch.evaluate.intervals import Estimate, mean_interval
from qswitch.evaluate.marks import TrainedWeights, weights_text
from qswitch.evaluate.score_table import markdown_table
from qswitch.evaluate.versions import versions
from qswitch.models.host_memory import release_memory
from qswitch.models.language_model import Head, LanguageModel
from qswitch.models.load import context_tokens, load_teacher
from qswitch.models.pair import TokenizerPair, load_pair_tokenizer, with_own_tokenizer
from qswitch.models.references import resolve_reference
from qswitch.models.runtime import Runtime, make_runtime
from qswitch.models.shrink import shrink_to_folder
from qswitch.models.student import load_adapter, load_student
from qswitch.plan import memory
from qswitch.plan.adapters import find_adapter
from qswitch.plan.machine import detect_budget_bytes
from qswitch.plan.model_files import shape_for
from qswitch.plan.shapes import ModelShape
from qswitch.rollout.adaptive_threshold import threshold_of_run
from qswitch.rollout.decode import Rollout, RolloutRequest, rollout, score_responses
from qswitch.rollout.policy import SwitchPolicy, TeacherPolicy
from qswitch.run_dir import RunDir
from qswitch.units import GIB

logger = logging.getLogger(__name__)

PRECISIONS = ("nf4", "fp4", "int8")
REFERENCE = "bf16"
POSITIONS = ((0, 7), (8, 31), (32, 127), (128, None))
"""Response positions that are averaged together, first and last included."""
SEED = 20_250_429
BF16_BYTES = 2
WEIGHTS_COUNTED = "as the plan counts them: quantised layers with their scales, all other weights in 2 bytes"
"""The same rule for every precision and device; a CPU may hold what is not quantised in fp32 while it computes."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Per token of one response: what one precision makes of it."""

    kl_nats: Tensor
    """[T] KL(bf16 || precision)."""
    same_top1: Tensor
    """[T] whether both find the same token likeliest."""


@dataclass(frozen=True, slots=True)
class Decisions:
    """Per token of one SWITCH rollout: divergence from the student, under the bf16 teacher and under a precision."""

    reference_jsd: Tensor
    """[T] bits."""
    jsd: Tensor
    """[T] bits."""
    threshold: Tensor
    """[T] bits."""


@dataclass(frozen=True, slots=True)
class PrecisionReport:
    """One precision against bf16."""

    precision: str
    weights_gib: float
    kl_nats: Estimate
    """Token mean with an interval over responses."""
    top1_agreement: Estimate
    by_position: list[dict[str, Any]]
    """first, last, tokens, kl_nats, top1_agreement of each range of positions."""
    reference_jsd_bits: float
    jsd_bits: float
    """Mean divergence of the student from this teacher; `reference_jsd_bits` from the bf16 one."""
    absolute_jsd_change_bits: float
    """Mean |difference| per token."""
    reference_intervention_share: float
    intervention_share: float
    """Share of tokens whose divergence exceeds the threshold."""
    changed_decisions: Estimate
    """Share of tokens at which the two teachers choose another writer."""


def fidelity(
    config: RunConfig,
    *,
    run_dir: RunDir | None,
    work_dir: Path,
    precisions: Sequence[str] = PRECISIONS,
    num_prompts: int = 32,
    max_new_tokens: int | None = None,
    device: str | None = None,
    say: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Compare precisions of the teacher on the held-out prompts of a run; the result is fit for JSON.

    The student is the trained one of `run_dir`, else as the configuration starts it (a cut one is made in `work_dir`).

    Raises:
        ConfigError: unknown precision; responses that the context of the models does not hold.
        ModelError: the bf16 teacher or the student cannot be loaded, or does not fit the GPU. A precision that cannot
            is reported and left out.
        PlanError: host memory does not hold the weights, on a CPU; nothing was read.
    """
    unknown = [p for p in precisions if p not in PRECISIONS]
    if unknown:
        raise ConfigError(f"--precision {unknown[0]}: choose among {', '.join(PRECISIONS)}.")
    config = with_own_tokenizer(config)
    if config.passes_text:
        raise ConfigError(
            "Fidelity compares rollouts that teacher and student write together, and the tokenizers of this pair "
            "differ. Name a pair with one tokenizer, for example the same teacher with --student shrink."
        )
    runtime = make_runtime(config.train if device is None else config.train.model_copy(update={"device": device}))
    keep_to_free_memory(runtime.device, config.teacher.num_gpus)
    pair = load_pair_tokenizer(config)
    encoder, _, held_out = load_prompts(config, pair)
    doubt = None if run_dir is None else doubt_of_held_out(run_dir, held_out, encoder)
    prompts = held_out[:num_prompts]
    limit = max_new_tokens or config.rollout.max_new_tokens
    longest = max((len(p.prompt_ids) for p in prompts), default=0)
    context = min(context_tokens(config.teacher), context_tokens(config.student))
    if longest + limit > context:
        raise ConfigError(
            f"--max-new-tokens {limit}: the longest of the prompts has {longest} tokens, and the context of the models "
            f"is {context}. Give less."
        )
    requests = [RolloutRequest(p.example_id, 0, p.prompt_ids, limit) for p in prompts]

    _refuse_what_the_host_lacks(config, runtime)
    weights_gib = partial(_weights_gib, config.teacher, shape_for(config.teacher), runtime)
    if run_dir is not None and not (run_dir.adapter_path.is_dir() or run_dir.checkpoints()):
        run_dir.trained_weights()  # which says that there are none yet, before the minutes of reading the teacher
    say(f"loading the teacher ({REFERENCE}) and the student")
    try:
        teacher = _teacher(config, runtime, pair, REFERENCE)
        student, trained = _student(config, runtime, pair, run_dir, work_dir)
    except (RuntimeError, MemoryError) as error:
        if runtime.device.type != "cuda" or not is_out_of_memory(error):
            raise
        raise ModelError(
            f"The teacher in {REFERENCE}, the yardstick, does not fit this GPU beside the student. Use --device cpu, "
            "which is slow."
        ) from error
    policy = _switch_policy(config, limit, run_dir)
    say(f"writing {len(prompts)} responses of the teacher and {len(prompts)} SWITCH rollouts")
    write = partial(
        rollout, requests, teacher=teacher, seed=SEED, temperature=1.0, eos_ids=pair.eos_ids, pad_id=pair.pad_id,
        keep="nothing",
    )  # fmt: skip
    writing = BatchRows(config.rollout.batch_size, say=say)
    own, _ = writing.attempt(runtime.device, partial(write, student=None, policy=TeacherPolicy()))
    mixed, _ = writing.attempt(runtime.device, partial(write, student=student, policy=policy))
    del write  # it holds the teacher, whose memory the next one needs
    reading = BatchRows(config.train.per_device_train_batch_size, say=say)
    student_states = _read(student, mixed, pair, reading)
    reference = [_read(teacher, written, pair, reading) for written in (own, mixed)]
    heads = detached_head(teacher.head), detached_head(student.head)
    del teacher, student
    release_memory(runtime.device)

    reports, failed = [], {}
    for precision in precisions:
        say(f"loading the teacher ({precision})")
        quantised = states = None
        try:
            quantised = _teacher(config, runtime, pair, precision)
            states = [_read(quantised, written, pair, reading) for written in (own, mixed)]
        except (ModelError, RuntimeError) as error:
            failed[precision] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if quantised is None or states is None:
            say(f"{precision} does not run here: {failed[precision]}")
            del quantised, states  # half a teacher would take the next one's memory
            release_memory(runtime.device)
            continue
        head, student_head = (head_on(one, quantised.device) for one in heads)
        tokens = [_tokens(r, q, head, quantised.head) for r, q in zip(reference[0], states[0], strict=True)]
        decisions = [
            _decisions(r, q, s, head, quantised.head, student_head, policy)
            for r, q, s in zip(reference[1], states[1], student_states, strict=True)
        ]
        reports.append(summarise(precision, weights_gib(precision), tokens, decisions))
        del quantised, states, head, student_head
        release_memory(runtime.device)
    return {
        "teacher": resolve_reference(config.teacher.model, config.teacher.revision).name,
        "origin": origin_note(config),
        "reference": {"precision": REFERENCE, "weights_gib": weights_gib(REFERENCE)},
        "weights_counted": WEIGHTS_COUNTED,
        "student": "trained" if run_dir is not None else "as it starts",
        "student_weights": None if trained is None else trained.to_dict(),
        "prompts": len(prompts),
        "doubt": doubt,
        "teacher_tokens": sum(len(r.response_ids) for r in own),
        "rollout_tokens": sum(len(r.response_ids) for r in mixed),
        "max_new_tokens": limit,
        "schedule": policy.threshold.schedule,
        "compute_dtype": str(runtime.compute_dtype).removeprefix("torch."),
        "device": str(runtime.device),
        "precisions": [asdict(r) for r in reports],
        "failed": failed,
        "versions": versions(),
    }


def origin_note(config: RunConfig) -> str | None:
    """What is known against the bf16 teacher as a yardstick: weights that were dequantised from a GGUF file."""
    references = [config.teacher.model] if isinstance(config.teacher.model, str) else config.teacher.model
    name = resolve_reference(config.teacher.model, config.teacher.revision).name
    file = next((Path(r).name for r in references if r.endswith(".gguf") and Path(r).stem == name), None)
    if file is None:
        return None
    bits = re.search(r"(?:^|[._-])I?Q(\d)", file, flags=re.IGNORECASE)
    if bits is None:
        return f"The {REFERENCE} weights were read from {file}."
    return (
        f"The {REFERENCE} weights were themselves dequantised from {file} ({bits[1]}-bit): the figures say what a "
        "second quantisation changes, not what 4-bit does to the original model."
    )


# ----------------------------------------------------------------------------------------------------- models and text


def _teacher(config: RunConfig, runtime: Runtime, pair: TokenizerPair, precision: str) -> LanguageModel:
    section = config.teacher.model_copy(update={"precision": precision})
    return load_teacher(section, runtime, vocab_size=pair.vocab_size)


def _student(
    config: RunConfig,
    runtime: Runtime,
    pair: TokenizerPair,
    run_dir: RunDir | None,
    work_dir: Path,
) -> tuple[LanguageModel, TrainedWeights | None]:
    """The student in eval mode, and which weights of the run it has; None where it is as it starts."""
    section = config.student
    layers = section.shrink_to_layers
    source = resolve_reference(section.model, section.revision)
    mark = hashlib.blake2b(f"{source.path}@{source.revision}".encode(), digest_size=4).hexdigest()
    base = run_dir.student_base_path if run_dir is not None else work_dir / f"student-{layers}-layers-{mark}"
    if run_dir is None and layers is not None and not base.exists():
        shrink_to_folder(
            config.student.model,
            layers,
            base,
            revision=config.student.revision,
            trust_remote_code=config.student.trust_remote_code,
        )
    student = load_student(config, runtime, vocab_size=pair.vocab_size, base_path=base)
    trained = None
    if run_dir is not None:
        # Named right before they are read: a run under way replaces its checkpoints while a base is loaded.
        trained = TrainedWeights.of(run_dir, run_dir.trained_weights())
        load_adapter(student, trained.folder)
    elif config.student.init_adapter is not None:
        load_adapter(student, find_adapter(config.student.init_adapter, "student.init_adapter"))
    return student.eval(), trained


def _switch_policy(config: RunConfig, limit: int, run_dir: RunDir | None) -> SwitchPolicy:
    """The run's SWITCH policy; for a run of another method, that of the defaults."""
    section = config.rollout if config.rollout.policy == "switch" else RolloutSection(max_new_tokens=limit)
    return SwitchPolicy(threshold_of_run(section, None if run_dir is None else run_dir.threshold_path))


def _read(model: LanguageModel, written: Sequence[Rollout], pair: TokenizerPair, rows: BatchRows) -> list[Tensor]:
    """Hidden states [T, D] of whole responses by parallel passes, so that every precision is read in the same way."""
    sequences = [(r.prompt_ids, r.response_ids) for r in written]
    score = partial(score_responses, model, sequences, pad_id=pair.pad_id, keep_on_host=True)
    return rows.attempt(model.device, score)


def _refuse_what_the_host_lacks(config: RunConfig, runtime: Runtime) -> None:
    """A host that runs out of memory ends the process without a word, so what it lacks for the weights is said before.

    Raises:
        PlanError: with the figures.
    """
    if runtime.device.type != "cpu":
        return
    width = runtime.compute_dtype.itemsize  # a CPU without native bf16 keeps bf16 weights in fp32
    sizes = [memory.weight_bytes(shape_for(section), REFERENCE, width) for section in (config.teacher, config.student)]
    available, source = detect_budget_bytes("cpu")
    if sum(sizes) > available:
        raise PlanError(
            f"The teacher in {REFERENCE}, the yardstick, takes {sizes[0] / GIB:.1f} GiB of host memory and the student "
            f"{sizes[1] / GIB:.1f}, {width} bytes a weight, and {available / GIB:.1f} are free ({source}). Close other "
            "programs, or measure on a machine with more memory: the run directory is all it needs."
        )


def _weights_gib(teacher: TeacherSection, shape: ModelShape, runtime: Runtime, precision: str) -> float:
    """GiB of the teacher's weights in one precision, as WEIGHTS_COUNTED says; FP4 takes what NF4 does."""
    counted = cast(memory.Precision, "nf4" if precision == "fp4" else precision)
    adapted = teacher.model_copy(update={"precision": counted})
    # On a CPU a few layers may stay unquantised, and the figures beside these bytes are those of such a teacher.
    weights = memory.weight_bytes(shape, counted, BF16_BYTES, any_width=runtime.device.type == "cuda")
    return (weights + memory.attached_adapter_bytes(shape, adapted, BF16_BYTES)) / GIB


# ------------------------------------------------------------------------------------------------------------- figures


@torch.no_grad()
def _tokens(reference: Tensor, hidden: Tensor, reference_head: Head, head: Head) -> Tokens:
    kl, same = [], []
    device = next(head.linear.parameters()).device
    for start in range(0, len(hidden), CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        p, q = reference_head(reference[chunk].to(device)), head(hidden[chunk].to(device))
        kl.append(divergence("forward_kl", p, q).double().cpu())
        same.append((p.argmax(dim=-1) == q.argmax(dim=-1)).cpu())
    return Tokens(torch.cat(kl), torch.cat(same))


@torch.no_grad()
def _decisions(
    reference: Tensor,
    hidden: Tensor,
    student: Tensor,
    reference_head: Head,
    head: Head,
    student_head: Head,
    policy: SwitchPolicy,
) -> Decisions:
    before, after = [], []
    device = next(head.linear.parameters()).device
    for start in range(0, len(hidden), CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        q = student_head(student[chunk].to(device))
        before.append(jsd_bits(reference_head(reference[chunk].to(device)), q).double().cpu())
        after.append(jsd_bits(head(hidden[chunk].to(device)), q).double().cpu())
    steps = torch.arange(len(hidden))
    return Decisions(torch.cat(before), torch.cat(after), policy.threshold(steps))


def summarise(
    precision: str, weights_gib: float, tokens: Sequence[Tokens], decisions: Sequence[Decisions]
) -> PrecisionReport:
    """Token means with intervals over responses."""
    lengths = [float(len(t.kl_nats)) for t in tokens]
    kl, same = torch.cat([t.kl_nats for t in tokens]), torch.cat([t.same_top1 for t in tokens]).double()
    position = torch.cat([torch.arange(len(t.kl_nats)) for t in tokens])
    ranges = []
    for first, last in POSITIONS:
        chosen = (position >= first) & (position <= (last if last is not None else torch.iinfo(position.dtype).max))
        if chosen.any():
            ranges.append(
                {
                    "first": first,
                    "last": last,
                    "tokens": int(chosen.sum()),
                    "kl_nats": float(kl[chosen].mean()),
                    "top1_agreement": float(same[chosen].mean()),
                }
            )
    before, after = (torch.cat([getattr(d, n) for d in decisions]) for n in ("reference_jsd", "jsd"))
    threshold = torch.cat([d.threshold for d in decisions])
    changed = [((d.reference_jsd > d.threshold) != (d.jsd > d.threshold)).double() for d in decisions]
    return PrecisionReport(
        precision=precision,
        weights_gib=weights_gib,
        kl_nats=mean_interval([float(t.kl_nats.mean()) for t in tokens], lengths),
        top1_agreement=mean_interval([float(t.same_top1.double().mean()) for t in tokens], lengths),
        by_position=ranges,
        reference_jsd_bits=float(before.mean()),
        jsd_bits=float(after.mean()),
        absolute_jsd_change_bits=float((after - before).abs().mean()),
        reference_intervention_share=float((before > threshold).double().mean()),
        intervention_share=float((after > threshold).double().mean()),
        changed_decisions=mean_interval([float(c.mean()) for c in changed], [float(len(c)) for c in changed]),
    )


def render(result: dict[str, Any]) -> str:
    """The result as text with markdown tables."""
    trained = result["student_weights"]
    student = result["student"] + ("" if trained is None else f" ({weights_text(trained)})")
    prompts = f"{result['prompts']} {'held-out prompts' if result['doubt'] is None else 'prompts'}"
    lines = [
        f"Teacher {result['teacher']} in {result['reference']['precision']} "
        f"({result['reference']['weights_gib']:.3f} GiB) against its quantised forms; {prompts}, "
        f"{result['teacher_tokens']} tokens written by the teacher, {result['rollout_tokens']} by SWITCH "
        f"(schedule {result['schedule']}, student {student}), arithmetic in {result['compute_dtype']}.",
        f"Weights are counted {result['weights_counted']}.",
    ]
    lines += [note for note in (result["doubt"], result["origin"]) if note]
    rows = []
    for one in result["precisions"]:
        rows.append(
            [
                one["precision"],
                f"{one['weights_gib']:.3f}",
                str(Estimate(**one["kl_nats"])),
                str(Estimate(**one["top1_agreement"])),
                f"{one['reference_jsd_bits']:.4f} → {one['jsd_bits']:.4f}",
                f"{one['absolute_jsd_change_bits']:.4f}",
                f"{one['reference_intervention_share']:.1%} → {one['intervention_share']:.1%}",
                f"{one['changed_decisions']['mean']:.1%}",
            ]
        )
    header = ["precision", "weights, GiB", "KL from bf16, nats/token", "top-1 agreement", "JSD to student, bits",
              "mean change, bits", "interventions", "changed writers"]  # fmt: skip
    if rows:
        lines += ["", markdown_table(header, rows), "KL from bf16 (nats/token) and top-1 agreement by position:", ""]
        positions = result["precisions"][0]["by_position"]
        names = [f"{p['first']}-{p['last']}" if p["last"] is not None else f"{p['first']}+" for p in positions]
        cells = [
            [one["precision"], *(f"{p['kl_nats']:.4f}, {p['top1_agreement']:.1%}" for p in one["by_position"])]
            for one in result["precisions"]
        ]
        lines.append(markdown_table(["precision", *names], cells))
    lines += [f"{precision} does not run here: {reason}" for precision, reason in result["failed"].items()]
    return "\n".join(lines) + "\n"
