"""What becomes of the student on its own text, while it trains: it answers a few held-out prompts, the teacher reads.

KL(teacher || student) on the teacher's responses, which the validation measures, favours what is learnt from such text.
A student that is used continues what it wrote itself, so here its own responses are measured: how far the teacher is
from them, by position, whether they end, repeat themselves, and are as long as the teacher's. The definitions are those
of `qswitch eval`. The prompts are the first of the validation, and so few that intervals belong to `eval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from qswitch.distill.own_text import POSITIONS, position_name, repeated_share
from qswitch.distill.recovery import Recovery
from qswitch.distill.sequence import TrainingSequence
from qswitch.distill.teacher_distance import ModelView, OwnDistance, own_distances
from qswitch.distill.validation import VALIDATION_SEED
from qswitch.models.language_model import LanguageModel
from qswitch.models.pair import TokenizerPair
from qswitch.rollout.decode import Rollout, RolloutRequest, rollout
from qswitch.rollout.policy import StudentPolicy


def own_figures(
    sequences: Sequence[TrainingSequence],
    *,
    student: LanguageModel,
    teacher: LanguageModel,
    max_new_tokens: int,
    pair: TokenizerPair,
    recovery: Recovery,
) -> dict[str, Any]:
    """Let the student answer the prompts of some validation sequences, sampled as every time, and the teacher read it.

    The first four figures are means over responses: KL(student || teacher) in nats, JSD in bits and the teacher's
    log-probability of the text less the student's own in nats, each a mean over tokens, and the repeated 4-grams.

    Raises:
        MemoryFloorError: nothing is left to shrink.
    """
    requests = [RolloutRequest(one.example_id, 0, one.prompt_ids, max_new_tokens) for one in sequences]
    write = partial(
        rollout, requests, teacher=None, student=student, policy=StudentPolicy(), seed=VALIDATION_SEED,
        temperature=1.0, eos_ids=pair.eos_ids, pad_id=pair.pad_id, keep="nothing", keep_student=True,
    )  # fmt: skip
    written, _ = recovery.attempt("rollout", lambda: write(batch_size=recovery.sizes.rollout_rows))
    view = ModelView(
        [(one.prompt_ids, one.response_ids) for one in written],
        [one.student_hidden.cpu() for one in written if one.student_hidden is not None],
        student.head,
    )
    read = partial(own_distances, view, teacher, pad_id=pair.pad_id)
    found = recovery.attempt("teacher", lambda: read(batch_size=recovery.sizes.micro_batch))
    return _summary(written, found, [len(one.response_ids) for one in sequences])


def _summary(
    written: Sequence[Rollout], distances: Sequence[OwnDistance], teacher_lengths: Sequence[int]
) -> dict[str, Any]:
    names = ("reverse_kl_nats", "jsd_bits", "log_ratio_nats")
    by_response = {name: [sum(getattr(d, name)) / sum(d.tokens) for d in distances] for name in names}
    by_position = {}
    for k, (first, last) in enumerate(POSITIONS):
        tokens = sum(d.tokens[k] for d in distances)
        if tokens:
            sums = {name: sum(getattr(d, name)[k] for d in distances) / tokens for name in names}
            by_position[position_name(first, last)] = {"tokens": tokens, **sums}
    lengths = [len(one.response_ids) for one in written]
    return {
        **{name: _mean(values) for name, values in by_response.items()},
        "repeated_4grams": _mean([repeated_share(one.response_ids, 4) for one in written]),
        "responses": len(written),
        "response_tokens": _mean(lengths),
        "length_ratio": sum(lengths) / sum(teacher_lengths),
        "ended_share": _mean([one.ended for one in written]),
        "reverse_kl_nats_by_response": by_response["reverse_kl_nats"],
        "by_position": by_position,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
