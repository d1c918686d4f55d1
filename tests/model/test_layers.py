from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.model import layers
from bc2_jax.model.equations import EQUATIONS
from bc2_jax.model.layers import MLP, Embedding, Linear, linear, rms_norm
from bc2_jax.sharding import DEFAULT_RULES, use_rules

RULES = DEFAULT_RULES
SIZES = {"B": 8, "T": 6, "D": 8, "F": 12, "N": 4, "H": 2}
# equation, axes of the weight, axes of the result
PROJECTIONS = [
    ("BTD,DNH->BTNH", ("embed", "heads", "head_dim"), ("batch", "sequence", "heads", "head_dim")),
    ("BTNH,NHD->BTD", ("heads", "head_dim", "embed"), ("batch", "sequence", "hidden")),
    ("BTD,DF->BTF", ("embed", "ffn"), ("batch", "sequence", "ffn")),
    ("BTF,FD->BTD", ("ffn", "embed"), ("batch", "sequence", "hidden")),
]
INPUT_AXES = {
    "D": ("batch", "sequence", "hidden"), "F": ("batch", "sequence", "ffn"),
    "H": ("batch", "sequence", "heads", "head_dim"),
}  # fmt: skip


def put(mesh, a, names, rules=RULES):
    """`a` on `mesh`, its dimensions sharded as axes of these names."""
    return jax.device_put(a, NamedSharding(mesh, rules.spec(*names)))


def random_operands(equation: str, dtype=np.float32, **sizes: int) -> list[np.ndarray]:
    """x, w and a cotangent."""
    rng = np.random.default_rng(0)
    return [
        rng.standard_normal([(SIZES | sizes)[c] for c in t]).astype(dtype)
        for t in equation.replace("->", ",").split(",")
    ]


@pytest.mark.parametrize("shape", [None, (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)], ids=str)
@pytest.mark.parametrize(("equation", "axes", "out_axes"), PROJECTIONS, ids=[p[0] for p in PROJECTIONS])
def test_linear_equals_einsum(equation: str, axes, out_axes, shape, mesh_of):
    x, w, dy = random_operands(equation)
    y, pull = jax.vjp(lambda x, w: jnp.einsum(equation, x, w), x, w)
    expected = y, *pull(jnp.asarray(dy))

    @jax.jit
    def run(x, w, dy):
        y, pull = jax.vjp(lambda x, w: linear(equation, x, w), x, w)
        return y, *pull(dy)

    if shape is None:
        result = run(x, w, dy)
    else:
        mesh, x_axes = mesh_of(*shape), INPUT_AXES[equation.split(",")[0][-1]]
        with jax.set_mesh(mesh):
            result = run(put(mesh, x, x_axes), put(mesh, w, axes), put(mesh, dy, out_axes))
        for array, names in zip(result, (out_axes, x_axes, axes), strict=True):
            assert array.sharding.spec == RULES.spec(*names)
    for a, b in zip(result, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [None, (8, 1, 1), (2, 4, 1)], ids=str)
@pytest.mark.parametrize("projection", PROJECTIONS[:2], ids=["q", "o"])
def test_weight_gradients_are_summed_in_fp32(projection, shape, mesh_of):
    """Exact but for fp32 rounding given bf16 inputs, over the tokens of a device and over devices."""
    equation, axes, out_axes = projection
    x, w, dy = random_operands(equation, B=8, T=256)
    x, dy = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)
    (x_dims, w_dims), y_dims = equation.split("->")[0].split(","), equation.split("->")[1]
    exact = np.einsum(f"{x_dims},{y_dims}->{w_dims}", np.asarray(x, np.float64), np.asarray(dy, np.float64))

    @jax.jit
    def weight_gradient(x, w, dy):
        return jax.vjp(lambda w: linear(equation, x, w), w)[1](dy)[0]

    if shape is None:
        gradient = weight_gradient(x, w, dy)
    else:
        mesh = mesh_of(*shape)
        with jax.set_mesh(mesh):
            placed = put(mesh, x, INPUT_AXES[x_dims[-1]]), put(mesh, w, axes), put(mesh, dy, out_axes)
            gradient = weight_gradient(*placed)
    assert gradient.dtype == jnp.float32
    error = np.abs(np.asarray(gradient, np.float64) - exact).max() / np.abs(exact).max()
    rounded = np.abs(exact - exact.astype(jnp.bfloat16).astype(np.float64)).max() / np.abs(exact).max()
    assert error < 2e-6 < rounded / 100


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("equation", [EQUATIONS["gate_proj"], EQUATIONS["down_proj"]])
def test_a_gradient_that_is_padded_for_its_scatter_is_the_same(equation: str, shape, mesh_of, monkeypatch):
    monkeypatch.setattr(layers, "current_chip", lambda: "v5p")
    monkeypatch.setattr(layers, "scatterable_columns", lambda rows, columns, shards: columns + 3)
    axes, out_axes = next(p[1:] for p in PROJECTIONS if p[0] == equation)
    test_linear_equals_einsum(equation, axes, out_axes, shape, mesh_of)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("equation", [EQUATIONS["o_proj"], EQUATIONS["down_proj"]])
def test_on_a_tpu_mesh_the_model_axis_is_gathered_and_scattered_in_front(equation: str, shape, mesh_of, monkeypatch):
    seen = []
    gather, reduce_scatter = layers.gather, layers.reduce_scatter
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    monkeypatch.setattr(layers, "gather", lambda x, *axes: seen.append(axes) or gather(x, *axes))
    monkeypatch.setattr(layers, "reduce_scatter", lambda x, *axes: seen.append(axes) or reduce_scatter(x, *axes))
    axes, out_axes = next(p[1:] for p in PROJECTIONS if p[0] == equation)
    test_linear_equals_einsum(equation, axes, out_axes, shape, mesh_of)
    is_sharded = shape[1] > 1
    assert [a[0] for a in seen] == ["embed" if is_sharded else axes[0]] * 3, "gathered twice, scattered once"


def test_linear_computes_in_the_dtype_of_x():
    y = linear("BTD,DF->BTF", jnp.ones((1, 2, 4), jnp.bfloat16), jnp.ones((4, 3)))
    assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 2, 2)], ids=str)
def test_gradients_follow_the_rules_of_the_forward_pass(shape, mesh_of):
    """The backward pass is traced after the context of the forward pass has ended."""
    equation, axes, _ = PROJECTIONS[2]
    x, w, dy = random_operands(equation)
    rules = dataclasses.replace(RULES, ffn=None, embed="fsdp")

    @jax.jit
    def gradient(x, w):
        def loss(w):
            with use_rules(rules):
                y = linear(equation, x, w)
            return jnp.sum(y * dy)

        return jax.grad(loss)(w)

    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        result = gradient(put(mesh, x, INPUT_AXES["D"], rules), put(mesh, w, axes, rules))
    assert result.sharding.spec == rules.spec(*axes)
    np.testing.assert_allclose(result, np.einsum("BTD,BTF->DF", x, dy), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("equation", ["BTD,DNH->BTNH", "BTD,DF->BTF"])
def test_moving_the_model_axis_changes_no_result(equation: str):
    x, w, _ = random_operands(equation)
    layer = Linear(equation, jnp.asarray(w)[None])
    first = jnp.einsum(equation, x, w)
    layer.move_model_axis_behind()
    graphdef, state = nnx.split(layer)
    moved = jax.tree.map(lambda w: w[0], state)
    assert moved.weight[...].shape == (w.shape[1], w.shape[0], *w.shape[2:])
    assert layer.stacked_axes == layer.weight.axes and layer.stacked_axes[2] == "embed"
    np.testing.assert_allclose(nnx.merge(graphdef, moved)(jnp.asarray(x)), first, rtol=1e-5, atol=1e-5)


def test_rms_norm():
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 5, 16)) * [[[1e-3]], [[30.0]]], rng.standard_normal(16)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight
    result = rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32), 1e-6)
    np.testing.assert_allclose(result, expected, rtol=2e-6, atol=1e-6)
    assert np.all(rms_norm(jnp.zeros((1, 1, 16)), jnp.ones(16), 1e-6) == 0)


def test_rms_norm_in_bf16_is_rounded_once():
    """The square of 1e25 overflows fp32 but 1e15 must not overflow, and the mean over 4096 must not be a bf16 sum."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4096)) * [[1], [1e15], [1e-2]], jnp.bfloat16)
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(4096), jnp.float32)
    result = rms_norm(x, weight, 1e-6)
    x64 = np.asarray(x, np.float64)
    exact = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(weight, np.float64)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(result, np.float64), exact, rtol=2.0**-8)


TINY = ModelConfig(
    hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, vocab_size=16,
    position_embedding="rope", pad_token_id=3,
)  # fmt: skip


def test_embedding_gradient_is_summed_in_fp32():
    """A token that comes 1000 times: in bf16 the sum would stop growing at 256."""
    embedding = Embedding(TINY, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(embedding)
    ids = jnp.full((1, 1000), 5)

    def total(state):
        return jnp.sum(nnx.merge(graphdef, state)(ids, jnp.dtype("bfloat16")))

    gradient = jax.grad(total)(state).weight[...]
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient[5], np.full(8, 1000.0))
    assert not gradient[:5].any() and not gradient[6:].any()


def test_embedding_of_padding_starts_at_zero():
    embedding = Embedding(TINY, rngs=nnx.Rngs(0))
    assert not embedding(jnp.array([[3]]), jnp.dtype("float32")).any()
    assert embedding(jnp.array([[2]]), jnp.dtype("float32")).all()


def test_mlp_is_swiglu():
    graphdef, state = nnx.split(MLP(TINY, ComputeConfig(), rngs=nnx.Rngs(0)))
    layer = jax.tree.map(lambda w: 20 * w[0], nnx.to_pure_dict(state))
    gate, up, down = (np.asarray(layer[name]["weight"], np.float64) for name in ("gate_proj", "up_proj", "down_proj"))
    x = np.random.default_rng(0).standard_normal((2, 3, 8))
    z = x @ gate
    result = nnx.merge(graphdef, layer)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(result, (z / (1 + np.exp(-z)) * (x @ up)) @ down, rtol=1e-4, atol=1e-5)
