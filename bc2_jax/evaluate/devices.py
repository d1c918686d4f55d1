"""The devices of a program that evaluates: options of its command line, and the mesh that they give."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, NamedTuple, get_args, get_type_hints

from bc2_jax.config import DistributedConfig, MeshConfig, ModelConfig, RunConfig, check_divisible

if TYPE_CHECKING:
    from jax.sharding import Mesh

_SECTIONS = {"mesh": MeshConfig, "distributed": DistributedConfig}


class Devices(NamedTuple):
    """Which devices compute, as in train.py."""

    mesh: MeshConfig
    distributed: DistributedConfig


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """--mesh.* and --distributed.*, every field of their configs."""
    add = parser.add_argument_group(
        "devices", "all devices, cut as these fields of train.py's configuration say"
    ).add_argument
    for section, config in _SECTIONS.items():
        hints = get_type_hints(config)
        for field in dataclasses.fields(config):
            name = f"--{section}.{field.name.replace('_', '-')}"
            kind = int if int in (hints[field.name], *get_args(hints[field.name])) else str
            about = "" if field.default is None else f"default {field.default}"
            add(name, type=kind, metavar="X" if kind is str else "N", help=about, dest=f"{section}.{field.name}")


def devices_of(args: argparse.Namespace) -> Devices:
    """What the options of `add_device_options` say. Raises ValueError, naming the field, for a value that is
    not valid."""
    given = {
        section: {
            field.name: value
            for field in dataclasses.fields(config)
            if (value := getattr(args, f"{section}.{field.name}")) is not None
        }
        for section, config in _SECTIONS.items()
    }
    return Devices(MeshConfig(**given["mesh"]), DistributedConfig(**given["distributed"]))


def start_devices(devices: Devices) -> None:
    """Joins the other processes, if there are any. To be called before any JAX computation, which opening a checkpoint
    is too. Compiled programs are kept where train.py keeps them."""
    # Imported here so that --help and a typo answer at once.
    from bc2_jax.train import distributed
    from bc2_jax.train.start import use_compilation_cache

    distributed.start(devices)
    use_compilation_cache(RunConfig.compilation_cache)


def make_device_mesh(devices: Devices, model: ModelConfig) -> Mesh | None:
    """The mesh of all devices; None for a single one. Raises ValueError for a mesh that the devices do not make or that
    does not divide the model."""
    import jax

    from bc2_jax.sharding import make_mesh

    mesh = devices.mesh.resolve(jax.device_count())
    check_divisible(model, mesh)
    return None if jax.device_count() == 1 else make_mesh(mesh)
