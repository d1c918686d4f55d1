"""Adapters beside the weights: golden numbers of PEFT, meshes, dropout, merging, what a frozen base costs."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.config.lora import LORA_TARGETS, LoraConfig
from bc2_jax.convert.peft import load_peft
from bc2_jax.convert.pretrained import load_params
from bc2_jax.infer.prepared import prepare
from bc2_jax.model.baichuan import init_params, param_shardings, split_model
from bc2_jax.model.lora import (
    Adapter,
    abstract_adapter,
    equation_of,
    init_adapter,
    lost,
    merge,
    merge_weight,
    with_adapter,
)  # fmt: skip
from bc2_jax.sharding import reshard
from tests.meshes import one_device_mesh

GOLDEN = Path(__file__).parents[1] / "golden"
ALIGN = GOLDEN / "align"
TINY = ModelConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, position_embedding="alibi",
    vocab_size=32, model_max_length=64,
)  # fmt: skip
COMPUTE = ComputeConfig(dtype="float32", attention="reference", remat="none")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def rope():
    return load_params(GOLDEN / "rope-tiny")


@pytest.fixture(scope="module")
def tiny():
    """Parameters of TINY and token ids [8, 8]."""
    ids = np.random.default_rng(0).integers(3, TINY.vocab_size, (8, 8))
    params = jax.tree.map(np.asarray, init_params(TINY, 0, one_device_mesh()))
    return jax.tree.map(jnp.asarray, params), jnp.asarray(ids, jnp.int32)


def random_adapter(config: LoraConfig, model: ModelConfig = TINY) -> Adapter:
    rng = np.random.default_rng(1)

    def draw(path, s):
        values = 0.2 * rng.standard_normal(s.shape)
        return np.asarray(np.abs(values) + 0.5 if path[-1].key == "magnitude" else values, np.float32)

    return Adapter(config, jax.tree_util.tree_map_with_path(draw, abstract_adapter(config, model, None)))


def logits_of(params, config: LoraConfig | None, adapter, ids, key=None, compute=COMPUTE, model=TINY):
    module = nnx.merge(split_model(model, compute)[0], params)
    return (module if config is None else with_adapter(module, config, adapter, key))(ids)


def mean_loss(logits, ids):
    log_probs = jax.nn.log_softmax(reshard(logits, None, None, None))[:, :-1]
    return -jnp.take_along_axis(log_probs, ids[:, 1:, None], 2).mean()


@functools.cache
def forward(config: LoraConfig | None = None, model: ModelConfig = TINY):
    """jitted (params, adapter, ids, key) -> logits."""
    return jax.jit(lambda params, *rest: logits_of(params, config, *rest, model=model))


@functools.cache
def differentiate(config: LoraConfig, compute: ComputeConfig = COMPUTE, model: ModelConfig = TINY):
    """jitted (adapter, params, ids, key) -> (loss, logits), gradient of the adapter."""

    def loss(adapter, params, ids, key):
        logits = logits_of(params, config, adapter, ids, key, compute, model)
        return mean_loss(logits, ids), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def norm(tree, name: str = "") -> float:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return float(np.sqrt(sum(np.sum(np.square(x)) for path, x in leaves if name in jax.tree_util.keystr(path))))


@pytest.mark.parametrize("name", ["all", "rslora", "dora", "wpack"])
def test_logits_and_gradients_are_those_of_peft(rope, name: str):
    params, model = rope
    arrays = np.load(ALIGN / "lora.npz")
    adapter, ids = load_peft(ALIGN / f"adapter_{name}", model), jnp.asarray(arrays["input_ids"], jnp.int32)
    run = differentiate(adapter.config, COMPUTE, model)
    (loss, logits), gradient = run(adapter.params, params, ids, None)
    expected = arrays[f"{name}/merged_logits"]
    assert np.abs(expected - arrays["base_logits"]).max() > 1
    np.testing.assert_allclose(logits, expected, atol=5e-5)
    np.testing.assert_allclose(forward(None, model)(merge(params, adapter), None, ids, None), logits, atol=1e-5)
    if name != "wpack":
        np.testing.assert_allclose(logits, arrays[f"{name}/logits"], atol=5e-5)
        np.testing.assert_allclose(loss, arrays[f"{name}/loss"], atol=1e-5)
        for key, part in (("grad_norm", ""), ("grad_norm_A", "lora_a"), ("grad_norm_B", "lora_b")):
            np.testing.assert_allclose(norm(gradient, part), arrays[f"{name}/{key}"], rtol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_changes_nothing(tiny, dora: bool):
    params, ids = tiny
    config = LoraConfig(rank=3, alpha=5, targets=(*ALL[3:], "W_pack"), dora=dora, dropout=0.5)
    adapter = init_adapter(config, TINY, params, 0, None)
    a = adapter["layers"]["mlp"]["down_proj"]["lora_a"]
    assert np.abs(a).max() <= 24**-0.5 and np.std(a) == pytest.approx(24**-0.5 / 3**0.5, rel=0.2)
    logits = forward(config)(params, adapter, ids, jax.random.key(0))
    base = forward()(params, None, ids, None)
    if dora:  # a length over itself, each added up in its own order
        np.testing.assert_allclose(logits, base, atol=5e-6)
    else:
        np.testing.assert_array_equal(logits, base)


CONFIGS = [
    LoraConfig(rank=3, alpha=4, targets=ALL, dropout=0.3),
    LoraConfig(rank=3, alpha=4, targets=("W_pack", "o_proj"), ranks=(2, 3), alphas=(3, 5), dropout=0.3, dora=True),
]


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=["all", "wpack, dora"])
def test_sharded_equals_unsharded(tiny, mesh_of, config: LoraConfig, shape):
    params, ids = tiny
    adapter, key, mesh = random_adapter(config).params, jax.random.key(7), mesh_of(*shape)
    (loss, logits), gradient = differentiate(config)(adapter, params, ids, key)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_adapter(config, TINY, mesh))
    placed = jax.device_put(adapter, shardings)
    cut = jax.device_put(jax.tree.map(np.asarray, params), param_shardings(TINY, mesh))
    with jax.set_mesh(mesh):
        (cut_loss, cut_logits), cut_gradient = differentiate(config)(placed, cut, ids, key)
    np.testing.assert_allclose(cut_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(cut_logits, logits, atol=1e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(cut_gradient), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=5e-6, err_msg=jax.tree_util.keystr(path))
    assert all(jax.tree.leaves(jax.tree.map(lambda g, s: g.sharding.spec == s.spec, cut_gradient, shardings)))
    merged = merge(cut, Adapter(config, placed))
    assert jax.tree.map(lambda x: x.sharding.spec, merged) == jax.tree.map(lambda x: x.sharding.spec, cut)
    whole = merge(params, Adapter(config, adapter))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, whole)


def test_initial_values_do_not_depend_on_the_mesh_nor_on_other_targets(tiny, mesh_of):
    params, mesh = tiny[0], mesh_of(2, 2, 2)
    config = LoraConfig(rank=2, targets=LORA_TARGETS[3:], dora=True)
    cut = jax.device_put(jax.tree.map(np.asarray, params), param_shardings(TINY, mesh))
    whole = init_adapter(config, TINY, params, 3, None)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), init_adapter(config, TINY, cut, 3, mesh), whole
    )
    alone = init_adapter(LoraConfig(rank=2, targets=("down_proj",)), TINY, params, 3, None)["layers"]["mlp"]
    np.testing.assert_array_equal(alone["down_proj"]["lora_a"], whole["layers"]["mlp"]["down_proj"]["lora_a"])


@pytest.mark.parametrize("config", CONFIGS, ids=["all", "wpack, dora"])
def test_other_ways_to_run_give_the_same(tiny, config: LoraConfig):
    """Unrolled layers, attention in blocks and recomputed values with dropout; laid out for decoding without it."""
    params, ids = tiny
    adapter, key = random_adapter(config).params, jax.random.key(1)
    (_, expected), gradient = differentiate(config)(adapter, params, ids, key)
    other = ComputeConfig(dtype="float32", attention_block=8, scan_layers=False, remat="gate,up,down_proj")
    (_, logits), other_gradient = differentiate(config, other)(adapter, params, ids, key)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6), other_gradient, gradient)
    plain = forward(config)(params, adapter, ids, None)
    assert np.abs(plain - expected).max() > 1e-3  # which had dropout
    model = with_adapter(nnx.merge(split_model(TINY, COMPUTE)[0], params), config, adapter)
    np.testing.assert_allclose(jax.jit(lambda prepared: prepared.merge()(ids))(prepare(model)), plain, atol=1e-5)
    merged = forward()(merge(params, Adapter(config, adapter)), None, ids, None)
    np.testing.assert_allclose(merged, plain, atol=1e-5)


def test_dropout_takes_its_share_and_keeps_the_mean(tiny):
    """Over many keys the mean of the change is that without dropout: the change is linear in what is dropped."""
    params, ids = tiny
    config = LoraConfig(rank=2, targets=("down_proj",), dropout=0.25)
    adapter = random_adapter(config).params
    layer = with_adapter(nnx.merge(split_model(TINY, COMPUTE)[0], params), config, adapter, jax.random.key(0))
    graphdef, stacked = nnx.split(layer.layers.mlp.down_proj)
    module = nnx.merge(graphdef, jax.tree.map(lambda x: x[0], stacked))
    x = jnp.ones((64, 64, TINY.intermediate_size))
    kept = module._drop(x)
    assert set(np.unique(kept)) == {np.float32(0), np.float32(1 / 0.75)}
    assert float(kept.mean()) == pytest.approx(1, abs=0.01)


def test_frozen_weights_have_no_gradient():
    """Of three matmuls with a weight, the one that makes its gradient is not compiled."""
    model = ModelConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1, position_embedding="rope",
        vocab_size=64, model_max_length=64,
    )  # fmt: skip
    config, compute = LoraConfig(rank=1), ComputeConfig(dtype="float32", attention_block=64, remat="none")
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), split_model(model)[1])
    adapter = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), abstract_adapter(config, model, None))
    ids = jax.ShapeDtypeStruct((4, 64), jnp.int32)

    def loss(adapter, params, ids):
        return mean_loss(logits_of(params, config, adapter, ids, compute=compute, model=model), ids)

    flops = [
        jax.jit(jax.grad(loss, argnums=n)).lower(adapter, params, ids).compile().cost_analysis()["flops"]
        for n in (0, (0, 1))
    ]
    one_matmul_each = 2 * 4 * 64 * (4 * 64**2 + 3 * 64 * 128)  # XLA counts the body of the loop over layers once
    assert flops[1] - flops[0] > 0.95 * one_matmul_each


def test_what_bf16_loses(tiny):
    config = LoraConfig(rank=2, targets=("up_proj",))
    part = jax.tree.map(lambda x: x[0], random_adapter(config).params["layers"]["mlp"]["up_proj"])
    w = tiny[0]["layers"]["mlp"]["up_proj"]["weight"][0]

    def loss(w, factor: float = 1.0) -> float:
        exact = merge_weight(equation_of("up_proj"), w, part, factor * config.scaling_of("up_proj"))
        return float(lost(w, exact, exact.astype(w.dtype)))

    assert 0 < loss(w.astype(jnp.bfloat16)) < 0.01
    assert loss(w.astype(jnp.bfloat16), 1e-6) > 0.9  # less than half a unit in the last place
    assert loss(w) == 0


def test_a_second_adapter_is_refused(tiny):
    config = LoraConfig(rank=2, targets=("q_proj",))
    model = with_adapter(nnx.merge(split_model(TINY, COMPUTE)[0], tiny[0]), config, random_adapter(config).params)
    with pytest.raises(ValueError, match="an adapter on q_proj already"):
        with_adapter(model, config, random_adapter(config).params)
