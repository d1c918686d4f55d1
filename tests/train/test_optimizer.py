"""AdamW against a hand-written one in numpy, the schedule against its formula."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bc2_jax.config import OptimizerConfig
from bc2_jax.model.baichuan import split_model
from bc2_jax.train.optimizer import combine_optimizers, is_decayed, make_optimizer, make_schedule

CONFIG = OptimizerConfig(peak_learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=3, decay_steps=10)
PAPER = OptimizerConfig()


def learning_rate(config: OptimizerConfig, update: int) -> float:
    """Of the update with this number, from 0; the first has 1 / warmup_steps of the peak."""
    n = update + 1
    if n < config.warmup_steps:
        return config.peak_learning_rate * n / config.warmup_steps
    done = min(1.0, (n - config.warmup_steps) / (config.decay_steps - config.warmup_steps))
    swing = config.peak_learning_rate - config.min_learning_rate
    return config.min_learning_rate + swing * (1 + math.cos(math.pi * done)) / 2


def test_paper_settings():
    assert (PAPER.b1, PAPER.b2, PAPER.weight_decay, PAPER.clip_norm) == (0.9, 0.95, 0.1, 0.5)
    assert (PAPER.peak_learning_rate, PAPER.warmup_steps) == (2e-4, 2000)


@pytest.mark.parametrize(
    "config", [CONFIG, PAPER, dataclasses.replace(CONFIG, warmup_steps=0)], ids=["short", "paper", "none"]
)
def test_schedule(config: OptimizerConfig):
    schedule, warm, end = make_schedule(config), config.warmup_steps, config.decay_steps
    for update in {0, 1, max(warm - 2, 0), max(warm - 1, 0), warm, (warm + end) // 2, end - 2, end - 1, end, 3 * end}:
        assert float(schedule(update)) == pytest.approx(learning_rate(config, update), rel=1e-4), update
    if warm:
        assert float(schedule(warm - 1)) == pytest.approx(config.peak_learning_rate)
        assert float(schedule(0)) == pytest.approx(config.peak_learning_rate / warm)
    assert float(schedule(end - 1)) == float(schedule(2 * end)) == pytest.approx(config.min_learning_rate)


def make_params() -> dict:
    rng = np.random.default_rng(0)
    draw = lambda *shape: {"weight": rng.standard_normal(shape).astype(np.float32)}  # noqa: E731
    layers = {"input_layernorm": draw(2, 4), "mlp": {"up_proj": draw(2, 4, 6)}}
    return {"embed_tokens": draw(8, 4), "layers": layers, "norm": draw(4), "lm_head": draw(8, 4)}


def make_gradients(steps: int) -> list[dict]:
    """Every other one is small enough not to be clipped."""
    rng = np.random.default_rng(1)
    scales = [10.0 if step % 2 else 0.01 for step in range(steps)]
    return [
        jax.tree.map(lambda p, s=s: (s * rng.standard_normal(p.shape)).astype(np.float32), make_params())
        for s in scales
    ]


def numpy_adamw(config: OptimizerConfig, params: dict, gradients: list[dict]) -> list[dict]:
    leaves, treedef = jax.tree.flatten_with_path(params)
    decayed = ["norm" not in jax.tree_util.keystr(path) for path, _ in leaves]
    p = [np.asarray(x, np.float64) for _, x in leaves]
    m, v, results = [0 * x for x in p], [0 * x for x in p], []
    for update, gradient in enumerate(gradients):
        g = [np.asarray(x, np.float64) for x in jax.tree.leaves(gradient)]
        norm = math.sqrt(sum((x**2).sum() for x in g))
        g = [x * min(1.0, config.clip_norm / norm) for x in g]
        m = [config.b1 * a + (1 - config.b1) * x for a, x in zip(m, g, strict=True)]
        v = [config.b2 * a + (1 - config.b2) * x**2 for a, x in zip(v, g, strict=True)]
        for i in range(len(p)):
            m_hat, v_hat = m[i] / (1 - config.b1 ** (update + 1)), v[i] / (1 - config.b2 ** (update + 1))
            step = m_hat / (np.sqrt(v_hat) + config.eps) + config.weight_decay * decayed[i] * p[i]
            p[i] = p[i] - learning_rate(config, update) * step
        results.append(treedef.unflatten(p))
    return results


def run(config: OptimizerConfig, gradients: list[dict]) -> tuple[list[dict], optax.OptState]:
    optimizer = make_optimizer(config)
    params, results = jax.tree.map(jnp.asarray, make_params()), []
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = update(params, state, gradient)
        results.append(params)
    return results, state


@pytest.mark.parametrize("changes", [{}, {"weight_decay": 2.0, "clip_norm": 2.0}, {"eps": 0.1, "b1": 0.5, "b2": 0.7}])
def test_every_step_equals_numpy(changes: dict):
    config, gradients = dataclasses.replace(CONFIG, **changes), make_gradients(12)
    for ours, expected in zip(run(config, gradients)[0], numpy_adamw(config, make_params(), gradients), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), ours, expected)


def test_norms_and_only_norms_are_not_decayed(golden):
    paths = jax.tree.flatten_with_path(split_model(golden.config)[1])[0]
    spared = {
        jax.tree_util.keystr(path, simple=True, separator=".") for path, leaf in paths if not is_decayed(path, leaf)
    }
    assert spared == {"norm.weight", "layers.input_layernorm.weight", "layers.post_attention_layernorm.weight"}


def test_bf16_moments():
    """Half the memory; the same path within their precision, the arithmetic of a step still fp32."""
    gradients = make_gradients(10)
    exact, _ = run(CONFIG, gradients)
    close, state = run(dataclasses.replace(CONFIG, moment_dtype="bfloat16"), gradients)
    for name in ("mu", "nu"):
        assert {x.dtype for x in jax.tree.leaves(optax.tree.get(state, name))} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(close[-1])} == {jnp.dtype("float32")}
    # The first update comes from fp32 moments that were never stored.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), close[0], exact[0])
    travelled = sum(learning_rate(CONFIG, i) for i in range(10))
    for a, b in zip(jax.tree.leaves(close[-1]), jax.tree.leaves(exact[-1]), strict=True):
        assert 0 < np.abs(a - b).max() < 0.02 * travelled


def test_parts_are_clipped_and_moved_on_their_own_and_one_waits():
    """Each part is, bit for bit, what its optimizer alone makes of it from the update on for which it waited."""
    slow = dataclasses.replace(CONFIG, peak_learning_rate=2e-3, clip_norm=0.05)
    parts = {"actor": make_optimizer(CONFIG), "critic": make_optimizer(slow)}
    optimizer = combine_optimizers(parts, wait={"actor": 2})
    params = {name: make_params() for name in parts}
    state = optimizer.init(params)
    first = jax.tree_util.keystr(jax.tree.leaves_with_path(state)[0][0])
    assert first == ".count"  # `restore_state` takes the first count for that of all updates
    alone = {name: (make_params(), parts[name].init(make_params())) for name in parts}
    for number, gradients in enumerate(make_gradients(4)):
        both = {name: jax.tree.map(lambda x, f=f: f * x, gradients) for name, f in (("actor", 1.0), ("critic", 3.0))}
        updates, state = optimizer.update(both, state, params)
        params = optax.apply_updates(params, updates)
        for name in parts:
            if name == "actor" and number < 2:
                continue
            mine, own = alone[name]
            change, own = parts[name].update(both[name], own, mine)
            alone[name] = optax.apply_updates(mine, change), own
        jax.tree.map(np.testing.assert_array_equal, params, {name: alone[name][0] for name in parts})
    assert int(state.count) == 4
