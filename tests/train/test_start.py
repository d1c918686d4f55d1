"""What a run settles before its first step, on devices that are not here."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bc2_jax.config import MeshConfig
from bc2_jax.data.row_order import record_row_order
from bc2_jax.sharding import DEFAULT_RULES, MESH_AXES, Mesh, make_mesh
from bc2_jax.tpu.options import compiler_options
from bc2_jax.train.start import batch_part, check_attention, make_put, tuned_options, warn_of_other_rows

CONFIGS = Path(__file__).parents[2] / "configs"


def mesh_of_kind(kind: str, platform: str) -> SimpleNamespace:
    return SimpleNamespace(devices=np.array([SimpleNamespace(device_kind=kind, platform=platform)], object))


@pytest.mark.parametrize("name", ["baichuan2_7b", "baichuan2_13b"])
def test_options_are_those_of_the_chip(name):
    config = runpy.run_path(str(CONFIGS / f"{name}.py"))["config"]()
    v5p = mesh_of_kind("TPU v5p", "tpu")
    assert tuned_options(config, v5p) == compiler_options("v5p")
    assert tuned_options(config, mesh_of_kind("cpu", "cpu")) is None
    default = dataclasses.replace(config, compute=dataclasses.replace(config.compute, compiler_options="default"))
    assert tuned_options(default, v5p) is None
    check_attention(config, v5p)
    with pytest.raises(ValueError, match="compute.attention = 'flash' is not valid on cpu"):
        check_attention(config, mesh_of_kind("cpu", "cpu"))


def fake_mesh(shape: tuple[int, ...], devices_per_process: int) -> Mesh:
    """(data, fsdp, fsdp_inner, context, tensor) over devices of several processes, in order."""
    devices = [SimpleNamespace(process_index=i // devices_per_process) for i in range(math.prod(shape))]
    array = np.array(devices, object).reshape(shape)
    return SimpleNamespace(devices=array, axis_names=MESH_AXES)


@pytest.mark.parametrize(
    ("shape", "devices_per_process", "parts"),
    [
        # Every process has its own rows.
        ((1, 8, 1, 1, 1), 2, [(0, 4, (0, 1)), (1, 4, (2, 3)), (2, 4, (4, 5)), (3, 4, (6, 7))]),
        ((2, 1, 2, 1, 2), 4, [(0, 2, (0, 1)), (1, 2, (2, 3))]),
        # Four devices cut one sequence: two processes of two devices read the same rows.
        ((1, 2, 1, 4, 1), 2, [(0, 2, (0,)), (0, 2, (0,)), (1, 2, (1,)), (1, 2, (1,))]),
        ((1, 1, 1, 4, 2), 2, [(0, 1, (0,))] * 4),
    ],
)
def test_processes_that_cut_the_same_sequences_read_the_same_rows(shape, devices_per_process, parts):
    mesh = fake_mesh(shape, devices_per_process)
    assert [batch_part(mesh, process) for process in range(len(parts))] == parts


def test_processes_that_share_some_of_their_rows_are_refused():
    with pytest.raises(ValueError, match=r"mesh.context \* mesh.tensor = 3 is not valid: it must divide the devices"):
        batch_part(fake_mesh((1, 2, 1, 3, 1), 2), 0)


@pytest.mark.parametrize("mesh", [{"context": 4}, {"data": 2, "fsdp_inner": 2, "context": 2}, {"tensor": 2}], ids=str)
def test_a_batch_is_placed_row_by_row(mesh: dict[str, int]):
    config = runpy.run_path(str(CONFIGS / "baichuan2_7b.py"))["config"]()
    data = dataclasses.replace(config.data, sequence_length=8, global_batch_size=16, accumulation_steps=2)
    config = dataclasses.replace(config, data=data)
    batch = {"labels": np.arange(16 * 8, dtype=np.int32).reshape(16, 8)}
    placed = make_put(config, make_mesh(MeshConfig(**mesh)))(batch)["labels"]
    np.testing.assert_array_equal(placed, batch["labels"].reshape(2, 8, 8))
    assert placed.sharding.spec == DEFAULT_RULES.spec(None, "batch", "sequence")


def test_only_data_goes_across_slices():
    devices = [SimpleNamespace(slice_index=i // 4) for i in range(8)]
    with pytest.raises(ValueError, match="mesh.data = 1 is not valid: it must be a multiple of the 2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=8), devices)


def test_other_rows_than_those_of_the_checkpoint_are_named(small_run, caplog):
    metadata = {"row_order": json.loads(json.dumps(record_row_order(small_run.data)))}
    warn_of_other_rows(small_run, metadata, 4)
    warn_of_other_rows(small_run, {}, 4)  # of an earlier version
    assert not caplog.messages
    warn_of_other_rows(dataclasses.replace(small_run, data=dataclasses.replace(small_run.data, seed=3)), metadata, 4)
    assert caplog.messages == [
        "The data is not that of the checkpoint of step 4, which it goes on from: data.seed changed. Rows that were "
        "trained on may come again, others never."
    ]
