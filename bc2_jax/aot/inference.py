"""The programs of `bc2_jax.infer.engine` compiled for a slice that is not there, and what they would take.

They are the engine's own and the parameters are laid out as it prepares them; arrays are abstract and nothing is
allocated. `decode` is as long as the text, so one pass of it is estimated, at a full cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from bc2_jax.aot.compilation import CompiledProgram, Memory, compile_program
from bc2_jax.aot.estimate import Estimate, estimate_step
from bc2_jax.aot.program import Program
from bc2_jax.aot.report import (
    LARGE,
    collective_rows,
    collectives_json,
    gib,
    log_warnings,
    memory_json,
    memory_text,
    parts_json,
    synchronous_warnings,
)
from bc2_jax.config import ComputeConfig, MeshConfig, ModelConfig
from bc2_jax.infer import engine
from bc2_jax.infer.decoding import CacheDType, make_chunk
from bc2_jax.infer.refill import RolloutShapes
from bc2_jax.infer.settings import Sampling
from bc2_jax.kernels.cached import key_block
from bc2_jax.model.baichuan import abstract_params, split_model
from bc2_jax.model.quantized import Scheme, item_bytes
from bc2_jax.sharding import place_shapes, use_rules
from bc2_jax.tpu.chips import Topology
from bc2_jax.tpu.options import Value


@dataclasses.dataclass(frozen=True)
class CompiledEngine:
    """Three programs of the engine, and the bytes one device holds."""

    allocate: CompiledProgram
    extend: CompiledProgram
    decode: CompiledProgram
    chunk_length: int
    key_block: int
    """Keys that a chunk attends to in one pass of a loop."""
    cache_bytes: int
    """Keys, values and their scales."""
    state_bytes: int
    """All that is kept of the rows, the cache among it."""


def whole_slice_mesh(topology: Topology) -> MeshConfig:
    """Every device of a slice holds a part of each layer and of the cache; slices are replicas."""
    return MeshConfig(data=topology.num_slices, fsdp=1, tensor=topology.num_devices // topology.num_slices)


def inference_compute(compute: ComputeConfig) -> ComputeConfig:
    """Nothing is rematerialised without a backward pass; who compiles gives the compiler's options."""
    return dataclasses.replace(compute, remat="none", compiler_options="default")


def abstract_prepared(
    model: ModelConfig, compute: ComputeConfig, mesh: Mesh, kv: CacheDType, quantize: Scheme | None = None
) -> engine.Prepared:
    """What `engine.prepare` makes of a model on `mesh`, as shapes with shardings."""
    with jax.set_mesh(mesh), use_rules(engine.decoding_rules()):
        graphdef = split_model(model, compute)[0]
        stored = abstract_params(model, mesh, compute.dtype)
        prepare = functools.partial(engine.prepare, kv=kv, quantize=quantize)
        return place_shapes(mesh, jax.eval_shape(lambda params: prepare(nnx.merge(graphdef, params)), stored))


class AbstractEngine:
    """The programs of the engine for a batch of one shape, to be compiled one by one.

    Compiling raises DoesNotFit where the chip's memory is too small.
    """

    def __init__(
        self, prepared: engine.Prepared, mesh: Mesh, shapes: RolloutShapes, sampling_of_rows: Callable[[int], Sampling],
        options: dict[str, Value],
    ):  # fmt: skip
        """`prepared` is abstract. `sampling_of_rows` gives settings of so many rows; which of them are None decides
        what is compiled, as in `engine.allocate`."""
        self._prepared, self._mesh, self._shapes, self._options = prepared, mesh, shapes, options
        self._sampling_of_rows = sampling_of_rows
        self._programs = engine.programs(prepared.compute)
        with self._in_use():
            self.chunk_length, self.key_block = engine.chunk_length(), key_block(shapes.slots)
            self._sampling = self._abstract(sampling_of_rows(shapes.rows))
            empty = functools.partial(self._programs.allocate, slots=shapes.slots)
            self.state = place_shapes(mesh, jax.eval_shape(empty, prepared, self._sampling))

    def allocate(self) -> CompiledProgram:
        return self._compile("allocation", "allocate", self._prepared, self._sampling, slots=self._shapes.slots)

    def extend(self) -> CompiledProgram:
        rows = self._shapes.prefill_rows
        chunk = make_chunk([None] * rows, 0, self.chunk_length, self._shapes.slots)
        given = self._abstract((chunk, self._sampling_of_rows(rows)))
        return self._compile("chunk of prompts", "extend", self._prepared, self.state, *given)

    def decode(self) -> CompiledProgram:
        given = self._abstract((np.int32(1), np.zeros(self._shapes.rows, bool)))
        return self._compile("decoding loop", "decode", self._prepared, self.state, *given)

    def compile(self, decode: CompiledProgram | None = None) -> CompiledEngine:
        """All programs; `decode` if it was compiled before."""
        return CompiledEngine(
            self.allocate(), self.extend(), decode or self.decode(), self.chunk_length, self.key_block,
            device_bytes(self.state.cache), device_bytes(self.state),
        )  # fmt: skip

    def _compile(self, name: str, program: str, *arguments: Any, **static: Any) -> CompiledProgram:
        with self._in_use():
            lower = functools.partial(getattr(self._programs, program).lower, *arguments, **static)
            return compile_program(name, lower, self._options)

    def _abstract(self, tree: Any) -> Any:
        return place_shapes(self._mesh, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree)))

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        with jax.set_mesh(self._mesh), use_rules(engine.decoding_rules()):
            yield


def device_bytes(tree: Any) -> int:
    """Of one device, of arrays or their shapes."""
    leaves = jax.tree.leaves(tree)
    return sum(int(math.prod(x.sharding.shard_shape(x.shape)) * item_bytes(x.dtype)) for x in leaves)


# -------------------------------------------------------------------------------------------------------------- report


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """One program; per chip. Times are compile-time estimates, memory is what the compiler allocates."""

    memory: Memory
    hbm_bytes: int
    """What the chip has."""
    lower_seconds: float
    compile_seconds: float
    estimate: Estimate
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "hbm_bytes_per_chip": self.memory.total,
            "hbm": memory_json(self.memory, self.hbm_bytes),
            "lower_seconds": self.lower_seconds,
            "compile_seconds": self.compile_seconds,
            "estimated_seconds": self.estimate.seconds,
            "estimated_seconds_at_worst": self.estimate.seconds_high,
            "estimated_parts": parts_json(self.estimate),
            "collectives": collectives_json(self.estimate),
            "warnings": list(self.warnings),
        }


def report_program(
    program: CompiledProgram, topology: Topology, coordinates: Sequence[tuple[int, ...]], *, trips: int = 1,
    without: str = "",
) -> ProgramReport:  # fmt: skip
    """Reads one program of inference; of a loop whose length is data, `trips` passes.

    Branches with instructions of the scope `without` are taken not to run.
    """
    parsed = Program(program.hlo, open_trips=trips)
    estimate = estimate_step(parsed, topology, coordinates, streams_weights=True, without=without)
    found = copy_warnings(parsed) + synchronous_warnings(estimate) + log_warnings(program.log)
    return ProgramReport(
        program.memory.of(topology.chip.devices), topology.chip.hbm_bytes, program.lower_seconds,
        program.compile_seconds, estimate, (*estimate.warnings, *found),
    )  # fmt: skip


def copy_warnings(program: Program) -> list[str]:
    """Of large arrays that are only copied, to another place or layout."""
    lines = []
    for instruction, _, count in program.walk():
        size = sum(shape.bytes for shape in instruction.shapes if shape.in_hbm)
        if instruction.opcode == "copy" and size >= LARGE:
            shape = instruction.shapes[0]
            dims = ",".join(map(str, shape.dims))
            lines.append(f"{shape.dtype}[{dims}], {gib(size)}, is copied {count} times.")
    return lines


def program_rows(name: str, report: ProgramReport) -> list[tuple[str, str]]:
    """One program as lines (name, text)."""
    e = report.estimate
    rows = [
        ("HBM per chip", memory_text(report.memory, report.hbm_bytes)),
        ("compilation", f"{report.compile_seconds:.1f} s, tracing {report.lower_seconds:.1f} s"),
        (
            "estimated time",
            f"{milliseconds(e.seconds)} = matmuls {milliseconds(e.matmul)} + vector {milliseconds(e.vector)} + "
            f"kernels {milliseconds(e.kernels)} + exposed communication {milliseconds(e.exposed)}; hidden "
            f"communication {milliseconds(e.hidden)}; at worst {milliseconds(e.seconds_high)}",
        ),
        *collective_rows(e),
    ]
    return [(f"{name}: {row}", text) for row, text in rows]


def milliseconds(seconds: float) -> str:
    """As the report writes it."""
    return f"{max(1e3 * seconds, 0.0):.2f} ms"
