"""The rollout of a reinforcement-learning iteration, compiled for a topology beside the update of `compilation.py`.

The module of a kind of run that samples between updates has `make_rollout(config, mesh)`, which returns RolloutParts.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from bc2_jax.aot.compilation import device_coordinates, resolve_on
from bc2_jax.aot.inference import AbstractEngine, CompiledEngine, device_bytes
from bc2_jax.aot.report import ProgramReport, Rows, gib, named, program_rows, report_program
from bc2_jax.config import RunConfig
from bc2_jax.infer.engine import Prepared
from bc2_jax.infer.refill import RolloutShapes
from bc2_jax.infer.settings import Sampling, Settings, sampling_of
from bc2_jax.tpu.chips import Topology
from bc2_jax.tpu.options import Value
from bc2_jax.tpu.rates import Rates
from bc2_jax.train.job import StepParts
from bc2_jax.train.kinds import kind_of


class RolloutParts(NamedTuple):
    """Inputs of sampling between two updates; arrays are shapes with shardings."""

    prepared: Prepared  # the actor, prepared for the engine
    shapes: RolloutShapes
    prompt_tokens: int  # longest prompt
    settings: Settings
    answers: int  # per iteration
    held: dict[str, Any]
    """Name -> what stays on the devices besides state and frozen parameters: reference, reward model."""


@dataclasses.dataclass(frozen=True)
class CompiledRollout:
    """The engine's programs, and bytes per chip."""

    topology: Topology
    parts: RolloutParts
    engine: CompiledEngine
    coordinates: tuple[tuple[int, ...], ...]
    held: dict[str, int]  # name -> bytes of everything that stays through an iteration
    update_holds: int  # the part of `held` that is an argument of the update
    prepared_bytes: int


def compile_rollout(config: RunConfig, topology: Topology, options: dict[str, Value]) -> CompiledRollout | None:
    """Compiles the rollout; None for a kind of run that samples nothing.

    Raises as `AbstractEngine`, and ValueError for a mesh that does not match model or devices.
    """
    kind = kind_of(config)
    make_rollout = getattr(kind, "make_rollout", None)
    if make_rollout is None:
        return None
    config, mesh = resolve_on(topology, config)
    with jax.set_mesh(mesh):
        step: StepParts = kind.make_step(config, mesh)
        parts: RolloutParts = make_rollout(config, mesh)
    settings = parts.settings.check(parts.prepared.config)

    def sampling(rows: int) -> Sampling:
        # As in `continue_many` with log-probabilities.
        return sampling_of([settings] * rows, range(rows))._replace(top_log_probs=np.zeros(rows, np.int32))

    def chip_bytes(tree: Any) -> int:
        return topology.chip.devices * device_bytes(tree)

    compiled = AbstractEngine(parts.prepared, mesh, parts.shapes, sampling, options).compile()
    state = {f"{name}'s parameters": chip_bytes(tree) for name, tree in step.state.params.items()}
    state["optimizer"] = chip_bytes(step.state.opt_state)
    state |= {f"frozen {name}": chip_bytes(tree) for name, tree in step.frozen.items()}
    return CompiledRollout(
        topology=topology, parts=parts, engine=compiled, coordinates=device_coordinates(mesh),
        held=state | {name: chip_bytes(tree) for name, tree in parts.held.items()},
        update_holds=sum(state.values()), prepared_bytes=chip_bytes(parts.prepared.params),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RolloutReport:
    """Figures of a rollout; bytes are per chip, times are compile-time estimates."""

    compiled: CompiledRollout
    extend: ProgramReport  # the last chunk of the longest prompts
    decode: ProgramReport  # one step with a full cache

    @property
    def held_bytes(self) -> int:
        return sum(self.compiled.held.values())

    @property
    def cache_bytes(self) -> int:
        return self.compiled.topology.chip.devices * self.compiled.engine.cache_bytes

    @property
    def rollout_bytes(self) -> int:
        """Peak of the rollout."""
        return self.held_bytes + max(self.extend.memory.laid_out, self.decode.memory.laid_out)

    def update_bytes(self, step_bytes: int) -> int:
        """Peak of the update, whose program with its arguments is laid out in `step_bytes`."""
        return step_bytes + self.held_bytes - self.compiled.update_holds

    @property
    def seconds(self) -> float:
        """If every answer has max_new_tokens and every prompt prompt_tokens."""
        parts, chunk = self.compiled.parts, self.compiled.engine.chunk_length
        steps = math.ceil(parts.answers / parts.shapes.rows) * (parts.settings.max_new_tokens - 1)
        chunks = math.ceil(parts.answers / parts.shapes.prefill_rows) * math.ceil(parts.prompt_tokens / chunk)
        return steps * self.decode.estimate.seconds + chunks * self.extend.estimate.seconds

    @property
    def warnings(self) -> list[str]:
        programs = (("chunk of prompts", self.extend), ("decoding", self.decode))
        return [f"{name}: {line}" for name, program in programs for line in program.warnings]

    def as_json(self, step_bytes: int) -> dict[str, Any]:
        """For `--json`; times in seconds."""
        parts = self.compiled.parts
        return {
            **dataclasses.asdict(parts.shapes),
            "prompt_tokens": parts.prompt_tokens,
            "chunk_length": self.compiled.engine.chunk_length,
            "answers": parts.answers,
            "max_new_tokens": parts.settings.max_new_tokens,
            "held_bytes_per_chip": self.compiled.held,
            "prepared_bytes_per_chip": self.compiled.prepared_bytes,
            "cache_bytes_per_chip": self.cache_bytes,
            "rollout_peak_bytes_per_chip": self.rollout_bytes,
            "update_peak_bytes_per_chip": self.update_bytes(step_bytes),
            "estimated_rollout_seconds": self.seconds,
            "extend": self.extend.as_json(),
            "decode": self.decode.as_json(),
        }


def make_report(compiled: CompiledRollout, rates: Rates | None = None) -> RolloutReport:
    """Reads both programs. `rates`: by default `default_rates` of the chip."""
    topology, engine, coordinates = compiled.topology, compiled.engine, compiled.coordinates
    keys = math.ceil(compiled.parts.prompt_tokens / engine.chunk_length) * engine.chunk_length
    trips = math.ceil(keys / engine.key_block)
    return RolloutReport(
        compiled, report_program(engine.extend, topology, coordinates, rates, trips=trips),
        report_program(engine.decode, topology, coordinates, rates),
    )  # fmt: skip


def render(report: RolloutReport, step_bytes: int) -> Rows:
    """The report as lines; the update's program is laid out in `step_bytes` of a chip."""
    compiled, hbm = report.compiled, report.compiled.topology.chip.hbm_bytes
    parts, shapes, most = compiled.parts, compiled.parts.shapes, compiled.parts.settings.max_new_tokens
    held = ", ".join(f"{name} {gib(size)}" for name, size in compiled.held.items())
    peaks = (("rollout", report.rollout_bytes), ("update", report.update_bytes(step_bytes)))
    return [
        ("held through an iteration", f"{gib(report.held_bytes)} per chip: {held}"),
        ("held during the rollout", f"prepared actor {gib(compiled.prepared_bytes)}, cache {gib(report.cache_bytes)}"),
        *((f"HBM per chip, {name}", f"{gib(size)} = {size / hbm:.0%} of {gib(hbm)}") for name, size in peaks),
        (
            "rollout",
            f"{parts.answers} answers of up to {most} tokens over {shapes.rows} rows of {shapes.slots} slots, prompts "
            f"of up to {parts.prompt_tokens}, {shapes.prefill_rows} run together in chunks of "
            f"{compiled.engine.chunk_length}",
        ),
        (
            "estimated time of a rollout",
            f"{report.seconds:.1f} s if every answer has {most} tokens, with a full cache",
        ),
        *named("chunk of prompts", program_rows(report.extend)),
        *named("decoding step", program_rows(report.decode)),
    ]
