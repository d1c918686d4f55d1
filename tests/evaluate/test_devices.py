"""Options of the devices on a command line."""

from __future__ import annotations

import argparse
import dataclasses

import jax
import pytest

from bc2_jax.config import DistributedConfig, MeshConfig, ModelConfig
from bc2_jax.evaluate.devices import add_device_options, devices_of, make_device_mesh

MODEL = ModelConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, position_embedding="alibi",
    vocab_size=640,
)  # fmt: skip


def parse(*args: str):
    parser = argparse.ArgumentParser()
    add_device_options(parser)
    return devices_of(parser.parse_args(args))


def test_every_field_of_train_py_is_there():
    assert parse() == (MeshConfig(), DistributedConfig())
    found = parse("--mesh.tensor", "2", "--mesh.fsdp-inner", "1", "--distributed.coordinator-address", "h:1",
                  "--distributed.num-processes", "2", "--distributed.process-id", "1")  # fmt: skip
    assert found.mesh == MeshConfig(tensor=2, fsdp_inner=1)
    assert found.distributed == DistributedConfig(coordinator_address="h:1", num_processes=2, process_id=1)
    for section, config in (("mesh", MeshConfig), ("distributed", DistributedConfig)):
        for field in dataclasses.fields(config):
            with pytest.raises((ValueError, SystemExit)):  # known, and checked
                parse(f"--{section}.{field.name.replace('_', '-')}", "-7")


def test_all_devices_are_used():
    mesh = make_device_mesh(parse("--mesh.tensor", "4"), MODEL)
    assert mesh is not None and mesh.devices.size == jax.device_count() == 8 and mesh.shape["tensor"] == 4
    with pytest.raises(ValueError, match="num_attention_heads|mesh.tensor"):
        make_device_mesh(parse("--mesh.tensor", "8"), MODEL)
    with pytest.raises(ValueError, match="must divide the 8 devices"):
        make_device_mesh(parse("--mesh.tensor", "3"), MODEL)
