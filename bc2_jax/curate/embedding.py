"""Texts -> dense features (paper section 2.1): what clusters and near-duplicates in feature space are computed on."""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bc2_jax.config import DType
from bc2_jax.curate.tokens import Tokens, hash_ngrams, hash_tokens, pieces
from bc2_jax.validation import require

if TYPE_CHECKING:
    from jax.sharding import Mesh

Embedder = Callable[[Sequence[str]], np.ndarray]
"""Texts -> float16 [n, dim]: rows of `unit_rows`, zero for a text without tokens."""

# Features are multiples of this. The product of two unit vectors is then a sum of multiples of 2^-22 that nowhere
# exceeds 1 by much: float32 holds each of its partial sums exactly, so that no order of summation, device or library
# changes a similarity, a cluster or a pair. float16 holds the features exactly.
STEP = 2.0**-11
# Of a hash, the upper bits choose the entry of the table of weights and the lower ones the dimension.
_WEIGHT_BITS = 18
_SIGN_BIT = np.uint64(1 << 32)
# Documents of one window are padded to one of these lengths, or to `max_tokens`.
_SHORTEST_WINDOW = 32
_LOADING = threading.Lock()


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
    """Dimensions of the hashed features, a power of two; those of a model are its hidden size."""
    bigram_weight: float = 0.5
    """Weight of a pair of neighbouring tokens against that of a token; 0 counts no pairs."""
    max_tokens: int = 512
    """A model reads so many tokens from the beginning of each document."""
    dtype: DType = "bfloat16"
    """In which a model is computed."""

    def __post_init__(self) -> None:
        dim, tokens = self.dim, self.max_tokens
        require(
            64 <= dim <= 4096 and dim & (dim - 1) == 0, "embedding.dim", dim, "it must be a power of two in 64..4096"
        )
        require(
            0 <= self.bigram_weight < np.inf, "embedding.bigram_weight", self.bigram_weight, "it must be at least 0"
        )
        require(tokens >= _SHORTEST_WINDOW, "embedding.max_tokens", tokens, f"it must be at least {_SHORTEST_WINDOW}")


@dataclasses.dataclass(frozen=True)
class DocumentFrequencies:
    """In how many documents of a sample each hashed token or pair occurs; those of several shards are added."""

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

    @classmethod
    def sum(cls, parts: Iterable[DocumentFrequencies]) -> DocumentFrequencies:
        """Those of all parts together."""
        counts, documents = np.zeros(1 << _WEIGHT_BITS, np.int64), 0
        for part in parts:
            counts += part.counts
            documents += part.documents
        return cls(counts, documents)

    def weights(self) -> np.ndarray:
        """float32 [2^18]: log((documents + 1) / (frequency + 1)), the inverse document frequency.

        Rounded to multiples of 1/256, which hides the last bit in which the logarithms of two machines may differ.
        """
        return (np.rint(np.log((self.documents + 1) / (self.counts + 1)) * 256) / 256).clip(0).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class HashedNgrams:
    """An Embedder without a model: a signed count sketch of tokens and pairs of neighbours (arXiv 0902.2206).

    Every token adds its weight, with a sign, to one of `dim` dimensions, both chosen by its hash. The square root of
    each dimension, sign kept, is what counts: a token that is repeated a hundred times is not a hundred times as
    important. With `frequencies` tokens weigh by their inverse document frequency, so that documents are near each
    other by what they are about and not by the words of their language; without, all tokens weigh the same.
    """

    config: EmbeddingConfig = dataclasses.field(default_factory=EmbeddingConfig)
    frequencies: DocumentFrequencies | None = None

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float16 [n, dim], unit length."""
        parts = [self.sketch(hash_tokens(piece)) for piece in pieces(texts)]
        return np.concatenate([np.empty((0, self.config.dim), np.float16), *parts])

    @functools.cached_property
    def _weights(self) -> np.ndarray | None:
        return None if self.frequencies is None else self.frequencies.weights()

    def sketch(self, tokens: Tokens) -> np.ndarray:
        """The same for documents whose tokens are known, best a piece of `pieces`."""
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


@dataclasses.dataclass(frozen=True, eq=False)
class HiddenStates:
    """An Embedder by one of our models: the mean of its last hidden states (after the final norm) over the tokens.

    `config.model` is a checkpoint or a folder in the released layout, with its tokenizer. Of a longer document the
    first `max_tokens` tokens are read. The hidden states of a language model share a large common part, which makes
    all documents near each other: `center`, the mean of `means` over a sample, is subtracted where it is given.
    With a mesh (`bc2_jax.sharding.make_mesh`) the model and the rows of a batch are cut over it.
    Raises FileNotFoundError or ValueError, on first use, if the folder is not a whole model with a tokenizer.
    """

    config: EmbeddingConfig
    center: np.ndarray | None = None
    mesh: Mesh | None = None
    tokens_per_batch: int = 8192
    """Rows times padded length of one batch; at least one row for each part into which a mesh cuts them."""

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float16 [n, hidden size], unit length."""
        means = self.means(texts)
        if self.center is not None:
            means = np.where(np.any(means, axis=1, keepdims=True), means - self.center, 0)
        return unit_rows(means)

    def means(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, hidden size], before centring and scaling; zero for an empty text."""
        from bc2_jax.sharding import mesh_axes

        with _LOADING:  # several threads may embed
            model, tokenizer, pool = _load(self.config.model, self.config.dtype, self.mesh)
        parts = 1 if self.mesh is None else math.prod(self.mesh.shape[a] for a in mesh_axes("batch"))
        limit = min(self.config.max_tokens, model.config.model_max_length)
        # No piece is longer than 32 characters: what is cut off here is beyond the window.
        ids = [row[:limit] for row in tokenizer.encode_batch([text[: 32 * limit] for text in texts])]
        lengths = np.array([len(row) for row in ids], np.int64)
        result = np.zeros((len(texts), model.config.hidden_size), np.float32)
        for window, members in _windows(lengths, limit):
            rows = max(self.tokens_per_batch // window // parts, 1) * parts
            for start in range(0, len(members), rows):
                batch = members[start : start + rows]
                tokens, segments = np.zeros((2, rows, window), np.int32)
                for row, member in enumerate(batch):
                    tokens[row, : lengths[member]] = ids[member]
                    segments[row, : lengths[member]] = 1
                result[batch] = np.asarray(pool(tokens, segments))[: len(batch)]
        return result


def embedder(config: EmbeddingConfig, frequencies: DocumentFrequencies | None = None) -> Embedder:
    """The Embedder that `config` asks for; `frequencies` weigh hashed tokens."""
    return HiddenStates(config) if config.model else HashedNgrams(config, frequencies)


def _ngrams(tokens: Tokens, pairs: bool) -> Iterator[Tokens]:
    yield tokens
    if pairs:
        yield hash_ngrams(tokens, 2)


def _documents(tokens: Tokens) -> np.ndarray:
    """int64 [N], the document of each token."""
    return np.repeat(np.arange(len(tokens.offsets) - 1), np.diff(tokens.offsets))


def _table_index(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(64 - _WEIGHT_BITS)).astype(np.int64)


def _windows(lengths: np.ndarray, limit: int) -> Iterator[tuple[int, np.ndarray]]:
    """(padded length, documents of that length): few lengths, for each is a program that must be compiled."""
    shorter, window = 0, min(_SHORTEST_WINDOW, limit)
    while shorter < limit:
        members = np.flatnonzero((lengths > shorter) & (lengths <= window))
        if len(members):
            yield window, members
        shorter, window = window, min(2 * window, limit)


@functools.lru_cache(maxsize=1)
def _load(path: str, dtype: DType, mesh: Mesh | None) -> tuple[Any, Any, Callable]:
    """The model, its tokenizer and the program that averages hidden states; loaded once in a process."""
    import contextlib

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from bc2_jax.convert.pretrained import find_tokenizer, load_pretrained
    from bc2_jax.sharding import reshard
    from bc2_jax.tokenizer import Tokenizer

    tokenizer = Tokenizer(find_tokenizer(Path(path)))
    model = load_pretrained(path, dtype=dtype, mesh=mesh)
    graphdef, params = nnx.split(model)

    @jax.jit
    def mean(params: Any, ids_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
        h_BTD = nnx.merge(graphdef, params).hidden_states(ids_BT, segment_ids=segments_BT)
        h_BTD = reshard(h_BTD.astype(jnp.float32), "batch", None, None)
        valid_BT = reshard(segments_BT, "batch", None) > 0
        sums_BD = jnp.where(valid_BT[:, :, None], h_BTD, 0).sum(axis=1)
        return sums_BD / jnp.maximum(valid_BT.sum(axis=1), 1)[:, None]

    def pool(ids_BT: np.ndarray, segments_BT: np.ndarray) -> jax.Array:
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            return mean(params, ids_BT, segments_BT)

    return model, tokenizer, pool
