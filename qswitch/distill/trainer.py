"""The training loop: take a step from the supply, let the learner learn it, validate, save, log.

One step reads top to bottom in `Trainer.train_step`, a run in `Trainer.run`. Of several processes each runs this loop,
in step with the others; the first one writes. Knows no command line; talks to the user through a `Progress`.
The file is long because the loop stands in one place with all that it looks at, saves and resumes from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qswitch.config import RunConfig
from qswitch.data.gather import Prompts
from qswitch.data.loader import PassageLoader
from qswitch.data.template import Prompt
from qswitch.distill.budget import spent_shares
from qswitch.distill.checkpoint import (
    Stateful,
    checkpoint_name,
    load_checkpoint,
    newest_whole,
    rotate_checkpoints,
    save_checkpoint,
    set_aside,
)
from qswitch.distill.decoding import Decoding
from qswitch.distill.held_rows import HeldRows, make_cache
from qswitch.distill.learner import Learner
from qswitch.distill.logit_cache import LogitCache
from qswitch.distill.metrics import Clock, Counters, StepReport
from qswitch.distill.optimizer import end_trackers, make_accelerator, numbers_of
from qswitch.distill.own_responses import own_figures
from qswitch.distill.phase_peaks import PhasePeaks, highest_of, in_gib_beside
from qswitch.distill.processes import Processes
from qswitch.distill.progress import Progress, total_steps
from qswitch.distill.recovery import MemoryFloorError, Recovery, Sizes
from qswitch.distill.stored_teacher import StoredTeacher
from qswitch.distill.supply import Supply
from qswitch.distill.validation import ResponseLoss, Validation, written_by_teacher
from qswitch.errors import NonFiniteError, TrainingError
from qswitch.manifest import find_damage, read_manifest
from qswitch.models.language_model import LanguageModel
from qswitch.models.pair import TokenizerPair
from qswitch.rollout.adaptive_threshold import AdaptiveThreshold
from qswitch.rollout.policy import make_policy
from qswitch.rollout.transcript import rollout_record
from qswitch.run_dir import RunDir
from qswitch.units import GIB

ROLLOUTS_LOGGED_PER_STEP = 2
AT_THE_FLOOR = (
    "Free memory, or go on with the run on a larger device; for this one start anew with a smaller "
    "rollout.max_new_tokens or data.max_prompt_tokens, or teacher.residency=swap."
)
"""What to do where memory runs out and nothing is left to shrink."""


class Trainer:
    """Trains a student on rollouts. Owns what a run must remember, and names each part of it once, in `parts`."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: RunDir,
        *,
        teacher: LanguageModel | None,
        student: LanguageModel,
        pair: TokenizerPair,
        prompts: Prompts,
        validation_prompts: Sequence[Prompt],
        corpus: Tensor | None = None,
        recovery: Recovery | None = None,
        peaks: PhasePeaks | None = None,
        progress: Progress | None = None,
        processes: Processes | None = None,
        stored: StoredTeacher | None = None,
    ) -> None:
        self.processes = processes or Processes()
        self.config, self.run_dir, self.pair = config, run_dir, pair
        self.teacher, self.student = teacher, student
        self.progress = progress or Progress(total_steps=total_steps(config.train))
        self.device = student.device
        self.counters = Counters()
        self.stop_requested = False

        self.accelerator = make_accelerator(config, run_dir, student)
        self.recovery = recovery or Recovery(Sizes.of(config), self.device)
        self.peaks = peaks or PhasePeaks(self.device)
        self.cache: LogitCache | StoredTeacher = stored or make_cache(
            config, run_dir, teacher=teacher, student=student, vocab_size=pair.vocab_size, processes=self.processes
        )
        self.learner = Learner(
            config,
            student=student,
            cache=self.cache,
            pad_id=pair.pad_id,
            corpus=PassageLoader(corpus, config.loss.lm_passage_tokens, config.seed) if corpus is not None else None,
            accelerator=self.accelerator,
            recovery=self.recovery,
            spent=lambda: self.spent,
            processes=self.processes,
            say=self.progress.say,
        )
        self.processes.copy_from_first(self.learner.trainable)
        response_loss = None
        if not config.learns_from_teacher or config.data.adaptive_share:
            response_loss = ResponseLoss(validation_prompts, pad_id=pair.pad_id, processes=self.processes)
        self.response_loss = response_loss
        """The loss on held-out responses, where something is decided by it."""
        self.validation: Validation | ResponseLoss
        if stored is not None:
            owners = self.processes.divide([len(p.prompt_ids) for p in validation_prompts])
            self.validation = Validation(
                stored.held_out(validation_prompts, owners), stored.held_out_targets, pad_id=pair.pad_id,
                processes=self.processes,
            )  # fmt: skip
        elif teacher is None:
            assert response_loss is not None
            self.validation = response_loss
        else:
            self.progress.say(f"the teacher answers the {len(validation_prompts)} held-out prompts")
            self.peaks.enter("rollout")
            try:
                self.validation = written_by_teacher(
                    validation_prompts,
                    teacher,
                    max_new_tokens=config.rollout.max_new_tokens,
                    eos_ids=pair.eos_ids,
                    pad_id=pair.pad_id,
                    recovery=self.recovery,
                    processes=self.processes,
                )
            except NonFiniteError as error:
                raise teacher_at_fault(f"{error} No step was taken.{self._of_fp16()}", config) from error
            except MemoryFloorError as error:
                raise MemoryFloorError(f"{error} The held-out prompts have no answers yet. {AT_THE_FLOOR}") from error
        threshold = None
        if AdaptiveThreshold.is_needed(config.rollout):
            threshold = AdaptiveThreshold(config.rollout)
            threshold.expected_tokens = self.validation.num_tokens / self.validation.num_prompts
        policy = make_policy(config.rollout, None if threshold is None else threshold.threshold)
        decoding = Decoding(
            config, run_dir, teacher=teacher if policy.uses_teacher else None, student=student,
            num_rows=self.recovery.sizes.rollout_rows, progress=self.progress, processes=self.processes,
        )  # fmt: skip
        self.supply = Supply(  # last: a swapped teacher leaves here
            config,
            teacher=teacher,
            objective=self.learner.objective,
            pair=pair,
            prompts=prompts,
            threshold=threshold,
            cache=self.cache,
            decoding=decoding,
            recovery=self.recovery,
            processes=self.processes,
            stored=stored,
        )
        parts: dict[str, Stateful | None] = {
            "counters": self.counters,
            "validation": self.validation,
            "sizes": self.recovery,
            "optimizer": self.learner.optimizer,
            "loss_scale": self.learner.loss_scale,
            "schedule": self.learner.schedule,
            "corpus": self.learner.corpus,
            "loader": self.supply.loader,
            "acceptance": decoding.acceptance,
            "adaptive_share": self.supply.share,
            "threshold": threshold,
            "replay": self.supply.replay,
            "prepared": self.supply.prepared,
            "cache": HeldRows(self.supply, self.processes),
        }
        self.parts = {name: part for name, part in parts.items() if part is not None}
        """What a checkpoint holds beside the student's weights."""

    @property
    def step(self) -> int:
        """Optimizer steps that are finished."""
        return self.counters.step

    @property
    def spent(self) -> float:
        """Share of the budget that is spent, of steps, tokens or seconds: the largest."""
        return max(self._spent_shares.values())

    @property
    def _spent_shares(self) -> dict[str, float]:
        counters = self.counters
        tokens, seconds = counters.response_tokens, counters.seconds
        return spent_shares(self.config.train, step=self.step, tokens=tokens, seconds=seconds)

    @property
    def finished(self) -> bool:
        """Whether the budget is spent."""
        return self.spent >= 1

    # ---------------------------------------------------------------- the loop

    def run(self) -> Counters:
        """Train until the budget is spent, or until `stop_requested`; a stop leaves a checkpoint.

        Raises:
            MemoryFloorError: no size is left to shrink; a checkpoint of the last finished step is on disk.
            TrainingError: a model computed NaN or infinity; names the model, the step and what to do.
        """
        train, counters = self.config.train, self.counters
        if counters.before_nats is None:
            self.progress.say(f"validating before the first step, on {self.validation.num_tokens} tokens")
            counters.before_nats = counters.last_nats = self.validate()
            counters.before_nats_by_prompt = self.validation.nats_by_prompt
            share = self._adapt_share()
            counters.own_before = self.own_figures()
            self.progress.validated(0, self.validation.what, counters.before_nats, counters.own_before)
            self._track({self.validation.key: counters.before_nats, "own": counters.own_before, **share})
        with self.progress:
            while not self.finished:
                started = time.perf_counter()
                try:
                    report = self.train_step()
                except MemoryFloorError as error:
                    self.save()
                    raise self._at_the_floor(error) from error
                except NonFiniteError as error:
                    text, role = f"{error} Step {self.step + 1} was not taken.", error.role
                    raise self.processes.from_first(lambda: self._not_finite(text, role)) from error  # noqa: B023
                counters.count(report, self._compare_notes(time.perf_counter() - started))
                self.learner.schedule.step()  # by what is spent now
                self.log(report)
                improved = False
                if self.step % train.eval_steps == 0 or self.finished:
                    counters.last_nats = nats = self.validate()
                    by_prompt, own = self.validation.nats_by_prompt, self.own_figures()
                    self.progress.validated(self.step, self.validation.what, nats, own)
                    line = {"step": self.step, self.validation.key: nats, **({"own": own} if own else {})}
                    line = {**line, **self._adapt_share()}
                    self.run_dir.append_metrics(line)
                    self._track(line)
                    improved = nats < counters.best_nats
                    if improved:
                        counters.best_nats, counters.best_step = nats, self.step
                        counters.best_nats_by_prompt, counters.own_best = by_prompt, own
                # Read once, after the validation: a stop asked for meanwhile must find its checkpoint.
                stop = any(self.processes.gather(self.stop_requested))
                if improved or stop or self.finished or self.step % train.save_steps == 0:
                    self.save()
                if stop:
                    break
        if self.finished:
            self.progress.say(f"ended after {self.step:,} steps: {self._ended_by()}")
        end_trackers(self.accelerator)
        return counters

    def _ended_by(self) -> str:
        """The limits that are reached, with what was counted."""
        counted = {
            "max_steps": f"{self.step:,}",
            "max_tokens": f"{self.counters.response_tokens:,}",
            "max_seconds": f"{self.counters.seconds:,.0f}",
        }
        reached = [name for name, share in self._spent_shares.items() if share >= 1]
        return " and ".join(
            f"train.{name}={getattr(self.config.train, name):,} is reached ({counted[name]})" for name in reached
        )

    def train_step(self) -> StepReport:
        """One optimizer step: its sequences and the teacher's outputs, the loss, the update."""
        report = StepReport()
        clock = Clock(report.seconds)
        self.peaks.enter("rollout")
        prepared = self.supply.next(self.step, self.spent, report, clock)
        sequences = [s for s in prepared.sequences if s.loss_steps]
        report.batch, report.written_tokens = prepared.batch, prepared.num_written
        report.loss_tokens = sum(len(s.loss_steps) for s in sequences)
        self.peaks.enter("train")
        learnt = self.learner.learn_step(sequences, self.step)
        if learnt is not None:
            report.loss, report.lm_loss, report.grad_norm, report.overflows = learnt
        clock.lap("loss")
        self.learner.update(report.loss)
        self.supply.taken(self.step)
        clock.lap("optimizer")
        return report

    def _compare_notes(self, seconds: float) -> float:
        """Agree on what a step took: the first process's seconds, the smallest sizes, the highest peak."""
        notes = self.processes.gather(
            (seconds, self.recovery.sizes, self.recovery.take_events(), self.peaks.take(), self.peaks.highest_bytes)
        )
        self.recovery.lower_to([sizes for _, sizes, _, _, _ in notes])
        self._events = [event for _, _, events, _, _ in notes for event in events]
        self._phases = highest_of(peaks for _, _, _, peaks, _ in notes)
        self._peak_bytes = max(peak for _, _, _, _, peak in notes)
        return notes[0][0]

    def _at_the_floor(self, error: MemoryFloorError) -> MemoryFloorError:
        return MemoryFloorError(
            f"{error} Step {self.step} was not taken; the checkpoint of step {self.step} in "
            f"{self.run_dir.checkpoints_path} has all before it. {AT_THE_FLOOR}"
        )

    def _not_finite(self, text: str, role: str = "student") -> TrainingError:
        """`text` with what to do about it; the folders that it names exist."""
        text += self._of_fp16()
        if role == "teacher":
            return teacher_at_fault(text, self.config)
        failed = self.run_dir.checkpoints_path / checkpoint_name(self.step)
        if failed.is_dir():  # with these weights the step would fail again, whatever the rate
            text += f" The checkpoint of step {self.step} holds the same weights; it is now {set_aside(failed).name}."
        lower = f"--set train.learning_rate={self.config.train.learning_rate / 10:.6g}"
        newest = self.run_dir.latest_checkpoint()
        if newest is not None:
            command = f"qswitch distill --resume {self.run_dir.path} {lower}"
            return TrainingError(f"{text} Go on from {newest.name} with a lower rate: {command}")
        if self.step == 0:
            return TrainingError(
                f"{text} The student had learnt nothing yet, so its own files or student.precision="
                f"{self.config.student.precision} are at fault. Set student.precision=fp32, or use another student."
            )
        return TrainingError(f"{text} There is no earlier checkpoint. Start a new run with {lower}.")

    def _of_fp16(self) -> str:
        if self.student.compute_dtype != torch.float16:
            return ""
        return " It computed in fp16, which holds nothing above 65,504: train.compute_dtype=fp32 has the range."

    # ---------------------------------------------------------------- looking

    def validate(self) -> float:
        """KL(teacher || student) on the held-out prompts, or the loss on their responses; nats per token.

        Raises:
            TrainingError: it is not finite.
        """
        return self._held_out_nats(self.validation)

    def _held_out_nats(self, held_out: Validation | ResponseLoss) -> float:
        def sizes() -> tuple[int, int]:
            return self.recovery.sizes.chunk_tokens, self.recovery.sizes.validation_rows

        attempt = partial(self.recovery.attempt, "validation")
        self.peaks.enter("validate")
        nats = held_out.nats(self.learner.objective, self.device, sizes, attempt)
        if not math.isfinite(nats):  # the teacher's side was written, and found finite, before the first step
            text = f"The student's {held_out.what} is {nats} after step {self.step}."
            raise self.processes.from_first(lambda: self._not_finite(text))
        return nats

    def own_figures(self) -> dict[str, Any] | None:
        """What the teacher makes of the student's own responses to a few held-out prompts; None where nobody asks."""
        if self.teacher is None or not self.config.train.eval_own_prompts:
            return None
        try:
            return self.processes.from_first(self._measure_own)
        except NonFiniteError as error:
            text, role = f"{error} It wrote its own responses after step {self.step}.", error.role
            raise self.processes.from_first(lambda: self._not_finite(text, role)) from error

    def _measure_own(self) -> dict[str, Any]:
        assert self.teacher is not None
        self.peaks.enter("rollout")
        self.supply.teacher_comes()
        try:
            return own_figures(
                self.validation.sequences[: self.config.train.eval_own_prompts],
                student=self.student,
                teacher=self.teacher,
                max_new_tokens=self.config.rollout.max_new_tokens,
                pair=self.pair,
                recovery=self.recovery,
            )
        finally:
            self.supply.teacher_leaves()

    def _adapt_share(self) -> dict[str, float]:
        """Let the share of student-written batches hear of the loss on held-out responses; both, for the metrics."""
        share, held_out = self.supply.share, self.response_loss
        if share is None or held_out is None:
            return {}
        loss = self._held_out_nats(held_out)
        if share.observe(loss):
            self.progress.say(f"{held_out.what} rose to {loss:.3f}: student writes {share.phi:.0%}")
        return {held_out.key: loss, "student_batch_share": share.phi}

    def log(self, report: StepReport) -> None:
        """Write the step's line of metrics.jsonl, a sample of its rollouts, and tell the progress display."""
        policy, planned = self.supply.policy, self.recovery.planned_bytes
        report.read_rollouts(two_writers=policy.uses_teacher and policy.uses_student)
        metrics: dict[str, Any] = {
            "step": self.step,
            **report.metrics(),
            "learning_rate": self.learner.schedule.learning_rate,
            "loss_scale": self.learner.loss_scale.value if self.learner.loss_scale.used else None,
            "spent": round(self.spent, 6),
            "peak_gib": self._peak_bytes / GIB,
            "planned_gib": None if planned is None else planned / GIB,
            "phases_gib": in_gib_beside(self._phases, self.peaks.planned),
            "out_of_memory": self._events,
        }
        self.run_dir.append_metrics(metrics)
        sample = report.rollouts[:ROLLOUTS_LOGGED_PER_STEP]
        self.run_dir.append_rollouts([rollout_record(r, self.pair.tokenizer, step=self.step) for r in sample])
        self._track(metrics)
        self.progress.stepped(metrics)

    def _track(self, line: Mapping[str, Any]) -> None:
        """Let the trackers of train.report_to hear of a step or a validation."""
        if self.config.train.report_to:
            self.accelerator.log(numbers_of(line), step=self.step)

    # ---------------------------------------------------------------- saving

    def save(self) -> None:
        """Write a checkpoint of the current step and drop the oldest beyond the limit, never the best.

        Raises:
            TrainingError: the student's weights are not finite; nothing was written.
        """
        if not all(bool(torch.isfinite(p).all()) for p in self.learner.trainable):
            text = f"The student's weights are NaN or infinite after step {self.step}."
            raise self.processes.from_first(lambda: self._not_finite(text))
        self._hold_together()
        states = {name: part.state_dict() for name, part in self.parts.items()}
        self.processes.from_first(lambda: self._write(states))

    def _hold_together(self) -> None:
        """Every process has added the same numbers to the same weights; unlike GPUs may yet round them differently."""
        if self.processes.count == 1:
            return
        found = self.processes.gather(torch.stack([p.detach().double().sum() for p in self.learner.trainable]).tolist())
        if any(sums != found[0] for sums in found):
            self.progress.say("the processes' students differ by rounding; all go on with that of the first")
            self.processes.copy_from_first(self.learner.trainable)

    def _write(self, states: Mapping[str, Any]) -> None:
        save_checkpoint(
            self.run_dir.checkpoints_path,
            step=self.step,
            student=self.student,
            states=states,
            known=self.run_dir.as_written(),
        )
        if self.supply.threshold is not None:
            self.run_dir.write_json(self.run_dir.threshold_path.name, self.supply.threshold.state_dict())
        rotate_checkpoints(
            self.run_dir.checkpoints(),
            keep=self.config.train.save_total_limit,
            protected={self.best_checkpoint.name} if self.counters.best_step >= 0 else set(),
        )

    @property
    def best_checkpoint(self) -> Path:
        """The one whose validation was best."""
        return self.run_dir.checkpoints_path / checkpoint_name(self.counters.best_step)

    def resume(self) -> bool:
        """Go back to the newest whole checkpoint; False where there is none.

        Raises:
            RunDirError: checkpoints are there, and none of them can be used.
        """
        folder = self.processes.from_first(self._newest_checkpoint)
        if folder is None:
            self.run_dir.truncate_logs(0)
            return False
        self.processes.everyone(lambda: load_checkpoint(folder, student=self.student, parts=self.parts))
        self.run_dir.truncate_logs(self.step)
        self.progress.resumed(self.step)
        self.replace_damaged_best()
        return True

    def _newest_checkpoint(self) -> Path | None:
        """The newest whole one; damaged ones after it are set aside, and what has changed since it is said."""
        folder, damaged = newest_whole(self.run_dir.checkpoints())
        if folder is None:
            return None
        for other, reason in damaged.items():
            name = set_aside(other).name
            self.progress.say(f"checkpoint {other.name} is damaged: {reason}; it is now {name}, {folder.name} is used")
        for difference in self.run_dir.changed_since(read_manifest(folder) or {}):
            self.progress.say(difference)
        return folder

    def replace_damaged_best(self) -> None:
        """Where the files of the best checkpoint are not as they were written, that of this step takes its place."""
        if self.counters.best_step < 0:
            return
        damage = self.processes.from_first(lambda: find_damage(self.best_checkpoint))
        if damage is None:
            return
        self.progress.say(
            f"the best checkpoint, {self.best_checkpoint.name}, is damaged: {damage}; "
            f"{checkpoint_name(self.step)} takes its place"
        )
        self.counters.best_nats, self.counters.best_step = self.validate(), self.step
        self.counters.best_nats_by_prompt, self.counters.own_best = self.validation.nats_by_prompt, None
        if self.processes.from_first(lambda: find_damage(self.best_checkpoint)) is not None:
            self.save()


def teacher_at_fault(text: str, config: RunConfig) -> TrainingError:
    """`text`, which says what the teacher computed, with what to do about it."""
    return TrainingError(
        f"{text} The teacher does not learn, so no learning rate is at fault: its files or teacher.precision="
        f"{config.teacher.precision} are. Set teacher.precision=fp32 or bf16, download its files again, or use another "
        "teacher, and start a new run."
    )
