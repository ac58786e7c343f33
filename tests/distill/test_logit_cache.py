"""The cache gives back what was put, whatever the format and the tier, and frees what it no longer needs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qswitch.distill.cache_format import FORMATS, LogitTargets, TopkTargets
from qswitch.distill.logit_cache import LogitCache, Targets
from qswitch.errors import TrainingError
from qswitch.plan.memory import cache_row_bytes

D, V, K = 6, 40, 5
CPU = torch.device("cpu")
WEIGHT = torch.randn(V, generator=torch.Generator().manual_seed(0))
ANY = pytest.mark.parametrize("format", FORMATS)


def head(hidden: Tensor) -> Tensor:
    """Token i reads hidden value i modulo D: a product a logit, so a row does not depend on its neighbours."""
    return hidden[:, torch.arange(V) % D] * WEIGHT.to(hidden.dtype)


def rows(seed: int, num: int) -> Tensor:
    return torch.randn(num, D, generator=torch.Generator().manual_seed(seed + 1))


def keys(example: int, num: int, visit: int = 0) -> Tensor:
    return torch.tensor([[example, visit, step] for step in range(num)], dtype=torch.int64).reshape(-1, 3)


def make_cache(format: str = "hidden", **changes: Any) -> LogitCache:
    options: dict[str, Any] = {
        "vocab_size": V, "device": CPU, "dtype": torch.float32, "device_budget_bytes": 1 << 20,
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
    cache.put(keys(3, 300), hidden, head)
    targets = cache.get(keys(3, 300))
    assert targets.num_positions == 300
    assert torch.equal(values(targets)[0], head(hidden))
    chunk = targets.chunk(10, 13, CPU)
    assert isinstance(chunk, LogitTargets) and torch.equal(chunk.logits, head(hidden)[10:13])
    assert torch.equal(values(Targets.from_hidden(hidden, head))[0], head(hidden))


@pytest.mark.parametrize("format", ["bf16", "int8"])
@pytest.mark.parametrize("shift", [0.0, -15.0, 300.0])
def test_rounded_logits_have_a_bounded_kl_error(format, shift):
    """An error of at most e in each logit costs at most e**2 / 2 nats (Hoeffding's lemma)."""
    vocab_size, num = 500, 300  # more rows than are encoded at a time
    logits = 3.0 * torch.randn(num, vocab_size, generator=torch.Generator().manual_seed(9))
    cache = make_cache(format, vocab_size=vocab_size)
    cache.put(keys(0, num), logits, lambda given: given + shift)
    stored = values(cache.get(keys(0, num)))[0]
    assert stored.dtype == torch.float32 and stored.shape == logits.shape
    log_p, log_q = logits.double().log_softmax(-1), stored.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    below = logits - logits.amax(-1, keepdim=True)
    span = below.abs().amax(-1).double()
    error = span * (2**-8 if format == "bf16" else 0.5 / 254) + 1e-4  # the shift rounds in fp32 too
    assert ((stored - below).abs().amax(-1) <= error).all()
    assert (kl <= error**2 / 2 + 1e-9).all()
    assert kl.max() < 1e-3


@pytest.mark.parametrize("format", ["bf16", "int8", "topk"])
def test_a_token_the_teacher_never_writes_stays_impossible(format):
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(4))
    logits[0, 5] = logits[1, : V - 1] = -torch.inf
    cache = make_cache(format, topk=V)
    cache.put(keys(0, 3), logits, lambda given: given)
    found = values(cache.get(keys(0, 3)))
    stored = found[0] if format != "topk" else torch.empty_like(logits).scatter(-1, found[1], found[0])
    assert torch.equal(stored == -torch.inf, logits == -torch.inf)
    probabilities = stored.double().softmax(-1)
    torch.testing.assert_close(probabilities, logits.double().softmax(-1), rtol=0, atol=3e-3)
    assert probabilities[1, V - 1] == 1


def test_topk_keeps_the_largest_and_the_rest_sums_to_one():
    cache, hidden = make_cache("topk"), rows(1, 300)
    cache.put(keys(0, 300), hidden, head)
    chunk = cache.get(keys(0, 300)).chunk(0, 300, CPU)
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
    cache.put(keys(0, 4), rows(2, 4), head)
    log_probs, ids, tail = values(cache.get(keys(0, 4)))
    assert ids.shape == (4, V) and torch.equal(ids.sort(-1).values, torch.arange(V).expand(4, V))
    assert log_probs.isfinite().all() and (tail.exp() < 1e-6).all()


@ANY
def test_targets_come_in_the_order_of_the_keys(format):
    cache = make_cache(format)
    for example in range(3):
        cache.put(keys(example, 5), rows(example, 5), head)
    every = values(cache.get(torch.cat([keys(e, 5) for e in range(3)])))
    order = torch.tensor([14, 0, 1, 7, 3, 3, 13, 5, 6])
    asked = torch.stack([order // 5, torch.zeros_like(order), order % 5], dim=1)
    targets = cache.get(asked)
    for found, whole in zip(values(targets), every, strict=True):
        assert torch.equal(found, whole[order])
    parts = [targets.chunk(start, start + 3, CPU) for start in (0, 3, 6)]
    joined = torch.cat([p.logits if isinstance(p, LogitTargets) else p.log_probs for p in parts])
    assert torch.equal(joined, every[0][order])


def test_a_missing_key_is_named():
    cache = make_cache()
    cache.put(keys(1, 3), rows(0, 3), head)
    for missing in ([1, 0, 3], [1, 1, 0], [2, 0, 0]):
        with pytest.raises(KeyError, match=rf"\({missing[0]}, {missing[1]}, {missing[2]}\)"):
            cache.get(torch.tensor([[1, 0, 0], missing]))


def test_a_duplicate_key_is_refused_and_nothing_changes():
    cache = make_cache()
    cache.put(keys(1, 3), rows(0, 3), head)
    before = cache.stats()
    with pytest.raises(ValueError, match=r"\(1, 0, 2\) is stored already"):
        cache.put(torch.tensor([[2, 0, 0], [1, 0, 2]]), rows(1, 2), head)
    with pytest.raises(ValueError, match="within one call"):
        cache.put(torch.tensor([[5, 0, 0], [5, 0, 0]]), rows(1, 2), head)
    with pytest.raises(ValueError, match="2 keys for 3 rows"):
        cache.put(keys(7, 2), rows(1, 3), head)
    assert cache.stats() == before
    assert torch.equal(values(cache.get(keys(1, 3)))[0], head(rows(0, 3)))


@pytest.mark.parametrize("topk", [K, V + 3])
@ANY
def test_the_plan_of_a_row_is_what_a_row_takes(format, topk):
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        cache = make_cache(format, dtype=dtype, topk=topk)
        cache.put(keys(0, 7), rows(0, 7), head)
        expected = 7 * cache_row_bytes(format, D, V, topk, size)
        assert cache.stats() == {"rows": 7, "device_bytes": expected, "host_bytes": 0, "disk_bytes": 0}


def test_drop_and_clear_free_rows():
    cache = make_cache()
    cache.put(torch.cat([keys(0, 2), keys(1, 3)]), rows(0, 5), head)  # two rollouts in one block
    cache.put(keys(0, 4, visit=1), rows(1, 4), head)
    row = D * 4
    cache.drop(0, 0)
    assert cache.stats()["rows"] == 7 and cache.stats()["device_bytes"] == 9 * row  # the block is in use
    assert torch.equal(values(cache.get(keys(1, 3)))[0], head(rows(0, 5))[2:])
    with pytest.raises(KeyError, match=r"\(0, 0, 0\)"):
        cache.get(keys(0, 1))
    cache.drop(1, 0)
    assert cache.stats()["rows"] == 4 and cache.stats()["device_bytes"] == 4 * row
    cache.drop(8, 8)  # unknown: nothing to forget
    cache.clear()
    assert cache.stats() == {"rows": 0, "device_bytes": 0, "host_bytes": 0, "disk_bytes": 0}
    cache.put(keys(0, 2), rows(5, 2), head)  # a dropped key may come again
    assert torch.equal(values(cache.get(keys(0, 2)))[0], head(rows(5, 2)))


@ANY
def test_overflow_moves_the_oldest_down_and_changes_no_value(format, tmp_path: Path, caplog):
    folder = tmp_path / "cache"
    block = 4 * cache_row_bytes(format, D, V, K, 4)
    cache = make_cache(format, device_budget_bytes=2 * block, host_budget_bytes=block, disk_path=folder)
    roomy = make_cache(format)
    with caplog.at_level(logging.WARNING, logger="qswitch.distill.logit_cache"):
        for example in range(6):
            for target in (cache, roomy):
                target.put(keys(example, 4), rows(example, 4), head)
            number = example + 1
            assert cache.stats() == {
                "rows": 4 * number,
                "device_bytes": min(number, 2) * block,
                "host_bytes": min(max(number - 2, 0), 1) * block,
                "disk_bytes": max(number - 3, 0) * block,
            }
    assert [r.levelname for r in caplog.records] == ["WARNING", "WARNING"]
    device, host = [r.getMessage() for r in caplog.records]
    assert "device budget" in device and "host memory" in device
    assert "host budget" in host and str(folder) in host

    asked = torch.cat([keys(example, 4) for example in (5, 0, 3, 1, 4, 2)])  # every tier, in no order
    assert_same(cache.get(asked), roomy.get(asked))
    assert sum(path.stat().st_size for path in folder.iterdir()) == 3 * block

    held = cache.get(keys(1, 4))
    cache.drop(0, 0)  # the oldest, on disk
    assert cache.stats()["disk_bytes"] == sum(path.stat().st_size for path in folder.iterdir()) == 2 * block
    cache.clear()
    assert list(folder.iterdir()) == []
    assert_same(held, roomy.get(keys(1, 4)))  # targets handed out before outlive the file


def test_no_file_is_made_before_the_disk_is_needed(tmp_path: Path):
    cache = make_cache(disk_path=tmp_path / "cache", device_budget_bytes=0)
    cache.put(keys(0, 4), rows(0, 4), head)
    assert cache.stats()["host_bytes"] == 4 * D * 4
    assert not (tmp_path / "cache").exists()


def test_full_without_a_disk_says_the_remedy():
    cache = make_cache(device_budget_bytes=0, host_budget_bytes=4 * D * 4)
    cache.put(keys(0, 4), rows(0, 4), head)
    with pytest.raises(TrainingError, match=r"Raise cache\.host_budget_gib"):
        cache.put(keys(1, 4), rows(1, 4), head)


@ANY
def test_a_refused_put_leaves_no_trace(format):
    block = 4 * cache_row_bytes(format, D, V, K, 4)
    # Together the budgets hold 3.2 blocks, but in whole blocks only two: the third fits in neither tier.
    cache = make_cache(format, device_budget_bytes=int(1.6 * block), host_budget_bytes=int(1.6 * block))
    for example in (0, 1):
        cache.put(keys(example, 4), rows(example, 4), head)
    before, values_before = cache.stats(), values(cache.get(keys(0, 4)))
    with pytest.raises(TrainingError, match=r"Raise cache\.host_budget_gib"):
        cache.put(keys(2, 4), rows(2, 4), head)
    assert cache.stats() == before
    with pytest.raises(KeyError, match=r"\(2, 0, 0\)"):
        cache.get(keys(2, 1))
    assert all(torch.equal(a, b) for a, b in zip(values(cache.get(keys(0, 4))), values_before, strict=True))
    cache.drop(0, 0)
    cache.put(keys(2, 4), rows(2, 4), head)  # the same rows, once there is room
    assert cache.stats()["rows"] == 8


def test_a_disk_that_cannot_be_written_says_where(tmp_path: Path, monkeypatch):
    def full(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(torch, "from_file", full)
    cache = make_cache(device_budget_bytes=0, host_budget_bytes=0, disk_path=tmp_path)
    with pytest.raises(TrainingError, match=r"No space left on device.*Free disk space"):
        cache.put(keys(0, 4), rows(0, 4), head)
    assert cache.stats() == {"rows": 0, "device_bytes": 0, "host_bytes": 0, "disk_bytes": 0}
    assert list(tmp_path.iterdir()) == []


def three_tiers(format: str, folder: Path | None) -> LogitCache:
    block = 4 * cache_row_bytes(format, D, V, K, 4)
    return make_cache(format, device_budget_bytes=2 * block, host_budget_bytes=block, disk_path=folder)


@ANY
def test_exported_rows_come_back_bit_for_bit(format, tmp_path: Path):
    cache = three_tiers(format, tmp_path / "a")
    for example in range(5):
        cache.put(keys(example, 4), rows(example, 4), head)
    torch.save(cache.state_dict(), tmp_path / "cache.pt")
    again = three_tiers(format, tmp_path / "b")
    again.put(keys(9, 2), rows(9, 2), head)  # goes when the state comes
    again.load_state_dict(torch.load(tmp_path / "cache.pt", weights_only=True), head)
    assert torch.equal(again.keys(), cache.keys()) and len(again.keys()) == 20
    assert_same(again.get(cache.keys()), cache.get(cache.keys()))

    some = torch.cat([keys(4, 2), keys(0, 4)[1:3], keys(2, 1)])  # of every tier
    third = make_cache(format)
    third.put(keys(7, 1), rows(7, 1), head)
    third.restore(cache.export(some), head)
    assert third.stats()["rows"] == 6
    assert_same(third.get(some), cache.get(some))
    with pytest.raises(ValueError, match="is stored already"):
        third.restore(cache.export(keys(4, 1)), head)
    with pytest.raises(KeyError, match=r"\(8, 0, 0\)"):
        cache.export(keys(8, 1))
    assert make_cache(format).export()["keys"].shape == (0, 3)
    make_cache(format).restore(make_cache(format).export(), head)


def test_rows_of_another_format_are_refused():
    cache = make_cache("int8")
    with pytest.raises(ValueError, match="format hidden cannot go into a cache of format int8"):
        cache.restore(make_cache("hidden").export(), head)


@ANY
def test_discarded_rows_give_their_bytes_back(format, tmp_path: Path):
    cache, row = three_tiers(format, tmp_path), cache_row_bytes(format, D, V, K, 4)
    for example in range(4):
        cache.put(keys(example, 4), rows(example, 4), head)
    held, rest = cache.get(keys(0, 4)), torch.cat([keys(0, 4)[3:], keys(1, 4)[2:], keys(2, 4)[1:]])
    expected = cache.get(rest)
    gone = torch.cat([keys(0, 3), keys(1, 2), keys(2, 1), keys(6, 3)])  # example 0 is on disk, 1 in host memory
    assert cache.discard(gone) == 6
    # A quarter of a block is copied out of it; half a block stays where it is.
    assert cache.stats() == {"rows": 10, "disk_bytes": row, "host_bytes": 4 * row, "device_bytes": 8 * row}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == row
    assert_same(cache.get(rest), expected)
    assert held.num_positions == 4 and len(values(held)[0]) == 4
    with pytest.raises(KeyError):
        cache.get(keys(0, 1))
    assert cache.discard(rest) == 6 and cache.discard(rest) == 0
    assert list(tmp_path.iterdir()) == [] and cache.stats()["rows"] == 4


@ANY
def test_no_rows_at_all(format, tmp_path: Path):
    cache = make_cache(format, device_budget_bytes=0, host_budget_bytes=0, disk_path=tmp_path)
    assert cache.get(keys(0, 0)).num_positions == 0
    cache.put(keys(0, 0), rows(0, 0), head)
    cache.put(keys(1, 2), rows(1, 2), head)
    assert cache.stats()["rows"] == 2
    cache.clear()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="unknown cache format 'fp4'"):
        make_cache("fp4")
