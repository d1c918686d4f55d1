"""An iteration of reinforcement learning, compiled for a pod that is not here: the rollout beside the update.

A kind of run that samples between its updates has a function `make_rollout(config, mesh)` in its module, which says by
`RolloutParts` what it samples with and what it holds beside the state. The update is that of `compilation.py`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from bc2_jax.aot.compilation import device_coordinates, topology_devices
from bc2_jax.aot.inference import (
    AbstractEngine,
    CompiledEngine,
    ProgramReport,
    device_bytes,
    program_rows,
    report_program,
)
from bc2_jax.aot.report import gib
from bc2_jax.config import RunConfig
from bc2_jax.infer.engine import Prepared
from bc2_jax.infer.refill import RolloutShapes
from bc2_jax.infer.settings import Sampling, Settings, sampling_of
from bc2_jax.sharding import make_mesh
from bc2_jax.tpu.chips import Topology
from bc2_jax.tpu.options import Value
from bc2_jax.train.job import StepParts
from bc2_jax.train.kinds import kind_of


class RolloutParts(NamedTuple):
    """What is sampled with between two updates; arrays are shapes with shardings."""

    prepared: Prepared
    """The actor as the engine has it."""
    shapes: RolloutShapes
    prompt_tokens: int
    """The most of a prompt."""
    settings: Settings
    answers: int
    """Of an iteration."""
    held: dict[str, Any]
    """What stays on the devices all the time beside the state and the frozen parameters of the step, by name:
    reference, reward model."""


@dataclasses.dataclass(frozen=True)
class CompiledRollout:
    """The programs of the engine, and the bytes one device holds."""

    topology: Topology
    parts: RolloutParts
    engine: CompiledEngine
    coordinates: tuple[tuple[int, ...], ...]
    held: dict[str, int]
    """Of everything that stays through an iteration, by name."""
    update_holds: int
    """The part of `held` that is an argument of the update."""
    prepared_bytes: int


def compile_rollout(config: RunConfig, topology: Topology, options: dict[str, Value]) -> CompiledRollout | None:
    """Compiles what starts and continues answers as the run samples; None for a kind of run that samples nothing.

    Raises as `AbstractEngine`, and ValueError for a mesh that does not suit the model or the devices.
    """
    kind = kind_of(config)
    make_rollout = getattr(kind, "make_rollout", None)
    if make_rollout is None:
        return None
    devices = topology_devices(topology)
    config = config.resolve(len(devices))
    mesh = make_mesh(config.mesh, devices)
    with jax.set_mesh(mesh):
        step: StepParts = kind.make_step(config, mesh)
        parts: RolloutParts = make_rollout(config, mesh)
    settings = parts.settings.check(parts.prepared.config)

    def sampling(rows: int) -> Sampling:
        # As `continue_many` has them where it gives log-probabilities.
        return sampling_of([settings] * rows, range(rows))._replace(top_log_probs=np.zeros(rows, np.int32))

    compiled = AbstractEngine(parts.prepared, mesh, parts.shapes, sampling, options).compile()
    state = {f"{name}'s parameters": device_bytes(tree) for name, tree in step.state.params.items()}
    state["optimizer"] = device_bytes(step.state.opt_state)
    state |= {f"frozen {name}": device_bytes(tree) for name, tree in step.frozen.items()}
    return CompiledRollout(
        topology=topology, parts=parts, engine=compiled, coordinates=device_coordinates(mesh),
        held=state | {name: device_bytes(tree) for name, tree in parts.held.items()},
        update_holds=sum(state.values()), prepared_bytes=device_bytes(parts.prepared.params),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- report


@dataclasses.dataclass(frozen=True)
class RolloutReport:
    """The rollout as figures; bytes are per chip, times are compile-time estimates."""

    shapes: RolloutShapes
    prompt_tokens: int
    chunk_length: int
    answers: int
    max_new_tokens: int
    held: dict[str, int]
    update_holds: int
    prepared_bytes: int
    cache_bytes: int
    hbm_bytes: int
    """What the chip has."""
    extend: ProgramReport
    """One chunk of prompts, the last one of the longest."""
    decode: ProgramReport
    """One step of it, at a full cache."""

    @property
    def rollout_bytes(self) -> int:
        """At the peak of the rollout: what is held, and the larger of the two programs."""
        return sum(self.held.values()) + max(self.extend.memory.laid_out, self.decode.memory.laid_out)

    def update_bytes(self, step_bytes: int) -> int:
        """At the peak of the update, whose program is laid out in `step_bytes`, its arguments included."""
        return step_bytes + sum(self.held.values()) - self.update_holds

    @property
    def seconds(self) -> float:
        """Of a rollout in which every answer has max_new_tokens and every prompt the most tokens."""
        steps = math.ceil(self.answers / self.shapes.rows) * (self.max_new_tokens - 1)
        chunks = math.ceil(self.answers / self.shapes.prefill_rows) * math.ceil(self.prompt_tokens / self.chunk_length)
        return steps * self.decode.estimate.seconds + chunks * self.extend.estimate.seconds

    @property
    def warnings(self) -> list[str]:
        programs = (("chunk of prompts", self.extend), ("decoding", self.decode))
        return [f"{name}: {line}" for name, program in programs for line in program.warnings]

    def as_json(self, step_bytes: int) -> dict[str, Any]:
        """For `--json`; times in seconds, memory in bytes of a chip."""
        return {
            **dataclasses.asdict(self.shapes),
            "prompt_tokens": self.prompt_tokens,
            "chunk_length": self.chunk_length,
            "answers": self.answers,
            "max_new_tokens": self.max_new_tokens,
            "held_bytes_per_chip": self.held,
            "prepared_bytes_per_chip": self.prepared_bytes,
            "cache_bytes_per_chip": self.cache_bytes,
            "rollout_peak_bytes_per_chip": self.rollout_bytes,
            "update_peak_bytes_per_chip": self.update_bytes(step_bytes),
            "estimated_rollout_seconds": self.seconds,
            "extend": self.extend.as_json(),
            "decode": self.decode.as_json(),
        }


def make_report(compiled: CompiledRollout) -> RolloutReport:
    """Reads both programs."""
    topology, parts = compiled.topology, compiled.parts
    devices, coordinates = topology.chip.devices, compiled.coordinates
    size = compiled.engine.chunk_length
    blocks = math.ceil(math.ceil(parts.prompt_tokens / size) * size / compiled.engine.key_block)
    return RolloutReport(
        shapes=parts.shapes, prompt_tokens=parts.prompt_tokens, chunk_length=size, answers=parts.answers,
        max_new_tokens=parts.settings.max_new_tokens,
        held={name: devices * size for name, size in compiled.held.items()},
        update_holds=devices * compiled.update_holds, prepared_bytes=devices * compiled.prepared_bytes,
        cache_bytes=devices * compiled.engine.cache_bytes, hbm_bytes=topology.chip.hbm_bytes,
        extend=report_program(compiled.engine.extend, topology, coordinates, trips=blocks),
        decode=report_program(compiled.engine.decode, topology, coordinates),
    )  # fmt: skip


def render(report: RolloutReport, step_bytes: int) -> list[tuple[str, str]]:
    """The report as lines (name, text); the update's program is laid out in `step_bytes` of a chip."""
    shapes = report.shapes
    held = ", ".join(f"{name} {gib(size)}" for name, size in report.held.items())
    peaks = (("rollout", report.rollout_bytes), ("update", report.update_bytes(step_bytes)))
    return [
        ("held through an iteration", f"{gib(sum(report.held.values()))} per chip: {held}"),
        ("held during the rollout", f"prepared actor {gib(report.prepared_bytes)}, cache {gib(report.cache_bytes)}"),
        *(
            (f"HBM per chip, {name}", f"{gib(size)} = {size / report.hbm_bytes:.0%} of {gib(report.hbm_bytes)}")
            for name, size in peaks
        ),
        (
            "rollout",
            f"{report.answers} answers of up to {report.max_new_tokens} tokens over {shapes.rows} rows of "
            f"{shapes.slots} slots, prompts of up to {report.prompt_tokens}, {shapes.prefill_rows} run together in "
            f"chunks of {report.chunk_length}",
        ),
        (
            "estimated time of a rollout",
            f"{report.seconds:.1f} s if every answer has {report.max_new_tokens} tokens, at a full cache",
        ),
        *program_rows("chunk of prompts", report.extend),
        *program_rows("decoding step", report.decode),
    ]
