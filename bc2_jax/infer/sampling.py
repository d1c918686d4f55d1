"""From logits to the next token: pure functions on fp32 logits [B, V] of one device's rows.

The order is that of the released code (Hugging Face transformers): repetition penalty, temperature, top-k, top-p.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def penalize_repetition(logits_BV: Array, seen_BV: Array, penalty: Array | float) -> Array:
    """Makes the tokens marked in `seen_BV` (bool) less likely: positive logits / penalty, negative ones * penalty.

    How often a token was seen does not matter (CTRL, arXiv 1909.05858, section 4.1). penalty 1 changes nothing.
    """
    penalized = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalized, logits_BV)


def sampling_candidates(
    logits_BV: Array, temperature: Array | float, top_k: int, top_p: Array | float | None
) -> tuple[Array, Array]:
    """What is sampled from: ids int32 [B, K] and their log-weights fp32 [B, K], -inf for those that are cut off.

    The top_k most likely tokens are kept (all for 0), and of these the fewest whose share of their probability reaches
    top_p (all for None); the most likely always stays. Between equal logits the smaller id comes first, so never more
    than top_k are kept. Sorts the vocabulary only for top_k = 0 with a top_p.
    """
    V = logits_BV.shape[-1]
    k = min(top_k, V) if top_k else V
    if k == V and top_p is None:
        values_BK, ids_BK = logits_BV, jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32), logits_BV.shape)
    else:
        values_BK, ids_BK = jax.lax.top_k(logits_BV, k)
    # The peak is taken off before the division: a tiny temperature then gives -inf beside one 0, not inf - inf. Below
    # the smallest normal number the device would flush it to zero.
    temperature = jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
    weights_BK = (values_BK - values_BK.max(-1, keepdims=True)) / temperature
    if top_p is not None:
        p_BK = jax.nn.softmax(weights_BK, axis=-1)
        before_BK = jnp.cumsum(p_BK, axis=-1) - p_BK
        # The first is kept by name: at top_p below the rounding of the sum nothing else says so.
        keep = (before_BK < top_p) | (jnp.arange(k) == 0)
        weights_BK = jnp.where(keep, weights_BK, -jnp.inf)
    return ids_BK, weights_BK


def sample_tokens(
    logits_BV: Array,
    keys_B: Array,
    *,
    temperature: Array | float | None,
    top_k: int = 0,
    top_p: Array | float | None = None,
) -> Array:
    """The next tokens, int32 [B]; row b draws with `keys_B[b]`, so that it does not depend on the other rows.

    temperature None is greedy: the largest logit, the smallest id among equals. temperature and top_p may be arrays, so
    that one compiled function serves all their values; top_k and which of them are None shape the function.
    """
    if temperature is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    ids_BK, weights_BK = sampling_candidates(logits_BV, temperature, top_k, top_p)
    chosen_B = jax.vmap(jax.random.categorical)(keys_B, weights_BK)
    return jnp.take_along_axis(ids_BK, chosen_B[:, None], axis=-1)[:, 0].astype(jnp.int32)
