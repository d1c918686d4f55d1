"""The scoring program compiled for a slice that this machine does not have, and what a pass over benchmarks would take.

The program is that of `bc2_jax.infer.score`, in the compute dtype; arrays are abstract and nothing is allocated. How
many tokens a benchmark has is an assumption (`Benchmark`), which the report names.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from bc2_jax.aot.compilation import CompiledProgram, compile_program, device_coordinates, topology_devices
from bc2_jax.aot.inference import ProgramReport, device_bytes, inference_compute, program_rows, report_program
from bc2_jax.aot.report import gib
from bc2_jax.config import RunConfig
from bc2_jax.infer.score import check_shapes, empty_rows, make_program
from bc2_jax.model.baichuan import abstract_params, split_model
from bc2_jax.sharding import make_mesh, place_shapes
from bc2_jax.tpu.chips import Topology
from bc2_jax.tpu.options import Value
from bc2_jax.validation import require_positive


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Items that are scored behind the shots of their subject; tokens are means, and assumed.

    Raises ValueError for a number that is not positive.
    """

    name: str
    items: int
    subjects: int
    shot_tokens: int
    """Of the header and all shots of a subject."""
    question_tokens: int
    """Of one item, with its options."""

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
        """Rows of `length` tokens: each has the shots, and as many questions as fit; what is left over is packed.

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
"""Items and subjects as released. Tokens are rough: five shots and one question of some 100 Chinese characters, or of
some 450 letters of English; measure them with the tokenizer for a better estimate."""


@dataclasses.dataclass(frozen=True)
class ScoringShapes:
    """Of a batch."""

    rows: int = 2
    row_length: int = 4096
    places: int = 256
    """Scored tokens of a row: of some 35 questions, four letters as the shots show them and four bare."""


@dataclasses.dataclass(frozen=True)
class CompiledScoring:
    topology: Topology
    config: RunConfig
    """With the mesh filled in."""
    shapes: ScoringShapes
    program: CompiledProgram
    coordinates: tuple[tuple[int, ...], ...]
    parameter_bytes: int
    """Of a device."""


def compile_scoring(
    config: RunConfig, topology: Topology, shapes: ScoringShapes, options: dict[str, Value]
) -> CompiledScoring:
    """Compiles the scoring of one batch for every device of `topology`.

    Raises DoesNotFit where the chip's memory is too small, and ValueError for a mesh or shapes that do not suit the
    model or the devices, or an option that the compiler does not know.
    """
    require_positive(shapes, "", "rows", "row_length", "places")
    devices = topology_devices(topology)
    config = config.resolve(len(devices))
    mesh = make_mesh(config.mesh, devices)
    compute = inference_compute(config.compute)
    with jax.set_mesh(mesh):
        graphdef = split_model(config.model, compute)[0]
        params = abstract_params(config.model, mesh, compute.dtype)
        rows = empty_rows(shapes.rows, shapes.row_length, shapes.places)
        check_shapes(rows)
        rows = place_shapes(mesh, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, rows)))
        lower = functools.partial(make_program().lower, graphdef, params, rows)
        program = compile_program("scoring program", lower, options)
    return CompiledScoring(topology, config, shapes, program, device_coordinates(mesh), device_bytes(params))


# -------------------------------------------------------------------------------------------------------------- report


@dataclasses.dataclass(frozen=True)
class ScoringReport:
    """Bytes are per chip; times are compile-time estimates."""

    topology: str
    chips: int
    shapes: ScoringShapes
    parameter_bytes: int
    program: ProgramReport
    benchmarks: tuple[Benchmark, ...]

    @property
    def row_seconds(self) -> float:
        return self.program.estimate.seconds / self.shapes.rows

    def seconds(self, benchmark: Benchmark) -> float:
        """Of a pass over it, without loading and compiling."""
        return benchmark.rows(self.shapes.row_length) * self.row_seconds

    @property
    def total_seconds(self) -> float:
        return sum(map(self.seconds, self.benchmarks))

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.program.warnings

    def as_json(self) -> dict[str, Any]:
        """For `--json`; times in seconds, memory in bytes of a chip."""
        return {
            "note": "compile-time estimates, nothing was run; tokens of the benchmarks are assumed",
            "topology": self.topology,
            "chips": self.chips,
            **dataclasses.asdict(self.shapes),
            "parameter_bytes_per_chip": self.parameter_bytes,
            "program": self.program.as_json(),
            "estimated_seconds_per_row": self.row_seconds,
            "benchmarks": [
                dataclasses.asdict(b) | {"rows": b.rows(self.shapes.row_length), "estimated_seconds": self.seconds(b)}
                for b in self.benchmarks
            ],
            "estimated_seconds": self.total_seconds,
        }


def make_report(compiled: CompiledScoring, benchmarks: tuple[Benchmark, ...] = DEFAULT_BENCHMARKS) -> ScoringReport:
    """Reads the program. Its `seconds` raise ValueError for a benchmark that does not fit the rows."""
    topology = compiled.topology
    return ScoringReport(
        str(topology), topology.num_chips, compiled.shapes, topology.chip.devices * compiled.parameter_bytes,
        report_program(compiled.program, topology, compiled.coordinates), benchmarks,
    )  # fmt: skip


def render(report: ScoringReport) -> list[tuple[str, str]]:
    """The report as lines (name, text); every time is called estimated, every number of tokens assumed."""
    shapes = report.shapes
    lines = [
        ("topology", f"{report.topology}, {report.chips} chips"),
        ("batch", f"{shapes.rows} rows of {shapes.row_length} tokens, {shapes.places} scored places a row"),
        ("parameters per chip", gib(report.parameter_bytes)),
        *program_rows("scoring", report.program),
        (
            "estimated time of a row",
            f"{1e3 * report.row_seconds:.0f} ms, {shapes.row_length / report.row_seconds:,.0f} tokens/s of all chips",
        ),
    ]
    for b in report.benchmarks:
        alone = b.items * (b.shot_tokens + b.question_tokens) / shapes.row_length
        rows = b.rows(shapes.row_length)
        lines.append(
            (
                f"{b.name}: estimated time",
                f"{report.seconds(b):.0f} s for {rows:.0f} rows ({alone / rows:.1f} times as many if no shots were "
                f"shared); assumed: {b.items:,} items of {b.subjects} subjects, {b.shot_tokens} tokens of shots, "
                f"{b.question_tokens} of a question",
            )
        )
    total = f"{report.total_seconds:.0f} s = {report.total_seconds / 60:.1f} minutes, without loading and compiling"
    return [*lines, ("all: estimated time", total)]
