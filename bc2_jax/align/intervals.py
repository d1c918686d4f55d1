"""How sure a share is that was counted, and whether two of them differ by more than chance."""

from __future__ import annotations

import math

from bc2_jax.infer.settings import is_whole
from bc2_jax.validation import require


def wilson(successes: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The ends (low, high) of Wilson's score interval for `successes` of `total`, shares in 0..1.

    With p = successes / total it is (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n): it stays
    in 0..1, and has a width also where no or all of few cases were successes. z = 1.96 is 95 %. Of no cases
    everything is possible: (0, 1).

    Raises ValueError unless both are whole numbers with 0 <= successes <= total, and z is finite and above 0.
    """
    require(is_whole(total) and total >= 0, "total", total, "it must be a whole number, at least 0")
    legal = f"it must be a whole number in 0..total = {total}"
    require(is_whole(successes) and 0 <= successes <= total, "successes", successes, legal)
    require(math.isfinite(z) and z > 0, "z", z, "it must be a finite number above 0")
    if total == 0:
        return 0.0, 1.0
    share, weight = successes / total, z * z / total
    middle = share + weight / 2
    half = z * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    # At the ends the two terms are equal but for rounding.
    low = 0.0 if successes == 0 else (middle - half) / (1 + weight)
    high = 1.0 if successes == total else (middle + half) / (1 + weight)
    return low, high


def sign_test(better: int, worse: int) -> float:
    """The two-sided p-value of the exact sign test: how likely so uneven a count is where both are equally likely.

    Pairs that are equal are not counted. 1 where there are none. Raises ValueError unless both are whole numbers, at
    least 0.
    """
    for name, value in (("better", better), ("worse", worse)):
        require(is_whole(value) and value >= 0, name, value, "it must be a whole number, at least 0")
    total, fewer = better + worse, min(better, worse)
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)
