"""Figures, warnings and JSON of a compiled program and of a compiled training step."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from bc2_jax.aot.compilation import CompiledProgram, CompiledStep, Memory
from bc2_jax.aot.estimate import Audit, Estimate, audit, estimate_step
from bc2_jax.aot.program import Program
from bc2_jax.config import FineTuneConfig, TrainConfig
from bc2_jax.tpu.chips import GIB, Topology
from bc2_jax.tpu.rates import FIELDS, Rates, default_rates

PAPER_TOKENS = 2.6e12  # Baichuan 2's training tokens (paper section 2.1)
LARGE = 2**25  # bytes from which a tensor is worth a warning
Rows = list[tuple[str, str]]  # lines of a report: (name, text)


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """One program, per chip. Times are compile-time estimates, memory is what the compiler allocates."""

    memory: Memory
    hbm_bytes: int  # the chip's capacity
    lower_seconds: float
    compile_seconds: float
    rates: Rates  # those of the estimate
    estimate: Estimate
    warnings: tuple[str, ...]

    def as_json(self, name: str = "") -> dict[str, Any]:
        """Times in seconds, memory and traffic in bytes; `name` goes into the keys of the times."""
        e = self.estimate
        parts = ("matmul", "matmul_raw", "vector", "vector_raw", "kernels", "exposed", "hidden")
        return {
            "hbm_bytes_per_chip": self.memory.total,
            "hbm": dataclasses.asdict(self.memory) | {"share": self.memory.laid_out / self.hbm_bytes},
            "lower_seconds": self.lower_seconds,
            "compile_seconds": self.compile_seconds,
            f"estimated_{name}seconds": e.seconds,
            f"estimated_{name}seconds_at_worst": e.seconds_high,
            f"estimated_{name}parts": {part: getattr(e, part) for part in parts},
            "collectives": {
                kind: dataclasses.asdict(t) | {"asynchronous": t.asynchronous_bytes == t.bytes}
                for kind, t in e.collectives.items()
            },
            "rates": self.rates.as_json(),
            "warnings": list(self.warnings),
        }


@dataclasses.dataclass(frozen=True)
class Report:
    """A training step, per chip."""

    topology: str
    chips: int
    sequences_per_chip: float
    program: ProgramReport
    flops: float  # model FLOPs of a step, without recomputation
    flops_formula: str
    tokens: float  # tokens of a step
    peak_flops: float
    audit: Audit
    is_pretraining: bool  # whether to report the days for PAPER_TOKENS

    @property
    def memory(self) -> Memory:
        return self.program.memory

    @property
    def estimate(self) -> Estimate:
        return self.program.estimate

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.program.warnings

    @property
    def mfu(self) -> float:
        return self.flops / self.estimate.seconds / self.peak_flops

    @property
    def mfu_low(self) -> float:
        """With raw vector cycles and all communication exposed."""
        return self.flops / self.estimate.seconds_high / self.peak_flops

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.estimate.seconds

    @property
    def days(self) -> float:
        """Days for PAPER_TOKENS on all chips."""
        return PAPER_TOKENS / self.tokens_per_second / self.chips / 86_400

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "note": "compile-time estimates, nothing was run",
            "topology": self.topology,
            "chips": self.chips,
            "sequences_per_chip": self.sequences_per_chip,
            "model_flops_per_chip": self.flops,
            **self.program.as_json("step_"),
            "estimated_mfu": self.mfu,
            "estimated_mfu_low": self.mfu_low,
            "tokens_per_second_per_chip": self.tokens_per_second,
            "days_for_2_6_trillion_tokens": self.days if self.is_pretraining else None,
            "audit": dataclasses.asdict(self.audit) | {"complete": self.audit.complete},
        }


def report_program(
    program: CompiledProgram, topology: Topology, coordinates: Sequence[tuple[int, ...]], rates: Rates | None = None, *,
    trips: int = 1, without: str = "",
) -> ProgramReport:  # fmt: skip
    """Reads one program of inference.

    `rates`: by default `default_rates` of the chip. `trips`: passes of a loop whose length is data. `without`: branches
    with instructions of this scope do not run.
    """
    parsed = Program(program.hlo, open_trips=trips)
    rates = rates or default_rates(topology.chip)
    estimate = estimate_step(parsed, topology, coordinates, rates, streams_weights=True, without=without)
    return _report(program, topology, rates, estimate, copy_warnings(parsed))


def _report(
    program: CompiledProgram, topology: Topology, rates: Rates, estimate: Estimate, found: list[str]
) -> ProgramReport:
    lines = (*estimate.warnings, *found, *_synchronous_warnings(estimate), *_log_warnings(program.log))
    return ProgramReport(
        program.memory.of(topology.chip.devices), topology.chip.hbm_bytes, program.lower_seconds,
        program.compile_seconds, rates, estimate, lines,
    )  # fmt: skip


def make_report(step: CompiledStep, rates: Rates | None = None) -> Report:
    """Reads the compiled step. `rates`: by default `default_rates` of the chip.

    Raises ValueError for a loop of unknown length.
    """
    topology, config = step.topology, step.config
    rates = rates or default_rates(topology.chip)
    program = Program(step.hlo)
    estimate = estimate_step(program, topology, step.coordinates, rates)
    length, model = step.length, config.model
    sequences = step.sequences / topology.num_chips
    matmul_parameters = (
        model.flops_per_sequence(length) // (6 * length)
        - model.num_hidden_layers * model.hidden_size * (length + 1)
    )  # fmt: skip
    mesh, adapters = config.mesh, step.adapter_parameters
    trained = f"6 x {matmul_parameters:,} matmul parameters x {length}"
    if adapters:
        trained = f"4 x {matmul_parameters:,} frozen matmul parameters x {length} + 6 x {adapters:,} adapter parameters"
        trained += f" x {length}"
    formula = f"as this kind of run counts them, of {sequences:g} sequences of {length}"
    if type(config) in (TrainConfig, FineTuneConfig):
        attention = f"6 x {model.num_hidden_layers} layers x {model.hidden_size} x {length} x {length + 1}"
        formula = f"{sequences:g} sequences x ({trained} + {attention})"
    found = audit(
        estimate.collectives, matmul_parameters // mesh.tensor,
        is_gathered=mesh.parameter_shards[1] > 1, is_reduced=mesh.data * mesh.parameter_shards[1] > 1,
        trained_parameters=adapters // mesh.tensor if adapters else None,
    )  # fmt: skip
    return Report(
        topology=str(topology), chips=topology.num_chips, sequences_per_chip=sequences,
        program=_report(step, topology, rates, estimate, _step_warnings(step, program, found)),
        flops=step.flops / topology.num_chips, flops_formula=formula, tokens=sequences * length,
        peak_flops=topology.chip.peak_flops, audit=found, is_pretraining=type(config) is TrainConfig,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ warnings


def _step_warnings(step: CompiledStep, program: Program, found: Audit) -> list[str]:
    lines = []
    if not found.complete:
        lines.append(
            f"The count is not complete: {gib(found.gathered_bytes)} gathered of {gib(found.gathered_needed)} "
            f"needed, {gib(found.reduced_bytes)} reduced of {gib(found.reduced_needed)}."
        )
    if step.replicated:
        name, size = max(step.replicated, key=lambda found: found[1])
        more, total = len(step.replicated) - 1, sum(size for _, size in step.replicated)
        others = f", and of {more} more arrays, {gib(total)} in all" if more else ""
        lines.append(f"Every device holds the whole of {name}, {gib(size)}{others}.")
    return lines + _program_warnings(program)


def _program_warnings(program: Program) -> list[str]:
    windowed, recomputed, large = 0, 0, dict[str, tuple[int, int]]()
    for instruction, computation, count in program.walk():
        if "windowed_dot_general" in instruction.name or "windowed_dot_general" in instruction.op_name:
            windowed += 1
        if ".remat" in instruction.name and instruction.cycles:
            recomputed += count
        collective = program.collective(instruction, computation)
        if collective is None or collective.bytes < LARGE:
            continue
        text = ""
        if collective.gathers:
            text = "gathered by all-reduces of padded tensors, with twice the traffic and zeros to write"
        elif collective.kind == "all-reduce":
            text = f"all-reduced in {collective.dtype} instead of scattered, with twice the traffic"
        elif collective.kind == "all-gather" and collective.dtype == "f32":
            text = "gathered in fp32, twice the bytes of bf16"
        if text:
            times, size = large.get(text, (0, 0))
            large[text] = times + count, size + collective.bytes * count
    padding = sum(
        shape.padded_bytes - shape.bytes
        for instruction in program.computations[program.entry].instructions
        for shape in instruction.shapes
        if instruction.opcode == "parameter"
    )
    lines = []
    if windowed:
        lines.append(f"{windowed} instructions are windowed einsums: matmuls split into loops of permutes.")
    if recomputed:
        lines.append(f"The compiler recomputes {recomputed} instructions a step to save memory.")
    if padding >= LARGE:
        lines.append(f"The arguments hold {gib(padding)} of padding to tiles.")
    for text, (times, size) in sorted(large.items(), key=lambda item: -item[1][1]):
        lines.append(f"{gib(size)} in {times} collectives are {text}.")
    return lines


def _synchronous_warnings(estimate: Estimate) -> list[str]:
    lines = []
    for kind, traffic in estimate.collectives.items():
        synchronous = traffic.bytes - traffic.asynchronous_bytes
        if synchronous >= LARGE:
            lines.append(f"{kind} waits for {gib(synchronous)} of {gib(traffic.bytes)}: no work overlaps it.")
    return lines


def _log_warnings(log: str) -> list[str]:
    count = len(re.findall("nvoluntary full rematerialization", log))
    if not count:
        return []
    return [f"{count} tensors are gathered whole to change their layout (involuntary rematerialisation)."]


def copy_warnings(program: Program) -> list[str]:
    """Large arrays that are copied to another place or layout."""
    lines = []
    for instruction, _, count in program.walk():
        size = sum(shape.bytes for shape in instruction.shapes if shape.in_hbm)
        if instruction.opcode == "copy" and size >= LARGE:
            shape = instruction.shapes[0]
            dims = ",".join(map(str, shape.dims))
            lines.append(f"{shape.dtype}[{dims}], {gib(size)}, is copied {count} times.")
    return lines


# ---------------------------------------------------------------------------------------------------------------- text


def render(report: Report) -> Rows:
    """The step as lines; every time and rate is called estimated."""
    a, ideal = report.audit, report.flops / report.peak_flops
    memory, compilation, time, *collectives = program_rows(report.program, "step ", seconds)
    rows = [
        ("topology", f"{report.topology}, {report.chips} chips, {report.sequences_per_chip:g} sequences per chip"),
        memory,
        compilation,
        ("model FLOPs per chip", f"{report.flops:.4e} = {report.flops_formula}"),
        time,
        (
            "estimated MFU",
            f"{report.mfu:.3f} (at worst {report.mfu_low:.3f}); ideal step {ideal:.3f} s at "
            f"{report.peak_flops / 1e12:g} TFLOP/s",
        ),
        ("estimated tokens/s per chip", f"{report.tokens_per_second:,.0f}"),
    ]
    if report.is_pretraining:
        rows.append(("estimated days for 2.6 T tokens", f"{report.days:,.1f} on {report.chips} chips"))
    counted = (
        f"gathered {gib(a.gathered_bytes)} of at least {gib(a.gathered_needed)}, reduced {gib(a.reduced_bytes)} of "
        f"at least {gib(a.reduced_needed)}: {'complete' if a.complete else 'NOT complete'}"
    )
    return [*rows, *collectives, ("audit", counted)]


def milliseconds(value: float) -> str:
    return f"{max(1e3 * value, 0.0):.2f} ms"


def seconds(value: float) -> str:
    return f"{value:.3f} s"


def program_rows(report: ProgramReport, name: str = "", show: Callable[[float], str] = milliseconds) -> Rows:
    """Memory, compilation, estimated time and collectives of a program."""
    e = report.estimate
    rows = [
        ("HBM per chip", memory_text(report.memory, report.hbm_bytes)),
        ("compilation", f"{report.compile_seconds:.1f} s, tracing {report.lower_seconds:.1f} s"),
        (
            f"estimated {name}time",
            f"{show(e.seconds)} = matmuls {show(e.matmul)} + vector {show(e.vector)} + kernels {show(e.kernels)} + "
            f"exposed communication {show(e.exposed)}; hidden communication {show(e.hidden)}; at worst "
            f"{show(e.seconds_high)}",
        ),
    ]
    if report.rates.measured:
        rows.append(("rates", rates_text(report.rates)))
    for kind, t in sorted(e.collectives.items(), key=lambda item: -item[1].bytes):
        share = t.asynchronous_bytes / t.bytes if t.bytes else 0
        duration = seconds(t.seconds) if t.seconds >= 0.01 else f"{1e3 * t.seconds:.3f} ms"
        rows.append((kind, f"{gib(t.bytes)} in {t.count}, {share:.0%} asynchronous, {duration} on the links"))
    return rows


def named(name: str, rows: Rows) -> Rows:
    """`rows` under a common name."""
    return [(f"{name}: {row}", text) for row, text in rows]


def memory_text(memory: Memory, hbm_bytes: int) -> str:
    """The memory of a chip that has `hbm_bytes`."""
    # If host memory is used, the compiler's peak is the larger of both memories' peaks, not HBM's.
    peak = f"in host memory {gib(memory.host)}" if memory.host else f"in use at one time {gib(memory.peak)}"
    return (
        f"{gib(memory.total)}: arguments {gib(memory.arguments)}, temporaries {gib(memory.temporaries)}, other outputs "
        f"{gib(memory.outputs - memory.aliased)}; {peak}; laid out in {gib(memory.laid_out)} = "
        f"{memory.laid_out / hbm_bytes:.0%} of {gib(hbm_bytes)}"
    )


def rates_text(rates: Rates) -> str:
    """The measured rates of an estimate, and how many are not."""
    values = ((name, getattr(rates, name)) for name in rates.measured)
    texts = (
        f"{name} {value:.3g}" if name.endswith("_share") else f"{name} {value / 1e9:.4g} GB/s" for name, value in values
    )
    return f"measured: {', '.join(texts)}; the other {len(FIELDS) - len(rates.measured)} by default"


def gib(size: float) -> str:
    """Bytes as GiB, or as MiB if below 0.1 GiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{math.ceil(size / 2**20)} MiB"
