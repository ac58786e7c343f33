"""`rollout.tail_bits`: from where on the teacher writes alone, what stays the same, and how far the law can move."""

from __future__ import annotations

import math
import random

import pytest
import torch

from qswitch.divergence import jsd_bits_from_log_probs
from qswitch.rollout.policy import TEACHER, SwitchPolicy
from qswitch.rollout.threshold import TAU_FLOOR_BITS, Threshold
from tests.rollout.test_engines import LONGEST, draw_requests, make_pair, write


def threshold(
    tail_bits: float = TAU_FLOOR_BITS, schedule: str = "exponential", tau_0: float = 1.0, decay_rate: float = 0.4
) -> Threshold:
    return Threshold(schedule, tau_0, decay_rate, 0.2, LONGEST, tail_bits=tail_bits)


@pytest.mark.parametrize("schedule", ["exponential", "linear"])
@pytest.mark.parametrize("tail_bits", [0.3, 0.05, 0.005, TAU_FLOOR_BITS])
@pytest.mark.parametrize("tau_0", [1.0, 0.2])
def test_the_tail_begins_where_the_threshold_has_fallen_below(schedule, tail_bits, tau_0):
    law = threshold(tail_bits, schedule, tau_0)
    steps = torch.arange(200)
    below = (law(steps) < tail_bits).nonzero()[:, 0]
    assert law.tail_start == int(below[0])
    assert Threshold("exponential", 1.0, 0.1, 0.2, 256, tail_bits=0.005).tail_start == 53
    assert threshold(tail_bits, "growth").tail_start == math.inf


@pytest.mark.parametrize("drafts", [0, 2])
def test_the_response_is_the_exact_one_up_to_the_first_token_of_the_tail_that_the_student_would_have_written(drafts):
    pair = make_pair("llama")
    requests = draw_requests(random.Random(9), 40)
    exact, early = (SwitchPolicy(threshold(bits, decay_rate=0.1)) for bits in (TAU_FLOOR_BITS, 0.6))
    start = int(early.tail_start)
    assert 0 < start < LONGEST
    expected, before = write(pair, exact, requests, batch_size=6, drafts=drafts)
    written, after = write(pair, early, requests, batch_size=6, drafts=drafts)
    changed = 0
    for a, b in zip(expected, written, strict=True):
        assert b.writers[start:] == [TEACHER] * len(b.writers[start:])
        same = start
        while same < len(a.response_ids) and a.writers[same] == TEACHER:
            same += 1
        assert a.response_ids[:same] == b.response_ids[:same] and a.writers[:same] == b.writers[:same]
        changed += a.response_ids != b.response_ids
    assert changed > 0, "no response tells the two apart"
    if drafts == 0:
        assert after.student_passes < before.student_passes, "the student is asked in the tail all the same"


def test_where_the_student_would_have_written_the_two_laws_are_near():
    """TV(p, q) <= sqrt(2 ln 2 JSD): at most 8.3 % of a token's law at 0.005 bits."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for scale in (0.02, 0.1, 0.5, 2.0, 8.0):
        p, q = (torch.randn(2000, 5, generator=generator, dtype=torch.float64) for _ in range(2))
        log_p, log_q = (torch.log_softmax(x, dim=-1) for x in (p, p + scale * q))
        distance = (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
        bound = (2 * math.log(2) * jsd_bits_from_log_probs(log_p, log_q)).sqrt()
        worst = max(worst, float((distance / bound).max()))
    assert 0.9 < worst <= 1 + 1e-6, "a bound, and one that is nearly met"
    assert math.sqrt(2 * math.log(2) * 0.005) == pytest.approx(0.0833, abs=1e-4)
