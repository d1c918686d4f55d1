"""The Pallas kernels in interpret mode against the reference, and their lowering for TPU by Mosaic."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from bc2_jax.kernels.attention import Tokens, reference_attention
from bc2_jax.kernels.blocks import TABLE, BlockSizes, choose_blocks
from bc2_jax.kernels.flash import flash_attention, rotates
from bc2_jax.kernels.flash_tokens import SKIP, alibi_positions, fetched, kind, kind_of, plan_backward, plan_forward
from bc2_jax.model.position import alibi_slopes, apply_rope, make_rope
from tests.kernels.test_attention import KINDS, check_branches_alone, make_tokens, random_inputs

SMALL = BlockSizes(16, 8, 16, 16, 8, span=1024, vmem_mib=16)


def with_gradients(attend, q, k, v, d_out) -> tuple[np.ndarray, ...]:
    """The result and the gradients of q, k and v, in fp64."""

    @jax.jit
    def run(q, k, v, d_out):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out.astype(out.dtype))

    return tuple(np.asarray(x, np.float64) for x in run(q, k, v, d_out))


def flash(tokens: Tokens, slopes, blocks: BlockSizes = SMALL):
    return lambda q, k, v: flash_attention(q, k, v, tokens, slopes, blocks=blocks, interpret=True)


def reference(tokens: Tokens, slopes):
    return lambda q, k, v: reference_attention(q, k, v, tokens, slopes)


def assert_close(result, expected, out: float, gradient: float):
    """`out` is absolute (values are of order 1), `gradient` relative to the largest entry."""
    assert np.abs(result[0] - expected[0]).max() < out
    for got, wanted in zip(result[1:], expected[1:], strict=True):
        assert np.abs(got - wanted).max() <= gradient * max(np.abs(wanted).max(), 0.1)


@settings(max_examples=8)
@given(
    T=st.integers(1, 50), H=st.sampled_from([8, 16]), kind=st.sampled_from(KINDS), seed=st.integers(0, 99),
    sizes=st.sampled_from([(16, 8, 16, 16, 8, 64), (32, 16, 16, 8, 8, 64), (16, 16, 32, 8, 16, 32), (8,) * 5 + (16,)]),
)  # fmt: skip
def test_rope_inside_equals_rope_before(T: int, H: int, kind: str, seed: int, sizes):
    q, k, v, d_out = random_inputs((2, T, 2, H), seed)
    tokens = make_tokens(2, T, kind, seed)
    rope = make_rope(tokens.positions, H, 10_000.0)

    def inside(q, k, v):
        blocks = BlockSizes(*sizes, vmem_mib=16)
        return flash_attention(q, k, v, tokens, None, rope=rope, blocks=blocks, interpret=True)

    def before(q, k, v):
        return reference_attention(apply_rope(q, rope), apply_rope(k, rope), v, tokens, None)

    expected = with_gradients(before, q, k, v, d_out)
    assert_close(with_gradients(inside, q, k, v, d_out), expected, 1e-5, 2e-5)


@settings(max_examples=12)
@given(
    B=st.integers(1, 2), T=st.integers(1, 50), N=st.integers(1, 3), H=st.sampled_from([8, 16]),
    sizes=st.sampled_from([(16, 8, 16, 16, 8, 64), (32, 16, 16, 8, 8, 64), (16, 16, 32, 8, 16, 32), (8,) * 5 + (16,)]),
    kind=st.sampled_from(KINDS), alibi=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_in_fp32(B: int, T: int, N: int, H: int, sizes, kind: str, alibi: bool, seed: int):
    q, k, v, d_out = random_inputs((B, T, N, H), seed)
    tokens, slopes = make_tokens(B, T, kind, seed), alibi_slopes(N) if alibi else None
    result = with_gradients(flash(tokens, slopes, BlockSizes(*sizes, vmem_mib=16)), q, k, v, d_out)
    assert_close(result, with_gradients(reference(tokens, slopes), q, k, v, d_out), 1e-5, 2e-5)


@pytest.mark.parametrize("kind", ["full", "packed"])
@pytest.mark.parametrize("alibi", [False, True])
def test_bf16(kind: str, alibi: bool):
    inputs = random_inputs((2, 50, 4, 16), dtype=jnp.bfloat16)
    tokens, slopes = make_tokens(2, 50, kind), alibi_slopes(4) if alibi else None
    result = with_gradients(flash(tokens, slopes), *inputs)
    exact = with_gradients(reference(tokens, slopes), *(x.astype(jnp.float32) for x in inputs))
    assert_close(result, exact, 6e-3, 6e-3)


@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["small", "huge-scores"])
def test_padding_gives_zeros_and_finite_gradients(scale: float):
    q, k, v, d_out = random_inputs((3, 40, 2, 8))
    segments = np.ones((3, 40), np.int32)
    segments[0] = 0
    segments[1, :21] = 0
    segments[2, 7:] = 0
    tokens = Tokens(jnp.broadcast_to(jnp.arange(40), (3, 40)), jnp.asarray(segments))
    out, *gradients = with_gradients(flash(tokens, alibi_slopes(2)), q * scale, k, v, d_out)
    assert np.all(out[segments == 0] == 0)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert np.all(gradient[segments == 0] == 0)
    assert np.abs(out[segments == 1]).min(-1).max() > 0


def test_padding_does_not_leak():
    """Whatever stands in padded keys and values, real tokens come out bit for bit the same."""
    q, k, v, _ = random_inputs((1, 40, 2, 8))
    tokens = make_tokens(1, 40, "full")
    tokens = tokens._replace(segments=tokens.segments.at[:, 20:].set(0))
    expected = flash(tokens, None)(q, k, v)[:, :20]
    changed = flash(tokens, None)(q, k.at[:, 20:].set(1e4), v.at[:, 20:].set(-1e4))[:, :20]
    np.testing.assert_array_equal(changed, expected)


def test_packed_documents_equal_each_document_alone():
    lengths = (19, 1, 30)
    q, k, v, d_out = random_inputs((1, sum(lengths), 2, 8))
    slopes = alibi_slopes(2)
    segments = np.repeat(np.arange(1, 4, dtype=np.int32), lengths)[None]
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None]
    packed = with_gradients(flash(Tokens(jnp.asarray(positions), jnp.asarray(segments)), slopes), q, k, v, d_out)
    for start, n in zip(np.cumsum((0, *lengths)), lengths, strict=False):
        part = slice(start, start + n)
        alone = flash(make_tokens(1, n, "full"), slopes)
        result = with_gradients(alone, *(x[:, part] for x in (q, k, v, d_out)))
        assert_close([x[:, part] for x in packed], result, 1e-5, 1e-4)


def test_positions_may_have_gaps_and_start_anywhere():
    """ALiBi counts positions, not indices."""
    inputs = random_inputs((2, 40, 2, 8))
    tokens = make_tokens(2, 40, "packed")
    positions = jnp.asarray(np.cumsum(np.random.default_rng(0).integers(1, 5, (2, 40)), 1) + 1000, jnp.int32)
    for moved in (tokens._replace(positions=tokens.positions + 12345), tokens._replace(positions=positions)):
        assert_close(
            with_gradients(flash(moved, alibi_slopes(2)), *inputs),
            with_gradients(reference(moved, alibi_slopes(2)), *inputs), 1e-5, 1e-4,
        )  # fmt: skip


def test_bf16_alibi_at_4096_is_within_a_hundredth_of_fp32():
    """The form slope * key position, in bf16, is off by up to 8 before the softmax."""
    T, slopes = 4096, alibi_slopes(40)[[7, 31]]  # 1/4 and 1/256
    q, k, v, _ = random_inputs((1, T, 2, 16), dtype=jnp.bfloat16)
    v = v / 1.5  # within [-1, 1], where bf16 itself rounds by at most 2e-3
    tokens = make_tokens(1, T, "full")
    blocks = BlockSizes(1024, 512, 1024, 512, 512, span=T, vmem_mib=16)
    result = jax.jit(flash(tokens, slopes, blocks))(q, k, v)
    exact = jax.jit(reference(tokens, slopes))(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert np.abs(np.asarray(result, np.float32) - exact).max() < 1e-2


def test_steep_slopes_far_into_a_long_document_stay_exact():
    """slope * position is about 30,000 here, where fp32 has steps of 2e-3."""
    inputs = random_inputs((1, 64, 1, 8))
    tokens = make_tokens(1, 64, "full")
    far = tokens._replace(positions=tokens.positions + 2**15)
    slopes = np.asarray([1.0], np.float32)
    near = with_gradients(reference(tokens, slopes), *inputs)
    assert_close(with_gradients(flash(far, slopes), *inputs), near, 1e-5, 1e-4)


def test_documents_of_one_row_do_not_spoil_the_precision_of_each_other():
    """One at position 30,000 and the next, at 0, share a block."""
    tokens = make_tokens(1, 64, "full")
    segments = jnp.asarray(np.repeat([[1, 2]], (40, 24), axis=1), jnp.int32)
    positions = jnp.concatenate([jnp.arange(40) + 30000, jnp.arange(24)])[None].astype(jnp.int32)
    moved = Tokens(positions, segments)
    np.testing.assert_array_equal(alibi_positions(moved), tokens.positions)
    inputs, slopes = random_inputs((1, 64, 1, 8)), np.asarray([1.0], np.float32)
    assert_close(
        with_gradients(flash(moved, slopes), *inputs), with_gradients(reference(moved, slopes), *inputs), 1e-5, 1e-4
    )


def test_alibi_positions_change_only_where_documents_are_whole():
    segments = jnp.asarray([[0, 1, 1, 2, 2, 0], [1, 2, 1, 2, 0, 0], [2, 2, 1, 1, 0, 0], [1, 1, 0, 1, 1, 0]], jnp.int32)
    positions = jnp.asarray([[0, 7, 8, 0, 1, 0], *[[0, 1, 2, 3, 4, 5]] * 2, [0, 1, 0, 2, 3, 0]], jnp.int32)
    expected = np.asarray(positions).copy()
    expected[0, 1:5] = np.arange(1, 5)
    np.testing.assert_array_equal(alibi_positions(Tokens(positions, segments)), expected)


def test_alibi_positions_of_branches_are_those_of_their_document_moved():
    """A block holds the ends of two documents and no jump; a branch is as far from its trunk as without the others."""
    positions, segments = (np.asarray(x) for x in make_tokens(1, 60, "branches", seed=3))
    moved = np.asarray(alibi_positions(Tokens(jnp.asarray(positions + 777 * (segments > 0)), jnp.asarray(segments))))
    for document in range(1, segments[0].max() % 2**24 + 1):
        here = segments % 2**24 == document
        if here.any():
            np.testing.assert_array_equal(moved[here], positions[here] + np.flatnonzero(here[0])[0])


def test_plan_of_branches_is_tight():
    """What is masked, skipped or neither is exactly what the tokens say, where blocks hold whole parts of a document.

    Blocks of two: trunk 1, its branch, another one, trunk 2 with its branch, the rest of that one, padding.
    """
    a, b = 1 << 24, 2 << 24
    segments = jnp.asarray([[1, 1, 1 + a, 1 + a, 1 + b, 1 + b, 2, 2 + a, 2 + a, 2 + a, 0, 0]], jnp.int32)
    plain, diagonal, mixed = kind(False, False), kind(True, False), kind(False, True)
    expected = {
        (0, 0): diagonal, (1, 0): plain, (1, 1): diagonal, (2, 0): plain, (2, 2): diagonal, (3, 3): kind(True, True),
        (4, 3): mixed, (4, 4): diagonal,
    }  # fmt: skip
    for plan in (plan_forward(segments, segments, 2), plan_backward(segments, segments, 2, 0, 6)):
        pairs = zip(plan.query_blocks.tolist(), plan.key_blocks.tolist(), strict=True)
        assert [expected.get(pair, SKIP) for pair in pairs] == kind_of(plan.steps).tolist()


def test_a_branch_is_as_with_its_trunk_alone():
    def run(q, k, v, tokens, d_out):
        out, *gradients = with_gradients(flash(tokens, alibi_slopes(3)), q, k, v, d_out)
        return out, gradients

    check_branches_alone(run)


def test_plan_of_the_steps():
    """Blocks of two tokens with segments 11, 12, 22, 33, 00."""
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 3, 3, 0, 0]], jnp.int32)
    plans = plan_forward(segments, jnp.arange(10)[None], 2), plan_backward(segments, jnp.arange(10)[None], 2, 0, 5)
    one, two = kind(diagonal=True, mixed=False), kind(diagonal=True, mixed=True)
    other = kind(diagonal=False, mixed=True)
    expected = {(0, 0): one, (1, 0): other, (1, 1): two, (2, 1): other, (2, 2): one, (3, 3): one}
    for plan in plans:
        pairs = list(zip(plan.query_blocks.tolist(), plan.key_blocks.tolist(), strict=True))
        assert sorted(pairs) == [(i, j) for i in range(5) for j in range(i + 1)]
        assert [expected.get(pair, SKIP) for pair in pairs] == kind_of(plan.steps).tolist()
        np.testing.assert_array_equal(plan.anchors, [0, 2, 4, 6, 0])
    # Skipped steps name the current block, or the next one.
    forward, backward = plans
    assert fetched(forward.steps).tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4]
    assert fetched(backward.steps).tolist() == [0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 4]
    later = plan_backward(segments, jnp.arange(10)[None], 2, 3, 5)
    assert later.query_blocks.tolist() == [3, 4, 3, 4, 3, 4, 3, 4, 4]
    assert fetched(later.steps).tolist() == [3, 3, 3, 3, 3, 3, 3, 3, 4]


@pytest.mark.parametrize(("policy", "kernels"), [(("attention", "attention_lse"), 2), (("attention",), 3)])
def test_a_remat_policy_that_keeps_both_names_runs_the_forward_kernel_once(policy: tuple[str, ...], kernels: int):
    q, k, v, _ = random_inputs((1, 16, 1, 8))
    attend = jax.checkpoint(
        flash(make_tokens(1, 16, "full"), None), policy=jax.checkpoint_policies.save_only_these_names(*policy)
    )
    text = str(jax.make_jaxpr(jax.grad(lambda *qkv: attend(*qkv).sum(), (0, 1, 2)))(q, k, v))
    assert text.count("pallas_call[") == kernels


def on_mesh(tokens: Tokens, slopes, interpret: bool):
    """Rows over two devices and heads over four."""
    mesh = jax.make_mesh((2, 4), ("row", "head"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    heads, rows = P("row", None, "head"), P("row")

    def on_device(q, k, v, tokens, slopes):
        return flash_attention(q, k, v, tokens, slopes, blocks=SMALL if interpret else None, interpret=interpret)

    in_specs = (heads, heads, heads, Tokens(rows, rows), None if slopes is None else P("head"))
    # JAX cannot interpret a kernel with check_vma; compiled ones can be checked.
    placed = jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=heads, check_vma=not interpret)
    return lambda q, k, v: placed(q, k, v, tokens, slopes)


@pytest.mark.parametrize(("kind", "alibi"), [("packed", False), ("branches", True)])
def test_sharded_over_rows_and_heads_equals_unsharded(kind: str, alibi: bool):
    inputs = random_inputs((2, 24, 4, 8))
    tokens, slopes = make_tokens(2, 24, kind), jnp.asarray(alibi_slopes(4)) if alibi else None
    expected = with_gradients(flash(tokens, slopes), *inputs)
    for got, wanted in zip(with_gradients(on_mesh(tokens, slopes, True), *inputs), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("alibi", [False, True])
def test_lowers_for_tpu_on_a_mesh(alibi: bool):
    x = jax.ShapeDtypeStruct((2, 256, 4, 128), jnp.bfloat16)
    attend = on_mesh(make_tokens(2, 256, "packed"), jnp.asarray(alibi_slopes(4)) if alibi else None, False)
    gradient = jax.jit(jax.grad(lambda *qkv: attend(*qkv).astype(jnp.float32).sum(), (0, 1, 2)))
    text = gradient.trace(x, x, x).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("custom_call @tpu_custom_call") == 2


@pytest.mark.parametrize(
    ("T", "H", "dtype"), [(1024, 128, jnp.bfloat16), (1100, 64, jnp.bfloat16), (300, 128, jnp.float32)]
)
@pytest.mark.parametrize("alibi", [False, True])
def test_lowers_for_tpu_without_one(T: int, H: int, dtype, alibi: bool):
    x = jax.ShapeDtypeStruct((2, T, 4, H), dtype)
    tokens = Tokens(*[jax.ShapeDtypeStruct((2, T), jnp.int32)] * 2)

    def loss(q, k, v, tokens):
        rope = make_rope(tokens.positions, H, 10_000.0) if rotates(T, H) and not alibi else None
        return jnp.sum(
            flash_attention(q, k, v, tokens, alibi_slopes(4) if alibi else None, rope=rope).astype(jnp.float32)
        )

    gradient = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, x, x, tokens)
    text = gradient.lower(lowering_platforms=("tpu",)).as_text()
    assert [text.count(name) > 0 for name in ("flash_forward", "flash_backward")] == [True, True]
    assert text.count("custom_call @tpu_custom_call") == 2


def test_errors():
    q, k, v, _ = random_inputs((1, 8, 1, 80))
    tokens = make_tokens(1, 8, "full")
    with pytest.raises(ValueError, match="A head size of 80 is not supported by the TPU kernel: it must be 64 or 128."):
        flash_attention(q, k, v, tokens, None)
    x = jnp.zeros((1, 8, 1, 64))
    with pytest.raises(ValueError, match="Rows of 8 tokens with heads of 64 are not rotated by the TPU kernel"):
        flash_attention(x, x, x, tokens, None, rope=make_rope(tokens.positions, 64, 10_000.0))
    with pytest.raises(ValueError, match="bfloat16, float32 are not supported"):
        flash_attention(q.astype(jnp.bfloat16), k, v, tokens, None, interpret=True)
    with pytest.raises(ValueError, match="blocks.forward_chunk = 12 is not valid: it must divide blocks.forward = 16."):
        BlockSizes(16, 12, 16, 16, 16, 16, 16)
    with pytest.raises(ValueError, match="must be multiples of one another"):
        BlockSizes(16, 16, 24, 8, 8, 16, 16)
    with pytest.raises(ValueError, match="blocks.span = 0"):
        BlockSizes(16, 16, 16, 8, 8, 0, 16)


@given(
    length=st.integers(1, 70000),
    line=st.sampled_from(TABLE),
    granule=st.sampled_from([8, 128]),
)
def test_fitted_blocks_hold_the_row_with_little_padding(length: int, line, granule: int):
    fitted = line.sizes.fit(length, granule)
    chunks = (fitted.forward, fitted.forward_chunk), (fitted.backward, fitted.backward_chunk)
    for block, chunk in (*chunks, (fitted.backward, fitted.backward_diagonal_chunk)):
        assert fitted.padded(length) % block == block % chunk == chunk % granule == 0
    assert fitted.forward <= line.sizes.forward and fitted.backward <= line.sizes.backward
    large = max(fitted.forward, fitted.backward)
    ratio = large // min(fitted.forward, fitted.backward)
    assert fitted.padded(length) - length < granule * ratio * (-(-length // large))


def test_the_table_has_a_line_for_every_chip_and_length():
    for chip, head_dim, length in itertools.product(
        (None, "v4", "v5e", "v5p", "v6e"), (8, 64, 128), (128, 4096, 2**17)
    ):
        assert choose_blocks(chip, head_dim, length).vmem_mib > 0
    assert choose_blocks(None, 128, 4096) == choose_blocks("v4", 128, 4096)
