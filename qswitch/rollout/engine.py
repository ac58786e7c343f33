"""One engine for every policy and block length: the student drafts, one teacher pass scores, the policy walks along.

A round with K drafts costs K + 1 student passes and one teacher pass over K + 1 tokens, and writes 1 to K + 1 tokens:
along the block, the policy names each step's writer, a draft stands while that writer writes the same token, and the
first other token ends the block; the rest is taken back. With the keyed noise of `sampling.py` every token is the one
that single steps would have written, so K = 0 is the sequential engine, not another code path. Rows advance by
different amounts, and a row that ends makes place for the next prompt while the others are in mid-response.

The host asks the device once a round. Knows no cache of teacher outputs and no loss.

Letters: `R` live rows, `J` = K + 1 steps of a round, `V` shared vocabulary, `D` teacher width, `T` longest response.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qswitch.data.template import pad_left
from qswitch.models.language_model import LanguageModel
from qswitch.rollout import sampling
from qswitch.rollout.block_length import TEACHER_ONLY, BlockLength, RowsAhead
from qswitch.rollout.kv_cache import MAX_HOLE_SHARE, KVState
from qswitch.rollout.no_repeat import banned_tokens
from qswitch.rollout.policy import STUDENT, TEACHER, Block, Policy
from qswitch.rollout.records import Keep, Rollout, RolloutRequest, RolloutStats
from qswitch.rollout.step_graph import StepGraphs


@dataclass(frozen=True, slots=True)
class Sampling:
    """Everything besides weights and prompts on which the tokens depend, and what ends a response."""

    seed: int
    temperature: float
    eos_ids: tuple[int, ...]
    pad_id: int
    no_repeat_ngram_size: int = 0
    """Above 0: no n-gram of prompt and response is written twice. For one writer without drafts."""


def log_probs(model: LanguageModel, hidden: Tensor) -> Tensor:
    """Final hidden states [..., D] -> log-probabilities [..., V] in fp32, in fp64 for a model that computes in fp64."""
    logits = model.logits(hidden)
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


class Engine:
    """Writes the responses of `requests`, `batch_size` rows at a time. Serves one call of `rollout`."""

    def __init__(
        self,
        requests: Sequence[RolloutRequest],
        *,
        teacher: LanguageModel | None,
        student: LanguageModel | None,
        policy: Policy,
        sampling: Sampling,
        batch_size: int,
        blocks: BlockLength,
        keep: Keep,
        keep_student: bool = False,
        student_graphs: StepGraphs | None = None,
        stats: RolloutStats,
    ) -> None:
        self._requests = requests
        self._teacher, self._student = teacher, student
        self._policy, self._sampling, self._blocks, self.stats = policy, sampling, blocks, stats
        # Rows of similar length meet: less padding, and by the sampling contract the same tokens.
        self._pending = deque(sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), i)))
        self._batch_size = min(batch_size, len(requests))
        self._refill_rows = max(1, self._batch_size // 8)

        reference = student if student is not None else teacher
        assert reference is not None
        device = self._device = reference.device
        self._vocab_size = reference.vocab_size
        self._eos = torch.tensor(sampling.eos_ids, dtype=torch.int64, device=device)

        # What is written stays on the device until its row ends. Column 0 is the prompt's last token, column t + 1 is
        # response step t, and the last column takes what is written past the end of a block.
        longest = max((r.max_new_tokens for r in requests), default=0)
        shape = (self._batch_size, longest + 2)
        self._bin = longest + 1
        self._text = torch.zeros(shape, dtype=torch.int64, device=device)
        self._writers = torch.zeros(shape, dtype=torch.int8, device=device)
        self._agrees = torch.zeros(shape, dtype=torch.int8, device=device)
        self._jsd = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
        self._tau = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
        self._keep = keep
        self._keep_student = keep_student and student is not None
        self._teacher_hidden: Tensor | None = None  # (batch, T + 2, D), made with the first pass
        self._student_hidden: Tensor | None = None

        # Prompt and response of each place from the first column on, where repeats are banned.
        self._longest_prompt = max((len(r.prompt_ids) for r in requests), default=0)
        width = self._longest_prompt + longest + 1 if sampling.no_repeat_ngram_size else 0
        self._history = torch.zeros((self._batch_size, width), dtype=torch.int64, device=device)

        # The live rows: place in the buffers, request, progress. On the host and, where passes need it, on the device.
        self._free_places = list(range(self._batch_size))
        self._place = np.zeros(0, dtype=np.int64)
        self._request = np.zeros(0, dtype=np.int64)
        self._step = np.zeros(0, dtype=np.int64)
        self._limit = np.zeros(0, dtype=np.int64)
        self._left_by_student = np.zeros(0, dtype=bool)
        self._in_tail = np.zeros(0, dtype=bool)
        self._places = self._steps = self._limits = self._keys = torch.zeros(0, dtype=torch.int64, device=device)
        self._prompt_lengths = torch.zeros(self._batch_size, dtype=torch.int64, device=device)  # by place
        self._states: dict[str, KVState] = {}
        self._student_graphs = student_graphs
        self._landing: list[_Landing] = []

    def run(self) -> Iterator[tuple[int, Rollout]]:
        """(index of the request, its response) as the rows end."""
        self._states = self._admit()
        while len(self._place):
            num_drafts = self._choose()
            finished, ended = self._round(num_drafts)
            yield from self._land()  # rows of the round before: their copies arrived with this round's answer
            if finished.any():
                self._harvest(finished, ended)
            self._tidy(~finished)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        yield from self._land()

    # ---------------------------------------------------------------- one round

    def _choose(self) -> int:
        if self._teacher is None:
            return 0
        if self._student is None:
            return TEACHER_ONLY
        needed = self._policy.uses_student and not bool(self._in_tail.all())
        return self._blocks.choose(
            RowsAhead(
                steps=self._step,
                remaining=self._limit - self._step,
                can_draft=~self._left_by_student,
                student_needed=needed,
            )
        )

    def _round(self, num_drafts: int) -> tuple[np.ndarray, np.ndarray]:
        """Write 1 to `num_drafts` + 1 tokens per row; which rows finished, and which of them by an end token."""
        self.stats.max_hole_share = max(self.stats.max_hole_share, *(s.hole_share for s in self._states.values()))
        num_steps = max(num_drafts, 0) + 1
        offsets = torch.arange(num_steps, device=self._device)
        steps = self._steps[:, None] + offsets  # (R, J)
        live = steps < self._limits[:, None]
        live_counts = np.minimum(num_steps, self._limit - self._step)
        lead = self._text[self._places, self._steps]
        noise = self._noise(steps, sampling.TOKEN_STREAM)

        drafts = student_log_probs = None
        asks_student = self._student is not None and num_drafts != TEACHER_ONLY
        if asks_student:
            drafts, student_log_probs, student_hidden = self._draft(lead, live, live_counts, noise)
        teacher_log_probs = None
        if self._teacher is not None:
            inputs = lead[:, None] if drafts is None else torch.cat([lead[:, None], drafts[:, :-1]], dim=1)
            hidden = self._pass("teacher", inputs, live, live_counts)  # (R, J, D)
            teacher_log_probs = log_probs(self._teacher, hidden)
            if drafts is None:
                teacher_log_probs = self._without_repeats(teacher_log_probs[:, 0])[:, None]

        left = self._left_on_device()
        decision = self._policy.decide(self._view(steps, teacher_log_probs, student_log_probs, drafts))
        tokens = self._draw(decision.writers, teacher_log_probs, student_log_probs, drafts, steps, noise)
        agrees = torch.zeros_like(live) if drafts is None else tokens == drafts
        if left is not None:
            agrees = agrees & ~left

        # The block ends at the first token that is not the draft, at an end token and at the row's limit.
        is_end = torch.isin(tokens, self._eos)
        is_last = steps + 1 >= self._limits[:, None]
        goes_on = agrees & ~is_end & ~is_last
        written = 1 + goes_on[:, :-1].long().cumprod(dim=1).sum(dim=1)  # (R,)
        last = (written - 1)[:, None]
        ended = is_end.gather(1, last)[:, 0]
        finished = ended | is_last.gather(1, last)[:, 0]

        rows = self._places[:, None]
        columns = torch.where(offsets < written[:, None], steps + 1, self._bin)
        self._text[rows, columns] = tokens
        self._writers[rows, columns] = decision.writers
        self._agrees[rows, columns] = agrees.to(torch.int8)
        if self._sampling.no_repeat_ngram_size:
            self._history[self._places, self._prompt_lengths[self._places] + self._steps] = tokens[:, 0]
        if decision.jsd_bits is not None:
            jsd = decision.jsd_bits.double()
            self._jsd[rows, columns] = jsd if left is None else jsd.masked_fill(left, torch.nan)
        if decision.threshold is not None:
            self._tau[rows, columns] = decision.threshold
        if self._keep != "nothing":
            if self._teacher_hidden is None:
                self._teacher_hidden = hidden.new_empty((*self._text.shape, hidden.shape[-1]))
            self._teacher_hidden[rows, columns] = hidden
        if self._keep_student and asks_student:
            if self._student_hidden is None:
                self._student_hidden = student_hidden.new_zeros((*self._text.shape, student_hidden.shape[-1]))
            self._student_hidden[rows, columns] = student_hidden
        teacher_wrote_last = decision.writers.gather(1, last)[:, 0] == TEACHER
        self._steps = self._steps + written

        # The one question of the round.
        answer = torch.cat([torch.stack([written, finished, ended, teacher_wrote_last], dim=1), agrees], dim=1)
        counts, finished_now, ended_now, teacher_last, agreed = np.split(answer.cpu().numpy(), [1, 2, 3, 4], axis=1)
        counts = counts[:, 0]

        for name, state in self._states.items():
            if name == "teacher":
                state.take_back(num_steps, written, counts, live_counts)
            elif asks_student:
                stays = ~self._left_by_student
                kept = written if left is None else torch.where(left[:, 0], 0, written)
                state.take_back(num_steps, kept, counts * stays, live_counts * stays)
        self._count(num_drafts, counts, agreed.astype(bool), asks_student)
        self._step = self._step + counts
        if not asks_student:
            self._left_by_student[:] = True
        self._in_tail = (self._step >= self._policy.tail_start) | (
            self._policy.hands_over_for_good & (self._in_tail | (teacher_last[:, 0] > 0))
        )
        return finished_now[:, 0] > 0, ended_now[:, 0] > 0

    def _draft(
        self, lead: Tensor, live: Tensor, live_counts: np.ndarray, noise: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the student would write, each token read before the next: tokens [R, J], log q [R, J, V], [R, J, D']."""
        assert self._student is not None
        left = self._left_on_device()
        if left is not None:
            live = live & ~left
            live_counts = live_counts * ~self._left_by_student
        token, tokens, distributions, states = lead, [], [], []
        for j in range(live.shape[1]):
            hidden = self._pass("student", token[:, None], live[:, j : j + 1], (live_counts > j).astype(np.int64))
            states.append(hidden)
            distributions.append(self._without_repeats(log_probs(self._student, hidden[:, 0])))
            token = sampling.draw(distributions[-1], None if noise is None else noise[:, j], self._sampling.temperature)
            tokens.append(token)
        return torch.stack(tokens, dim=1), torch.stack(distributions, dim=1), torch.cat(states, dim=1)

    def _left_on_device(self) -> Tensor | None:
        """bool [R, 1]: rows that the student has not read to the end; None where there are none, the usual case."""
        if not self._left_by_student.any():
            return None
        return torch.from_numpy(self._left_by_student).to(self._device)[:, None]

    def _pass(self, name: str, tokens: Tensor, live: Tensor, live_counts: np.ndarray) -> Tensor:
        state = self._states[name]
        hidden = state.append(tokens, live, live_counts)
        self.stats.by_row_passes[name] += len(tokens)
        if name == "teacher":
            self.stats.teacher_passes += 1
        else:
            self.stats.student_passes += 1
        return hidden

    def _noise(self, steps: Tensor, stream: int) -> Tensor | None:
        """Gumbel noise [R, J, V] of a stream; None at temperature 0."""
        if self._sampling.temperature == 0:
            return None
        keys = sampling.step_keys(self._keys[:, None].expand_as(steps).flatten(), steps.flatten(), stream)
        return sampling.gumbel(keys, self._vocab_size).view(*steps.shape, self._vocab_size)

    def _without_repeats(self, distribution: Tensor) -> Tensor:
        """[R, V] with the tokens that would repeat an n-gram made impossible, where that was asked for."""
        size = self._sampling.no_repeat_ngram_size
        if size == 0:
            return distribution
        lengths = self._prompt_lengths[self._places] + self._steps
        banned = banned_tokens(self._history[self._places], lengths, size, self._vocab_size)
        return distribution.masked_fill(banned, float("-inf"))

    def _view(self, steps: Tensor, teacher: Tensor | None, student: Tensor | None, drafts: Tensor | None) -> Block:
        policy = self._policy
        coins = past = handed_over = None
        if policy.uses_coins:
            keys = self._keys[:, None].expand_as(steps).flatten()
            coins = sampling.uniform(sampling.step_keys(keys, steps.flatten(), sampling.COIN_STREAM)).view_as(steps)
        if policy.history:
            before = self._steps[:, None] + torch.arange(1 - policy.history, 1, device=self._device)
            past = self._jsd[self._places[:, None], before.clamp_min(0)]  # column 0 is NaN
        if policy.hands_over_for_good:
            handed_over = self._writers[self._places, self._steps] == TEACHER
        return Block(steps, teacher, student, drafts, coins, past, handed_over)

    def _draw(
        self,
        writers: Tensor,
        teacher: Tensor | None,
        student: Tensor | None,
        drafts: Tensor | None,
        steps: Tensor,
        noise: Tensor | None,
    ) -> Tensor:
        """The chosen writers' tokens, int64 [R, J]."""
        temperature = self._sampling.temperature
        if teacher is None:
            assert drafts is not None
            return drafts
        if self._policy.mixes:
            assert student is not None
            return sampling.draw(self._policy.mixture(teacher, student), noise, temperature)
        stream = self._policy.teacher_stream
        own_noise = noise if stream == sampling.TOKEN_STREAM else self._noise(steps, stream)
        tokens = sampling.draw(teacher, own_noise, temperature)
        return tokens if drafts is None else torch.where(writers == STUDENT, drafts, tokens)

    def _count(self, num_drafts: int, counts: np.ndarray, agreed: np.ndarray, asks_student: bool) -> None:
        stats = self.stats
        stats.rounds += 1
        stats.tokens += int(counts.sum())
        stats.rounds_by_drafts[num_drafts] = stats.rounds_by_drafts.get(num_drafts, 0) + 1
        if not asks_student:
            return
        offsets = np.arange(agreed.shape[1])
        seen = (offsets < counts[:, None]) & ~self._left_by_student[:, None]
        steps = (self._step[:, None] + offsets)[seen]
        stats.count_drafts(steps, agreed[seen])
        self._blocks.count(steps, agreed[seen])

    # ---------------------------------------------------------------- rows come and go

    def _admit(self) -> dict[str, KVState]:
        """Take the next prompts into the free places and read all but their last tokens; the new rows' states."""
        indices = [self._pending.popleft() for _ in range(min(len(self._free_places), len(self._pending)))]
        if not indices:
            return {}
        requests = [self._requests[i] for i in indices]
        limits = [r.max_new_tokens for r in requests]
        places = np.array([self._free_places.pop() for _ in indices], dtype=np.int64)
        device = self._device
        on_device = torch.from_numpy(places).to(device)
        self._text[on_device, 0] = torch.tensor([r.prompt_ids[-1] for r in requests], device=device)
        self._writers[on_device, 0] = STUDENT
        if self._sampling.no_repeat_ngram_size:
            padded = [r.prompt_ids + [0] * (self._longest_prompt - len(r.prompt_ids)) for r in requests]
            self._history[on_device, : self._longest_prompt] = torch.tensor(padded, device=device)
            self._prompt_lengths[on_device] = torch.tensor([len(r.prompt_ids) for r in requests], device=device)
        self._jsd[on_device] = torch.nan
        self._tau[on_device] = torch.nan

        zeros = np.zeros(len(indices), dtype=np.int64)
        self._place, self._request = _join(self._place, places), _join(self._request, indices)
        self._step, self._limit = _join(self._step, zeros), _join(self._limit, limits)
        self._left_by_student = _join(self._left_by_student, zeros)
        self._in_tail = _join(self._in_tail, zeros + (self._policy.tail_start <= 0))
        keys = sampling.row_keys(
            self._sampling.seed,
            torch.tensor([r.example_id for r in requests], device=device),
            torch.tensor([r.visit for r in requests], device=device),
        )
        self._places = torch.cat([self._places, on_device])
        self._steps = torch.cat([self._steps, torch.zeros_like(on_device)])
        self._limits = torch.cat([self._limits, torch.tensor(limits, device=device)])
        self._keys = torch.cat([self._keys, keys])

        # The last token leads the first round, so the states are of everything before it.
        ids, mask = (x[:, :-1].to(device) for x in pad_left([r.prompt_ids for r in requests], self._sampling.pad_id))
        counts = np.array([len(r.prompt_ids) - 1 for r in requests], dtype=np.int64)
        states = {}
        for name, model in (("teacher", self._teacher), ("student", self._student)):
            if model is None:
                continue
            states[name] = KVState(model, len(requests), graphs=self._student_graphs if name == "student" else None)
            if counts.max() > 0:
                states[name].append(ids, mask.bool(), counts)
                self.stats.prefill_passes += 1
        return states

    def _tidy(self, stays: np.ndarray) -> None:
        """Drop ended rows, let the next prompts in, and close holes that waste too much."""
        rows = stays.nonzero()[0]
        if len(rows) < len(stays):
            self._place, self._request = self._place[rows], self._request[rows]
            self._step, self._limit = self._step[rows], self._limit[rows]
            self._left_by_student, self._in_tail = self._left_by_student[rows], self._in_tail[rows]
            index = torch.from_numpy(rows).to(self._device)
            self._places, self._steps = self._places[index], self._steps[index]
            self._limits, self._keys = self._limits[index], self._keys[index]
        newcomers: dict[str, KVState] = {}
        if len(rows) == 0 or len(self._free_places) >= self._refill_rows:
            newcomers = self._admit()
        for name, state in self._states.items():
            if len(rows) == 0:
                self._states = newcomers
                break
            if newcomers or len(rows) < len(stays) or state.hole_share > MAX_HOLE_SHARE:
                state.repack(rows, newcomers.get(name))

    def _harvest(self, finished: np.ndarray, ended: np.ndarray) -> None:
        """Send what the finished rows wrote on its way to the host."""
        for row in finished.nonzero()[0]:
            place, length = int(self._place[row]), int(self._step[row])
            span = slice(1, length + 1)
            whole = torch.stack([t[place, span].double() for t in (self._text, self._writers, self._agrees)])
            real = torch.stack([self._jsd[place, span], self._tau[place, span]])
            hidden = self._teacher_hidden[place, span].clone() if self._teacher_hidden is not None else None
            states = self._student_hidden[place, span].clone() if self._student_hidden is not None else None
            values = _to_host(torch.cat([whole, real]))
            self._landing.append(
                _Landing(int(self._request[row]), bool(ended[row]), values, hidden, states, self._keep)
            )
            self._free_places.append(place)

    def _land(self) -> Iterator[tuple[int, Rollout]]:
        for landing in self._landing:
            yield landing.request, landing.rollout(self._requests[landing.request], self._student is not None)
        self._landing = []


def _join(old: np.ndarray, new: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([old, np.asarray(new, dtype=old.dtype)])


def _to_host(values: Tensor) -> Tensor:
    """Start a copy to the host that is complete when the device next answers."""
    if values.device.type != "cuda":
        return values
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Landing:
    """A finished row on its way to the host."""

    request: int
    ended: bool
    values: Tensor
    """float64 [5, T]: token, writer, agreement, divergence, threshold; float64 holds every token id exactly."""
    hidden: Tensor | None
    """[T, D] states of the teacher, where some are to be kept."""
    student_hidden: Tensor | None
    """[T, D'] states of the student, where they are to be kept."""
    keep: Keep

    def rollout(self, request: RolloutRequest, student_asked: bool) -> Rollout:
        tokens, writers, agrees = self.values[:3].long().tolist()
        jsd, tau = (
            None if bool(series.isnan().all()) else [None if v != v else v for v in series.tolist()]
            for series in self.values[3:]
        )
        kept, hidden = [], None
        if self.hidden is not None:
            kept = [t for t, writer in enumerate(writers) if self.keep == "all" or writer == TEACHER]
            hidden = self.hidden[torch.tensor(kept, dtype=torch.int64, device=self.hidden.device)]
        return Rollout(
            example_id=request.example_id,
            visit=request.visit,
            prompt_ids=request.prompt_ids,
            response_ids=tokens,
            writers=writers,
            jsd_bits=jsd,
            thresholds=tau,
            kept_steps=kept,
            teacher_hidden=hidden,
            ended=self.ended,
            student_hidden=self.student_hidden,
            student_agrees=[bool(a) for a in agrees] if student_asked else None,
        )
