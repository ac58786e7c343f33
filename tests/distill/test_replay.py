"""Sequences that train more than once: how often, in which order, and what is left of them."""

from __future__ import annotations

import io
from collections import Counter

import pytest
import torch

from qswitch.distill.replay import ReplayBuffer, ReplayEntry, split_step
from qswitch.distill.sequence import TrainingSequence
from qswitch.errors import ConfigError
from qswitch.layers import build_config

MINIMAL = {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "x.jsonl"}}


def entry(i: int, born: int = 0, uses: int | None = 2) -> ReplayEntry:
    return ReplayEntry(TrainingSequence(i, 0, [5, 6], [7, 8, 9], [0, 2]), born, uses, 2, torch.full((3,), float(i)))


def ids(entries: list[ReplayEntry]) -> list[int]:
    return [e.sequence.example_id for e in entries]


@pytest.mark.parametrize("reuse", [1, 2, 3, 4, 6, 16, 32])
@pytest.mark.parametrize("total", [4, 6, 32])
def test_every_rollout_trains_reuse_times_while_a_step_has_so_many_sequences(reuse, total):
    steps = 40 + 10 * reuse
    if reuse > total:
        sequences = {"train.per_device_train_batch_size": total, "train.gradient_accumulation_steps": 1}
        with pytest.raises(ConfigError, match=f"reuse={reuse} is out of reach with {total} sequences"):
            build_config(MINIMAL, sequences, {"rollout.reuse": reuse})
        return
    buffer = ReplayBuffer(1000, 1000, seed=0)
    used: Counter[int] = Counter()
    next_id, last_born = 0, {}
    for step in range(steps):
        fresh, replayed = split_step(total, reuse, len(buffer))
        assert fresh + replayed == total
        drawn = buffer.draw(replayed, step)
        assert len({id(e) for e in drawn}) == replayed
        new = list(range(next_id, next_id + fresh))
        next_id += fresh
        last_born |= dict.fromkeys(new, step)
        buffer.add(entry(i, step, reuse - 1) for i in new)
        used.update(new + ids(drawn))
        buffer.expire(step + 1)
    assert all(used[i] == reuse for i in used if last_born[i] < steps - 3 * reuse - 1)
    assert max(used.values()) <= reuse
    assert next_id <= total + steps * -(-total // reuse) + total


def test_freshness_and_capacity():
    buffer = ReplayBuffer(capacity=3, max_age_steps=5, seed=0)
    buffer.add(entry(i, born=i) for i in range(5))
    assert len(buffer) == 3
    assert ids(buffer.draw(9, step=8)) == [3, 4]  # 2 is six steps old
    assert ids(buffer.draw(1, step=9)) == [4]
    assert buffer.sequences == []


def test_used_up_entries_need_no_teacher_outputs():
    buffer = ReplayBuffer(10, 10, seed=0)
    buffer.add([entry(1, uses=1), entry(2, uses=2), entry(3, uses=0)])
    assert [s.key for s in buffer.sequences] == [(1, 0), (2, 0)]
    buffer.draw(2, step=0)
    assert [s.key for s in buffer.sequences] == [(2, 0)]


def test_unlimited_entries_are_drawn_at_random_and_alike_after_a_resume():
    def make() -> ReplayBuffer:
        buffer = ReplayBuffer(100, 100, seed=3)
        buffer.add(entry(i, uses=None) for i in range(20))
        return buffer

    draws = [ids(make().draw(5, step)) for step in range(50)]
    assert len(Counter(i for draw in draws for i in draw)) == 20
    assert len({tuple(d) for d in draws}) > 40
    assert draws[7] == ids(make().draw(5, 7))


def test_state_survives_a_file():
    buffer = ReplayBuffer(10, 10, seed=0)
    buffer.add([entry(1, uses=1), entry(2, uses=None)])
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    other = ReplayBuffer(10, 10, seed=0)
    other.load_state_dict(torch.load(file, weights_only=True))
    a, b = buffer.draw(2, 1), other.draw(2, 1)
    assert [e.sequence for e in a] == [e.sequence for e in b]
    assert [e.uses_left for e in b] == [e.uses_left for e in a]
    torch.testing.assert_close(b[0].probe_hidden, a[0].probe_hidden, rtol=0, atol=0)
