"""Who supplies the sequences of the next optimizer steps: the data, fresh rollouts, or earlier ones.

All that needs the teacher is done here, for one step or for several ahead (rollout.steps_at_once), so that a swapped
teacher is away while the student learns. What a step draws is a function of the run's seed and the step's number, so a
resumed run draws the same. With several processes each writes and scores its share, and all know every sequence: who
learns from it is written on it (`TrainingSequence.owner`). Knows no optimizer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qswitch.config import RunConfig
from qswitch.data.gather import Prompts
from qswitch.data.loader import PromptLoader
from qswitch.data.template import Prompt
from qswitch.distill.decoding import Decoding
from qswitch.distill.logit_cache import LogitCache
from qswitch.distill.metrics import BatchKind, Clock, StepReport, Tally
from qswitch.distill.objective import StudentObjective
from qswitch.distill.processes import Processes
from qswitch.distill.recovery import MemoryFloorError, Recovery
from qswitch.distill.replay import ReplayBuffer, ReplayEntry, split_step, staleness_nats
from qswitch.distill.sequence import TrainingSequence, ground_truth_sequence
from qswitch.distill.stored_teacher import StoredTeacher
from qswitch.models.host_memory import freed_memory_kept, release_memory
from qswitch.models.language_model import LanguageModel
from qswitch.models.pair import TokenizerPair
from qswitch.models.residency import SwappedModel
from qswitch.rollout.adaptive_threshold import AdaptiveThreshold
from qswitch.rollout.decode import rollout, score_responses
from qswitch.rollout.noise import row_keys, uniform
from qswitch.rollout.policy import TEACHER, Policy, make_policy
from qswitch.rollout.requests import Rollout, RolloutRequest, RolloutStats

PHI_STEP = 0.1
"""By which the share of student-written batches grows (DistiLLM's code)."""
_GROUND_TRUTH_COIN = -1
"""Example id of the per-step coin of data.ground_truth_mix; records count from 0."""


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """The sequences of one optimizer step; the cache holds the teacher's outputs of their loss steps."""

    batch: BatchKind
    sequences: list[TrainingSequence]
    num_written: int = 0
    """Response tokens that were written for this step; what the budget of tokens counts."""


class PreparedSteps(deque[PreparedStep]):
    """Steps that can be learnt without the teacher, in their order."""

    def state_dict(self) -> list[Any]:
        """Plain values."""
        return [(p.batch, [s.state_dict() for s in p.sequences], p.num_written) for p in self]

    def load_state_dict(self, state: list[Any]) -> None:
        """Hold exactly the steps of a `state_dict`."""
        self.clear()
        for batch, sequences, num_written in state:
            self.append(PreparedStep(batch, [TrainingSequence(**s) for s in sequences], num_written))

    def hand_over(self, owners: int) -> None:
        """Let the sequences of every step belong to `owners` processes in turn."""
        for prepared in self:
            prepared.sequences[:] = [replace(s, owner=i % owners) for i, s in enumerate(prepared.sequences)]


@dataclass(slots=True)
class _Share:
    """What one process wrote of a round, as all need to know it."""

    written: list[tuple[TrainingSequence, int, ReplayEntry | None]] = field(default_factory=list)
    """Each of its sequences in the order of its prompts, how many tokens were written, and what may train again."""
    stats: RolloutStats = field(default_factory=RolloutStats)
    tally: Tally = field(default_factory=Tally)
    acceptance: dict[str, list[float]] = field(default_factory=dict)
    observed: list[Rollout] = field(default_factory=list)
    """The rollouts without their tensors, where the threshold learns from them."""


@dataclass(slots=True)
class AdaptiveShare:
    """The share phi of student-written batches, which grows when the validation loss rises (DistiLLM, Ko et al. 2024).

    phi starts at 0. A validation whose loss exceeds the last reference by `tolerance_nats` or more adds 0.1 and becomes
    the reference; the first one is the reference to begin with.
    """

    tolerance_nats: float
    phi: float = 0.0
    reference_nats: float | None = None

    def observe(self, loss_nats: float) -> bool:
        """Hear of a validation; whether phi grew."""
        if self.reference_nats is None:
            self.reference_nats = loss_nats
            return False
        if loss_nats < self.reference_nats + self.tolerance_nats:
            return False
        self.reference_nats = loss_nats
        before, self.phi = self.phi, min(1.0, round(self.phi + PHI_STEP, 6))
        return self.phi > before

    def batch(self, coin: float, progress: float, *, can_replay: bool) -> BatchKind:
        """Of a step with `coin` in [0, 1) at `progress` in [0, 1): fresh below phi (1 - progress), replayed up to phi.

        Where nothing can be replayed the rollout is fresh.
        """
        if coin >= self.phi:
            return "ground_truth"
        return "replay" if can_replay and coin >= self.phi * (1 - progress) else "rollout"

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`; the tolerance stays the configuration's."""
        self.phi, self.reference_nats = state["phi"], state["reference_nats"]


class Supply:
    """Prepares optimizer steps. Owns the prompts' order, the replay buffer and what is prepared; borrows models, the
    cache of teacher outputs and the sizes of batches."""

    def __init__(
        self,
        config: RunConfig,
        *,
        teacher: LanguageModel | None,
        objective: StudentObjective,
        pair: TokenizerPair,
        prompts: Prompts,
        threshold: AdaptiveThreshold | None,
        cache: LogitCache | StoredTeacher,
        decoding: Decoding,
        recovery: Recovery,
        processes: Processes | None = None,
        stored: StoredTeacher | None = None,
    ) -> None:
        rollout_settings, data = config.rollout, config.data
        self._processes, self._stored = processes or Processes(), stored
        self.config, self.pair, self.threshold = config, pair, threshold
        self.cache, self.decoding, self.recovery = cache, decoding, recovery
        self._teacher, self._objective, self._student = teacher, objective, objective.student
        self._device = self._student.device
        self._imitates = config.loss.objective == "divergence"
        """Whether the loss reads the teacher's outputs, rather than the written tokens alone."""
        self.loader = PromptLoader(prompts, config.seed)
        self.replay = ReplayBuffer(rollout_settings.replay_capacity, rollout_settings.replay_max_age_steps, config.seed)
        self.share = AdaptiveShare(data.share_tolerance_nats) if data.adaptive_share else None
        self.prepared = PreparedSteps()
        self._swapped: SwappedModel | None = None
        if teacher is not None and config.teacher.residency == "swap":
            self._swapped = SwappedModel(teacher)
            self._swapped.leave()

    # ---------------------------------------------------------------- what the loop calls

    @property
    def policy(self) -> Policy:
        """Who writes the next rollouts."""
        return make_policy(self.config.rollout, None if self.threshold is None else self.threshold.threshold)

    def next(self, step: int, spent: float, report: StepReport, clock: Clock) -> PreparedStep:
        """What `step` learns from; `spent` is the share of the run's budget. It stays prepared until `taken`.

        Raises:
            MemoryFloorError: nothing is left to shrink; the prompts that were taken will come again.
        """
        if not self.prepared:
            self._prepare(step, spent, report, clock)
        clock.lap("teacher")
        return self.prepared[0]

    def taken(self, step: int) -> None:
        """`step` has been learnt: forget what it alone needed."""
        self.prepared.popleft()
        self._forget_used(step)

    def teacher_comes(self) -> None:
        """Load a swapped teacher."""
        if self._swapped is not None:
            self.recovery.attempt("teacher upload", self._swapped.come_back)

    def teacher_leaves(self) -> None:
        """Free a swapped teacher's bytes."""
        if self._swapped is not None:
            self._swapped.leave()
        if self._device.type == "cpu":
            release_memory(self._device)  # what decoding freed is still glibc's, and would add to the peak of training

    # ---------------------------------------------------------------- preparing

    def _prepare(self, first_step: int, spent: float, report: StepReport, clock: Clock) -> None:
        """All that the next rollout.steps_at_once steps need of the teacher."""
        train = self.config.train
        total = train.per_device_train_batch_size * train.gradient_accumulation_steps
        self.replay.expire(first_step)
        cursor = self.loader.state_dict()
        steps = range(first_step, min(first_step + self.config.rollout.steps_at_once, train.max_steps))
        try:
            batches = [self._batch_of(step, spent) for step in steps]
            # Replayed sequences are drawn one step at a time; several steps ahead are fresh or ground truth throughout.
            splits = [(total, 0) if b == "ground_truth" else self._fresh_and_replayed(b, total) for b in batches]
            items = [self.loader.next(fresh) if fresh else [] for fresh, _ in splits]
            owners = [self._divide(b, own) for b, own in zip(batches, items, strict=True)]
            shares = self._processes.everyone(lambda: self._do_share(batches, items, owners, first_step, report, clock))
            self._hear(shares, report)
            if self.threshold is not None and report.tally.rollouts:
                report.threshold_factor = self.threshold.factor
            unclaimed = [iter(share.written) for share in shares]
            for batch, own, whose, (_, replayed) in zip(batches, items, owners, splits, strict=True):
                if batch == "ground_truth":
                    self.prepared.append(PreparedStep(batch, _ground_truth(own, whose)))
                    continue
                fresh = [next(unclaimed[owner]) for owner in whose]
                drawn = self.replay.draw(replayed, first_step)
                self.replay.add(entry for _, _, entry in fresh if entry is not None)
                report.replayed = len(drawn)
                if drawn:
                    report.staleness_nats = self._processes.everyone(lambda: self._staleness(drawn))[0]  # noqa: B023
                sequences = [sequence for sequence, _, _ in fresh] + [entry.sequence for entry in drawn]
                self.prepared.append(PreparedStep(batch, sequences, sum(num for _, num, _ in fresh)))
            if self.threshold is not None:  # last: what fails is written again, with the same threshold
                self.threshold.observe([one for share in shares for one in share.observed])
        except MemoryFloorError:
            self.loader.load_state_dict(cursor)
            self.prepared.clear()
            self._forget_used(first_step)
            raise
        finally:
            self.teacher_leaves()

    def _divide(self, batch: BatchKind, items: Sequence[tuple[Prompt, int]]) -> list[int]:
        """Which process takes which prompt: similar numbers of tokens, of what is known before anything is written."""
        longest = self.config.rollout.max_new_tokens
        return self._processes.divide(
            [
                len(p.prompt_ids)
                + (len(p.response_ids or ()) if batch == "ground_truth" else p.max_new_tokens or longest)
                for p, _ in items
            ]
        )

    def _do_share(
        self,
        batches: Sequence[BatchKind],
        items: Sequence[Sequence[tuple[Prompt, int]]],
        owners: Sequence[Sequence[int]],
        step: int,
        report: StepReport,
        clock: Clock,
    ) -> _Share:
        """Write and score what is this process's of a round; its teacher outputs are in the cache afterwards."""
        attempt, rank = self.recovery.attempt, self._processes.rank
        self.teacher_comes()
        mine = [
            (batch, [item for item, owner in zip(own, whose, strict=True) if owner == rank])
            for batch, own, whose in zip(batches, items, owners, strict=True)
        ]
        written = [item for batch, own in mine if batch != "ground_truth" for item in own]
        share = _Share(acceptance=self.decoding.acceptance.state_dict())
        if self._stored is not None:  # nothing is left to be written or scored
            found = [self._stored.answer(prompt, visit, rank) for prompt, visit in written]
            share.written = [(sequence, len(sequence.response_ids), None) for sequence in found]
            share.tally = Tally(rollouts=len(found))
            return share
        if written:
            report.rollouts, share.stats = attempt("rollout", lambda: self.roll_out(written))
            clock.lap("rollout")
            sequences = attempt("teacher", lambda: self.cache_teacher(report.rollouts))
            entries = self._entries(report.rollouts, sequences, step)
            share.written = [
                (sequence, len(one.response_ids), entry)
                for one, sequence, entry in zip(report.rollouts, sequences, entries, strict=True)
            ]
            share.tally = Tally.of(report.rollouts)
            if self.threshold is not None:
                share.observed = [replace(r, teacher_hidden=None, student_hidden=None) for r in report.rollouts]
        for batch, own in mine:
            if batch == "ground_truth" and own:
                attempt("teacher", partial(self.read_ground_truth, own))
        share.acceptance = self.decoding.acceptance.state_dict()
        return share

    def _hear(self, shares: Sequence[_Share], report: StepReport) -> None:
        """What all processes' rollouts cost and say."""
        report.rollout, report.tally = shares[0].stats, shares[0].tally
        for share in shares[1:]:
            report.rollout.add(share.stats)
            report.tally.add(share.tally)
        if len(shares) > 1:  # one acceptance for all, which a checkpoint can hold
            self.decoding.acceptance.load_state_dict(shares[0].acceptance)

    def roll_out(self, items: Sequence[tuple[Prompt, int]]) -> tuple[list[Rollout], RolloutStats]:
        """Responses to the prompts by the configured policy."""
        settings, num_rows = self.config.rollout, self.recovery.sizes.rollout_rows
        requests = [
            RolloutRequest(p.example_id, visit, p.prompt_ids, p.max_new_tokens or settings.max_new_tokens)
            for p, visit in items
        ]
        self.decoding.acceptance.forget()
        with freed_memory_kept(self._device):
            return rollout(
                requests,
                teacher=self._teacher,
                student=self._student,
                policy=self.policy,
                seed=self.config.seed,
                temperature=settings.temperature,
                eos_ids=self.pair.eos_ids,
                pad_id=self.pair.pad_id,
                batch_size=num_rows,
                keep=self.config.loss.scope if self.policy.uses_teacher and self._imitates else "nothing",
                blocks=self.decoding.blocks,
                keep_student=settings.reuse > 1 or self.share is not None,
                student_graphs=self.decoding.student_graphs,
                teacher_graphs=self.decoding.teacher_graphs,
            )

    def cache_teacher(self, rollouts: Sequence[Rollout]) -> list[TrainingSequence]:
        """Put the teacher's outputs of the loss steps into the cache.

        The rollout computed them already, unless the policy never asks the teacher: then one parallel pass does.
        """
        states: list[Tensor | None] = [None] * len(rollouts)
        if not self._imitates:
            everywhere = self.config.loss.scope == "all"
            steps = [[t for t, w in enumerate(r.writers) if everywhere or w == TEACHER] for r in rollouts]
        elif self.policy.uses_teacher:
            states = [r.teacher_hidden for r in rollouts]
            steps = [r.kept_steps for r in rollouts]
        else:
            states = list(self._score([(r.prompt_ids, r.response_ids) for r in rollouts]))
            steps = [list(range(len(r.response_ids))) for r in rollouts]
        sequences = [
            TrainingSequence(
                r.example_id,
                r.visit,
                r.prompt_ids,
                r.response_ids,
                kept,
                [r.writers[step] for step in kept],
                self._processes.rank,
            )
            for r, kept in zip(rollouts, steps, strict=True)
        ]
        self._put(sequences, states)
        return sequences

    def read_ground_truth(self, items: Sequence[tuple[Prompt, int]]) -> list[TrainingSequence]:
        """The data's own responses, every assistant turn of them; scored by one teacher pass for a divergence."""
        sequences = _ground_truth(items, [self._processes.rank] * len(items))
        if self._imitates:
            hidden = self._score([(s.prompt_ids, s.response_ids) for s in sequences])
            self._put(sequences, [h[s.loss_steps] for s, h in zip(sequences, hidden, strict=True)])
        return sequences

    def remember(self, rollouts: Sequence[Rollout], sequences: Sequence[TrainingSequence], step: int) -> None:
        """Keep the sequences written at `step` for the further uses that rollout.reuse gives them."""
        self.replay.add(e for e in self._entries(rollouts, sequences, step) if e is not None)

    def hand_over(self) -> None:
        """Divide anew who learns from what is held, after a resume with another number of processes."""
        self.replay.hand_over(self._processes.count)
        self.prepared.hand_over(self._processes.count)

    @property
    def held(self) -> list[TrainingSequence]:
        """Every sequence, of all processes, whose teacher outputs a later step may need."""
        return [*self.replay.sequences, *(s for prepared in self.prepared for s in prepared.sequences)]

    def _entries(
        self, rollouts: Sequence[Rollout], sequences: Sequence[TrainingSequence], step: int
    ) -> list[ReplayEntry | None]:
        """What the sequences written at `step` are in the replay buffer; None for one that trains but once."""
        # The adaptive share draws from the buffer at random, again and again.
        uses = None if self.share is not None else self.config.rollout.reuse - 1
        entries: list[ReplayEntry | None] = []
        for written, sequence in zip(rollouts, sequences, strict=True):
            if uses == 0 or not sequence.loss_steps:
                entries.append(None)
                continue
            entry = ReplayEntry(sequence, step, uses)
            # One step of each, in the middle; past the student's last step there is no state of it to remember.
            asked = [t for t in sequence.loss_steps if written.jsd_bits is None or written.jsd_bits[t] is not None]
            if written.student_hidden is not None and asked:
                entry.probe_step = asked[len(asked) // 2]
                # A copy: a view would be sent to other processes with the whole tensor behind it.
                entry.probe_hidden = written.student_hidden[entry.probe_step].cpu().clone()
            entries.append(entry)
        return entries

    def _forget_used(self, step: int) -> None:
        """Drop the teacher's outputs that no sequence will need after `step`."""
        self.replay.expire(step + 1)
        self.cache.keep_only(self.held)

    def _batch_of(self, step: int, spent: float) -> BatchKind:
        mix = self.config.data.ground_truth_mix
        if mix == 0 and self.share is None:
            return "rollout"
        coin = ground_truth_coin(self.config.seed, step)
        if self.share is None:
            return "ground_truth" if coin < mix else "rollout"
        full = len(self.replay) >= self.config.rollout.replay_capacity
        return self.share.batch(coin, min(1.0, spent), can_replay=full)

    def _fresh_and_replayed(self, batch: BatchKind, total: int) -> tuple[int, int]:
        """How many sequences of a step are written now, and how many had been before."""
        if self.share is None:
            return split_step(total, self.config.rollout.reuse, len(self.replay))
        return (0, total) if batch == "replay" else (total, 0)

    def _score(self, sequences: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
        assert self._teacher is not None, "a configuration that scores responses loads the teacher"
        return score_responses(
            self._teacher, sequences, pad_id=self.pair.pad_id, batch_size=self.recovery.sizes.micro_batch
        )

    def _staleness(self, drawn: Sequence[ReplayEntry]) -> float | None:
        measure = partial(staleness_nats, self._objective, drawn, pad_id=self.pair.pad_id, device=self._device)
        return self.recovery.attempt("validation", measure)

    def _put(self, sequences: Sequence[TrainingSequence], states: Sequence[Tensor | None]) -> None:
        kept = [(s, h) for s, h in zip(sequences, states, strict=True) if s.loss_steps and h is not None]
        if kept:
            assert isinstance(self.cache, LogitCache), "a stored teacher has scored everything"
            self.cache.put([s for s, _ in kept], torch.cat([h for _, h in kept]))


def ground_truth_coin(seed: int, step: int) -> float:
    """In (0, 1): a step below data.ground_truth_mix learns from the data's responses."""
    return float(uniform(row_keys(seed, torch.tensor([_GROUND_TRUTH_COIN]), torch.tensor([step]))))


def _ground_truth(items: Sequence[tuple[Prompt, int]], owners: Sequence[int]) -> list[TrainingSequence]:
    """The data's own responses, where there are any, each with the process that learns from it."""
    found = (ground_truth_sequence(p, visit, owner) for (p, visit), owner in zip(items, owners, strict=True))
    return [sequence for sequence in found if sequence is not None]
