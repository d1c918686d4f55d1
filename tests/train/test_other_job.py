"""A second kind of run through the same loop: a regression head learns on the hidden states of a frozen model."""

from __future__ import annotations

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from bc2_jax.config import CheckpointConfig, HealthConfig, TrainConfig
from bc2_jax.data.row_batches import RowBatches, ValidationBatches
from bc2_jax.data.row_file import BadRows
from bc2_jax.model.baichuan import init_params, split_model
from bc2_jax.sharding import spec
from bc2_jax.train import loop
from bc2_jax.train.distributed import Preempted
from bc2_jax.train.job import Job, Objective, Parts, abstract_state, init_state
from bc2_jax.train.metrics import read_metrics
from bc2_jax.train.optimizer import make_optimizer
from tests.train.poisoning import poison

frozen_models: list[dict] = []
"""Of the runs of this file, in their order."""


def make_regression_job(config: TrainConfig, start: loop.Start) -> Job:
    """Tells the position of each token from its hidden state: mean squared error of a linear head [D]."""
    graphdef, _, _ = split_model(config.model, config.compute)
    shape, sharding = (config.model.hidden_size,), NamedSharding(start.mesh, spec(None))
    optimizer, bad_rows = make_optimizer(config.optimizer), BadRows(0)
    frozen_models.append(init_params(config.model, config.seed, start.mesh))

    def loss(params, frozen, batch):
        model = nnx.merge(graphdef, frozen)
        h_BTD = model.hidden_states(batch["input_ids"], batch["positions"], batch["segment_ids"])
        found_BT = jnp.einsum("BTD,D->BT", h_BTD.astype(jnp.float32), params["head"]["weight"])
        squares_BT = jnp.square(found_BT - batch["positions"] / config.data.sequence_length)
        valid_BT = batch["segment_ids"] > 0
        total = jnp.sum(jnp.where(valid_BT, squares_BT, 0))
        return total, Parts({"squares": total, "tokens": jnp.sum(valid_BT, dtype=jnp.float32)}, {})

    return Job(
        objective=Objective(
            loss=loss,
            weight=lambda batch: jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32),
            metrics=lambda parts: {"loss": parts.sums["squares"] / jnp.maximum(parts.sums["tokens"], 1.0)},
        ),
        optimizer=optimizer,
        frozen=frozen_models[-1],
        abstract_state=abstract_state(
            {"head": {"weight": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)}}, optimizer
        ),
        init_state=lambda: init_state({"head": {"weight": jnp.zeros(shape, device=sharding)}}, optimizer),
        batches=RowBatches(config.data, start.mesh, config.num_steps, bad_rows),
        validation=ValidationBatches(config.data, start.mesh, bad_rows),
        begin=lambda workdir: None,
        finish=lambda checkpoint, params: None,
        flops_per_step=1,
    )


@pytest.fixture(scope="module")
def config(small_run) -> TrainConfig:
    return dataclasses.replace(small_run, checkpoint=CheckpointConfig(save_every=3, keep_last=9), verify_resume_steps=2)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> loop.RunResult:
    workdir = tmp_path_factory.mktemp("regression") / "whole"
    return loop.run(dataclasses.replace(config, workdir=str(workdir)), make_regression_job)


def test_only_the_head_is_trained_and_saved(config, finished):
    losses = [line["validation_loss"] for line in read_metrics(finished.workdir / "metrics.jsonl")[:: config.num_steps]]
    assert losses[-1] < 0.8 * losses[0]
    with jax.set_mesh(jax.tree.leaves(frozen_models[0])[0].sharding.mesh):
        expected = init_params(config.model, config.seed, jax.sharding.get_mesh())
    jax.tree.map(np.testing.assert_array_equal, frozen_models[0], expected)
    size = sum(p.stat().st_size for p in (finished.workdir / "checkpoints" / "8" / "params").rglob("*") if p.is_file())
    assert size < 20_000 < 4 * config.model.num_parameters()


def test_it_resumes_bit_for_bit_after_sigterm(config, finished, tmp_path, monkeypatch):
    run = dataclasses.replace(config, workdir=str(tmp_path / "run"), resume="auto")
    show = loop.ProgressDisplay.show

    def send(self, step, metrics):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        show(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(loop.ProgressDisplay, "show", send)
        with pytest.raises(Preempted, match="Stopped by SIGTERM: step 4 is saved"):
            loop.run(run, make_regression_job)
    assert loop.run(run, make_regression_job).fingerprint == finished.fingerprint


def test_it_rewinds_behind_a_spike(config, tmp_path, monkeypatch):
    """Positions no row has are targets that no head can tell."""
    poison({5: 100.0, 6: 100.0}, monkeypatch.setattr)
    health = HealthConfig(spike_deviations=50.0, spike_steps=2, spike_window=4)
    run = dataclasses.replace(config, workdir=str(tmp_path / "run"), health=health, num_steps=9, verify_resume_steps=0)
    result = loop.run(run, make_regression_job)
    metrics = {m["step"]: m for m in read_metrics(result.workdir / "metrics.jsonl")}
    # Steps 6 and 7 are high, and step 5 made the parameters of 6: back to 3, without the batches 4, 5 and 6.
    size = run.data.global_batch_size
    assert [metrics[s]["first_row"] for s in range(1, 10)] == [i * size for i in (0, 1, 2, 3, 7, 8, 9, 10, 11)]
    assert max(m["loss"] for s, m in metrics.items() if s) < 10


def test_a_further_evaluation_that_fails_costs_itself_alone(config, finished, tmp_path, caplog):
    def fail(step, params, progress):
        raise RuntimeError("nothing was answered")

    result = loop.run(
        dataclasses.replace(config, workdir=str(tmp_path / "run"), verify_resume_steps=0),
        lambda config, start: make_regression_job(config, start)._replace(examine=fail),
    )
    assert result.fingerprint == finished.fingerprint
    assert "further evaluations failed (nothing was answered); the run continues" in caplog.text
    losses = [[m["validation_loss"] for m in read_metrics(r.workdir / "metrics.jsonl") if "validation_loss" in m]
              for r in (result, finished)]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) > 1
