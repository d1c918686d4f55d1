"""What every run settles before its job is made: its folder, compiled programs, what its devices can do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from bc2_jax.config import RunConfig
from bc2_jax.tpu.chips import DEVICE_KINDS
from bc2_jax.tpu.options import compiler_options


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in `folder`, unless it is empty or JAX_COMPILATION_CACHE_DIR names another."""
    if folder and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def holds_checkpoints(workdir: Path) -> bool:
    """Whether a run was here."""
    return any((workdir / "checkpoints").glob("[0-9]*"))


def choose_workdir(config: RunConfig) -> Path:
    """The workdir of the config; else of runs/NAME, runs/NAME-2, ... the first free one; to resume, the last used."""
    if config.workdir is not None:
        return Path(config.workdir)
    candidates = [Path("runs", config.name)]
    while holds_checkpoints(candidates[-1]):  # a run that failed at its start leaves none
        candidates.append(Path("runs", f"{config.name}-{len(candidates) + 1}"))
    return candidates[-2] if config.resume == "auto" and len(candidates) > 1 else candidates[-1]


def tuned_options(config: RunConfig, mesh: Mesh) -> dict[str, Any] | None:
    """The compiler options of the training step on the mesh's chips; None leaves the choice to the compiler."""
    generation = DEVICE_KINDS.get(mesh.devices.flat[0].device_kind)
    if generation is None or config.compute.compiler_options == "default":
        return None
    return dict(compiler_options(generation))


def check_attention(config: RunConfig, mesh: Mesh) -> None:
    """Raises ValueError if the devices cannot run the attention kernel that the config names."""
    platform = mesh.devices.flat[0].platform
    if config.compute.attention == "flash" and platform != "tpu":
        raise ValueError(
            f"compute.attention = 'flash' is not valid on {platform}: it is written for TPU; legal values here are "
            "chunked and reference."
        )
