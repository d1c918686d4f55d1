"""A server compiled for a topology: how many sequences fit, and the time of prompt chunks and decoding steps.

Programs and parameters are the server's (`bc2_jax.infer.engine`), with every setting a request may have. Only requests
with rare settings (`infer.sampling.RARE`) run all of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from bc2_jax.aot.compilation import CompiledProgram, DoesNotFit, device_coordinates, resolve_on
from bc2_jax.aot.inference import AbstractEngine, CompiledEngine, abstract_prepared, device_bytes, inference_compute
from bc2_jax.aot.report import ProgramReport, Rows, gib, milliseconds, named, program_rows, report_program
from bc2_jax.aot.search import HBM_LIMIT
from bc2_jax.config import MeshConfig, ModelConfig, RunConfig
from bc2_jax.infer import engine
from bc2_jax.infer.decoding import CacheDType
from bc2_jax.infer.generate import bucket
from bc2_jax.infer.refill import RolloutShapes
from bc2_jax.infer.sampling import RARE
from bc2_jax.infer.settings import DEFAULT_SETTINGS, Sampling, sampling_of
from bc2_jax.model.quantized import Scheme
from bc2_jax.sharding import parts, use_rules
from bc2_jax.tpu.chips import Topology
from bc2_jax.tpu.options import Value
from bc2_jax.tpu.rates import Rates
from bc2_jax.validation import require

TRIES = 4  # compilations at most to find the number of slots


@dataclasses.dataclass(frozen=True)
class ServingShapes:
    """Options of a server. A slot is a row of the engine's batch, for one sequence."""

    slots: int | None = None  # none for the most that fit
    slot_length: int = 4096  # tokens of prompt and answer that a slot holds
    prompt_length: int = 1024  # prompt whose time to the first token is estimated
    quantize: Scheme | None = None  # weights; None for bf16
    kv: CacheDType = "compute"

    def check(self, model: ModelConfig, mesh: MeshConfig) -> None:
        """Raises ValueError for sizes that this model on this (resolved) mesh cannot have."""
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
    """The programs, and bytes per chip."""

    topology: Topology
    config: RunConfig  # with the mesh filled in
    shapes: ServingShapes
    slots: int
    engine: CompiledEngine
    coordinates: tuple[tuple[int, ...], ...]
    parameter_bytes: int  # prepared parameters
    read_bytes: int  # parameters that each decoding step reads: all but the embedding table


def compile_serving(
    config: RunConfig, topology: Topology, shapes: ServingShapes, options: dict[str, Value]
) -> CompiledServing:
    """Compiles a server's programs. Raises as `compile_step`, and ValueError for shapes that do not match the model."""
    config, mesh = resolve_on(topology, config)
    shapes.check(config.model, config.mesh)
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
        # Decoding has the largest temporaries: logits of every slot.
        slots, decode = most_slots(lambda slots: engine_of(slots).decode(), limit, held, step, a_step)
        compiled = engine_of(slots).compile(decode)
    else:
        slots, compiled = shapes.slots, engine_of(shapes.slots).compile()
    size, embedding = (
        topology.chip.devices * device_bytes(tree) for tree in (prepared.params, prepared.params["embed_tokens"])
    )
    coordinates = device_coordinates(mesh)
    return CompiledServing(topology, config, shapes, slots, compiled, coordinates, size, size - embedding)


def settings_of(rows: int) -> Sampling:
    """Every setting that requests may have."""
    eos = dataclasses.replace(DEFAULT_SETTINGS, eos_token_id=(0,))
    return sampling_of([eos] * rows, range(rows), top_log_probs=[None] * rows, full=True)


def most_slots(
    compile_slots: Callable[[int], CompiledProgram], limit: int, held: int, step: int, a_step: int
) -> tuple[int, CompiledProgram]:
    """The largest multiple of `step` slots whose program is laid out in `limit` bytes, and that program.

    `held`: bytes of the parameters; `a_step`: bytes of `step` slots. The size of temporaries is known only after
    compiling; it is extrapolated linearly in the slots for the next try.
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
        # Stay within what is known to be too small and too large.
        least, most = (found[0] // step + 1 if found else 1), too_many - 1
        wanted = (limit - held) * steps // (needed - held)
        if least > most or (needed <= limit and wanted < least):
            break
        steps = int(min(max(wanted, least), most))
    if found is None:
        raise DoesNotFit(
            f"Not even {step} slots fit a device: of {gib(limit)} they take {gib(a_step)}, the parameters {gib(held)}.",
            None,
        )
    return found


@dataclasses.dataclass(frozen=True)
class ServingReport:
    """Figures of a server; bytes are per chip, times are compile-time estimates."""

    compiled: CompiledServing
    extend: ProgramReport  # A chunk of a prompt, without its attention
    key_seconds: float  # additional time of a chunk per key that it attends to
    decode: ProgramReport  # one step with all slots full and the default settings
    rare_seconds: float  # additional time of a step if a request has rare settings

    @property
    def parameter_bytes(self) -> int:
        return self.compiled.parameter_bytes

    @property
    def cache_bytes(self) -> int:
        return self.compiled.topology.chip.devices * self.compiled.engine.cache_bytes

    @property
    def state_bytes(self) -> int:
        return self.compiled.topology.chip.devices * self.compiled.engine.state_bytes

    def chunk_seconds(self, chunk: int) -> float:
        """Chunk number `chunk` of a prompt, from 0; each attends to all before it."""
        return self.extend.estimate.seconds + (chunk + 1) * self.compiled.engine.chunk_length * self.key_seconds

    @property
    def num_chunks(self) -> int:
        return math.ceil(self.compiled.shapes.prompt_length / self.compiled.engine.chunk_length)

    @property
    def first_token_seconds(self) -> float:
        """From the start of a prompt to its first token, its chunks in sequence."""
        return sum(map(self.chunk_seconds, range(self.num_chunks)))

    def _floor(self, cache_bytes: float) -> float:
        """Time to read the parameters and so much cache at `Rates.hbm_share` of the bandwidth."""
        bandwidth = self.decode.rates.hbm_share * self.compiled.topology.chip.hbm_bandwidth
        return (self.compiled.read_bytes + cache_bytes) / bandwidth

    @property
    def floor_seconds(self) -> float:
        """Lower bound of a step with all slots full."""
        return self._floor(self.cache_bytes)

    @property
    def single_share(self) -> float:
        """Share of the slots in use with one sequence: each replica of the mesh has slots of its own."""
        return self.compiled.config.mesh.batch_shards[1] / self.compiled.slots

    @property
    def single_seconds(self) -> float:
        """A step with one full slot in use: attention reads only its cache."""
        return self.decode.estimate.seconds - self.decode.estimate.kernels * (1 - self.single_share)

    @property
    def single_floor_seconds(self) -> float:
        return self._floor(self.cache_bytes * self.single_share)

    @property
    def warnings(self) -> list[str]:
        programs = (("chunk of a prompt", self.extend), ("decoding", self.decode))
        return [f"{name}: {line}" for name, program in programs for line in program.warnings]

    def as_json(self) -> dict[str, Any]:
        """For `--json`; times in seconds."""
        compiled, step = self.compiled, self.decode.estimate
        return {
            "note": "compile-time estimates, nothing was run; a decoding step reads the full cache of all slots",
            "topology": str(compiled.topology),
            "chips": compiled.topology.num_chips,
            "mesh": _sizes(compiled.config.mesh),
            **dataclasses.asdict(compiled.shapes),
            "slots": compiled.slots,
            "chunk_length": compiled.engine.chunk_length,
            "parameter_bytes_per_chip": self.parameter_bytes,
            "cache_bytes_per_chip": self.cache_bytes,
            "state_bytes_per_chip": self.state_bytes,
            "estimated_seconds_to_first_token": self.first_token_seconds,
            "extend": self.extend.as_json() | {"estimated_seconds_of_a_key": self.key_seconds},
            "decode": self.decode.as_json()
            | {
                "estimated_seconds_of_rare_settings": self.rare_seconds,
                "estimated_tokens_per_second": compiled.slots / step.seconds,
                "estimated_tokens_per_second_at_worst": compiled.slots / step.seconds_high,
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


def make_report(compiled: CompiledServing, rates: Rates | None = None) -> ServingReport:
    """Reads the programs. `rates`: by default `default_rates` of the chip."""
    topology, programs, coordinates = compiled.topology, compiled.engine, compiled.coordinates
    extend, more = (
        report_program(programs.extend, topology, coordinates, rates, trips=trips, without=RARE) for trips in (0, 1)
    )
    decode, every = (
        report_program(programs.decode, topology, coordinates, rates, without=scope) for scope in (RARE, "")
    )
    key_seconds = (more.estimate.seconds - extend.estimate.seconds) / programs.key_block
    return ServingReport(compiled, extend, key_seconds, decode, every.estimate.seconds - decode.estimate.seconds)


def render(report: ServingReport) -> Rows:
    """The report as lines; every time and rate is called estimated."""
    compiled, shapes, step = report.compiled, report.compiled.shapes, report.decode.estimate
    slots, chunks = compiled.slots, report.num_chunks
    mesh = " x ".join(f"{name} {size}" for name, size in _sizes(compiled.config.mesh).items() if size > 0)
    latencies = sum(traffic.count for traffic in step.collectives.values())
    found = "given" if shapes.slots is not None else f"the most that fit {HBM_LIMIT:.0%} of HBM, compiled"
    return [
        ("topology", f"{compiled.topology}, {compiled.topology.num_chips} chips: {mesh}"),
        ("slots", f"{slots} of {shapes.slot_length} tokens, {found}"),
        (
            "parameters, cache per chip",
            f"{gib(report.parameter_bytes)} ({shapes.quantize or 'bf16'}), {gib(report.cache_bytes)} "
            f"({'int8' if shapes.kv == 'int8' else 'bf16'}); "
            f"other state {gib(report.state_bytes - report.cache_bytes)}",
        ),
        *named("chunk of a prompt", program_rows(report.extend)),
        (
            "estimated time to first token",
            f"{milliseconds(report.first_token_seconds)} for a prompt of {shapes.prompt_length}, {chunks} chunks of "
            f"{compiled.engine.chunk_length} in sequence, the last {milliseconds(report.chunk_seconds(chunks - 1))}",
        ),
        *named("decoding step", program_rows(report.decode)),
        (
            "decoding: estimated tokens/s",
            f"{slots / step.seconds:,.0f} in all (at worst {slots / step.seconds_high:,.0f}), all slots full, "
            f"{report.floor_seconds / step.seconds:.0%} of what HBM gives at {report.decode.rates.hbm_share:.0%}: "
            f"{slots / report.floor_seconds:,.0f} for {gib(compiled.read_bytes)} of parameters and the cache; rare "
            f"settings add {milliseconds(report.rare_seconds)}; each microsecond of latency of the {latencies} "
            f"collectives, which is not counted, adds {milliseconds(latencies * 1e-6)}",
        ),
        (
            "one sequence: estimated tokens/s",
            f"{1 / report.single_seconds:,.0f}, {report.single_floor_seconds / report.single_seconds:.0%} of what HBM "
            "gives: the step of all slots minus the time for the other caches",
        ),
    ]
