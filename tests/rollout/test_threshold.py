"""The threshold along a response, and the controller that holds a share of teacher tokens."""

from __future__ import annotations

import math
import random

import pytest
import torch

from qswitch.config import RolloutSection
from qswitch.errors import ConfigError
from qswitch.rollout.adaptive_threshold import GAIN, MAX_LOG_FACTOR, AdaptiveThreshold, threshold_of_run
from qswitch.rollout.policy import TEACHER, make_policy
from qswitch.rollout.requests import Rollout
from qswitch.rollout.threshold import TAU_FLOOR_BITS, make_threshold

SCHEDULES = {
    "exponential": {"decay_rate": 0.1},
    "relative": {"schedule": "relative", "expected_tokens": 50},
    "constant": {"schedule": "constant", "constant_threshold": 0.2},
}


def tau(threshold, step: int) -> float:
    return float(threshold(torch.tensor(step)))


def test_a_relative_threshold_falls_alike_over_short_and_long_responses():
    short, long = (make_threshold(RolloutSection(schedule="relative", expected_tokens=n)) for n in (36, 720))
    paper = make_threshold(RolloutSection())
    for step in range(0, 72, 3):
        assert tau(short, step) == pytest.approx(tau(long, 20 * step), rel=1e-12)
        assert tau(short, step) == pytest.approx(tau(paper, step), rel=1e-12), "the paper's over its 36 tokens"


def test_the_expected_length_is_said_by_the_run_and_by_nobody_else():
    section = RolloutSection(schedule="relative", relative_decay=2.0)
    with pytest.raises(ConfigError, match=r"expected_tokens=auto.*set a number"):
        make_policy(section)
    assert tau(make_threshold(section, expected_tokens=40.0), 40) == pytest.approx(math.exp(-2), rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_factor_above_the_critical_one_makes_the_teacher_write_and_none_below(name):
    section = RolloutSection(**SCHEDULES[name])
    written = make_threshold(section)
    draw = random.Random(3)
    for _ in range(300):
        step, jsd = draw.randrange(200), draw.random() ** 3
        critical = written.critical_factor(step, jsd)
        for factor in (0.99 * critical, 1.01 * critical):
            if math.exp(-MAX_LOG_FACTOR) < factor < math.exp(MAX_LOG_FACTOR):
                level = tau(make_threshold(section, factor=factor), step)
                assert (jsd > level or level < TAU_FLOOR_BITS) == (factor > critical), (step, jsd, factor)
    first = written.critical_factor(0, 0.5)
    assert first == math.inf if name != "constant" else first == 0.4


@pytest.mark.parametrize("schedule", ["exponential", "constant"])
@pytest.mark.parametrize("factor", [0.3, 1.0, 7.0])
def test_the_tail_begins_where_the_teacher_writes_in_any_case(schedule, factor):
    threshold = make_threshold(RolloutSection(schedule=schedule, constant_threshold=1e-6), factor=factor)
    start = threshold.tail_start
    if start == math.inf:
        assert schedule == "constant" and 1e-6 / factor >= TAU_FLOOR_BITS
        return
    assert all(tau(threshold, t) < TAU_FLOOR_BITS for t in range(start, start + 50))
    assert start == 0 or tau(threshold, start - 1) >= TAU_FLOOR_BITS


def written_by(threshold, draw: random.Random, *, rows: int = 8, scale: float = 1.0) -> list[Rollout]:
    """Rollouts of models whose divergence is random; some rows diverge more than others, lengths differ."""
    found = []
    for i in range(rows):
        level, length = draw.uniform(0.5, 2.0) * scale, draw.randrange(10, 129)
        jsd = [min(1.0, level * draw.betavariate(0.7, 3.0)) for _ in range(length)]
        levels = threshold(torch.arange(length)).tolist()
        tail = [limit < TAU_FLOOR_BITS for limit in levels]
        writers = [int(t or j > limit) for j, limit, t in zip(jsd, levels, tail, strict=True)]
        asked = [None if t else j for j, t in zip(jsd, tail, strict=True)]
        found.append(Rollout(i, 0, [1], [5] * length, writers, asked, levels, [], None, True))
    return found


def share_of(rollouts: list[Rollout]) -> float:
    writers = [w for one in rollouts for w in one.writers]
    return sum(w == TEACHER for w in writers) / len(writers)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("wanted", [0.15, 0.5, 0.85])
def test_the_share_is_held_from_any_start_and_while_the_student_comes_nearer(name, wanted):
    for start in (0.02, 1.0, 50.0):
        scaled = {k: v * (1 / start if name == "constant" else start) if isinstance(v, float) else v
                  for k, v in SCHEDULES[name].items()}  # fmt: skip
        if name == "constant":
            scaled["constant_threshold"] = min(1.0, scaled["constant_threshold"])
        adaptive = AdaptiveThreshold(RolloutSection(**scaled, teacher_share=wanted))
        draw, later, first = random.Random(11), [], None
        for number in range(60):
            rollouts = written_by(adaptive.threshold, draw, scale=1.0 - 0.01 * number)  # the models come nearer
            adaptive.observe(rollouts)
            first = first or rollouts
            later += rollouts if number else []
        assert share_of(later) == pytest.approx(wanted, abs=0.015), (start, share_of(first))
        whole = share_of(first + later)
        assert whole == pytest.approx(adaptive.teacher_tokens / adaptive.tokens, rel=1e-12)
        assert whole == pytest.approx(wanted, abs=0.03)


def test_the_sum_of_errors_is_what_the_factor_has_moved():
    """The law behind it: nothing but the way of the factor is left of the errors, so the share tends to the wanted."""
    adaptive = AdaptiveThreshold(RolloutSection(teacher_share=0.4))
    draw, owed, before = random.Random(5), 0.0, 0.0
    for number in range(30):
        rollouts = written_by(adaptive.threshold, draw)
        adaptive.observe(rollouts)
        if number == 0:
            before = adaptive.log_factor
            continue
        tokens = sum(len(one.writers) for one in rollouts)
        owed += (0.4 - share_of(rollouts)) * tokens / (adaptive.tokens / adaptive.sets)
    assert adaptive.log_factor - before == pytest.approx(GAIN * owed, rel=1e-9)


def test_the_order_of_rollouts_changes_nothing_and_a_state_goes_on_exactly():
    section = RolloutSection(teacher_share=0.4)
    straight, shuffled, restored = (AdaptiveThreshold(section) for _ in range(3))
    draw = random.Random(8)
    for number in range(6):
        rollouts = written_by(straight.threshold, draw)
        straight.observe(rollouts)
        shuffled.observe(random.Random(number).sample(rollouts, len(rollouts)))
        restored.observe(rollouts)
        after = AdaptiveThreshold(section)
        after.load_state_dict(restored.state_dict())
        restored = after
    assert straight.state_dict() == shuffled.state_dict() == restored.state_dict()
    assert straight.log_factor != 0


def test_without_a_wanted_share_the_threshold_stays_as_written(tmp_path):
    section = RolloutSection(schedule="relative")
    adaptive = AdaptiveThreshold(section)
    assert AdaptiveThreshold.is_needed(section) and not AdaptiveThreshold.is_needed(RolloutSection())
    adaptive.expected_tokens = 30.0
    before = adaptive.threshold
    adaptive.observe(written_by(before, random.Random(1)))
    assert adaptive.threshold == before
    assert threshold_of_run(RolloutSection(), tmp_path / "none.json") == make_threshold(RolloutSection())
