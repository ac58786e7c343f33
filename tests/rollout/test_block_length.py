"""The choice of the block length: a pure function of counts and times, checked against a simulation by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from qswitch.models.language_model import LanguageModel
from qswitch.rollout.block_length import (
    BUCKET_STEPS,
    MAX_BLOCK_TOKENS,
    TEACHER_ONLY,
    Acceptance,
    FixedBlock,
    PassTimes,
    RowsAhead,
    best_block,
    drafts_within_scratch,
    expected_tokens,
)
from qswitch.rollout.pass_times import measure_pass_times
from tests.tiny import tiny_model


def times(teacher_one: float, per_token: float, student: float) -> PassTimes:
    """A table that is linear in the tokens and the same for 1 and 8 rows."""
    tokens = (1, 2, 4, 8)
    row = tuple(teacher_one + per_token * (n - 1) for n in tokens)
    return PassTimes((1, 8), tokens, (row, row), (student, student), "cpu")


def rows(*steps: int, remaining: int = 100, can_draft: bool = True, student_needed: bool = True) -> RowsAhead:
    n = len(steps)
    return RowsAhead(np.array(steps), np.full(n, remaining), np.full(n, can_draft), student_needed)


def accepting(rate: float, steps: int = 512) -> Acceptance:
    acceptance = Acceptance()
    for step in range(0, steps, BUCKET_STEPS):
        acceptance.count(np.full(1000, step), np.arange(1000) < 1000 * rate)
    return acceptance


def test_expected_tokens_against_the_closed_form():
    got = expected_tokens(accepting(0.7), rows(5), 6)
    assert got == pytest.approx([(1 - 0.7 ** (k + 1)) / (1 - 0.7) for k in range(7)], rel=2e-3)
    two = expected_tokens(accepting(0.7), rows(5, 90), 3)
    assert two == pytest.approx(2 * got[:4])


def test_rows_that_cannot_draft_or_are_nearly_done_write_one_token():
    assert expected_tokens(accepting(0.9), rows(5, can_draft=False), 4) == pytest.approx([1] * 5)
    assert expected_tokens(accepting(1.0), rows(5, remaining=3), 4) == pytest.approx([1, 2, 3, 3, 3], rel=1e-2)


def test_the_choice_follows_times_and_acceptance():
    dear_teacher = times(1.0, 0.02, 0.1)
    assert best_block(accepting(0.02), dear_teacher, rows(0)) == 0
    assert 3 <= best_block(accepting(0.9), dear_teacher, rows(0)) <= 12
    assert best_block(accepting(1.0), dear_teacher, rows(0)) == MAX_BLOCK_TOKENS
    assert best_block(accepting(1.0), dear_teacher, rows(0, remaining=4)) == 3
    # A pass that costs as much as its tokens one by one leaves nothing to save.
    assert best_block(accepting(0.9), times(1.0, 1.0, 0.1), rows(0, 0)) == 0
    # Acceptance by place: high at the start, low later.
    falling = Acceptance()
    falling.count(np.full(500, 0), np.full(500, True))
    falling.count(np.full(500, 64), np.full(500, False))
    assert best_block(falling, dear_teacher, rows(0)) > best_block(falling, dear_teacher, rows(64)) == 0


def test_the_choice_is_the_best_rate():
    rng = np.random.default_rng(0)
    for _ in range(200):
        acceptance, table = accepting(rng.uniform(0, 1)), times(1.0, rng.uniform(0, 1), rng.uniform(0.01, 1))
        ahead = rows(*rng.integers(0, 200, size=rng.integers(1, 9)), remaining=int(rng.integers(1, 30)))
        most = min(MAX_BLOCK_TOKENS, int(ahead.remaining[0]) - 1)
        expected = expected_tokens(acceptance, ahead, most)
        rates = [
            expected[k] / (table.teacher_seconds(len(ahead.steps), np.array([k + 1.0]))[0] + (k + 1) * table.student[0])
            for k in range(most + 1)
        ]
        assert best_block(acceptance, table, ahead) == int(np.argmax(rates))


def test_the_choice_stays_within_its_memory():
    assert drafts_within_scratch(8, 32_000) == MAX_BLOCK_TOKENS
    assert drafts_within_scratch(8, 128_256) == 6
    assert drafts_within_scratch(512, 128_256) == 0
    assert best_block(accepting(1.0), times(1.0, 0.02, 0.1), rows(0), most_drafts=5) == 5


def test_teacher_only_where_the_student_decides_nothing_and_drafts_do_not_pay():
    table = times(1.0, 0.02, 0.5)
    assert best_block(accepting(0.1), table, rows(0, student_needed=False)) == TEACHER_ONLY
    assert best_block(accepting(0.1), table, rows(0, student_needed=True)) == 0
    assert best_block(accepting(1.0), times(1.0, 0.02, 0.01), rows(0, student_needed=False)) > 0


def test_times_beyond_the_table_go_on_with_the_last_slope():
    table = times(1.0, 0.5, 0.1)
    assert table.teacher_seconds(1, np.array([1.0, 3.0, 8.0, 12.0])) == pytest.approx([1.0, 2.0, 4.5, 6.5])
    sloped = PassTimes((1, 3), (1,), ((1.0,), (2.0,)), (0.1, 0.3), "cpu")
    assert sloped.teacher_seconds(5, np.array([1.0, 9.0])) == pytest.approx([3.0, 3.0])
    assert sloped.student_seconds(2) == pytest.approx(0.2)


def test_counts_and_times_survive_json():
    acceptance = accepting(0.37, 40)
    acceptance.forget()
    restored = Acceptance()
    restored.load_state_dict(json.loads(json.dumps(acceptance.state_dict())))
    steps = np.arange(100)
    assert (restored.rates(steps) == acceptance.rates(steps)).all()
    table = times(1.0, 0.3, 0.1)
    assert PassTimes.from_dict(json.loads(json.dumps(table.to_dict()))) == table


def test_older_counts_weigh_less():
    acceptance = accepting(0.0, 8)
    for _ in range(30):
        acceptance.forget()
    acceptance.count(np.zeros(20, dtype=np.int64), np.full(20, True))
    assert acceptance.rates(np.array([0]))[0] > 0.75
    assert Acceptance().rates(np.array([0, 999])) == pytest.approx([0.5, 0.5])


def test_fixed_blocks_stop_at_the_limit():
    assert FixedBlock(5).choose(rows(0, remaining=3)) == 2
    assert FixedBlock(0).choose(rows(0)) == 0
    assert FixedBlock(0).choose(rows(0, student_needed=False)) == TEACHER_ONLY


def test_measured_times_are_positive_and_cover_the_batch():
    teacher, student = (LanguageModel(tiny_model("llama", seed=s)) for s in (1, 2))
    short = measure_pass_times(teacher, student, 4, limit_s=0.0)
    assert short.rows == (4,) and len(short.tokens) == 2 and len(short.student) == 1, "bounded, and still a table"
    assert short.teacher_seconds(2, np.array([1, 5])).shape == (2,)
    table = measure_pass_times(teacher, student, 4, repeats=1)
    assert table.rows == (1, 4)
    assert len(table.teacher) == 2 and all(len(row) == len(table.tokens) for row in table.teacher)
    assert min(min(row) for row in table.teacher) > 0 and min(table.student) > 0
    assert table.tokens[0] == 1 and len(table.tokens) >= 2
    assert torch.is_grad_enabled()
