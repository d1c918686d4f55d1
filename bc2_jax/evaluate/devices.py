"""Command-line options for devices and distributed start-up, and the mesh they define."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, NamedTuple, get_args, get_type_hints

from bc2_jax.config import DistributedConfig, MeshConfig, ModelConfig, RunConfig, check_divisible

if TYPE_CHECKING:
    from jax.sharding import Mesh

_SECTIONS = {"mesh": MeshConfig, "distributed": DistributedConfig}


class Devices(NamedTuple):
    """As in train.py's config."""

    mesh: MeshConfig
    distributed: DistributedConfig


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Adds --mesh.* and --distributed.*, one option per field of the configs."""
    add = parser.add_argument_group("devices", "the mesh of all devices, as in train.py's config").add_argument
    for section, config in _SECTIONS.items():
        hints = get_type_hints(config)
        for field in dataclasses.fields(config):
            name = f"--{section}.{field.name.replace('_', '-')}"
            kind = int if int in (hints[field.name], *get_args(hints[field.name])) else str
            about = "" if field.default is None else f"default {field.default}"
            add(name, type=kind, metavar="X" if kind is str else "N", help=about, dest=f"{section}.{field.name}")


def devices_of(args: argparse.Namespace) -> Devices:
    """The options of `add_device_options`. Raises ValueError, naming the field, for an invalid value."""
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
    """Joins the other processes, if any, and enables train.py's compilation cache.

    Call it before any JAX computation, including opening a checkpoint.
    """
    # Imported here to keep --help fast.
    from bc2_jax.train import distributed
    from bc2_jax.train.start import use_compilation_cache

    distributed.start(devices)
    use_compilation_cache(RunConfig.compilation_cache)


def make_device_mesh(devices: Devices, model: ModelConfig) -> Mesh | None:
    """The mesh of all devices; None for a single one. Raises ValueError if it does not fit the devices or the model."""
    import jax

    from bc2_jax.sharding import make_mesh

    mesh = devices.mesh.resolve(jax.device_count())
    check_divisible(model, mesh)
    return None if jax.device_count() == 1 else make_mesh(mesh)
