"""The whole model: parity with PyTorch, packing, padding, meshes, stacking, initialisation."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.model.baichuan import (
    init_params,
    param_shardings,
    place_tokens,
    split_model,
    stack_layers,
    unstack_layers,
)
from bc2_jax.sharding import DEFAULT_RULES
from tests.kernels.test_attention import make_branches
from tests.meshes import one_device_mesh

FP32 = ComputeConfig(dtype="float32", attention_block=8)
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2), (1, 2, 2, 2, 1), (1, 2, 1, 2, 2), (2, 1, 1, 1, 2)]


@functools.cache
def forward(config: ModelConfig, compute: ComputeConfig = FP32, hidden: bool = False):
    """jitted (params, input_ids, positions, segment_ids) -> logits, or logits and every hidden state."""
    graphdef, _, _ = split_model(config, compute)

    def run(params, *inputs):
        model = nnx.merge(graphdef, params)
        return (model(*inputs), model.every_hidden_state(*inputs)) if hidden else model(*inputs)

    return jax.jit(run)


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("attention", ["reference", "chunked"])
def test_logits_and_hidden_states_equal_pytorch(golden, attention: str, scan_layers: bool):
    compute = ComputeConfig(dtype="float32", attention=attention, attention_block=8, scan_layers=scan_layers)
    logits, hidden = forward(golden.config, compute, hidden=True)(golden.params, golden.arrays["input_ids"])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, golden.arrays["train_logits"], atol=2e-5)
    np.testing.assert_allclose(logits, golden.arrays["eval_logits"], atol=2e-5)
    np.testing.assert_allclose(hidden, golden.arrays["hidden_states"], atol=2e-5)


@pytest.mark.parametrize("attention", ["reference", "chunked"])
def test_left_padding_equals_pytorch(golden, attention: str):
    compute = ComputeConfig(dtype="float32", attention=attention, attention_block=8)
    ids, mask, expected = (golden.arrays[f"left_pad_{x}"] for x in ("input_ids", "attention_mask", "logits"))
    logits = np.asarray(forward(golden.config, compute)(golden.params, ids, None, mask))
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[mask == 1], expected[mask == 1], atol=2e-5)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_logits_on_a_mesh_equal_pytorch(golden, shape: tuple[int, ...], mesh_of):
    """Called as it stands, without jax.set_mesh: the mesh is that of the parameters."""
    mesh = mesh_of(*shape)
    params = jax.device_put(golden.params, param_shardings(golden.config, mesh))
    # 32 columns, which a mesh can cut; later tokens change nothing.
    ids = np.concatenate([golden.arrays["input_ids"][:, :32]] * 4)
    logits = forward(golden.config)(params, jax.device_put(ids, NamedSharding(mesh, DEFAULT_RULES.spec("batch"))))
    assert logits.sharding.spec == DEFAULT_RULES.spec("batch", "sequence", "vocab")
    np.testing.assert_allclose(logits, np.concatenate([golden.arrays["train_logits"][:, :32]] * 4), atol=2e-5)


def test_a_length_that_the_mesh_cannot_cut(golden, mesh_of):
    params = jax.device_put(golden.params, param_shardings(golden.config, mesh_of(1, 1, 1, 1, 2)))
    with pytest.raises(ValueError, match="input_ids has 33 columns; the mesh needs a multiple of 2"):
        forward(golden.config)(params, np.ones((2, 33), np.int32))


@pytest.mark.parametrize("call", ["jit", "eager"])
def test_inputs_need_not_be_laid_out(golden, call: str, mesh_of):
    """Plain arrays meet sharded parameters, as when a user calls a loaded model."""
    params = jax.device_put(golden.params, param_shardings(golden.config, mesh_of(2, 1, 2)))
    ids = golden.arrays["input_ids"]
    model = nnx.merge(split_model(golden.config, FP32)[0], params)
    match call:
        case "jit":
            logits = forward(golden.config)(params, ids)
        case "eager":
            logits = model(jnp.asarray(ids))
    assert jax.sharding.get_abstract_mesh().empty, "left as it was"
    np.testing.assert_allclose(logits, golden.arrays["train_logits"], atol=2e-5)


def test_parameters_on_another_kind_of_mesh_are_refused(golden):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    params = jax.device_put(golden.params, NamedSharding(mesh, P()))
    ids = jax.device_put(golden.arrays["input_ids"], NamedSharding(mesh, P()))
    with pytest.raises(ValueError, match="lacks the axes data, fsdp, .*; make it with bc2_jax.sharding.make_mesh"):
        forward(golden.config)(params, ids)


def test_bf16_is_close(golden):
    compute = ComputeConfig(dtype="bfloat16", attention_block=8)
    logits = forward(golden.config, compute)(golden.params, golden.arrays["input_ids"])
    assert logits.dtype == jnp.float32
    error = np.abs(np.asarray(logits) - golden.arrays["train_logits"])
    assert 1e-4 < error.max() < 0.15 and error.mean() < 0.02


# ------------------------------------------------------------------------------------------- packing and padding


def random_ids(config: ModelConfig, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, config.vocab_size, shape)


def test_packed_equals_unpacked(golden, mesh_of):
    """A document, and one with two branches, in a row with padding at the end; and each alone, the branches with their
    trunk. A mesh that cuts the row in tokens gives the same."""
    parts, T = ((1, 9), (2, 8), (2 + (1 << 24), 6), (2 + (2 << 24), 5)), 32
    ids, segments = random_ids(golden.config, 1, T), np.zeros((1, T), np.int32)
    segments[0, :28] = np.repeat(*zip(*parts, strict=True))
    places = [np.flatnonzero(segments[0] == 1)]
    places += [np.flatnonzero((segments[0] == 2) | (segments[0] == branch)) for branch, _ in parts[2:]]
    alone = np.zeros((3, T), np.int64)
    for row, here in zip(alone, places, strict=True):
        row[: len(here)] = ids[0, here]
    packed = np.asarray(forward(golden.config)(golden.params, ids, None, segments))
    unpacked = np.asarray(forward(golden.config)(golden.params, alone))
    for row, here in zip(unpacked, places, strict=True):
        np.testing.assert_allclose(packed[0, here], row[: len(here)], atol=2e-5)
    assert np.isfinite(packed).all()
    mesh = mesh_of(1, 1, 1, 1, 2)
    params = jax.device_put(golden.params, param_shardings(golden.config, mesh))
    placed = jax.device_put((ids, segments), NamedSharding(mesh, DEFAULT_RULES.spec("batch")))
    np.testing.assert_allclose(forward(golden.config)(params, placed[0], None, placed[1]), packed, atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_equals_unpadded(golden, side: str):
    ids, pad = random_ids(golden.config, 2, 20), 10
    where = slice(pad, None) if side == "left" else slice(None, -pad)
    padded, mask = np.zeros((2, 20 + pad), np.int64), np.zeros((2, 20 + pad), np.int32)
    padded[:, where], mask[:, where] = ids, 1
    result = np.asarray(forward(golden.config)(golden.params, padded, None, mask))
    np.testing.assert_allclose(result[:, where], forward(golden.config)(golden.params, ids), atol=2e-5)
    assert np.isfinite(result).all()


def test_later_tokens_change_nothing_before_them(golden):
    ids = random_ids(golden.config, 1, 20)
    changed = ids.copy()
    changed[:, 12] += 1
    a, b = (np.asarray(forward(golden.config)(golden.params, x)) for x in (ids, changed))
    np.testing.assert_array_equal(a[:, :12], b[:, :12])
    assert np.abs(a[:, 12:] - b[:, 12:]).max(-1).min() > 1e-4


def test_default_positions_restart_with_each_segment():
    segments = jnp.array([[0, 0, 1, 1, 1, 2, 2], [1, 1, 3, 3, 3, 0, 0]])
    tokens = place_tokens(jnp.zeros_like(segments), None, segments)
    np.testing.assert_array_equal(tokens.positions, [[0, 1, 0, 1, 2, 0, 1], [0, 1, 0, 1, 2, 0, 1]])
    positions, segments = make_branches(4, 60, np.random.default_rng(0))
    found = np.asarray(place_tokens(segments, None, jnp.asarray(segments)).positions)
    np.testing.assert_array_equal(found[segments > 0], positions[segments > 0])
    plain = place_tokens(jnp.zeros((2, 3), jnp.int32), None, None)
    np.testing.assert_array_equal(plain.positions, [[0, 1, 2]] * 2)
    np.testing.assert_array_equal(plain.segments, np.ones((2, 3)))
    given = place_tokens(jnp.zeros((1, 2), jnp.int32), jnp.array([[5, 9]]), None)
    np.testing.assert_array_equal(given.positions, [[5, 9]])
    assert tokens.positions.dtype == tokens.segments.dtype == given.positions.dtype == jnp.int32


def test_shapes_that_do_not_agree():
    ids = jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(ValueError, match=r"input_ids has shape \(3,\)"):
        place_tokens(ids[0], None, None)
    with pytest.raises(ValueError, match=r"positions has shape \(2, 2\).*\(2, 3\)"):
        place_tokens(ids, ids[:, :2], None)
    with pytest.raises(ValueError, match="segment_ids has shape"):
        place_tokens(ids, None, ids[:1])


# --------------------------------------------------------------------------------------------------- parameters


def test_unstack_and_stack_are_inverse(golden):
    stacked = golden.params["layers"]
    layers = unstack_layers(jax.tree.map(jnp.asarray, stacked))
    assert len(layers) == golden.config.num_hidden_layers
    np.testing.assert_array_equal(layers[1]["mlp"]["up_proj"]["weight"], stacked["mlp"]["up_proj"]["weight"][1])
    jax.tree.map(np.testing.assert_array_equal, stack_layers(layers), stacked)


def test_split_model_allocates_nothing_and_matches_the_checkpoint(golden):
    _, abstract, axes = split_model(golden.config)
    assert jax.tree.map(lambda x: x.shape, abstract) == jax.tree.map(lambda x: x.shape, golden.params)
    leaves = jax.tree.leaves(abstract)
    assert all(isinstance(x, jax.ShapeDtypeStruct) and x.dtype == jnp.float32 for x in leaves)
    assert axes["layers"]["self_attn"]["o_proj"]["weight"] == ("layers", "heads", "head_dim", "embed")


INIT = ModelConfig(
    hidden_size=256, intermediate_size=688, num_hidden_layers=2, num_attention_heads=4, vocab_size=4096,
    position_embedding="rope",
)  # fmt: skip


def test_initial_values():
    params = jax.tree.map(np.asarray, init_params(INIT, 0, one_device_mesh()))
    embedding, head = params["embed_tokens"]["weight"], params["lm_head"]["weight"]
    assert not embedding[INIT.pad_token_id].any() and embedding[1:].any(axis=1).all()
    matrices = {"embedding": embedding[1:]}
    for part in ("self_attn", "mlp"):
        matrices |= {name: layer["weight"] for name, layer in params["layers"][part].items()}
    for name, w in matrices.items():
        assert w.std() == pytest.approx(0.02, rel=0.01), name
        assert abs(w.mean()) < 5 * 0.02 / math.sqrt(w.size), name
        assert 3.5 * 0.02 < np.abs(w).max() < 7 * 0.02, f"{name} is not normal"
    assert 0.999 / 16 < np.abs(head).max() <= 1 / 16  # uniform on +-1 / sqrt(256)
    assert head.std() == pytest.approx(1 / 16 / math.sqrt(3), rel=0.01)
    for norm in (params["norm"], params["layers"]["input_layernorm"], params["layers"]["post_attention_layernorm"]):
        assert np.all(norm["weight"] == 1)
    q, k = params["layers"]["self_attn"]["q_proj"]["weight"], params["layers"]["self_attn"]["k_proj"]["weight"]
    assert (
        abs(np.corrcoef(q.ravel(), k.ravel())[0, 1]) < 0.02
        and abs(np.corrcoef(q[0].ravel(), q[1].ravel())[0, 1]) < 0.02
    )


def expected_max_squared(V: int) -> float:
    """Of V standard normals, by integration; about 19.7 for V = 125,696."""
    x = np.linspace(-10, 10, 40_001)
    below = np.array([0.5 * math.erfc(-t / math.sqrt(2)) for t in x]) ** V
    return float(np.sum((x[1:] ** 2 + x[:-1] ** 2) / 2 * np.diff(below)))


def test_initial_logits_are_standard_normal():
    """So the loss starts at ln V + 1/2: log E[exp(z)] = ln V + 1/2, and a label's logit is 0 on average."""
    params = init_params(INIT, 0, one_device_mesh())
    ids, labels = random_ids(INIT, 4, 256), np.random.default_rng(1).integers(0, INIT.vocab_size, (4, 256))
    logits = np.asarray(forward(INIT, ComputeConfig(dtype="float32"))(params, ids), np.float64)
    assert logits.std() == pytest.approx(1, abs=0.02)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = -np.take_along_axis(log_p, labels[..., None], -1).mean()
    assert loss == pytest.approx(math.log(INIT.vocab_size) + 0.5, abs=0.1)
    assert (logits.max(-1) ** 2).mean() == pytest.approx(expected_max_squared(INIT.vocab_size), rel=0.05)
    assert expected_max_squared(125_696) == pytest.approx(19.7, abs=0.1)


SMALL = ModelConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
    position_embedding="alibi",
)  # fmt: skip


def test_initial_values_do_not_depend_on_the_mesh(mesh_of):
    make = lambda seed, *shape: jax.tree.map(np.asarray, init_params(SMALL, seed, mesh_of(*shape)))  # noqa: E731  # as short as what it makes
    first = make(0, 1, 1, 1)
    jax.tree.map(np.testing.assert_array_equal, make(0, 2, 2, 2), first)
    assert (make(1, 1, 1, 1)["lm_head"]["weight"] != first["lm_head"]["weight"]).all()


@pytest.mark.parametrize("graph_mode", ["false"])
def test_without_nnx_graph_mode(graph_mode: str):
    """Flax's announced default, in a process of its own, because it is read at import."""
    root = Path(__file__).parents[2]
    program = f"""
import jax, numpy as np
from flax import nnx
from bc2_jax.config import ComputeConfig
from bc2_jax.convert.pretrained import load_params
from bc2_jax.model.baichuan import split_model
from bc2_jax.train.pretrain import make_loss
for folder in ("rope-tiny", "alibi-tiny"):
    folder = {str(root / "tests" / "golden")!r} + "/" + folder
    z, compute = np.load(folder + "/golden.npz"), ComputeConfig(dtype="float32")
    params, config = load_params(folder)
    logits = jax.jit(lambda p, ids: nnx.merge(split_model(config, compute)[0], p)(ids))(params, z["input_ids"])
    np.testing.assert_allclose(logits, z["train_logits"], atol=2e-5)
    batch = dict(input_ids=z["input_ids"], labels=z["input_ids"], positions=None, segment_ids=None)
    jax.jit(jax.grad(make_loss(config, compute), has_aux=True))(params, {{}}, batch)
print("fine")
"""
    environment = os.environ | {"NNX_GRAPH_MODE": graph_mode, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=root, capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr[-3000:]
