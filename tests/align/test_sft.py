"""Fine-tuning's loss against PyTorch's numbers; packing, meshes, accumulation, noise; a run that resumes."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from bc2_jax.align import sft
from bc2_jax.config import ComputeConfig, DataConfig, FineTuneConfig, OptimizerConfig, SourceConfig
from bc2_jax.convert.hf_config import read_config
from bc2_jax.data.batch import IGNORED
from bc2_jax.model.baichuan import param_shardings
from bc2_jax.sharding import DEFAULT_RULES
from bc2_jax.train.job import init_state, make_train_step
from bc2_jax.train.optimizer import make_optimizer
from tests.convert.models import GOLDEN, read_params

SFT = dict(np.load(GOLDEN / "align" / "sft.npz"))
MODEL = dataclasses.replace(read_config(GOLDEN / "rope-tiny"), z_loss_weight=0.0)
PARAMS = read_params(GOLDEN / "rope-tiny", MODEL)
CONFIG = FineTuneConfig(
    name="test", model=MODEL, num_steps=1, init_from="base",
    data=DataConfig(sources=(SourceConfig(path="rows"),), tokenizer="none", sequence_length=64, global_batch_size=4),
    compute=ComputeConfig(dtype="float32", attention="reference", remat="none", scan_layers=False, loss_chunk=13),
    optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=0, decay_steps=9, weight_decay=0.1),
)  # fmt: skip


def with_(config=CONFIG, **changes) -> FineTuneConfig:
    return dataclasses.replace(config, **changes)


def golden_samples() -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, targets) of the six, without their padding."""
    lengths = SFT["attention_mask"].sum(1)
    return [(SFT["input_ids"][i, :n], SFT["targets"][i, :n]) for i, n in enumerate(lengths)]


def pack(samples, places: list[list[int]], length: int = 64) -> dict[str, np.ndarray]:
    """Rows [len(places), length], each of the samples named, padded."""
    shape = len(places), length
    batch = {name: np.zeros(shape, np.int32) for name in ("input_ids", "segment_ids", "positions")}
    batch["labels"] = np.full(shape, IGNORED, np.int32)
    for row, numbers in enumerate(places):
        start = 0
        for segment, number in enumerate(numbers, 1):
            ids, targets = samples[number]
            here = slice(start, start + len(ids))
            batch["input_ids"][row, here], batch["labels"][row, here] = ids, targets
            batch["segment_ids"][row, here], batch["positions"][row, here] = segment, np.arange(len(ids))
            start += len(ids)
    return batch


sum_by_segment = jax.jit(sft.sum_by_segment)
PACKED = [[4, 1, 0], [5], [3, 2], []]  # number 4 has no target


def loss_and_gradients(config: FineTuneConfig, batch, mesh=None):
    """(metrics, gradients) of one batch [B, T]."""
    objective = sft.make_objective(config)

    def mean(params, batch):
        value, parts = objective.loss(params, {}, batch)
        return value / objective.weight(batch), objective.metrics(parts)

    compiled = jax.jit(jax.value_and_grad(mean, has_aux=True))
    if mesh is None:
        (loss, metrics), gradients = compiled(PARAMS, batch)
    else:
        with jax.set_mesh(mesh):
            params = jax.device_put(PARAMS, param_shardings(MODEL, mesh))
            tokens = NamedSharding(mesh, DEFAULT_RULES.spec("batch", "sequence"))
            (loss, metrics), gradients = compiled(params, jax.device_put(batch, tokens))
    assert float(loss) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    return {name: float(x) for name, x in metrics.items()}, jax.tree.map(np.asarray, gradients)


@functools.cache
def packed(weighting: str):
    return loss_and_gradients(with_(loss_weighting=weighting), pack(golden_samples(), PACKED))


def norm(tree) -> float:
    return float(np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(tree))))


def assert_close(ours, expected, tolerance: float) -> None:
    def compare(path, x, y):
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max(), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(compare, ours, expected)


def test_packed_rows_have_pytorchs_loss_and_gradients():
    metrics, gradients = packed("token")
    assert metrics["loss"] == pytest.approx(float(SFT["answers/loss"]), abs=1e-5)
    assert (metrics["tokens"], metrics["samples"]) == (SFT["answers/num_targets"].sum(), 5)
    assert norm(gradients) == pytest.approx(float(SFT["answers/grad/global_norm"]), rel=1e-4)
    expected = {name.removeprefix("answers/grad/norm/"): float(x) for name, x in SFT.items() if "/grad/norm/" in name}
    ours = {
        "lm_head.weight": gradients["lm_head"], "model.embed_tokens.weight": gradients["embed_tokens"],
        "model.norm.weight": gradients["norm"],
    }  # fmt: skip
    for i in range(MODEL.num_hidden_layers):
        layer = jax.tree.map(lambda x, i=i: x[i], gradients["layers"])
        attention = layer["self_attn"]
        ours |= {f"model.layers.{i}.mlp.{name}.weight": x for name, x in layer["mlp"].items()}
        ours |= {
            f"model.layers.{i}.{name}.weight": layer[name] for name in ("input_layernorm", "post_attention_layernorm")
        }
        ours[f"model.layers.{i}.self_attn.o_proj.weight"] = attention["o_proj"]
        ours[f"model.layers.{i}.self_attn.W_pack.weight"] = [attention[f"{name}_proj"] for name in "qkv"]
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert norm(ours[name]) == pytest.approx(value, rel=1e-4), name
    np.testing.assert_allclose(
        gradients["norm"]["weight"], SFT["answers/grad_value/model.norm.weight"], rtol=1e-4, atol=1e-6
    )


def test_weights_by_sample_are_pytorchs():
    metrics, _ = packed("sample")
    assert metrics["loss"] == pytest.approx(float(SFT["answers/loss_sample_weighted"]), abs=1e-5)
    assert (metrics["tokens"], metrics["samples"]) == (SFT["answers/num_targets"].sum(), 5)


def test_unpacked_and_cut_over_a_mesh_equals_packed(mesh_of):
    alone = pack(golden_samples(), [[0], [1], [2], [3], [4], [5], [], []])
    metrics, gradients = loss_and_gradients(with_(loss_weighting="sample"), alone, mesh_of(1, 2, 2, context=2))
    expected = packed("sample")
    assert metrics == pytest.approx(expected[0], rel=1e-5)
    assert_close(gradients, expected[1], 1e-4)


@pytest.fixture(scope="module")
def by_sample():
    """(state before, compiled step of batches [4, 1, T])."""
    config = with_(loss_weighting="sample")
    optimizer = make_optimizer(config.optimizer)
    step = make_train_step(sft.make_objective(config), optimizer, norms=False)
    return init_state(jax.device_put(PARAMS), optimizer), jax.jit(step)


def seeded(batch) -> dict[str, np.ndarray]:
    """[4, T] -> four parts of a row."""
    return {name: x[:, None] for name, x in batch.items()} | {"seed": np.arange(4, dtype=np.uint32)}


def test_accumulation_with_uneven_targets_is_none(by_sample):
    batch = pack(golden_samples(), [[5], [3, 2], [4, 1, 0], []])
    assert [int((row != IGNORED).sum()) for row in batch["labels"]] == [23, 30, 10, 0]
    state, step = by_sample
    after, parts = step(state, {}, seeded(batch))
    at_once, gradients = packed("sample")
    for name, value in at_once.items():
        assert float(parts[name]) == pytest.approx(value, rel=1e-5), name
    assert float(parts["grad_norm"]) == pytest.approx(norm(gradients), rel=1e-5)
    assert int(after.step) == 1 and not float(parts["empty_batch"])


def test_a_batch_without_targets_changes_nothing(by_sample):
    state, step = by_sample
    after, metrics = step(state, {}, seeded(pack(golden_samples(), [[4], [], [], [4]])))
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert float(metrics["empty_batch"]) == 1 and float(metrics["loss"]) == float(metrics["grad_norm"]) == 0


@settings(max_examples=20)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=5))
def test_sums_by_segment(segments: list[list[int]]):
    rest = [0] * (30 - sum(map(len, segments)))
    values = np.concatenate([*segments, rest]).astype(np.int32)
    ids = np.concatenate([*([i] * len(s) for i, s in enumerate(segments, 1)), rest]).astype(np.int32)
    expected = np.concatenate([*([sum(s)] * len(s) for s in segments), rest])
    assert np.asarray(sum_by_segment(values[None], ids[None]))[0].tolist() == expected.tolist()


def test_noise_is_bounded_by_each_samples_own_length(mesh_of):
    """NEFTune: alpha / sqrt(n * D), uniform, the same on every mesh, none on padding."""
    batch = pack(golden_samples(), PACKED) | {"seed": np.uint32(7)}

    def embed(batch):
        def none(ids, dtype):
            return sft.reshard(jnp.zeros((*ids.shape, 48), dtype), "batch", "sequence", None)

        noisy = sft.NoisyEmbedding(none, jax.random.key(batch["seed"]), 5.0, batch["segment_ids"])
        return noisy(batch["input_ids"], jnp.float32)

    noise = np.asarray(jax.jit(embed)(batch))
    mesh = mesh_of(1, 2, 2, context=2)
    with jax.set_mesh(mesh):
        tokens = NamedSharding(mesh, DEFAULT_RULES.spec("batch", "sequence"))
        placed = {name: jax.device_put(x, tokens if np.ndim(x) else None) for name, x in batch.items()}
        np.testing.assert_array_equal(np.asarray(jax.jit(embed)(placed)), noise)
    for row, numbers in enumerate(PACKED):
        for segment, number in enumerate(numbers, 1):
            bound = 5.0 / np.sqrt(len(golden_samples()[number][0]) * 48)
            own = noise[row][batch["segment_ids"][row] == segment]
            assert 0.95 * bound < np.abs(own).max() <= bound * (1 + 1e-6)
            assert own.var() == pytest.approx(bound**2 / 3, rel=0.15) and abs(own.mean()) < 0.1 * bound
    assert not noise[batch["segment_ids"] == 0].any()


def test_noise_is_of_training_only():
    batch = pack(golden_samples(), PACKED)
    build = sft.make_build(with_(neftune_alpha=5.0))
    params = jax.device_put(PARAMS)
    model = build(params, {}, batch)
    noisy = build(params, {}, batch | {"seed": jnp.uint32(1)})
    assert not isinstance(model.embed_tokens, sft.NoisyEmbedding)
    assert isinstance(noisy.embed_tokens, sft.NoisyEmbedding)
    h, clean = (m.embed_tokens(batch["input_ids"], jnp.float32) for m in (noisy, model))
    assert np.abs(np.asarray(h - clean)).max() > 1e-3
