"""A model laid out for decoding: its logits, and what of the caller's model is left."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.infer.prepared import prepare
from bc2_jax.model.baichuan import Baichuan2, param_shardings, split_model

CONFIG = ModelConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, position_embedding="rope",
    vocab_size=64, model_max_length=256,
)  # fmt: skip


def build(dtype: str, stored: str, mesh=None) -> Baichuan2:
    model = Baichuan2(CONFIG, ComputeConfig(dtype=dtype), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    params = jax.tree.map(lambda x: x.astype(stored), nnx.to_pure_dict(state))
    return nnx.merge(graphdef, jax.device_put(params, None if mesh is None else param_shardings(CONFIG, mesh)))


def arrays(model: Baichuan2) -> list[jax.Array]:
    return jax.tree.leaves(nnx.split(model)[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_the_model(golden, dtype):
    model = nnx.merge(split_model(golden.config, ComputeConfig(dtype=dtype))[0], jax.device_put(golden.params))
    prepared = prepare(model)
    params = prepared.params
    assert {x["weight"].dtype for x in (params["embed_tokens"], params["lm_head"])} == {jnp.dtype(dtype)}
    assert params["norm"]["weight"].dtype == jnp.float32
    L, D, N, H = model.layers.self_attn.q_proj.weight[...].shape
    assert params["layers"]["self_attn"]["q_proj"]["weight"].shape == (L, N, D, H)
    assert params["layers"]["mlp"]["down_proj"]["weight"].shape == model.layers.mlp.down_proj.weight[...].shape
    ids = jnp.asarray(golden.arrays["input_ids"], jnp.int32)
    # Bit for bit with jax 0.10; 0.11 fuses the normalisation of the head into its matmul.
    np.testing.assert_allclose(prepared.merge()(ids), model(ids), rtol=0, atol=2e-6)
    assert model.lm_head.normalize


@pytest.mark.parametrize("shape", [None, (1, 2, 2)])
@pytest.mark.parametrize(
    ("dtype", "stored"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
def test_donated_parameters_are_gone(mesh_of, shape, dtype, stored):
    mesh = None if shape is None else mesh_of(*shape)
    expected = jax.tree.map(np.asarray, prepare(build(dtype, stored, mesh)).params)
    gc.collect()
    others = {id(x) for x in jax.live_arrays()}
    model = build(dtype, stored, mesh)
    given = arrays(model)
    prepared = prepare(model, donate=True)
    kept = {id(x) for x in jax.tree.leaves(prepared.params)}
    assert all(x.is_deleted() for x in given if id(x) not in kept)
    # Only norms, and o_proj and down_proj where the dtype is right, are what they were.
    assert len(kept & {id(x) for x in given}) == (5 if dtype == stored else 3)
    del model, given
    gc.collect()
    assert {id(x) for x in jax.live_arrays()} - others == kept
    jax.tree.map(np.testing.assert_array_equal, prepared.params, expected)


def test_a_model_that_is_not_donated_stays(mesh_of):
    model = build("bfloat16", "float32", mesh_of(1, 2, 2))
    given = arrays(model)
    prepare(model)
    assert not any(x.is_deleted() for x in given)
    assert model.lm_head.normalize and model.layers.mlp.up_proj.equation == "BTD,DF->BTF"


def test_weights_are_whole_where_it_is_asked_for(mesh_of):
    """Along the model dimension; heads and feed-forward units stay cut."""
    mesh = mesh_of(1, 2, 2)
    cut, whole = (prepare(build("bfloat16", "float32", mesh), whole=whole).params["layers"] for whole in (False, True))
    for name, weight in whole["mlp"].items():
        assert [weight["weight"].sharding.spec.count(axis) for axis in ("tensor",)] == [1]
        assert cut["mlp"][name]["weight"].nbytes == weight["weight"].nbytes
        sizes = [x.addressable_shards[0].data.nbytes for x in (cut["mlp"][name]["weight"], weight["weight"])]
        assert sizes[1] == 2 * sizes[0]
    jax.tree.map(np.testing.assert_array_equal, cut, whole)
