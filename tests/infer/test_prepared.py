"""A model laid out for decoding: its logits, and what of the caller's model is left."""

from __future__ import annotations

import dataclasses
import functools
import gc
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.config.lora import LoraConfig
from bc2_jax.infer.prepared import prepare
from bc2_jax.model.baichuan import Baichuan2, abstract_params, param_shardings, split_model
from bc2_jax.model.layout import scheme_of
from bc2_jax.model.lora import init_adapter, with_adapter

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


# ---------------------------------------------------------------------------------------------------------- quantized

BOUNDS = {"int8": 0.03, "int4": 0.35}
"""Root of the mean squared difference of logits over their standard deviation; of models with random weights, whose
layers do not outvote errors as those of a trained model do."""


def relative(found: jax.Array, exact: jax.Array) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(found) - np.asarray(exact)))) / np.std(np.asarray(exact)))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_logits_are_close(golden, scheme):
    model = nnx.merge(split_model(golden.config, ComputeConfig(dtype="float32"))[0], jax.device_put(golden.params))
    ids = jnp.asarray(golden.arrays["input_ids"], jnp.int32)
    prepared = prepare(model, quantize=scheme)
    merged = prepared.merge()
    assert scheme_of(model) is None and scheme_of(merged) == scheme
    layers, head = prepared.params["layers"], prepared.params["lm_head"]["weight"]
    weights = [module["weight"] for block in ("self_attn", "mlp") for module in layers[block].values()]
    assert len(weights) == 7 and {w.q.dtype for w in weights} == {jnp.dtype(scheme)} and head.q.dtype == jnp.int8
    assert prepared.params["embed_tokens"]["weight"].dtype == prepared.params["norm"]["weight"].dtype == jnp.float32
    logits = merged(ids)
    assert 0 < relative(logits, model(ids)) < BOUNDS[scheme]
    # What is quantized stays as it is: it is not rounded a second time, nor its axes moved.
    again = prepare(merged, donate=True, quantize=scheme)
    jax.tree.map(np.testing.assert_array_equal, unpacked(again.params), unpacked(prepared.params))
    np.testing.assert_array_equal(again.merge()(ids), logits)
    # Scoring takes the head's rows apart from the hidden states.
    h_BTD = merged.hidden_states(ids)
    np.testing.assert_allclose(h_BTD @ merged.lm_head.rows().T, logits, rtol=0, atol=1e-4)


def unpacked(params):
    """With int4 as int8, which numpy compares."""
    return jax.tree.map(lambda x: np.asarray(x.astype("int8") if x.dtype == "int4" else x), params)


WIDE = dataclasses.replace(CONFIG, hidden_size=256, num_attention_heads=4, intermediate_size=272)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_models_do_not_depend_on_the_mesh(mesh_of, scheme):
    """Neither their values, nor more than by the order of sums what they compute; whole or cut."""
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(Baichuan2(WIDE, rngs=nnx.Rngs(0)))[1]))
    graphdef = split_model(WIDE, ComputeConfig(dtype="float32"))[0]
    ids = jnp.asarray(np.random.default_rng(0).integers(3, WIDE.vocab_size, (4, 20)), jnp.int32)
    run = jax.jit(lambda prepared, ids: prepared.merge()(ids))
    expected = prepare(nnx.merge(graphdef, jax.tree.map(jnp.asarray, params)), quantize=scheme)
    logits = run(expected, ids)
    mesh = mesh_of(1, 2, 2)
    for whole in (False, True):
        model = nnx.merge(graphdef, jax.device_put(params, param_shardings(WIDE, mesh)))
        found = prepare(model, donate=True, whole=whole, quantize=scheme)
        assert all(x.is_deleted() for x in arrays(model) if x.ndim == 3)
        jax.tree.map(np.testing.assert_array_equal, unpacked(found.params), unpacked(expected.params))
        with jax.set_mesh(mesh):
            np.testing.assert_allclose(run(found, ids), logits, rtol=0, atol=2e-4)
        for value in (found.params["layers"]["mlp"][name]["weight"] for name in ("up_proj", "down_proj")):
            shares = [math.prod(x.sharding.shard_shape(x.shape)) / x.size for x in (value.q, value.scale)]
            assert shares[0] == (0.5 if whole else 0.25)
        # As compiling ahead of time does: the shapes alone.
        stored = abstract_params(WIDE, mesh, "float32")
        abstract = functools.partial(prepare, whole=whole, quantize=scheme)
        with jax.set_mesh(mesh):
            shapes = jax.eval_shape(lambda p, f=abstract: f(nnx.merge(graphdef, p)), stored)
        said, made = (jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), p.params) for p in (shapes, found))
        assert said == made


def test_an_adapter_stays_beside_quantized_weights():
    """Of an adapted weight only what was there before is rounded: the change is there in full."""
    config = LoraConfig(rank=4, targets=("W_pack", "down_proj"), dora=True)
    base = build("float32", "float32")
    params = nnx.to_pure_dict(nnx.split(base)[1])
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(
        lambda x: x + jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32),
        init_adapter(config, CONFIG, params, 0, None),
    )
    model = with_adapter(base, config, adapter)
    ids = jnp.asarray(rng.integers(3, CONFIG.vocab_size, (2, 12)), jnp.int32)
    prepared = prepare(model, quantize="int8")
    attention = prepared.params["layers"]["self_attn"]
    assert attention["q_proj"]["weight"].q.dtype == jnp.int8
    np.testing.assert_array_equal(
        attention["q_proj"]["lora_b"]["weight"], adapter["layers"]["self_attn"]["W_pack"]["lora_b"][:, :, 0]
    )
    difference = relative(prepared.merge()(ids), model(ids))
    assert 0 < difference < BOUNDS["int8"] < 0.3 * relative(base(ids), model(ids))
    assert scheme_of(prepare(prepared.merge()).merge()) == "int8"


def test_what_cannot_be_quantized_is_refused():
    model = build("float32", "float32")
    with pytest.raises(ValueError, match="quantize = 'int2' is not valid: it must be int8 or int4"):
        prepare(model, quantize="int2")
    with pytest.raises(ValueError, match="quantize = 'int4' is not valid: the weights of this model are int8 already"):
        prepare(prepare(model, quantize="int8").merge(), quantize="int4")
