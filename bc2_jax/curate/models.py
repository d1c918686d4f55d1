"""Features of documents from one of our models: mean hidden states, and bits a byte.

Documents are padded to a few lengths and run in batches of a fixed number of rows, so that few programs are compiled
and a document's result does not depend on the documents around it: any split of the work gives the same bytes. (The
evaluation's `Scorer` packs requests into rows by what else is asked, which is faster and changes the last bits.)
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from bc2_jax.config import DType
from bc2_jax.curate.embedding import SHORTEST_WINDOW, EmbeddingConfig
from bc2_jax.curate.quality import Perplexity
from bc2_jax.validation import require

_LOADING = threading.Lock()
# No piece of the vocabulary is longer than this, so a text is cut before it is encoded.
_MOST_CHARACTERS_PER_TOKEN = 32
_TOKENS_PER_BATCH = 8192
_SCORED_ROWS, _SHORTEST_SCORED = 8, 16
_CHUNK = 256
"""Tokens whose logits are in memory at one time: 128 MiB with the vocabulary of Baichuan 2."""


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
        ids, SHORTEST_WINDOW, limit, lambda length: max(_TOKENS_PER_BATCH // length, 1)
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
