"""How often one of k programs passes, estimated from n that were generated."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from bc2_jax.evaluate.task import Judged, Metric
from bc2_jax.validation import require

KS = (1, 10, 100)


def pass_at_k(n: int, right: int, k: int) -> float:
    """1 - C(n - right, k) / C(n, k): the unbiased estimate of the chance that one of k programs passes if `right` of n
    did. Raises ValueError unless 0 <= right <= n and 1 <= k <= n."""
    require(0 <= right <= n, "right", right, f"it must be in 0..n = {n}")
    require(1 <= k <= n, "k", k, f"it must be in 1..n = {n}")
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def summarize(judged: Sequence[Judged]) -> dict[str, Metric]:
    """pass@1 (in percent), and pass@10 and pass@100 if every task was answered so often: answers to one task have its
    id. The standard error is that of sampling tasks; those that were not run are left out."""
    runs: dict[str, list[bool]] = defaultdict(list)
    for one in judged:
        if "passed" in one.right:
            runs[one.example.id].append(one.right["passed"])
    fewest = min(map(len, runs.values()), default=0)
    metrics = {}
    for k in KS:
        if k <= fewest:
            values = 100 * np.array([pass_at_k(len(passed), sum(passed), k) for passed in runs.values()])
            error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            metrics[f"pass@{k}"] = Metric(float(values.mean()), error, len(values))
    return metrics
