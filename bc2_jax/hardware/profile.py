"""Where the time of a step goes, from the trace that JAX's profiler writes: matmul, vector, kernels, exposed.

The classes are those of `aot.estimate`. On a TPU the trace has one event for each instruction of the program, by its
name, and the program says what the instruction is; elsewhere the name alone says it, as far as it can.
"""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from bc2_jax.aot.program import COLLECTIVES, Instruction, Program

CLASSES = ("matmul", "vector", "kernels", "exposed")
"""As in `aot.estimate.Estimate`; exposed is communication that a device waits for."""
_WORDS = {
    "exposed": (*COLLECTIVES, "nccl", "send", "recv"),
    "kernels": ("custom-call", "flash", "fmha", "mha", "cudnn", "triton"),
    "matmul": ("dot", "conv", "gemm", "matmul", "cublas", "cutlass", "ynn"),
}


class Event(NamedTuple):
    """One instruction that ran on a device; times in ns."""

    name: str
    start: float
    duration: float


def trace(call: Callable[[], Any], steps: int) -> list[list[Event]]:
    """Runs `call` that many times under the profiler; the events of each line of each device of this process."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                jax.block_until_ready(call())
        (path,) = Path(folder).glob("**/*.xplane.pb")
        return read_planes(jax.profiler.ProfileData.from_file(str(path)).planes)


def read_planes(planes: Iterable[Any]) -> list[list[Event]]:
    """The lines of events of instructions: "XLA Ops" of the TensorCores, else what has an `hlo_op` (GPU and CPU).

    SparseCores have planes of their own; what runs on them is hidden.
    """
    found, others = [], []
    for plane in planes:
        for line in plane.lines:
            if re.fullmatch(r"/device:TPU:\d+", plane.name):
                if line.name == "XLA Ops":
                    found.append([Event(instruction_name(e.name), e.start_ns, e.duration_ns) for e in line.events])
                continue
            named = ((dict(e.stats).get("hlo_op"), e) for e in line.events if not e.name.startswith("end:"))
            if events := [Event(instruction_name(str(op)), e.start_ns, e.duration_ns) for op, e in named if op]:
                others.append(events)
    return found or others


def instruction_name(text: str) -> str:
    """Of an event's name, which may be the whole line of the program: "%fusion.3 = ..." is fusion.3."""
    match = re.match(r"%?([\w.\-]+)", text.strip())
    return match[1] if match else text


def own_times(events: list[Event]) -> dict[str, float]:
    """ns by instruction, without what ran inside it: a loop contains the events of its body."""
    times: dict[str, float] = defaultdict(float)
    open_events: list[tuple[Event, float]] = []  # (event, its end), outermost first
    for event in sorted(events, key=lambda e: (e.start, -e.duration)):
        while open_events and open_events[-1][1] <= event.start:
            open_events.pop()
        times[event.name] += event.duration
        if open_events:
            times[open_events[-1][0].name] -= event.duration
        open_events.append((event, event.start + event.duration))
    return dict(times)


def classify(program: Program | None) -> Callable[[str], str]:
    """The class of an instruction by its name; with the program by what it is."""
    instructions: Mapping[str, tuple[Instruction, Any]] = {}
    if program is not None:
        instructions = {i.name: (i, c) for c in program.computations.values() for i in c.instructions}

    def find(name: str) -> str:
        if name not in instructions or program is None:
            return next((kind for kind, words in _WORDS.items() if any(w in name.lower() for w in words)), "vector")
        instruction, computation = instructions[name]
        if instruction.opcode == "custom-call" and "tpu_custom_call" in instruction.attributes:
            return "kernels"
        if program.fused_part(instruction) == "step":
            return "matmul" if program.is_matmul(instruction) else "vector"
        if program.fused_part(instruction) == "done" or program.collective(instruction, computation) is not None:
            return "exposed"
        if instruction.opcode.endswith("-done"):
            source = [computation.by_name.get(operand) for operand in instruction.operands]
            waits = any(s is not None and (program.collective(s, computation) or s.opcode == "recv") for s in source)
            return "exposed" if waits else "vector"
        return "matmul" if program.is_matmul(instruction) else "vector"

    return find


def split(lines: list[list[Event]], steps: int, devices: int, program: Program | None) -> dict[str, float]:
    """Seconds of a step by class on each of `devices`. Where several streams or threads run at once, their sum."""
    find, totals = classify(program), dict.fromkeys(CLASSES, 0.0)
    for events in lines:
        for name, ns in own_times(events).items():
            totals[find(name)] += ns * 1e-9 / steps / devices
    return totals
