"""Reads the compiler's scheduled program (HLO text) of one device.

In a scheduled module the instructions of a computation stand in the order in which they run, each fusion and copy with
the cycles the compiler expects of it; loops stand once, with their number of iterations in the loop's condition.
`compiled.cost_analysis()` knows neither loops nor links nor kernels, hence this reader.
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
"""Bytes per element; tokens and what is not listed have none."""

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
BETWEEN_SLICES = "between-slices"
"""Kind of a transfer over the data-centre network: a send and a receive with one rendezvous, run by the host."""
MATMULS = ("convolution", "dot")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    layout: str
    """As printed, without braces: minor-to-major dimensions, tiles, memory space."""

    @property
    def bytes(self) -> int:
        """Of the elements, without padding."""
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
        """Whether it lives in HBM: memory space 0, which is not printed."""
        return "S(" not in self.layout


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """The arrays of the result, a tuple flattened."""
    operands: tuple[str, ...]
    attributes: str
    """What follows the operands, as printed."""
    text: str
    """What stands between the operands' parentheses, as printed."""

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @functools.cached_property
    def backend_config(self) -> dict:
        """The compiler's own notes on the instruction; empty where there are none or they are not JSON."""
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
        """Cycles the compiler expects it to take, None where it says nothing."""
        match = re.search(r'"estimated_cycles":"([0-9]+)"', self.attributes)
        return None if match is None else int(match[1])

    @property
    def called(self) -> tuple[str, ...]:
        """Computations it runs once: of a fusion, a call or an asynchronous start, not of a loop or a reduction."""
        key = "to_apply" if self.opcode == "call" else "calls"
        return tuple(re.findall(rf"\b{key}=%?([\w.\-]+)", self.attributes))

    @property
    def op_name(self) -> str:
        """Where in the JAX program it comes from; empty where the compiler does not say."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def rendezvous(self) -> str:
        """What a send and a receive between slices have in common; empty for any other instruction."""
        match = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', self.attributes)
        return match[1] if match and "megascale" in self.attributes else ""

    def attribute(self, name: str) -> str | None:
        """The name of a computation given as an attribute, such as a loop's body."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices."""

    kind: str
    """One of COLLECTIVES, or BETWEEN_SLICES, as compiled: a scatter made as an all-reduce is an all-reduce."""
    bytes: int
    """Of the whole tensor on one device: what a gather yields, what a reduction or an exchange is given."""
    dtype: str
    group: tuple[int, ...]
    """Devices of the first group; the others have the same size and shape."""
    op_name: str
    gathers: bool = False
    """Whether it is an all-reduce of tensors that are zero but for the device's own part: a gather at twice the price,
    which libtpu makes where it has no gather (over all three dimensions of a torus)."""
    channel: str = ""
    """The number that the parts of one collective share when it is fused into several matmuls."""


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: tuple[Instruction, ...]
    """In the order in which they run."""

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}


class Program:
    """A parsed module. Raises ValueError for text without an entry computation."""

    def __init__(self, text: str, open_trips: int | None = None):
        """`open_trips`: iterations that a loop counts whose length is data; None refuses such loops."""
        self.open_trips = open_trips
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        partitions = re.search(r"num_partitions=([0-9]+)", text[:100_000])
        self.num_partitions = int(partitions[1]) if partitions else 1
        """Devices the program runs on."""
        name, lines = "", list[str]()
        for line in text.splitlines():
            if line.startswith(("%", "ENTRY ")) and line.rstrip().endswith("{"):
                # A computation's first line always begins so.
                header = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)
                assert header is not None, line
                name, lines = header[1], []
                if line.startswith("ENTRY "):
                    self.entry = name
            elif line.startswith("}") and name:
                self.computations[name] = Computation(name, tuple(map(parse_instruction, lines)))
                name = ""
            elif name and " = " in line:
                lines.append(line)
        if self.entry not in self.computations:
            raise ValueError("The text is not a compiled program: it has no ENTRY computation.")

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instructions of the computations it runs, nested ones included."""
        for name in instruction.called:
            if name in self.computations:
                for inner in self.computations[name].instructions:
                    yield inner
                    yield from self.inside(inner)

    def trip_count(self, loop: Instruction) -> int:
        """Iterations of a `while`: what the compiler noted, else the constant its counter is compared with.

        Where neither is there its length is data: `open_trips`, or ValueError, for it has no static time.
        """
        noted = loop.backend_config.get("known_trip_count", {}).get("n")
        if noted is not None:
            return int(noted)
        condition = loop.attribute("condition")
        found = []
        for instruction in self.computations[condition].instructions if condition else ():
            for inner in (instruction, *self.inside(instruction)):
                # A counter has 32 bits or more; smaller constants are of other conditions.
                is_count = inner.opcode == "constant" and inner.shapes[0].dtype in ("s32", "u32", "s64", "u64")
                if is_count and inner.text.lstrip("-").isdecimal():
                    found.append(int(inner.text))
        if not found and self.open_trips is not None:
            return self.open_trips
        if not found:
            raise ValueError(f"Loop {loop.name} has no constant number of iterations in its condition.")
        return max(found)

    def is_matmul(self, instruction: Instruction) -> bool:
        """Whether the MXUs do its work."""
        return any(i.opcode in MATMULS for i in (instruction, *self.inside(instruction)))

    def collective(self, instruction: Instruction, computation: Computation | None = None) -> Collective | None:
        """The exchange an instruction makes or starts; None for any other and for the end of one.

        In its `computation` a gather made as an all-reduce is known by its operands.
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
        """Whether a collective only starts here and other work goes on beside it."""
        return instruction.opcode.endswith(("-start", "send")) or self.fused_part(instruction) == "start"

    def fused_part(self, instruction: Instruction) -> str:
        """Which part of a collective that is spread over several fusions this one has: start, step, done or none ("").

        v5e has no SparseCore; there a start and a done frame fusions that move a part while they compute.
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
        """The channel of the collective in an instruction; empty where there is none."""
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
        """Every instruction of the entry and of the loops and branches in it, where it stands and how often it runs."""
        yield from self._walk(self.entry, 1)

    def _walk(self, name: str, count: int) -> Iterator[tuple[Instruction, Computation, int]]:
        for instruction in self.computations[name].instructions:
            yield instruction, self.computations[name], count
            for inner, times in self.controlled(instruction):
                yield from self._walk(inner, count * times)

    def controlled(self, instruction: Instruction) -> list[tuple[str, int]]:
        """The computations a loop, a call or a conditional runs, with how often; empty for any other instruction.

        Of a conditional all branches are listed; one of them runs.
        """
        if instruction.opcode == "while":
            body = instruction.attribute("body")
            return [(body, self.trip_count(instruction))] if body else []
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
    """One line of a computation. Raises ValueError for another."""
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
    """The first group of devices that exchange, from `replica_groups` or `source_target_pairs`; all by default.

    Groups are printed as lists, {{0,1},{2,3}}; as a transposed reshaped range, [2,2]<=[2,2]T(1,0); or as axes of a
    mesh, mesh['a'=2,'b'=2] {'b'}, which may be followed by the device order.
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
    """Index of the parenthesis that closes the first one; those in quoted strings do not count."""
    depth = 0
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"|[()]', text):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if depth == 0 and match[0] == ")":
            return match.start()
    raise ValueError(f"A parenthesis is not closed: {text[:80]!r}.")
