"""The engine against a brute-force oracle, and against itself batched in other ways."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qswitch.models.language_model import LanguageModel
from qswitch.rollout.decode import RolloutRequest, rollout, score_responses
from qswitch.rollout.policy import (
    STUDENT,
    TEACHER,
    MixturePolicy,
    RandomPolicy,
    StudentPolicy,
    SwitchPolicy,
    TeacherPolicy,
    Threshold,
)

VOCAB, EOS, PAD = 8, 0, 1
PROMPT = [3, 5]
LENGTH = 3


def tiny(seed: int, spread: float) -> LanguageModel:
    """A two-layer random Llama in float64 whose logits differ enough to disagree with another seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    hf = LlamaForCausalLM(config).double()
    with torch.no_grad():
        hf.lm_head.weight.normal_(0, spread)
    return LanguageModel(hf.eval())


@pytest.fixture(scope="module")
def pair() -> tuple[LanguageModel, LanguageModel]:
    return tiny(1, 0.45), tiny(2, 0.45)


def switch(decay_rate: float, schedule: str = "exponential") -> SwitchPolicy:
    return SwitchPolicy(Threshold(schedule, tau_0=0.3, decay_rate=decay_rate, constant=0.05, max_new_tokens=LENGTH))


def run(pair, policy, requests, *, seed=7, batch_size=4, keep="nothing", temperature=1.0):
    teacher, student = pair
    return rollout(
        requests, teacher=teacher, student=student, policy=policy, seed=seed, temperature=temperature, eos_ids=[EOS],
        pad_id=PAD, batch_size=batch_size, keep=keep,
    )[0]  # fmt: skip


def plain_log_probs(model: LanguageModel, ids: list[int]) -> list[float]:
    """Next-token log-probabilities by one plain forward pass of the transformers model."""
    with torch.no_grad():
        return torch.log_softmax(model.hf(torch.tensor([ids])).logits[0, -1], dim=-1).tolist()


def oracle_jsd(p: list[float], q: list[float]) -> float:
    total = 0.0
    for a, b in zip(map(math.exp, p), map(math.exp, q), strict=True):
        m = (a + b) / 2
        total += 0.5 * a * math.log2(a / m) + 0.5 * b * math.log2(b / m)
    return total


def oracle(pair, tau) -> tuple[dict[tuple[int, ...], float], float]:
    """Exact probability of every response of at most LENGTH tokens, and the expected number of teacher tokens."""
    teacher, student = pair
    probabilities: dict[tuple[int, ...], float] = {}
    expected_teacher = 0.0
    open_responses: dict[tuple[int, ...], float] = {(): 1.0}
    for t in range(LENGTH):
        following: dict[tuple[int, ...], float] = {}
        for response, mass in open_responses.items():
            p, q = (plain_log_probs(m, [*PROMPT, *response]) for m in (teacher, student))
            teacher_writes = oracle_jsd(p, q) > tau(t)
            expected_teacher += mass * teacher_writes
            for token in range(VOCAB):
                longer = (*response, token)
                share = mass * math.exp((p if teacher_writes else q)[token])
                if token == EOS or t + 1 == LENGTH:
                    probabilities[longer] = share
                else:
                    following[longer] = share
        open_responses = following
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-12)
    return probabilities, expected_teacher


def chi_square_limit(degrees: int) -> float:
    """Upper 1e-4 point of chi-square, Wilson and Hilferty's approximation (z = 3.719)."""
    return degrees * (1 - 2 / (9 * degrees) + 3.719 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize("decay_rate", [0.1, 0.5, 1.0])
def test_switch_samples_the_exact_distribution(pair, decay_rate):
    num = 20_000
    policy = switch(decay_rate)
    expected, expected_teacher = oracle(pair, lambda t: 0.3 * math.exp(-decay_rate * t))
    written = run(pair, policy, [RolloutRequest(i, 0, PROMPT, LENGTH) for i in range(num)], batch_size=4000)

    counts = Counter(tuple(r.response_ids) for r in written)
    statistic, degrees, rest_seen, rest_expected = 0.0, -1, 0.0, 0.0
    for response, probability in expected.items():
        if probability * num < 5:
            rest_seen += counts[response]
            rest_expected += probability * num
            continue
        statistic += (counts[response] - probability * num) ** 2 / (probability * num)
        degrees += 1
    if rest_expected >= 5:
        statistic += (rest_seen - rest_expected) ** 2 / rest_expected
        degrees += 1
    assert set(counts) <= set(expected)
    assert degrees > 40
    assert statistic < chi_square_limit(degrees)

    per_rollout = [sum(w == TEACHER for w in r.writers) for r in written]
    mean = sum(per_rollout) / num
    deviation = math.sqrt(sum((x - mean) ** 2 for x in per_rollout) / num / num)
    assert abs(mean - expected_teacher) <= 4 * deviation + 1e-12


POLICIES = {
    "switch": switch(0.5),
    "switch linear": switch(0.5, "linear"),
    "switch constant": switch(0.5, "constant"),
    "switch growth": switch(0.05, "growth"),
    "student": StudentPolicy(),
    "teacher": TeacherPolicy(),
    "random": RandomPolicy(0.5),
    "mixture": MixturePolicy(0.2),
}


@pytest.mark.parametrize("name", POLICIES)
def test_batch_size_and_order_change_nothing(pair, name):
    generator = torch.Generator().manual_seed(3)
    requests = [
        RolloutRequest(i, i % 3, torch.randint(2, VOCAB, (1 + i % 5,), generator=generator).tolist(), 4 + i % 9)
        for i in range(16)
    ]
    alone = run(pair, POLICIES[name], requests, batch_size=1)
    assert len({len(r.response_ids) for r in alone}) > 2, "the case must let rows leave the batch at different steps"
    for batch_size, order in itertools.product((3, 8), (list(range(16)), list(range(15, -1, -1)))):
        batched = run(pair, POLICIES[name], [requests[i] for i in order], batch_size=batch_size)
        for i, result in zip(order, batched, strict=True):
            assert result.response_ids == alone[i].response_ids
            assert result.writers == alone[i].writers
            assert result.example_id == requests[i].example_id


def test_visits_and_seeds_give_other_rollouts(pair):
    def responses(seed, visit):
        requests = [RolloutRequest(i, visit, PROMPT, 12) for i in range(20)]
        return [r.response_ids for r in run(pair, switch(0.5), requests, seed=seed)]

    assert responses(7, 0) == responses(7, 0)
    assert responses(7, 0) != responses(7, 1)
    assert responses(7, 0) != responses(8, 0)


@pytest.mark.parametrize("keep", ["interventions", "all"])
def test_kept_teacher_states_equal_a_parallel_pass(pair, keep):
    teacher, _ = pair
    requests = [RolloutRequest(i, 0, PROMPT + [2] * (i % 4), 10) for i in range(9)]
    written = run(pair, switch(0.5), requests, batch_size=4, keep=keep)
    scored = score_responses(teacher, [(r.prompt_ids, r.response_ids) for r in written], pad_id=PAD, batch_size=4)
    assert any(r.kept_steps for r in written)
    for result, states in zip(written, scored, strict=True):
        wanted = [t for t, w in enumerate(result.writers) if keep == "all" or w == TEACHER]
        assert result.kept_steps == wanted
        torch.testing.assert_close(result.teacher_hidden, states[wanted], rtol=0, atol=1e-12)


def test_greedy_switch_takes_the_writers_best_token(pair):
    teacher, student = pair
    result = run(pair, switch(0.5), [RolloutRequest(0, 0, PROMPT, 6)], temperature=0.0)[0]
    for t, token in enumerate(result.response_ids):
        writer = teacher if result.writers[t] == TEACHER else student
        log_probs = plain_log_probs(writer, [*PROMPT, *result.response_ids[:t]])
        assert token == max(range(VOCAB), key=log_probs.__getitem__)


def test_limits_and_end_tokens_are_kept(pair):
    requests = [RolloutRequest(i, 0, PROMPT, 1 + i % 7) for i in range(40)]
    for request, result in zip(requests, run(pair, switch(0.5), requests), strict=True):
        assert 1 <= len(result.response_ids) <= request.max_new_tokens
        assert EOS not in result.response_ids[:-1]
        assert result.ended == (result.response_ids[-1] == EOS)
        assert result.ended or len(result.response_ids) == request.max_new_tokens


def test_training_mode_is_put_back_and_no_gradient_is_kept(pair):
    _, student = pair
    student.train()
    try:
        run(pair, StudentPolicy(), [RolloutRequest(0, 0, PROMPT, 3)])
        assert all(m.training for m in student.modules())
    finally:
        student.eval()


def test_a_policy_without_its_model_is_refused(pair):
    _, student = pair
    with pytest.raises(ValueError, match="SwitchPolicy needs a model"):
        rollout(
            [RolloutRequest(0, 0, PROMPT, 3)], teacher=None, student=student, policy=switch(0.5), seed=0,
            temperature=1.0, eos_ids=[EOS], pad_id=PAD, batch_size=1, keep="nothing",
        )  # fmt: skip


def test_student_policy_never_intervenes(pair):
    written = run(pair, StudentPolicy(), [RolloutRequest(i, 0, PROMPT, 6) for i in range(8)])
    assert {w for r in written for w in r.writers} == {STUDENT}
    assert all(r.jsd_bits is None for r in written)
