"""The training loop: fetch prompts, roll out, cache teacher outputs, learn, validate, save, log.

One optimizer step reads top to bottom in `Trainer.train_step`. Knows no command line; talks to the user through a
`Progress`.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import get_scheduler

from qswitch.config import RunConfig
from qswitch.data.loader import BlockLoader, PromptLoader
from qswitch.data.prompts import Prompt
from qswitch.distill.batch_source import AdaptiveShare, Source
from qswitch.distill.checkpoint import (
    checkpoint_name,
    load_checkpoint,
    load_replay,
    rotate_checkpoints,
    save_checkpoint,
    seed_step,
)
from qswitch.distill.logit_cache import LogitCache
from qswitch.distill.objective import (
    StudentObjective,
    TrainingSequence,
    collate,
    collate_with_labels,
    ground_truth_sequence,
)
from qswitch.distill.progress import Progress
from qswitch.distill.prompts import Prompts
from qswitch.distill.replay import ReplayBuffer, ReplayEntry, split_step, staleness_nats
from qswitch.distill.validation import ResponseLoss, Validation
from qswitch.errors import TrainingError
from qswitch.models.language_model import LanguageModel
from qswitch.models.pair import TokenizerPair
from qswitch.rollout.block_length import (
    Acceptance,
    AutoBlock,
    BlockLength,
    FixedBlock,
    PassTimes,
    drafts_within_scratch,
)
from qswitch.rollout.decode import Rollout, RolloutRequest, RolloutStats, rollout, score_responses
from qswitch.rollout.pass_times import measure_pass_times
from qswitch.rollout.policy import TEACHER, make_policy
from qswitch.rollout.sampling import row_keys, uniform
from qswitch.rollout.transcript import rollout_record
from qswitch.run_dir import RunDir

GIB = 2**30
ROLLOUTS_LOGGED_PER_STEP = 2
_GROUND_TRUTH_COIN = -1
"""Example id of the per-step coin of data.ground_truth_mix; records count from 0."""


@dataclass(slots=True)
class Counters:
    """Totals of a run, kept across a resume."""

    seconds: float = 0.0
    rollout_tokens: int = 0
    trained_tokens: int = 0
    steps_without_loss: int = 0
    best_nats: float = math.inf
    """Lowest of the validations: KL from the teacher, or the response loss where no teacher is loaded."""
    best_step: int = -1
    before_nats: float | None = None
    last_nats: float | None = None


@dataclass(slots=True)
class StepReport:
    """What one optimizer step did; becomes a line of metrics.jsonl."""

    loss: float | None = None
    grad_norm: float | None = None
    batch: Source = "rollout"
    loss_tokens: int = 0
    replayed: int = 0
    """Sequences that had trained before."""
    staleness_nats: float | None = None
    """Mean KL(student that wrote || student that trains) over a sample of them."""
    teacher_share: float | None = None
    jsd_bits: float | None = None
    rollout: RolloutStats = field(default_factory=RolloutStats)
    rollouts: list[Rollout] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Trains a student on rollouts. Owns the optimizer, the cache and the loaders; borrows models and data."""

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
        planned_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        train, cache = config.train, config.cache
        self.config, self.run_dir, self.pair = config, run_dir, pair
        self.teacher, self.student = teacher, student
        self.progress = progress or Progress(total_steps=train.max_steps)
        self.policy = make_policy(config.rollout)
        self.imitates = config.loss.objective == "divergence"
        """Whether the loss reads the teacher's outputs, rather than the written tokens alone."""
        self.planned_bytes = planned_bytes
        self.stop_requested = False

        self.accelerator = _make_accelerator(config, run_dir, student)
        self.device = student.device
        self.objective = StudentObjective(student, config.loss)
        trainable = [p for p in student.parameters() if p.requires_grad]
        optimizer = _make_optimizer(config, trainable)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.objective, optimizer)
        self.trainable = trainable
        self.lr_scheduler = get_scheduler(
            train.lr_scheduler_type,
            optimizer,
            num_warmup_steps=train.warmup_steps,
            num_training_steps=train.max_steps,
        )

        self.loader = PromptLoader(prompts, config.seed)
        self.corpus = BlockLoader(corpus, config.loss.lm_block_tokens, config.seed) if corpus is not None else None
        self.cache = LogitCache(
            cache.format,
            vocab_size=pair.vocab_size,
            device=self.device,
            dtype=student.compute_dtype if teacher is None else teacher.compute_dtype,
            device_budget_bytes=int(cache.device_budget_gib * GIB),
            host_budget_bytes=int(cache.host_budget_gib * GIB),
            disk_path=run_dir.path / "cache",
            topk=cache.topk,
        )
        self.validation = (
            ResponseLoss(validation_prompts, pad_id=pair.pad_id, batch_size=config.rollout.batch_size)
            if teacher is None
            else Validation(
                validation_prompts,
                teacher,
                max_new_tokens=config.rollout.max_new_tokens,
                eos_ids=pair.eos_ids,
                pad_id=pair.pad_id,
                batch_size=config.rollout.batch_size,
            )
        )
        self.replay = ReplayBuffer(config.rollout.replay_capacity, config.rollout.replay_max_age_steps, config.seed)
        self.share: AdaptiveShare | None = None
        if config.data.adaptive_share:
            self.share = AdaptiveShare(config.data.share_tolerance_nats)
            self.response_loss = ResponseLoss(
                validation_prompts, pad_id=pair.pad_id, batch_size=config.rollout.batch_size
            )
        self.acceptance = Acceptance()
        self.blocks = self._make_blocks()
        self.step = 0
        self.counters = Counters()
        self._tracking = bool(train.report_to)

    # ---------------------------------------------------------------- the loop

    def run(self) -> Counters:
        """Train from the current step to train.max_steps, or until `stop_requested`; a stop leaves a checkpoint."""
        train = self.config.train
        if self.counters.before_nats is None:
            self.counters.before_nats = self.counters.last_nats = self.validate()
            self.adapt_share()
            self.progress.validated(0, self.validation.what, self.counters.before_nats)
        with self.progress:
            while self.step < train.max_steps:
                started = time.perf_counter()
                report = self.train_step()
                self.step += 1
                self.counters.seconds += time.perf_counter() - started
                self.log(report)
                last = self.step == train.max_steps or self.stop_requested
                if self.step % train.eval_steps == 0 or self.step == train.max_steps:
                    self.counters.last_nats = self.validate()
                    self.progress.validated(self.step, self.validation.what, self.counters.last_nats)
                    self.run_dir.append_metrics(
                        {"step": self.step, self.validation.key: self.counters.last_nats, **self.adapt_share()}
                    )
                    if self.counters.last_nats < self.counters.best_nats:
                        self.counters.best_nats, self.counters.best_step = self.counters.last_nats, self.step
                        self.save()
                        continue
                if last or self.step % train.save_steps == 0:
                    self.save()
                if self.stop_requested:
                    break
        if self._tracking:
            self.accelerator.end_training()
        return self.counters

    def train_step(self) -> StepReport:
        """One optimizer step: prompts, responses, teacher outputs, loss, update."""
        train = self.config.train
        seed_step(self.config.seed, self.step)
        report = StepReport()
        clock = _Clock(report.seconds)

        total = train.per_device_train_batch_size * train.gradient_accumulation_steps
        self.replay.expire(self.step)
        report.batch = self._next_source()
        if report.batch == "ground_truth":
            sequences = self.read_ground_truth(self.loader.next(total))
        else:
            fresh, replayed = self._fresh_and_replayed(report.batch, total)
            sequences = []
            if fresh:
                report.rollouts, report.rollout = self.roll_out(self.loader.next(fresh))
                clock.lap("rollout")
                sequences = self.cache_teacher(report.rollouts)
            drawn = self.replay.draw(replayed, self.step)
            self.remember(report.rollouts, sequences)
            sequences += [entry.sequence for entry in drawn]
            report.replayed = len(drawn)
            report.staleness_nats = staleness_nats(self.objective, drawn, pad_id=self.pair.pad_id, device=self.device)
        clock.lap("teacher")

        sequences = [s for s in sequences if s.loss_steps]
        report.loss_tokens = sum(len(s.loss_steps) for s in sequences)
        report.loss = self.learn(sequences, report.loss_tokens)
        clock.lap("loss")
        report.grad_norm = self.update(report.loss)
        self.forget_used()
        clock.lap("optimizer")
        return report

    # ---------------------------------------------------------------- the stages of a step

    def roll_out(self, items: Sequence[tuple[Prompt, int]]) -> tuple[list[Rollout], RolloutStats]:
        """Responses to the prompts by the configured policy."""
        settings = self.config.rollout
        requests = [
            RolloutRequest(p.example_id, visit, p.prompt_ids, p.max_new_tokens or settings.max_new_tokens)
            for p, visit in items
        ]
        keep = self.config.loss.scope if self.policy.uses_teacher and self.imitates else "nothing"
        self.acceptance.forget()
        return rollout(
            requests,
            teacher=self.teacher,
            student=self.student,
            policy=self.policy,
            seed=self.config.seed,
            temperature=settings.temperature,
            eos_ids=self.pair.eos_ids,
            pad_id=self.pair.pad_id,
            batch_size=settings.batch_size,
            keep=keep,
            blocks=self.blocks,
            keep_student=settings.reuse > 1 or self.share is not None,
        )

    def remember(self, rollouts: Sequence[Rollout], sequences: Sequence[TrainingSequence]) -> None:
        """Keep fresh sequences for the further uses that rollout.reuse gives them."""
        # The adaptive share draws from the buffer at random, again and again.
        uses = None if self.share is not None else self.config.rollout.reuse - 1
        if uses == 0:
            return
        entries = []
        for written, sequence in zip(rollouts, sequences, strict=True):
            if not sequence.loss_steps:
                continue
            entry = ReplayEntry(sequence, self.step, uses)
            # One step of each, in the middle; past the student's last step there is no state of it to remember.
            asked = [t for t in sequence.loss_steps if written.jsd_bits is None or written.jsd_bits[t] is not None]
            if written.student_hidden is not None and asked:
                entry.probe_step = asked[len(asked) // 2]
                entry.probe_hidden = written.student_hidden[entry.probe_step].cpu()
            entries.append(entry)
        self.replay.add(entries)

    def forget_used(self) -> None:
        """Drop the teacher's outputs that no sequence will need again."""
        self.replay.expire(self.step + 1)
        needed = {tuple(key) for key in self.replay.cache_keys().tolist()}
        stored = self.cache.keys()
        self.cache.discard(stored[[tuple(key) not in needed for key in stored.tolist()]])

    def _make_blocks(self) -> BlockLength:
        """How many tokens the student drafts; the pass times are measured once and kept, so a resumed run chooses the
        same."""
        settings = self.config.rollout
        if settings.block_tokens != "auto":
            return FixedBlock(settings.block_tokens)
        if self.teacher is None or not self.policy.uses_teacher or not self.config.writes_rollouts:
            return FixedBlock(0)
        path = self.run_dir.pass_times_path
        if path.exists():
            times = PassTimes.from_dict(json.loads(path.read_text(encoding="utf-8")))
        else:
            times = measure_pass_times(self.teacher, self.student, settings.batch_size)
            self.run_dir.write_json(path.name, times.to_dict())
        most = drafts_within_scratch(settings.batch_size, self.pair.vocab_size)
        return AutoBlock(times, self.acceptance, most)

    def cache_teacher(self, rollouts: Sequence[Rollout]) -> list[TrainingSequence]:
        """Put the teacher's outputs of the loss steps into the cache.

        The rollout computed them already, unless the policy never asks the teacher: then one parallel pass does.
        """
        states: list[Tensor | None] = [None] * len(rollouts)
        if not self.imitates:
            everywhere = self.config.loss.scope == "all"
            steps = [[t for t, w in enumerate(r.writers) if everywhere or w == TEACHER] for r in rollouts]
        elif self.policy.uses_teacher:
            states = [r.teacher_hidden for r in rollouts]
            steps = [r.kept_steps for r in rollouts]
        else:
            states = list(self._score([(r.prompt_ids, r.response_ids) for r in rollouts]))
            steps = [list(range(len(r.response_ids))) for r in rollouts]
        sequences = [
            TrainingSequence(r.example_id, r.visit, r.prompt_ids, r.response_ids, kept)
            for r, kept in zip(rollouts, steps, strict=True)
        ]
        self._put(sequences, states)
        return sequences

    def read_ground_truth(self, items: Sequence[tuple[Prompt, int]]) -> list[TrainingSequence]:
        """The data's own responses, every assistant turn of them; scored by one teacher pass for a divergence."""
        found = (ground_truth_sequence(p, visit) for p, visit in items)
        sequences = [s for s in found if s is not None]
        if self.imitates:
            hidden = self._score([(s.prompt_ids, s.response_ids) for s in sequences])
            self._put(sequences, [h[s.loss_steps] for s, h in zip(sequences, hidden, strict=True)])
        return sequences

    def learn(self, sequences: Sequence[TrainingSequence], loss_tokens: int) -> float | None:
        """Accumulate gradients over all micro-batches; the token mean of the loss in nats, None without any token.

        Every micro-batch is divided by the tokens of the whole step, so the split into micro-batches does not change
        the gradient.
        """
        self.wrapped.train()
        size = self.config.train.per_device_train_batch_size
        total = 0.0
        # Similar lengths share a micro-batch: less padding, and the token mean does not see the order.
        ordered = sorted(sequences, key=lambda s: (s.num_tokens, s.example_id, s.visit))
        for start in range(0, len(ordered), size):
            group = ordered[start : start + size]
            if self.imitates:
                keys = torch.tensor([key for s in group for key in s.cache_keys()], dtype=torch.int64)
                batch, targets = collate(group, self.pair.pad_id, self.device), self.cache.get(keys)
            else:
                batch, targets = collate_with_labels(group, self.pair.pad_id, self.device), None
            loss = self.wrapped(batch, targets, float(loss_tokens))
            total += self._backward(loss)
        if self.corpus is not None:
            self._backward(self.config.loss.lm_coefficient * self._corpus_loss(size))
        return total if sequences or self.corpus is not None else None

    def update(self, loss: float | None) -> float | None:
        """Clip and step the optimizer; the gradient norm, or None for a step that had no loss token.

        Raises:
            TrainingError: the gradient is not finite; the weights are untouched.
        """
        norm = None
        if loss is None:
            self.counters.steps_without_loss += 1
        else:
            norm = float(self.accelerator.clip_grad_norm_(self.trainable, self.config.train.max_grad_norm))
            if not math.isfinite(norm):
                raise self._not_finite("gradient norm", norm)
            self.optimizer.step()
        self.optimizer.zero_grad()
        with warnings.catch_warnings():
            # A skipped step moves the schedule without the optimizer, which torch takes for a mistake.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
            self.lr_scheduler.step()
        return norm

    def _backward(self, loss: Tensor) -> float:
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._not_finite("loss", value)
        self.accelerator.backward(loss)
        return value

    def _corpus_loss(self, rows: int) -> Tensor:
        assert self.corpus is not None
        blocks = self.corpus.next(rows)
        sequences = [
            TrainingSequence(i, 0, block[:1].tolist(), block[1:].tolist(), list(range(len(block) - 1)))
            for i, block in enumerate(blocks)
        ]
        batch = collate_with_labels(sequences, self.pair.pad_id, self.device)
        return self.wrapped(batch, None, float(sum(len(s.loss_steps) for s in sequences)))

    def _score(self, sequences: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
        assert self.teacher is not None, "a configuration that scores responses loads the teacher"
        return score_responses(
            self.teacher, sequences, pad_id=self.pair.pad_id, batch_size=self.config.train.per_device_train_batch_size
        )

    def _put(self, sequences: Sequence[TrainingSequence], states: Sequence[Tensor | None]) -> None:
        kept = [(s, h) for s, h in zip(sequences, states, strict=True) if s.loss_steps and h is not None]
        if kept and self.teacher is not None:
            keys = torch.tensor([key for s, _ in kept for key in s.cache_keys()], dtype=torch.int64)
            self.cache.put(keys, torch.cat([h for _, h in kept]), self.teacher.head)

    def _next_source(self) -> Source:
        mix = self.config.data.ground_truth_mix
        if mix == 0 and self.share is None:
            return "rollout"
        key = row_keys(self.config.seed, torch.tensor([_GROUND_TRUTH_COIN]), torch.tensor([self.step]))
        coin = float(uniform(key))
        if self.share is None:
            return "ground_truth" if coin < mix else "rollout"
        full = len(self.replay) >= self.config.rollout.replay_capacity
        return self.share.source(coin, self.step / self.config.train.max_steps, can_replay=full)

    def _fresh_and_replayed(self, source: Source, total: int) -> tuple[int, int]:
        """How many sequences of a step are written now, and how many had been before."""
        if self.share is None:
            return split_step(total, self.config.rollout.reuse, len(self.replay))
        return (0, total) if source == "replay" else (total, 0)

    def _not_finite(self, what: str, value: float) -> TrainingError:
        return TrainingError(
            f"The {what} is {value} at step {self.step}; the optimizer step was not taken. Lower train.learning_rate "
            f"(now {self.config.train.learning_rate}) and resume from the last checkpoint in "
            f"{self.run_dir.checkpoints_path}."
        )

    # ---------------------------------------------------------------- looking and saving

    def validate(self) -> float:
        """KL(teacher || student) on the held-out prompts, or the loss on their responses; nats per token."""
        return self.validation.nats(self.objective, self.device, self.config.loss.chunk_tokens)

    def adapt_share(self) -> dict[str, float]:
        """Let the share of student-written batches hear of the loss on held-out responses; both, for the metrics."""
        if self.share is None:
            return {}
        loss = self.response_loss.nats(self.objective, self.device, self.config.loss.chunk_tokens)
        if self.share.observe(loss):
            self.progress.say(f"{self.response_loss.what} rose to {loss:.3f}: student writes {self.share.phi:.0%}")
        return {self.response_loss.key: loss, "student_batch_share": self.share.phi}

    def save(self) -> None:
        """Write a checkpoint of the current step and drop the oldest beyond the limit, never the best."""
        state = {
            "loader": self.loader.state_dict(),
            "counters": _finite(asdict(self.counters)),
            "acceptance": self.acceptance.state_dict(),
        }
        if self.corpus is not None:
            state["corpus"] = self.corpus.state_dict()
        if self.share is not None:
            state["share"] = self.share.state_dict()
        save_checkpoint(
            self.run_dir.checkpoints_path,
            step=self.step,
            student=self.student,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            state=state,
            replay=self._replay_state(),
        )
        rotate_checkpoints(
            self.run_dir.checkpoints_path,
            keep=self.config.train.save_total_limit,
            protected={checkpoint_name(self.counters.best_step)} if self.counters.best_step >= 0 else set(),
        )

    def _replay_state(self) -> dict[str, Any] | None:
        """The sequences that will train again, with their teacher outputs; None where there are none."""
        if len(self.replay) == 0:
            return None
        cache = self.cache.export(self.replay.cache_keys()) if self.imitates else None
        return {"buffer": self.replay.state_dict(), "cache": cache}

    def resume(self) -> bool:
        """Go back to the newest complete checkpoint; False where there is none."""
        folder = self.run_dir.latest_checkpoint()
        if folder is None:
            self.run_dir.truncate_logs(0)
            return False
        state = load_checkpoint(folder, student=self.student, optimizer=self.optimizer, lr_scheduler=self.lr_scheduler)
        self.step = state["step"]
        self.loader.load_state_dict(state["loader"])
        self.acceptance.load_state_dict(state["acceptance"])
        if self.corpus is not None:
            self.corpus.load_state_dict(state["corpus"])
        replay = load_replay(folder)
        if replay is not None:
            self.replay.load_state_dict(replay["buffer"])
            if self.teacher is not None and replay["cache"] is not None:
                self.cache.load_state_dict(replay["cache"], self.teacher.head)
        if self.share is not None:
            self.share.load_state_dict(state["share"])
        counters = state["counters"]
        if counters["best_nats"] is None:
            counters["best_nats"] = math.inf
        self.counters = Counters(**counters)
        self.run_dir.truncate_logs(self.step)
        self.progress.resumed(self.step)
        return True

    def log(self, report: StepReport) -> None:
        """Write the step's line of metrics.jsonl, a sample of its rollouts, and tell the progress display."""
        stats = report.rollout
        writers = [w for r in report.rollouts for w in r.writers]
        if writers and self.policy.uses_teacher and self.policy.uses_student:
            report.teacher_share = sum(w == TEACHER for w in writers) / len(writers)
        divergences = [j for r in report.rollouts for j in r.jsd_bits or [] if j is not None]
        report.jsd_bits = sum(divergences) / len(divergences) if divergences else None
        self.counters.rollout_tokens += stats.tokens
        self.counters.trained_tokens += report.loss_tokens
        learning = report.seconds.get("loss", 0.0) + report.seconds.get("optimizer", 0.0)
        metrics: dict[str, Any] = {
            "step": self.step,
            "loss": report.loss,
            "learning_rate": self.lr_scheduler.get_last_lr()[0],
            "grad_norm": report.grad_norm,
            "batch": report.batch,
            "loss_tokens": report.loss_tokens,
            "fresh": len(report.rollouts),
            "replayed": report.replayed,
            "staleness_nats": report.staleness_nats,
            "teacher_share": report.teacher_share,
            "jsd_bits": report.jsd_bits,
            "rollout_tokens": stats.tokens,
            "teacher_passes": stats.teacher_passes,
            "student_passes": stats.student_passes,
            "teacher_row_passes_per_token": stats.by_row_passes["teacher"] / stats.tokens if stats.tokens else None,
            "kept_draft_share": stats.kept_draft_share,
            "kept_drafts_by_step": _shares(stats),
            "rounds_by_drafts": stats.rounds_by_drafts,
            "rollout_tokens_per_s": stats.tokens / stats.seconds if stats.seconds else None,
            "train_tokens_per_s": report.loss_tokens / learning if learning and report.loss_tokens else None,
            "seconds": {k: round(v, 4) for k, v in report.seconds.items()},
            "peak_gib": peak_bytes(self.device) / GIB,
            "planned_gib": self.planned_bytes / GIB if self.planned_bytes is not None else None,
        }
        self.run_dir.append_metrics(metrics)
        sample = report.rollouts[:ROLLOUTS_LOGGED_PER_STEP]
        self.run_dir.append_rollouts([rollout_record(r, self.pair.tokenizer, step=self.step) for r in sample])
        if self._tracking:
            values = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
            self.accelerator.log(values, step=self.step)
        self.progress.stepped(metrics)


def peak_bytes(device: torch.device) -> int:
    """Highest memory use of the process so far: allocated on the GPU, resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now


def _make_accelerator(config: RunConfig, run_dir: RunDir, student: LanguageModel) -> Accelerator:
    report_to = list(config.train.report_to)
    accelerator = Accelerator(
        cpu=student.device.type == "cpu",
        mixed_precision="bf16" if student.compute_dtype == torch.bfloat16 else "no",
        log_with=report_to or None,
        project_dir=str(run_dir.path) if report_to else None,
    )
    if accelerator.num_processes > 1:
        raise TrainingError(
            f"{accelerator.num_processes} processes were started, but a run uses one GPU. Start it without accelerate "
            "launch, or with --num_processes 1."
        )
    if report_to:
        accelerator.init_trackers("qswitch")
    return accelerator


def _make_optimizer(config: RunConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    train = config.train
    if train.optimizer == "paged_adamw_8bit":
        import bitsandbytes as bnb

        return bnb.optim.PagedAdamW8bit(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)
    return torch.optim.AdamW(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)


def _shares(stats: RolloutStats) -> list[float]:
    """Share of drafts that stood in each eighth of the response steps reached: it falls as the threshold does."""
    if len(stats.offered_by_step) == 0:
        return []
    offered = np.array_split(stats.offered_by_step, 8)
    kept = np.array_split(stats.kept_by_step, 8)
    return [round(float(k.sum() / o.sum()), 4) for k, o in zip(kept, offered, strict=True) if o.sum()]


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: the best KL before any validation is stored as null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
