"""Evaluation: scores of texts, the paper's benchmarks, scaling laws.

scorer = Scorer(bc2_jax.load_pretrained(path), tokenizer)
[(log_prob, is_greedy)] = scorer.loglikelihood([("白日依山尽，", "黄河入海流")])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bc2_jax.evaluate.scorer import Scorer

__all__ = ["Scorer", "scaling"]


def __getattr__(name: str) -> Any:
    # Lazy, as fitting a scaling law needs no JAX.
    if name == "Scorer":
        return importlib.import_module("bc2_jax.evaluate.scorer").Scorer
    if name == "scaling":
        return importlib.import_module("bc2_jax.evaluate.scaling")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
