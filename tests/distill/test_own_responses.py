"""What a run measures on the student's own responses: plain arithmetic gives the same, and training does not notice."""

from __future__ import annotations

import math

import pytest
import torch

from qswitch.distill.own_responses import own_figures
from qswitch.distill.own_text import POSITIONS
from qswitch.distill.teacher_distance import CHUNK_TOKENS, distances, own_distances, view_of
from qswitch.distill.validation import VALIDATION_SEED
from qswitch.rollout.decode import RolloutRequest, inference, rollout
from qswitch.rollout.policy import StudentPolicy
from qswitch.run import distill
from qswitch.run_dir import RunDir
from tests.distill.test_trainer import adapter_bytes, folders, make_trainer, settings

__all__ = ["folders"]


@pytest.fixture
def trainer(folders, tmp_path):
    config = settings(folders, train__compute_dtype="fp64", rollout__max_new_tokens=80, train__eval_own_prompts=3)
    return make_trainer(config, tmp_path / "run")


def plain_terms(trainer, prompt_ids: list[int], response_ids: list[int]) -> dict[str, torch.Tensor]:
    """Per token, from whole logits of both models."""
    ids = torch.tensor([prompt_ids + response_ids])
    log_p, log_q = (m.hf(ids).logits[0].double().log_softmax(-1) for m in (trainer.teacher, trainer.student))
    at = slice(len(prompt_ids) - 1, -1)
    log_p, log_q = log_p[at], log_q[at]
    mean = ((log_p.exp() + log_q.exp()) / 2).log()
    return {
        "forward_kl_nats": (log_p.exp() * (log_p - log_q)).sum(-1),
        "reverse_kl_nats": (log_q.exp() * (log_q - log_p)).sum(-1),
        "jsd_bits": (log_p.exp() * (log_p - mean) + log_q.exp() * (log_q - mean)).sum(-1) / 2 / math.log(2),
        "log_ratio_nats": (log_p - log_q).gather(-1, torch.tensor(response_ids)[:, None])[:, 0],
    }


def plain_figures(trainer, requests) -> tuple[list[dict[str, torch.Tensor]], list[list[int]]]:
    """The terms of the student's own responses, and the responses."""
    written, _ = rollout(
        requests, teacher=None, student=trainer.student, policy=StudentPolicy(), seed=VALIDATION_SEED, temperature=1.0,
        eos_ids=trainer.pair.eos_ids, pad_id=trainer.pair.pad_id, batch_size=1, keep="nothing",
    )  # fmt: skip
    with inference(trainer.student):
        found = [plain_terms(trainer, one.prompt_ids, one.response_ids) for one in written]
    return found, [one.response_ids for one in written]


def test_long_responses_are_measured_as_whole_ones(trainer):
    """A response is projected to the vocabulary in chunks, whose edges are no edges of the positions."""
    torch.manual_seed(0)
    vocab_size = trainer.student.vocab_size
    lengths = (1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 2 * CHUNK_TOKENS + 44)
    sequences = [([5, 6, 7], torch.randint(vocab_size, (length,)).tolist()) for length in lengths]
    with inference(trainer.student), torch.no_grad():
        for parameter in trainer.learner.trainable:  # a student that differs from its start
            parameter += 0.05 * torch.randn(parameter.shape, dtype=parameter.dtype)
        own_view, teachers_view = (
            view_of(model, model.head, sequences, pad_id=0, batch_size=4)
            for model in (trainer.student, trainer.teacher)
        )
        own = own_distances(own_view, trainer.teacher, pad_id=0, batch_size=2)
        teachers = distances(teachers_view, trainer.student, pad_id=0, batch_size=2)
        for sequence, mine, its in zip(sequences, own, teachers, strict=True):
            terms = plain_terms(trainer, *sequence)
            assert its.tokens == len(sequence[1]) == sum(mine.tokens)
            assert its.kl_nats == pytest.approx(float(terms["forward_kl_nats"].mean()), rel=1e-6)
            for name in ("reverse_kl_nats", "jsd_bits", "log_ratio_nats"):
                expected = [float(terms[name][first:last].sum()) for first, last in POSITIONS]
                assert getattr(mine, name) == pytest.approx(expected, rel=1e-5, abs=1e-6), name


def test_the_figures_are_those_of_whole_logits(trainer):
    sequences = trainer.validation.sequences[:3]
    figures = own_figures(
        sequences, student=trainer.student, teacher=trainer.teacher, max_new_tokens=80, pair=trainer.pair,
        recovery=trainer.recovery,
    )  # fmt: skip
    requests = [RolloutRequest(s.example_id, 0, s.prompt_ids, 80) for s in sequences]
    plain, responses = plain_figures(trainer, requests)
    assert figures["responses"] == 3 and max(map(len, responses)) > 32
    for name in ("reverse_kl_nats", "jsd_bits", "log_ratio_nats"):
        by_response = [float(terms[name].mean()) for terms in plain]
        assert figures[name] == pytest.approx(sum(by_response) / 3, rel=1e-6)
        for first, last in POSITIONS[:3]:
            values = torch.cat([terms[name][first:last] for terms in plain])
            position = figures["by_position"].get(f"{first}-{last - 1}")
            assert (position is None) == (not len(values))
            if position is not None:
                assert position["tokens"] == len(values)
                assert position[name] == pytest.approx(float(values.mean()), rel=1e-6)
    assert figures["reverse_kl_nats_by_response"] == pytest.approx([float(t["reverse_kl_nats"].mean()) for t in plain])
    teachers = [len(s.response_ids) for s in sequences]
    assert figures["length_ratio"] == sum(map(len, responses)) / sum(teachers)
    assert figures["ended_share"] == sum(r[-1] in trainer.pair.eos_ids for r in responses) / 3


def test_looking_changes_nothing_of_the_training(folders, tmp_path):
    """With and without the student's own responses, a run ends at the same weights to the bit."""
    for number in (0, 2):
        distill(settings(folders, train__eval_own_prompts=number), tmp_path / f"{number}")
    assert adapter_bytes(tmp_path / "0") == adapter_bytes(tmp_path / "2")
    run_dir = RunDir.open(tmp_path / "2")
    lines = [line["own"] for line in run_dir.read_metrics() if "own" in line]
    assert [one["responses"] for one in lines] == [2, 2]
    assert not any("own" in line for line in RunDir.open(tmp_path / "0").read_metrics())


def test_the_summary_has_them_before_and_after(folders, tmp_path):
    summary = distill(settings(folders, teacher__residency="swap"), tmp_path / "run")
    lines = [line for line in RunDir.open(tmp_path / "run").read_metrics() if "own" in line]
    assert summary.own_before["responses"] == 4 and summary.own_before != summary.own_after
    assert summary.own_after in [line["own"] for line in lines if line["kl_nats"] == summary.kl_after_nats]
