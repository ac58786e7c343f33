"""Speculative and sequential rollouts are the same, token for token, and both are what plain passes would write."""

from __future__ import annotations

import math
import random

import pytest
import torch

from qswitch.models.language_model import LanguageModel
from qswitch.rollout import noise
from qswitch.rollout.block_length import TEACHER_ONLY, FixedBlock, RowsAhead
from qswitch.rollout.decode import Rollout, RolloutRequest, rollout
from qswitch.rollout.policy import (
    MIXTURE,
    STUDENT,
    TAU_FLOOR_BITS,
    TEACHER,
    AdaSwitchPolicy,
    MixturePolicy,
    RandomPolicy,
    SkdPolicy,
    StudentPolicy,
    SwitchPolicy,
    TeacherPolicy,
    Threshold,
)
from tests.tiny import tiny_model

ARCHITECTURES = ("llama", "gpt2", "opt", "qwen2", "mistral", "gemma2", "gemma3")
ONE_LAYER = ("gpt2", "opt", "qwen2", "mistral")
"""A layer takes half of a pass's time; the other families have two, and alternate windows between them."""
VOCAB, EOS, PAD = 13, 2, 0
LONGEST = 16  # with prompts of up to 12, far beyond the sliding windows of 8


def switch(decay_rate: float, schedule: str = "exponential", tau_0: float = 0.9) -> SwitchPolicy:
    return SwitchPolicy(Threshold(schedule, tau_0=tau_0, decay_rate=decay_rate, constant=0.2, max_new_tokens=LONGEST))


POLICIES = {
    "switch": switch(0.1),
    "switch with a tail": switch(2.0),
    "switch linear": switch(0.1, "linear"),
    "switch constant": switch(0.1, "constant"),
    "switch growth": switch(0.02, "growth"),
    "student": StudentPolicy(),
    "teacher": TeacherPolicy(),
    "random": RandomPolicy(0.5),
    "mixture": MixturePolicy(0.2),
    "skd": SkdPolicy(3),
    "adaswitch": AdaSwitchPolicy(factor=1.3, window=4),
}


def make_pair(arch: str) -> tuple[LanguageModel, LanguageModel]:
    """(teacher, student): the student is the teacher with noise, so that they agree at times."""
    changes = {"vocab_size": VOCAB, "dtype": torch.float64, **({"layers": 1} if arch in ONE_LAYER else {})}
    teacher, student = (tiny_model(arch, seed=5, **changes) for _ in range(2))
    torch.manual_seed(8)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.06)
        for model in (teacher, student):  # distributions far from flat
            model.get_output_embeddings().weight.mul_(2.0)
    return LanguageModel(teacher), LanguageModel(student)


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[LanguageModel, LanguageModel]]:
    return {arch: make_pair(arch) for arch in ARCHITECTURES}


def draw_requests(rng: random.Random, num: int) -> list[RolloutRequest]:
    return [
        RolloutRequest(
            example_id=rng.randrange(1000),
            visit=rng.randrange(3),
            prompt_ids=[rng.randrange(3, VOCAB) for _ in range(rng.choice([1, 1, 2, 5, 12]))],
            max_new_tokens=rng.choice([1, 2, 7, LONGEST, LONGEST]),
        )
        for _ in range(num)
    ]


def write(pair, policy, requests, *, batch_size=1, drafts=0, temperature=1.0, keep="nothing", blocks=None, seed=11):
    return rollout(
        requests, teacher=pair[0], student=pair[1], policy=policy, seed=seed, temperature=temperature, eos_ids=[EOS],
        pad_id=PAD, batch_size=batch_size, keep=keep, blocks=blocks or FixedBlock(drafts),
    )  # fmt: skip


def same(a: Rollout, b: Rollout) -> bool:
    return a.response_ids == b.response_ids and a.writers == b.writers and a.ended == b.ended


# ---------------------------------------------------------------- the engine against plain passes


def plain(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    """log-probabilities [V] by one plain pass of the transformers model, without cache, padding or our masks."""
    with torch.no_grad():
        return torch.log_softmax(model.hf(torch.tensor([ids]), use_cache=False).logits[0, -1], dim=-1)


def oracle_jsd(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    total = 0.0
    for a, b in zip(log_p.exp().tolist(), log_q.exp().tolist(), strict=True):
        m = (a + b) / 2
        total += 0.5 * (a * math.log2(a / m) if a else 0) + 0.5 * (b * math.log2(b / m) if b else 0)
    return total


def oracle(
    pair, name: str, request: RolloutRequest, seed: int = 11
) -> tuple[list[int], list[int], list[int], list[int]]:
    """(tokens, writers, the student's and the teacher's tokens) of one response, by hand, one step at a time."""
    policy = POLICIES[name]
    row = noise.row_keys(seed, torch.tensor([request.example_id]), torch.tensor([request.visit]))
    tokens: list[int] = []
    writers: list[int] = []
    divergences: list[float] = []
    by_student: list[int] = []
    by_teacher: list[int] = []
    for t in range(request.max_new_tokens):
        p, q = (plain(m, request.prompt_ids + tokens) for m in pair)
        step = torch.tensor([t])
        token_noise, redraw = (
            noise.gumbel(noise.step_keys(row, step, s), VOCAB)[0].double()
            for s in (noise.TOKEN_STREAM, noise.REDRAW_STREAM)
        )
        students, teachers = int((q + token_noise).argmax()), int((p + token_noise).argmax())
        jsd = oracle_jsd(p, q)
        divergences.append(jsd)
        if name.startswith("switch"):
            tau = {
                "exponential": policy.threshold.tau_0 * math.exp(-policy.threshold.decay_rate * t),
                "linear": policy.threshold.tau_0 * (1 - t / LONGEST),
                "constant": 0.2,
                "growth": 1 - math.exp(-policy.threshold.decay_rate * (t + 1)),
            }[policy.threshold.schedule]
            writer = TEACHER if jsd > tau or tau < TAU_FLOOR_BITS else STUDENT
        elif name == "random":
            coin = float(noise.uniform(noise.step_keys(row, step, noise.COIN_STREAM)))
            writer = TEACHER if coin < 0.5 else STUDENT
        elif name == "mixture":
            writer = MIXTURE
        elif name == "skd":
            writer = STUDENT if students in p.topk(3).indices.tolist() else TEACHER
            teachers = int((p + redraw).argmax())
        elif name == "adaswitch":
            before = divergences[-5:-1]
            unusual = len(before) == 4 and jsd > 1.3 * sum(before) / 4
            writer = TEACHER if unusual or (writers and writers[-1] == TEACHER) else STUDENT
        else:
            writer = STUDENT if name == "student" else TEACHER
        mixed = int((torch.log(0.2 * p.exp() + 0.8 * q.exp()) + token_noise).argmax())
        tokens.append({STUDENT: students, TEACHER: teachers, MIXTURE: mixed}[writer])
        writers.append(writer)
        by_student.append(students)
        by_teacher.append(teachers)
        if tokens[-1] == EOS:
            break
    return tokens, writers, by_student, by_teacher


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_engine_writes_what_plain_passes_would(pairs, arch):
    rng = random.Random(arch)
    for name, policy in POLICIES.items():
        requests = draw_requests(rng, 4)
        written, _ = write(pairs[arch], policy, requests, batch_size=3, drafts=rng.choice([0, 1, 3, 7]))
        for request, result in zip(requests, written, strict=True):
            tokens, writers, by_student, by_teacher = oracle(pairs[arch], name, request)
            assert (result.response_ids, result.writers) == (tokens, writers), (name, request)
            # What each would have written is kept wherever it was asked; a student that drafts may not be needed.
            for ours, expected in ((result.student_ids, by_student), (result.teacher_ids, by_teacher)):
                assert all(a in (None, b) for a, b in zip(ours or expected, expected, strict=True)), (name, request)
            assert policy.uses_student is False or result.student_ids is not None
            assert (result.teacher_ids is not None) == (policy.uses_teacher and not policy.mixes), name


# ---------------------------------------------------------------- the engines against each other


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_block_length_writes_the_same_tokens(pairs, arch):
    rng = random.Random(f"blocks {arch}")
    cases = taught = drafted = 0
    for case in range(44):
        name = list(POLICIES)[case % len(POLICIES)]
        requests = draw_requests(rng, 11)
        temperature = rng.choice([1.0, 1.0, 0.7, 0.0])
        reference, _ = write(pairs[arch], POLICIES[name], requests, batch_size=11, temperature=temperature)
        batch_size, drafts = rng.choice([1, 2, 3, 4, 5, 6, 6, 6]), rng.choice([1, 1, 2, 2, 3, 4, 6, 15])
        written, stats = write(
            pairs[arch], POLICIES[name], requests, batch_size=batch_size, drafts=drafts, temperature=temperature
        )
        for request, a, b in zip(requests, reference, written, strict=True):
            assert same(a, b), (name, batch_size, drafts, request)
        assert stats.max_hole_share <= 0.25
        cases += len(requests)
        taught += sum(w == TEACHER for r in written for w in r.writers)
        drafted += sum(rounds for drafts, rounds in stats.rounds_by_drafts.items() if drafts > 0)
    assert cases >= 430  # over 3,000 with all architectures
    assert taught > 500 and drafted > 300, "the cases must exercise both writers and blocks"


@pytest.mark.parametrize("name", POLICIES)
def test_a_refilled_row_equals_its_solo_run(pairs, name):
    requests = draw_requests(random.Random(name), 24)
    solo = [write(pairs["mistral"], POLICIES[name], [r])[0][0] for r in requests]
    for batch_size, drafts in ((2, 0), (5, 4), (8, 2)):
        written, stats = write(pairs["mistral"], POLICIES[name], requests, batch_size=batch_size, drafts=drafts)
        models = 2 if POLICIES[name].uses_teacher else 1
        assert stats.prefill_passes > 1.5 * models * len(requests) / batch_size / 2, "rows must have been refilled"
        assert all(same(a, b) for a, b in zip(solo, written, strict=True))


class Whimsical:
    """Any block length at any time, and teacher-only rounds wherever they are allowed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.teacher_only = 0

    most_drafts = 9

    def choose(self, rows: RowsAhead) -> int:
        if not rows.student_needed and self.rng.random() < 0.5:
            self.teacher_only += 1
            return TEACHER_ONLY
        return min(self.rng.randint(0, 9), int(rows.remaining.max()) - 1)

    def count(self, steps, kept) -> None:
        pass


@pytest.mark.parametrize("name", ["switch with a tail", "teacher", "adaswitch", "switch"])
def test_block_lengths_may_change_at_every_round(pairs, name):
    seen = 0
    for seed in range(8):
        requests = draw_requests(random.Random(seed), 10)
        reference, _ = write(pairs["gemma3"], POLICIES[name], requests, batch_size=10)
        blocks = Whimsical(seed)
        written, stats = write(pairs["gemma3"], POLICIES[name], requests, batch_size=4, blocks=blocks)
        assert all(same(a, b) for a, b in zip(reference, written, strict=True))
        assert stats.rounds_by_drafts.get(TEACHER_ONLY, 0) == blocks.teacher_only
        seen += blocks.teacher_only
    assert (seen > 0) == (name != "switch")


@pytest.mark.parametrize("keep", ["interventions", "all"])
def test_kept_teacher_states_do_not_depend_on_the_blocks(pairs, keep):
    requests = draw_requests(random.Random(keep), 9)
    reference, _ = write(pairs["llama"], POLICIES["switch"], requests, keep=keep)
    written, _ = write(pairs["llama"], POLICIES["switch"], requests, keep=keep, batch_size=4, drafts=5)
    assert any(r.kept_steps for r in reference)
    for a, b in zip(reference, written, strict=True):
        assert a.kept_steps == b.kept_steps
        torch.testing.assert_close(a.teacher_hidden, b.teacher_hidden, rtol=0, atol=1e-10)
        assert a.student_agrees == b.student_agrees
        assert all(
            x == pytest.approx(y, abs=1e-10) for x, y in zip(a.jsd_bits, b.jsd_bits, strict=True) if x is not None
        )


def test_a_good_student_saves_teacher_passes(pairs):
    teacher = pairs["qwen2"][0]
    requests = [RolloutRequest(i, 0, [5, 7], LONGEST) for i in range(6)]
    _, alone = write((teacher, teacher), POLICIES["switch"], requests, batch_size=1)
    _, drafted = write((teacher, teacher), POLICIES["switch"], requests, batch_size=1, drafts=6)
    assert alone.teacher_passes == alone.tokens == drafted.tokens
    assert drafted.teacher_passes <= math.ceil(drafted.tokens / 7) + len(requests)
    assert drafted.kept_draft_share == 1.0
