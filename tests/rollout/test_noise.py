"""The noise is a pure function of its key, Gumbel distributed, and independent across keys and streams."""

from __future__ import annotations

import math

import torch

from qswitch.rollout.noise import COIN_STREAM, TOKEN_STREAM, draw, gumbel, row_keys, step_keys, uniform


def splitmix64(state: int) -> int:
    """Reference in plain Python integers, unsigned (Steele, Lea, Flood 2014)."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def keys(n: int) -> torch.Tensor:
    return step_keys(row_keys(5, torch.arange(n), torch.zeros(n, dtype=torch.int64)), torch.arange(n))


def test_the_hash_is_splitmix64_on_unsigned_integers():
    key = torch.tensor([0, 1, -1, 2**62, -(2**63)])
    expected = [((splitmix64(k % 2**64) >> 11) + 0.5) * 2.0**-53 for k in key.tolist()]
    assert uniform(key).tolist() == expected


def test_noise_of_a_row_does_not_depend_on_the_other_rows():
    together = gumbel(keys(6), 50)
    for i in range(6):
        assert torch.equal(gumbel(keys(6)[i : i + 1], 50)[0], together[i])
    assert torch.equal(gumbel(keys(6), 20), together[:, :20])


def test_noise_is_gumbel():
    sample = gumbel(keys(400), 2000).double().flatten()
    assert torch.isfinite(sample).all()
    count = len(sample)
    assert abs(sample.mean().item() - 0.5772156649) < 5 * math.pi / math.sqrt(6 * count)
    for x in (-1.0, 0.0, 1.0, 3.0, 8.0):
        below = math.exp(-math.exp(-x))
        seen = (sample <= x).double().mean().item()
        assert abs(seen - below) < 5 * math.sqrt(below * (1 - below) / count) + 1e-7


def test_streams_and_steps_are_uncorrelated():
    rows = row_keys(5, torch.arange(20000), torch.zeros(20000, dtype=torch.int64))
    zero = torch.zeros_like(rows)
    a = uniform(step_keys(rows, zero, TOKEN_STREAM))
    for other in (uniform(step_keys(rows, zero, COIN_STREAM)), uniform(step_keys(rows, zero + 1))):
        correlation = torch.corrcoef(torch.stack([a, other]))[0, 1].abs().item()
        assert correlation < 5 / math.sqrt(20000)


def test_draws_follow_the_distribution_down_to_rare_tokens():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.0495, 0.0005], dtype=torch.float64)
    num = 200_000
    tokens = draw(probabilities.log().expand(num, -1), gumbel(keys(num), 5), temperature=1.0)
    seen = torch.bincount(tokens, minlength=5).double()
    statistic = ((seen - probabilities * num) ** 2 / (probabilities * num)).sum().item()
    assert statistic < 23.5  # upper 1e-4 point of chi-square with 4 degrees of freedom


def test_temperature_zero_is_greedy():
    log_probs = torch.tensor([[0.1, 0.7, 0.2]]).log()
    assert draw(log_probs, gumbel(keys(1), 3), temperature=0).tolist() == [1]
