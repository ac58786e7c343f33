"""Rows are filtered and joined as a whole: no field is left behind."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch

from qswitch.rollout.requests import RolloutRequest, Sampling
from qswitch.rollout.rows import DeviceRows, HostRows, Rows

SAMPLING = Sampling(seed=3, temperature=1.0, eos_ids=(2,), pad_id=0)


def starting(indices: list[int], *, tail_start: float = 5) -> Rows:
    requests = [RolloutRequest(100 + i, i % 2, [1], 10 + i) for i in indices]
    return Rows.starting(
        indices, requests, [i + 50 for i in indices], sampling=SAMPLING, tail_start=tail_start,
        device=torch.device("cpu"),
    )  # fmt: skip


def columns(rows: Rows) -> list[list[int]]:
    """Every field of every row, one list a row."""
    host = [getattr(rows.host, f.name).tolist() for f in fields(HostRows)]
    device = [getattr(rows.device, f.name).tolist() for f in fields(DeviceRows)]
    return [list(row) for row in zip(*host, *device, strict=True)]


def test_rows_stay_whole_when_they_are_selected_and_joined():
    first, others = starting([0, 1, 2, 3]), starting([4, 5])
    assert len(first) == 4 and len(first.join(others)) == 6
    assert columns(first.join(others)) == columns(first) + columns(others)
    kept = [3, 0]
    assert columns(first.select(np.array(kept)).join(others)) == [columns(first)[i] for i in kept] + columns(others)
    nobody = np.zeros(0, dtype=np.int64)
    assert columns(first.select(nobody).join(others)) == columns(others)


def test_selected_rows_advance_without_the_ones_they_came_from():
    rows = starting([0, 1, 2])
    selected = rows.select(np.arange(3))
    selected.host.step += 4
    selected.host.student_left[:] = True
    selected.device.step += 4
    assert rows.host.step.tolist() == rows.device.step.tolist() == [0, 0, 0] and not rows.host.student_left.any()


def test_a_row_starts_with_its_own_key_and_in_the_tail_where_that_begins_at_once():
    rows = starting([0, 1, 2, 3])
    assert len(set(rows.device.key.tolist())) == 4
    assert rows.device.key.tolist() == starting([3, 2, 1, 0]).device.key.tolist()[::-1]
    assert not rows.host.in_tail.any() and starting([0, 1], tail_start=0).host.in_tail.all()
    assert rows.host.limit.tolist() == rows.device.limit.tolist() == [10, 11, 12, 13]
