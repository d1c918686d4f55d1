"""Skipped updates, runs that stop and save their batch, rewinds after spikes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.config import CheckpointConfig, HealthConfig, MeshConfig
from bc2_jax.data import row_batches
from bc2_jax.data.batch import FIELDS, make_put
from bc2_jax.data.loader import make_train_loader
from bc2_jax.model.baichuan import init_params
from bc2_jax.sharding import make_mesh
from bc2_jax.train import health, job, loop, pretrain, resume
from bc2_jax.train.distributed import Preempted
from bc2_jax.train.expendable import Expendable
from bc2_jax.train.metrics import read_metrics
from bc2_jax.train.optimizer import make_optimizer
from tests.compiler import OPTIMIZED
from tests.train import poisoning
from tests.train.poisoning import POISON


@pytest.fixture
def poisoned(monkeypatch):
    """poisoned({data index: factor}) makes the loss of those batches that many times as large."""

    def poison(factors: dict[int, float]):
        poisoning.poison(factors, monkeypatch.setattr)

    return poison


def lines(path) -> dict[int, dict]:
    return {m["step"]: m for m in read_metrics(path / "metrics.jsonl") if m["step"]}


def events(path) -> list[dict]:
    return [json.loads(line) for line in (path / "health.jsonl").read_text().splitlines()]


def placed(config, mesh):
    loader = make_train_loader(config.data, process_index=0, process_count=1)
    return make_put(config.data, mesh)(loader[0])


def start(config, mesh):
    """The state before the first update, and the step, not compiled."""
    optimizer = make_optimizer(config.optimizer)
    objective = pretrain.make_objective(config.model, config.compute)
    state = job.init_state(init_params(config.model, 0, mesh), optimizer)
    return state, job.make_train_step(objective, optimizer, config.health.norms)


def test_a_finite_update_is_the_one_without_the_check(small_run, monkeypatch, mesh_of):
    """Bit for bit, as the optimising compiler fuses it."""
    config = dataclasses.replace(
        small_run, health=HealthConfig(norms=False), mesh=MeshConfig(),
        # Not the chunked attention: this is about the update, and each of its loops is compiled for seconds.
        compute=dataclasses.replace(small_run.compute, attention="reference"),
        model=dataclasses.replace(small_run.model, num_hidden_layers=1),
        data=dataclasses.replace(small_run.data, accumulation_steps=1),
    )  # fmt: skip
    mesh = mesh_of(1, 1, 1)

    def run():
        with jax.set_mesh(mesh):
            state, train_step = start(config, mesh)
            for _ in range(2):
                state, metrics = jax.jit(train_step, compiler_options=OPTIMIZED)(state, {}, placed(config, mesh))
        return jax.tree.map(np.asarray, state), {name: float(x) for name, x in metrics.items()}

    checked, metrics = run()
    assert math.isfinite(metrics["loss"]) and "param_norm" not in metrics
    monkeypatch.setattr(job, "keep_unless", lambda finite, new, old: new)
    plain, plain_metrics = run()
    jax.tree.map(np.testing.assert_array_equal, checked, plain)
    assert metrics == plain_metrics and int(plain.step) == 2


def test_an_update_that_is_not_finite_changes_nothing(small_run, poisoned):
    poisoned({})
    mesh = make_mesh(small_run.mesh)
    with jax.set_mesh(mesh):
        state, train_step = start(small_run, mesh)
        train_step = jax.jit(train_step)
        batch = placed(small_run, mesh)
        state, good = train_step(state, {}, batch)
        bad = batch | {"positions": jnp.full_like(batch["positions"], POISON)}
        after, metrics = train_step(state, {}, bad)
    assert math.isnan(metrics["loss"]) and not math.isfinite(metrics["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert int(after.step) == 1 and metrics["update_ratio"] == 0 and metrics["param_norm"] == good["param_norm"]


def test_metrics_of_norms_are_those_of_the_arrays(small_run):
    mesh = make_mesh(small_run.mesh)
    with jax.set_mesh(mesh):
        before, train_step = start(small_run, mesh)
        after, metrics = jax.jit(train_step)(before, {}, placed(small_run, mesh))
    old, new = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(s.params)]) for s in (before, after))
    norm = np.linalg.norm(new.astype(np.float64))
    rows = np.linalg.norm(np.asarray(after.params["lm_head"]["weight"], np.float64), axis=-1)
    expected = {
        "param_norm": norm, "update_ratio": np.linalg.norm(new.astype(np.float64) - old) / norm,
        "head_row_norm_min": rows.min(), "head_row_norm_max": rows.max(), "head_row_norm_mean": rows.mean(),
    }  # fmt: skip
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-4), name


def test_the_checksum_is_that_of_the_rows_on_any_mesh(small_run, mesh_of):
    rows = make_train_loader(small_run.data, process_index=0, process_count=1)[0]

    def on(mesh, rows, accumulation):
        config = dataclasses.replace(
            small_run, data=dataclasses.replace(small_run.data, accumulation_steps=accumulation)
        )
        with jax.set_mesh(mesh):
            return int(jax.jit(health.batch_checksum)(make_put(config.data, mesh)(rows)))

    expected = on(mesh_of(2, 2, 2), rows, 2)
    assert expected != 0
    assert on(mesh_of(1, 2, 1, 2, 2), rows, 1) == on(mesh_of(1, 1, 1), rows, 1) == expected
    assert on(mesh_of(1, 1, 1), {name: x[::-1] for name, x in rows.items()}, 1) == expected
    for name in FIELDS:
        changed = rows[name].copy()
        changed[3, 5] ^= 1 << 9
        assert on(mesh_of(1, 1, 1), rows | {name: changed}, 1) != expected
    swapped = {name: np.concatenate([x[:, 1:2], x[:, :1], x[:, 2:]], 1) for name, x in rows.items()}
    assert on(mesh_of(1, 1, 1), swapped, 1) != expected


def test_the_checksum_covers_a_field_of_each_part_of_a_batch(small_run):
    rows = make_train_loader(small_run.data, process_index=0, process_count=1)[0]
    batch = {name: x.reshape(2, -1, x.shape[-1]) for name, x in rows.items()}
    seeds = [np.array(values, np.uint32) for values in ((1, 2), (2, 1), (1, 3))]
    assert len({int(health.batch_checksum(batch | {"seed": s})) for s in seeds}) == 3


def test_the_checksum_covers_numbers_beside_rows_on_any_mesh(small_run, mesh_of):
    """Of any width, also that of the rows themselves."""
    rows = make_train_loader(small_run.data, process_index=0, process_count=1)[0]
    size, length = rows["labels"].shape

    def on(mesh, values):
        with jax.set_mesh(mesh):
            return int(jax.jit(health.batch_checksum)(make_put(small_run.data, mesh)(rows | {"beside": values})))

    for width in (2, length):
        values = np.random.default_rng(0).normal(size=(size, width)).astype(np.float32)
        changed = values.copy()
        changed[3, 1] = np.nextafter(changed[3, 1], np.float32(9))
        expected = on(mesh_of(1, 1, 1), values)
        assert on(mesh_of(1, 2, 1, 2, 2), values) == expected != on(mesh_of(1, 1, 1), changed)


def test_a_batch_without_targets_is_told_and_is_no_loss_to_compare_with(tmp_path):
    said: list[str] = []
    monitor = health.HealthMonitor(HealthConfig(spike_deviations=5.0), tmp_path, said.append, Expendable())
    monitor.observe(3, {"loss": 0.0, "grad_norm": 0.0, "empty_batch": 1.0})
    assert said == ["step 3  its batch has no target: no update"]
    assert [e["event"] for e in events(tmp_path)] == ["empty batch"] and monitor.state()["losses"] == []


def test_by_default_a_run_stops_at_the_first_and_saves_its_batch(small_run, poisoned, tmp_path):
    poisoned({5: math.nan})
    config = dataclasses.replace(small_run, workdir=str(tmp_path))
    with pytest.raises(
        FloatingPointError, match=r"loss is nan at step 6: the run stops; .*checkpoints/4; its batch is"
    ):
        pretrain.train(config)
    saved = np.load(tmp_path / "bad_batch_step_6.npz")
    expected = make_train_loader(config.data, process_index=0, process_count=1)[5]
    assert {"input_ids", "labels", "segment_ids", "positions"} < set(saved)
    np.testing.assert_array_equal(saved["input_ids"], expected["input_ids"])
    assert (saved["positions"] == POISON).all(), "the batch as it was fed, not as the loader would give it again"
    assert saved["step"] == 6 and saved["seed"] == config.seed and np.isnan(saved["metric_loss"])
    assert [e["event"] for e in events(tmp_path)] == ["stopped"]


def test_updates_are_skipped_up_to_the_limit_and_resuming_is_exact(small_run, poisoned, tmp_path):
    poisoned({1: math.nan, 3: math.nan, 5: math.nan, 6: math.nan})
    config = dataclasses.replace(small_run, health=HealthConfig(max_skipped_updates=2))
    whole = pretrain.train(dataclasses.replace(config, workdir=str(tmp_path / "whole")))
    metrics = lines(whole.workdir)
    assert [metrics[s]["skipped_updates"] for s in range(1, 9)] == [0, 1, 1, 2, 2, 3, 4, 4]
    assert [metrics[s]["loss"] is None for s in range(1, 9)] == [s in (2, 4, 6, 7) for s in range(1, 9)]
    assert metrics[2]["param_norm"] == metrics[1]["param_norm"] != metrics[3]["param_norm"]
    # A skipped update leaves the schedule where it was.
    assert metrics[3]["learning_rate"] == metrics[2]["learning_rate"] > metrics[1]["learning_rate"]
    part = dataclasses.replace(config, workdir=str(tmp_path / "part"), num_steps=4)
    pretrain.train(part)
    resumed = pretrain.train(dataclasses.replace(part, num_steps=8, resume="auto"))
    assert resumed.fingerprint == whole.fingerprint
    again = lines(resumed.workdir)
    for name in ("loss", "learning_rate", "skipped_updates", "batch_checksum"):
        assert [again[s][name] for s in again] == [metrics[s][name] for s in metrics]
    strict = dataclasses.replace(config, workdir=str(tmp_path / "strict"), health=HealthConfig(max_skipped_updates=1))
    with pytest.raises(FloatingPointError, match="at step 7: the run stops"):
        pretrain.train(strict)


def spiky(small_run, tmp_path, **fields):
    health_config = HealthConfig(**({"spike_deviations": 50.0, "spike_steps": 2, "spike_window": 4} | fields))
    return dataclasses.replace(
        small_run, num_steps=14, eval_every=20, checkpoint=CheckpointConfig(save_every=3, keep_last=9),
        workdir=str(tmp_path / "run"), health=health_config,
    )  # fmt: skip


def test_a_spike_rewinds_and_its_rows_are_left_out(small_run, poisoned, tmp_path, monkeypatch):
    poisoned({7: 100.0, 8: 100.0, 12: 100.0, 13: 100.0})
    config = spiky(small_run, tmp_path)
    result = pretrain.train(config)
    # Steps 8 and 9 are high; step 7 made the parameters of 8: the run rewinds to 6 and skips batches 6, 7, 8.
    # Then batches 12 and 13 are those of steps 10 and 11: the checkpoint of step 9 goes, back to 6 without 11, 12, 13.
    rewinds = events(tmp_path / "run")
    size = config.data.global_batch_size
    assert [(e["event"], e["step"], e["to"], e["skipped_rows"]) for e in rewinds] == [
        ("rewind", 9, 6, [6 * size, 9 * size]), ("rewind", 11, 6, [11 * size, 14 * size]),
    ]  # fmt: skip
    loader = make_train_loader(config.data, process_index=0, process_count=1)
    read = [*range(6), 9, 10, *range(14, 20)]
    metrics = lines(result.workdir)
    assert [metrics[s]["first_row"] for s in range(1, 15)] == [i * size for i in read]
    assert [metrics[s]["tokens"] for s in range(1, 15)] == [(loader[i]["labels"] != -100).sum() for i in read]
    assert metrics[14]["skipped_rows"] == 6 * size
    assert max(m["loss"] for m in metrics.values()) < 10
    # A run resumed after the rewinds knows what it skipped.
    again = pretrain.train(dataclasses.replace(config, workdir=str(tmp_path / "again"), num_steps=9))
    again = pretrain.train(dataclasses.replace(config, workdir=str(again.workdir), resume="auto"))
    assert again.fingerprint == result.fingerprint
    # A run that never had those rows ends in the same state.
    make = row_batches.make_train_loader

    def without(*args, **kwargs):
        whole = make(*args, **kwargs)
        return grain.MapDataset.range(14).map(lambda index: whole[read[index]])

    monkeypatch.setattr(row_batches, "make_train_loader", without)
    never = pretrain.train(dataclasses.replace(config, workdir=str(tmp_path / "never")))
    assert never.fingerprint == result.fingerprint and not (never.workdir / "health.jsonl").exists()


def test_a_run_stopped_at_a_spike_names_the_checkpoint_it_went_back_to(small_run, poisoned, tmp_path, monkeypatch):
    poisoned({7: 100.0, 8: 100.0})
    show = loop.ProgressDisplay.show

    def send(self, step, metrics):
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        show(self, step, metrics)

    monkeypatch.setattr(loop.ProgressDisplay, "show", send)
    with pytest.raises(Preempted, match="Stopped by SIGTERM: step 6 is saved"):
        pretrain.train(spiky(small_run, tmp_path))


def test_rewinds_are_bounded(small_run, poisoned, tmp_path):
    poisoned({7: 100.0, 8: 100.0, 12: 100.0, 13: 100.0})
    with pytest.raises(FloatingPointError, match=r"steps 10 to 11, .*: the run stops after 1 rewinds .*checkpoints/6"):
        pretrain.train(spiky(small_run, tmp_path, max_rewinds=1))


def test_a_spike_before_the_first_checkpoint_stops(small_run, poisoned, tmp_path):
    poisoned({4: 100.0, 5: 100.0})
    config = spiky(small_run, tmp_path)
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(save_every=6, keep_last=9))
    with pytest.raises(FloatingPointError, match="there is no checkpoint before step 4"):
        pretrain.train(config)


@given(st.lists(st.floats(1.0, 3.0), min_size=20, max_size=60), st.integers(2, 5))
def test_the_detector_wants_high_losses_in_a_row(noise, steps):
    detector = health.SpikeDetector(10.0, steps, 20)
    assert not any(detector.push(x) for x in noise[:20])
    # Beyond ten deviations of anything in [1, 3].
    for _ in range(3):
        assert not any(detector.push(100.0) for _ in range(steps - 1))
        assert not detector.push(min(noise))
    detector = health.SpikeDetector(10.0, steps, 20)
    assert not any(detector.push(x) for x in noise[:20])
    assert [detector.push(100.0) for _ in range(steps)] == [False] * (steps - 1) + [True]
    off = health.SpikeDetector(0.0, 1, 1)
    assert not any(off.push(x) for x in (1.0, 1e9, 1e30))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_skipped_updates": -1}, "health.max_skipped_updates = -1 is not valid: it must be at least 0"),
        ({"spike_steps": 0}, "health.spike_steps = 0 is not valid: it must be positive"),
        ({"spike_deviations": 6.0, "spike_steps": 4}, "health.spike_steps = 4 .* less than checkpoint.save_every = 4"),
    ],
)
def test_a_bad_value_is_one_sentence(small_run, fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(small_run, health=HealthConfig(**fields))


def test_the_same_seed_and_mesh_give_the_same_bits(small_run, tmp_path):
    a, b = (pretrain.train(dataclasses.replace(small_run, workdir=str(tmp_path / name), num_steps=4)) for name in "ab")
    assert a.fingerprint == b.fingerprint
    names = {name for m in lines(a.workdir).values() for name in m}
    timed = {n for n in names if "second" in n or n in ("goodput", "mfu")}
    records = [[{k: m.get(k) for k in names - timed} for m in lines(r.workdir).values()] for r in (a, b)]
    assert records[0] == records[1] and len(names - timed) > 10
    other = pretrain.train(dataclasses.replace(small_run, workdir=str(tmp_path / "c"), num_steps=4, seed=1))
    assert other.fingerprint != a.fingerprint


def test_the_optimizer_counts_updates(small_run, poisoned, tmp_path):
    """What is restored as `state.step` is what the optimizer counted, not the step of the checkpoint."""
    poisoned({1: math.nan})
    config = dataclasses.replace(
        small_run, workdir=str(tmp_path), num_steps=4, health=HealthConfig(max_skipped_updates=1)
    )
    pretrain.train(config)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        checkpointer = loop.Checkpointer(tmp_path / "checkpoints", config.checkpoint)
        abstract = pretrain.make_abstract_state(config, mesh, make_optimizer(config.optimizer))
        state = resume.restore_state(checkpointer, 4, abstract)
        checkpointer.close()
    counts = {int(x) for _, x in optax.tree.get_all_with_path(state.opt_state, "count")}
    assert counts == {3} and int(state.step) == 3
