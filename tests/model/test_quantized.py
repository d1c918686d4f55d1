"""Weights in few bits against numpy: their values, what they are multiplied with, and that no mesh changes them."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.model.equations import EQUATIONS, WEIGHT_AXES, move_model_axis_behind, split_equation
from bc2_jax.model.layers import linear
from bc2_jax.model.quantized import FEW_TOKENS, GROUP, PARTS, Groups, Quantized, quantize_linear, quantize_rows
from bc2_jax.sharding import reshard

SIZES = {"D": 256, "N": 4, "H": 64, "F": 272}
"""F in two parts of 136, so two groups for each, the second of 8 inputs and 120 zeros."""
NAMES = ("q_proj", "o_proj", "gate_proj", "down_proj")


def used_by(stored: str) -> str:
    return move_model_axis_behind(stored) if "D" in split_equation(stored)[0] else stored


def draw(name: str, layers: int = 2) -> np.ndarray:
    """Gaussian weights [L, ...]; those of the first output are zero."""
    shape = [SIZES[letter] for letter in split_equation(EQUATIONS[name])[1]]
    rng = np.random.default_rng(NAMES.index(name))
    w = rng.standard_normal((layers, *shape)).astype(np.float32)
    w[(..., 0, 0) if name == "q_proj" else (..., 0)] = 0
    return w


@functools.cache
def quantized(name: str, scheme: str) -> Quantized:
    stored = EQUATIONS[name]
    return quantize_linear(jnp.asarray(draw(name)), stored, used_by(stored), scheme)


def as_matrix(w: np.ndarray, name: str) -> np.ndarray:
    """[L, outputs, inputs] of a weight in its stored order."""
    x, letters, _ = split_equation(EQUATIONS[name])
    into, out = ([i + 1 for i, c in enumerate(letters) if (c in x) == is_input] for is_input in (True, False))
    size = math.prod(w.shape[i] for i in into)
    return w.transpose(0, *out, *into).reshape(len(w), -1, size)


def dequantized(value: Quantized, name: str) -> np.ndarray:
    """[L, outputs, inputs] that a quantized weight stands for, in numpy from its documented layout."""
    q, scale = np.asarray(value.q).astype(np.float32), np.asarray(value.scale)
    L, inputs = len(q), as_matrix(draw(name), name).shape[2]
    if value.groups is None:
        x, letters, _ = split_equation(used_by(EQUATIONS[name]))
        into, out = ([i + 1 for i, c in enumerate(letters) if (c in x) == is_input] for is_input in (True, False))
        return q.transpose(0, *out, *into).reshape(L, -1, inputs) * scale.reshape(L, -1, 1)
    G, K = q.shape[1], q.shape[-1]
    w = (q * scale[..., None]).reshape(L, G, -1, K)  # groups, outputs, inputs of a group
    parts = w.reshape(L, value.groups.parts, -1, *w.shape[2:])
    rows = parts.transpose(0, 3, 1, 2, 4).reshape(L, w.shape[2], value.groups.parts, -1)
    return rows[..., : inputs // value.groups.parts].reshape(L, -1, inputs)


def error(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.sqrt(((found - exact) ** 2).sum() / (exact**2).sum()))


@pytest.mark.parametrize("name", NAMES)
def test_int8_is_the_nearest_of_255_steps(name):
    value, w = quantized(name, "int8"), as_matrix(draw(name), name)
    largest = np.abs(w).max(axis=2, keepdims=True)
    assert value.q.dtype == jnp.int8 and value.scale.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(value.scale).reshape(largest.shape)[:, 1:], largest[:, 1:] / 127, rtol=1e-6)
    found = dequantized(value, name)
    assert np.all(np.abs(found - w) <= largest / 127 / 2 * (1 + 1e-4))
    assert not found[:, 0].any()
    assert 0.004 < error(found, w) < 0.009


@pytest.mark.parametrize("name", NAMES)
def test_int4_has_a_scale_for_each_group(name):
    """With 7 steps for the largest of 128 Gaussian values the error would be 11.7 %."""
    value, w = quantized(name, "int4"), as_matrix(draw(name), name)
    groups = value.groups
    assert value.q.dtype == jnp.int4
    assert value.q.shape == (2, groups.parts * groups.each, *value.scale.shape[2:], groups.size)
    found = dequantized(value, name)
    assert not found[:, 0].any()
    assert 0.09 < error(found, w) < 0.105


def test_int4_uses_the_whole_range_in_either_direction():
    """The value of a group that is furthest from zero is -8 steps away."""
    w = np.zeros((1, 256, 2), np.float32)
    w[0, :, 0], w[0, :, 1] = 4.0, -2.0
    value = quantize_linear(jnp.asarray(w), "BTD,DF->BTF", "BTD,FD->BTF", "int4")
    assert np.unique(np.asarray(value.q).astype(int)).tolist() == [-8]
    np.testing.assert_array_equal(value.scale, np.broadcast_to(np.float32([-0.5, 0.25]), (1, 2, 2)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("name", NAMES)
def test_a_matmul_is_that_of_the_weights_it_stands_for(name, scheme, dtype):
    value = quantized(name, scheme)
    equation = used_by(EQUATIONS[name])
    layer = jax.tree.map(lambda x: x[1], value)
    w = dequantized(value, name)[1]
    letters = split_equation(equation)[0]
    for tokens in (3, FEW_TOKENS + 1):
        x = np.random.default_rng(5).standard_normal((1, tokens, *[SIZES[c] for c in letters[2:]])).astype(dtype)
        exact = x.reshape(1, tokens, -1).astype(np.float64) @ w.T
        found = linear(equation, jnp.asarray(x), layer)
        assert found.dtype == dtype
        assert error(np.asarray(found, np.float64).reshape(exact.shape), exact) < (3e-6 if dtype == "float32" else 4e-3)


@pytest.mark.parametrize("shape", [(1, 2, 2), (1, 4, 2), (2, 1, 4)])
@pytest.mark.parametrize("name", NAMES)
def test_no_mesh_changes_the_values(mesh_of, name, shape):
    stored, w = EQUATIONS[name], draw(name)
    equation, letters = used_by(stored), split_equation(stored)[1]
    x_axes = {"B": "batch", "T": "sequence", "D": "hidden", "N": "heads", "H": "head_dim", "F": "ffn"}
    x_letters = split_equation(equation)[0]
    x = np.random.default_rng(6).standard_normal((8, 2, *[SIZES[c] for c in x_letters[2:]])).astype(np.float32)
    multiply = jax.jit(linear, static_argnums=0)
    exact = {
        scheme: linear(equation, jnp.asarray(x), jax.tree.map(lambda a: a[0], quantized(name, scheme)))
        for scheme in ("int8", "int4")
    }
    with jax.set_mesh(mesh_of(*shape)):
        on_mesh = reshard(jnp.asarray(w), "layers", *(WEIGHT_AXES[c] for c in letters))
        cut = reshard(jnp.asarray(x), *(x_axes[c] for c in x_letters))
        for scheme in ("int8", "int4"):
            whole, found = quantized(name, scheme), quantize_linear(on_mesh, stored, equation, scheme)
            if found.groups != whole.groups:  # two parts cannot be cut for four devices
                assert shape[2] == 4 and name in ("o_proj", "down_proj") and found.groups is None
                continue
            np.testing.assert_array_equal(found.scale, whole.scale)
            np.testing.assert_array_equal(np.asarray(found.q).astype(int), np.asarray(whole.q).astype(int))
            cut_as_weight = math.prod(found.q.sharding.shard_shape(found.q.shape)) * 4 <= found.q.size
            # Two groups of the model dimension cannot be cut for four devices, and stay whole.
            assert cut_as_weight or (found.groups and shape[1] == 4 and "D" in split_equation(equation)[0])
            y = multiply(equation, cut, jax.tree.map(lambda a: a[0], found))
            np.testing.assert_allclose(y, exact[scheme], rtol=0, atol=2e-4)


@given(st.integers(1, 20000), st.integers(1, 6))
def test_groups_cover_the_inputs_and_do_not_cross_parts(first, rest):
    inputs = first * rest
    groups = Groups.of(inputs, first)
    assert groups.parts in (1, 2, 4, PARTS) and first % groups.parts == 0
    part = inputs // groups.parts
    assert (groups.each - 1) * groups.size < part <= groups.each * groups.size
    assert groups.size == GROUP or (groups.parts == 1 and groups.size == inputs < GROUP)


@pytest.mark.parametrize(
    ("inputs", "first", "expected"),
    [
        (4096, 4096, (8, 4, 128)), (11008, 11008, (8, 11, 128)), (4096, 32, (8, 4, 128)),  # 7B
        (5120, 5120, (8, 5, 128)), (13696, 13696, (8, 14, 128)), (5120, 40, (8, 5, 128)),  # 13B
        (48, 48, (1, 1, 48)), (136, 136, (1, 2, 128)), (384, 3, (1, 3, 128)),
    ],
)  # fmt: skip
def test_groups_of_the_released_sizes(inputs, first, expected):
    assert Groups.of(inputs, first) == expected


def test_rows_of_a_head():
    w = np.random.default_rng(7).standard_normal((50, 64)).astype(np.float32)
    w[3] = 0
    value = quantize_rows(jnp.asarray(w))
    found = np.asarray(value.q, np.float32) * np.asarray(value.scale)[:, None]
    assert np.all(np.abs(found - w) <= np.abs(w).max(1, keepdims=True) / 127 / 2 * (1 + 1e-4))
    h = np.random.default_rng(8).standard_normal((2, 3, 64)).astype(np.float32)
    logits = value.multiply("BTD,VD->BTV", jnp.asarray(h))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, h @ found.T, rtol=0, atol=1e-4)


def test_it_is_read_as_a_whole():
    value = quantize_rows(jnp.ones((4, 4)))
    assert value[...] is value
    with pytest.raises(TypeError, match=r"read by \[...\], not by \[0\]"):
        value[0]
