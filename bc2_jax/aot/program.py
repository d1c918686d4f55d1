"""Parses the compiler's scheduled program (HLO text) of one device.

Instructions are in execution order; fusions and copies have the compiler's estimated cycles; a loop appears once, with
its number of iterations in its condition. (`compiled.cost_analysis()` ignores loops, links and kernels.)
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

ITEM_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3b11fnuz": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8,
}  # fmt: skip
"""Bytes per element; 0 for other types, such as tokens."""

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
BETWEEN_SLICES = "between-slices"
"""Kind of a transfer over the data-centre network: a send and a receive with the same rendezvous."""
MATMULS = ("convolution", "dot")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    layout: str  # minor-to-major dimensions, tiles, memory space, as printed without braces

    @property
    def bytes(self) -> int:
        """Without padding."""
        return int(ITEM_BYTES.get(self.dtype, 0) * math.prod(self.dims))

    @property
    def padded_bytes(self) -> int:
        """With the two minor dimensions padded to the layout's first tile."""
        tile = re.search(r"T\(([0-9,]+)\)", self.layout)
        order = re.match(r"[0-9,]+", self.layout)
        if tile is None or order is None:
            return self.bytes
        sizes, dims = [int(t) for t in tile[1].split(",")], list(self.dims)
        minor = [int(d) for d in order[0].split(",")][: len(sizes)]
        for dim, size in zip(minor, reversed(sizes), strict=False):
            dims[dim] = -(-dims[dim] // size) * size
        return int(ITEM_BYTES.get(self.dtype, 0) * math.prod(dims))

    @property
    def in_hbm(self) -> bool:
        """Whether it is in HBM: memory space 0, which is not printed."""
        return "S(" not in self.layout


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # the result, a tuple flattened
    operands: tuple[str, ...]
    attributes: str  # the text after the operands
    text: str  # the text between the operands' parentheses

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @functools.cached_property
    def backend_config(self) -> dict:
        """The compiler's notes on the instruction; empty if missing or not JSON."""
        start = self.attributes.find("backend_config={")
        if start < 0:
            return {}
        text = self.attributes[start + len("backend_config=") :]
        try:
            return json.JSONDecoder().raw_decode(text)[0]
        except json.JSONDecodeError:
            return {}

    @functools.cached_property
    def cycles(self) -> int | None:
        """The compiler's estimated cycles, None if missing."""
        match = re.search(r'"estimated_cycles":"([0-9]+)"', self.attributes)
        return None if match is None else int(match[1])

    @property
    def called(self) -> tuple[str, ...]:
        """Computations of a fusion, call or asynchronous start, which run once."""
        key = "to_apply" if self.opcode == "call" else "calls"
        return tuple(re.findall(rf"\b{key}=%?([\w.\-]+)", self.attributes))

    @property
    def op_name(self) -> str:
        """Its origin in the JAX program; empty if unknown."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def rendezvous(self) -> str:
        """The common name of a send and receive between slices; empty for other instructions."""
        match = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', self.attributes)
        return match[1] if match and "megascale" in self.attributes else ""

    def attribute(self, name: str) -> str | None:
        """A computation's name in an attribute, such as a loop's body."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation."""

    kind: str
    """One of COLLECTIVES, or BETWEEN_SLICES, as compiled: a scatter compiled to an all-reduce is an all-reduce."""
    bytes: int  # the whole tensor on one device: a gather's result, a reduction's or exchange's operand
    dtype: str
    group: tuple[int, ...]  # devices of the first group; others have the same size and shape
    op_name: str
    gathers: bool = False
    """Whether it is an all-reduce of zero-padded tensors: libtpu's gather over all three dimensions of a torus, with
    twice the traffic."""
    channel: str = ""  # the id that the parts of a collective share if it is fused into several matmuls


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: tuple[Instruction, ...]  # in execution order

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}


class Program:
    """A parsed module. Raises ValueError for text without an entry computation."""

    def __init__(self, text: str, open_trips: int | None = None):
        """`open_trips`: assumed iterations of a loop whose length is data; None refuses such loops."""
        self.open_trips = open_trips
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        partitions = re.search(r"num_partitions=([0-9]+)", text[:100_000])
        self.num_partitions = int(partitions[1]) if partitions else 1
        """Devices the program runs on."""
        name, lines = "", list[str]()
        for line in text.splitlines():
            if line.startswith(("%", "ENTRY ")) and line.rstrip().endswith("{"):
                header = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)
                assert header is not None, line
                name, lines = header[1], []
                if line.startswith("ENTRY "):
                    self.entry = name
            elif name and re.fullmatch(r'\}(, execution_thread="[^"]*")?\s*(//.*)?', line):
                self.computations[name] = Computation(name, tuple(map(parse_instruction, lines)))
                name = ""
            elif name and re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", line):
                lines.append(line)
            elif name and lines:  # a kernel's attributes may have several lines
                lines[-1] += f" {line}"
        if self.entry not in self.computations:
            raise ValueError("The text is not a compiled program: it has no ENTRY computation.")

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instructions of its called computations, recursively."""
        for name in instruction.called:
            if name in self.computations:
                for inner in self.computations[name].instructions:
                    yield inner
                    yield from self.inside(inner)

    def trip_count(self, loop: Instruction, computation: Computation | None = None) -> int:
        """Iterations of a `while`: the compiler's note, else the constant in its condition less the counter's start in
        `computation`, which has the loop, else `open_trips`. A start that is not a constant counts as 0.

        Raises ValueError if there is none of these.
        """
        noted = loop.backend_config.get("known_trip_count", {}).get("n")
        if noted is not None:
            return int(noted)
        condition = loop.attribute("condition")
        found = []
        for instruction in self.computations[condition].instructions if condition else ():
            for inner in (instruction, *self.inside(instruction)):
                # Counters have at least 32 bits.
                is_count = inner.opcode == "constant" and inner.shapes[0].dtype in ("s32", "u32", "s64", "u64")
                if is_count and inner.text.lstrip("-").isdecimal():
                    found.append(int(inner.text))
        if not found and self.open_trips is not None:
            return self.open_trips
        if not found:
            raise ValueError(f"Loop {loop.name} has no constant number of iterations in its condition.")
        return max(found) - self._counter_start(loop, computation)

    def _counter_start(self, loop: Instruction, computation: Computation | None) -> int:
        """The counter before the first iteration; 1 if the compiler has moved that one out of the loop, as it does with
        several slices."""
        condition = self.computations[loop.attribute("condition") or ""]
        counters = [i for i in condition.instructions if i.opcode == "get-tuple-element" and i.shapes[0].dtype == "s32"]
        index = re.search(r"index=(\d+)", counters[0].attributes) if len(counters) == 1 else None
        values = {} if computation is None else computation.by_name
        state = values.get(loop.operands[0]) if loop.operands else None
        if index is None or state is None or state.opcode != "tuple":
            return 0
        start = values.get(state.operands[int(index[1])])
        while start is not None and start.opcode == "copy":
            start = values.get(start.operands[0])
        return int(start.text) if start is not None and start.opcode == "constant" else 0

    def is_matmul(self, instruction: Instruction) -> bool:
        """Whether it runs on the MXUs."""
        return any(i.opcode in MATMULS for i in (instruction, *self.inside(instruction)))

    def collective(self, instruction: Instruction, computation: Computation | None = None) -> Collective | None:
        """The collective that an instruction runs or starts; None for others and for the end of one.

        `computation` is needed to recognise a gather compiled to an all-reduce, by its operands.
        """
        if instruction.opcode.endswith(("-done", "-update")) or instruction.opcode in ("while", "conditional"):
            return None
        if instruction.opcode == "fusion" and self.fused_part(instruction) in ("step", "done"):
            return None
        if instruction.opcode == "send" and (rendezvous := instruction.rendezvous):
            array = instruction.shapes[0]
            return Collective(BETWEEN_SLICES, array.bytes, array.dtype, (), instruction.op_name, channel=rendezvous)
        for inner in (instruction, *self.inside(instruction)):
            kind = inner.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                gathers = kind == "all-reduce" and computation is not None and self._is_padded(instruction, computation)
                return self._collective(inner, kind, gathers)
        return None

    def is_asynchronous(self, instruction: Instruction) -> bool:
        """Whether a collective only starts here and overlaps other work."""
        return instruction.opcode.endswith(("-start", "send")) or self.fused_part(instruction) == "start"

    def fused_part(self, instruction: Instruction) -> str:
        """The part of a collective split over several fusions that this one is: "start", "step", "done" or "".

        On v5e (no SparseCores) fusions between a start and a done transfer a part while they compute.
        """
        if instruction.opcode != "fusion":
            return ""
        inner = list(self.inside(instruction))
        targets = " ".join(i.attributes for i in inner if i.opcode == "custom-call")
        if "AsyncCollectiveStart" in targets:
            return "start"
        if "AsyncCollectiveDone" in targets:
            return "done"
        return "step" if any(i.opcode in COLLECTIVES for i in inner) and instruction.cycles else ""

    def channel(self, instruction: Instruction) -> str:
        """The channel of an instruction's collective; empty without one."""
        for inner in (instruction, *self.inside(instruction)):
            if inner.opcode.removesuffix("-start") in COLLECTIVES:
                match = re.search(r"channel_id=([0-9]+)", inner.attributes)
                return match[1] if match else ""
        return ""

    def _is_padded(self, instruction: Instruction, computation: Computation) -> bool:
        sources = [computation.by_name[name] for name in instruction.operands if name in computation.by_name]
        arrays = [source for source in sources if source.bytes]
        return bool(arrays) and all(
            any(i.opcode == "dynamic-update-slice" for i in (source, *self.inside(source))) for source in arrays
        )

    def _collective(self, instruction: Instruction, kind: str, gathers: bool) -> Collective:
        shapes = instruction.shapes
        if instruction.opcode.endswith("-start") and len(shapes) > 1:
            # (operands, results[, contexts]); an all-reduce-start has results only.
            arrays = [shape for shape in shapes if shape.dtype not in ("u32", "s32") or shape.dims]
            shapes = tuple(arrays) if kind == "all-reduce" else tuple(arrays[len(arrays) // 2 :])
        group = parse_groups(instruction.attributes, self.num_partitions)
        size = sum(shape.bytes for shape in shapes)
        if kind == "reduce-scatter":
            size *= len(group)
        channel = re.search(r"channel_id=([0-9]+)", instruction.attributes)
        return Collective(
            kind, size, shapes[0].dtype, group, instruction.op_name, gathers, channel[1] if channel else ""
        )  # fmt: skip

    def walk(self) -> Iterator[tuple[Instruction, Computation, int]]:
        """(instruction, its computation, how often it runs) of the entry, with loops and branches."""
        yield from self._walk(self.entry, 1)

    def _walk(self, name: str, count: int) -> Iterator[tuple[Instruction, Computation, int]]:
        for instruction in self.computations[name].instructions:
            yield instruction, self.computations[name], count
            for inner, times in self.controlled(instruction, self.computations[name]):
                yield from self._walk(inner, count * times)

    def controlled(self, instruction: Instruction, computation: Computation) -> list[tuple[str, int]]:
        """(computation, how often it runs) of a loop, call or conditional (all branches) in `computation`; empty for
        other instructions."""
        if instruction.opcode == "while":
            body = instruction.attribute("body")
            return [(body, self.trip_count(instruction, computation))] if body else []
        if instruction.opcode == "call":
            target = instruction.attribute("to_apply")
            return [(target, 1)] if target else []
        if instruction.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
            names += [n for n in map(instruction.attribute, ("true_computation", "false_computation")) if n]
            return [(name, 1) for name in names]
        return []


def parse_instruction(line: str) -> Instruction:
    """Parses one line of a computation. Raises ValueError for another."""
    head, _, rest = line.strip().partition(" = ")
    name = head.removeprefix("ROOT ").strip().lstrip("%")
    end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    shape_text, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    if opening < 0 or not name:
        raise ValueError(f"This is not an instruction: {line.strip()[:120]!r}.")
    closing = opening + _closing(rest[opening:])
    text = rest[opening + 1 : closing]
    return Instruction(
        name, rest[:opening].strip(), parse_shapes(shape_text), tuple(re.findall(r"%([\w.\-]+)", text)),
        rest[closing + 1 :], text.strip(),
    )  # fmt: skip


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a printed shape, tuples flattened."""
    return tuple(
        Shape(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), layout or "")
        for dtype, dims, layout in re.findall(r"\b([a-z]\w*)\[([0-9,<=]*)\](?:\{([^}]*)\})?", text)
    )


def parse_groups(attributes: str, num_devices: int) -> tuple[int, ...]:
    """The first group of `replica_groups` or `source_target_pairs`; all devices by default.

    Formats: lists, {{0,1},{2,3}}; a transposed reshaped range, [2,2]<=[2,2]T(1,0); axes of a mesh, mesh['a'=2,'b'=2]
    {'b'}, possibly with a device order.
    """
    match = re.search(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", attributes)
    if match:
        size = int(match[1].split(",")[-1])
        return tuple(_iota(match[2], match[3])[:size])
    match = re.search(r"replica_groups=mesh\[([^\]]*)\](?:,? ?device_ids=\(?\[([0-9,]+)\](?:T\(([0-9,]+)\))?\)?)? ?"
                      r"\{([^}]*)\}", attributes)  # fmt: skip
    if match:
        axes = [(name, int(size)) for name, size in re.findall(r"'?([\w.]+)'?=([0-9]+)", match[1])]
        kept = re.findall(r"'?([A-Za-z_]\w*)'?", match[4])
        order = _iota(match[2], match[3]) if match[2] else list(range(math.prod(size for _, size in axes)))
        group, stride = [0], 1
        for name, size in reversed(axes):
            if name in kept:
                group = [index * stride + device for index in range(size) for device in group]
            stride *= size
        return tuple(order[i] for i in group)
    match = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([0-9,]+)\}", attributes)
    if match:
        return tuple(int(x) for x in match[1].split(","))
    return tuple(range(num_devices))


def _iota(reshape: str, transpose: str | None) -> list[int]:
    """A range reshaped to `reshape`, transposed and flattened."""
    dims = [int(x) for x in reshape.split(",")]
    order = [int(x) for x in transpose.split(",")] if transpose else list(range(len(dims)))
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    flat = [0]
    for axis in order:
        flat = [device + digit * strides[axis] for device in flat for digit in range(dims[axis])]
    return flat


def _closing(text: str) -> int:
    """Index of the parenthesis that closes the first one, ignoring quoted strings."""
    depth = 0
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"|[()]', text):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if depth == 0 and match[0] == ")":
            return match.start()
    raise ValueError(f"A parenthesis is not closed: {text[:80]!r}.")
