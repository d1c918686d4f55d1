"""Baselines that a model has to beat: unigram and bigram cross-entropy on packed rows.

In nats a token over the targets of the validation loss (labels that are not -100). Rows are uint32 [R, T + 1].
"""

from __future__ import annotations

import numpy as np

from bc2_jax.data.batch import IGNORED, row_to_example


def unigram_entropy(validation_rows: np.ndarray, vocab_size: int) -> float:
    """Entropy of the held-out targets under their own frequencies: a lower bound of unigram models."""
    counts = np.bincount(_pairs(validation_rows, vocab_size)[1], minlength=vocab_size)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def unigram_cross_entropy(train_rows: np.ndarray, validation_rows: np.ndarray, vocab_size: int) -> float:
    """Cross-entropy of the training frequencies, discounted and interpolated with the uniform distribution."""
    _, train = _pairs(train_rows, vocab_size)
    _, held_out = _pairs(validation_rows, vocab_size)
    probabilities = _discounted(np.bincount(train, minlength=vocab_size))
    return float(-np.log(probabilities[held_out]).mean())


def bigram_cross_entropy(train_rows: np.ndarray, validation_rows: np.ndarray, vocab_size: int) -> float:
    """Cross-entropy of an interpolated Kneser-Ney bigram model (Kneser and Ney 1995; Chen and Goodman 1999).

        p(w | u) = max(c(u, w) - d, 0) / c(u) + d n(u) / c(u) q(w)

    n(u) is the number of different tokens seen after u. q is proportional to the number of different tokens seen
    before w, itself discounted and interpolated with the uniform distribution, so no token has probability zero. After
    a u that was never seen, p = q. Memory: a few int64 a target.
    """
    context, token = _pairs(train_rows, vocab_size)
    pairs, counts = np.unique(context * vocab_size + token, return_counts=True)
    discount = _discount(counts)
    context_count = np.bincount(context, minlength=vocab_size)
    followers = np.bincount(pairs // vocab_size, minlength=vocab_size)
    backoff = _discounted(np.bincount(pairs % vocab_size, minlength=vocab_size))

    context, token = _pairs(validation_rows, vocab_size)
    key = context * vocab_size + token
    place = np.minimum(np.searchsorted(pairs, key), len(pairs) - 1)
    count = np.where(pairs[place] == key, counts[place], 0)
    total = np.maximum(context_count[context], 1)
    # The discounted mass; all of it for a new context.
    left = np.where(context_count[context] > 0, discount * followers[context] / total, 1.0)
    probability = np.maximum(count - discount, 0) / total + left * backoff[token]
    return float(-np.log(probability).mean())


def _pairs(rows: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """All (context, target) pairs that the model is scored on, int64 [N] each."""
    example = row_to_example(rows)
    scored = example["labels"] != IGNORED
    context, token = example["input_ids"][scored].astype(np.int64), example["labels"][scored].astype(np.int64)
    if token.size == 0:
        raise ValueError(f"rows of shape {rows.shape} are not valid: they have no target.")
    largest = max(context.max(), token.max())
    if largest >= vocab_size:
        raise ValueError(f"vocab_size = {vocab_size} is not valid: the rows have token {largest}.")
    return context, token


def _discount(counts: np.ndarray) -> float:
    """n1 / (n1 + 2 n2), the leave-one-out estimate from the numbers of counts that are 1 and 2; 1/2 if none is 1."""
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once else 0.5


def _discounted(counts: np.ndarray) -> np.ndarray:
    """Absolute discounting of counts [V], the discounted mass spread evenly: float64 [V], positive, sum 1."""
    discount, total = _discount(counts), counts.sum()
    left = discount * (counts > 0).sum() / total
    return np.maximum(counts - discount, 0) / total + left / len(counts)
