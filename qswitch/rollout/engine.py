"""One engine for every policy and block length: the student drafts, one teacher pass scores, the policy walks along.

A round with K drafts costs K + 1 student passes and one teacher pass over K + 1 tokens, and writes 1 to K + 1 tokens:
along the block, the policy names each step's writer, a draft stands while that writer writes the same token, and the
first other token ends the block; the rest is taken back. With the keyed noise of `noise.py` every token is the one
that single steps would have written, so K = 0 is the sequential engine, not another code path. Rows advance by
different amounts, and a row that ends makes place for the next prompt while the others are in mid-response.

The host asks the device once a round. Knows no cache of teacher outputs and no loss.

Letters: `R` live rows, `J` = K + 1 steps of a block, `V` shared vocabulary, `D` teacher width, `D'` student width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qswitch.data.template import pad_left
from qswitch.errors import NonFiniteError
from qswitch.models.language_model import LanguageModel
from qswitch.plan.memory import cache_slots
from qswitch.rollout import noise
from qswitch.rollout.block_length import TEACHER_ONLY, BlockLength, RowsAhead
from qswitch.rollout.kv_cache import MAX_HOLE_SHARE, KVState, Prompts
from qswitch.rollout.no_repeat import NoRepeat
from qswitch.rollout.policy import STUDENT, TEACHER, Block, Policy
from qswitch.rollout.requests import Keep, Rollout, RolloutRequest, RolloutStats, Sampling
from qswitch.rollout.responses import Landing, Responses
from qswitch.rollout.rows import Rows
from qswitch.rollout.step_graph import StepGraphs
from qswitch.rollout.transfer import to_device, upload


def log_probs(model: LanguageModel, hidden: Tensor) -> Tensor:
    """Final hidden states [..., D] -> log-probabilities [..., V] in fp32, in fp64 for a model that computes in fp64."""
    logits = model.logits(hidden)
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


@dataclass(frozen=True, slots=True)
class _Drafts:
    """What the student would write in a block, and what it thought."""

    tokens: Tensor
    """int64 [R, J]."""
    log_probs: Tensor
    """[R, J, V]."""
    hidden: Tensor
    """[R, J, D']."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the host learns of a round, in one copy from the device."""

    counts: np.ndarray
    """int64 [R]: tokens written."""
    finished: np.ndarray
    """bool [R]."""
    ended: np.ndarray
    """bool [R]: of those finished, by an end token."""
    teacher_wrote_last: np.ndarray
    """bool [R]."""
    not_finite: dict[str, np.ndarray]
    """Of each model bool [R]: whether a distribution that it gave for a written token holds NaN."""
    agreed: np.ndarray
    """bool [R, J]: whether the token is the student's draft."""


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
        teacher_graphs: StepGraphs | None = None,
        stats: RolloutStats,
    ) -> None:
        self._requests = requests
        self._teacher, self._student = teacher, student
        self._policy, self._sampling, self._blocks, self.stats = policy, sampling, blocks, stats
        # Rows of similar length meet: less padding, and by the sampling contract the same tokens.
        self._pending = deque(sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), i)))
        num_places = min(batch_size, len(requests))
        self._refill_rows = max(1, num_places // 8)

        reference = student if student is not None else teacher
        assert reference is not None
        self._device, self._vocab_size = reference.device, reference.vocab_size
        self._eos = to_device(sampling.eos_ids, self._device)
        longest = max((r.max_new_tokens for r in requests), default=0)
        longest_prompt = max((len(r.prompt_ids) for r in requests), default=0)
        self._responses = Responses(num_places, longest, self._device, keep=keep, keep_student=keep_student)
        self._no_repeat: NoRepeat | None = None
        if sampling.no_repeat_ngram_size:
            self._no_repeat = NoRepeat(num_places, longest_prompt, longest, sampling.no_repeat_ngram_size, self._device)
        self._free_places = list(range(num_places))
        self._landing: list[Landing] = []
        num_drafts = 0 if teacher is None or student is None else min(blocks.most_drafts, longest - 1)
        num_slots = cache_slots(longest_prompt, longest, num_drafts)
        self._states: dict[str, KVState] = {}
        if teacher is not None:
            self._states["teacher"] = KVState(teacher, num_places, num_slots, graphs=teacher_graphs)
        if student is not None:
            self._states["student"] = KVState(student, num_places, num_slots, graphs=student_graphs)
        self._rows = self._starting([])

    def run(self) -> Iterator[tuple[int, Rollout]]:
        """(index of the request, its response) as the rows end."""
        self._tidy(np.zeros(0, dtype=bool))
        while len(self._rows):
            answer = self._round(self._choose())
            self._refuse_not_finite(answer)
            yield from self._land()  # rows of the round before: their copies arrived with this round's answer
            self._send(answer)
            self._tidy(~answer.finished)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        yield from self._land()

    def buffer_bytes(self, name: str) -> int:
        """Keys and values that the call holds for teacher or student."""
        return self._states[name].buffer_bytes if name in self._states else 0

    # ---------------------------------------------------------------- one round

    def _choose(self) -> int:
        if self._teacher is None:
            return 0
        if self._student is None:
            return TEACHER_ONLY
        rows = self._rows.host
        return self._blocks.choose(
            RowsAhead(
                steps=rows.step,
                remaining=rows.limit - rows.step,
                can_draft=~rows.student_left,
                student_needed=self._policy.uses_student and not bool(rows.in_tail.all()),
            )
        )

    def _round(self, num_drafts: int) -> _Answer:
        """Write 1 to `num_drafts` + 1 tokens per row."""
        self.stats.max_hole_share = max(self.stats.max_hole_share, *(s.hole_share for s in self._states.values()))
        host, device = self._rows.host, self._rows.device
        num_steps = max(num_drafts, 0) + 1
        steps = device.step[:, None] + torch.arange(num_steps, device=self._device)  # (R, J)
        live = steps < device.limit[:, None]
        live_counts = np.minimum(num_steps, host.limit - host.step)
        lead = self._responses.last_tokens(device.place, device.step)
        token_noise = self._noise(steps, noise.TOKEN_STREAM)
        unasked = self._unasked()
        for name, state in self._states.items():
            if name == "teacher" or num_drafts != TEACHER_ONLY:
                state.begin_block(num_steps)

        drafts = teacher_log_probs = teacher_hidden = None
        if self._student is not None and num_drafts != TEACHER_ONLY:
            drafts = self._draft(lead, live, live_counts, token_noise, unasked)
        if self._teacher is not None:
            inputs = lead[:, None] if drafts is None else torch.cat([lead[:, None], drafts.tokens[:, :-1]], dim=1)
            teacher_hidden = self._pass("teacher", inputs, live, live_counts)  # (R, J, D)
            teacher_log_probs = log_probs(self._teacher, teacher_hidden)
            if drafts is None:
                teacher_log_probs = self._without_repeats(teacher_log_probs[:, 0])[:, None]

        decision = self._policy.decide(self._view(steps, teacher_log_probs, drafts))
        tokens, by_teacher = self._draw(decision.writers, teacher_log_probs, drafts, steps, token_noise)
        agrees = torch.zeros_like(live) if drafts is None else tokens == drafts.tokens
        if unasked is not None:
            agrees = agrees & ~unasked

        # The block ends at the first token that is not the draft, at an end token and at the row's limit.
        is_end = torch.isin(tokens, self._eos)
        is_last = steps + 1 >= device.limit[:, None]
        goes_on = agrees & ~is_end & ~is_last
        num_written = 1 + goes_on[:, :-1].long().cumprod(dim=1).sum(dim=1)  # (R,)
        last = (num_written - 1)[:, None]
        ended = is_end.gather(1, last)[:, 0]
        finished = ended | is_last.gather(1, last)[:, 0]
        teacher_wrote_last = decision.writers.gather(1, last)[:, 0] == TEACHER
        self._responses.write(
            device.place, steps, num_written, tokens, decision,
            by_student=None if drafts is None else drafts.tokens,
            by_teacher=by_teacher,
            unasked=unasked,
            teacher_hidden=teacher_hidden,
            student_hidden=None if drafts is None else drafts.hidden,
        )  # fmt: skip
        if self._no_repeat is not None:
            self._no_repeat.write(device.place, device.step, tokens[:, 0])
        device.step = device.step + num_written

        not_finite = self._not_finite(num_written, teacher_log_probs, drafts, unasked)
        answer = self._ask(num_written, finished, ended, teacher_wrote_last, not_finite, agrees)
        if "teacher" in self._states:
            self._states["teacher"].take_back(num_steps, num_written, answer.counts, live_counts)
        if drafts is not None:
            asked = ~host.student_left
            kept = num_written if unasked is None else torch.where(unasked[:, 0], 0, num_written)
            self._states["student"].take_back(num_steps, kept, answer.counts * asked, live_counts * asked)
        self._count(num_drafts, answer, student_asked=drafts is not None)
        host.step = host.step + answer.counts
        if drafts is None:
            host.student_left[:] = True
        host.in_tail = (host.step >= self._policy.tail_start) | (
            self._policy.hands_over_for_good & (host.in_tail | answer.teacher_wrote_last)
        )
        return answer

    def _ask(
        self,
        num_written: Tensor,
        finished: Tensor,
        ended: Tensor,
        teacher_wrote_last: Tensor,
        not_finite: dict[str, Tensor],
        agrees: Tensor,
    ) -> _Answer:
        """The one question of the round that the host puts to the device."""
        ours = torch.stack([num_written, finished, ended, teacher_wrote_last, *not_finite.values()], dim=1)
        answer = torch.cat([ours, agrees], dim=1).cpu().numpy()
        rest = 4 + len(not_finite)
        models = dict(zip(not_finite, answer.T[4:rest] > 0, strict=True))
        return _Answer(answer[:, 0], answer[:, 1] > 0, answer[:, 2] > 0, answer[:, 3] > 0, models, answer[:, rest:] > 0)

    def _not_finite(
        self, num_written: Tensor, teacher: Tensor | None, drafts: _Drafts | None, unasked: Tensor | None
    ) -> dict[str, Tensor]:
        """Of each model that was asked, bool [R]: whether its distribution at a written token holds NaN.

        One token id tells: NaN or +infinity in a row of logits makes all of its log-softmax NaN.
        """
        found = {}
        for name, distribution in (("teacher", teacher), ("student", None if drafts is None else drafts.log_probs)):
            if distribution is None:
                continue
            written = torch.arange(distribution.shape[1], device=self._device) < num_written[:, None]
            if name == "student" and unasked is not None:
                written = written & ~unasked
            found[name] = (distribution[..., 0].isnan() & written).any(dim=1)
        return found

    def _refuse_not_finite(self, answer: _Answer) -> None:
        """Nothing, or an error; a comparison with NaN is false, so a policy would let the student write on."""
        for name, rows in answer.not_finite.items():
            if rows.any():
                example = self._requests[self._rows.host.request[int(rows.argmax())]].example_id
                role: Literal["teacher", "student"] = "teacher" if name == "teacher" else "student"
                raise NonFiniteError(role, f"logits in a rollout of example {example} are")

    def _draft(
        self, lead: Tensor, live: Tensor, live_counts: np.ndarray, token_noise: Tensor | None, unasked: Tensor | None
    ) -> _Drafts:
        """What the student would write, each token read before the next."""
        assert self._student is not None
        if unasked is not None:
            live = live & ~unasked
            live_counts = live_counts * ~self._rows.host.student_left
        token, tokens, distributions, states = lead, [], [], []
        for j in range(live.shape[1]):
            hidden = self._pass("student", token[:, None], live[:, j : j + 1], (live_counts > j).astype(np.int64))
            states.append(hidden)
            distributions.append(self._without_repeats(log_probs(self._student, hidden[:, 0])))
            step_noise = None if token_noise is None else token_noise[:, j]
            token = noise.draw(distributions[-1], step_noise, self._sampling.temperature)
            tokens.append(token)
        return _Drafts(torch.stack(tokens, dim=1), torch.stack(distributions, dim=1), torch.cat(states, dim=1))

    def _unasked(self) -> Tensor | None:
        """bool [R, 1]: rows that the student has not read to the end; None where there are none, the usual case."""
        if not self._rows.host.student_left.any():
            return None
        return to_device(self._rows.host.student_left, self._device)[:, None]

    def _pass(self, name: str, tokens: Tensor, live: Tensor, live_counts: np.ndarray) -> Tensor:
        hidden = self._states[name].append(tokens, live, live_counts)
        self.stats.by_row_passes[name] += len(tokens)
        if name == "teacher":
            self.stats.teacher_passes += 1
        else:
            self.stats.student_passes += 1
        return hidden

    def _step_keys(self, steps: Tensor, stream: int) -> Tensor:
        """Keys of the noise of steps [R, J], flat: int64 [R * J]."""
        return noise.step_keys(self._rows.device.key[:, None].expand_as(steps).flatten(), steps.flatten(), stream)

    def _noise(self, steps: Tensor, stream: int) -> Tensor | None:
        """Gumbel noise [R, J, V] of a stream; None at temperature 0."""
        if self._sampling.temperature == 0:
            return None
        return noise.gumbel(self._step_keys(steps, stream), self._vocab_size).view(*steps.shape, self._vocab_size)

    def _without_repeats(self, distribution: Tensor) -> Tensor:
        """[R, V] with the tokens that would repeat an n-gram made impossible, where that was asked for."""
        if self._no_repeat is None:
            return distribution
        return self._no_repeat.without_repeats(distribution, self._rows.device.place, self._rows.device.step)

    def _view(self, steps: Tensor, teacher_log_probs: Tensor | None, drafts: _Drafts | None) -> Block:
        policy, rows = self._policy, self._rows.device
        coins = past = handed_over = None
        if policy.uses_coins:
            coins = noise.uniform(self._step_keys(steps, noise.COIN_STREAM)).view_as(steps)
        if policy.history:
            past = self._responses.past_jsd(rows.place, rows.step, policy.history)
        if policy.hands_over_for_good:
            handed_over = self._responses.handed_over(rows.place, rows.step)
        student_log_probs, tokens = (None, None) if drafts is None else (drafts.log_probs, drafts.tokens)
        return Block(steps, teacher_log_probs, student_log_probs, tokens, coins, past, handed_over)

    def _draw(
        self,
        writers: Tensor,
        teacher_log_probs: Tensor | None,
        drafts: _Drafts | None,
        steps: Tensor,
        token_noise: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The chosen writers' tokens, and the teacher's (None where it does not write alone): int64 [R, J] each."""
        temperature = self._sampling.temperature
        if teacher_log_probs is None:
            assert drafts is not None
            return drafts.tokens, None
        if self._policy.mixes:
            assert drafts is not None
            mixed = self._policy.mixture(teacher_log_probs, drafts.log_probs)
            return noise.draw(mixed, token_noise, temperature), None
        stream = self._policy.teacher_stream
        own_noise = token_noise if stream == noise.TOKEN_STREAM else self._noise(steps, stream)
        tokens = noise.draw(teacher_log_probs, own_noise, temperature)
        return (tokens if drafts is None else torch.where(writers == STUDENT, drafts.tokens, tokens)), tokens

    def _count(self, num_drafts: int, answer: _Answer, *, student_asked: bool) -> None:
        stats, rows = self.stats, self._rows.host
        stats.rounds += 1
        stats.tokens += int(answer.counts.sum())
        stats.rounds_by_drafts[num_drafts] = stats.rounds_by_drafts.get(num_drafts, 0) + 1
        if not student_asked:
            return
        offsets = np.arange(answer.agreed.shape[1])
        seen = (offsets < answer.counts[:, None]) & ~rows.student_left[:, None]
        steps = (rows.step[:, None] + offsets)[seen]
        stats.count_drafts(steps, answer.agreed[seen])
        self._blocks.count(steps, answer.agreed[seen])

    # ---------------------------------------------------------------- rows come and go

    def _starting(self, indices: list[int]) -> Rows:
        """Rows of the requests with these indices, in free places."""
        return Rows.starting(
            indices,
            [self._requests[i] for i in indices],
            [self._free_places.pop() for _ in indices],
            sampling=self._sampling,
            tail_start=self._policy.tail_start,
            device=self._device,
        )

    def _admit(self) -> Prompts | None:
        """Take the next prompts into the free places: what the models are to read of them before the first round."""
        indices = [self._pending.popleft() for _ in range(min(len(self._free_places), len(self._pending)))]
        if not indices:
            return None
        rows = self._starting(indices)
        self._rows = self._rows.join(rows)
        prompts = [self._requests[i].prompt_ids for i in indices]
        self._responses.open(rows.device.place, to_device([p[-1] for p in prompts], self._device))
        if self._no_repeat is not None:
            self._no_repeat.open(rows.device.place, prompts)
        # The last token leads the first round, so the models read everything before it.
        ids, mask = (upload(x[:, :-1], self._device) for x in pad_left(prompts, self._sampling.pad_id))
        if ids.shape[1]:
            self.stats.prefill_passes += len(self._states)
        return Prompts(ids, mask.bool(), np.array([len(p) - 1 for p in prompts], dtype=np.int64))

    def _send(self, answer: _Answer) -> None:
        """Send what the finished rows wrote on its way to the host."""
        rows = self._rows.host
        for row in answer.finished.nonzero()[0]:
            place = int(rows.place[row])
            self._landing.append(
                self._responses.send(
                    place, int(rows.step[row]), request=int(rows.request[row]), ended=bool(answer.ended[row])
                )
            )
            self._free_places.append(place)

    def _land(self) -> Iterator[tuple[int, Rollout]]:
        for landing in self._landing:
            request = self._requests[landing.request]
            yield landing.request, landing.rollout(request)
        self._landing = []

    def _tidy(self, stays: np.ndarray) -> None:
        """Drop ended rows, let the next prompts in, and close holes that waste too much."""
        kept = stays.nonzero()[0]
        changed = len(kept) < len(stays)
        if changed:
            self._rows = self._rows.select(kept)
        prompts = None
        if len(kept) == 0 or len(self._free_places) >= self._refill_rows:
            prompts = self._admit()
        for state in self._states.values():
            if prompts is not None or changed or state.hole_share > MAX_HOLE_SHARE:
                state.repack(kept, prompts)
