"""Compiles the training step for a TPU topology without a TPU: abstract arrays in, scheduled program and memory out.

The step is that of training (`bc2_jax.train.job.lower_train_step`), with its mesh and shardings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from bc2_jax.config import RunConfig
from bc2_jax.sharding import make_mesh
from bc2_jax.tpu.chips import Topology
from bc2_jax.tpu.options import Value
from bc2_jax.train.job import StepParts, lower_train_step
from bc2_jax.train.kinds import kind_of

# Otherwise libtpu queries a metadata server, and only one process at a time can use it.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_STDERR_LOG_LEVEL": "2",
}
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class DoesNotFit(ValueError):
    """The program needs more memory than the chip has."""

    def __init__(self, message: str, needed_bytes: int | None):
        super().__init__(message)
        self.needed_bytes = needed_bytes
        """HBM per device, None if unknown."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """HBM in bytes of a device (or chip), as the compiler lays it out."""

    arguments: int  # state, frozen parameters and batch
    outputs: int
    aliased: int  # outputs in the place of donated arguments
    temporaries: int
    peak: int  # in use at one time
    laid_out: int
    """Arguments and one block of temporaries with its gaps: what the compiler compares with the chip's HBM."""
    host: int = 0  # temporaries in host memory (remat "offload")

    @property
    def total(self) -> int:
        """The sum, of which not all need exist together."""
        return self.arguments + self.outputs - self.aliased + self.temporaries

    def of(self, devices: int) -> Memory:
        """For a chip of `devices` devices."""
        return Memory(*(devices * value for value in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """A compiled program."""

    memory: Memory
    hlo: str  # the scheduled program of one device
    log: str  # the compiler's stderr
    lower_seconds: float
    compile_seconds: float
    executable: Any = None  # runs if it was compiled for devices that are here


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep(CompiledProgram):
    """A compiled training step."""

    topology: Topology
    config: RunConfig  # with the mesh filled in
    sequences: int  # rows of a step on all devices
    length: int  # tokens of a row
    coordinates: tuple[tuple[int, ...], ...]  # (slice, x, y, ...) of each device, in the program's order
    replicated: tuple[tuple[str, int], ...]
    """Replicated arrays of state and frozen parameters of at least 1 MiB: name and bytes."""
    flops: int  # model FLOPs of the step with all its updates, on all devices
    adapter_parameters: int = 0  # parameters trained beside frozen ones; 0 if all are trained


def use_topologies() -> None:
    """Prepares this process for compiling without a TPU; call it before any other use of JAX.

    JAX runs on the CPU, so that compiling on a TPU host does not occupy its TPUs.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def topology_devices(topology: Topology) -> list[Any]:
    """Abstract devices of a topology. Raises ImportError if libtpu is not installed."""
    options: dict[str, Any] = {}
    if topology.chip.chip_config is not None:
        options["chip_config_name"] = topology.chip.chip_config
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    if topology.slice_chips == 1:  # part of a host
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        devices = topologies.get_topology_desc(topology.name, "tpu", **options).devices
    except RuntimeError as error:
        if "support not installed" in str(error):
            raise ImportError("libtpu is not installed: pip install -e '.[tpu]'.") from error
        raise
    if len(devices) != topology.num_devices:
        raise AssertionError(f"libtpu makes {len(devices)} devices of {topology}, not {topology.num_devices}")
    return devices


def resolve_on(topology: Topology, config: RunConfig) -> tuple[RunConfig, Mesh]:
    """`config` with its mesh filled in, and the mesh on `topology`. Raises ValueError if they do not match."""
    devices = topology_devices(topology)
    config = config.resolve(len(devices))
    return config, make_mesh(config.mesh, devices)


def compile_step(config: RunConfig, topology: Topology, options: dict[str, Value]) -> CompiledStep:
    """Compiles the training step of any kind of run for `topology`. Frozen parameters are not donated.

    Raises DoesNotFit if the chip's memory is too small, ValueError for a mesh that does not match model or devices and
    for an unknown compiler option.
    """
    config, mesh = resolve_on(topology, config)
    with jax.set_mesh(mesh):
        parts: StepParts = kind_of(config).make_step(config, mesh)
        lower = functools.partial(
            lower_train_step, parts.objective, parts.optimizer, parts.state, parts.frozen, parts.batch,
            norms=config.health.norms, updates=parts.updates,
        )  # fmt: skip
        program = compile_program("step", lower, options)
    *steps, rows, length = parts.batch["input_ids"].shape
    return CompiledStep(
        **vars(program), topology=topology, config=config, coordinates=device_coordinates(mesh),
        sequences=math.prod(steps) * rows, length=length,
        replicated=_replicated({"state": parts.state, "frozen": parts.frozen}), flops=parts.flops_per_step,
        adapter_parameters=sum(x.size for x in jax.tree.leaves(parts.state.params)) if parts.frozen else 0,
    )  # fmt: skip


def compile_program(name: str, lower: Callable[[], Any], options: dict[str, Value]) -> CompiledProgram:
    """Compiles what `lower()` lowers; `name` is for messages. Raises as `compile_step`."""
    with tempfile.TemporaryDirectory() as folder, _captured_stderr() as log:
        start = time.perf_counter()
        lowered = lower()
        lowered_at = time.perf_counter()
        dump: dict[str, Any] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=options | dump)
        except jax.errors.JaxRuntimeError as error:
            raise _explained(error, name) from error
        compile_seconds = time.perf_counter() - lowered_at
        hlo, laid_out = read_dump(Path(folder), name)
        memory: Any = compiled.memory_analysis()
    return CompiledProgram(
        memory=Memory(
            memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.alias_size_in_bytes,
            memory.temp_size_in_bytes, memory.peak_memory_in_bytes, laid_out, memory.host_temp_size_in_bytes,
        ),
        hlo=hlo,
        log=log[0],
        lower_seconds=lowered_at - start,
        compile_seconds=compile_seconds,
        executable=compiled,
    )  # fmt: skip


def read_dump(folder: Path, name: str) -> tuple[str, int]:
    """The scheduled program and the HBM in which it is laid out, from the compiler's dump of one program.

    Raises RuntimeError if libtpu wrote none.
    """
    found = sorted(folder.glob("*.after_codegen.txt"), key=lambda path: path.stat().st_size)
    if not found:
        raise RuntimeError(f"The compiler wrote no scheduled program of the {name}; libtpu 0.0.42 does.")
    usage = Path(str(found[-1]).replace("after_codegen", "after_optimizations-memory-usage-report"))
    laid_out = re.search(r"color=0\)\s+Total bytes: ([0-9]+)", usage.read_text(encoding="utf-8"))
    if laid_out is None:
        raise RuntimeError(f"The compiler wrote no memory of the {name}; libtpu 0.0.42 does.")
    return found[-1].read_text(encoding="utf-8"), int(laid_out[1])


def device_coordinates(mesh: Mesh) -> tuple[tuple[int, ...], ...]:
    """(slice, x, y, ...) of each device, in the order of programs on this mesh."""
    return tuple((getattr(d, "slice_index", 0) or 0, *d.coords) for d in mesh.devices.flat)


def _replicated(arrays: Any) -> tuple[tuple[str, int], ...]:
    found = []
    for path, x in jax.tree_util.tree_leaves_with_path(arrays):
        size = x.size * x.dtype.itemsize
        if x.sharding.is_fully_replicated and size >= 2**20 and x.sharding.num_devices > 1:
            found.append((jax.tree_util.keystr(path, simple=True, separator="."), size))
    return tuple(found)


def _explained(error: jax.errors.JaxRuntimeError, name: str) -> Exception:
    """The compiler's error as one sentence if it is a known one."""
    text = str(error)
    if "No such compile option" in text:
        return ValueError(f"The compiler does not know an option: {text.splitlines()[0]}.")
    if "RESOURCE_EXHAUSTED" not in text:
        return error
    sizes = [float(n) * _UNITS[unit] for n, unit in re.findall(r"\b([0-9]+(?:\.[0-9]+)?)([KMGT])\b", text)]
    if len(sizes) < 2:
        return DoesNotFit(f"The {name} does not fit: {text.splitlines()[0]}", None)
    needed, available = sizes[:2]
    return DoesNotFit(
        f"The {name} does not fit: it needs {needed / 2**30:.2f} GiB beside its state, and a device has "
        f"{available / 2**30:.2f} GiB.",
        int(needed),
    )


@contextlib.contextmanager
def _captured_stderr() -> Iterator[list[str]]:
    """Captures native stderr, the only place where the compiler reports that it replicates a tensor to reshard it."""
    log = [""]
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield log
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            log[0] = file.read().decode(errors="replace")
