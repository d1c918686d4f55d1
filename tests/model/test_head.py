"""NormHead: logits = h @ normalize(W).T; the gradient flows through the normalisation, the weight stays as it is."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bc2_jax.config import ModelConfig
from bc2_jax.model.head import Head, normalize_rows

CONFIG = ModelConfig(
    hidden_size=6, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=10,
    position_embedding="alibi",
)  # fmt: skip


def make_head(weight: np.ndarray | None = None, **changes) -> Head:
    head = Head(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))
    if weight is not None:
        head.weight[...] = jnp.asarray(weight)
    return head


def uneven_rows(dtype=np.float32) -> np.ndarray:
    """Row norms from 1e-3 to 1e3: a head that is not normalised shows at once."""
    rng = np.random.default_rng(0)
    return (rng.standard_normal((10, 6)) * np.logspace(-3, 3, 10)[:, None]).astype(dtype)


H = np.random.default_rng(1).standard_normal((2, 3, 6)).astype(np.float32)


def test_rows_have_unit_norm_and_the_weight_is_untouched():
    head = make_head(uneven_rows())
    first, second = head(jnp.asarray(H)), head(jnp.asarray(H))
    w = uneven_rows(np.float64)
    np.testing.assert_allclose(first, H @ (w / np.linalg.norm(w, axis=1, keepdims=True)).T, atol=1e-5)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(head.weight[...], uneven_rows())
    assert first.dtype == jnp.float32


def test_logits_do_not_depend_on_the_scale_of_rows():
    scaled = uneven_rows() * np.linspace(0.5, 20, 10, dtype=np.float32)[:, None]
    np.testing.assert_allclose(make_head(scaled)(H), make_head(uneven_rows())(H), atol=1e-5)


def test_normalizing_twice_changes_nothing():
    """Files whose head was already normalised (for other engines) give the same logits."""
    once = normalize_rows(jnp.asarray(uneven_rows()))
    np.testing.assert_allclose(normalize_rows(once), once, atol=2e-7)


def test_without_norm_head():
    np.testing.assert_allclose(
        make_head(uneven_rows(), normalize_head=False)(H), H @ uneven_rows().T, rtol=1e-5, atol=1e-4
    )


def test_logits_of_bf16_are_fp32():
    """Normalised in fp32 from the master weight, cast once; the sum over D is not rounded to bf16."""
    h = jnp.asarray(H, jnp.bfloat16)
    logits = make_head(uneven_rows())(h)
    rows = np.asarray(normalize_rows(jnp.asarray(uneven_rows())).astype(jnp.bfloat16), np.float64)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, np.asarray(h, np.float64) @ rows.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_norms_of_low_precision_weights_are_fp32(dtype):
    w = jnp.asarray(np.full((2, 6), 300.0), dtype)  # the sum of squares overflows fp16
    rows = normalize_rows(w)
    assert rows.dtype == jnp.float32
    np.testing.assert_allclose(rows, np.full((2, 6), 6**-0.5), rtol=1e-6)


def test_a_zero_row_gives_zero_logits_and_a_finite_gradient():
    """A grown vocabulary."""
    w = uneven_rows()
    w[4] = 0
    logits = make_head(w)(H)
    assert np.isfinite(logits).all() and not logits[..., 4].any()
    gradient = np.asarray(jax.grad(lambda w: jnp.sum(jnp.sin(H @ normalize_rows(w).T)))(jnp.asarray(w)))
    assert np.isfinite(gradient).all() and not gradient[4].any() and gradient[3].any()


def test_gradient_against_finite_differences_in_fp64():
    with jax.enable_x64(True):
        w = jnp.asarray(np.random.default_rng(0).standard_normal((5, 4)) * np.logspace(-1, 1, 5)[:, None])
        target = jnp.asarray(np.random.default_rng(1).standard_normal((5, 4)))
        f = lambda w: jnp.sum(jnp.sin(normalize_rows(w)) * target)  # noqa: E731
        assert w.dtype == normalize_rows(w).dtype == jnp.float64
        gradient, step = np.asarray(jax.grad(f)(w)), 1e-6
        numeric = np.zeros_like(gradient)
        for index in np.ndindex(w.shape):
            numeric[index] = (f(w.at[index].add(step)) - f(w.at[index].add(-step))) / (2 * step)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-9)
    # No gradient along a row: its length has no effect.
    np.testing.assert_allclose((gradient * np.asarray(w)).sum(1), 0, atol=1e-12)
