"""A whole run from a configuration: plan, data, models, training, the final adapter and its summary.

`distill` is what `qswitch distill` calls. It reads top to bottom; every part lives in its own module.
"""

from __future__ import annotations

import logging
import platform
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from qswitch.config import RunConfig
from qswitch.data.gather import RunPrompts
from qswitch.data.template import PromptEncoder, template_source
from qswitch.distill.checkpoint import checkpoint_name
from qswitch.distill.metrics import peak_bytes
from qswitch.distill.progress import Progress, total_steps
from qswitch.distill.recovery import Recovery, Sizes, limit_device_memory
from qswitch.distill.trainer import Trainer
from qswitch.models.host_memory import bound_kernel_cache, release_memory, return_freed_memory
from qswitch.models.load import load_teacher
from qswitch.models.pair import TokenizerPair
from qswitch.models.runtime import make_runtime
from qswitch.models.shrink import shrink_to_folder
from qswitch.models.student import load_adapter, load_student, save_adapter
from qswitch.plan.adapters import find_adapter
from qswitch.plan.machine import detect_budget_bytes
from qswitch.plan.memory import CUDA_CONTEXT_BYTES
from qswitch.plan.scheduler import Plan, plan_run, require_fit
from qswitch.preflight import Prepared, prepare
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
    best_step: int
    steps: int
    steps_without_loss: int
    """Steps whose rollouts held no intervention, so that nothing was learnt."""
    validation_prompts: int
    validation_tokens: int
    rollout_tokens: int
    trained_tokens: int
    seconds: float
    """Training, validation and start-up apart."""
    peak_gib: float
    planned_gib: float
    device: str
    teacher: str
    student: str
    versions: dict[str, str]
    commit: str | None


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; a checkpoint of the last finished step is on disk."""


def distill(
    config: RunConfig,
    run_dir: RunDir,
    *,
    resume: bool = False,
    budget_bytes: int | None = None,
    prepared: Prepared | None = None,
) -> Summary:
    """Run or resume a distillation in `run_dir`; `prepared` is what a preflight has loaded already.

    Raises:
        PlanError: the plan does not fit the memory; nothing was loaded.
        DataError, ModelError, TrainingError: as their messages say.
        Interrupted: stopped by SIGINT or SIGTERM, resumable.
    """
    progress = Progress(total_steps=total_steps(config.train))
    memory_bytes = budget_bytes if budget_bytes is not None else detect_budget_bytes(config.train.device)[0]
    plan = plan_run(config, budget_bytes=memory_bytes)
    require_fit(plan)

    prepared = prepared or prepare(config, notify=progress.loading)
    pair, encoder, data = prepared.pair, prepared.encoder, prepared.prompts
    run_dir.write_json("data.json", data.report.to_dict())
    plan = plan_for_data(config, plan, data)
    run_dir.write_json("plan.json", plan.to_dict())
    progress.say(f"{data.report.training_prompts} training prompts, {len(data.held_out)} held out")
    runtime = make_runtime(config.train)
    if runtime.device.type == "cuda" and budget_bytes is not None:
        limit_device_memory(runtime.device, budget_bytes, CUDA_CONTEXT_BYTES)
    elif runtime.device.type == "cpu":
        return_freed_memory()
        bound_kernel_cache()
    if config.student.shrink_to_layers is not None and not run_dir.student_base_path.exists():
        report = shrink_to_folder(
            config.student.model,
            config.student.shrink_to_layers,
            run_dir.student_base_path,
            revision=config.student.revision,
            trust_remote_code=config.student.trust_remote_code,
        )
        progress.say(f"student cut to {len(report.kept)} layers; dropped {', '.join(map(str, report.dropped))}")
    loaded = f"the teacher ({config.teacher.precision}) and the student" if config.needs_teacher else "the student"
    progress.say(f"loading {loaded} on {runtime.device}")
    teacher = load_teacher(config.teacher, runtime, vocab_size=pair.vocab_size) if config.needs_teacher else None
    student = load_student(config, runtime, vocab_size=pair.vocab_size, base_path=run_dir.student_base_path)
    # Also when a run is resumed that was stopped before its first checkpoint.
    if config.student.init_adapter is not None and not (resume and run_dir.latest_checkpoint() is not None):
        load_adapter(student, find_adapter(config.student.init_adapter, "student.init_adapter"))
    for model in (teacher, student):
        if model is not None:
            verify_kv(model, blocks=config.rollout.block_tokens != 0)

    release_memory(runtime.device)  # what loading left behind would add to the peak of training

    def planned_bytes_of(sizes: Sizes) -> int:
        changed = sizes.write_into(config)
        return plan_for_data(changed, plan_run(changed), data).total_bytes

    recovery = Recovery(
        Sizes.of(config),
        runtime.device,
        planned_bytes=plan.total_bytes,
        planned_bytes_of=planned_bytes_of,
        say=progress.say,
        budget_bytes=memory_bytes,
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
        progress=progress,
    )
    if resume:
        trainer.resume()
    with _stop_on_signal(trainer, progress):
        trainer.run()
    if not trainer.finished:
        raise Interrupted
    return _finish(config, run_dir, trainer, pair, encoder, recovery.planned_bytes or plan.total_bytes)


def plan_for_data(config: RunConfig, plan: Plan, data: RunPrompts) -> Plan:
    """The plan for prompts as long as the longest there is, not as the longest allowed, where all are in memory."""
    if not isinstance(data.train, list):
        return plan  # streamed: the longest is not known before it comes
    longest = max((len(p.prompt_ids) for p in [*data.train, *data.held_out]), default=1)
    if longest >= config.data.max_prompt_tokens:
        return plan
    shorter = config.model_copy(update={"data": config.data.model_copy(update={"max_prompt_tokens": longest})})
    tight = plan_run(shorter)
    note = f"For the data's longest prompt, {longest} tokens; for data.max_prompt_tokens {plan.total_gib:.2f} GiB."
    return replace(tight, budget_bytes=plan.budget_bytes, config=config, notes=(*plan.notes, note))


def _finish(
    config: RunConfig, run_dir: RunDir, trainer: Trainer, pair: TokenizerPair, encoder: PromptEncoder, planned: int
) -> Summary:
    """Put the best adapter, its tokenizer and a model card into RUN/adapter, and write the summary."""
    counters = trainer.counters
    assert counters.before_nats is not None and counters.last_nats is not None
    figures = {"before": counters.before_nats, "after": counters.best_nats, "last": counters.last_nats}
    kl, response_loss = (figures, {}) if config.needs_teacher else ({}, figures)
    load_adapter(trainer.student, run_dir.checkpoints_path / checkpoint_name(counters.best_step) / "adapter")
    save_adapter(trainer.student, run_dir.adapter_path)
    # The student was trained on this template, so it must be asked with it.
    pair.student.chat_template = template_source(encoder)
    pair.student.save_pretrained(run_dir.adapter_path)
    # Responses ended at either model's token; another program that knows the base's alone would run on.
    eos_ids = pair.eos_ids[0] if len(pair.eos_ids) == 1 else list(pair.eos_ids)
    GenerationConfig(eos_token_id=eos_ids, pad_token_id=pair.pad_id).save_pretrained(run_dir.adapter_path)
    summary = Summary(
        method=config.method,
        kl_before_nats=kl.get("before"),
        kl_after_nats=kl.get("after"),
        kl_last_nats=kl.get("last"),
        response_loss_before_nats=response_loss.get("before"),
        response_loss_after_nats=response_loss.get("after"),
        response_loss_last_nats=response_loss.get("last"),
        best_step=counters.best_step,
        steps=trainer.step,
        steps_without_loss=counters.steps_without_loss,
        validation_prompts=trainer.validation.num_prompts,
        validation_tokens=trainer.validation.num_tokens,
        rollout_tokens=counters.rollout_tokens,
        trained_tokens=counters.trained_tokens,
        seconds=round(counters.seconds, 1),
        peak_gib=round(peak_bytes(trainer.device) / GIB, 3),
        planned_gib=round(planned / GIB, 3),
        device=str(trainer.device),
        teacher=_name(config.teacher.model),
        student=_name(config.student.model),
        versions={name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate")}
        | {"python": platform.python_version()},
        commit=_commit(),
    )
    run_dir.write_json("summary.json", asdict(summary))
    (run_dir.adapter_path / "README.md").write_text(adapter_card(config, summary), encoding="utf-8")
    return summary


def adapter_card(config: RunConfig, summary: Summary) -> str:
    """The model card of RUN/adapter, Hugging Face layout."""
    licences = (
        "\n".join(f"- {model}: {licence}" for model, licence in config.about.licences.items()) or "- see the models"
    )
    if config.needs_teacher:
        made = f"distilled from {summary.teacher}"
        figure, before, after = "KL(teacher \\|\\| student)", summary.kl_before_nats, summary.kl_after_nats
    else:
        made = "fine-tuned"
        figure, before, after = (
            "Cross-entropy of the responses", summary.response_loss_before_nats, summary.response_loss_after_nats
        )  # fmt: skip
    responses = f"rollout policy `{config.rollout.policy}`, " if config.writes_rollouts else ""
    imitates = config.loss.objective == "divergence"
    loss = f"`{config.loss.divergence}` over `{config.loss.scope}`" if imitates else "`cross_entropy`"
    return f"""---
library_name: peft
tags: [distillation, {config.method}, qswitch]
---
# {summary.student}, {made}

Trained with qswitch (preset `{config.about.name}`), method `{config.method}`, {responses}loss {loss}, {summary.steps}
steps.{" SWITCH is by Koo et al., Findings of NAACL 2025." if config.method == "switch" else ""}

| {figure}, nats per token, {summary.validation_prompts} held-out prompts | |
|---|---|
| before | {before:.4f} |
| after | {after:.4f} |

Licences of the models it is made from:
{licences}
"""


def _name(reference: str | list[str]) -> str:
    return reference if isinstance(reference, str) else reference[0]


def _commit() -> str | None:
    """The commit of a source checkout; None for an installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


@contextmanager
def _stop_on_signal(trainer: Trainer, progress: Progress) -> Iterator[None]:
    """The first SIGINT or SIGTERM ends the run after the current step, with a checkpoint; the second at once."""

    def request(signum: int, _frame: Any) -> None:
        if trainer.stop_requested:
            raise KeyboardInterrupt
        trainer.stop_requested = True
        progress.say("stopping after this step, with a checkpoint; press Ctrl-C again to stop at once")

    previous = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
