"""A linear model that scores documents by their words and pairs of words, trained on good and bad ones.

As in fastText (Joulin et al. 2017, arXiv 1607.01759): the mean over a document's hashed unigrams and bigrams of one
weight each, so that its length does not matter, then a logistic function. The weights and the calibration (slope and
offset, which make the score a probability) are fitted on different documents; a third part, never fitted on, gives the
AUC. Everything is deterministic. The score is the probability that the document is a good one if good and bad documents
were equally many.
"""

from __future__ import annotations

import dataclasses
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bc2_jax.curate.tokens import Tokens, hash_ngrams, hash_tokens, offsets_of, slice_tokens, token_pieces
from bc2_jax.files import replaced
from bc2_jax.validation import require

Perplexity = Callable[[Sequence[str]], np.ndarray]
"""Texts -> float [D], bits a byte under a language model, NaN for texts that are too short."""
_FORMAT = 1
_BUCKET_BITS = 18
_BUCKETS = 1 << _BUCKET_BITS
_FOLDS = 10
_FEWEST = 20
# Weight of half the squared norm, iterations of L-BFGS, tokens read of a document in training.
_REGULARIZATION, _ITERATIONS, _MOST_TOKENS = 1e-4, 100, 4096


@dataclasses.dataclass(frozen=True)
class QualityModel:
    """score = logistic(offset + slope * mean weight + perplexity_slope * (bits a byte - perplexity_mean))."""

    weights: np.ndarray
    """float32 [2^18], by the high bits of a feature's hash."""
    slope: float
    offset: float
    held_out_auc: float
    """Probability that a held-out good document has a higher score than a held-out bad one."""
    held_out_documents: int
    perplexity_slope: float = 0.0
    """0 for a model that was trained without a language model."""
    perplexity_mean: float = 0.0

    def score(
        self, texts: Sequence[str], tokens: Tokens | None = None, perplexity: Perplexity | None = None
    ) -> np.ndarray:
        """float32 [D] in 0..1; 0 for a document without a word.

        `tokens` are those of `hash_tokens(texts)`, if they are known. A model that was trained with a language model
        needs `perplexity` of the same one.
        """
        if (self.perplexity_slope != 0) != (perplexity is not None):
            needs = "it must be given, as in training" if perplexity is None else "the model was trained without it"
            require(False, "perplexity", perplexity, needs)
        if tokens is None:
            tokens = hash_tokens(texts)
        logits = self.offset + self.slope * mean_weights(self.weights, tokens)
        if perplexity is not None:
            logits += self.perplexity_slope * _centre(perplexity(texts), self.perplexity_mean)
        return np.where(np.diff(tokens.offsets) > 0, _logistic(logits), 0).astype(np.float32)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an .npz file, whole or not at all; the same model gives the same bytes."""
        path = Path(path)
        require(path.suffix == ".npz", "path", str(path), "it must end with .npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        with replaced(path, shared=True) as partial, partial.open("wb") as file:
            np.savez_compressed(file, format=np.int64(_FORMAT), **fields)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> QualityModel:
        """Reads a file of `save`. Raises ValueError for any other file; never unpickles."""
        require(Path(path).is_file(), "quality model", str(path), "it must be a file")
        try:
            # An .npy file gives an array, which has no names.
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
        except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"quality model = {str(path)!r} is not valid: it must be an .npz file.") from error
        found = arrays.pop("format", None)
        require(
            found is not None and found.shape == () and int(found) == _FORMAT,
            "quality model", str(path), f"it must be of format {_FORMAT}, written by QualityModel.save",
        )  # fmt: skip
        names = {field.name for field in dataclasses.fields(cls)}
        weights = arrays.pop("weights", np.empty(0))
        require(
            arrays.keys() == names - {"weights"} and weights.shape == (_BUCKETS,) and weights.dtype == np.float32,
            "quality model", str(path), f"it must have {_BUCKETS} float32 weights and {', '.join(sorted(names))}",
        )  # fmt: skip
        for name, value in arrays.items():
            require(value.shape == (), "quality model", str(path), f"its {name} must be one number")
        numbers = {name: value.item() for name, value in arrays.items()}
        return cls(weights=weights, **numbers)


def feature_buckets(tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [F] buckets of unigrams and bigrams, int64 [D + 1] offsets); a document's unigrams come first."""
    bigrams = hash_ngrams(tokens, 2)
    offsets = offsets_of(np.diff(tokens.offsets) + np.diff(bigrams.offsets))
    buckets = np.empty(offsets[-1], np.int64)
    for part, shift in ((tokens, bigrams.offsets[:-1]), (bigrams, tokens.offsets[1:])):
        places = np.arange(len(part.hashes)) + np.repeat(shift, np.diff(part.offsets))
        buckets[places] = part.hashes >> np.uint64(64 - _BUCKET_BITS)
    return buckets, offsets


def mean_weights(weights: np.ndarray, tokens: Tokens) -> np.ndarray:
    """float64 [D]: mean weight of a document's unigrams and bigrams, 0 without any."""
    means = np.zeros(len(tokens.offsets) - 1)
    for start, piece in token_pieces(tokens):
        features = np.zeros(len(piece.offsets) - 1, np.int64)
        # `reduceat` sums each document by itself, so its neighbours do not change the rounding.
        for part in (piece, hash_ngrams(piece, 2)):
            counts = np.diff(part.offsets)
            filled = np.flatnonzero(counts)
            if len(filled):
                values = weights.take((part.hashes >> np.uint64(64 - _BUCKET_BITS)).astype(np.int64))
                means[start + filled] += np.add.reduceat(values, part.offsets[filled], dtype=np.float64)
            features += counts
        means[start : start + len(features)] /= np.maximum(features, 1)
    return means


def train_quality(good: Sequence[str], bad: Sequence[str], perplexity: Perplexity | None = None) -> QualityModel:
    """Fits a model. One tenth of each set is held out for the AUC, another tenth calibrates the score.

    Both sets have the same weight, whatever their sizes. Reads the first 4096 tokens of a document. Remove duplicates
    first, or held-out documents occur in training. With `perplexity` the language model's bits a byte are a second
    feature of the score. Raises ValueError for sets of fewer than 20 documents with a word.
    """
    texts: list[str] = []
    parts: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    folds: list[np.ndarray] = []
    for name, group, value in (("good", good, 1.0), ("bad", bad, 0.0)):
        tokens = hash_tokens(group)
        kept = np.flatnonzero(np.diff(tokens.offsets))
        require(len(kept) >= _FEWEST, name, f"{len(kept)} documents", f"at least {_FEWEST} with a word are needed")
        for i in kept.tolist():
            texts.append(group[i])
            parts.append(slice_tokens(tokens, i, i + 1).hashes[:_MOST_TOKENS])
        labels.append(np.full(len(kept), value))
        folds.append(np.arange(len(kept)) % _FOLDS)
    label, fold = np.concatenate(labels), np.concatenate(folds)
    tokens = Tokens(np.concatenate(parts), offsets_of([len(part) for part in parts]))

    weights = _fit_weights(tokens, label, fold > 1)
    columns = [mean_weights(weights, tokens)]
    mean = 0.0
    if perplexity is not None:
        bits = np.asarray(perplexity(texts), np.float64)
        known = bits[(fold > 0) & np.isfinite(bits)]
        require(len(known) > 0, "perplexity", "NaN", "it must be a number for at least one document")
        mean = float(known.mean())
        columns.append(_centre(bits, mean))
    features = np.stack(columns, axis=1)
    slopes, offset = _calibrate(features[fold == 1], label[fold == 1])
    logits = features @ slopes + offset
    held_out = fold == 0
    return QualityModel(
        weights=weights,
        slope=float(slopes[0]),
        offset=float(offset),
        held_out_auc=area_under_curve(logits[held_out & (label == 1)], logits[held_out & (label == 0)]),
        held_out_documents=int(held_out.sum()),
        perplexity_slope=float(slopes[1]) if perplexity is not None else 0.0,
        perplexity_mean=mean,
    )


def area_under_curve(good: np.ndarray, bad: np.ndarray) -> float:
    """Probability that one of `good` is above one of `bad`; ties count half (Mann-Whitney)."""
    ordered = np.sort(bad)
    below = np.searchsorted(ordered, good, "left") + np.searchsorted(ordered, good, "right")
    return float(below.mean() / 2 / len(bad))


def _fit_weights(tokens: Tokens, label: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """float32 [2^18]: logistic regression on mean features of the `chosen` documents, labels weighted equally."""
    import scipy.optimize
    import scipy.sparse

    buckets, offsets = feature_buckets(tokens)
    # Weights of buckets that do not occur stay 0.
    used, columns = np.unique(buckets, return_inverse=True)
    matrix = scipy.sparse.csr_array(
        (np.repeat(1 / np.diff(offsets), np.diff(offsets)), columns, offsets), shape=(len(label), len(used))
    )[np.flatnonzero(chosen)]
    matrix.sum_duplicates()
    sign = np.where(label[chosen] == 1, 1.0, -1.0)
    share = np.where(sign > 0, 0.5 / (sign > 0).sum(), 0.5 / (sign < 0).sum())
    transposed = matrix.T.tocsr()
    # A mean of n features is about 1 / sqrt(n) of one feature, so weights are scaled up by about sqrt(n).
    scale = 100.0

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margins = sign * (matrix @ weights) * scale
        value = share @ np.logaddexp(0, -margins) + _REGULARIZATION / 2 * (weights @ weights)
        slopes = -share * sign * _logistic(-margins) * scale
        return value, transposed @ slopes + _REGULARIZATION * weights

    found = scipy.optimize.minimize(
        loss, np.zeros(len(used)), jac=True, method="L-BFGS-B", options={"maxiter": _ITERATIONS, "maxcor": 10}
    )
    weights = np.zeros(_BUCKETS, np.float32)
    weights[used] = found.x * scale
    return weights


def _calibrate(features: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, float]:
    """(slope of each column, offset) of a logistic regression with Platt's targets (1999), labels weighted equally."""
    import scipy.optimize

    positives = label.sum()
    negatives = len(label) - positives
    target = np.where(label == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    share = np.where(label == 1, 0.5 / positives, 0.5 / negatives)
    spread = np.maximum(features.std(axis=0), 1e-12)
    centre = features.mean(axis=0)
    scaled = np.concatenate([(features - centre) / spread, np.ones((len(label), 1))], axis=1)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        logits = scaled @ parameters
        value = share @ (np.logaddexp(0, logits) - target * logits)
        return value, scaled.T @ (share * (_logistic(logits) - target))

    found = scipy.optimize.minimize(loss, np.zeros(scaled.shape[1]), jac=True, method="BFGS").x
    slopes = found[:-1] / spread
    return slopes, float(found[-1] - slopes @ centre)


def _centre(bits: np.ndarray, mean: float) -> np.ndarray:
    bits = np.asarray(bits, np.float64)
    return np.where(np.isfinite(bits), bits - mean, 0)


def _logistic(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(values, -500, 500)))
