"""Features of documents: hashed n-grams, or a model's hidden states and bits a byte (paper section 2.1).

Clusters and dense near copies use dense features, the quality score bits a byte. For a model, documents are padded to a
few lengths and run in batches of a fixed number of rows, so that few programs are compiled and a document's result does
not depend on the documents around it: any split of the work gives the same bytes. (The evaluation's `Scorer` chooses
its shapes by what else is asked, so the last bits of its results may differ.)
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from bc2_jax.config import DType
from bc2_jax.curate.quality import Perplexity
from bc2_jax.curate.tokens import Tokens, hash_ngrams, hash_tokens, pieces
from bc2_jax.validation import require

# Features are multiples of this, which float16 holds exactly. The product of two unit vectors is then a sum of
# multiples of 2^-22 that stays near 1, and float32 holds each partial sum exactly: the order of summation, the device
# and the library do not change a similarity, a cluster or a pair.
STEP = 2.0**-11
# The upper bits of a hash index the table of weights, the lower bits the dimension, one bit is the sign.
_WEIGHT_BITS = 18
_SIGN_BIT = np.uint64(1 << 32)
_LOADING = threading.Lock()
# No piece of the vocabulary is longer than this, so a text is cut before it is encoded.
_MOST_CHARACTERS_PER_TOKEN = 32
_TOKENS_PER_BATCH, _SHORTEST_ROW = 8192, 32
_SCORED_ROWS, _SHORTEST_SCORED = 8, 16
_CHUNK = 256
"""Tokens whose logits are in memory at the same time: 128 MiB with the vocabulary of Baichuan 2."""


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Rows scaled to unit length and rounded to multiples of STEP, float16 of the same shape; zero rows stay zero."""
    features = features.astype(np.float64)
    norms = np.sqrt(np.square(features).sum(axis=-1, keepdims=True))
    return (np.rint(features / np.maximum(norms, 1e-30) / STEP) * STEP).astype(np.float16)


def check_features(features: Any, name: str) -> None:
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
        require(tokens >= _SHORTEST_ROW, "embedding.max_tokens", tokens, f"it must be at least {_SHORTEST_ROW}")


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


def mean_hidden_states(texts: Sequence[str], config: EmbeddingConfig) -> np.ndarray:
    """float32 [n, hidden_size]: the mean of the last hidden states (after the final norm); zero for an empty text.

    `config.model` is a checkpoint or a folder in the released layout, with its tokenizer. Reads the first
    `config.max_tokens` tokens of each text. Raises FileNotFoundError or ValueError if the model or its tokenizer is
    missing or incomplete.
    """
    with _LOADING:  # threads of several tasks
        model, tokenizer, pool = _load_pool(config.model, config.dtype)
    limit = min(config.max_tokens, model.config.model_max_length)
    ids = _encode_first(tokenizer, texts, limit)
    result = np.zeros((len(texts), model.config.hidden_size), np.float32)
    for documents, ids_BT, segments_BT in _batches(
        ids, _SHORTEST_ROW, limit, lambda length: max(_TOKENS_PER_BATCH // length, 1)
    ):
        result[documents] = np.asarray(pool(ids_BT, segments_BT))[: len(documents)]
    return result


@functools.cache
def make_perplexity(path: str, max_tokens: int = 512) -> Perplexity:
    """A function from texts to their bits a byte, float64 [D], under the model in `path` on one device.

    `path` is a folder in the released layout, a checkpoint or a run, with its tokenizer. Reads the first `max_tokens`
    tokens of each text. The first token has no prediction, so its bits and bytes do not count; a text of fewer than
    two tokens gives NaN. Raises as `load_pretrained`.
    """
    require(max_tokens >= 2, "max_tokens", max_tokens, "it must be at least 2")
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from bc2_jax.model.log_probs import token_log_probs

    model, tokenizer = _load(path)
    graphdef, params = nnx.split(model)

    @jax.jit
    def bits(params: Any, ids_BT: jax.Array) -> jax.Array:
        """fp32 [B, T - 1]: bits of each token but the first. Padding is on the right, where no token sees it."""
        model = nnx.merge(graphdef, params)
        h_BTD = model.hidden_states(ids_BT)
        found = token_log_probs(h_BTD[:, :-1], model.lm_head.rows(), ids_BT[:, 1:], _CHUNK)
        return -found.log_prob / jnp.log(2.0)

    def perplexity(texts: Sequence[str]) -> np.ndarray:
        ids = _encode_first(tokenizer, texts, max_tokens)
        result = np.full(len(texts), np.nan)
        scored = [row if len(row) > 1 else [] for row in ids]
        longest = 1 << (max_tokens - 1).bit_length()
        for documents, ids_BT, _ in _batches(scored, _SHORTEST_SCORED, longest, lambda _: _SCORED_ROWS):
            found = np.asarray(bits(params, ids_BT), np.float64)
            for row, document in enumerate(documents.tolist()):
                size = len(tokenizer.decode(ids[document][1:]).encode())
                result[document] = found[row, : len(ids[document]) - 1].sum() / size if size else np.nan
        return result

    return perplexity


def _encode_first(tokenizer: Any, texts: Sequence[str], limit: int) -> list[list[int]]:
    """The first `limit` token ids of each text."""
    short = [text[: _MOST_CHARACTERS_PER_TOKEN * limit] for text in texts]
    return [ids[:limit] for ids in tokenizer.encode_batch(short)]


def _batches(
    ids: Sequence[Sequence[int]], shortest: int, longest: int, rows_of: Callable[[int], int]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(documents int64 [b], ids int32 [B, T], segments int32 [B, T]) of all documents with tokens.

    T is `shortest`, twice that and so on up to `longest`; B >= b is `rows_of(T)`. Padding has segment 0.
    """
    lengths = np.array([len(row) for row in ids], np.int64)
    below, length = 0, min(shortest, longest)
    while below < longest:
        members = np.flatnonzero((lengths > below) & (lengths <= length))
        rows = rows_of(length)
        for start in range(0, len(members), rows):
            documents = members[start : start + rows]
            ids_BT, segments_BT = np.zeros((2, rows, length), np.int32)
            for row, document in enumerate(documents.tolist()):
                ids_BT[row, : lengths[document]] = ids[document]
                segments_BT[row, : lengths[document]] = 1
            yield documents, ids_BT, segments_BT
        below, length = length, min(2 * length, longest)


def _load(path: str, **settings: Any) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from bc2_jax.convert.pretrained import find_tokenizer, load_pretrained
    from bc2_jax.tokenizer import Tokenizer

    tokenizer = Tokenizer(find_tokenizer(path))
    return load_pretrained(path, **settings), tokenizer


@functools.lru_cache(maxsize=1)
def _load_pool(path: str, dtype: DType) -> tuple[Any, Any, Callable[[np.ndarray, np.ndarray], Any]]:
    """The model, its tokenizer and the program that averages hidden states, once in a process."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    model, tokenizer = _load(path, dtype=dtype)
    graphdef, params = nnx.split(model)

    @jax.jit
    def mean(params: Any, ids_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
        h_BTD = nnx.merge(graphdef, params).hidden_states(ids_BT, segment_ids=segments_BT).astype(jnp.float32)
        valid_BT = segments_BT > 0
        sums_BD = jnp.where(valid_BT[:, :, None], h_BTD, 0).sum(axis=1)
        return sums_BD / jnp.maximum(valid_BT.sum(axis=1), 1)[:, None]

    return model, tokenizer, functools.partial(mean, params)
