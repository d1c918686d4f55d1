"""What every run settles before its job is made: what its processes must share, compiled programs, its devices."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from bc2_jax.config import RunConfig
from bc2_jax.tpu.chips import DEVICE_KINDS
from bc2_jax.tpu.options import compiler_options

_log = logging.getLogger(__name__)


def describe_start(config: RunConfig) -> dict[str, Any]:
    """What must be the same on all processes of a run, as `agreement.require_agreement` takes it: its whole config but
    who this process is, the code and the libraries that compile it."""
    fields = dataclasses.asdict(config)
    for own in ("process_id", "coordinator_address"):  # process 0 may listen at another name than others call
        del fields["distributed"][own]
    package = Path(__file__).parents[1]
    code = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        code.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "grain")}
    return fields | {"bc2_jax's source (SHA-256)": code.hexdigest(), "version": versions}


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in `folder`, unless it is empty or JAX_COMPILATION_CACHE_DIR names another.

    Where nothing can be written there, as in a home that is read-only, a warning says so and none are kept.
    """
    if not folder or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        path = Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        reason = getattr(error, "strerror", None) or error
        _log.warning(
            "Compiled programs are not kept: compilation_cache = %r cannot be written (%s). Name another folder by "
            "--compilation-cache or JAX_COMPILATION_CACHE_DIR, or none by --compilation-cache ''.", folder, reason,
        )  # fmt: skip
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


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
