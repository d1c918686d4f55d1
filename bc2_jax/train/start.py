"""The start of a run: its workdir and lock, agreement of processes, compilation cache, compiler options."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from bc2_jax.agreement import first_decides
from bc2_jax.config import RunConfig
from bc2_jax.files import InUse, lock, replaced
from bc2_jax.kernels.cudnn import check_cudnn, head_limit
from bc2_jax.tpu.chips import DEVICE_KINDS
from bc2_jax.tpu.options import compiler_options
from bc2_jax.validation import check_path

LOCK_NAME = ".lock"
_log = logging.getLogger(__name__)


def describe_start(config: RunConfig) -> dict[str, Any]:
    """Facts that must be equal on all processes (`agreement.require_agreement`): the config except the identity of the
    process, the source code, and library versions."""
    fields = dataclasses.asdict(config)
    for own in ("process_id", "coordinator_address"):  # process 0 may use another address than the others
        del fields["distributed"][own]
    package = Path(__file__).parents[1]
    code = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        code.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "grain")}
    return fields | {"bc2_jax's source (SHA-256)": code.hexdigest(), "version": versions}


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in `folder`, unless it is '' or JAX_COMPILATION_CACHE_DIR is set.

    Logs a warning and keeps none if the folder is not writable, such as in a read-only home.
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
            "Compiled programs are not kept: compilation_cache = %r is not writable (%s). Set another folder with "
            "--compilation-cache or JAX_COMPILATION_CACHE_DIR, or none with --compilation-cache ''.", folder, reason,
        )  # fmt: skip
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def tuned_options(config: RunConfig, mesh: Mesh) -> dict[str, Any] | None:
    """Compiler options of the training step on the mesh's chips; None for the compiler's defaults."""
    generation = DEVICE_KINDS.get(mesh.devices.flat[0].device_kind)
    if generation is None or config.compute.compiler_options == "default":
        return None
    return dict(compiler_options(generation))


def record_config(config: RunConfig, workdir: Path) -> None:
    """Writes the config of the run to its folder; process 0 only."""
    if jax.process_index() == 0:
        with replaced(workdir / "config.json") as partial:
            partial.write_text(json.dumps(dataclasses.asdict(config), indent=1), encoding="utf-8")


def check_attention(config: RunConfig, mesh: Mesh) -> None:
    """Raises ValueError if the devices cannot run the attention kernel of the config."""
    platform = mesh.devices.flat[0].platform
    if config.compute.attention != "flash" or platform == "tpu":
        return
    if platform != "gpu":
        raise ValueError(
            f"compute.attention = 'flash' is not valid on {platform}: it runs only on TPU and GPU; legal values "
            "here are chunked and reference."
        )
    model, limit = config.model, head_limit(list(mesh.devices.flat))
    check_cudnn(config.compute.dtype, model.head_dim, model.position_embedding == "alibi", limit)


def holds_checkpoints(workdir: Path) -> bool:
    """Whether a run has saved checkpoints here."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(path.name[0].isdigit() for path in folder.iterdir())


@contextlib.contextmanager
def own_workdir(config: RunConfig) -> Iterator[Path]:
    """The workdir of the run, locked against other runs until the block ends.

    It is `config.workdir`, else the first of runs/NAME, runs/NAME-2, ... that has no checkpoints and no running owner;
    to resume, the last one with checkpoints. Raises on every process, before anything is written: InUse if a running
    process owns it, ValueError if it cannot hold checkpoints.
    """
    with contextlib.ExitStack() as owned:
        yield Path(first_decides(lambda: str(_own(config, owned))))


def _own(config: RunConfig, owned: contextlib.ExitStack) -> Path:
    if config.workdir is not None:
        workdir = Path(config.workdir).expanduser()
        _lock(workdir, owned)
        return workdir
    candidates = (Path("runs", config.name if i == 1 else f"{config.name}-{i}") for i in itertools.count(1))
    used = None
    for workdir in candidates:
        if not holds_checkpoints(workdir):
            if used is not None and config.resume == "auto":
                break
            with contextlib.suppress(InUse), contextlib.ExitStack() as attempt:
                _lock(workdir, attempt)
                if not holds_checkpoints(workdir):  # its owner may just have ended
                    owned.enter_context(attempt.pop_all())
                    return workdir
        used = workdir
    assert used is not None
    _lock(used, owned)
    return used


def _lock(workdir: Path, owned: contextlib.ExitStack) -> None:
    check_path("workdir", workdir)
    owned.enter_context(lock(workdir / LOCK_NAME, f"workdir = '{workdir}'"))
