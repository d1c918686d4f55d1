"""The head on chunks of tokens: shared by `train/loss.py` and `model/log_probs.py`.

On a mesh this runs inside `shard_map`: a device has its own tokens and its shard of the vocabulary. The head is
gathered once for all chunks and its gradient reduced once, so communication does not grow with the number of chunks.
If there is one chunk, both may go by pieces of the vocabulary, so that a TPU moves one beside the matmul of another.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from bc2_jax.kernels.transposed import multiply_transposed
from bc2_jax.sharding import all_gather, mesh_axes, reduce_scatter

VOCAB_MULTIPLE = 1024
"""A vocabulary shard is padded to a multiple of this: libtpu scatters only tensors that it can cut into small pieces;
it would reduce 125,696 = 2^8 x 491 rows whole, with twice the traffic."""
NO_TOKEN = jnp.iinfo(jnp.int32).max
"""Id of padding columns."""


class Statistics(NamedTuple):
    """Of the logits of a chunk of tokens, [T] over the whole vocabulary."""

    max_T: Array
    total_T: Array
    """Sum of exp(logit - max)."""
    label_logit_T: Array
    """0 if the label is not a token."""
    ties_T: Array
    """Number of logits equal to the largest."""


class Columns(NamedTuple):
    """[T, V] for the columns of one `HeadPart`."""

    exp_TV: Array
    """exp(logit - max)."""
    is_label_TV: Array
    is_max_TV: Array


@dataclasses.dataclass(frozen=True)
class HeadPart:
    """A device's shard of the vocabulary, or a piece of it, with the whole model dimension."""

    rows_DV: Array
    """In the dtype of the hidden states, padded with zeros."""
    ids_V: Array
    """Token of each column, NO_TOKEN for padding."""
    num_rows: int
    """Columns that are not padding."""
    on_mesh: bool
    """Whether this is inside `shard_map`."""

    @classmethod
    def gather(cls, rows_VD: Array, on_mesh: bool) -> HeadPart:
        """From the shard `rows_VD` [V, D / shards] that this device stores, in the dtype of the hidden states."""
        return cls.gather_pieces(rows_VD, on_mesh, 1)[0]

    @classmethod
    def gather_pieces(cls, rows_VD: Array, on_mesh: bool, count: int) -> list[HeadPart]:
        """As `gather`, in `count` pieces of the vocabulary (fewer if it is small), each gathered by itself."""
        V = rows_VD.shape[0]
        # [D, V], so that gather and scatter along D move whole blocks; along the last dimension they would copy first.
        vocab_pad = -V % VOCAB_MULTIPLE if V > VOCAB_MULTIPLE else 0
        rows_DV = jnp.pad(rows_VD.T, ((0, 0), (0, vocab_pad)))
        vocab_axes = mesh_axes("vocab") if on_mesh else ()
        ids_V = jnp.arange(V) + (jax.lax.axis_index(vocab_axes) * V if vocab_axes else 0)
        ids_V = jnp.pad(ids_V, (0, vocab_pad), constant_values=NO_TOKEN)
        blocks = max((V + vocab_pad) // VOCAB_MULTIPLE, 1)
        count = min(count, blocks)
        ends = [blocks * i // count * VOCAB_MULTIPLE for i in range(1, count)] + [V + vocab_pad]
        pieces = []
        for start, end in zip([0, *ends], ends, strict=False):
            piece_DV = rows_DV[:, start:end]
            piece_DV = all_gather(piece_DV, 0) if on_mesh else piece_DV
            pieces.append(cls(piece_DV, ids_V[start:end], min(end, V) - start, on_mesh))
        return pieces

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """Mesh axes that shard the tokens."""
        return mesh_axes("batch", "sequence") if self.on_mesh else ()

    @property
    def vocab_axes(self) -> tuple[str, ...]:
        """Mesh axes that shard the vocabulary."""
        return mesh_axes("vocab") if self.on_mesh else ()

    @property
    def exact(self) -> jnp.dtype:
        """Dtype of logits, statistics and sums: fp32, or fp64 for fp64 hidden states."""
        return jnp.promote_types(self.rows_DV.dtype, jnp.float32)

    def logits(self, h_TD: Array) -> Array:
        """[T, V]; -inf for padding."""
        logits_TV = jnp.einsum("TD,DV->TV", h_TD, self.rows_DV, preferred_element_type=self.exact)
        if self.num_rows < self.ids_V.shape[0]:
            logits_TV = jnp.where(self.ids_V == NO_TOKEN, -jnp.inf, logits_TV)
        return logits_TV

    def largest(self, *logits: Array) -> Array:
        """[T] over the whole vocabulary, from the logits [T, V] of all pieces of this device's shard."""
        return over(jax.lax.pmax, functools.reduce(jnp.maximum, [x_TV.max(-1) for x_TV in logits]), self.vocab_axes)

    def is_label(self, labels_T: Array) -> Array:
        """[T, V] bool. A comparison, since indexing into a sharded dimension would gather it."""
        return self.ids_V == labels_T[:, None]

    def zero_gradient(self) -> Array:
        """Zeros [D, V], the start for `add_gradients`."""
        return varying(jnp.zeros(self.rows_DV.shape, self.exact), self.batch_axes + self.vocab_axes)

    def stored_gradient(self, d_rows_DV: Array) -> Array:
        """[V, D]: the sum of `d_rows_DV` over all tokens, sharded like the stored weight."""
        if self.on_mesh:
            # Reduced once, in fp32, directly into the layout of the stored weight.
            d_rows_DV = reduce_scatter(d_rows_DV, "embed", None)
            d_rows_DV = with_layout_constraint(d_rows_DV, Layout(major_to_minor=(0, 1)))
            # libtpu fails on shards smaller than a tile if it moves the slice below into the scatter.
            d_rows_DV = jax.lax.optimization_barrier(d_rows_DV)
        return d_rows_DV[:, : self.num_rows].T


def statistics(parts: list[HeadPart], logits: list[Array], labels_T: Array) -> tuple[Statistics, list[Columns]]:
    """Of a chunk of tokens with labels int32 [T]. `logits` [T, V] are those of each of `parts`, which together are this
    device's shard of the vocabulary."""
    head = parts[0]
    max_T = head.largest(*logits)
    columns = [
        Columns(jnp.exp(x_TV - max_T[:, None]), part.is_label(labels_T), x_TV == max_T[:, None])
        for part, x_TV in zip(parts, logits, strict=True)
    ]
    # Sums of one dtype take a single pass over the logits.
    sums = [
        jnp.stack(
            [x_TV.sum(-1) for x_TV in (c.exp_TV, jnp.where(c.is_label_TV, l_TV, 0), c.is_max_TV.astype(head.exact))]
        )
        for c, l_TV in zip(columns, logits, strict=True)
    ]
    return Statistics(max_T, *over(jax.lax.psum, functools.reduce(jnp.add, sums), head.vocab_axes)), columns


def add_gradients(
    parts: list[HeadPart], h_TD: Array, d_logits: list[Array], d_rows: list[Array] | None
) -> tuple[Array, list[Array] | None]:
    """The gradient of `h_TD`, and each of `d_rows` [D, V] plus the gradient of its part's `rows_DV` from this device's
    tokens (None stays None). `d_logits` [T, V] are those of each of `parts`, as in `statistics`."""
    head = parts[0]
    d_logits = [x_TV.astype(h_TD.dtype) for x_TV in d_logits]
    if d_rows is not None:
        d_rows = [
            d_rows_DV + multiply_transposed("TD,TV->DV", h_TD, x_TV, head.exact)
            for d_rows_DV, x_TV in zip(d_rows, d_logits, strict=True)
        ]
    d_h = [
        jnp.einsum("TV,DV->TD", x_TV, part.rows_DV, preferred_element_type=head.exact)
        for part, x_TV in zip(parts, d_logits, strict=True)
    ]
    return over(jax.lax.psum, functools.reduce(jnp.add, d_h), head.vocab_axes).astype(h_TD.dtype), d_rows


def cut_tokens(x_BT: Array, chunk: int, fill: int = 0) -> Array:
    """[B, T, ...] -> [C, chunk, ...], the last chunk padded with `fill`; a single smaller chunk for fewer tokens."""
    x_T = x_BT.reshape(-1, *x_BT.shape[2:])
    chunk = min(chunk, x_T.shape[0])
    widths = ((0, -x_T.shape[0] % chunk), *[(0, 0)] * (x_T.ndim - 1))
    return jnp.pad(x_T, widths, constant_values=fill).reshape(-1, chunk, *x_T.shape[1:])


def join_tokens(x_CT: Array, batch: int, length: int) -> Array:
    """The inverse of `cut_tokens`: [B, T, ...]."""
    rest = x_CT.shape[2:]
    return x_CT.reshape(-1, *rest)[: batch * length].reshape(batch, length, *rest)


def over(collective: Callable[[Any, tuple[str, ...]], Any], x: Any, axes: tuple[str, ...]) -> Any:
    """`collective(x, axes)`, or `x` if there are no axes."""
    return collective(x, axes) if axes else x


def varying(x: Array, axes: tuple[str, ...]) -> Array:
    """`x` typed as varying over mesh `axes`, like the values added to it in a loop."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x
