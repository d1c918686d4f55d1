"""A server on a slice that is not there: how many sequences fit, how long chunks of prompts and decoding steps take.

The programs and the parameters are those of a server (`bc2_jax.infer.engine`), with every setting that a request may
have; only a request with rare ones runs all of it (`infer.sampling.RARE`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from bc2_jax.aot.compilation import CompiledProgram, DoesNotFit, device_coordinates, topology_devices
from bc2_jax.aot.estimate import HBM_SHARE
from bc2_jax.aot.inference import (
    AbstractEngine,
    CompiledEngine,
    ProgramReport,
    abstract_prepared,
    device_bytes,
    inference_compute,
    milliseconds,
    program_rows,
    report_program,
)
from bc2_jax.aot.report import gib
from bc2_jax.aot.search import HBM_LIMIT
from bc2_jax.config import MeshConfig, ModelConfig, RunConfig
from bc2_jax.infer import engine
from bc2_jax.infer.decoding import CacheDType
from bc2_jax.infer.generate import bucket
from bc2_jax.infer.refill import RolloutShapes
from bc2_jax.infer.sampling import RARE
from bc2_jax.infer.settings import DEFAULT_SETTINGS, Sampling, sampling_of
from bc2_jax.model.quantized import Scheme
from bc2_jax.sharding import make_mesh, parts, use_rules
from bc2_jax.tpu.chips import Topology
from bc2_jax.tpu.options import Value
from bc2_jax.validation import require

TRIES = 4
"""Numbers of slots that are compiled at most, where none is given."""


@dataclasses.dataclass(frozen=True)
class ServingShapes:
    """What a server is started with. A slot is the place of one sequence, a row of the engine's batch."""

    slots: int | None = None
    """Sequences at one time; None for the most that fit."""
    slot_length: int = 4096
    """Tokens of prompt and answer that a slot holds."""
    prompt_length: int = 1024
    """Tokens of the prompt whose time to the first token is estimated."""
    quantize: Scheme | None = None
    """Of the weights; None for bf16."""
    kv: CacheDType = "compute"
    """Of the cache."""

    def check(self, model: ModelConfig, mesh: MeshConfig) -> None:
        """Raises ValueError for sizes that a server of this model on this (resolved) mesh cannot have."""
        if self.slots is not None:
            field, shards = mesh.batch_shards
            legal = f"it must be a positive multiple of {field} = {shards}"
            require(self.slots > 0 and self.slots % shards == 0, "slots", self.slots, legal)
        longest = bucket(model.model_max_length)
        require(
            0 < self.slot_length <= longest and self.slot_length % 256 == 0, "slot_length", self.slot_length,
            f"it must be a multiple of 256, at most {longest}, what model.model_max_length = {model.model_max_length} "
            "takes",
        )  # fmt: skip
        legal = f"it must be in 1..{self.slot_length - 1}, so that slot_length = {self.slot_length} has room for it"
        require(0 < self.prompt_length < self.slot_length, "prompt_length", self.prompt_length, legal)


@dataclasses.dataclass(frozen=True)
class CompiledServing:
    """The programs, and the bytes one device holds."""

    topology: Topology
    config: RunConfig
    """With the mesh filled in."""
    shapes: ServingShapes
    slots: int
    engine: CompiledEngine
    coordinates: tuple[tuple[int, ...], ...]
    parameter_bytes: int
    """Prepared parameters."""
    read_bytes: int
    """Those of them that each decoding step reads: all but the embedding table."""


def compile_serving(
    config: RunConfig, topology: Topology, shapes: ServingShapes, options: dict[str, Value]
) -> CompiledServing:
    """Compiles a server's programs for every device of `topology`.

    Raises DoesNotFit where the chip's memory is too small, and ValueError for a mesh or shapes that do not suit the
    model or the devices, or an option that the compiler does not know.
    """
    devices = topology_devices(topology)
    config = config.resolve(len(devices))
    shapes.check(config.model, config.mesh)
    mesh = make_mesh(config.mesh, devices)
    compute = inference_compute(config.compute)
    prepared = abstract_prepared(config.model, compute, mesh, shapes.kv, shapes.quantize)
    with jax.set_mesh(mesh), use_rules(engine.decoding_rules()):
        places, step = parts("batch"), parts("sampling")

    def engine_of(slots: int) -> AbstractEngine:
        return AbstractEngine(prepared, mesh, RolloutShapes(slots, places, shapes.slot_length), settings_of, options)

    if shapes.slots is None:
        limit = int(HBM_LIMIT * topology.chip.hbm_bytes) // topology.chip.devices
        a_step = device_bytes(engine_of(2 * step).state) - device_bytes(engine_of(step).state)
        held = device_bytes(prepared.params)
        # Of all programs decoding has the largest temporaries: logits of every slot.
        slots, decode = most_slots(lambda slots: engine_of(slots).decode(), limit, held, step, a_step)
        compiled = engine_of(slots).compile(decode)
    else:
        slots, compiled = shapes.slots, engine_of(shapes.slots).compile()
    params = prepared.params
    return CompiledServing(
        topology, config, shapes, slots, compiled, device_coordinates(mesh), device_bytes(params),
        device_bytes(params) - device_bytes(params["embed_tokens"]),
    )  # fmt: skip


def settings_of(rows: int) -> Sampling:
    """Settings with all that requests may ask for."""
    eos = dataclasses.replace(DEFAULT_SETTINGS, eos_token_id=(0,))
    return sampling_of([eos] * rows, range(rows), top_log_probs=[None] * rows, full=True)


def most_slots(
    compile_slots: Callable[[int], CompiledProgram], limit: int, held: int, step: int, a_step: int
) -> tuple[int, CompiledProgram]:
    """The most slots whose program is laid out in `limit` bytes, a multiple of `step`, and their program.

    `held` are the bytes of the parameters, `a_step` those that `step` slots take. What temporaries take is known only
    when a number was compiled; they are taken to grow with the slots for the next one.
    """
    steps, too_many = max((limit - held) // a_step, 1), math.inf
    found: tuple[int, CompiledProgram] | None = None
    for _ in range(TRIES):
        try:
            compiled = compile_slots(steps * step)
            needed = compiled.memory.laid_out
        except DoesNotFit as error:
            needed = max(error.needed_bytes or 0, limit + 1)
        if needed <= limit:
            found = (steps * step, compiled)
        else:
            too_many = min(too_many, steps)
        # Never back to a number that is known to be too small or too large.
        least, most = (found[0] // step + 1 if found else 1), too_many - 1
        wanted = (limit - held) * steps // (needed - held)
        if least > most or (needed <= limit and wanted < least):
            break
        steps = int(min(max(wanted, least), most))
    if found is None:
        raise DoesNotFit(
            f"Not even {step} slots fit a device: they take {gib(a_step)}, the parameters {gib(held)}, and "
            f"{gib(limit)} may be used.",
            None,
        )
    return found


# -------------------------------------------------------------------------------------------------------------- report


@dataclasses.dataclass(frozen=True)
class ServingReport:
    """Figures of a server; bytes are per chip, times are compile-time estimates."""

    topology: str
    chips: int
    mesh: MeshConfig
    shapes: ServingShapes
    slots: int
    chunk_length: int
    parameter_bytes: int
    read_bytes: int
    cache_bytes: int
    state_bytes: int
    hbm_bandwidth: float
    """Of a chip, bytes/s."""
    replicas: int
    """Parts of the mesh that each have slots of their own."""
    extend: ProgramReport
    """A chunk of a prompt, without its attention."""
    key_seconds: float
    """What each key that a chunk attends to adds to it."""
    decode: ProgramReport
    """One step, all slots full, with the default settings."""
    rare_seconds: float
    """What a step takes longer if a request has rare settings."""

    def chunk_seconds(self, chunk: int) -> float:
        """Of the chunk with this number of a prompt, from 0; each attends to all before it."""
        return self.extend.estimate.seconds + (chunk + 1) * self.chunk_length * self.key_seconds

    @property
    def first_token_seconds(self) -> float:
        """From the start of a prompt to its first token, if its chunks run one after another."""
        return sum(map(self.chunk_seconds, range(math.ceil(self.shapes.prompt_length / self.chunk_length))))

    @property
    def floor_seconds(self) -> float:
        """A step of all slots cannot be faster than HBM gives its parameters and the full cache, at HBM_SHARE."""
        return (self.read_bytes + self.cache_bytes) / (HBM_SHARE * self.hbm_bandwidth)

    @property
    def single_seconds(self) -> float:
        """A step in which one slot is in use and full: that of all slots, but attention reads only its cache."""
        return self.decode.estimate.seconds - self.decode.estimate.kernels * (1 - self.replicas / self.slots)

    @property
    def single_floor_seconds(self) -> float:
        read = self.read_bytes + self.cache_bytes * self.replicas / self.slots
        return read / (HBM_SHARE * self.hbm_bandwidth)

    @property
    def warnings(self) -> list[str]:
        programs = (("chunk of a prompt", self.extend), ("decoding", self.decode))
        return [f"{name}: {line}" for name, program in programs for line in program.warnings]

    def as_json(self) -> dict[str, Any]:
        """For `--json`; times in seconds, memory and traffic in bytes."""
        step = self.decode.estimate
        return {
            "note": "compile-time estimates, nothing was run; a decoding step reads the full cache of all slots",
            "topology": self.topology,
            "chips": self.chips,
            "mesh": _sizes(self.mesh),
            **dataclasses.asdict(self.shapes),
            "slots": self.slots,
            "chunk_length": self.chunk_length,
            "parameter_bytes_per_chip": self.parameter_bytes,
            "cache_bytes_per_chip": self.cache_bytes,
            "state_bytes_per_chip": self.state_bytes,
            "estimated_seconds_to_first_token": self.first_token_seconds,
            "extend": self.extend.as_json() | {"estimated_seconds_of_a_key": self.key_seconds},
            "decode": self.decode.as_json()
            | {
                "estimated_seconds_of_rare_settings": self.rare_seconds,
                "estimated_tokens_per_second": self.slots / step.seconds,
                "estimated_tokens_per_second_at_worst": self.slots / step.seconds_high,
                "floor_seconds": self.floor_seconds,
                "floor_share": self.floor_seconds / step.seconds,
            },
            "single": {
                "estimated_seconds": self.single_seconds,
                "estimated_tokens_per_second": 1 / self.single_seconds,
                "floor_seconds": self.single_floor_seconds,
                "floor_share": self.single_floor_seconds / self.single_seconds,
            },
        }


def _sizes(mesh: MeshConfig) -> dict[str, int]:
    return {name: size for name, size in dataclasses.asdict(mesh).items() if name != "num_cpu_devices"}


def make_report(compiled: CompiledServing) -> ServingReport:
    """Reads the programs."""
    topology, programs, coordinates = compiled.topology, compiled.engine, compiled.coordinates
    devices = topology.chip.devices
    extend, more = (
        report_program(programs.extend, topology, coordinates, trips=trips, without=RARE) for trips in (0, 1)
    )
    decode, every = (report_program(programs.decode, topology, coordinates, without=scope) for scope in (RARE, ""))
    return ServingReport(
        topology=str(topology),
        chips=topology.num_chips,
        mesh=compiled.config.mesh,
        shapes=compiled.shapes,
        slots=compiled.slots,
        chunk_length=programs.chunk_length,
        parameter_bytes=devices * compiled.parameter_bytes,
        read_bytes=devices * compiled.read_bytes,
        cache_bytes=devices * programs.cache_bytes,
        state_bytes=devices * programs.state_bytes,
        hbm_bandwidth=topology.chip.hbm_bandwidth,
        replicas=compiled.config.mesh.batch_shards[1],
        extend=extend,
        key_seconds=(more.estimate.seconds - extend.estimate.seconds) / programs.key_block,
        decode=decode,
        rare_seconds=every.estimate.seconds - decode.estimate.seconds,
    )


def render(report: ServingReport) -> list[tuple[str, str]]:
    """The report as lines (name, text); every time and rate is called estimated."""
    shapes, step = report.shapes, report.decode.estimate
    mesh = " x ".join(f"{name} {size}" for name, size in _sizes(report.mesh).items() if size > 0)
    chunks = math.ceil(shapes.prompt_length / report.chunk_length)
    latencies = sum(traffic.count for traffic in step.collectives.values())
    found = "given" if shapes.slots is not None else f"the most that fit {HBM_LIMIT:.0%} of HBM, compiled"
    return [
        ("topology", f"{report.topology}, {report.chips} chips: {mesh}"),
        ("slots", f"{report.slots} of {shapes.slot_length} tokens, {found}"),
        (
            "parameters, cache per chip",
            f"{gib(report.parameter_bytes)} ({shapes.quantize or 'bf16'}), {gib(report.cache_bytes)} "
            f"({'int8' if shapes.kv == 'int8' else 'bf16'}); "
            f"other state {gib(report.state_bytes - report.cache_bytes)}",
        ),
        *program_rows("chunk of a prompt", report.extend),
        (
            "estimated time to first token",
            f"{milliseconds(report.first_token_seconds)} for a prompt of {shapes.prompt_length}, {chunks} chunks of "
            f"{report.chunk_length} one after another, the last {milliseconds(report.chunk_seconds(chunks - 1))}",
        ),
        *program_rows("decoding step", report.decode),
        (
            "decoding: estimated tokens/s",
            f"{report.slots / step.seconds:,.0f} in all (at worst {report.slots / step.seconds_high:,.0f}), all slots "
            f"full, {report.floor_seconds / step.seconds:.0%} of what HBM gives at {HBM_SHARE:.0%}: "
            f"{report.slots / report.floor_seconds:,.0f} for {gib(report.read_bytes)} of parameters and the cache; "
            f"rare settings add {milliseconds(report.rare_seconds)}; each microsecond of latency in the {latencies} "
            f"collectives, which is not counted, adds {milliseconds(latencies * 1e-6)}",
        ),
        (
            "one sequence: estimated tokens/s",
            f"{1 / report.single_seconds:,.0f}, {report.single_floor_seconds / report.single_seconds:.0%} of what HBM "
            "gives: the step of all slots, less the time for the caches of the others",
        ),
    ]
