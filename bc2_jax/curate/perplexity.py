"""How well a trained model predicts a document, as a feature of its quality."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bc2_jax.curate.quality import Perplexity
from bc2_jax.validation import require

CHUNK = 256
"""Tokens whose logits are in memory at one time: 128 MiB with the vocabulary of Baichuan 2."""


def make_perplexity(path: str | Path, max_tokens: int = 512, *, batch_size: int = 8) -> Perplexity:
    """A function from texts to their bits a byte, float64 [D], under the model in `path` on one device.

    `path` is a folder in the released layout, a checkpoint or a run, with its tokenizer. Only the first `max_tokens`
    tokens of a document are read. The first token has no prediction, so neither its bits nor its bytes count; a
    document of fewer than two tokens gives NaN. Rows are padded to a power of two and run in batches of one length, so
    there are few programs to compile. Raises as `load_pretrained`.
    """
    require(max_tokens >= 2, "max_tokens", max_tokens, "it must be at least 2")
    require(batch_size > 0, "batch_size", batch_size, "it must be positive")
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from bc2_jax.convert.pretrained import find_tokenizer, load_pretrained
    from bc2_jax.model.log_probs import token_log_probs
    from bc2_jax.tokenizer import Tokenizer

    model = load_pretrained(path)
    tokenizer = Tokenizer(find_tokenizer(path))
    graphdef, params = nnx.split(model)

    @jax.jit
    def bits(params, ids_BT):
        """fp32 [B, T - 1]: bits of each token but the first. Padding is on the right, where no token sees it."""
        model = nnx.merge(graphdef, params)
        h_BTD = model.hidden_states(ids_BT)
        found = token_log_probs(h_BTD[:, :-1], model.lm_head.rows(), ids_BT[:, 1:], CHUNK)
        return -found.log_prob / jnp.log(2.0)

    def perplexity(texts: Sequence[str]) -> np.ndarray:
        # A token has at most 32 characters or so; more than this many can't be among the first max_tokens.
        encoded = [ids[:max_tokens] for ids in tokenizer.encode_batch([text[: 32 * max_tokens] for text in texts])]
        result = np.full(len(texts), np.nan)
        lengths = np.array([len(ids) for ids in encoded], np.int64)
        buckets = 1 << np.ceil(np.log2(np.maximum(lengths, 16))).astype(np.int64)
        for length in np.unique(buckets[lengths >= 2]).tolist():
            rows = np.flatnonzero((buckets == length) & (lengths >= 2))
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size].tolist()
                ids = np.zeros((batch_size, length), np.int32)
                for k, i in enumerate(batch):
                    ids[k, : lengths[i]] = encoded[i]
                found = np.asarray(bits(params, ids), np.float64)
                for k, i in enumerate(batch):
                    size = len(tokenizer.decode(encoded[i][1:]).encode())
                    result[i] = found[k, : lengths[i] - 1].sum() / size if size else np.nan
        return result

    return perplexity
