"""Confidence intervals of shares, and the sign test."""

from __future__ import annotations

import math

from bc2_jax.infer.settings import is_whole
from bc2_jax.validation import require


def wilson(successes: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """`wilson_of_share` of `successes` / `total`.

    Raises ValueError unless both are whole numbers with 0 <= successes <= total, and z is finite and above 0.
    """
    require(is_whole(total) and total >= 0, "total", total, "it must be a whole number, at least 0")
    legal = f"it must be a whole number in 0..total = {total}"
    require(is_whole(successes) and 0 <= successes <= total, "successes", successes, legal)
    require(math.isfinite(z) and z > 0, "z", z, "it must be a finite number above 0")
    return wilson_of_share(successes / total if total else 0.0, total, z)


def wilson_of_share(share: float, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval (low, high) of a share p in 0..1 of n = `total` cases; (0, 1) for no cases.

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n): within 0..1, and not empty even if p is 0 or
    1. z = 1.96 is 95 %."""
    if total == 0:
        return 0.0, 1.0
    weight = z * z / total
    middle = share + weight / 2
    half = z * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    # The interval contains the share in spite of rounding.
    low, high = min(share, (middle - half) / (1 + weight)), max(share, (middle + half) / (1 + weight))
    return max(0.0, low), min(1.0, high)


def sign_test(better: int, worse: int) -> float:
    """Two-sided p-value of the exact sign test: of so uneven a count if better and worse were equally likely.

    1 if both are 0. Raises ValueError unless both are whole numbers, at least 0.
    """
    for name, value in (("better", better), ("worse", worse)):
        require(is_whole(value) and value >= 0, name, value, "it must be a whole number, at least 0")
    total, fewer = better + worse, min(better, worse)
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)
