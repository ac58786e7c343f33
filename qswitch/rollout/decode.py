"""How a batch of responses is written by two models: the sequential engine, the reference.

One student pass and one teacher pass per token, over left-padded rows that leave the batch when they end. Knows no
cache of teacher outputs and no loss: it hands back the teacher's hidden states of the steps it was asked to keep.

Letters: `R` live rows, `P` padded prompt length, `T` response steps, `V` shared vocabulary, `D` teacher width.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from qswitch.data.prompts import pad_left
from qswitch.models.language_model import LanguageModel
from qswitch.rollout import sampling
from qswitch.rollout.kv_cache import KVState
from qswitch.rollout.no_repeat import banned_tokens
from qswitch.rollout.policy import TEACHER, Policy

Keep = Literal["interventions", "all", "nothing"]


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One response to write."""

    example_id: int
    visit: int
    prompt_ids: list[int]
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Rollout:
    """One written response and what is known of each of its T tokens."""

    example_id: int
    visit: int
    prompt_ids: list[int]
    response_ids: list[int]
    writers: list[int]
    """STUDENT, TEACHER or MIXTURE per token."""
    jsd_bits: list[float] | None
    """Divergence of teacher and student per token, bits; None where only one model was asked."""
    thresholds: list[float] | None
    """tau_t per token, bits; None for policies without a threshold."""
    kept_steps: list[int]
    """Steps whose teacher output was kept."""
    teacher_hidden: Tensor | None
    """[len(kept_steps), D] final hidden states of the teacher; None when nothing is kept."""
    ended: bool
    """Whether an end-of-sequence token was written before the limit."""


@dataclass(slots=True)
class RolloutStats:
    """What a batch of rollouts cost."""

    tokens: int = 0
    teacher_passes: int = 0
    student_passes: int = 0
    seconds: float = 0.0
    by_row_passes: dict[str, int] = field(default_factory=lambda: {"teacher": 0, "student": 0})
    """Row passes: every pass counted once per row it read, prefill apart."""


@contextlib.contextmanager
def inference(*models: LanguageModel | None) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in.

    Gradient checkpointing only acts in training mode, so here it cannot switch the KV cache off.
    """
    modes = [(module, module.training) for model in models if model is not None for module in model.modules()]
    try:
        for model in models:
            if model is not None:
                model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def rollout(
    requests: Sequence[RolloutRequest],
    *,
    teacher: LanguageModel | None,
    student: LanguageModel | None,
    policy: Policy,
    seed: int,
    temperature: float,
    eos_ids: Sequence[int],
    pad_id: int,
    batch_size: int,
    keep: Keep,
    no_repeat_ngram_size: int = 0,
) -> tuple[list[Rollout], RolloutStats]:
    """Write one response per request; the answer keeps the order of the requests.

    The tokens depend on (seed, example id, visit, prompt) and the weights alone: batch_size and order change speed.
    With `no_repeat_ngram_size` n above 0 no n-gram of prompt and response is written twice (evaluation only, so for a
    single writer).

    Raises:
        ValueError: the policy asks a model that is not given, teacher outputs are to be kept without a teacher, or
            n-grams are banned with two writers.
    """
    if no_repeat_ngram_size and policy.uses_teacher and policy.uses_student:
        raise ValueError(f"no_repeat_ngram_size is for a single writer, not for {type(policy).__name__}")
    if (policy.uses_teacher and teacher is None) or (policy.uses_student and student is None):
        raise ValueError(f"{type(policy).__name__} needs a model that was not given")
    if keep != "nothing" and not policy.uses_teacher:
        raise ValueError(f"{type(policy).__name__} does not ask the teacher, so its outputs cannot be kept")
    teacher = teacher if policy.uses_teacher else None
    student = student if policy.uses_student else None

    stats = RolloutStats()
    started = time.perf_counter()
    results: list[Rollout | None] = [None] * len(requests)
    # Rows of similar length share a batch: less padding, and by the sampling contract the same tokens.
    order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), i))
    with inference(teacher, student):
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            batch = [requests[i] for i in members]
            written = _write_batch(
                batch, teacher, student, policy, seed, temperature, eos_ids, pad_id, keep, stats, no_repeat_ngram_size
            )
            for i, result in zip(members, written, strict=True):
                results[i] = result
    stats.seconds = time.perf_counter() - started
    return [r for r in results if r is not None], stats


def _log_probs(model: LanguageModel | None, hidden: Tensor | None) -> Tensor | None:
    """[R, D] -> [R, V] in fp32, or in fp64 for a model that computes in fp64."""
    if model is None or hidden is None:
        return None
    logits = model.logits(hidden)
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def _write_batch(
    batch: Sequence[RolloutRequest],
    teacher: LanguageModel | None,
    student: LanguageModel | None,
    policy: Policy,
    seed: int,
    temperature: float,
    eos_ids: Sequence[int],
    pad_id: int,
    keep: Keep,
    stats: RolloutStats,
    no_repeat_ngram_size: int,
) -> list[Rollout]:
    reference = student if student is not None else teacher
    assert reference is not None
    device = reference.device
    num_rows = len(batch)
    limits = torch.tensor([r.max_new_tokens for r in batch], device=device)
    max_steps = int(limits.max())
    keys = sampling.row_keys(
        seed,
        torch.tensor([r.example_id for r in batch], device=device),
        torch.tensor([r.visit for r in batch], device=device),
    )
    eos = torch.tensor(sorted(set(eos_ids)), device=device)

    # Everything written stays on the device until the batch is done; rows are addressed by their first index.
    tokens = torch.zeros((num_rows, max_steps), dtype=torch.int64, device=device)
    writers = torch.zeros((num_rows, max_steps), dtype=torch.int8, device=device)
    jsd = torch.zeros((num_rows, max_steps), dtype=torch.float64, device=device)
    tau = torch.zeros((num_rows, max_steps), dtype=torch.float64, device=device)
    has_jsd = has_tau = False
    teacher_states: Tensor | None = None
    lengths = torch.zeros(num_rows, dtype=torch.int64, device=device)
    ended = torch.zeros(num_rows, dtype=torch.bool, device=device)

    ids, mask = (x.to(device) for x in pad_left([r.prompt_ids for r in batch], pad_id))
    models = {"teacher": teacher, "student": student}
    states = {name: KVState(model) for name, model in models.items() if model is not None}
    hidden: dict[str, Tensor] = {name: state.prefill(ids, mask) for name, state in states.items()}
    stats.teacher_passes += int(teacher is not None)
    stats.student_passes += int(student is not None)
    if keep != "nothing":
        width = hidden["teacher"].shape[-1]
        teacher_states = hidden["teacher"].new_empty((num_rows, max_steps, width))

    if no_repeat_ngram_size:  # prompt and response of each row from slot 0 on
        prompt_lengths = mask.sum(dim=1)
        history = torch.zeros((num_rows, ids.shape[1] + max_steps), dtype=torch.int64, device=device)
        for i, request in enumerate(batch):
            history[i, : len(request.prompt_ids)] = torch.tensor(request.prompt_ids, device=device)
    live = torch.arange(num_rows, device=device)  # (R,) rows still being written
    for t in range(max_steps):
        steps = torch.full_like(live, t)
        coins = sampling.uniform(sampling.step_keys(keys[live], steps, sampling.COIN_STREAM))
        decision = policy.decide(
            _log_probs(teacher, hidden.get("teacher")), _log_probs(student, hidden.get("student")), steps, coins
        )
        log_probs = decision.log_probs
        if no_repeat_ngram_size:
            banned = banned_tokens(
                history[live], prompt_lengths[live] + t, no_repeat_ngram_size, decision.log_probs.shape[-1]
            )
            log_probs = log_probs.masked_fill(banned, float("-inf"))
        if temperature == 0:
            drawn = log_probs.argmax(dim=-1)
        else:
            noise = sampling.gumbel(sampling.step_keys(keys[live], steps), log_probs.shape[-1])
            drawn = sampling.draw(log_probs, noise, temperature)
        if no_repeat_ngram_size:
            history[live, prompt_lengths[live] + t] = drawn

        tokens[live, t] = drawn
        writers[live, t] = decision.writers
        lengths[live] = t + 1
        if decision.jsd_bits is not None:
            has_jsd = True
            jsd[live, t] = decision.jsd_bits.double()
        if decision.threshold is not None:
            has_tau = True
            tau[live, t] = decision.threshold
        if teacher_states is not None:
            teacher_states[live, t] = hidden["teacher"]
        stats.tokens += len(live)

        is_eos = torch.isin(drawn, eos)
        ended[live] = is_eos
        stay = (~is_eos) & (t + 1 < limits[live])
        rows = stay.nonzero().flatten()  # the one synchronisation of the step
        if len(rows) == 0:
            break
        if len(rows) < len(live):
            live, drawn = live[rows], drawn[rows]
            for state in states.values():
                state.keep_rows(rows)
        hidden = {name: state.advance(drawn) for name, state in states.items()}
        for name in states:
            stats.by_row_passes[name] += len(live)
        stats.teacher_passes += int(teacher is not None)
        stats.student_passes += int(student is not None)

    length_list, ended_list = lengths.tolist(), ended.tolist()
    token_rows, writer_rows, jsd_rows, tau_rows = tokens.tolist(), writers.tolist(), jsd.tolist(), tau.tolist()
    results = []
    for i, request in enumerate(batch):
        n = length_list[i]
        if keep == "interventions":
            kept = [t for t in range(n) if writer_rows[i][t] == TEACHER]
        else:
            kept = list(range(n)) if keep == "all" else []
        states_kept = None
        if teacher_states is not None:
            states_kept = teacher_states[i, torch.tensor(kept, dtype=torch.int64, device=device)]
        results.append(
            Rollout(
                example_id=request.example_id,
                visit=request.visit,
                prompt_ids=request.prompt_ids,
                response_ids=token_rows[i][:n],
                writers=writer_rows[i][:n],
                jsd_bits=jsd_rows[i][:n] if has_jsd else None,
                thresholds=tau_rows[i][:n] if has_tau else None,
                kept_steps=kept,
                teacher_hidden=states_kept,
                ended=ended_list[i],
            )
        )
    return results


def score_responses(
    teacher: LanguageModel,
    sequences: Sequence[tuple[list[int], list[int]]],
    *,
    pad_id: int,
    batch_size: int,
) -> list[Tensor]:
    """The teacher's final hidden state before each response token, by parallel passes over whole sequences.

    `sequences` are (prompt ids, response ids); the answer holds one [T, D] per sequence, row t predicting response
    token t. Used for responses that the teacher did not see being written: ground truth, and `policy: student`.
    """
    results: list[Tensor | None] = [None] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]) + len(sequences[i][1]))
    with inference(teacher):
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            rows = [sequences[i][0] + sequences[i][1][:-1] for i in members]
            ids, mask = (x.to(teacher.device) for x in pad_left(rows, pad_id))
            positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
            hidden = teacher.hidden(ids, attention_mask=mask, position_ids=positions)  # (R, L, D)
            for row, i in enumerate(members):
                results[i] = hidden[row, -len(sequences[i][1]) :].clone()
    return [r for r in results if r is not None]
