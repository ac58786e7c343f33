"""The cache gives back what was put, whatever the format and the tier, and frees what it no longer needs."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qswitch.distill import held_rows
from qswitch.distill.cache_format import FORMATS, LogitTargets, TopkTargets
from qswitch.distill.logit_cache import LogitCache, Targets
from qswitch.distill.sequence import TrainingSequence
from qswitch.errors import TrainingError
from qswitch.layers import build_config
from qswitch.plan.memory import cache_row_bytes
from qswitch.run_dir import RunDir

D, V, K = 6, 40, 5
CPU = torch.device("cpu")
WEIGHT = torch.randn(V, generator=torch.Generator().manual_seed(0))
ANY = pytest.mark.parametrize("format", FORMATS)


def head(hidden: Tensor) -> Tensor:
    """Token i reads hidden value i modulo D: a product a logit, so a row does not depend on its neighbours."""
    return hidden[:, torch.arange(V) % D] * WEIGHT.to(hidden.dtype)


def rows(seed: int, num: int) -> Tensor:
    return torch.randn(num, D, generator=torch.Generator().manual_seed(seed + 1))


def sequences(example: int, num: int, visit: int = 0) -> list[TrainingSequence]:
    """One sequence whose loss runs over `num` steps, every other one."""
    return [TrainingSequence(example, visit, [1], [2] * (2 * num + 1), [2 * i for i in range(num)])]


def make_cache(format: str = "hidden", **changes: Any) -> LogitCache:
    options: dict[str, Any] = {
        "head": head, "vocab_size": V, "device": CPU, "dtype": torch.float32, "device_budget_bytes": 1 << 20,
        "host_budget_bytes": 1 << 20, "disk_path": None, "topk": K,
    }  # fmt: skip
    return LogitCache(format, **{**options, **changes})


def values(targets: Targets) -> list[Tensor]:
    chunk = targets.chunk(0, targets.num_positions, CPU)
    return [chunk.logits] if isinstance(chunk, LogitTargets) else [chunk.log_probs, chunk.ids, chunk.tail_log_prob]


def assert_same(found: Targets, expected: Targets) -> None:
    for a, b in zip(values(found), values(expected), strict=True):
        assert torch.equal(a, b)


def test_hidden_is_exact():
    cache, hidden = make_cache(), rows(0, 300)
    cache.put(sequences(3, 300), hidden)
    targets = cache.get(sequences(3, 300))
    assert targets.num_positions == 300
    assert torch.equal(values(targets)[0], head(hidden))
    chunk = targets.chunk(10, 13, CPU)
    assert isinstance(chunk, LogitTargets) and torch.equal(chunk.logits, head(hidden)[10:13])
    assert torch.equal(values(Targets.from_hidden(hidden, head))[0], head(hidden))


def test_a_token_the_teacher_never_writes_stays_impossible():
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(4))
    logits[0, 5] = logits[1, : V - 1] = -torch.inf
    cache = make_cache("topk", topk=V, head=lambda given: given)
    cache.put(sequences(0, 3), logits)
    log_probs, ids, _ = values(cache.get(sequences(0, 3)))
    stored = torch.empty_like(logits).scatter(-1, ids, log_probs)
    assert torch.equal(stored == -torch.inf, logits == -torch.inf)
    probabilities = stored.double().softmax(-1)
    torch.testing.assert_close(probabilities, logits.double().softmax(-1), rtol=0, atol=3e-3)
    assert probabilities[1, V - 1] == 1


def test_topk_keeps_the_largest_and_the_rest_sums_to_one():
    cache, hidden = make_cache("topk"), rows(1, 300)
    cache.put(sequences(0, 300), hidden)
    chunk = cache.get(sequences(0, 300)).chunk(0, 300, CPU)
    assert isinstance(chunk, TopkTargets)
    assert chunk.ids.dtype == torch.int64 and chunk.ids.shape == chunk.log_probs.shape == (300, K)
    total = chunk.log_probs.double().exp().sum(-1) + chunk.tail_log_prob.double().exp()
    torch.testing.assert_close(total, torch.ones(300, dtype=torch.float64), rtol=0, atol=1e-6)
    full = head(hidden).log_softmax(-1)
    torch.testing.assert_close(chunk.log_probs, full.gather(-1, chunk.ids))
    rest = full.scatter(-1, chunk.ids, -torch.inf)
    assert (rest.amax(-1) <= chunk.log_probs.amin(-1)).all()
    torch.testing.assert_close(chunk.tail_log_prob.exp(), rest.exp().sum(-1), rtol=0, atol=1e-6)


def test_topk_of_the_whole_vocabulary_leaves_nothing():
    cache = make_cache("topk", topk=V + 10)
    cache.put(sequences(0, 4), rows(2, 4))
    log_probs, ids, tail = values(cache.get(sequences(0, 4)))
    assert ids.shape == (4, V) and torch.equal(ids.sort(-1).values, torch.arange(V).expand(4, V))
    assert log_probs.isfinite().all() and (tail.exp() < 1e-6).all()


@ANY
def test_targets_come_in_the_order_of_the_sequences(format):
    cache = make_cache(format)
    cache.put([*sequences(0, 5), *sequences(1, 3)], rows(0, 8))  # two sequences in one segment
    cache.put(sequences(2, 5), rows(2, 5))
    every = values(cache.get([*sequences(0, 5), *sequences(1, 3), *sequences(2, 5)]))
    order = torch.tensor([*range(8, 13), *range(5), *range(5, 8)])
    targets = cache.get([*sequences(2, 5), *sequences(0, 5), *sequences(1, 3)])
    assert targets.num_positions == 13
    for found, whole in zip(values(targets), every, strict=True):
        assert torch.equal(found, whole[order])
    for size in (1, 3, 4, 13):  # chunks begin and end within sequences
        parts = [targets.chunk(start, min(start + size, 13), CPU) for start in range(0, 13, size)]
        joined = torch.cat([p.logits if isinstance(p, LogitTargets) else p.log_probs for p in parts])
        assert torch.equal(joined, every[0][order])


def test_a_missing_sequence_is_named():
    cache = make_cache()
    cache.put(sequences(1, 3), rows(0, 3))
    for example, visit, num in ((1, 0, 4), (1, 0, 2), (1, 1, 3), (2, 0, 3)):
        with pytest.raises(KeyError, match=rf"\({example}, {visit}\)"):
            cache.get([*sequences(1, 3), *sequences(example, num, visit)])


def test_a_second_put_is_refused_and_nothing_changes():
    cache = make_cache()
    cache.put(sequences(1, 3), rows(0, 3))
    before = cache.stats()
    with pytest.raises(ValueError, match=r"\(1, 0\) is stored already"):
        cache.put([*sequences(2, 1), *sequences(1, 1)], rows(1, 2))
    with pytest.raises(ValueError, match="within one call"):
        cache.put([*sequences(5, 1), *sequences(5, 1)], rows(1, 2))
    with pytest.raises(ValueError, match="2 loss steps for 3 rows"):
        cache.put(sequences(7, 2), rows(1, 3))
    assert cache.stats() == before
    assert torch.equal(values(cache.get(sequences(1, 3)))[0], head(rows(0, 3)))


@pytest.mark.parametrize("topk", [K, V + 3])
@ANY
def test_the_plan_of_a_row_is_what_a_row_takes(format, topk):
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        cache = make_cache(format, dtype=dtype, topk=topk)
        cache.put(sequences(0, 7), rows(0, 7))
        expected = 7 * cache_row_bytes(format, D, V, topk, size)
        assert cache.stats() == {"sequences": 1, "rows": 7, "device_bytes": expected, "host_bytes": 0, "disk_bytes": 0}


def test_forgetting_and_clearing_free_rows():
    cache = make_cache()
    cache.put([*sequences(0, 2), *sequences(1, 3)], rows(0, 5))  # two rollouts in one segment
    cache.put(sequences(0, 4, visit=1), rows(1, 4))
    row = D * 4
    cache.keep_only([*sequences(1, 3), *sequences(0, 4, visit=1), *sequences(8, 8)])  # the last is not known
    assert cache.stats()["rows"] == 7 and cache.stats()["device_bytes"] == 9 * row  # the segment is in use
    assert torch.equal(values(cache.get(sequences(1, 3)))[0], head(rows(0, 5))[2:])
    with pytest.raises(KeyError, match=r"\(0, 0\)"):
        cache.get(sequences(0, 2))
    cache.keep_only(sequences(0, 4, visit=1))
    assert cache.stats()["rows"] == 4 and cache.stats()["device_bytes"] == 4 * row
    cache.clear()
    assert cache.stats() == {"sequences": 0, "rows": 0, "device_bytes": 0, "host_bytes": 0, "disk_bytes": 0}
    cache.put(sequences(0, 2), rows(5, 2))  # what was forgotten may come again
    assert torch.equal(values(cache.get(sequences(0, 2)))[0], head(rows(5, 2)))


@ANY
def test_overflow_moves_the_oldest_down_and_changes_no_value(format, tmp_path: Path, caplog):
    folder = tmp_path / "cache"
    block = 4 * cache_row_bytes(format, D, V, K, 4)
    cache = make_cache(format, device_budget_bytes=2 * block, host_budget_bytes=block, disk_path=folder)
    roomy = make_cache(format)
    with caplog.at_level(logging.WARNING, logger="qswitch.distill.logit_cache"):
        for example in range(6):
            for target in (cache, roomy):
                target.put(sequences(example, 4), rows(example, 4))
            number = example + 1
            assert cache.stats() == {
                "sequences": number,
                "rows": 4 * number,
                "device_bytes": min(number, 2) * block,
                "host_bytes": min(max(number - 2, 0), 1) * block,
                "disk_bytes": max(number - 3, 0) * block,
            }
    assert [r.levelname for r in caplog.records] == ["WARNING", "WARNING"]
    device, host = [r.getMessage() for r in caplog.records]
    assert "device budget" in device and "host memory" in device
    assert "host budget" in host and str(folder) in host

    asked = [s for example in (5, 0, 3, 1, 4, 2) for s in sequences(example, 4)]  # every tier, in no order
    assert_same(cache.get(asked), roomy.get(asked))
    assert sum(path.stat().st_size for path in folder.iterdir()) == 3 * block

    held = cache.get(sequences(1, 4))
    cache.keep_only([s for example in range(1, 6) for s in sequences(example, 4)])  # without the oldest, on disk
    assert cache.stats()["disk_bytes"] == sum(path.stat().st_size for path in folder.iterdir()) == 2 * block
    cache.clear()
    assert list(folder.iterdir()) == []
    assert_same(held, roomy.get(sequences(1, 4)))  # targets handed out before outlive the file


def test_no_file_is_made_before_the_disk_is_needed(tmp_path: Path):
    cache = make_cache(disk_path=tmp_path / "cache", device_budget_bytes=0)
    cache.put(sequences(0, 4), rows(0, 4))
    assert cache.stats()["host_bytes"] == 4 * D * 4
    assert not (tmp_path / "cache").exists()


def test_files_of_a_start_that_was_killed_are_removed_by_the_next(tmp_path: Path):
    """Of four processes, by two: each removes its own, and the first those of processes that there are no longer."""
    config = build_config({"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d.jsonl"}})
    run_dir = RunDir.create(tmp_path / "run", config)
    for name in ("cache", "cache-1", "cache-2", "cache-3"):
        (run_dir.path / name).mkdir()
        (run_dir.path / name / "7-hidden.bin").write_bytes(b"0" * 64)
    disk = (run_dir.path / "cache-3").rename(tmp_path / "disk")
    (disk / "mine.txt").touch()
    (run_dir.path / "cache-3").symlink_to(disk)
    model = SimpleNamespace(device=torch.device("cpu"), compute_dtype=torch.float32, head=head)
    left = []
    for rank in (1, 0):
        held_rows.make_cache(
            config, run_dir, teacher=model, student=model, vocab_size=V,
            processes=SimpleNamespace(rank=rank, count=2, is_first=rank == 0),
        )  # fmt: skip
        left.append({path.name for path in run_dir.path.glob("cache*")})
    assert left == [{"cache", "cache-2", "cache-3"}, {"cache-3"}] and run_dir.config_path.exists()
    assert [file.name for file in disk.iterdir()] == ["mine.txt"], "behind a link our files go, and nothing else"


def test_full_without_a_disk_says_the_remedy():
    cache = make_cache(device_budget_bytes=0, host_budget_bytes=4 * D * 4)
    cache.put(sequences(0, 4), rows(0, 4))
    with pytest.raises(TrainingError, match=r"Raise cache\.host_budget_gib"):
        cache.put(sequences(1, 4), rows(1, 4))


@ANY
def test_a_refused_put_leaves_no_trace(format):
    block = 4 * cache_row_bytes(format, D, V, K, 4)
    # Together the budgets hold 3.2 blocks, but in whole blocks only two: the third fits in neither tier.
    cache = make_cache(format, device_budget_bytes=int(1.6 * block), host_budget_bytes=int(1.6 * block))
    for example in (0, 1):
        cache.put(sequences(example, 4), rows(example, 4))
    before, values_before = cache.stats(), values(cache.get(sequences(0, 4)))
    with pytest.raises(TrainingError, match=r"Raise cache\.host_budget_gib"):
        cache.put(sequences(2, 4), rows(2, 4))
    assert cache.stats() == before
    with pytest.raises(KeyError, match=r"\(2, 0\)"):
        cache.get(sequences(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(values(cache.get(sequences(0, 4))), values_before, strict=True))
    cache.keep_only(sequences(1, 4))
    cache.put(sequences(2, 4), rows(2, 4))  # the same rows, once there is room
    assert cache.stats()["rows"] == 8


def test_a_disk_that_cannot_be_written_says_where(tmp_path: Path, monkeypatch):
    def full(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(torch, "from_file", full)
    cache = make_cache(device_budget_bytes=0, host_budget_bytes=0, disk_path=tmp_path)
    with pytest.raises(TrainingError, match=r"No space left on device.*Free disk space"):
        cache.put(sequences(0, 4), rows(0, 4))
    assert cache.stats() == {"sequences": 0, "rows": 0, "device_bytes": 0, "host_bytes": 0, "disk_bytes": 0}
    assert list(tmp_path.iterdir()) == []


def three_tiers(format: str, folder: Path | None) -> LogitCache:
    block = 4 * cache_row_bytes(format, D, V, K, 4)
    return make_cache(format, device_budget_bytes=2 * block, host_budget_bytes=block, disk_path=folder)


@ANY
def test_stored_rows_come_back_bit_for_bit(format, tmp_path: Path):
    cache = three_tiers(format, tmp_path / "a")
    for example in range(5):
        cache.put(sequences(example, 4), rows(example, 4))
    torch.save(cache.state_dict(), tmp_path / "cache.pt")
    again = three_tiers(format, tmp_path / "b")
    again.put(sequences(9, 2), rows(9, 2))  # goes when the state comes
    again.load_state_dict(torch.load(tmp_path / "cache.pt", weights_only=True))
    every = [s for example in range(5) for s in sequences(example, 4)]
    assert again.stats()["rows"] == 20 and sequences(9, 2)[0] not in again and every[0] in again
    assert_same(again.get(every), cache.get(every))
    empty = make_cache(format)
    empty.load_state_dict(make_cache(format).state_dict())
    assert empty.stats()["sequences"] == 0


def test_a_stored_sequence_takes_no_more_than_its_rows(tmp_path: Path):
    cache = make_cache()
    cache.put([*sequences(0, 600), *sequences(1, 400)], rows(0, 1000))  # kept: more than half of the segment
    cache.keep_only(sequences(0, 600))
    torch.save(cache.state_dict(), tmp_path / "cache.pt")
    assert (tmp_path / "cache.pt").stat().st_size < 800 * D * 4


def test_rows_of_another_format_are_refused():
    cache = make_cache("topk")
    with pytest.raises(ValueError, match="format hidden cannot go into a cache of format topk"):
        cache.load_state_dict(make_cache("hidden").state_dict())


@ANY
def test_forgotten_rows_give_their_bytes_back(format, tmp_path: Path):
    cache, row = three_tiers(format, tmp_path), cache_row_bytes(format, D, V, K, 4)
    parts = {0: (3, 1), 1: (2, 2), 2: (1, 3), 3: (2, 2)}  # four segments of two sequences
    for example, (first, second) in parts.items():
        cache.put([*sequences(example, first), *sequences(example, second, visit=1)], rows(example, 4))
    held = cache.get(sequences(0, 3))
    seconds = [s for example in (0, 1, 2) for s in sequences(example, parts[example][1], visit=1)]
    expected = cache.get(seconds)
    cache.keep_only([*seconds, *sequences(3, 2), *sequences(3, 2, visit=1)])  # segment 0 is on disk, 1 in host memory
    # A quarter of a segment is copied out of it; half a segment stays where it is.
    assert cache.stats() == {
        "sequences": 5, "rows": 10, "disk_bytes": row, "host_bytes": 4 * row, "device_bytes": 8 * row,
    }  # fmt: skip
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == row
    assert_same(cache.get(seconds), expected)
    assert held.num_positions == 3 and len(values(held)[0]) == 3
    with pytest.raises(KeyError):
        cache.get(sequences(0, 3))
    for _ in range(2):
        cache.keep_only([*sequences(3, 2), *sequences(3, 2, visit=1)])
        assert list(tmp_path.iterdir()) == [] and cache.stats()["rows"] == 4


@ANY
def test_no_rows_at_all(format, tmp_path: Path):
    cache = make_cache(format, device_budget_bytes=0, host_budget_bytes=0, disk_path=tmp_path)
    assert cache.get([]).num_positions == 0
    cache.put([], rows(0, 0))
    cache.put(sequences(0, 0), rows(0, 0))
    cache.put(sequences(1, 2), rows(1, 2))
    assert cache.stats()["rows"] == 2
    cache.clear()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="unknown cache format 'fp4'"):
        make_cache("fp4")
