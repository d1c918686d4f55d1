"""Transfers between HBM and host memory in a scheduled program (remat "offload").

They are copies, or slices and updates of an array that holds the values of all layers, asynchronous or not.
"""

from __future__ import annotations

from bc2_jax.aot.program import Collective, Computation, Instruction, Program

TO_HOST, FROM_HOST = "to-host", "from-host"
_HOST = "S(5)"  # host memory in a printed layout
_SMALL = 1024  # bytes; less are indices and contexts


def host_transfer(program: Program, instruction: Instruction, computation: Computation) -> Collective | None:
    """The transfer that an instruction runs or starts; None for others and for the end of one.

    Its `bytes` are those that move: of a slice or update, not of the whole array.
    """
    if instruction.opcode.endswith(("-done", "-update")) or instruction.opcode in _MOVE_NOTHING:
        return None
    operands = [computation.by_name[name] for name in instruction.operands if name in computation.by_name]
    sources = [shape for operand in operands for shape in operand.shapes if shape.bytes >= _SMALL]
    arrays = [*sources, *(shape for shape in instruction.shapes if shape.bytes >= _SMALL)]
    in_host = [_HOST in shape.layout for shape in arrays]
    if not any(in_host) or all(in_host):
        return None
    moved = min(arrays, key=lambda shape: shape.bytes)
    kinds = {inner.opcode.removesuffix("-start") for inner in (instruction, *program.inside(instruction))}
    reads = "dynamic-slice" in kinds or "slice" in kinds
    writes = "dynamic-update-slice" in kinds or not all(_HOST in shape.layout for shape in sources)
    kind = TO_HOST if writes and not reads else FROM_HOST
    return Collective(kind, moved.bytes, moved.dtype, (), instruction.op_name)


_MOVE_NOTHING = ("tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "parameter", "after-all")
