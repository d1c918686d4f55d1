"""Dense features of documents from hashed n-grams (paper section 2.1); clusters and dense near copies use them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from bc2_jax.config import DType
from bc2_jax.curate.tokens import Tokens, hash_ngrams, hash_tokens, pieces
from bc2_jax.validation import require

# Features are multiples of this, which float16 holds exactly. The product of two unit vectors is then a sum of
# multiples of 2^-22 that stays near 1, and float32 holds each partial sum exactly: the order of summation, the device
# and the library do not change a similarity, a cluster or a pair.
STEP = 2.0**-11
SHORTEST_WINDOW = 32
"""Tokens of the shortest rows that a model reads (`models.py`)."""
# The upper bits of a hash index the table of weights, the lower bits the dimension, one bit is the sign.
_WEIGHT_BITS = 18
_SIGN_BIT = np.uint64(1 << 32)


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Rows scaled to unit length and rounded to multiples of STEP, float16 of the same shape; zero rows stay zero."""
    features = features.astype(np.float64)
    norms = np.sqrt(np.square(features).sum(axis=-1, keepdims=True))
    return (np.rint(features / np.maximum(norms, 1e-30) / STEP) * STEP).astype(np.float16)


def check_features(features: np.ndarray, name: str) -> None:
    """Raises ValueError if an array cannot be rows of `unit_rows`."""
    kind = f"{features.dtype} {list(features.shape)}"
    require(features.ndim == 2 and features.dtype == np.float16, name, kind, "it must be float16 [n, dim]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """Dense features of documents."""

    model: str = ""
    """A checkpoint or a folder in the released layout whose hidden states are the features; empty for hashed n-grams,
    which need no model."""
    dim: int = 256
    """Dimensions of hashed features, a power of two. A model's features have its hidden size."""
    bigram_weight: float = 0.5
    """Weight of a pair of neighbouring tokens relative to a single token; 0 counts no pairs."""
    max_tokens: int = 512
    """A model reads the first tokens of each document, at most this many."""
    dtype: DType = "bfloat16"
    """Dtype of the model's parameters and activations."""

    def __post_init__(self) -> None:
        dim, tokens = self.dim, self.max_tokens
        require(
            64 <= dim <= 4096 and dim & (dim - 1) == 0, "embedding.dim", dim, "it must be a power of two in 64..4096"
        )
        require(
            0 <= self.bigram_weight < np.inf, "embedding.bigram_weight", self.bigram_weight, "it must be at least 0"
        )
        require(tokens >= SHORTEST_WINDOW, "embedding.max_tokens", tokens, f"it must be at least {SHORTEST_WINDOW}")


@dataclasses.dataclass(frozen=True)
class DocumentFrequencies:
    """In how many documents of a sample each hashed token or pair occurs; add the counts of several shards."""

    counts: np.ndarray
    """int64 [2^18], by the upper bits of the hash."""
    documents: int

    @classmethod
    def of(cls, texts: Sequence[str]) -> DocumentFrequencies:
        """Counts the tokens and pairs of neighbours of `texts`."""
        counts = np.zeros(1 << _WEIGHT_BITS, np.int64)
        for piece in pieces(texts):
            for ngrams in _ngrams(hash_tokens(piece), True):
                occurrences = (_documents(ngrams) << _WEIGHT_BITS) | _table_index(ngrams.hashes)
                occurrences.sort()
                first = np.ones(len(occurrences), bool)
                first[1:] = occurrences[1:] != occurrences[:-1]
                counts += np.bincount(occurrences[first] & (len(counts) - 1), minlength=len(counts))
        return cls(counts, len(texts))

    def weights(self) -> np.ndarray:
        """float32 [2^18]: log((documents + 1) / (frequency + 1)), the inverse document frequency.

        Rounded to multiples of 1/256, because the last bit of a logarithm differs between machines.
        """
        return (np.rint(np.log((self.documents + 1) / (self.counts + 1)) * 256) / 256).clip(0).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class HashedNgrams:
    """Signed count sketches of tokens and pairs of neighbours (arXiv 0902.2206).

    Every token adds its weight, with a sign, to one of `dim` dimensions; its hash chooses both. The feature is the
    square root of each dimension, with its sign, so that a token repeated a hundred times is not a hundred times as
    important. With `frequencies` a token's weight is its inverse document frequency, so that documents are near each
    other by subject and not by the common words of their language; without, all tokens weigh the same.
    """

    config: EmbeddingConfig = dataclasses.field(default_factory=EmbeddingConfig)
    frequencies: DocumentFrequencies | None = None

    @functools.cached_property
    def _weights(self) -> np.ndarray | None:
        return None if self.frequencies is None else self.frequencies.weights()

    def sketch(self, tokens: Tokens) -> np.ndarray:
        """float16 [n, dim], unit length, of documents of about one piece of `tokens.pieces`."""
        dim, bigram_weight = self.config.dim, self.config.bigram_weight
        sums = np.zeros((len(tokens.offsets) - 1) * dim)
        scales = (1.0, bigram_weight)
        for ngrams, scale in zip(_ngrams(tokens, bigram_weight > 0), scales, strict=False):
            hashes = ngrams.hashes
            places = (hashes & np.uint64(dim - 1)).astype(np.int64) + _documents(ngrams) * dim
            weights = np.float32(1) if self._weights is None else self._weights[_table_index(hashes)]
            weights = np.where(hashes & _SIGN_BIT, weights, -weights)
            sums += scale * np.bincount(places, weights, len(sums))
        return unit_rows((np.sign(sums) * np.sqrt(np.abs(sums))).reshape(-1, dim))


def _ngrams(tokens: Tokens, pairs: bool) -> Iterator[Tokens]:
    yield tokens
    if pairs:
        yield hash_ngrams(tokens, 2)


def _documents(tokens: Tokens) -> np.ndarray:
    """int64 [N], the document of each token."""
    return np.repeat(np.arange(len(tokens.offsets) - 1), np.diff(tokens.offsets))


def _table_index(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(64 - _WEIGHT_BITS)).astype(np.int64)
