"""Estimates the time of a step by simulating the scheduled program of one device.

Nothing is measured. Fusions take the compiler's cycles, kernels their declared FLOPs at a share of peak, collectives a
ring model's time; work between a collective's start and end hides it. docs/tpu.md has the sources of the constants and
the known errors.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

from bc2_jax.aot.links import QUEUES, Links
from bc2_jax.aot.offload import host_transfer
from bc2_jax.aot.program import Collective, Computation, Instruction, Program
from bc2_jax.aot.traffic import matmul_flops, moved_bytes
from bc2_jax.tpu.chips import Chip, Topology
from bc2_jax.tpu.rates import ATTENTION_HEAD_DIM, Rates, default_rates

CYCLES_HBM_SHARE = 0.41
"""Largest share of the HBM bandwidth implied by the compiler's cycles, which are scaled by at least this by
`Rates.hbm_share`."""
UNKNOWN_KERNEL_EFFICIENCY = 0.5  # for kernels other than attention that declare FLOPs


@dataclasses.dataclass
class Traffic:
    """All collectives of one kind in a step on one device."""

    bytes: int = 0  # whole tensors: gathered, or before the reduction
    count: int = 0
    asynchronous_bytes: int = 0  # the part that overlaps other work
    gather_bytes: int = 0  # the part of all-reduces that only gathers
    seconds: float = 0.0  # by the ring model, hidden and exposed


@dataclasses.dataclass(frozen=True)
class Audit:
    """Checks the counts: a step gathers its parameters and reduces its gradients at least once (bf16, per device)."""

    gathered_bytes: int
    gathered_needed: int
    reduced_bytes: int
    reduced_needed: int

    @property
    def complete(self) -> bool:
        return self.gathered_bytes >= self.gathered_needed and self.reduced_bytes >= self.reduced_needed


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step: matmul + vector + kernels + exposed."""

    matmul: float
    """The compiler's cycles, at most `Rates.matmul_share` of peak; in inference the time of their bytes at
    `Rates.hbm_share` of the bandwidth, if they are HBM-bound."""
    vector: float  # other fusions, memory-bound ones at `Rates.hbm_share` of the bandwidth
    kernels: float
    exposed: float  # communication that is not hidden
    hidden: float  # hidden communication; not part of the sum
    matmul_raw: float  # `matmul` in the compiler's own cycles
    vector_raw: float  # `vector` in the compiler's own cycles
    collectives: dict[str, Traffic]
    warnings: tuple[str, ...]

    @property
    def seconds(self) -> float:
        return self.matmul + self.vector + self.kernels + self.exposed

    @property
    def seconds_high(self) -> float:
        """Worst case: the compiler's cycles if they are more, nothing hidden."""
        return max(self.matmul, self.matmul_raw) + self.vector_raw + self.kernels + self.exposed + self.hidden


@dataclasses.dataclass
class _Parts:
    matmul: float = 0.0
    matmul_raw: float = 0.0
    vector: float = 0.0
    vector_raw: float = 0.0
    kernels: float = 0.0
    exposed: float = 0.0
    communication: float = 0.0

    def add(self, other: _Parts, times: int) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + times * getattr(other, field.name))

    @property
    def seconds(self) -> float:
        return self.matmul + self.vector + self.kernels + self.exposed


class Simulation:
    """Simulates one step of a program; `estimate` is the result."""

    def __init__(
        self, program: Program, topology: Topology, coordinates: Sequence[tuple[int, ...]], rates: Rates,
        streams_weights: bool = False, without: str = "",
    ):  # fmt: skip
        self.program, self.chip, self.streams_weights, self.without = program, topology.chip, streams_weights, without
        self.rates, self.links = rates, Links(topology, coordinates, rates)
        self.hbm_bandwidth = rates.hbm_share * self.chip.hbm_bandwidth / self.chip.devices
        self.collectives: dict[str, Traffic] = defaultdict(Traffic)
        self.warnings: list[str] = []
        parts = self._run(program.computations[program.entry], 1)
        self.estimate = Estimate(
            matmul=parts.matmul, vector=parts.vector, kernels=parts.kernels, exposed=parts.exposed,
            hidden=parts.communication - parts.exposed, matmul_raw=parts.matmul_raw, vector_raw=parts.vector_raw,
            collectives=dict(self.collectives), warnings=tuple(self.warnings),
        )  # fmt: skip

    def _run(self, computation: Computation, times: int) -> _Parts:
        """One pass of a computation that runs `times` times in a step.

        The links carry one collective at a time, beside transfers to and from host memory. A start queues it and its
        end waits for it; compute in between hides it. A collective that is split into fusions proceeds only while these
        compute.
        """
        parts = _Parts()
        free, finish = dict.fromkeys(QUEUES, 0.0), dict[str, float]()
        left = dict[str, float]()  # seconds that a collective in fusions still needs, by its channel
        for instruction in computation.instructions:
            controlled = self.program.controlled(instruction, computation)
            if controlled:
                self._run_controlled(instruction, controlled, times, parts)
                continue
            collective = self.program.collective(instruction, computation)
            collective = collective or host_transfer(self.program, instruction, computation)
            if collective is not None:
                seconds = self.links.seconds(collective)
                asynchronous = self.program.is_asynchronous(instruction)
                self._count(collective, seconds, asynchronous, times)
                parts.communication += seconds
                if self.program.fused_part(instruction) == "start":
                    left[collective.channel] = seconds
                    continue
                network = collective.kind if collective.kind in QUEUES else ""
                free[network] = max(free[network], parts.seconds) + seconds
                if asynchronous:
                    named = instruction.opcode == "send"
                    finish[collective.channel if named else instruction.name] = free[network]
                else:
                    parts.exposed += free[network] - parts.seconds
                continue
            if instruction.opcode.endswith("-done"):
                # A transfer between slices ends with its receive, which shares the send's rendezvous.
                for name in instruction.operands:
                    source = computation.by_name.get(name)
                    key = source.rendezvous if source and source.opcode == "recv" else name
                    parts.exposed += max(finish.pop(key, 0.0) - parts.seconds, 0.0)
                continue
            part = self.program.fused_part(instruction)
            if part == "done":
                parts.exposed += left.pop(self.program.channel(instruction), 0.0)
                continue
            start = max(parts.seconds, free[""])
            self._compute(instruction, computation, parts)
            if part == "step" and (channel := self.program.channel(instruction)) in left:
                left[channel] = max(left[channel] - max(parts.seconds - start, 0.0), 0.0)
        return parts

    def _run_controlled(
        self, instruction: Instruction, controlled: list[tuple[str, int]], times: int, parts: _Parts
    ) -> None:
        if instruction.opcode == "conditional":
            computations = [self.program.computations[name] for name, _ in controlled]
            counted = [c for c in computations if not self._is_left_out(c)] or computations
            branches = [self._run(computation, times) for computation in counted]
            parts.add(max(branches, key=lambda branch: branch.seconds), 1)
            return
        for name, count in controlled:
            parts.add(self._run(self.program.computations[name], times * count), count)

    def _is_left_out(self, branch: Computation) -> bool:
        scopes = (instruction.op_name.split("/") for instruction in branch.instructions)
        return bool(self.without) and any(self.without in scope for scope in scopes)

    def _count(self, collective: Collective, seconds: float, asynchronous: bool, times: int) -> None:
        traffic = self.collectives[collective.kind]
        traffic.bytes += collective.bytes * times
        traffic.count += times
        traffic.asynchronous_bytes += collective.bytes * times if asynchronous else 0
        traffic.gather_bytes += collective.bytes * times if collective.gathers else 0
        traffic.seconds += seconds * times

    def _compute(self, instruction: Instruction, computation: Computation, parts: _Parts) -> None:
        if instruction.opcode == "custom-call" and "tpu_custom_call" in instruction.attributes:
            parts.kernels += self._kernel(instruction)
            return
        if not instruction.cycles:
            return
        raw = instruction.cycles / self.chip.clock
        if self.program.is_matmul(instruction):
            parts.matmul_raw += raw
            parts.matmul += self._matmul(instruction, computation, raw)
            return
        parts.vector_raw += raw
        parts.vector += self._streamed(moved_bytes(self.program, instruction, computation), raw)

    def _streamed(self, moved: float, raw: float) -> float:
        """Seconds to move these bytes, between raw * CYCLES_HBM_SHARE / `Rates.hbm_share` and raw."""
        return min(raw, max(moved / self.hbm_bandwidth, raw * CYCLES_HBM_SHARE / self.rates.hbm_share))

    def _matmul(self, instruction: Instruction, computation: Computation, raw: float) -> float:
        """The compiler's `raw` seconds, but not faster than `Rates.matmul_share` of peak.

        In inference, HBM-bound matmuls (few rows) take the time of their bytes.
        """
        ideal = matmul_flops(self.program, instruction) * self.chip.devices / self.chip.peak_flops
        computing = max(raw, ideal / self.rates.matmul_share)
        if not self.streams_weights:
            return computing
        moved = moved_bytes(self.program, instruction, computation)
        if moved * self.chip.devices / self.chip.hbm_bandwidth <= ideal:
            return computing
        return max(self._streamed(moved, raw), min(ideal / self.rates.matmul_share, raw))

    def _kernel(self, instruction: Instruction) -> float:
        cost = instruction.backend_config.get("custom_call_config", {}).get("cost_estimate", {})
        flops = float(cost.get("flops", 0))
        moved = float(cost.get("bytes_accessed", 0)) / self.hbm_bandwidth
        if not flops and not moved:
            self._warn(f"Kernel {instruction.name} declares no cost; it counts as nothing.")
            return 0.0
        share = kernel_efficiency(instruction, self.chip, self.rates)
        return max(flops * self.chip.devices / self.chip.peak_flops / share, moved)

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


def kernel_efficiency(instruction: Instruction, chip: Chip, rates: Rates) -> float:
    """The share of peak of a Pallas kernel's declared FLOPs."""
    # Attention contracts over the head size, the last dimension of its arrays.
    head_dim = instruction.shapes[0].dims[-1] if instruction.shapes and instruction.shapes[0].dims else 1
    name = f"{instruction.name} {instruction.op_name}".lower()
    if not any(word in name for word in ("attention", "flash")):
        return UNKNOWN_KERNEL_EFFICIENCY * min(1.0, head_dim / chip.mxu)
    # A recomputed forward kernel is under transpose( too, but keeps its name.
    forward = any(word in instruction.name.lower() for word in ("forward", "fwd"))
    backward = not forward and any(word in name for word in ("transpose(", "bwd", "backward"))
    share = rates.attention_backward_share if backward else rates.attention_forward_share
    # A shorter head leaves more of the MXU idle.
    return share * min(1.0, head_dim / ATTENTION_HEAD_DIM)


def estimate_step(
    program: Program, topology: Topology, coordinates: Sequence[tuple[int, ...]], rates: Rates | None = None,
    streams_weights: bool = False, without: str = "",
) -> Estimate:  # fmt: skip
    """The estimate for one step. Raises ValueError for a loop of unknown length.

    `rates`: by default `default_rates` of the chip. `streams_weights`: matmuls of few rows, as in decoding, are
    HBM-bound and scaled as vector fusions. The longest branch of a conditional counts; branches with instructions of
    the `jax.named_scope` `without` do not run.
    """
    rates = rates or default_rates(topology.chip)
    return Simulation(program, topology, coordinates, rates, streams_weights, without).estimate


def audit(
    collectives: dict[str, Traffic], matmul_parameters: int, is_gathered: bool, is_reduced: bool,
    trained_parameters: int | None = None,
) -> Audit:  # fmt: skip
    """Compares the counts with the minimum for `matmul_parameters` (gathered, of one device) in bf16.

    `trained_parameters`: those with gradients, by default all.
    """
    gathered = sum(t.bytes for kind, t in collectives.items() if kind == "all-gather")
    reduced = sum(t.bytes for kind, t in collectives.items() if kind in ("reduce-scatter", "all-reduce"))
    as_reductions = sum(t.gather_bytes for t in collectives.values())
    reducible = matmul_parameters if trained_parameters is None else trained_parameters
    return Audit(
        gathered + as_reductions, 2 * matmul_parameters if is_gathered else 0,
        reduced - as_reductions, 2 * reducible if is_reduced else 0,
    )  # fmt: skip
