"""Log-probabilities of given tokens from hidden states, differentiable, without a [B, T, V] tensor.

Used by preference tuning, policy gradients, evaluation and perplexity. They weigh tokens only once the
log-probabilities are known (of both answers, of a whole document), so the gradient cannot come with the forward pass as
in `train/loss.py`: the backward pass computes the logits again, chunk by chunk.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from bc2_jax.data.batch import IGNORED
from bc2_jax.model.head_chunks import NO_TOKEN, HeadPart, add_gradients, cut_tokens, join_tokens, over, statistics
from bc2_jax.sharding import named_sharding, rules_in_use, spec, use_rules
from bc2_jax.validation import require


class TokenLogProbs(NamedTuple):
    """[B, T], laid out like the labels ("batch", "sequence")."""

    log_prob: Array
    """log p(label), nats, fp32; 0 where the label is IGNORED."""
    largest_logit: Array
    """fp32, at every position, IGNORED or not."""
    argmax: Array
    """int32: the token with the largest logit, the first of equals, at every position; 2^31 - 1 if a logit is NaN."""
    margin: Array
    """fp32: the label's logit minus the largest other one, 0 where IGNORED; has no gradient."""


def token_log_probs(h_BTD: Array, rows_VD: Array, labels_BT: Array, chunk: int) -> TokenLogProbs:
    """Log-probabilities of `labels_BT` (int32, the next tokens or IGNORED), largest logits and arg-max.

    `h_BTD` are hidden states after the last norm. `rows_VD` are the rows of `Head.rows()`, sharded like the weight;
    they are cast to the dtype of `h_BTD` and gathered here, once in each direction. `chunk` is in tokens per device:
    memory grows with chunk * V. fp64 hidden states give fp64 results.

    `log_prob` and `largest_logit` have gradients with respect to `h_BTD` and `rows_VD`; rows that are not
    differentiated cost nothing. Equal largest logits share the gradient of `largest_logit`. Raises ValueError for
    shapes that do not agree and for chunk < 1.
    """
    require(chunk > 0, "chunk", chunk, "it must be positive")
    if labels_BT.shape != h_BTD.shape[:2] or rows_VD.shape[1:] != h_BTD.shape[2:]:
        raise ValueError(
            f"labels have shape {labels_BT.shape} and rows {rows_VD.shape}; for hidden states [B, T, D] of shape "
            f"{h_BTD.shape} they must be [B, T] and [V, D]."
        )
    # Passed explicitly: the backward pass may be traced in another context.
    return _token_log_probs(h_BTD, rows_VD, labels_BT, chunk, rules_in_use())


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _token_log_probs(h_BTD, rows_VD, labels_BT, chunk, rules):
    return _run_forward(h_BTD, rows_VD, labels_BT, chunk, rules)[0]


def _run_forward(h_BTD, rows_VD, labels_BT, chunk, rules):
    """(TokenLogProbs, log of the sum of exp(logit - largest logit) [B, T])."""
    with jax.named_scope("log_probs"), use_rules(rules):
        rows_VD = rows_VD.astype(h_BTD.dtype)
        if named_sharding() is None:
            return _local_forward(h_BTD, rows_VD, labels_BT, chunk=chunk)
        tokens = spec("batch", "sequence")
        return jax.shard_map(
            functools.partial(_local_forward, chunk=chunk, on_mesh=True),
            in_specs=(spec("batch", "sequence", "hidden"), spec("vocab", "embed"), tokens),
            out_specs=tokens,
        )(h_BTD, rows_VD, labels_BT)


def _local_forward(h_BTD, rows_VD, labels_BT, *, chunk, on_mesh=False):
    """One device's tokens against its shard of the vocabulary."""
    head = HeadPart.gather(rows_VD, on_mesh)

    def run_chunk(_, inputs):
        h_TD, labels_T = inputs
        logits_TV = head.logits(h_TD)
        logits, [columns] = statistics([head], [logits_TV], labels_T)
        log_total_T = jnp.log(logits.total_T)
        log_prob_T = jnp.where(labels_T == IGNORED, 0, logits.label_logit_T - logits.max_T - log_total_T)
        argmax_T = jnp.where(columns.is_max_TV, head.ids_V, NO_TOKEN).min(-1).astype(jnp.int32)
        argmax_T = over(jax.lax.pmin, argmax_T, head.vocab_axes)
        # Removed by the compiler if unused.
        others_T = head.largest(jnp.where(columns.is_label_TV, -jnp.inf, logits_TV))
        margin_T = jnp.where(labels_T == IGNORED, 0, logits.label_logit_T - others_T)
        return None, (TokenLogProbs(log_prob_T, logits.max_T, argmax_T, margin_T), log_total_T)

    _, chunks = jax.lax.scan(run_chunk, None, (cut_tokens(h_BTD, chunk), cut_tokens(labels_BT, chunk, IGNORED)))
    return jax.tree.map(lambda x_CT: join_tokens(x_CT, *labels_BT.shape), chunks)


class _ForBackward(NamedTuple):
    """Per-token values [B, T] for the backward pass: kept from the forward pass, and incoming gradients."""

    labels: Array
    largest_logit: Array
    log_total: Array
    d_log_prob: Array | None = None
    d_largest_logit: Array | None = None
    """None if the largest logits are unused: saves the pass over the logits that finds them again."""


def _forward(h_BTD, rows_VD, labels_BT, chunk, rules):
    # A frozen head needs no gradient: saves a matmul and, for 7B, 2 GiB. The structure of the residuals tells, since it
    # is not traced.
    asked = () if rows_VD.perturbed else None
    h_BTD, rows_VD, labels_BT = h_BTD.value, rows_VD.value, labels_BT.value
    found, log_total_BT = _run_forward(h_BTD, rows_VD, labels_BT, chunk, rules)
    return found, (h_BTD, rows_VD, _ForBackward(labels_BT, found.largest_logit, log_total_BT), asked)


def _backward(chunk, rules, kept, cotangents):
    h_BTD, rows_VD, tokens, asked = kept
    d_log_prob, d_largest_logit, _, d_margin = (None if isinstance(d, SymbolicZero) else d for d in cotangents)
    if d_margin is not None:
        raise ValueError("TokenLogProbs.margin has no gradient: apply jax.lax.stop_gradient.")
    if d_log_prob is None:
        d_log_prob = jnp.zeros_like(tokens.log_total)
    tokens = tokens._replace(d_log_prob=d_log_prob, d_largest_logit=d_largest_logit)
    local = functools.partial(_local_backward, chunk=chunk, with_rows=asked is not None)
    with jax.named_scope("log_probs"), use_rules(rules):
        used_VD = rows_VD.astype(h_BTD.dtype)
        if named_sharding() is None:
            d_h_BTD, d_rows_VD = local(h_BTD, used_VD, tokens)
        else:
            hidden, stored = spec("batch", "sequence", "hidden"), spec("vocab", "embed")
            d_h_BTD, d_rows_VD = jax.shard_map(
                functools.partial(local, on_mesh=True),
                in_specs=(hidden, stored, spec("batch", "sequence")),
                out_specs=(hidden, None if asked is None else stored),
            )(h_BTD, used_VD, tokens)
        if d_rows_VD is not None:
            d_rows_VD = d_rows_VD.astype(rows_VD.dtype)
        # Forces the gradient of the gathered head (2 GiB for 7B) to be freed before the layers run backward.
        return *jax.lax.optimization_barrier((d_h_BTD, d_rows_VD)), None


def _local_backward(h_BTD, rows_VD, tokens, *, chunk, with_rows, on_mesh=False):
    """Gradients of one device's hidden states and, if requested, of its stored shard of the head."""
    h_CTD = cut_tokens(h_BTD, chunk)
    # Padding has gradient 0.
    tokens = jax.tree.map(lambda x_BT: cut_tokens(x_BT, chunk), tokens)
    head = HeadPart.gather(rows_VD, on_mesh)

    def run_chunk(carry, inputs):
        d_rows, h_CTD = carry
        index, token = inputs
        h_TD = jax.lax.dynamic_index_in_dim(h_CTD, index, keepdims=False)
        logits_TV = head.logits(h_TD)
        weight_TV = jnp.where(token.labels == IGNORED, 0, token.d_log_prob)[:, None]
        p_TV = jnp.exp(logits_TV - token.largest_logit[:, None] - token.log_total[:, None])
        d_logits_TV = jnp.where(head.is_label(token.labels), weight_TV, 0) - p_TV * weight_TV
        if token.d_largest_logit is not None:
            # Recomputed, since a logit may differ in its last bit from the forward pass, which was compiled
            # differently.
            is_max_TV = logits_TV == head.largest(logits_TV)[:, None]
            ties_T = over(jax.lax.psum, is_max_TV.sum(-1, dtype=head.exact), head.vocab_axes)
            d_logits_TV += jnp.where(is_max_TV, (token.d_largest_logit / ties_T)[:, None], 0)
        d_h_TD, d_rows = add_gradients([head], h_TD, [d_logits_TV], d_rows)
        # Overwrites h, which is no longer needed: peak memory is in this loop.
        return (d_rows, jax.lax.dynamic_update_index_in_dim(h_CTD, d_h_TD, index, 0)), None

    start = [head.zero_gradient()] if with_rows else None, h_CTD
    (d_rows, d_h_CTD), _ = jax.lax.scan(run_chunk, start, (jnp.arange(h_CTD.shape[0]), tokens))
    return join_tokens(d_h_CTD, *h_BTD.shape[:2]), head.stored_gradient(*d_rows) if with_rows else None


_token_log_probs.defvjp(_forward, _backward, symbolic_zeros=True)
