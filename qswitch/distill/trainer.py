"""The training loop: fetch prompts, roll out, cache teacher outputs, learn, validate, save, log.

One optimizer step reads top to bottom in `Trainer.train_step`. Knows no command line; talks to the user through a
`Progress`.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qswitch.config import RunConfig
from qswitch.data.gather import Prompts
from qswitch.data.loader import BlockLoader, PromptLoader
from qswitch.data.template import Prompt
from qswitch.distill.batch_source import AdaptiveShare, Source
from qswitch.distill.budget import spent_share
from qswitch.distill.checkpoint import (
    checkpoint_name,
    load_checkpoint,
    load_replay,
    rotate_checkpoints,
    save_checkpoint,
    seed_step,
)
from qswitch.distill.decoding import Decoding
from qswitch.distill.logit_cache import LogitCache
from qswitch.distill.metrics import Clock, StepReport, peak_bytes
from qswitch.distill.objective import (
    StudentObjective,
    TrainingSequence,
    collate,
    collate_with_labels,
    ground_truth_sequence,
)
from qswitch.distill.optimizer import make_accelerator, make_lr_scheduler, make_optimizer
from qswitch.distill.progress import Progress, total_steps
from qswitch.distill.recovery import MemoryFloorError, Recovery, Sizes
from qswitch.distill.replay import ReplayBuffer, ReplayEntry, split_step, staleness_nats
from qswitch.distill.round import PreparedStep, unique_keys
from qswitch.distill.validation import ResponseLoss, Validation
from qswitch.errors import TrainingError
from qswitch.models.host_memory import freed_memory_kept, release_memory
from qswitch.models.language_model import LanguageModel
from qswitch.models.pair import TokenizerPair
from qswitch.models.residency import SwappedModel
from qswitch.rollout.decode import Rollout, RolloutRequest, RolloutStats, rollout, score_responses
from qswitch.rollout.noise import row_keys, uniform
from qswitch.rollout.policy import TEACHER, make_policy
from qswitch.rollout.transcript import rollout_record
from qswitch.run_dir import RunDir
from qswitch.units import GIB

ROLLOUTS_LOGGED_PER_STEP = 2
_GROUND_TRUTH_COIN = -1
"""Example id of the per-step coin of data.ground_truth_mix; records count from 0."""


@dataclass(slots=True)
class Counters:
    """Totals of a run, kept across a resume."""

    seconds: float = 0.0
    rollout_tokens: int = 0
    trained_tokens: int = 0
    response_tokens: int = 0
    """Generated, or read from the data where a batch was ground truth."""
    steps_without_loss: int = 0
    best_nats: float = math.inf
    """Lowest of the validations: KL from the teacher, or the response loss where no teacher is loaded."""
    best_step: int = -1
    before_nats: float | None = None
    last_nats: float | None = None


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
        recovery: Recovery | None = None,
        progress: Progress | None = None,
    ) -> None:
        train, cache = config.train, config.cache
        self.config, self.run_dir, self.pair = config, run_dir, pair
        self.teacher, self.student = teacher, student
        self.progress = progress or Progress(total_steps=total_steps(train))
        self.policy = make_policy(config.rollout)
        self.imitates = config.loss.objective == "divergence"
        """Whether the loss reads the teacher's outputs, rather than the written tokens alone."""
        self.stop_requested = False

        self.accelerator = make_accelerator(config, run_dir, student)
        self.device = student.device
        self.recovery = recovery or Recovery(Sizes.of(config), self.device)
        self.objective = StudentObjective(student, config.loss)
        trainable = [p for p in student.parameters() if p.requires_grad]
        optimizer = make_optimizer(train, trainable)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.objective, optimizer)
        self.trainable = trainable
        self.step = 0
        self.counters = Counters()
        self.lr_scheduler = make_lr_scheduler(train, optimizer, lambda: self.spent)

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
        self.decoding = Decoding(
            config, run_dir, teacher=teacher if self.policy.uses_teacher else None, student=student,
            num_rows=self.recovery.sizes.rollout_rows, progress=self.progress,
        )  # fmt: skip
        self.round: deque[PreparedStep] = deque()
        """Steps that the last round of rollouts has prepared and that have not been taken."""
        self.swapped = SwappedModel(teacher) if teacher is not None and config.teacher.residency == "swap" else None
        if self.swapped is not None:
            self.swapped.leave()
        self._tracking = bool(train.report_to)

    # ---------------------------------------------------------------- the loop

    def run(self) -> Counters:
        """Train until the budget is spent, or until `stop_requested`; a stop leaves a checkpoint.

        Raises:
            MemoryFloorError: no size is left to shrink; a checkpoint of the last finished step is on disk.
        """
        train = self.config.train
        if self.counters.before_nats is None:
            self.counters.before_nats = self.counters.last_nats = self.validate()
            self.adapt_share()
            self.progress.validated(0, self.validation.what, self.counters.before_nats)
        with self.progress:
            while not self.finished:
                started = time.perf_counter()
                try:
                    report = self.train_step()
                except MemoryFloorError as error:
                    self.save()
                    raise self._at_the_floor(error) from error
                self.step += 1
                self.counters.seconds += time.perf_counter() - started
                self.log(report)
                improved = False
                if self.step % train.eval_steps == 0 or self.finished:
                    self.counters.last_nats = self.validate()
                    self.progress.validated(self.step, self.validation.what, self.counters.last_nats)
                    self.run_dir.append_metrics(
                        {"step": self.step, self.validation.key: self.counters.last_nats, **self.adapt_share()}
                    )
                    improved = self.counters.last_nats < self.counters.best_nats
                    if improved:
                        self.counters.best_nats, self.counters.best_step = self.counters.last_nats, self.step
                # Read once, after the validation: a stop asked for meanwhile must find its checkpoint.
                stop = self.stop_requested
                if improved or stop or self.finished or self.step % train.save_steps == 0:
                    self.save()
                if stop:
                    break
        if self._tracking:
            self.accelerator.end_training()
        return self.counters

    @property
    def spent(self) -> float:
        """Share of the budget that is spent, of steps, tokens or seconds."""
        counters = self.counters
        return spent_share(self.config.train, step=self.step, tokens=counters.response_tokens, seconds=counters.seconds)

    @property
    def finished(self) -> bool:
        """Whether the budget is spent."""
        return self.spent >= 1

    def train_step(self) -> StepReport:
        """One optimizer step: prompts, responses, teacher outputs, loss, update."""
        report = StepReport()
        clock = Clock(report.seconds)

        if not self.round:
            self.prepare_round(report, clock)
        prepared = self.round[0]
        clock.lap("teacher")

        report.batch, report.written_tokens = prepared.source, prepared.num_written
        sequences = [s for s in prepared.sequences if s.loss_steps]
        report.loss_tokens = sum(len(s.loss_steps) for s in sequences)
        report.loss, report.grad_norm = self.recovery.attempt(
            "loss", lambda: self.gradients(sequences, report.loss_tokens), undo=self._undo_gradients()
        )
        clock.lap("loss")
        self.update(report.loss)
        self.round.popleft()
        self.forget_used()
        clock.lap("optimizer")
        return report

    def prepare_round(self, report: StepReport, clock: Clock) -> None:
        """All that the next rollout.round_steps steps need of the teacher, who is away in between if it is swapped."""
        train, attempt = self.config.train, self.recovery.attempt
        total = train.per_device_train_batch_size * train.gradient_accumulation_steps
        self.replay.expire(self.step)
        cursor = self.loader.state_dict()
        steps = range(self.step, min(self.step + self.config.rollout.round_steps, train.max_steps))
        try:
            self.teacher_comes()
            sources = [self._next_source(step) for step in steps]
            # Replayed sequences belong to rounds of one step; a longer round is fresh or ground truth throughout.
            splits = [(total, 0) if s == "ground_truth" else self._fresh_and_replayed(s, total) for s in sources]
            items = [self.loader.next(fresh) if fresh else [] for fresh, _ in splits]
            written = [item for s, own in zip(sources, items, strict=True) if s != "ground_truth" for item in own]
            sequences: list[TrainingSequence] = []
            if written:
                report.rollouts, report.rollout = attempt("rollout", lambda: self.roll_out(written))
                clock.lap("rollout")
                sequences = attempt("teacher", lambda: self.cache_teacher(report.rollouts))
            unclaimed = iter(report.rollouts)
            for source, own, (_, replayed) in zip(sources, items, splits, strict=True):
                if source == "ground_truth":
                    responses = attempt("teacher", partial(self.read_ground_truth, own))
                    self.round.append(PreparedStep(source, responses))
                    continue
                fresh, sequences = sequences[: len(own)], sequences[len(own) :]
                drawn = self.replay.draw(replayed, self.step)
                self.remember(report.rollouts, fresh)
                report.replayed = len(drawn)
                if drawn:
                    report.staleness_nats = attempt("validation", partial(self._staleness, drawn))
                num_written = sum(len(next(unclaimed).response_ids) for _ in own)
                self.round.append(PreparedStep(source, fresh + [entry.sequence for entry in drawn], num_written))
        except MemoryFloorError:
            self.loader.load_state_dict(cursor)
            self.round.clear()
            self.forget_used()
            raise
        finally:
            self.teacher_leaves()

    def teacher_comes(self) -> None:
        """Load a swapped teacher."""
        if self.swapped is not None:
            self.recovery.attempt("teacher upload", self.swapped.come_back)

    def teacher_leaves(self) -> None:
        """Free a swapped teacher's bytes."""
        if self.swapped is not None:
            self.swapped.leave()
        if self.device.type == "cpu":
            release_memory(self.device)  # what decoding freed is still glibc's, and would add to the peak of training

    # ---------------------------------------------------------------- the stages of a step

    def roll_out(self, items: Sequence[tuple[Prompt, int]]) -> tuple[list[Rollout], RolloutStats]:
        """Responses to the prompts by the configured policy."""
        settings = self.config.rollout
        requests = [
            RolloutRequest(p.example_id, visit, p.prompt_ids, p.max_new_tokens or settings.max_new_tokens)
            for p, visit in items
        ]
        keep = self.config.loss.scope if self.policy.uses_teacher and self.imitates else "nothing"
        self.decoding.acceptance.forget()
        with freed_memory_kept(self.device):
            return rollout(
                requests,
                teacher=self.teacher,
                student=self.student,
                policy=self.policy,
                seed=self.config.seed,
                temperature=settings.temperature,
                eos_ids=self.pair.eos_ids,
                pad_id=self.pair.pad_id,
                batch_size=self.recovery.sizes.rollout_rows,
                keep=keep,
                blocks=self.decoding.blocks,
                keep_student=settings.reuse > 1 or self.share is not None,
                student_graphs=self.decoding.graphs(self.recovery.sizes.rollout_rows),
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
        needed = {tuple(key) for key in self._needed_keys().tolist()}
        stored = self.cache.keys()
        self.cache.discard(stored[[tuple(key) not in needed for key in stored.tolist()]])

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
        size = self.recovery.sizes.micro_batch
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
            self.recovery.check_host_memory()
        if self.corpus is not None:
            self._learn_corpus(size)
        return total if sequences or self.corpus is not None else None

    def gradients(self, sequences: Sequence[TrainingSequence], loss_tokens: int) -> tuple[float | None, float | None]:
        """The step's loss and its clipped gradient's norm; None for a step that had no loss token.

        Raises:
            TrainingError: the gradient is not finite.
        """
        seed_step(self.config.seed, self.step)
        self.objective.settings = self.config.loss.model_copy(update={"chunk_tokens": self.recovery.sizes.chunk_tokens})
        loss = self.learn(sequences, loss_tokens)
        if loss is None:
            return None, None
        norm = float(self.accelerator.clip_grad_norm_(self.trainable, self.config.train.max_grad_norm))
        if not math.isfinite(norm):
            raise self._not_finite("gradient norm", norm)
        return loss, norm

    def _undo_gradients(self) -> Callable[[], None]:
        """What brings a step back to where it is now, after part of its gradients have been accumulated."""
        cursor = self.corpus.state_dict() if self.corpus is not None else None

        def undo() -> None:
            self.optimizer.zero_grad()
            if self.corpus is not None and cursor is not None:
                self.corpus.load_state_dict(cursor)

        return undo

    def update(self, loss: float | None) -> None:
        """Step the optimizer with the gradients of a step that had a loss, and the schedule always."""
        if loss is None:
            self.counters.steps_without_loss += 1
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        with warnings.catch_warnings():
            # A skipped step moves the schedule without the optimizer, which torch takes for a mistake.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
            self.lr_scheduler.step()

    def _backward(self, loss: Tensor) -> float:
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._not_finite("loss", value)
        self.accelerator.backward(loss)
        return value

    def _learn_corpus(self, size: int) -> None:
        """Gradients of the language-model loss over as many blocks as the step has sequences, `size` at a time."""
        assert self.corpus is not None
        train = self.config.train
        blocks = self.corpus.next(train.per_device_train_batch_size * train.gradient_accumulation_steps)
        sequences = [
            TrainingSequence(i, 0, block[:1].tolist(), block[1:].tolist(), list(range(len(block) - 1)))
            for i, block in enumerate(blocks)
        ]
        num_tokens = float(sum(len(s.loss_steps) for s in sequences))
        for start in range(0, len(sequences), size):
            batch = collate_with_labels(sequences[start : start + size], self.pair.pad_id, self.device)
            self._backward(self.config.loss.lm_coefficient * self.wrapped(batch, None, num_tokens))
            self.recovery.check_host_memory()

    def _score(self, sequences: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
        assert self.teacher is not None, "a configuration that scores responses loads the teacher"
        return score_responses(
            self.teacher, sequences, pad_id=self.pair.pad_id, batch_size=self.recovery.sizes.micro_batch
        )

    def _staleness(self, drawn: Sequence[ReplayEntry]) -> float | None:
        return staleness_nats(self.objective, drawn, pad_id=self.pair.pad_id, device=self.device)

    def _needed_keys(self) -> Tensor:
        """Keys int64 [N, 3] of the teacher outputs that replayed and prepared sequences will read."""
        replayed = [(a, b, c) for a, b, c in self.replay.cache_keys().tolist()]
        return unique_keys(replayed + [key for prepared in self.round for key in prepared.cache_keys()])

    def _put(self, sequences: Sequence[TrainingSequence], states: Sequence[Tensor | None]) -> None:
        kept = [(s, h) for s, h in zip(sequences, states, strict=True) if s.loss_steps and h is not None]
        if kept and self.teacher is not None:
            keys = torch.tensor([key for s, _ in kept for key in s.cache_keys()], dtype=torch.int64)
            self.cache.put(keys, torch.cat([h for _, h in kept]), self.teacher.head)

    def _next_source(self, step: int) -> Source:
        mix = self.config.data.ground_truth_mix
        if mix == 0 and self.share is None:
            return "rollout"
        key = row_keys(self.config.seed, torch.tensor([_GROUND_TRUTH_COIN]), torch.tensor([step]))
        coin = float(uniform(key))
        if self.share is None:
            return "ground_truth" if coin < mix else "rollout"
        full = len(self.replay) >= self.config.rollout.replay_capacity
        return self.share.source(coin, min(1.0, self.spent), can_replay=full)

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

    def _at_the_floor(self, error: MemoryFloorError) -> MemoryFloorError:
        return MemoryFloorError(
            f"{error} Step {self.step} was not taken; the checkpoint of step {self.step} in "
            f"{self.run_dir.checkpoints_path} has all before it. Free memory, or resume on a larger device; for this "
            "one start anew with a smaller rollout.max_new_tokens or data.max_prompt_tokens, or teacher.residency=swap."
        )

    # ---------------------------------------------------------------- looking and saving

    def validate(self) -> float:
        """KL(teacher || student) on the held-out prompts, or the loss on their responses; nats per token."""
        return self._held_out_nats(self.validation)

    def _held_out_nats(self, held_out: Validation | ResponseLoss) -> float:
        def score() -> float:
            sizes = self.recovery.sizes
            return held_out.nats(self.objective, self.device, sizes.chunk_tokens, sizes.validation_rows)

        return self.recovery.attempt("validation", score)

    def adapt_share(self) -> dict[str, float]:
        """Let the share of student-written batches hear of the loss on held-out responses; both, for the metrics."""
        if self.share is None:
            return {}
        loss = self._held_out_nats(self.response_loss)
        if self.share.observe(loss):
            self.progress.say(f"{self.response_loss.what} rose to {loss:.3f}: student writes {self.share.phi:.0%}")
        return {self.response_loss.key: loss, "student_batch_share": self.share.phi}

    def save(self) -> None:
        """Write a checkpoint of the current step and drop the oldest beyond the limit, never the best."""
        state = {
            "loader": self.loader.state_dict(),
            "counters": _finite(asdict(self.counters)),
            "acceptance": self.decoding.acceptance.state_dict(),
            "sizes": asdict(self.recovery.sizes),
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
        """The sequences that will train, again or for the first time, with their teacher outputs; None without any."""
        if len(self.replay) == 0 and not self.round:
            return None
        cache = self.cache.export(self._needed_keys()) if self.imitates else None
        prepared = [step.state_dict() for step in self.round]
        return {"buffer": self.replay.state_dict(), "round": prepared, "cache": cache}

    def resume(self) -> bool:
        """Go back to the newest complete checkpoint; False where there is none."""
        folder = self.run_dir.latest_checkpoint()
        if folder is None:
            self.run_dir.truncate_logs(0)
            return False
        state = load_checkpoint(folder, student=self.student, optimizer=self.optimizer, lr_scheduler=self.lr_scheduler)
        self.step = state["step"]
        self.loader.load_state_dict(state["loader"])
        self.decoding.acceptance.load_state_dict(state["acceptance"])
        self.recovery.restore(state["sizes"])
        if self.corpus is not None:
            self.corpus.load_state_dict(state["corpus"])
        replay = load_replay(folder)
        if replay is not None:
            self.replay.load_state_dict(replay["buffer"])
            self.round = deque(PreparedStep.from_state_dict(step) for step in replay["round"])
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
        report.read_rollouts(two_writers=self.policy.uses_teacher and self.policy.uses_student)
        self.counters.rollout_tokens += report.rollout.tokens
        self.counters.trained_tokens += report.loss_tokens
        self.counters.response_tokens += report.written_tokens
        if report.batch == "ground_truth":
            self.counters.response_tokens += report.loss_tokens
        planned = self.recovery.planned_bytes
        metrics: dict[str, Any] = {
            "step": self.step,
            **report.metrics(),
            "learning_rate": self.lr_scheduler.get_last_lr()[0],
            "spent": round(self.spent, 6),
            "peak_gib": peak_bytes(self.device) / GIB,
            "planned_gib": None if planned is None else planned / GIB,
            "out_of_memory": self.recovery.take_events(),
        }
        self.run_dir.append_metrics(metrics)
        sample = report.rollouts[:ROLLOUTS_LOGGED_PER_STEP]
        self.run_dir.append_rollouts([rollout_record(r, self.pair.tokenizer, step=self.step) for r in sample])
        if self._tracking:
            values = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
            self.accelerator.log(values, step=self.step)
        self.progress.stepped(metrics)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: the best KL before any validation is stored as null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
