"""Settings before the first step, also for devices that this machine lacks."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from bc2_jax.config import MeshConfig
from bc2_jax.data.loader import record_row_order
from bc2_jax.metadata import Metadata
from bc2_jax.sharding import make_mesh
from bc2_jax.tpu.options import compiler_options
from bc2_jax.train.checks import warn_of_other_rows
from bc2_jax.train.start import check_attention, tuned_options, use_compilation_cache

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


def test_only_data_goes_across_slices():
    devices = [SimpleNamespace(slice_index=i // 4) for i in range(8)]
    with pytest.raises(ValueError, match="mesh.data = 1 is not valid: it must be a multiple of the 2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=8), devices)


def test_other_rows_than_those_of_the_checkpoint_are_named(small_run, caplog):
    metadata = Metadata({}, {}, job={"row_order": json.loads(json.dumps(record_row_order(small_run.data)))})
    warn_of_other_rows(small_run, metadata, 4)
    warn_of_other_rows(small_run, Metadata({}, {}), 4)  # of an earlier version
    assert not caplog.messages
    warn_of_other_rows(dataclasses.replace(small_run, data=dataclasses.replace(small_run.data, seed=3)), metadata, 4)
    assert caplog.messages == [
        "The data changed since the checkpoint of step 4: data.seed. Some rows may be trained on twice, others never."
    ]


@pytest.mark.parametrize("folder", ["{file}/programs", "~/programs", "/proc/1/no/programs"])
def test_a_cache_that_cannot_be_written_is_one_warning(monkeypatch, tmp_path, caplog, folder):
    """As in a read-only home; the run continues without a cache."""
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("HOME", str(file))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = jax.config.values["jax_compilation_cache_dir"]
    use_compilation_cache(folder.format(file=file))
    assert jax.config.values["jax_compilation_cache_dir"] == before
    (message,) = caplog.messages
    assert "--compilation-cache or JAX_COMPILATION_CACHE_DIR" in message and repr(folder.format(file=file)) in message
