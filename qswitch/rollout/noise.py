"""Which token a writer draws: keyed Gumbel noise, so that a rollout depends on its seed and on nothing else.

Every step of every rollout owns one noise vector over the vocabulary, a pure function of (seed, example id, visit,
step, token id). A writer with distribution p draws argmax(log p + G), an exact sample of p (the Gumbel-max trick); two
writers that share G agree as often as their distributions allow. Nothing here reads or moves a global random stream,
so batch size, batch order, padding and resuming leave every token as it was. Knows no model and no policy.

Letters: `R` rows, `V` shared vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOKEN_STREAM = 0
"""Noise of the tokens, shared by both writers."""
COIN_STREAM = 1
"""Coins of policies that toss one (`random`), independent of the token noise."""
REDRAW_STREAM = 2
"""Noise of a redraw whose occasion depends on the token noise (`skd`)."""

# splitmix64 (Steele, Lea, Flood 2014), its unsigned constants written as signed 64-bit integers.
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    """x ^ (x >>> bits), in place: `>>` on int64 is arithmetic, so the copied sign bits are masked away."""
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << (64 - bits)) - 1))


def _splitmix64_(x: Tensor) -> Tensor:
    """Mix int64 values in place; multiplication wraps modulo 2**64 on CPU and GPU alike."""
    x.add_(_GOLDEN_GAMMA)
    _xor_shift(x, 30).mul_(_MIX_1)
    _xor_shift(x, 27).mul_(_MIX_2)
    return _xor_shift(x, 31)


def row_keys(seed: int, example_ids: Tensor, visits: Tensor) -> Tensor:
    """One key per rollout: int64 [R], [R] -> int64 [R]."""
    key = torch.full_like(example_ids, seed)
    for part in (example_ids, visits):
        key = _splitmix64_(key).bitwise_xor_(part)
    return _splitmix64_(key)


def step_keys(rows: Tensor, steps: Tensor, stream: int = TOKEN_STREAM) -> Tensor:
    """One key per rollout and step: int64 [R], [R] -> int64 [R]; another `stream` gives independent draws."""
    key = _splitmix64_(rows.clone()).bitwise_xor_(steps)
    return _splitmix64_(key).bitwise_xor_(torch.full_like(key, stream))


def _uniform_bits(x: Tensor) -> Tensor:
    """int64 -> the top 53 bits as an integer in [0, 2**53)."""
    return (_splitmix64_(x) >> 11).bitwise_and_((1 << 53) - 1)


def uniform(keys: Tensor) -> Tensor:
    """One draw from (0, 1) per key: int64 [R] -> float64 [R]."""
    return (_uniform_bits(keys.clone()).double() + 0.5) * 2.0**-53


def gumbel(keys: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise per key and token id: int64 [R] -> float32 [R, V].

    G = -log(E) with E = -log(1 - u). Winners have a small E, so u is taken near 0, where float32 resolves 24 bits of
    53 however small it is; the usual -log(-log(u)) in float32 would quantise exactly the draws that win.
    """
    tokens = torch.arange(vocab_size, device=keys.device, dtype=torch.int64).mul_(_GOLDEN_GAMMA)
    bits = _uniform_bits(keys[:, None] + tokens[None, :])  # (R, V)
    u = bits.to(torch.float32).add_(0.5).mul_(2.0**-53)
    # 2**53 - 1 rounds to 1.0 in float32: E would be infinite and the token impossible; the largest float below 1
    # keeps it merely unlikely.
    u.clamp_(max=1.0 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()


def draw(log_probs: Tensor, noise: Tensor | None, temperature: float) -> Tensor:
    """argmax(log_probs / temperature + noise): [..., V], [..., V] -> int64 [...]; at temperature 0 the most likely."""
    if temperature == 0:
        return log_probs.argmax(dim=-1)
    assert noise is not None, "only temperature 0 goes without noise"
    scaled = log_probs if temperature == 1 else log_probs / temperature
    return (scaled + noise).argmax(dim=-1)
