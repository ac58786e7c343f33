"""The middle of a run: models are loaded, trained by `trainer.py`, and the best adapter leaves with a summary.

Knows the plan that it was handed, and makes none but for sizes that memory ran out with. Each process of a run passes
through here; what is written, the first one writes.
"""

from __future__ import annotations

import logging
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from transformers import GenerationConfig

from qswitch.aside import folder_aside
from qswitch.config import RunConfig
from qswitch.data.template import PromptEncoder, template_source
from qswitch.distill.adapter_card import adapter_card, got_worse
from qswitch.distill.answers import keep_first_answers, keep_last_answers
from qswitch.distill.checkpoint import newest_whole, saved_part
from qswitch.distill.phase_peaks import PhasePeaks, highest_of, in_gib_beside
from qswitch.distill.processes import Processes
from qswitch.distill.progress import Progress, total_steps
from qswitch.distill.recovery import Recovery, Sizes, device_memory_bounded
from qswitch.distill.sequence import TrainingSequence
from qswitch.distill.stopping import stop_on_signal
from qswitch.distill.stored_teacher import StoredTeacher
from qswitch.distill.trainer import Trainer
from qswitch.errors import Interrupted, RunDirError
from qswitch.manifest import write_manifest
from qswitch.models.dropout import dropout_of
from qswitch.models.host_memory import bound_kernel_cache, release_memory, return_freed_memory
from qswitch.models.language_model import LanguageModel
from qswitch.models.load import load_teacher
from qswitch.models.older_readers import add_older_keys
from qswitch.models.pair import TokenizerPair
from qswitch.models.runtime import Runtime, make_runtime
from qswitch.models.shrink import shrink_to_folder
from qswitch.models.student import load_adapter, load_student, save_adapter
from qswitch.outside import user_path
from qswitch.plan.adapters import find_adapter
from qswitch.plan.run_plan import Plan
from qswitch.plan.scheduler import plan_run
from qswitch.preflight import Prepared
from qswitch.rollout.kv_probe import verify_kv
from qswitch.run_dir import RunDir
from qswitch.units import GIB

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Summary:
    """RUN/summary.json: what the run did and whether the student got better."""

    method: str
    kl_before_nats: float | None
    """Mean KL(teacher || student) per token on held-out prompts, teacher-written responses, before the first step.
    None where no teacher was loaded."""
    kl_after_nats: float | None
    """The same for the adapter in RUN/adapter, the best of the validations."""
    kl_last_nats: float | None
    """The same after the last step."""
    response_loss_before_nats: float | None
    """Where no teacher was loaded: mean cross-entropy per token of the held-out prompts' own responses."""
    response_loss_after_nats: float | None
    response_loss_last_nats: float | None
    validation_bytes: int | None
    """UTF-8 bytes of those responses, by which loss of students with different tokenizers can be compared."""
    own_before: dict[str, Any] | None
    """Figures of the student's own responses to a few held-out prompts, as read by the teacher, before the first step;
    None where they are not measured."""
    own_after: dict[str, Any] | None
    """The same for the adapter in RUN/adapter."""
    best_step: int
    steps: int
    steps_without_loss: int
    """Steps whose rollouts held no intervention, so that nothing was learnt."""
    rollout_batches: int
    """Steps that learnt from rollouts, fresh or replayed, rather than from the data's own responses."""
    overflows: int
    """Attempts at a step that moved no weight, because gradients left the range of fp16; they count as no step."""
    validation_prompts: int
    validation_tokens: int
    rollout_tokens: int
    trained_tokens: int
    seconds: float
    """Training, validation and start-up apart."""
    planned_seconds: float | None
    """Of the same by the plan's arithmetic; None on a CPU, whose speed the plan does not know."""
    peak_gib: float
    """Highest memory use of any process that worked on the run."""
    planned_gib: float
    phases_gib: dict[str, dict[str, float]]
    """load, rollout, train, validate -> what was planned for it, and its peak: on a GPU what torch allocated and
    reserved, on a CPU the resident set of the process."""
    device: str
    teacher: str
    student: str
    versions: dict[str, str]
    commit: str | None
    processes: int = 1


class Measured(NamedTuple):
    """The memory of a run: its plan as it is at the end, and what this start of it took."""

    planned_bytes: int
    peak_bytes: int
    phases_gib: dict[str, dict[str, float]]


def saved_sizes(run_dir: RunDir) -> Sizes | None:
    """The sizes that the newest whole checkpoint was written with; None before the first.

    Raises:
        RunDirError: no checkpoint can be used.
    """
    folder, _ = newest_whole(run_dir.checkpoints())
    if folder is None:
        return None
    saved = saved_part(folder, "sizes")
    try:
        return Sizes(**saved)
    except TypeError as error:
        raise RunDirError(
            f"The state of sizes in {folder} does not fit this qswitch ({error}). Delete {folder} to resume from the "
            "one before it."
        ) from error


def train(
    run_dir: RunDir,
    prepared: Prepared,
    plan: Plan,
    *,
    resumes: bool,
    processes: Processes | None = None,
    config: RunConfig | None = None,
    peaks: PhasePeaks | None = None,
) -> Summary:
    """Train from the start, or with `resumes` from the newest checkpoint, and put the result into the run directory.

    `config` are the settings of the student's half, where the run has two, and `peaks` knows of the other; else they
    are the run's.

    Raises:
        ModelError, TrainingError: as their messages say.
        Interrupted: stopped by SIGINT, SIGTERM or SIGHUP after a checkpoint.
    """
    config = config or run_dir.config
    runtime = make_runtime(config.train)
    if runtime.device.type == "cpu":
        return_freed_memory()
        bound_kernel_cache()
    with device_memory_bounded(runtime.device, len(plan.breakdown.teacher_layers), plan.budget_bytes):
        return _train(
            run_dir, prepared, plan, config, runtime, processes or Processes(), resumes=resumes,
            peaks=peaks or PhasePeaks(runtime.device, plan.breakdown.fullest_phases),
        )  # fmt: skip


def _train(
    run_dir: RunDir,
    prepared: Prepared,
    plan: Plan,
    config: RunConfig,
    runtime: Runtime,
    processes: Processes,
    *,
    resumes: bool,
    peaks: PhasePeaks,
) -> Summary:
    pair, data = prepared.pair, prepared.prompts
    progress = Progress(total_steps(config.train), quiet=not processes.is_first)
    progress.say(f"run directory: {run_dir.path}")
    if processes.count > 1:
        total = config.train.sequences_per_step
        progress.say(f"{processes.count} processes, each with {total // processes.count} of a step's {total} sequences")
    progress.say(f"{data.report.training_prompts} training prompts, {len(data.held_out)} held out")
    if not plan.fits:
        progress.say(
            f"the sizes of this run are planned to take {plan.total_gib:.2f} GiB, more than the "
            f"{(plan.budget_bytes or 0) / GIB:.2f} that are free; they are lowered if memory runs out"
        )
    if config.student.shrink_to_layers is not None:
        peaks.enter("cut")
        processes.from_first(lambda: _cut_student(run_dir, progress))
    peaks.enter("load")
    teacher, student = processes.each(
        lambda: _load_models(run_dir, config, runtime, pair, progress, plan, resumes=resumes)
    )
    stored = None
    if config.teacher.responses is not None and config.learns_from_teacher:
        folder = user_path(config.teacher.responses)
        stored = StoredTeacher(folder, device=runtime.device, dtype=runtime.compute_dtype, is_checked=True)
        progress.say(f"no teacher is loaded: {stored.about.teacher} worked earlier ({folder})")
    recovery = Recovery(
        Sizes.of(plan.config),
        runtime.device,
        planned_bytes=plan.total_bytes,
        planned_bytes_of=lambda sizes: _plan_again(run_dir, sizes, plan, processes.count, peaks),
        say=progress.say,
        budget_bytes=plan.budget_bytes,
    )
    trainer = Trainer(
        config,
        run_dir,
        teacher=teacher,
        student=student,
        pair=pair,
        prompts=data.train,
        validation_prompts=data.held_out,
        corpus=prepared.corpus,
        recovery=recovery,
        peaks=peaks,
        progress=progress,
        processes=processes,
        stored=stored,
    )
    if resumes:
        trainer.resume()
    if trainer.step == 0:
        peaks.enter("rollout")
        processes.from_first(lambda: keep_first_answers(trainer, data.held_out, prepared.encoder))
    with stop_on_signal(trainer, progress.say):
        trainer.run()
    if not trainer.finished:
        raise Interrupted
    trainer.replace_damaged_best()
    last = processes.gather((peaks.take(), peaks.highest_bytes))
    measured = Measured(
        recovery.planned_bytes or plan.total_bytes,
        max(highest for _, highest in last),
        in_gib_beside(highest_of(found for found, _ in last), peaks.planned),
    )
    return processes.from_first(lambda: _finish(run_dir, trainer, pair, prepared.encoder, plan, measured))


def _cut_student(run_dir: RunDir, progress: Progress) -> None:
    """RUN/student, where the student is to be cut from a larger model and is not yet."""
    config = run_dir.config
    if config.student.shrink_to_layers is None or run_dir.student_base_path.exists():
        return
    progress.say(f"cutting the student to {config.student.shrink_to_layers} layers")
    report = shrink_to_folder(
        config.student.model,
        config.student.shrink_to_layers,
        run_dir.student_base_path,
        revision=config.student.revision,
        trust_remote_code=config.student.trust_remote_code,
        notify=progress.say,
    )
    progress.say(f"student cut: {report.summary()}")


def _load_models(
    run_dir: RunDir,
    config: RunConfig,
    runtime: Runtime,
    pair: TokenizerPair,
    progress: Progress,
    plan: Plan,
    *,
    resumes: bool,
) -> tuple[LanguageModel | None, LanguageModel]:
    """The teacher, None where the method needs none, and the student with its adapter as the run begins."""
    loaded = f"the teacher ({config.teacher.precision}) and the student" if config.needs_teacher else "the student"
    progress.say(f"loading {loaded} on {runtime.device}")
    teacher = None
    if config.needs_teacher:
        layers = plan.breakdown.teacher_layers
        if len(layers) > 1:
            progress.say(f"layers of the teacher on each GPU: {', '.join(map(str, layers))}")
        teacher = load_teacher(config.teacher, runtime, vocab_size=pair.vocab_size, layers=layers)
    student = load_student(config, runtime, vocab_size=pair.vocab_size, base_path=run_dir.student_base_path)
    if acting := sorted(set(dropout_of(student).values())):
        shown = ", ".join(f"{p:g}" for p in acting)
        progress.say(f"the student trains with its own dropout of {shown}; student.base_dropout=0 switches it off")
    # Also when a run is resumed that was stopped before its first checkpoint.
    if config.student.init_adapter is not None and not (resumes and run_dir.latest_checkpoint() is not None):
        load_adapter(student, find_adapter(config.student.init_adapter, "student.init_adapter"))
    for model in (teacher, student):
        if model is not None:
            verify_kv(model, blocks=config.drafts_tokens and config.rollout.block_tokens != 0)
    release_memory(runtime.device)  # what loading left behind would add to the peak of training
    return teacher, student


def _plan_again(run_dir: RunDir, sizes: Sizes, plan: Plan, processes: int, peaks: PhasePeaks) -> int:
    """Bytes with the sizes that are left after memory ran out; RUN/plan.json becomes the plan of what runs."""
    smaller = plan_run(
        sizes.write_into(run_dir.config),
        budget_bytes=plan.budget_bytes,
        machine=plan.machine,
        longest_prompt_tokens=plan.prompt_tokens,
        keep_sizes=True,
        processes=processes,
    )
    run_dir.write_json("plan.json", smaller.to_dict())
    peaks.planned = smaller.breakdown.fullest_phases
    return smaller.total_bytes


def _finish(
    run_dir: RunDir,
    trainer: Trainer,
    pair: TokenizerPair,
    encoder: PromptEncoder,
    plan: Plan,
    measured: Measured,
) -> Summary:
    """Put the best adapter, its tokenizer and a model card into RUN/adapter, and write the summary."""
    config, counters = trainer.config, trainer.counters
    assert counters.before_nats is not None and counters.last_nats is not None
    figures = {"before": counters.before_nats, "after": counters.best_nats, "last": counters.last_nats}
    logged = run_dir.read_metrics()  # also by processes that were stopped
    kl, response_loss = (figures, {}) if config.learns_from_teacher else ({}, figures)
    summary = Summary(
        method=config.method,
        kl_before_nats=kl.get("before"),
        kl_after_nats=kl.get("after"),
        kl_last_nats=kl.get("last"),
        response_loss_before_nats=response_loss.get("before"),
        response_loss_after_nats=response_loss.get("after"),
        response_loss_last_nats=response_loss.get("last"),
        validation_bytes=_bytes_of(trainer.validation.sequences, pair) if response_loss else None,
        own_before=counters.own_before,
        own_after=counters.own_best,
        best_step=counters.best_step,
        steps=trainer.step,
        steps_without_loss=counters.steps_without_loss,
        rollout_batches=counters.rollout_batches,
        overflows=counters.overflows,
        validation_prompts=trainer.validation.num_prompts,
        validation_tokens=trainer.validation.num_tokens,
        rollout_tokens=counters.rollout_tokens,
        trained_tokens=counters.trained_tokens,
        seconds=round(counters.seconds, 1),
        planned_seconds=plan.seconds,
        peak_gib=round(max([measured.peak_bytes / GIB, *(line.get("peak_gib") or 0.0 for line in logged)]), 3),
        planned_gib=round(measured.planned_bytes / GIB, 3),
        phases_gib=highest_of([*(line.get("phases_gib") or {} for line in logged), measured.phases_gib]),
        device=str(trainer.device),
        teacher=_name(config.teacher.model),
        student=_name(config.student.model),
        versions={name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate")}
        | {"python": platform.python_version()},
        commit=_commit(),
        processes=trainer.processes.count,
    )
    load_adapter(trainer.student, trainer.best_checkpoint / "adapter")
    keep_last_answers(trainer)
    with folder_aside(run_dir.adapter_path) as folder:
        save_adapter(trainer.student, folder)
        # The student was trained on this template, so it must be asked with it.
        pair.student.chat_template = template_source(encoder)
        pair.student.save_pretrained(folder)
        # Responses ended at either model's token; another program that knows the base's alone would run on.
        GenerationConfig(eos_token_id=pair.eos_token_id, pad_token_id=pair.pad_id).save_pretrained(folder)
        add_older_keys(folder)
        (folder / "README.md").write_text(adapter_card(config, asdict(summary)), encoding="utf-8")
        write_manifest(folder, pattern="*.safetensors")  # the rest is the user's to edit
        shutil.rmtree(run_dir.adapter_path, ignore_errors=True)  # of a run that ended before its summary was written
    run_dir.write_json("summary.json", asdict(summary))
    for doubt in doubts(config, summary):
        logger.warning(doubt)
    return summary


def doubts(config: RunConfig, summary: Summary) -> list[str]:
    """Why the result is perhaps not what somebody wanted, in a sentence each."""
    found = []
    if got_worse(asdict(summary)):
        start = "student.init_adapter" if config.student.init_adapter else "the student as it was"
        found.append(
            f"The student got worse: no validation was better than the one before the first step. The adapter is the "
            f"least bad, that of step {summary.best_step}; {start} is better by this figure. Train with a lower "
            "train.learning_rate."
        )
    if config.data.adaptive_share and not summary.rollout_batches:
        found.append(
            f"The student wrote none of the {summary.steps} batches; all were the data's own responses. Its share "
            "grows when a validation finds the loss on held-out responses risen by data.share_tolerance_nats="
            f"{config.data.share_tolerance_nats:g}, which it does where the student was fine-tuned on the task before: "
            "qswitch sft, then student.init_adapter (docs/methods.md)."
        )
    return found


def _bytes_of(sequences: Sequence[TrainingSequence], pair: TokenizerPair) -> int:
    """Of the learnt tokens of some sequences as UTF-8 text."""
    learnt = ([s.response_ids[step] for step in s.loss_steps] for s in sequences)
    return sum(len(pair.tokenizer.decode(ids, skip_special_tokens=True).encode()) for ids in learnt)


def _name(reference: str | list[str]) -> str:
    return reference if isinstance(reference, str) else reference[0]


def _commit() -> str | None:
    """The commit of a source checkout; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
