"""Cross entropy and max-z loss (paper section 2.4) straight from hidden states, in one pass over the vocabulary.

The paper splits this calculation to cut its peak memory; so does this one: tokens go in chunks that stay on their
device, the head is gathered once, and each chunk yields its loss and its gradients together. There is never a
[B, T, V] tensor and no logit is computed twice. All statistics are fp32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from bc2_jax.data.batch import IGNORED
from bc2_jax.sharding import all_gather, mesh_axes, named_sharding, reduce_scatter, rules_in_use, spec, use_rules

VOCAB_MULTIPLE = 1024
"""A vocabulary is padded to a multiple of this: libtpu scatters a tensor only if it can cut it into small pieces, and
125,696 = 2^8 x 491 rows it would reduce whole, at twice the traffic."""
NO_TOKEN = jnp.iinfo(jnp.int32).max
"""Id of the padding."""


class LossSums(NamedTuple):
    """Sums over the valid targets of a batch, fp32 scalars; divide by `tokens` for means. One is a maximum."""

    cross_entropy: Array
    """-log p(label), nats."""
    max_z: Array
    """Square of the largest logit."""
    max_logit: Array
    correct: Array
    """1 where the label has the largest logit."""
    tokens: Array
    """1 for each valid target."""
    largest_logit: Array
    """The largest logit of all, no sum; -inf without a valid target."""

    @classmethod
    def zeros(cls, dtype: jnp.dtype | type = jnp.float32) -> LossSums:
        """Of no targets."""
        return cls(*jnp.zeros(len(cls._fields), dtype))._replace(largest_logit=jnp.array(-jnp.inf, dtype))

    def plus(self, other: LossSums) -> LossSums:
        """Of the targets of both."""
        largest = jnp.maximum(self.largest_logit, other.largest_logit)
        return jax.tree.map(jnp.add, self, other)._replace(largest_logit=largest)


def count_targets(labels: Array) -> Array:
    """Number of labels that are not IGNORED, fp32 scalar."""
    return jnp.sum(labels != IGNORED, dtype=jnp.float32)


def head_loss(
    h_BTD: Array, rows_VD: Array, labels_BT: Array, z_loss_weight: float, chunk: int
) -> tuple[Array, LossSums]:
    """(sum of cross entropy + z_loss_weight * max_z over the valid targets, its parts).

    `rows_VD` are the head's rows as they meet the hidden states (`Head.rows()`, normalised in fp32), cut along the
    vocabulary and the model dimension as the weight is; they are cast to the dtype of `h_BTD` and gathered here.
    labels [B, T] are the next tokens, IGNORED where there is none. `chunk` is in tokens per device. Only the first
    result has a gradient. At equal largest logits, the max-z gradient is shared among them.
    """
    return _head_loss(h_BTD, rows_VD, labels_BT, z_loss_weight, chunk, rules_in_use())


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _head_loss(h_BTD, rows_VD, labels_BT, z_loss_weight, chunk, rules):
    return _run(h_BTD, rows_VD, labels_BT, z_loss_weight, chunk, rules, with_gradients=False)[0]


def _run(h_BTD, rows_VD, labels_BT, z_loss_weight, chunk, rules, with_gradients):
    local = functools.partial(_local_loss, z_loss_weight=z_loss_weight, chunk=chunk, with_gradients=with_gradients)
    with jax.named_scope("head_loss"), use_rules(rules):
        rows_VD = rows_VD.astype(h_BTD.dtype)
        if named_sharding() is None:
            return local(h_BTD, rows_VD, labels_BT)
        hidden, stored, scalar = spec("batch", "sequence", "hidden"), spec("vocab", "embed"), spec()
        sums = (scalar, LossSums(*[scalar] * len(LossSums._fields)))
        sums, gradients = jax.shard_map(
            functools.partial(local, on_mesh=True),
            in_specs=(hidden, stored, spec("batch", "sequence")),
            out_specs=(sums, (hidden, stored) if with_gradients else None),
        )(h_BTD, rows_VD, labels_BT)
        # The gradient of the whole head must be gone before the layers run backward: 2 GiB for 7B.
        return sums, jax.lax.optimization_barrier(gradients)


def _local_loss(h_BTD, rows_VD, labels_BT, *, z_loss_weight, chunk, with_gradients, on_mesh=False):
    """One device's rows of the batch against its part of the vocabulary: (sums, gradients or None)."""
    batch_axes = mesh_axes("batch", "sequence") if on_mesh else ()
    vocab_axes = mesh_axes("vocab") if on_mesh else ()
    exact = jnp.promote_types(h_BTD.dtype, jnp.float32)
    h_TD, labels_T = h_BTD.reshape(-1, h_BTD.shape[-1]), labels_BT.reshape(-1)
    num_tokens, D, V = h_TD.shape[0], h_TD.shape[1], rows_VD.shape[0]
    chunk = min(chunk, num_tokens)
    pad = -num_tokens % chunk
    h_CTD = jnp.pad(h_TD, ((0, pad), (0, 0))).reshape(-1, chunk, D)
    labels_CT = jnp.pad(labels_T, (0, pad), constant_values=IGNORED).reshape(-1, chunk)
    # [D, V], so that gather and scatter along D move whole blocks: along the last dimension they are copied first.
    vocab_pad = -V % VOCAB_MULTIPLE if V > VOCAB_MULTIPLE else 0
    rows_DV = jnp.pad(rows_VD.T, ((0, 0), (0, vocab_pad)))
    if on_mesh:
        rows_DV = all_gather(rows_DV, 0)
    ids_V = jnp.arange(V) + (jax.lax.axis_index(vocab_axes) * V if vocab_axes else 0)
    ids_V = jnp.pad(ids_V, (0, vocab_pad), constant_values=NO_TOKEN)

    def run_chunk(carry, inputs):
        sums, d_rows_DV, h_CTD = carry
        index, labels_T = inputs
        h_TD = jax.lax.dynamic_index_in_dim(h_CTD, index, keepdims=False)
        logits_TV = jnp.einsum("TD,DV->TV", h_TD, rows_DV, preferred_element_type=exact)
        if vocab_pad:
            logits_TV = jnp.where(ids_V == NO_TOKEN, -jnp.inf, logits_TV)
        max_T = _over(jax.lax.pmax, logits_TV.max(-1), vocab_axes)
        exp_TV = jnp.exp(logits_TV - max_T[:, None])
        # A comparison, not an index: indexing into a dimension that is cut would gather it.
        is_label_TV = ids_V == labels_T[:, None]
        is_max_TV = logits_TV == max_T[:, None]
        # Sums of one dtype are one pass over the logits.
        parts = jnp.stack(
            [x_TV.sum(-1) for x_TV in (exp_TV, jnp.where(is_label_TV, logits_TV, 0), is_max_TV.astype(exact))]
        )
        total_T, label_logit_T, ties_T = _over(jax.lax.psum, parts, vocab_axes)
        valid_T = (labels_T != IGNORED).astype(exact)
        cross_entropy_T = max_T + jnp.log(total_T) - label_logit_T
        columns = (cross_entropy_T, max_T**2, max_T, (label_logit_T == max_T).astype(exact), jnp.ones_like(max_T))
        largest = jnp.max(jnp.where(valid_T > 0, max_T, -jnp.inf))
        sums = sums.plus(LossSums(*(jnp.sum(c * valid_T) for c in columns), largest))
        if not with_gradients:
            return (sums, None, h_CTD), None
        d_logits_TV = exp_TV * (valid_T / total_T)[:, None] - jnp.where(is_label_TV, valid_T[:, None], 0)
        if z_loss_weight:
            d_logits_TV += jnp.where(is_max_TV, (2 * z_loss_weight * valid_T * max_T / ties_T)[:, None], 0)
        d_logits_TV = d_logits_TV.astype(h_TD.dtype)
        d_h_TD = jnp.einsum("TV,DV->TD", d_logits_TV, rows_DV, preferred_element_type=exact)
        d_rows_DV += jnp.einsum("TD,TV->DV", h_TD, d_logits_TV, preferred_element_type=exact)
        d_h_TD = _over(jax.lax.psum, d_h_TD, vocab_axes).astype(h_TD.dtype)
        # In the place of h, which nothing else needs: peak memory is in this loop.
        return (sums, d_rows_DV, jax.lax.dynamic_update_index_in_dim(h_CTD, d_h_TD, index, 0)), None

    zero = _varying(jnp.zeros((), exact), batch_axes)
    d_rows_DV = _varying(jnp.zeros(rows_DV.shape, exact), batch_axes + vocab_axes) if with_gradients else None
    start = LossSums(*[zero] * len(LossSums._fields))._replace(largest_logit=zero - jnp.inf), d_rows_DV, h_CTD
    (sums, d_rows_DV, d_h_CTD), _ = jax.lax.scan(run_chunk, start, (jnp.arange(h_CTD.shape[0]), labels_CT))
    largest = _over(jax.lax.pmax, sums.largest_logit, batch_axes)
    sums = _over(jax.lax.psum, sums._replace(largest_logit=zero), batch_axes)._replace(largest_logit=largest)
    loss = sums.cross_entropy + z_loss_weight * sums.max_z
    if not with_gradients:
        return (loss, sums), None
    d_h_BTD = d_h_CTD.reshape(-1, D)[:num_tokens].reshape(h_BTD.shape)
    if on_mesh:
        # Reduced once, in fp32, straight into the layout in which the weight is stored.
        d_rows_DV = reduce_scatter(d_rows_DV, 0)
        d_rows_DV = with_layout_constraint(d_rows_DV, Layout(major_to_minor=(0, 1)))
        # libtpu fails on shards of less than a tile where it moves the cut below into the scatter.
        d_rows_DV = jax.lax.optimization_barrier(d_rows_DV)
    return (loss, sums), (d_h_BTD, d_rows_DV[:, :V].T)


def _over(collective, x, axes):
    return collective(x, axes) if axes else x


def _varying(x: Array, axes: tuple[str, ...]) -> Array:
    """`x` typed as differing along `axes`, as what is added to it in a loop differs."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _forward(h_BTD, rows_VD, labels_BT, z_loss_weight, chunk, rules):
    return _run(h_BTD, rows_VD, labels_BT, z_loss_weight, chunk, rules, with_gradients=True)


def _backward(z_loss_weight, chunk, rules, gradients, cotangents):
    d_loss = cotangents[0]
    d_h_BTD, d_rows_VD = gradients
    return (d_h_BTD * d_loss.astype(d_h_BTD.dtype)), d_rows_VD * d_loss, None


_head_loss.defvjp(_forward, _backward)
