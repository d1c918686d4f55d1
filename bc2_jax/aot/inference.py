"""Prefill and decoding compiled for a slice that is not there, as `bc2_jax.infer.engine` runs them.

The programs are the engine's own and the parameters are laid out as it prepares them; arrays are abstract and nothing
is allocated. The decoding loop is as long as the text, so one pass of it is estimated, at a full cache.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from bc2_jax.aot.compilation import CompiledProgram, Memory, compile_program, device_coordinates, topology_devices
from bc2_jax.aot.estimate import HBM_SHARE, Estimate, estimate_step
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
from bc2_jax.aot.search import HBM_LIMIT
from bc2_jax.config import MeshConfig, ModelConfig, TrainConfig
from bc2_jax.infer import engine
from bc2_jax.infer.generate import bucket
from bc2_jax.infer.refill import RolloutShapes
from bc2_jax.infer.sampling import DEFAULT_SETTINGS, Settings, sampling_of
from bc2_jax.model.baichuan import abstract_params, split_model
from bc2_jax.sharding import make_mesh, place_shapes, use_rules
from bc2_jax.tpu.chips import Topology
from bc2_jax.tpu.options import Value
from bc2_jax.validation import require


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of the slice at one time."""

    batch: int = 8
    """Sequences."""
    prompt_length: int = 1024
    """Tokens of each prompt, padded as `generate` pads them."""
    cache_length: int = 4096
    """Slots of the cache: prompt and answer."""

    def check(self, model: ModelConfig, mesh: MeshConfig) -> None:
        """Raises ValueError for sizes that `generate` would not compile for this model on this (resolved) mesh."""
        field, shards = mesh.batch_shards
        require(
            self.batch > 0 and self.batch % shards == 0, "batch", self.batch,
            f"it must be a positive multiple of {field} = {shards}",
        )  # fmt: skip
        for name in ("prompt_length", "cache_length"):
            value = getattr(self, name)
            legal = value > 0 and bucket(value) == value
            require(legal, name, value, "it must be 64, 128 or a multiple of 256, to which generate rounds up")
        longest = bucket(model.model_max_length)
        require(
            self.prompt_length < self.cache_length <= longest, "cache_length", self.cache_length,
            f"it must be more than prompt_length = {self.prompt_length} and at most {longest}, what "
            f"model.model_max_length = {model.model_max_length} takes",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CompiledInference:
    """Both programs, and the bytes one device holds."""

    topology: Topology
    config: TrainConfig
    """With the mesh filled in."""
    request: Request
    prefill: CompiledProgram
    decode: CompiledProgram
    coordinates: tuple[tuple[int, ...], ...]
    parameter_bytes: int
    """Prepared parameters."""
    read_bytes: int
    """Those of them that each decoding step reads: all but the embedding table."""
    cache_bytes: int
    """Keys and values of the whole batch."""


def whole_slice_mesh(topology: Topology) -> MeshConfig:
    """Every device of a slice holds a part of each layer and of the cache; slices are replicas."""
    return MeshConfig(data=topology.num_slices, fsdp=1, tensor=topology.num_devices // topology.num_slices)


def compile_inference(
    config: TrainConfig, topology: Topology, request: Request, options: dict[str, Value]
) -> CompiledInference:
    """Compiles the engine's prefill and decoding loop for every device of `topology`.

    Raises DoesNotFit where the chip's memory is too small, and ValueError for a mesh or a request that does not suit
    the model or the devices, or an option that the compiler does not know.
    """
    devices = topology_devices(topology)
    config = config.resolve(len(devices))
    request.check(config.model, config.mesh)
    mesh = make_mesh(config.mesh, devices)
    # Nothing is rematerialised without a backward pass; the caller gives the compiler options.
    compute = dataclasses.replace(config.compute, remat="none", compiler_options="default")
    with jax.set_mesh(mesh), use_rules(engine.decoding_rules()):
        graphdef = split_model(config.model, compute)[0]
        stored = abstract_params(config.model, mesh, compute.dtype)
        prepared = place_shapes(
            mesh, jax.eval_shape(lambda params: engine.prepare(nnx.merge(graphdef, params)), stored)
        )
    shapes = RolloutShapes(request.batch, request.batch, request.prompt_length, request.cache_length)
    prefill, decode, cache_bytes = compile_engine(
        prepared, mesh, shapes, DEFAULT_SETTINGS, options, prefill_slots=request.cache_length
    )
    params = prepared.params
    return CompiledInference(
        topology=topology,
        config=config,
        request=request,
        prefill=prefill,
        decode=decode,
        coordinates=device_coordinates(mesh),
        parameter_bytes=device_bytes(params),
        read_bytes=device_bytes(params) - device_bytes(params["embed_tokens"]),
        cache_bytes=cache_bytes,
    )


def compile_engine(
    prepared: engine.Prepared, mesh: Mesh, shapes: RolloutShapes, settings: Settings, options: dict[str, Value], *,
    prefill_slots: int, log_probs: bool = False,
) -> tuple[CompiledProgram, CompiledProgram, int]:  # fmt: skip
    """Prefill into a cache of `prefill_slots` and the decoding loop, and the bytes of keys and values on a device.

    `prepared` is abstract. Raises as `compile_inference`.
    """
    place = functools.partial(place_shapes, mesh)
    programs, settings = engine.programs(prepared.compute), settings.check(prepared.config)
    top_k = settings.top_k

    def sampling(rows: int) -> Any:
        return place(jax.eval_shape(lambda: sampling_of([settings] * rows, range(rows))))

    with jax.set_mesh(mesh), use_rules(engine.decoding_rules()):
        ids = place(jax.ShapeDtypeStruct((shapes.prefill_rows, shapes.prompt_slots), jnp.int32))
        allocate = functools.partial(programs.allocate, length=shapes.slots, log_probs=log_probs)
        state = place(jax.eval_shape(allocate, prepared, sampling(shapes.rows)))
        steps = place(jax.ShapeDtypeStruct((), jnp.int32))
        prefill = functools.partial(
            programs.prefill.lower, prepared, ids, ids, sampling(shapes.prefill_rows), length=prefill_slots,
            top_k=top_k, log_probs=log_probs,
        )  # fmt: skip
        decode = functools.partial(programs.decode.lower, prepared, state, steps, top_k=top_k)
        return (
            compile_program("prefill", prefill, options), compile_program("decoding loop", decode, options),
            device_bytes((state.cache.k, state.cache.v)),
        )  # fmt: skip


def device_bytes(tree: Any) -> int:
    """Of one device, of arrays or their shapes."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


# -------------------------------------------------------------------------------------------------------------- report


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """One of the two programs; per chip. Times are compile-time estimates, memory is what the compiler allocates."""

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


@dataclasses.dataclass(frozen=True)
class InferenceReport:
    """Both programs as figures; bytes are per chip."""

    topology: str
    chips: int
    mesh: MeshConfig
    request: Request
    parameter_bytes: int
    read_bytes: int
    cache_bytes: int
    hbm_bandwidth: float
    """Of a chip, bytes/s."""
    prefill: ProgramReport
    decode: ProgramReport
    """One step of it."""

    @property
    def prefill_tokens_per_second(self) -> float:
        """Of all chips."""
        return self.request.batch * self.request.prompt_length / self.prefill.estimate.seconds

    @property
    def floor_seconds(self) -> float:
        """A decoding step cannot be faster than HBM gives its parameters and the full cache, at HBM_SHARE."""
        return (self.read_bytes + self.cache_bytes) / (HBM_SHARE * self.hbm_bandwidth)

    @property
    def largest_batch(self) -> int:
        """Arithmetic, not compiled: sequences whose cache and prefill fit beside the parameters in HBM_LIMIT of HBM.

        The parameters are the prepared ones, `engine.prepare` with `donate`: another model has no room.
        """
        shards = self.mesh.batch_shards[1]
        room = HBM_LIMIT * self.prefill.hbm_bytes - self.parameter_bytes
        a_sequence = (self.cache_bytes + self.prefill.memory.temporaries) / self.request.batch
        return max(int(room / a_sequence) // shards * shards, 0)

    @property
    def warnings(self) -> list[str]:
        programs = (("prefill", self.prefill), ("decoding", self.decode))
        return [f"{name}: {line}" for name, program in programs for line in program.warnings]

    def as_json(self) -> dict[str, Any]:
        """For `--json`; times in seconds, memory and traffic in bytes."""
        step = self.decode.estimate
        return {
            "note": "compile-time estimates, nothing was run; a decoding step reads a full cache",
            "topology": self.topology,
            "chips": self.chips,
            "mesh": _sizes(self.mesh),
            **dataclasses.asdict(self.request),
            "parameter_bytes_per_chip": self.parameter_bytes,
            "cache_bytes_per_chip": self.cache_bytes,
            "largest_batch_by_arithmetic": self.largest_batch,
            "prefill": self.prefill.as_json() | {"estimated_tokens_per_second": self.prefill_tokens_per_second},
            "decode": self.decode.as_json()
            | {
                "floor_seconds": self.floor_seconds,
                "estimated_tokens_per_second_per_sequence": 1 / step.seconds,
                "estimated_tokens_per_second": self.request.batch / step.seconds,
                "estimated_tokens_per_second_at_worst": self.request.batch / step.seconds_high,
            },
        }


def _sizes(mesh: MeshConfig) -> dict[str, int]:
    return {name: size for name, size in dataclasses.asdict(mesh).items() if name != "num_cpu_devices"}


def make_report(compiled: CompiledInference) -> InferenceReport:
    """Reads both programs."""
    topology = compiled.topology
    devices = topology.chip.devices

    return InferenceReport(
        topology=str(topology),
        chips=topology.num_chips,
        mesh=compiled.config.mesh,
        request=compiled.request,
        parameter_bytes=devices * compiled.parameter_bytes,
        read_bytes=devices * compiled.read_bytes,
        cache_bytes=devices * compiled.cache_bytes,
        hbm_bandwidth=topology.chip.hbm_bandwidth,
        prefill=report_program(compiled.prefill, topology, compiled.coordinates),
        decode=report_program(compiled.decode, topology, compiled.coordinates),
    )


def report_program(
    program: CompiledProgram, topology: Topology, coordinates: Sequence[tuple[int, ...]]
) -> ProgramReport:
    """Reads one program of inference; of a loop whose length is data, one pass."""
    parsed = Program(program.hlo, open_trips=1)
    estimate = estimate_step(parsed, topology, coordinates, streams_weights=True)
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


def render(report: InferenceReport) -> list[tuple[str, str]]:
    """The report as lines (name, text); every time and rate is called estimated."""
    request, step = report.request, report.decode.estimate
    mesh = " x ".join(f"{name} {size}" for name, size in _sizes(report.mesh).items() if size > 0)
    count = sum(traffic.count for traffic in step.collectives.values())
    return [
        ("topology", f"{report.topology}, {report.chips} chips: {mesh}"),
        (
            "request",
            f"{request.batch} sequences, prompts of {request.prompt_length}, cache of {request.cache_length} slots",
        ),
        ("parameters, cache per chip", f"{gib(report.parameter_bytes)}, {gib(report.cache_bytes)}"),
        (
            "largest batch",
            f"{report.largest_batch} by arithmetic on these bytes and the prefill's temporaries, in {HBM_LIMIT:.0%} of "
            f"{gib(report.prefill.hbm_bytes)}; not compiled",
        ),
        *program_rows("prefill", report.prefill),
        ("prefill: estimated tokens/s", f"{report.prefill_tokens_per_second:,.0f} of all chips together"),
        *program_rows("decoding step", report.decode),
        (
            "decoding step: floor",
            f"{_milliseconds(report.floor_seconds)} for {gib(report.read_bytes)} of parameters and "
            f"{gib(report.cache_bytes)} of a full cache at {HBM_SHARE:.0%} of {report.hbm_bandwidth / 1e9:g} GB/s",
        ),
        (
            "decoding: estimated tokens/s",
            f"{1 / step.seconds:,.0f} a sequence, {request.batch / step.seconds:,.0f} in all (at worst "
            f"{1 / step.seconds_high:,.0f}, {request.batch / step.seconds_high:,.0f}), at a full cache; each "
            f"microsecond of latency in the {count} collectives, which is not counted, adds "
            f"{_milliseconds(count * 1e-6)}",
        ),
    ]


def program_rows(name: str, report: ProgramReport) -> list[tuple[str, str]]:
    """One program as lines (name, text)."""
    e = report.estimate
    rows = [
        ("HBM per chip", memory_text(report.memory, report.hbm_bytes)),
        ("compilation", f"{report.compile_seconds:.1f} s, tracing {report.lower_seconds:.1f} s"),
        (
            "estimated time",
            f"{_milliseconds(e.seconds)} = matmuls {_milliseconds(e.matmul)} + vector {_milliseconds(e.vector)} + "
            f"kernels {_milliseconds(e.kernels)} + exposed communication {_milliseconds(e.exposed)}; hidden "
            f"communication {_milliseconds(e.hidden)}; at worst {_milliseconds(e.seconds_high)}",
        ),
        *collective_rows(e),
    ]
    return [(f"{name}: {row}", text) for row, text in rows]


def _milliseconds(seconds: float) -> str:
    return f"{max(1e3 * seconds, 0.0):.2f} ms"
