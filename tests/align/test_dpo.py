"""Preference tuning's loss and gradients against PyTorch's numbers; packing, meshes, accumulation, padding."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bc2_jax.align import dpo
from bc2_jax.align.preference import SMOOTHED
from bc2_jax.align.reference import REFERENCE, answer_log_probs
from bc2_jax.align.tuning import make_build
from bc2_jax.config import (
    ComputeConfig,
    DataConfig,
    DPOConfig,
    DPOOptions,
    LoraConfig,
    SourceConfig,
)
from bc2_jax.convert.hf_config import read_config
from bc2_jax.data.batch import make_put, row_to_example
from bc2_jax.data.row_file import BRANCH, START, TARGET
from bc2_jax.model.baichuan import param_shardings
from bc2_jax.train.job import Parts, make_eval_step
from tests.convert.models import GOLDEN, read_params

DPO = dict(np.load(GOLDEN / "align" / "dpo.npz"))
PAIRS = json.loads((GOLDEN / "align" / "dpo_pairs.json").read_text())
MODEL = read_config(GOLDEN / "rope-tiny")
POLICY = read_params(GOLDEN / "align" / "policy", MODEL)
BASE = read_params(GOLDEN / "rope-tiny", MODEL)
CONFIG = DPOConfig(
    name="test", model=MODEL, num_steps=1, init_from="base",
    data=DataConfig(sources=(SourceConfig(path="rows"),), tokenizer="none", sequence_length=80, global_batch_size=4),
    compute=ComputeConfig(dtype="float32", attention="reference", remat="none", scan_layers=False, loss_chunk=13),
)  # fmt: skip
PLACES = 3
PACKED = [[4, 1, 0], [2], [3], []]


def with_(config=CONFIG, **changes) -> DPOConfig:
    options = {f.name for f in dataclasses.fields(DPOOptions)}
    own = {name: x for name, x in changes.items() if name in options}
    rest = {name: x for name, x in changes.items() if name not in options}
    return dataclasses.replace(config, dpo=dataclasses.replace(config.dpo, **own), **rest)


def pack(places: list[list[int]], length: int = 80, pairs=PAIRS) -> dict[str, np.ndarray]:
    """Rows of the pairs named: the prompt, and both answers as its branches."""
    rows = np.zeros((len(places), length + 1), np.uint32)
    for row, numbers in zip(rows, places, strict=True):
        tokens: list[int] = []
        for pair in (pairs[number] for number in numbers):
            trunk = [pair["prompt"][0] | int(START), *pair["prompt"][1:-1]]
            answers = [[196 | int(BRANCH), *(t | int(TARGET) for t in pair[name])] for name in ("chosen", "rejected")]
            if len(pair["prompt"]) == 1:  # nothing is shared
                answers[0][0] |= int(START)
                trunk = []
            tokens += trunk + answers[0] + answers[1]
        row[: len(tokens)] = tokens
    return row_to_example(rows)


def with_reference(rows: dict[str, np.ndarray], places: list[list[int]]) -> dict[str, np.ndarray]:
    """`rows` with PyTorch's log-probabilities of the reference."""
    reference = np.zeros((len(places), PLACES, 2), np.float32)
    for row, numbers in zip(reference, places, strict=True):
        for pair, number in enumerate(numbers):
            row[pair] = DPO["chosen/reference_logps"][number], DPO["rejected/reference_logps"][number]
    return rows | {REFERENCE: reference.reshape(len(places), -1)}


BATCH = with_reference(pack(PACKED), PACKED)


def loss_and_gradients(config: DPOConfig, rows, mesh=None, params=POLICY):
    """(metrics, gradients) of a batch of rows, in as many parts as `config` says."""
    objective = dpo.make_objective(config, PLACES)

    def mean(params, batch):
        weight = objective.weight(batch)
        micros = [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(config.data.accumulation_steps)]
        found = [objective.loss(params, {}, micro) for micro in micros]
        parts = functools.reduce(Parts.plus, [parts for _, parts in found])
        return sum(value for value, _ in found) / weight, objective.metrics(parts)

    compiled = jax.jit(jax.value_and_grad(mean, has_aux=True))
    steps = config.data.accumulation_steps
    if mesh is None:
        batch = {name: jnp.asarray(x).reshape(steps, -1, x.shape[-1]) for name, x in rows.items()}
        (loss, metrics), gradients = compiled(params, batch)
    else:
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, param_shardings(MODEL, mesh))
            (loss, metrics), gradients = compiled(placed, make_put(config.data, mesh)(rows))
    assert float(loss) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    return {name: float(x) for name, x in metrics.items()}, jax.tree.map(np.asarray, gradients)


@functools.cache
def packed(loss: str = "sigmoid"):
    return loss_and_gradients(with_(loss=loss, label_smoothing=0.1 if loss in SMOOTHED else 0.0), BATCH)


def norm(tree) -> float:
    return float(np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(tree))))


def test_log_probabilities_of_packed_answers_are_pytorchs():
    @jax.jit
    def run(params, batch):
        return answer_log_probs(make_build(CONFIG)(params, {}, batch), batch, PLACES, 13)

    for params, name in ((POLICY, "policy"), (BASE, "reference")):
        found = np.asarray(run(params, pack(PACKED)))
        for row, numbers in enumerate(PACKED):
            for place in range(PLACES):
                number = numbers[place] if place < len(numbers) else None
                sums = (DPO[f"{answer}/{name}_logps"] for answer in ("chosen", "rejected"))
                expected = [0, 0] if number is None else [x[number] for x in sums]
                np.testing.assert_allclose(found[row, place], expected, atol=2e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "ipo", "ipo_mean"])  # of each pair, all: test_preference.py
def test_packed_pairs_have_pytorchs_loss_and_gradients(loss):
    metrics, gradients = packed(loss)
    name = "ipo_sum" if loss == "ipo" else loss
    assert metrics["loss"] == pytest.approx(float(DPO[f"loss/{name}"]), rel=2e-6, abs=1e-5)
    assert norm(gradients) == pytest.approx(float(DPO[f"grad_norm/{name}"]), rel=1e-4)


def test_metrics_are_means_over_pairs():
    metrics, _ = packed()
    lengths = {answer: DPO[f"{answer}/completion_mask"].sum(1) for answer in ("chosen", "rejected")}
    ratio = DPO["chosen/policy_logps"] - DPO["chosen/reference_logps"]
    expected = {
        "pairs": 5, "accuracy": DPO["accuracy"], "chosen_reward": DPO["chosen_rewards"].mean(),
        "rejected_reward": DPO["rejected_rewards"].mean(), "reward_margin": DPO["margins"].mean(),
        "chosen_log_prob": DPO["chosen/policy_logps"].mean(), "rejected_tokens": lengths["rejected"].mean(),
        "chosen_log_ratio": ratio.sum() / lengths["chosen"].sum(), "preference_loss": metrics["loss"],
        "chosen_cross_entropy": -(DPO["chosen/policy_logps"] / lengths["chosen"]).mean(),
        "tokens": lengths["chosen"].sum() + lengths["rejected"].sum(),
    }  # fmt: skip
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), abs=2e-5), name
    assert metrics["reference_distance"] > 0.05


def test_the_cross_entropy_of_chosen_answers_is_added():
    plain, gradients = packed()
    both, with_sft = loss_and_gradients(with_(sft_weight=0.5), BATCH)
    assert both["loss"] == pytest.approx(plain["loss"] + 0.5 * plain["chosen_cross_entropy"], rel=1e-6)
    assert both["preference_loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert norm(jax.tree.map(np.subtract, with_sft, gradients)) > 1e-2


@pytest.mark.parametrize("case", ["a mesh", "accumulation", "one pair a row", "rubbish in the padding"])
def test_the_same_pairs_give_the_same_loss_and_gradients(case, mesh_of):
    rows, mesh, config = BATCH, None, CONFIG
    if case == "a mesh":
        mesh = mesh_of(2, 1, 2, 1, 2)
    elif case == "accumulation":
        config = with_(data=dataclasses.replace(CONFIG.data, accumulation_steps=2))
    elif case == "one pair a row":
        rows = with_reference(pack([[i] for i in range(5)]), [[i] for i in range(5)])
    else:
        padding = BATCH["segment_ids"] == 0
        rows = BATCH | {"input_ids": np.where(padding, 77, BATCH["input_ids"])}
        rows[REFERENCE] = np.where(BATCH[REFERENCE] == 0, 150, BATCH[REFERENCE]).astype(np.float32)
    metrics, gradients = loss_and_gradients(config, rows, mesh)
    expected, expected_gradients = packed()
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert norm(jax.tree.map(np.subtract, gradients, expected_gradients)) < 2e-5 * norm(expected_gradients)


def test_nothing_is_learnt_without_pairs():
    empty = with_reference(pack([[], [], [], []]), [[], [], [], []])
    batch = {name: jnp.asarray(x)[None] for name, x in empty.items()}
    objective = dpo.make_objective(CONFIG, PLACES)
    assert float(objective.weight(batch)) == 0
    metrics = objective.metrics(jax.jit(make_eval_step(objective))(POLICY, {}, batch))
    assert all(np.isfinite(float(x)) for x in metrics.values())


def test_dropout_is_refused():
    with pytest.raises(ValueError, match=r"lora.dropout = 0.1 is not valid: it must be 0: with dropout the policy"):
        with_(lora=LoraConfig(rank=2, dropout=0.1))
