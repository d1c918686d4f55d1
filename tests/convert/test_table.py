from __future__ import annotations

import math

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.config import BAICHUAN2_7B, BAICHUAN2_13B, ModelConfig
from bc2_jax.convert import table
from tests.convert.models import from_torch

TINY = ModelConfig(
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    position_embedding="rope",
    vocab_size=16,
)
DTYPES = st.sampled_from([ml_dtypes.bfloat16, np.float16, np.float32])
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def configs(draw) -> ModelConfig:
    heads = draw(st.integers(1, 5))
    return ModelConfig(
        hidden_size=heads * draw(st.integers(1, 4)),
        intermediate_size=draw(st.integers(1, 9)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        position_embedding="alibi",
        vocab_size=draw(st.integers(3, 9)),
    )


def random_arrays(shapes: dict, dtype: type, seed: int = 0) -> dict[str, np.ndarray]:
    """Every bit pattern may come up, NaN and Inf too: conversion must not look at values."""
    rng = np.random.default_rng(seed)
    size = np.dtype(dtype).itemsize
    return {k: np.frombuffer(rng.bytes(math.prod(s) * size), dtype).reshape(s) for k, s in shapes.items()}


def getter(flat: dict[str, np.ndarray]):
    return lambda path, layer: flat[path] if layer is None else flat[path][layer]


def to_torch(config: ModelConfig, read: table.Reader) -> dict[str, np.ndarray]:
    return dict(table.build_tensor(config, read, tensor) for tensor in table.torch_tensors(config))


def same_bytes(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].shape == b[k].shape and a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a
    )


@pytest.mark.parametrize(("config", "tensors"), [(BAICHUAN2_7B, 227), (BAICHUAN2_13B, 283)])
def test_full_size_shapes(config, tensors):
    shapes = table.torch_shapes(config)
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes.values())) == config.num_parameters()
    assert sum(map(math.prod, table.param_shapes(config).values())) == config.num_parameters()
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    assert shapes["model.layers.31.self_attn.W_pack.weight"] == (3 * d, d)
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (f, d)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (d, f)
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (v, d)


@given(configs(), DTYPES, SEEDS)
@settings(max_examples=60, deadline=None)
def test_torch_to_ours_to_torch_keeps_every_byte(config, dtype, seed):
    tensors = random_arrays(table.torch_shapes(config), dtype, seed)
    params = from_torch(config, tensors.__getitem__)
    assert same_bytes(to_torch(config, getter(table.flatten(params))), tensors)


@given(configs(), DTYPES, SEEDS)
@settings(max_examples=60, deadline=None)
def test_ours_to_torch_to_ours_keeps_every_byte(config, dtype, seed):
    flat = random_arrays(table.param_shapes(config), dtype, seed)
    tensors = to_torch(config, getter(flat))
    assert {k: t.shape for k, t in tensors.items()} == table.torch_shapes(config)
    assert same_bytes(table.flatten(from_torch(config, tensors.__getitem__)), flat)


def test_w_pack_rows_are_q_then_k_then_v():
    rng = np.random.default_rng(0)
    tensors = {k: rng.standard_normal(s) for k, s in table.torch_shapes(TINY).items()}
    attention = from_torch(TINY, tensors.__getitem__)["layers"]["self_attn"]
    d, n, h = TINY.hidden_size, TINY.num_attention_heads, TINY.head_dim
    x_BTD = rng.standard_normal((2, 5, d))
    for layer in range(TINY.num_hidden_layers):
        packed = x_BTD @ tensors[f"model.layers.{layer}.self_attn.W_pack.weight"].T
        expected = [packed[..., i * d : (i + 1) * d].reshape(2, 5, n, h) for i in range(3)]
        for name, expected_BTNH in zip(("q_proj", "k_proj", "v_proj"), expected, strict=True):
            got_BTNH = np.einsum("btd,dnh->btnh", x_BTD, attention[name]["weight"][layer])
            np.testing.assert_allclose(got_BTNH, expected_BTNH, rtol=1e-12, atol=1e-12)
        # o_proj takes the heads in the same order.
        out = expected[2].reshape(2, 5, d) @ tensors[f"model.layers.{layer}.self_attn.o_proj.weight"].T
        got = np.einsum("btnh,nhd->btd", expected[2], attention["o_proj"]["weight"][layer])
        np.testing.assert_allclose(got, out, rtol=1e-12, atol=1e-12)


def test_mlp_matrices_are_transposed():
    tensors = random_arrays(table.torch_shapes(TINY), np.float32)
    mlp = from_torch(TINY, tensors.__getitem__)["layers"]["mlp"]
    for name in ("gate_proj", "up_proj", "down_proj"):
        expected = tensors[f"model.layers.2.mlp.{name}.weight"].T
        np.testing.assert_array_equal(mlp[name]["weight"][2], expected)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_read_slice_is_the_slice(data):
    tensors = random_arrays(table.torch_shapes(TINY), np.float32)
    path = data.draw(st.sampled_from(sorted(table.param_shapes(TINY))))
    index = []
    for size in table.param_shapes(TINY)[path]:
        start = data.draw(st.integers(0, size - 1))
        index.append(data.draw(st.sampled_from([slice(None), slice(start, data.draw(st.integers(start + 1, size)))])))
    full = table.read_slice(TINY, tensors.__getitem__, path)
    part = table.read_slice(TINY, tensors.__getitem__, path, tuple(index))
    assert part.flags.c_contiguous and part.tobytes() == full[tuple(index)].tobytes()


def test_read_slice_refuses_steps_and_empty_layers():
    tensors = random_arrays(table.torch_shapes(TINY), np.float32)
    with pytest.raises(ValueError, match="step"):
        table.read_slice(TINY, tensors.__getitem__, "norm.weight", (slice(0, 4, 2),))
    with pytest.raises(ValueError, match="no layer"):
        table.read_slice(TINY, tensors.__getitem__, "layers.input_layernorm.weight", (slice(1, 1),))


def test_read_slice_loads_onto_a_mesh_and_back():
    """On as many devices as there are; a shard asks only for its own layers, heads and rows."""
    tensors = random_arrays(table.torch_shapes(TINY), np.int32)
    devices = np.array(jax.devices()[: math.gcd(len(jax.devices()), 4)])
    mesh = jax.sharding.Mesh(devices, ("tensor",))
    axis = {"layers.self_attn.q_proj.weight": 2, "layers.self_attn.o_proj.weight": 3, "lm_head.weight": 0}
    flat = {}
    for path, shape in table.param_shapes(TINY).items():
        spec = [None] * len(shape)
        if path in axis:
            spec[axis[path]] = "tensor"
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        flat[path] = jax.make_array_from_callback(
            shape, sharding, lambda index, path=path: table.read_slice(TINY, tensors.__getitem__, path, index)
        )
    back = to_torch(TINY, lambda path, layer: np.asarray(getter(flat)(path, layer)))
    assert same_bytes(dict(back), tensors)


def test_mixed_dtypes_are_refused():
    tensors = random_arrays(table.torch_shapes(TINY), np.float32)
    tensors["model.layers.1.input_layernorm.weight"] = np.ones(TINY.hidden_size, np.float16)
    with pytest.raises(ValueError, match=r"layers\.1\.input_layernorm\.weight is float16"):
        from_torch(TINY, tensors.__getitem__)


def test_flatten_inverts_unflatten():
    flat = {"a.b.c": 1, "a.d": 2, "e": 3}
    assert table.flatten(table.unflatten(flat)) == flat


@given(rows=st.integers(1, 300), columns=st.integers(1, 300), dtype=DTYPES, seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_transposes_larger_than_a_block_keep_every_element(rows, columns, dtype, seed):
    """Both ways, with whole and partial blocks of 128."""
    array = random_arrays({"x": (rows, columns)}, dtype, seed)["x"]
    read, written = np.empty((columns, rows), dtype), np.empty((columns, rows), dtype)
    table.copy_blocks(read, array.T)
    table.copy_blocks(written.T, array)
    expected = b"".join(array[:, j].tobytes() for j in range(columns))
    assert read.tobytes() == expected and written.tobytes() == expected
