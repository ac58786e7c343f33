"""Responses written by two models, and responses read by one: what the rest of qswitch calls.

Knows no cache of teacher outputs and no loss: it hands back the teacher's hidden states of the steps it was asked to
keep, on the device or, where many sequences wait for their turn, in host memory. How rows are written is in
`engine.py`.

Letters: `R` rows, `T` response steps, `L` padded length, `D` teacher width.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qswitch.data.template import pad_left
from qswitch.models.language_model import LanguageModel, weights_cast_once
from qswitch.rollout.block_length import BlockLength, FixedBlock
from qswitch.rollout.engine import Engine
from qswitch.rollout.policy import Policy
from qswitch.rollout.requests import Keep, Rollout, RolloutRequest, RolloutStats, Sampling
from qswitch.rollout.step_graph import StepGraphs

__all__ = ["Rollout", "RolloutRequest", "RolloutStats", "inference", "rollout", "score_responses"]


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
    blocks: BlockLength | None = None,
    no_repeat_ngram_size: int = 0,
    keep_student: bool = False,
    keep_on_host: bool = False,
    student_graphs: StepGraphs | None = None,
    teacher_graphs: StepGraphs | None = None,
) -> tuple[list[Rollout], RolloutStats]:
    """Write one response per request; the answer keeps the order of the requests.

    The tokens depend on (seed, example id, visit, prompt) and the weights alone: batch_size, order and the block length
    (`blocks`; None: no drafts, the sequential engine) change speed. A student given to a policy that needs none drafts
    for the teacher. `keep_student` hands back the student's hidden states too; with `keep_on_host` kept states leave
    the device as their row ends. `student_graphs` and `teacher_graphs` replay the passes of the two. With
    `no_repeat_ngram_size` n above 0 no n-gram of prompt and response is written twice (evaluation only, so for a single
    writer).

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
    stats = RolloutStats()
    started = time.perf_counter()
    results: list[Rollout | None] = [None] * len(requests)
    if requests:
        engine = Engine(
            requests,
            teacher=teacher if policy.uses_teacher else None,
            # A draft is not checked for repeats, so a teacher that must not repeat itself writes alone.
            student=None if no_repeat_ngram_size and policy.uses_teacher else student,
            policy=policy,
            sampling=Sampling(seed, temperature, tuple(sorted(set(eos_ids))), pad_id, no_repeat_ngram_size),
            batch_size=batch_size,
            blocks=blocks or FixedBlock(0),
            keep=keep,
            keep_student=keep_student,
            student_graphs=student_graphs,
            teacher_graphs=teacher_graphs,
            stats=stats,
        )
        graphs = {"student": student_graphs, "teacher": teacher_graphs}
        before = {name: g.num_replays for name, g in graphs.items() if g is not None}
        try:
            copies = contextlib.nullcontext() if student is None else weights_cast_once(student)
            with inference(teacher, student), copies:
                for i, result in engine.run():
                    results[i] = _on_host(result) if keep_on_host else result
        finally:
            for name, g in graphs.items():
                if g is not None:
                    g.call_ends(engine.buffer_bytes(name))
        replays = {name: g.num_replays - before[name] for name, g in graphs.items() if g is not None}
        stats.student_replays, stats.teacher_replays = replays.get("student", 0), replays.get("teacher", 0)
    stats.seconds = time.perf_counter() - started
    return [r for r in results if r is not None], stats


def _on_host(written: Rollout) -> Rollout:
    hidden, student_hidden = written.teacher_hidden, written.student_hidden
    return replace(
        written,
        teacher_hidden=None if hidden is None else hidden.cpu(),
        student_hidden=None if student_hidden is None else student_hidden.cpu(),
    )


def score_responses(
    teacher: LanguageModel,
    sequences: Sequence[tuple[list[int], list[int]]],
    *,
    pad_id: int,
    batch_size: int,
    keep_on_host: bool = False,
) -> list[Tensor]:
    """The teacher's final hidden state before each response token, by parallel passes over whole sequences.

    `sequences` are (prompt ids, response ids); the answer holds one [T, D] per sequence, row t predicting response
    token t; with `keep_on_host` it leaves the device after its pass. Used for responses that the teacher did not see
    being written: ground truth, and `policy: student`.
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
                own = hidden[row, -len(sequences[i][1]) :]
                results[i] = own.to("cpu" if keep_on_host else own.device, copy=True)
    return [r for r in results if r is not None]
