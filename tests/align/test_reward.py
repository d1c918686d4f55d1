"""A reward model's loss against PyTorch's numbers, from packed pairs; margins, centring, adapters, meshes."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from bc2_jax.align import reward
from bc2_jax.config import (
    ComputeConfig,
    DataConfig,
    LoraConfig,
    OptimizerConfig,
    RewardConfig,
    RewardOptions,
    SourceConfig,
)
from bc2_jax.convert.hf_config import read_config
from bc2_jax.data.batch import IGNORED
from bc2_jax.data.row_values import RowValues, digest_rows
from bc2_jax.kernels.segments import TRUNK_BITS
from bc2_jax.model.baichuan import param_shardings
from bc2_jax.model.lora import init_adapter
from bc2_jax.model.reward import RewardModel, backbone_of
from bc2_jax.sharding import DEFAULT_RULES
from tests.convert.models import GOLDEN, read_params

REWARD = dict(np.load(GOLDEN / "align" / "reward.npz"))
PAIRS = json.loads((GOLDEN / "align" / "dpo_pairs.json").read_text())
MODEL = read_config(GOLDEN / "rope-tiny")
PARAMS = backbone_of(read_params(GOLDEN / "rope-tiny", MODEL)) | {"score": {"weight": REWARD["score_weight"]}}
CONFIG = RewardConfig(
    name="test", model=MODEL, num_steps=1, init_from="base",
    data=DataConfig(sources=(SourceConfig(path="rows"),), tokenizer="none", sequence_length=96, global_batch_size=4),
    compute=ComputeConfig(dtype="float32", attention="reference", remat="none", scan_layers=False),
    optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=0, decay_steps=9, weight_decay=0.1),
    reward=RewardOptions(centring=0.0),
)  # fmt: skip
PLACES = 3


class Part(NamedTuple):
    """What is looked at of a part of a source."""

    path: Path


def pack(places: list[list[int]], share: bool = True, length: int = 96) -> dict[str, np.ndarray]:
    """Rows of the pairs named, padded; each prompt once, or, unless they `share` it, once in each branch."""
    shape = len(places), length
    batch = {name: np.zeros(shape, np.int32) for name in ("input_ids", "segment_ids", "positions")}
    batch |= {"labels": np.full(shape, IGNORED, np.int32), "margin": np.zeros((len(places), PLACES), np.float32)}
    for row, numbers in enumerate(places):
        at = 0
        for n, number in enumerate(numbers, 1):
            pair = PAIRS[number]
            prompt, answers = pair["prompt"][:-1], [[196, *pair[kind]] for kind in ("chosen", "rejected")]
            parts = [(n, prompt, 0)] * share
            for k, answer in enumerate(answers, 1):
                ids = answer if share else prompt + answer
                parts.append((n + (k << TRUNK_BITS), ids, len(prompt) if share else 0))
            for segment, ids, first in parts:
                here = slice(at, at + len(ids))
                batch["input_ids"][row, here], batch["segment_ids"][row, here] = ids, segment
                batch["positions"][row, here] = first + np.arange(len(ids))
                at += len(ids)
            batch["margin"][row, n - 1] = REWARD["margin"][number]
    return batch


PACKED = [[4, 1], [0, 3], [2], []]


def with_(config: RewardConfig = CONFIG, **changes) -> RewardConfig:
    return dataclasses.replace(config, **changes)


@functools.cache
def compile_loss(config: RewardConfig):
    """(trained, frozen, batch [B, T]) -> ((loss, metrics), gradients)."""
    objective = reward.make_objective(config, PLACES)

    def mean(params, frozen, batch):
        value, parts = objective.loss(params, frozen, batch)
        weight = objective.weight(jax.tree.map(lambda x: x[None], batch))
        return value / weight, objective.metrics(parts) | {"weight": weight}

    return jax.jit(jax.value_and_grad(mean, has_aux=True))


def loss_and_gradients(config: RewardConfig, batch, params=PARAMS, frozen=None, mesh=None):
    """(metrics, gradients) of one batch."""
    compiled = compile_loss(config)
    if mesh is None:
        (loss, metrics), gradients = compiled(params, frozen or {}, batch)
    else:
        with jax.set_mesh(mesh):
            params = jax.device_put(params, param_shardings(MODEL, mesh, RewardModel))
            batch = {
                name: jax.device_put(
                    x, NamedSharding(mesh, DEFAULT_RULES.spec("batch", None if name == "margin" else "sequence"))
                )
                for name, x in batch.items()
            }
            (loss, metrics), gradients = compiled(params, {}, batch)
    assert float(loss) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    return {name: float(x) for name, x in metrics.items()}, jax.tree.map(np.asarray, gradients)


@functools.cache
def packed(centring: float = 0.0):
    return loss_and_gradients(with_(reward=RewardOptions(centring=centring)), pack(PACKED))


def norm(tree) -> float:
    return float(np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(tree))))


@pytest.mark.parametrize("kind", ["pairwise", "pairwise_margin", "pairwise_centred"])
@pytest.mark.parametrize("share", [True, False], ids=["prompts once", "prompts twice"])
def test_packed_pairs_have_pytorchs_loss_and_gradients(kind: str, share: bool):
    batch = pack(PACKED if share else [[4], [0], [1, 3], [2]], share)
    if kind != "pairwise_margin":
        batch["margin"][:] = 0
    centring = float(REWARD["centring"]) if kind == "pairwise_centred" else 0.0
    metrics, gradients = loss_and_gradients(with_(reward=RewardOptions(centring=centring)), batch)
    assert metrics["loss"] == pytest.approx(float(REWARD[f"loss/{kind}"]), abs=1e-5)
    assert metrics["pairs"] == metrics["weight"] == 5
    np.testing.assert_allclose(gradients["score"]["weight"], REWARD[f"grad_score/{kind}"], rtol=1e-4, atol=1e-5)
    assert norm(gradients) == pytest.approx(float(REWARD[f"grad_norm/{kind}"]), rel=1e-4)


def test_metrics_are_those_of_the_rewards():
    metrics, _ = packed()
    chosen, rejected = REWARD["chosen/rewards"], REWARD["rejected/rewards"]
    both = np.concatenate([chosen, rejected])
    expected = {
        "accuracy": float(REWARD["accuracy"]), "chosen_reward": chosen.mean(), "rejected_reward": rejected.mean(),
        "chosen_reward_std": chosen.std(), "rejected_reward_std": rejected.std(), "reward_mean": both.mean(),
        "reward_std": both.std(), "reward_margin": (chosen - rejected).mean(),
        "reward_margin_std": (chosen - rejected).std(), "margin_asked": REWARD["margin"].mean(),
        "largest_reward": np.abs(both).max(), "pairs": 5,
    }  # fmt: skip
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), abs=5e-5), name


def assert_close(ours, expected, tolerance: float) -> None:
    def compare(path, x, y):
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max(), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(compare, ours, expected)


def test_another_packing_on_a_mesh_equals_it(mesh_of):
    batch = pack([[2], [0, 1, 3], [], [4]])
    padding = batch["segment_ids"] == 0
    batch["input_ids"] = np.where(padding, np.arange(96) % MODEL.vocab_size, batch["input_ids"]).astype(np.int32)
    config = with_(reward=RewardOptions(centring=0.01))
    metrics, gradients = loss_and_gradients(config, batch, mesh=mesh_of(1, 2, 2, context=2))
    expected = packed(0.01)
    assert metrics == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    assert_close(gradients, expected[1], 1e-4)


def test_adapters_that_change_nothing_have_the_same_loss_and_the_scores_gradient():
    config = with_(lora=LoraConfig(rank=2, targets=("q_proj", "up_proj")))
    trained = {"adapter": init_adapter(config.lora, MODEL, PARAMS, 0, None), "score": PARAMS["score"]}
    metrics, gradients = loss_and_gradients(config, pack(PACKED), trained, backbone_of(PARAMS))
    expected = packed()
    assert metrics == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    assert_close(gradients["score"], expected[1]["score"], 1e-4)
    assert norm(gradients["adapter"]["layers"]["mlp"]["up_proj"]["lora_b"]) > 0


def test_a_batch_without_pairs_has_no_weight_and_no_nan():
    objective = reward.make_objective(CONFIG, PLACES)
    batch = pack([[], [], [], []])
    assert float(objective.weight(jax.tree.map(lambda x: x[None], batch))) == 0
    (_, parts), gradients = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))(PARAMS, {}, batch)
    assert all(np.isfinite(x) for x in objective.metrics(parts).values())
    assert norm(gradients) == 0


def test_margins_are_those_kept_beside_the_rows(tmp_path, monkeypatch):
    kept, other = pack([[0, 1], [2]]), pack([[3], [4]])
    folders = {name: tmp_path / name for name in ("kept", "none")}
    for folder in folders.values():
        folder.mkdir()
    values = np.array([[0.5, 1.5], [2, 0]], np.float32)
    RowValues(digest_rows(kept), values).save(folders["kept"] / "margins.npz")
    monkeypatch.setattr(reward, "list_parts", lambda path: [Part(folders[path])])
    sources = tuple(SourceConfig(path=path) for path in ("none", "kept", "kept"))
    config = with_(data=dataclasses.replace(CONFIG.data, sources=sources))
    rows = {name: np.concatenate([other[name], kept[name]]) for name in ("input_ids", "labels", "segment_ids")}
    found = reward.find_margins(config, PLACES)(rows)["margin"]
    np.testing.assert_array_equal(found, [[0, 0, 0], [0, 0, 0], [0.5, 1.5, 0], [2, 0, 0]])
