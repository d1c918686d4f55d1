"""HBM bytes that a matmul fusion reads and writes, and the FLOPs of its matmuls.

A fusion's operands are whole arrays: the weights of all layers, of which it slices one, or the cache, of which it
writes one token. Only the touched part counts.
"""

from __future__ import annotations

import math
import re

from bc2_jax.aot.program import MATMULS, Computation, Instruction, Program

_SAME_BYTES = ("bitcast", "reshape", "copy", "transpose")


def moved_bytes(program: Program, instruction: Instruction, computation: Computation) -> int:
    """HBM bytes that an instruction of a computation reads and writes."""
    body = _body(program, instruction)
    total = 0
    for index, name in enumerate(instruction.operands):
        source = computation.by_name.get(name)
        if source is not None and any(shape.in_hbm for shape in source.shapes):
            total += source.bytes if body is None else min(source.bytes, _read(program, body, index))
    if body is None:
        return total + sum(shape.bytes for shape in instruction.shapes if shape.in_hbm)
    root = body.instructions[-1]
    parts = root.operands if root.opcode == "tuple" else (root.name,)
    for shape, part in zip(instruction.shapes, parts, strict=False):
        if shape.in_hbm:
            total += min(shape.bytes, _written(program, body, part))
    return total


def matmul_flops(program: Program, instruction: Instruction) -> float:
    """FLOPs of the matmuls in an instruction.

    [b, m, k] x [b, k, n] -> [b, m, n] takes 2 b m k n FLOPs, and (b m k) (b k n) (b m n) / b = (b m k n)^2 for any
    order of dimensions.
    """
    total = 0.0
    for name in instruction.called:
        computation = program.computations.get(name)
        for inner in computation.instructions if computation else ():
            if inner.opcode in MATMULS and computation is not None:
                arrays = [inner, *(computation.by_name[operand] for operand in inner.operands[:2])]
                shapes = [array.shapes[0].dims for array in arrays]
                total += 2 * math.sqrt(math.prod(map(math.prod, shapes)) / _batch(inner, *shapes))
            total += matmul_flops(program, inner)
    return total


def _batch(matmul: Instruction, out: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Product of the batch dimensions, which the operands and the result share.

    The TPU compiler writes a batch dimension as a window of a convolution that is as long as the input.
    """
    if matmul.opcode == "dot":
        found = re.search(r"lhs_batch_dims=\{([0-9,]+)\}", matmul.attributes)
        return math.prod(left[int(dim)] for dim in found[1].split(",")) if found else 1
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", matmul.attributes)
    if not found:
        return 1
    of_left, of_right, of_out = (
        dict(zip(labels, dims, strict=True)) for labels, dims in zip(found.groups(), (left, right, out), strict=True)
    )
    windows = (label for label in of_left if label.isdecimal())
    return math.prod(of_left[w] for w in windows if of_left[w] == of_right.get(w) == of_out.get(w))


def _body(program: Program, instruction: Instruction) -> Computation | None:
    called = instruction.called
    return program.computations.get(called[0]) if called else None


def _read(program: Program, body: Computation, index: int) -> int:
    """Bytes of argument `index` that a fused computation reads."""
    parameters = [i for i in body.instructions if i.opcode == "parameter" and i.text == str(index)]
    return _used(program, body, parameters[0]) if parameters else 0


def _used(program: Program, body: Computation, array: Instruction) -> int:
    total = array.bytes if array is body.instructions[-1] else 0
    for user in body.instructions:
        for place, name in enumerate(user.operands):
            if name != array.name:
                continue
            if user.opcode in ("slice", "dynamic-slice") and place == 0:
                total += user.bytes
            elif user.opcode == "dynamic-update-slice" and place == 0:
                continue  # written in place
            elif user.opcode in _SAME_BYTES:
                total += _used(program, body, user)
            elif (inner := _body(program, user)) is not None:
                total += _read(program, inner, place)
            else:
                total += array.bytes
    # Data with several readers is fetched once.
    return min(total, array.bytes)


def _written(program: Program, body: Computation, name: str) -> int:
    instruction = body.by_name[name]
    if instruction.opcode == "dynamic-update-slice":
        return body.by_name[instruction.operands[1]].bytes
    if instruction.opcode in _SAME_BYTES:
        return _written(program, body, instruction.operands[0])
    inner = _body(program, instruction)
    return instruction.bytes if inner is None else _written(program, inner, inner.instructions[-1].name)
