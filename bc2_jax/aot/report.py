"""One compiled step as figures, warnings and JSON."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from bc2_jax.aot.compilation import CompiledStep, Memory
from bc2_jax.aot.estimate import Audit, Estimate, audit, estimate_step
from bc2_jax.aot.program import Program
from bc2_jax.config import FineTuneConfig, TrainConfig
from bc2_jax.tpu.chips import GIB

PAPER_TOKENS = 2.6e12
"""What Baichuan 2 was trained on (paper section 2.1)."""
LARGE = 2**25
"""Bytes from which one tensor is worth a warning."""


@dataclasses.dataclass(frozen=True)
class Report:
    """All figures are per chip and compile-time estimates, but the memory, which is what the compiler allocates."""

    topology: str
    chips: int
    sequences_per_chip: float
    memory: Memory
    hbm_bytes: int
    """What the chip has."""
    lower_seconds: float
    compile_seconds: float
    flops: float
    """Model FLOPs of a step, without recomputation."""
    flops_formula: str
    tokens: float
    """Tokens of a step."""
    estimate: Estimate
    peak_flops: float
    audit: Audit
    warnings: tuple[str, ...]
    is_pretraining: bool
    """Whether it makes sense to ask how long the paper's tokens take."""

    @property
    def hbm_bytes_used(self) -> int:
        return self.memory.total

    @property
    def mfu(self) -> float:
        return self.flops / self.estimate.seconds / self.peak_flops

    @property
    def mfu_low(self) -> float:
        """With raw vector cycles and no communication hidden."""
        return self.flops / self.estimate.seconds_high / self.peak_flops

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.estimate.seconds

    @property
    def days(self) -> float:
        """Days for PAPER_TOKENS on all chips."""
        return PAPER_TOKENS / self.tokens_per_second / self.chips / 86_400

    def as_json(self) -> dict[str, Any]:
        """For `--json`; times in seconds, memory and traffic in bytes."""
        estimate = self.estimate
        return {
            "note": "compile-time estimates, nothing was run",
            "topology": self.topology,
            "chips": self.chips,
            "sequences_per_chip": self.sequences_per_chip,
            "hbm_bytes_per_chip": self.hbm_bytes_used,
            "hbm": memory_json(self.memory, self.hbm_bytes),
            "lower_seconds": self.lower_seconds,
            "compile_seconds": self.compile_seconds,
            "model_flops_per_chip": self.flops,
            "estimated_step_seconds": estimate.seconds,
            "estimated_step_parts": parts_json(estimate),
            "estimated_mfu": self.mfu,
            "estimated_mfu_low": self.mfu_low,
            "tokens_per_second_per_chip": self.tokens_per_second,
            "days_for_2_6_trillion_tokens": self.days if self.is_pretraining else None,
            "collectives": collectives_json(estimate),
            "audit": dataclasses.asdict(self.audit) | {"complete": self.audit.complete},
            "warnings": list(self.warnings),
        }


def make_report(step: CompiledStep) -> Report:
    """Reads the compiled step. Raises ValueError for a program whose loops have no known length."""
    topology, config = step.topology, step.config
    program = Program(step.hlo)
    estimate = estimate_step(program, topology, step.coordinates)
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
    found = audit(
        estimate.collectives, matmul_parameters // mesh.tensor,
        is_gathered=mesh.parameter_shards[1] > 1, is_reduced=mesh.data * mesh.parameter_shards[1] > 1,
        trained_parameters=adapters // mesh.tensor if adapters else None,
    )  # fmt: skip
    return Report(
        topology=str(topology),
        chips=topology.num_chips,
        sequences_per_chip=sequences,
        memory=step.memory.of(topology.chip.devices),
        hbm_bytes=topology.chip.hbm_bytes,
        lower_seconds=step.lower_seconds,
        compile_seconds=step.compile_seconds,
        flops=step.flops / topology.num_chips,
        flops_formula=(
            f"{sequences:g} sequences x ({trained} "
            f"+ 6 x {model.num_hidden_layers} layers x {model.hidden_size} x {length} x {length + 1})"
            if type(config) in (TrainConfig, FineTuneConfig)
            else f"as this kind of run counts them, of {sequences:g} sequences of {length}"
        ),
        tokens=sequences * length,
        estimate=estimate,
        peak_flops=topology.chip.peak_flops,
        audit=found,
        warnings=tuple(_warnings(step, program, estimate, found)),
        is_pretraining=type(config) is TrainConfig,
    )


def _warnings(step: CompiledStep, program: Program, estimate: Estimate, found: Audit) -> list[str]:
    lines = list(estimate.warnings)
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
    return lines + _of_program(program) + synchronous_warnings(estimate) + log_warnings(step.log)


def synchronous_warnings(estimate: Estimate) -> list[str]:
    """Of collectives that nothing hides."""
    lines = []
    for kind, traffic in estimate.collectives.items():
        synchronous = traffic.bytes - traffic.asynchronous_bytes
        if synchronous >= LARGE:
            lines.append(f"{kind} waits for {gib(synchronous)} of {gib(traffic.bytes)}: nothing runs beside it.")
    return lines


def log_warnings(log: str) -> list[str]:
    """Of what the compiler wrote."""
    count = len(re.findall("nvoluntary full rematerialization", log))
    if not count:
        return []
    return [f"{count} tensors are gathered whole to change their layout (involuntary rematerialisation)."]


def _of_program(program: Program) -> list[str]:
    windowed, recomputed, padding, large = 0, 0, 0, dict[str, tuple[int, int]]()
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
            text = "gathered by all-reduces of padded tensors, at twice the traffic and with zeros to write"
        elif collective.kind == "all-reduce":
            text = f"reduced whole in {collective.dtype} instead of scattered, at twice the traffic"
        elif collective.kind == "all-gather" and collective.dtype == "f32":
            text = "gathered in fp32, twice the bytes of bf16"
        if text:
            times, size = large.get(text, (0, 0))
            large[text] = times + count, size + collective.bytes * count
    for instruction in program.computations[program.entry].instructions:
        if instruction.opcode == "parameter":
            padding += sum(shape.padded_bytes - shape.bytes for shape in instruction.shapes)
    lines = []
    if windowed:
        lines.append(f"{windowed} instructions are windowed einsums: matmuls cut into loops of permutes.")
    if recomputed:
        lines.append(f"The compiler recomputes {recomputed} instructions a step to save memory.")
    if padding >= LARGE:
        lines.append(f"The arguments hold {gib(padding)} of padding to tiles.")
    for text, (times, size) in sorted(large.items(), key=lambda item: -item[1][1]):
        lines.append(f"{gib(size)} in {times} collectives are {text}.")
    return lines


def render(report: Report) -> list[tuple[str, str]]:
    """The report as lines (name, text); every time and rate is called estimated."""
    estimate = report.estimate
    low = report.estimate.seconds_high
    rows = [
        ("topology", f"{report.topology}, {report.chips} chips, {report.sequences_per_chip:g} sequences per chip"),
        ("HBM per chip", memory_text(report.memory, report.hbm_bytes)),
        ("compilation", f"{report.compile_seconds:.1f} s, tracing {report.lower_seconds:.1f} s"),
        ("model FLOPs per chip", f"{report.flops:.4e} = {report.flops_formula}"),
        (
            "estimated step time",
            f"{estimate.seconds:.3f} s = matmuls {estimate.matmul:.3f} + vector {estimate.vector:.3f} + "
            f"kernels {estimate.kernels:.3f} + exposed communication {estimate.exposed:.3f}; "
            f"hidden communication {estimate.hidden:.3f}; at worst {low:.3f} s",
        ),
        (
            "estimated MFU",
            f"{report.mfu:.3f} (at worst {report.mfu_low:.3f}); ideal step "
            f"{report.flops / report.peak_flops:.3f} s at {report.peak_flops / 1e12:g} TFLOP/s",
        ),
        ("estimated tokens/s per chip", f"{report.tokens_per_second:,.0f}"),
    ]
    if report.is_pretraining:
        rows.append(("estimated days for 2.6 T tokens", f"{report.days:,.1f} on {report.chips} chips"))
    rows += collective_rows(estimate)
    a = report.audit
    rows.append((
        "audit",
        f"gathered {gib(a.gathered_bytes)} of at least {gib(a.gathered_needed)}, reduced {gib(a.reduced_bytes)} of "
        f"at least {gib(a.reduced_needed)}: {'complete' if a.complete else 'NOT complete'}",
    ))  # fmt: skip
    return rows


def memory_json(memory: Memory, hbm_bytes: int) -> dict[str, Any]:
    """Of a chip with `hbm_bytes`."""
    return dataclasses.asdict(memory) | {"share": memory.laid_out / hbm_bytes}


def parts_json(estimate: Estimate) -> dict[str, float]:
    """Seconds."""
    names = ("matmul", "matmul_raw", "vector", "vector_raw", "kernels", "exposed", "hidden")
    return {name: getattr(estimate, name) for name in names}


def collectives_json(estimate: Estimate) -> dict[str, Any]:
    """Bytes and seconds of each kind."""
    return {
        kind: dataclasses.asdict(t) | {"asynchronous": t.asynchronous_bytes == t.bytes}
        for kind, t in estimate.collectives.items()
    }


def memory_text(memory: Memory, hbm_bytes: int) -> str:
    """Of a chip with `hbm_bytes`."""
    # Where host memory is used the compiler's peak is that of the larger of the two, not of HBM.
    peak = f"in host memory {gib(memory.host)}" if memory.host else f"in use at one time {gib(memory.peak)}"
    return (
        f"{gib(memory.total)}: arguments {gib(memory.arguments)}, temporaries {gib(memory.temporaries)}, other outputs "
        f"{gib(memory.outputs - memory.aliased)}; {peak}; laid out in {gib(memory.laid_out)} = "
        f"{memory.laid_out / hbm_bytes:.0%} of {gib(hbm_bytes)}"
    )


def collective_rows(estimate: Estimate) -> list[tuple[str, str]]:
    """One line for each kind, most bytes first."""
    rows = []
    for kind, t in sorted(estimate.collectives.items(), key=lambda item: -item[1].bytes):
        share = t.asynchronous_bytes / t.bytes if t.bytes else 0
        seconds = f"{t.seconds:.3f} s" if t.seconds >= 0.01 else f"{1e3 * t.seconds:.3f} ms"
        rows.append((kind, f"{gib(t.bytes)} in {t.count}, {share:.0%} asynchronous, {seconds} on the links"))
    return rows


def gib(size: float) -> str:
    """Bytes as GiB, or as MiB where they are few."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{math.ceil(size / 2**20)} MiB"
