"""Cross entropy and max-z loss (paper section 2.4) from hidden states, in one pass over the vocabulary.

Like the paper's, this computation is split to reduce its peak memory: tokens are processed in chunks that stay on their
device, the head is gathered once, and each chunk gives its loss and gradients together. No [B, T, V] tensor exists and
no logit is computed twice. Statistics are fp32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from bc2_jax.data.batch import IGNORED
from bc2_jax.model.head_chunks import HeadPart, add_gradients, cut_tokens, join_tokens, over, statistics, varying
from bc2_jax.sharding import named_sharding, rules_in_use, spec, use_rules

PIECES = 4
"""Pieces of the vocabulary in which the head is gathered and its gradient reduced, if a device's tokens are one chunk.
With several, the loop over them needs the whole head before it begins and has the gradient only at its end."""


class LossSums(NamedTuple):
    """Weighted sums over the valid targets of a batch, fp32 scalars, and one maximum; divide by `tokens` for means."""

    cross_entropy: Array
    """-log p(label), nats."""
    max_z: Array
    """Square of the largest logit."""
    max_logit: Array
    correct: Array
    """1 where the label has the largest logit."""
    tokens: Array
    """The weight of each valid target; 1 by default."""
    largest_logit: Array
    """The maximum over all valid targets; -inf without one."""

    @classmethod
    def zeros(cls, dtype: jnp.dtype | type = jnp.float32) -> LossSums:
        """For no targets."""
        return cls(*jnp.zeros(len(cls._fields), dtype))._replace(largest_logit=jnp.array(-jnp.inf, dtype))

    def plus(self, other: LossSums) -> LossSums:
        """For the targets of both."""
        largest = jnp.maximum(self.largest_logit, other.largest_logit)
        return jax.tree.map(jnp.add, self, other)._replace(largest_logit=largest)


def count_targets(labels: Array) -> Array:
    """Number of labels that are not IGNORED, fp32 scalar."""
    return jnp.sum(labels != IGNORED, dtype=jnp.float32)


def head_loss(
    h_BTD: Array, rows_VD: Array, labels_BT: Array, z_loss_weight: float, chunk: int, weights_BT: Array | None = None
) -> tuple[Array, LossSums]:
    """(sum of cross entropy + z_loss_weight * max_z over the valid targets, its parts).

    `rows_VD` are the rows of `Head.rows()`, sharded like the weight; they are cast to the dtype of `h_BTD` and gathered
    here. labels [B, T] are the next tokens, IGNORED where there is none. `weights_BT` (fp32, default 1) is the weight
    of each target and has no gradient. `chunk` is in tokens per device. Only the first result has a gradient. Equal
    largest logits share the max-z gradient.
    """
    targets = (labels_BT,) if weights_BT is None else (labels_BT, weights_BT)
    return _head_loss(h_BTD, rows_VD, targets, z_loss_weight, chunk, rules_in_use())


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _head_loss(h_BTD, rows_VD, targets, z_loss_weight, chunk, rules):
    return _run(h_BTD, rows_VD, targets, z_loss_weight, chunk, rules)[0]


def _run(h_BTD, rows_VD, targets, z_loss_weight, chunk, rules, gradients=(False, False)):
    """((loss, sums), gradients of hidden states and rows; None where `gradients` does not ask for one)."""
    local = functools.partial(_local_loss, z_loss_weight=z_loss_weight, chunk=chunk, gradients=gradients)
    with jax.named_scope("head_loss"), use_rules(rules):
        rows_VD = rows_VD.astype(h_BTD.dtype)
        if named_sharding() is None:
            return local(h_BTD, rows_VD, targets)
        hidden, stored, scalar = spec("batch", "sequence", "hidden"), spec("vocab", "embed"), spec()
        sums = (scalar, LossSums(*[scalar] * len(LossSums._fields)))
        asked = tuple(layout if wanted else None for layout, wanted in zip((hidden, stored), gradients, strict=True))
        sums, gradients = jax.shard_map(
            functools.partial(local, on_mesh=True),
            in_specs=(hidden, stored, spec("batch", "sequence")),
            out_specs=(sums, asked),
        )(h_BTD, rows_VD, targets)
        # Forces the gradient of the gathered head (2 GiB for 7B) to be freed before the layers run backward.
        return sums, jax.lax.optimization_barrier(gradients)


def _local_loss(h_BTD, rows_VD, targets, *, z_loss_weight, chunk, gradients, on_mesh=False):
    """One device's tokens against its shard of the vocabulary: (sums, gradients or None)."""
    labels_BT, *weights_BT = targets
    with_h, with_rows = gradients
    h_CTD, labels_CT = cut_tokens(h_BTD, chunk), cut_tokens(labels_BT, chunk, IGNORED)
    weights_CT = [cut_tokens(x_BT, chunk) for x_BT in weights_BT]
    parts = HeadPart.gather_pieces(rows_VD, on_mesh, PIECES if on_mesh and len(h_CTD) == 1 else 1)
    head = parts[0]

    def run_chunk(carry, inputs):
        sums, d_rows, h_CTD = carry
        index, labels_T, weights_T = inputs
        h_TD = jax.lax.dynamic_index_in_dim(h_CTD, index, keepdims=False)
        logits, columns = statistics(parts, [part.logits(h_TD) for part in parts], labels_T)
        max_T, total_T = logits.max_T, logits.total_T
        valid_T = (labels_T != IGNORED).astype(head.exact)
        for weight_T in weights_T:
            valid_T *= weight_T
        cross_entropy_T = max_T + jnp.log(total_T) - logits.label_logit_T
        correct_T = (logits.label_logit_T == max_T).astype(head.exact)
        terms = (cross_entropy_T, max_T**2, max_T, correct_T, jnp.ones_like(max_T))
        largest = jnp.max(jnp.where(valid_T > 0, max_T, -jnp.inf))
        sums = sums.plus(LossSums(*(jnp.sum(x_T * valid_T) for x_T in terms), largest))
        if not with_h:
            return (sums, None, h_CTD), None
        d_logits = [
            c.exp_TV * (valid_T / total_T)[:, None] - jnp.where(c.is_label_TV, valid_T[:, None], 0) for c in columns
        ]
        if z_loss_weight:
            d_max_T = 2 * z_loss_weight * valid_T * max_T / logits.ties_T
            d_logits = [x + jnp.where(c.is_max_TV, d_max_T[:, None], 0) for x, c in zip(d_logits, columns, strict=True)]
        d_h_TD, d_rows = add_gradients(parts, h_TD, d_logits, d_rows)
        # Overwrites h, which is no longer needed: peak memory is in this loop.
        return (sums, d_rows, jax.lax.dynamic_update_index_in_dim(h_CTD, d_h_TD, index, 0)), None

    zero = varying(jnp.zeros((), head.exact), head.batch_axes)
    d_rows = [part.zero_gradient() for part in parts] if with_rows else None
    start = LossSums(*[zero] * len(LossSums._fields))._replace(largest_logit=zero - jnp.inf), d_rows, h_CTD
    (sums, d_rows, d_h_CTD), _ = jax.lax.scan(run_chunk, start, (jnp.arange(h_CTD.shape[0]), labels_CT, weights_CT))
    largest = over(jax.lax.pmax, sums.largest_logit, head.batch_axes)
    sums = over(jax.lax.psum, sums._replace(largest_logit=zero), head.batch_axes)._replace(largest_logit=largest)
    loss = sums.cross_entropy + z_loss_weight * sums.max_z
    d_h_BTD = join_tokens(d_h_CTD, *labels_BT.shape) if with_h else None
    if d_rows is None:
        return (loss, sums), (d_h_BTD, None)
    stored = [part.stored_gradient(d_rows_DV) for part, d_rows_DV in zip(parts, d_rows, strict=True)]
    return (loss, sums), (d_h_BTD, jnp.concatenate(stored))


def _forward(h_BTD, rows_VD, targets, z_loss_weight, chunk, rules):
    # A frozen head needs no gradient: saves a matmul and, for 7B, 2 GiB.
    asked = True, rows_VD.perturbed
    values = tuple(target.value for target in targets)
    return _run(h_BTD.value, rows_VD.value, values, z_loss_weight, chunk, rules, asked)


def _backward(z_loss_weight, chunk, rules, gradients, cotangents):
    d_loss = cotangents[0]
    if isinstance(d_loss, SymbolicZero):
        d_loss = jnp.zeros(d_loss.shape, d_loss.dtype)
    d_h_BTD, d_rows_VD = gradients
    return d_h_BTD * d_loss.astype(d_h_BTD.dtype), None if d_rows_VD is None else d_rows_VD * d_loss, None


_head_loss.defvjp(_forward, _backward, symbolic_zeros=True)
