"""Stored moments: unbiased rounding, the same bits on every mesh and after a resume, errors of 8-bit codes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bc2_jax.checkpoint import Checkpointer
from bc2_jax.config import CheckpointConfig, OptimizerConfig
from bc2_jax.metadata import Metadata
from bc2_jax.sharding import place_shapes
from bc2_jax.train import moments
from bc2_jax.train.optimizer import make_optimizer

CONFIG = OptimizerConfig(peak_learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=3, decay_steps=10)
STORED = [dataclasses.replace(CONFIG, moment_dtype=dtype, stochastic_rounding=True) for dtype in ("bfloat16", "int8")]
SPECS = {
    "embed_tokens": P("tensor", "fsdp"),
    "layers": {
        "q_proj": P(None, "fsdp", "tensor", None), "input_layernorm": P(None, None),
        "up_proj": P(None, "fsdp", "tensor"),
    },
    "head": P("fsdp", None),
}  # fmt: skip
SHAPES = {
    "embed_tokens": (64, 32),
    "layers": {"q_proj": (2, 32, 4, 32), "input_layernorm": (2, 32), "up_proj": (2, 32, 64)},
    "head": (32, 1),
}  # fmt: skip


def draw(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731  # shorter than a function
    return jax.tree.map(lambda s: rng.standard_normal(s).astype(np.float32), SHAPES, is_leaf=is_shape)


def run(config: OptimizerConfig, mesh, steps: range, state=None, params=None):
    """Parameters and state after some steps; on a mesh all arrays are laid out by SPECS."""
    place = lambda tree: jax.device_put(tree, jax.tree.map(lambda s: NamedSharding(mesh, s), SPECS))  # noqa: E731
    optimizer = make_optimizer(config)
    with jax.set_mesh(mesh):
        params = place(draw(0)) if params is None else params
        state = jax.jit(optimizer.init)(params) if state is None else state
        update = jax.jit(optimizer.update)
        for step in steps:
            # Powers of two: sums over devices for the norm of the gradient are the same bits in any order.
            gradients = place(
                jax.tree.map(lambda x: np.exp2(np.round(x)).astype(np.float32) * np.sign(x), draw(step + 1))
            )
            changes, state = update(gradients, state, params)
            params = optax.apply_updates(params, changes)
    return params, state


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_rounding_is_right_on_average(dtype: str, signed: bool):
    """The mean of many roundings is the value, which neither neighbour is; each rounding is one of the neighbours."""
    rng = np.random.default_rng(0)
    row = np.concatenate([[1.0], 10 ** rng.uniform(-3, 0, 39)]).astype(np.float32)
    row *= np.where(rng.random(40) < 0.5, -1, 1) if signed else 1
    times = 8192
    x = jnp.asarray(np.tile(row, (times, 1)))
    bits = moments.random_bits((jax.tree_util.DictKey("w"),), x, jnp.int32(7))
    found = np.asarray(moments.load(moments.store((), x, dtype, signed, bits)), np.float64)
    values = [np.unique(column) for column in found.T]
    assert max(map(len, values)) == 2
    gap = np.array([np.ptp(v) for v in values])
    low, high = np.array([v[0] for v in values]), np.array([v[-1] for v in values])
    slack = 1e-6 * np.abs(row)
    assert (low <= row + slack).all() and (row - slack <= high).all()
    # Five standard deviations of a mean of two values.
    np.testing.assert_array_less(np.abs(found.mean(axis=0) - row), 5 * gap / 2 / np.sqrt(times) + 1e-6 * np.abs(row))


def test_nearest_bf16_does_not_decay_and_random_does():
    """The reason for stochastic rounding: with b2 = .999 a second moment rounded to nearest stays forever."""
    nu = {"w": jnp.full((4, 256), 1.0)}
    for stochastic, low, high in ((False, 1.0, 1.0), (True, 0.70, 0.78)):
        config = dataclasses.replace(CONFIG, b2=0.999, moment_dtype="bfloat16", stochastic_rounding=stochastic)
        optimizer = make_optimizer(config)
        state = optimizer.init(nu)
        state = optax.tree.set(state, nu=optax.tree.cast(nu, jnp.bfloat16))
        update = jax.jit(optimizer.update)
        for _ in range(300):  # .999^300 = .741
            _, state = update(optax.tree.zeros_like(nu), state, nu)
        assert low <= float(optax.tree.get(state, "nu")["w"].astype(jnp.float32).mean()) <= high


@pytest.mark.parametrize("config", STORED, ids=lambda c: c.moment_dtype)
def test_a_sharded_update_is_the_unsharded_one(config: OptimizerConfig, mesh_of):
    """Codes, scales and bf16 moments, bit for bit; each is laid out as its parameter."""
    one, many = run(config, mesh_of(1, 1, 1), range(3)), run(config, mesh_of(2, 2, 2), range(3))
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(many[1]), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), one[0], many[0])
    for moment in (optax.tree.get(many[1], "mu"), optax.tree.get(many[1], "nu")):
        for (path, x), spec in zip(jax.tree.leaves_with_path(many[0]), jax.tree.leaves(SPECS), strict=True):
            stored = moment
            for key in path:
                stored = stored[key.key]
            codes = stored.codes if isinstance(stored, moments.Int8) else stored
            assert codes.sharding.spec == spec and codes.shape == x.shape
            if isinstance(stored, moments.Int8):
                assert stored.scales.sharding.spec == P(*spec[:-1], None)


@pytest.mark.parametrize("config", STORED, ids=lambda c: c.moment_dtype)
def test_a_restored_run_rounds_as_the_one_that_was_not_stopped(config: OptimizerConfig, mesh_of, tmp_path):
    mesh, other = mesh_of(2, 2, 2), mesh_of(1, 4, 1)
    params, state = run(config, mesh, range(2))
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    checkpointer.save(2, params, state, Metadata({"model": {}}, {}))
    checkpointer.wait()
    with jax.set_mesh(other):
        layout = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(other, s)), params, SPECS
        )
        abstract = place_shapes(other, jax.eval_shape(make_optimizer(config).init, layout))
    restored = checkpointer.restore(2, layout, abstract)
    checkpointer.close()
    expected = run(config, mesh, range(2, 4), state, params)
    found = run(config, other, range(2, 4), restored[1], restored[0])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), expected[1], found[1])


def test_8_bit_moments():
    """About 2 bytes a parameter in long rows, fp32 for norms and short rows; errors are a share of a row's largest."""
    params = {"w": jnp.zeros((8, 4096)), "norm": jnp.zeros((2, 64)), "short": jnp.zeros((64, 8))}
    state = make_optimizer(STORED[1]).init(params)
    size = {k: sum(x.nbytes for x in jax.tree.leaves(optax.tree.get(state, m)[k])) for k in params for m in ("mu",)}
    assert size == {"w": 8 * 4096 + 8 * 4, "norm": 4 * 2 * 64, "short": 4 * 64 * 8}
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 4096)).astype(np.float32))
    bits = moments.random_bits((), x, jnp.int32(0))
    for value, signed, step in ((x, True, 2 / 127), (x**2, False, 4 / 255)):
        found = moments.load(moments.store((), value, "int8", signed, bits))
        assert float(jnp.abs(found - value).max(-1).max() / jnp.abs(value).max()) <= step
        assert signed or float(found.min()) > 0
    zero = moments.load(moments.store((), jnp.zeros((2, 64)), "int8", False, bits[:2, :64]))
    assert not zero.any()
