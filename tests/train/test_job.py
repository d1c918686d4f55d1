"""One update on a mesh equals one update on a device; accumulation, donation, recompilation, evaluation."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from bc2_jax.config import (
    ComputeConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
)
from bc2_jax.data.batch import IGNORED
from bc2_jax.model.baichuan import init_params, param_shardings
from bc2_jax.sharding import DEFAULT_RULES
from bc2_jax.train.health import EMPTY
from bc2_jax.train.job import Objective, Parts, TrainState, init_state, make_eval_step, make_train_step
from bc2_jax.train.optimizer import make_optimizer
from bc2_jax.train.pretrain import make_objective
from tests.meshes import one_device_mesh

ROWS, T, V = 16, 12, 64
SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": V, "initializer_range": 0.2}
MODELS = {
    "rope": ModelConfig(**SIZES, num_attention_heads=4, position_embedding="rope", z_loss_weight=1e-2),
    # 12 heads: not a power of two, and slopes of both kinds on each of 4 devices.
    "alibi": ModelConfig(**SIZES, num_attention_heads=12, position_embedding="alibi", z_loss_weight=1e-2),
}
# data, fsdp, tensor, fsdp_inner, context
SHAPES = [(2, 2, 2), (1, 2, 4), (1, 2, 2, 2), (1, 2, 1, 2, 2), (2, 1, 2, 1, 2), (1, 2, 1, 1, 4)]
ROWS_ALONE = [(8, 1, 1), (1, 8, 1)]
"""Meshes that cut neither heads nor sequences: what the models differ in is whole on each device."""


def make_config(model: ModelConfig, accumulation: int = 1, **compute) -> TrainConfig:
    return TrainConfig(
        name="test", model=model, num_steps=10,
        data=DataConfig(
            sources=(SourceConfig(path="rows"),), tokenizer="t", sequence_length=T, global_batch_size=ROWS,
            accumulation_steps=accumulation,
        ),
        compute=ComputeConfig(**({"dtype": "float32", "attention_block": 5, "loss_chunk": 7} | compute)),
        mesh=MeshConfig(fsdp=-1),
        # eps well above rounding: where a gradient is 0 but for rounding, Adam's first step would be its sign. Not
        # clipped: that would hide a wrong scale of the gradients.
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=1, decay_steps=10, eps=1e-3, clip_norm=1e3),
    )  # fmt: skip


@functools.cache
def numpy_batch() -> dict[str, np.ndarray]:
    """[B, T]: two documents and padding in each row. Far more targets are ignored in the first half of the rows."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, V, (ROWS, T + 1))
    segments = np.repeat([[1] * 5 + [2] * 6 + [0]], ROWS, 0)
    ignored = rng.random((ROWS, T)) < np.where(np.arange(ROWS) < ROWS // 2, 0.8, 0.1)[:, None]
    labels = np.where(ignored | (segments == 0), IGNORED, ids[:, 1:])
    positions = np.repeat([[*range(5), *range(6), 0]], ROWS, 0)
    batch = {"input_ids": ids[:, :-1], "labels": labels, "segment_ids": segments, "positions": positions}
    return {name: x.astype(np.int32) for name, x in batch.items()}


def place_batch(mesh, accumulation: int) -> dict[str, jax.Array]:
    sharding = NamedSharding(mesh, DEFAULT_RULES.spec(None, "batch", "sequence"))
    return {k: jax.device_put(x.reshape(accumulation, -1, T), sharding) for k, x in numpy_batch().items()}


@functools.cache
def numpy_params(model: ModelConfig) -> dict:
    """Made once: on every mesh they are the same (test_baichuan.py), but each would be compiled."""
    return jax.tree.map(np.asarray, init_params(model, 0, one_device_mesh()))


def place_state(config: TrainConfig, mesh) -> TrainState:
    params = jax.device_put(numpy_params(config.model), param_shardings(config.model, mesh))
    return init_state(jax.tree.map(jnp.copy, params), make_optimizer(config.optimizer))


def step_of(config: TrainConfig):
    """The training step, not compiled."""
    return make_train_step(make_objective(config.model, config.compute), make_optimizer(config.optimizer))


class Update(NamedTuple):
    params: dict
    mu: dict
    """First moment: a tenth of the gradient."""
    metrics: dict


@functools.cache
def update(config: TrainConfig, mesh) -> Update:
    batch = place_batch(mesh, config.data.accumulation_steps)
    with jax.set_mesh(mesh):
        state = place_state(config, mesh)
        state, metrics = jax.jit(step_of(config))(state, {}, batch)
    specs = jax.tree.map(lambda x: x.sharding.spec, state.params)
    assert specs == jax.tree.map(lambda s: s.spec, param_shardings(config.model, mesh))
    found = state.params, optax.tree.get(state.opt_state, "mu"), metrics
    return Update(*(jax.tree.map(np.asarray, tree) for tree in found))


def assert_same(a: Update, b: Update):
    for name in a.metrics:
        np.testing.assert_allclose(a.metrics[name], b.metrics[name], rtol=1e-5, err_msg=name)

    def same_moment(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())

    jax.tree.map(same_moment, a.mu, b.mu)
    # An entry of the parameters moves by at most the learning rate, 1e-2.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), a.params, b.params)


# Each model and, but for ROWS_ALONE, each mesh with each number of accumulation steps.
@pytest.mark.parametrize(
    ("model", "shape", "accumulation"),
    [(model, shape, 1 + (i + j) % 2) for i, model in enumerate(MODELS) for j, shape in enumerate(SHAPES)]
    + [("rope", shape, 1 + j) for j, shape in enumerate(ROWS_ALONE)],
    ids=str,
)
def test_sharded_equals_unsharded(model: str, shape, accumulation: int, mesh_of):
    """With accumulation too, against one pass over the whole batch: every target weighs the same."""
    expected = update(make_config(MODELS[model]), mesh_of(1, 1, 1))
    assert_same(update(make_config(MODELS[model], accumulation), mesh_of(*shape)), expected)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_update_is_worth_comparing(model: ModelConfig, mesh_of):
    """Every parameter has a gradient and moves; the loss is made of its parts."""
    result, start = update(make_config(model), mesh_of(1, 1, 1)), numpy_params(model)
    for before, after, mu in zip(*(jax.tree.leaves(x) for x in (start, result.params, result.mu)), strict=True):
        assert np.abs(after - before).max() > 1e-3 and np.abs(mu).max() > 1e-4
    assert result.metrics["tokens"] == (numpy_batch()["labels"] != IGNORED).sum()
    assert result.metrics["learning_rate"] == pytest.approx(1e-2)
    parts = result.metrics["cross_entropy"] + 1e-2 * result.metrics["max_z"]
    assert result.metrics["loss"] == pytest.approx(parts, rel=1e-6)


@pytest.mark.parametrize(("shape", "accumulation"), [((1, 1, 1), 1), ((2, 2, 2), 2)], ids=str)
def test_evaluation_is_the_loss_before_the_update(shape, accumulation: int, mesh_of):
    config, mesh = make_config(MODELS["rope"], accumulation), mesh_of(*shape)
    with jax.set_mesh(mesh):
        params = place_state(config, mesh).params
        objective = make_objective(config.model, config.compute)
        parts = jax.jit(make_eval_step(objective))(params, {}, place_batch(mesh, accumulation))
    result, trained = objective.metrics(parts), update(config, mesh).metrics
    for name in result:
        np.testing.assert_allclose(result[name], trained[name], rtol=2e-6, err_msg=name)


def test_accumulation_on_one_device(mesh_of):
    one, two = (update(make_config(MODELS["rope"], n), mesh_of(1, 1, 1)) for n in (1, 2))
    assert_same(two, one)


def test_unscanned_bf16_is_close(mesh_of):
    """The same layers unrolled, in the compute dtype of a real run."""
    expected = update(make_config(MODELS["rope"]), mesh_of(1, 1, 1))
    result = update(make_config(MODELS["rope"], dtype="bfloat16", scan_layers=False), mesh_of(2, 2, 2))
    assert result.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=5e-3)
    assert result.metrics["grad_norm"] == pytest.approx(expected.metrics["grad_norm"], rel=2e-2)
    assert {x.dtype for x in jax.tree.leaves(result.params)} == {np.dtype("float32")}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_second_call_neither_recompiles_nor_copies(accumulation: int, mesh_of):
    mesh, config = mesh_of(2, 2, 2), make_config(MODELS["rope"], accumulation)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, moment_dtype="bfloat16"))
    batch = place_batch(mesh, accumulation)
    with jax.set_mesh(mesh):
        state = place_state(config, mesh)
        step, losses = jax.jit(step_of(config), donate_argnums=0), []
        layout = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), state.params)
        for _ in range(4):
            previous, (state, metrics) = state, step(state, {}, batch)
            losses.append(float(metrics["loss"]))
            assert all(x.is_deleted() for x in jax.tree.leaves((previous.params, optax.tree.get(previous, "mu"))))
    assert step._cache_size() == 1
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), state.params) == layout
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1, "the same batch again is learnt"
    assert int(state.step) == 4


def test_a_batch_without_targets_changes_nothing_but_decay(mesh_of):
    config, mesh = make_config(MODELS["rope"]), mesh_of(1, 1, 1)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, weight_decay=0.0))
    batch = place_batch(mesh, 1)
    with jax.set_mesh(mesh):
        batch["labels"] = jnp.full_like(batch["labels"], IGNORED)
        step = jax.jit(step_of(config))
        state, metrics = step(place_state(config, mesh), {}, batch)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["tokens"] == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, numpy_params(config.model))


@pytest.mark.parametrize(("weight", "expected"), [(0.25, 8.0), (4.0, 0.5), (0.0, 2.0)])
def test_the_loss_is_divided_by_any_positive_weight(weight: float, expected: float):
    """Also by one below 1; a batch of weight 0 is not divided."""

    def loss(params, frozen, batch):
        value = jnp.sum(params["x"] * frozen["y"]) * batch["z"].sum()
        return value, Parts({"value": value}, {})

    objective = Objective(loss, lambda batch: jnp.float32(weight), lambda parts: {"loss": parts.sums["value"]})
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1e3))
    state = init_state({"x": jnp.ones(1)}, optimizer)
    batch = {"z": jnp.ones((1, 1, 1))}
    _, metrics = jax.jit(make_train_step(objective, optimizer))(state, {"y": jnp.full(1, 2.0)}, batch)
    assert float(metrics["grad_norm"]) == expected


def test_several_updates_in_one_step():
    """They are those of as many steps; one that is not finite, or has nothing to learn from, is left out alone."""

    def loss(params, frozen, batch):
        errors = params["w"] - batch["y"]
        return jnp.sum(batch["n"] * errors**2), Parts({"loss": jnp.sum(errors**2)}, {"most": jnp.max(batch["y"])})

    objective = Objective(
        loss=loss,
        weight=lambda batch: jnp.sum(batch["n"]),
        metrics=lambda parts: {"loss": parts.sums["loss"], "most": parts.maxima["most"]},
    )
    optimizer = make_optimizer(OptimizerConfig(peak_learning_rate=0.1, min_learning_rate=0.01, warmup_steps=1))
    start = init_state({"w": jnp.ones(3)}, optimizer)
    y = jnp.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9], [1, jnp.nan, 0], [3, 3, 1], [2, 2, 2]])
    n = jnp.array([[1.0] * 3] * 4 + [[0.0] * 3] * 2)
    for stop, count in ((4, 2), (6, 3)):
        batch = {"y": y[:stop], "n": n[:stop]}
        state, metrics = jax.jit(make_train_step(objective, optimizer, updates=count))(start, {}, batch)
        expected, single = start, jax.jit(make_train_step(objective, optimizer))
        each = []
        for group in range(count):
            expected, found = single(expected, {}, jax.tree.map(lambda x, g=group: x[2 * g : 2 * g + 2], batch))
            each.append(found)
        jax.tree.map(np.testing.assert_array_equal, state, expected)
        assert int(state.step) == 1  # of the first group: the second has a NaN, the third no weight
        assert np.isnan(metrics["loss"]) and np.isnan(metrics["grad_norm"]) and not metrics[EMPTY]
        assert float(metrics["learning_rate"]) == float(each[-1]["learning_rate"])
        assert float(metrics["batch_checksum"]) != float(each[0]["batch_checksum"])
    clean = jax.jit(make_train_step(objective, optimizer, updates=2))(start, {}, {"y": y[:2], "n": n[:2]})
    assert int(clean[0].step) == 2 and float(clean[1]["most"]) == 6
