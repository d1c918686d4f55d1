"""The scoring program of `bc2_jax.infer.score`, compiled for a topology, and the estimated time of benchmarks.

How many tokens a benchmark has is an assumption (`Benchmark`), which the report names.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from bc2_jax.aot.compilation import CompiledProgram, compile_program, device_coordinates, resolve_on
from bc2_jax.aot.inference import device_bytes, inference_compute
from bc2_jax.aot.report import ProgramReport, Rows, gib, named, program_rows, report_program
from bc2_jax.config import RunConfig
from bc2_jax.infer.score import check_shapes, empty_rows, make_program
from bc2_jax.model.baichuan import abstract_params, split_model
from bc2_jax.sharding import place_shapes
from bc2_jax.tpu.chips import Topology
from bc2_jax.tpu.options import Value
from bc2_jax.tpu.rates import Rates
from bc2_jax.validation import require_positive


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Items scored after the shots of their subject; token counts are assumed means. All must be positive."""

    name: str
    items: int
    subjects: int
    shot_tokens: int  # header and all shots of a subject
    question_tokens: int  # one item with its options

    def __post_init__(self) -> None:
        require_positive(self, f"{self.name}.", "items", "subjects", "shot_tokens", "question_tokens")

    @classmethod
    def parse(cls, text: str) -> Benchmark:
        """From NAME:ITEMS:SUBJECTS:SHOT_TOKENS:QUESTION_TOKENS. Raises ValueError for other text."""
        name, *numbers = text.split(":")
        if len(numbers) != 4 or not all(number.isdecimal() for number in numbers):
            raise ValueError(
                f"benchmark {text!r} is not valid: write NAME:ITEMS:SUBJECTS:SHOT_TOKENS:QUESTION_TOKENS, such as "
                f"{DEFAULT_BENCHMARKS[0]}."
            )
        return cls(name, *map(int, numbers))

    def __str__(self) -> str:
        return f"{self.name}:{self.items}:{self.subjects}:{self.shot_tokens}:{self.question_tokens}"

    def rows(self, length: int) -> float:
        """Rows of `length` tokens: each has the shots and as many questions as fit; the rest is packed.

        Raises ValueError if not even one question fits.
        """
        room = length - self.shot_tokens
        if room < self.question_tokens:
            raise ValueError(
                f"{self.name}: shots of {self.shot_tokens} tokens and a question of {self.question_tokens} do not fit "
                f"a row of {length}."
            )
        questions = self.items * self.question_tokens
        trunks = self.subjects * math.ceil(questions / self.subjects / room)
        return (questions + trunks * self.shot_tokens) / length


DEFAULT_BENCHMARKS = (
    Benchmark("C-Eval test", 12_342, 52, 450, 80),
    Benchmark("MMLU test", 14_042, 57, 650, 110),
)
"""Items and subjects as released. Tokens are rough guesses; measure them with the tokenizer for a better estimate."""


@dataclasses.dataclass(frozen=True)
class ScoringShapes:
    """A batch."""

    rows: int = 2
    row_length: int = 4096
    places: int = 256  # scored tokens of a row: about 35 questions with 4 letters in 2 spellings


@dataclasses.dataclass(frozen=True)
class CompiledScoring:
    topology: Topology
    shapes: ScoringShapes
    program: CompiledProgram
    coordinates: tuple[tuple[int, ...], ...]
    parameter_bytes: int  # per chip


def compile_scoring(
    config: RunConfig, topology: Topology, shapes: ScoringShapes, options: dict[str, Value]
) -> CompiledScoring:
    """Compiles the scoring of one batch in the compute dtype. Raises as `compile_step`, and ValueError for shapes."""
    require_positive(shapes, "", "rows", "row_length", "places")
    config, mesh = resolve_on(topology, config)
    compute = inference_compute(config.compute)
    with jax.set_mesh(mesh):
        graphdef = split_model(config.model, compute)[0]
        params = abstract_params(config.model, mesh, compute.dtype)
        rows = empty_rows(shapes.rows, shapes.row_length, shapes.places)
        check_shapes(rows)
        rows = place_shapes(mesh, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, rows)))
        lower = functools.partial(make_program().lower, graphdef, params, rows)
        program = compile_program("scoring program", lower, options)
    size = topology.chip.devices * device_bytes(params)
    return CompiledScoring(topology, shapes, program, device_coordinates(mesh), size)


@dataclasses.dataclass(frozen=True)
class ScoringReport:
    """Bytes are per chip; times are compile-time estimates."""

    compiled: CompiledScoring
    program: ProgramReport
    benchmarks: tuple[Benchmark, ...]

    @property
    def parameter_bytes(self) -> int:
        return self.compiled.parameter_bytes

    @property
    def row_seconds(self) -> float:
        return self.program.estimate.seconds / self.compiled.shapes.rows

    def seconds(self, benchmark: Benchmark) -> float:
        """One pass, without loading and compilation."""
        return benchmark.rows(self.compiled.shapes.row_length) * self.row_seconds

    @property
    def total_seconds(self) -> float:
        return sum(map(self.seconds, self.benchmarks))

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.program.warnings

    def as_json(self) -> dict[str, Any]:
        """For `--json`; times in seconds."""
        topology, shapes = self.compiled.topology, self.compiled.shapes
        return {
            "note": "compile-time estimates, nothing was run; tokens of the benchmarks are assumed",
            "topology": str(topology),
            "chips": topology.num_chips,
            **dataclasses.asdict(shapes),
            "parameter_bytes_per_chip": self.parameter_bytes,
            "program": self.program.as_json(),
            "estimated_seconds_per_row": self.row_seconds,
            "benchmarks": [
                dataclasses.asdict(b) | {"rows": b.rows(shapes.row_length), "estimated_seconds": self.seconds(b)}
                for b in self.benchmarks
            ],
            "estimated_seconds": self.total_seconds,
        }


def make_report(
    compiled: CompiledScoring, benchmarks: tuple[Benchmark, ...] = DEFAULT_BENCHMARKS, rates: Rates | None = None
) -> ScoringReport:
    """Reads the program. `rates`: by default `default_rates` of the chip.

    The report's `seconds` raise ValueError for a benchmark that does not fit the rows.
    """
    program = report_program(compiled.program, compiled.topology, compiled.coordinates, rates)
    return ScoringReport(compiled, program, benchmarks)


def render(report: ScoringReport) -> Rows:
    """The report as lines; every time is called estimated, token counts are called assumed."""
    topology, shapes = report.compiled.topology, report.compiled.shapes
    lines = [
        ("topology", f"{topology}, {topology.num_chips} chips"),
        ("batch", f"{shapes.rows} rows of {shapes.row_length} tokens, {shapes.places} scored places a row"),
        ("parameters per chip", gib(report.parameter_bytes)),
        *named("scoring", program_rows(report.program)),
        (
            "estimated time of a row",
            f"{1e3 * report.row_seconds:.0f} ms, {shapes.row_length / report.row_seconds:,.0f} tokens/s of all chips",
        ),
    ]
    for b in report.benchmarks:
        alone = b.items * (b.shot_tokens + b.question_tokens) / shapes.row_length
        rows = b.rows(shapes.row_length)
        text = (
            f"{report.seconds(b):.0f} s for {rows:.0f} rows ({alone / rows:.1f} times as many without shared shots); "
            f"assumed: {b.items:,} items of {b.subjects} subjects, {b.shot_tokens} tokens of shots, "
            f"{b.question_tokens} of a question"
        )
        lines.append((f"{b.name}: estimated time", text))
    total = f"{report.total_seconds:.0f} s = {report.total_seconds / 60:.1f} minutes, without loading and compilation"
    return [*lines, ("all: estimated time", total)]
