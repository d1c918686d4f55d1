from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from bc2_jax.model.position import alibi_slopes, apply_rope, make_rope, stretch_rope, stretch_slopes


def test_alibi_slopes_of_the_13b():
    """2^(-(h + 1) / 4) for the first 32 heads, then 2^(-(2k + 1) / 8)."""
    expected = [2 ** (-(h + 1) / 4) for h in range(32)] + [2 ** (-(2 * k + 1) / 8) for k in range(8)]
    np.testing.assert_allclose(alibi_slopes(40), expected, rtol=1e-7)
    assert alibi_slopes(40).dtype == np.float32


@pytest.mark.parametrize(
    ("heads", "exponents"),
    [(1, [8]), (4, [2, 4, 6, 8]), (6, [2, 4, 6, 8, 1, 3]), (8, range(1, 9)), (12, [*range(1, 9), 0.5, 1.5, 2.5, 3.5])],
)
def test_alibi_slopes(heads: int, exponents):
    np.testing.assert_allclose(alibi_slopes(heads), [2.0**-e for e in exponents], rtol=1e-7)


def rotate(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """fp64: (x_i, x_(i + H/2)) is a complex number, turned by position * theta^(-2i / H)."""
    half = x.shape[-1] // 2
    angles = positions[..., None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, :, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


POSITIONS = np.array([[0, 1, 2, 255, 257, 1000, 2047, 4094, 4095], [5, 4, 3, 2, 1, 0, 0, 7, 3000]])


@pytest.mark.parametrize(("head_dim", "theta"), [(128, 10_000.0), (6, 500.0)])
def test_rope_is_a_rotation_of_complex_numbers(head_dim: int, theta: float):
    x = np.random.default_rng(0).standard_normal((2, 9, 3, head_dim))
    result = apply_rope(jnp.asarray(x, jnp.float32), make_rope(jnp.asarray(POSITIONS), head_dim, theta))
    assert result.dtype == jnp.float32
    # An fp32 angle near 4095 is off by up to 2^-12 / 2 and by the rounding of its frequency, about as much again.
    np.testing.assert_allclose(result, rotate(x, POSITIONS, theta), atol=1.5e-3)
    near = POSITIONS < 8
    np.testing.assert_allclose(np.asarray(result)[near], rotate(x, POSITIONS, theta)[near], atol=5e-6)


def test_rope_in_bf16_is_rounded_once():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 3, 128)), jnp.bfloat16)
    rope = make_rope(jnp.asarray(POSITIONS), 128, 10_000.0)
    assert rope[0].dtype == rope[1].dtype == jnp.float32
    result = apply_rope(x, rope)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result, apply_rope(x.astype(jnp.float32), rope).astype(jnp.bfloat16))


def test_rope_sees_only_distances():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def product(i: int, j: int) -> float:
        at = lambda x, p: apply_rope(x, make_rope(jnp.full((1, 1), p), 16, 10_000.0))  # noqa: E731
        return float(jnp.sum(at(q, i) * at(k, j)))

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert product(7, 3) != pytest.approx(product(3, 7), abs=1e-2)


def test_stretched_slopes():
    """The published form of eight heads, m_h / a^((h - 1) / (N - 1)); of 40 heads the order of steepness counts."""
    stretch = jnp.array([1.0, 4.0])
    expected = [2.0**-h / 4 ** ((h - 1) / 7) for h in range(1, 9)]
    found = np.asarray(stretch_slopes(alibi_slopes(8), stretch))
    np.testing.assert_array_equal(found[0], alibi_slopes(8))
    np.testing.assert_allclose(found[1], expected, rtol=1e-6)
    slopes = alibi_slopes(40)
    order = np.argsort(-slopes)
    ratio = (slopes / np.asarray(stretch_slopes(slopes, stretch))[1])[order]
    np.testing.assert_allclose(ratio, 4 ** (np.arange(40) / 39), rtol=1e-5)


@pytest.mark.parametrize("method", ["ntk", "yarn"])
def test_stretched_rope(method: str):
    """A row that is not stretched is what it was, bit for bit; of one that is, angles and length in fp64."""
    H, theta, trained, factor = 16, 10_000.0, 4096, 4.0
    positions = jnp.asarray(POSITIONS)
    plain = make_rope(positions, H, theta)
    found = stretch_rope(positions, H, theta, trained, jnp.array([1.0, factor]), method)
    for x, y in zip(plain, found, strict=True):
        np.testing.assert_array_equal(x[0], y[0])
    frequencies, length = (theta * factor ** (H / (H - 2))) ** -(np.arange(0, H, 2) / H), 1.0
    if method == "yarn":
        frequencies, length = theta ** -(np.arange(0, H, 2) / H), 0.1 * np.log(factor) + 1
        for i, f in enumerate(frequencies):
            turns = trained * f / (2 * np.pi)  # in the trained length: under 1 is interpolated, over 32 is kept
            keep = min(max((turns - 1) / 31, 0), 1)
            frequencies[i] = keep * f + (1 - keep) * f / factor
    angles = POSITIONS[1][:, None] * frequencies
    np.testing.assert_allclose(found[0][1, :, 0, : H // 2], length * np.cos(angles), atol=3e-3)
    np.testing.assert_allclose(found[1][1, :, 0, H // 2 :], length * np.sin(angles), atol=3e-3)
