"""The two implementations of attention against each other and against plain numpy in fp64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.kernels.attention import Tokens, chunked_attention, reference_attention
from bc2_jax.model.position import alibi_slopes

Arrays = tuple[np.ndarray, ...]


def numpy_attention(q, k, v, tokens: Tokens, slopes, d_out) -> tuple[np.ndarray, Arrays]:
    """fp64: the result, and the gradients of q, k and v for the cotangent d_out."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    positions, segments = (np.asarray(x) for x in tokens)
    scale, T = q.shape[-1] ** -0.5, q.shape[1]
    s = np.einsum("btnh,bsnh->bnts", q, k) * scale
    if slopes is not None:
        s += np.asarray(slopes, np.float64)[:, None, None] * (positions[:, None, None] - positions[:, None, :, None])
    own, trunk = segments[:, :, None], segments[:, :, None] % 2**24
    seen = (segments[:, None] == own) | (segments[:, None] == trunk)
    seen &= (segments[:, None] != 0) & np.tri(T, dtype=bool)
    s = np.where(seen[:, None], s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True, initial=-1e9))
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
    dp = np.einsum("btnh,bsnh->bnts", d_out, v)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
    gradients = (
        np.einsum("bnts,bsnh->btnh", ds, k),
        np.einsum("bnts,btnh->bsnh", ds, q),
        np.einsum("bnts,btnh->bsnh", p, d_out),
    )
    return np.einsum("bnts,bsnh->btnh", p, v), gradients


def attend(implementation: str, q, k, v, tokens: Tokens, slopes, block: int):
    if implementation == "chunked":
        return chunked_attention(q, k, v, tokens, slopes, block=block)
    return reference_attention(q, k, v, tokens, slopes)


def with_gradients(implementation: str, q, k, v, tokens, slopes, d_out, block: int) -> tuple[np.ndarray, Arrays]:
    @jax.jit
    def run(q, k, v, tokens, d_out):
        out, pull = jax.vjp(lambda *qkv: attend(implementation, *qkv, tokens, slopes, block), q, k, v)
        return out, pull(d_out.astype(out.dtype))

    return jax.tree.map(lambda x: np.asarray(x, np.float64), run(q, k, v, tokens, d_out))


def random_inputs(shape: tuple[int, int, int, int], seed: int = 0, dtype=jnp.float32) -> list[jax.Array]:
    """q, k, v and a cotangent."""
    return [jnp.asarray(x, dtype) for x in np.random.default_rng(seed).uniform(-1.5, 1.5, (4, *shape))]


def make_tokens(B: int, T: int, kind: str, seed: int = 0) -> Tokens:
    rng = np.random.default_rng(seed)
    segments = np.ones((B, T), np.int32)
    if kind == "packed":  # documents, then padding
        segments = np.sort(rng.integers(1, 5, (B, T)), axis=1)
        segments[:, T - rng.integers(0, T) :] = 0
    elif kind == "branches":
        return Tokens(*(jnp.asarray(x, jnp.int32) for x in make_branches(B, T, rng)))
    elif kind == "left":
        segments = np.where(np.arange(T) < rng.integers(0, T + 1, (B, 1)), 0, 1)
    elif kind == "right":
        segments = np.where(np.arange(T) < rng.integers(0, T + 1, (B, 1)), 1, 0)
    elif kind == "interleaved":  # only equality counts, not neighbourhood
        segments = rng.integers(0, 3, (B, T))
    starts = np.concatenate([np.ones((B, 1), bool), segments[:, 1:] != segments[:, :-1]], 1)
    index = np.arange(T)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    if kind == "interleaved":
        positions = np.broadcast_to(index, (B, T))
    return Tokens(jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32))


def make_branches(B: int, T: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments [B, T] of documents with up to three branches, then padding."""
    positions, segments = np.zeros((2, B, T), np.int32)
    for row in range(B):
        start, document, end = 0, 0, rng.integers(0, T + 1)
        while start < end:
            document, trunk = document + 1, rng.integers(0, 9)
            for branch in range(rng.integers(1, 5)):
                size = rng.integers(1, 9) if branch else trunk
                part = slice(start, min(start + size, end))
                segments[row, part] = document + (branch << 24)
                positions[row, part] = np.arange(part.stop - part.start) + (trunk if branch else 0)
                start = part.stop
    return positions, segments


def largest_difference(a, b) -> float:
    return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


KINDS = ("full", "packed", "left", "right", "interleaved", "branches")


@settings(max_examples=16)
@given(
    B=st.integers(1, 2), T=st.integers(1, 40), N=st.sampled_from([1, 3, 4]), H=st.sampled_from([2, 8]),
    block=st.integers(1, 48), kind=st.sampled_from(KINDS), alibi=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_in_fp32(B: int, T: int, N: int, H: int, block: int, kind: str, alibi: bool, seed: int):
    q, k, v, d_out = random_inputs((B, T, N, H), seed)
    tokens, slopes = make_tokens(B, T, kind, seed), alibi_slopes(N) if alibi else None
    expected = numpy_attention(q, k, v, tokens, slopes, d_out)
    for implementation in ("reference", "chunked"):
        result = with_gradients(implementation, q, k, v, tokens, slopes, d_out, block)
        assert largest_difference(result, expected) < 1e-5, implementation


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("kind", ["full", "packed"])
def test_bf16(implementation: str, kind: str):
    q, k, v, d_out = random_inputs((2, 50, 4, 16), dtype=jnp.bfloat16)
    tokens, slopes = make_tokens(2, 50, kind), alibi_slopes(4)
    out, gradients = with_gradients(implementation, q, k, v, tokens, slopes, d_out, 16)
    expected, expected_gradients = numpy_attention(q, k, v, tokens, slopes, d_out)
    assert largest_difference(out, expected) < 1e-2
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert np.abs(gradient - wanted).max() < 2e-2 * np.abs(wanted).max()


@pytest.mark.parametrize(("T", "block"), [(33, 8), (33, 33), (33, 100), (32, 8), (1, 8), (9, 8)])
def test_length_and_block_in_any_relation(T: int, block: int):
    q, k, v, d_out = random_inputs((1, T, 2, 4))
    tokens = make_tokens(1, T, "full")
    result = with_gradients("chunked", q, k, v, tokens, None, d_out, block)
    assert largest_difference(result, numpy_attention(q, k, v, tokens, None, d_out)) < 1e-5


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["small", "huge-scores"])
def test_padding_gives_zeros_and_finite_gradients(implementation: str, scale: float):
    q, k, v, d_out = random_inputs((3, 12, 2, 4))
    segments = np.ones((3, 12), np.int32)
    segments[0] = 0
    segments[1, :5] = 0
    segments[2, 7:] = 0
    tokens = Tokens(jnp.broadcast_to(jnp.arange(12), (3, 12)), jnp.asarray(segments))
    out, gradients = with_gradients(implementation, q * scale, k, v, tokens, alibi_slopes(2), d_out, 4)
    assert np.all(out[segments == 0] == 0)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert np.all(gradient[segments == 0] == 0)
    assert np.abs(out[segments == 1]).min(-1).max() > 0


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_padding_does_not_leak(implementation: str):
    """Whatever stands in padded keys and values, real tokens come out bit for bit the same."""
    q, k, v, _ = random_inputs((1, 12, 2, 4))
    tokens = make_tokens(1, 12, "full")
    tokens = tokens._replace(segments=tokens.segments.at[:, 8:].set(0))
    expected = attend(implementation, q, k, v, tokens, None, 4)[:, :8]
    changed = attend(implementation, q, k.at[:, 8:].set(1e4), v.at[:, 8:].set(-1e4), tokens, None, 4)[:, :8]
    np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_bf16_alibi_at_4096_is_within_a_hundredth_of_exact(implementation: str):
    """The form slope * key position, in bf16, is off by up to 8 before the softmax."""
    T, N, last = 4096, 2, 64
    q, k, v, _ = random_inputs((1, T, N, 16), dtype=jnp.bfloat16)
    v = v / 1.5  # within [-1, 1], where bf16 itself rounds by at most 2e-3
    tokens, slopes = make_tokens(1, T, "full"), alibi_slopes(40)[[7, 31]]  # 1/4 and 1/256
    run = jax.jit(lambda q, k, v: attend(implementation, q, k, v, tokens, slopes, 512))
    result, in_fp32 = run(q, k, v), run(*(x.astype(jnp.float32) for x in (q, k, v)))
    q, k, v = (np.asarray(x, np.float64)[0] for x in (q, k, v))
    rows = np.arange(T - last, T)
    s = np.einsum("tnh,snh->nts", q[rows], k) / 4 + slopes[:, None, None] * (np.arange(T) - rows[:, None])
    p = np.exp(np.where(np.arange(T) <= rows[:, None], s, -np.inf))
    exact = np.einsum("nts,snh->tnh", p / p.sum(-1, keepdims=True), v)
    assert np.abs(np.asarray(in_fp32)[0, rows] - exact).max() < 1e-5
    assert np.abs(np.asarray(result, np.float64)[0, rows] - exact).max() < 1e-2
    assert np.abs(np.asarray(result, np.float32) - in_fp32).max() < 1e-2


def test_chunked_needs_far_less_than_all_scores():
    B, T, N, H = 1, 4096, 4, 32
    x = jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16)
    tokens = Tokens(*[jax.ShapeDtypeStruct((B, T), jnp.int32)] * 2)

    def loss(implementation, q, k, v, tokens):
        return jnp.sum(attend(implementation, q, k, v, tokens, alibi_slopes(N), 256).astype(jnp.float32))

    def temporary_bytes(implementation: str) -> int:
        gradient = jax.jit(jax.grad(lambda *args: loss(implementation, *args), (0, 1, 2)))
        return gradient.lower(x, x, x, tokens).compile().memory_analysis().temp_size_in_bytes

    scores = 4 * B * N * T * T
    assert temporary_bytes("reference") > scores  # the figure measures what it should
    assert temporary_bytes("chunked") < scores / 8


def check_branches_alone(run, tolerance: float = 1e-5) -> None:
    """`run(q, k, v, tokens, d_out)` gives the result and the gradients of q, k and v; what a branch has in a row it has
    alone with its trunk, and what a trunk has is the sum over its branches."""
    before, trunk, branch = 7, 13, 10
    positions = np.concatenate([np.arange(n) for n in (before, trunk)] + 2 * [trunk + np.arange(branch)])
    segments = np.repeat([1, 2, 2 + (1 << 24), 2 + (2 << 24)], [before, trunk, branch, branch])
    tokens = Tokens(*(jnp.asarray(x[None], jnp.int32) for x in (positions, segments)))
    q, k, v, d_out = random_inputs((1, len(segments), 3, 8))
    d_out *= (tokens.segments >> 24 > 0)[:, :, None, None]  # the trunk's would come once with each branch
    out, gradients = run(q, k, v, tokens, d_out)
    totals = [np.zeros_like(gradient) for gradient in gradients]
    for first in (before + trunk, before + trunk + branch):
        places = np.r_[before : before + trunk, first : first + branch]
        alone = make_tokens(1, len(places), "full")
        result, parts = run(*(x[:, places] for x in (q, k, v)), alone, d_out[:, places])
        np.testing.assert_allclose(out[:, places], result, atol=tolerance)
        for total, part in zip(totals, parts, strict=True):
            total[:, places] += part
    for gradient, total in zip(gradients, totals, strict=True):
        np.testing.assert_allclose(gradient, total, atol=tolerance)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_a_branch_is_as_with_its_trunk_alone(implementation: str):
    def run(q, k, v, tokens, d_out):
        return with_gradients(implementation, q, k, v, tokens, alibi_slopes(3), d_out, 16)

    check_branches_alone(run)
