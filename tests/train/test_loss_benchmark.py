"""benchmarks/loss.py: the losses it compares are one function."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from bc2_jax.data.batch import IGNORED
from bc2_jax.sharding import DEFAULT_RULES
from bc2_jax.train.loss import head_loss
from benchmarks.loss import naive_loss, tiled_loss


@pytest.mark.parametrize("loss", [naive_loss, tiled_loss])
@pytest.mark.parametrize("shape", [None, (2, 2, 2), (1, 2, 1, 4)], ids=str)
def test_the_other_losses_agree_with_ours(loss: Callable, shape: tuple[int, ...] | None, mesh_of):
    rng = np.random.default_rng(0)
    h, rows = rng.standard_normal((8, 16, 16), np.float32), rng.standard_normal((24, 16), np.float32)
    labels = np.where(rng.random((8, 16)) < 0.3, IGNORED, rng.integers(0, 24, (8, 16))).astype(np.int32)
    rows[20] = rows[3]
    h[0, 0], labels[0, 0] = 5 * rows[3], 3  # two rows tie for the largest logit

    def loss_and_gradients(function, h, rows, labels):
        value = lambda h, rows: function(h, rows, labels, 0.1, 10)  # noqa: E731
        return jax.value_and_grad(value, (0, 1), has_aux=True)(h, rows)

    mesh = mesh_of(*shape) if shape else None
    if mesh is not None:
        axes = ("batch", "sequence", "hidden"), ("vocab", "embed"), ("batch", "sequence")
        h, rows, labels = (
            jax.device_put(x, NamedSharding(mesh, DEFAULT_RULES.spec(*a)))
            for x, a in zip((h, rows, labels), axes, strict=True)
        )
    with jax.set_mesh(mesh) if mesh is not None else jax.default_matmul_precision("highest"):
        run = jax.jit(loss_and_gradients, static_argnums=0)
        expected, found = (run(f, *map(jnp.asarray, (h, rows, labels))) for f in (head_loss, loss))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1, np.abs(b).max()))
