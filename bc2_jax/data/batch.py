"""Batches: their fields, the rows of a batch that a process reads, and their placement on the mesh.

On the host a process has its rows of a batch, int32 [B / parts, T]. On the mesh a batch is [A, B / A, T], A being
accumulation steps, sharded by rows and, with mesh.context, by tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from bc2_jax.config import DataConfig
from bc2_jax.data.row_file import BRANCH, START, TARGET, find_branches, token_ids
from bc2_jax.kernels.segments import TRUNK_BITS
from bc2_jax.sharding import mesh_axes, spec
from bc2_jax.tokenizer import EOS_ID, PAD_ID, USER_ID

IGNORED = -100
"""Label of a position without a target."""
FIELDS = ("input_ids", "labels", "segment_ids", "positions")
"""Of a batch of text: token ids, the next token of each or IGNORED, segments (`kernels.segments`: documents counted
from 1 in each row, and their branches; 0 is padding), positions in the document."""

Rows = dict[str, np.ndarray]
"""Fields of rows on the host, int32 [rows, T]; further fields, values beside each row, are fp32 [rows, W]."""
Batch = dict[str, jax.Array]
"""Fields of a batch on the mesh, int32 [A, B / A, T], or [B, T] for one micro-batch. Further fields are [A, B / A, W],
sharded by rows alone."""
AbstractBatch = dict[str, jax.ShapeDtypeStruct]
"""Shapes, dtypes and shardings of the fields of a `Batch`."""


def row_to_example(row: np.ndarray) -> Rows:
    """Splits rows, uint32 [..., T + 1], into FIELDS, each int32 [..., T].

    In a row of text labels are -100 after an eos, because the first token of a document has no context, and at padding;
    a document continued from the previous row is a new segment. In a row of conversations a label is the next token if
    that is a TARGET (eos in place of the user's role), else -100; a segment begins at each START and BRANCH. The k-th
    branch of document n is segment n + (k << TRUNK_BITS). Positions count from 0 in each document, and in a branch from
    the length of its trunk; they are 0 for padding.
    """
    # A batch may have rows of both kinds.
    chat = row[..., 0] >= START
    has_chat = bool(chat.any())
    tokens = (token_ids(row) if has_chat else row).astype(np.int32)
    input_ids, targets = tokens[..., :-1], tokens[..., 1:]
    ends, padding = input_ids == EOS_ID, input_ids == PAD_ID
    labels = targets.copy()
    labels[ends | padding | (targets == PAD_ID)] = IGNORED
    starts = np.empty_like(ends)
    starts[..., 0] = True
    starts[..., 1:] = ends[..., :-1]
    if has_chat:
        flags, answers = row[chat], targets[chat]
        answers[answers == USER_ID] = EOS_ID
        labels[chat] = np.where(flags[:, 1:] & TARGET, answers, IGNORED)
        starts[chat] = (flags[:, :-1] & START) > 0
    segment_ids = np.cumsum(starts, axis=-1, dtype=np.int32)
    # Each row begins a segment, so all rows can be counted at once.
    first = np.flatnonzero(starts).astype(np.int32)
    offsets = np.repeat(first, np.diff(first, append=np.int32(starts.size)))
    positions = (np.arange(starts.size, dtype=np.int32) - offsets).reshape(starts.shape)
    if has_chat and (flags & BRANCH).any():
        branch, moved = find_branches(flags[:, :-1])
        segment_ids[chat] += branch << TRUNK_BITS
        positions[chat] -= moved
    segment_ids[padding] = positions[padding] = 0
    return {"input_ids": input_ids, "labels": labels, "segment_ids": segment_ids, "positions": positions}


class BatchPart(NamedTuple):
    """The rows of each batch that one process reads."""

    process_index: int
    process_count: int
    """Processes that read different rows."""
    blocks: tuple[int, ...]
    """The mesh's blocks of rows that the process holds, in its order."""


def batch_part(mesh: Mesh, process_index: int) -> BatchPart:
    """The part of a process; processes that shard the same sequences (mesh.context) read the same part.

    Raises ValueError if two processes share some but not all of their rows.
    """
    cut = [mesh.axis_names.index(axis) for axis in mesh_axes("batch")]
    whole = [i for i in range(mesh.devices.ndim) if i not in cut]
    blocks = mesh.devices.transpose(*cut, *whole).reshape(-1, math.prod(mesh.devices.shape[i] for i in whole))
    held: dict[int, tuple[int, ...]] = {}
    for block, devices in enumerate(blocks):
        for process in {device.process_index for device in devices}:
            held[process] = (*held.get(process, ()), block)
    parts = sorted(set(held.values()))
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != len(blocks):
        raise ValueError(
            f"mesh.context * mesh.tensor = {blocks.shape[1]} is not valid: it must divide the devices of a process or "
            "be a multiple of them."
        )
    return BatchPart(parts.index(held[process_index]), len(parts), held[process_index])


def _layout(data: DataConfig, mesh: Mesh, name: str, width: int) -> tuple[tuple[int, int, int], NamedSharding]:
    """Shape [A, B / A, width] and sharding of a field of a batch."""
    shape = (data.accumulation_steps, data.global_batch_size // data.accumulation_steps, width)
    return shape, NamedSharding(mesh, spec(None, "batch", "sequence" if name in FIELDS else None))


def make_put(data: DataConfig, mesh: Mesh) -> Callable[[Rows], Batch]:
    """A function that places this process's rows of a batch on the mesh: FIELDS, and others of any width."""
    blocks = batch_part(mesh, jax.process_index()).blocks

    def place(name: str, x: np.ndarray) -> jax.Array:
        shape, sharding = _layout(data, mesh, name, x.shape[-1])
        rows, shards = x.reshape(shape[0], -1, shape[2]), []
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            assert index is not None
            start, stop, _ = index[1].indices(shape[1])
            first = blocks.index(start // (stop - start)) * (stop - start)
            # Explicit, because the loop runs under a transfer guard.
            shards.append(jax.device_put(rows[:, first : first + stop - start, index[2]], device))
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)

    return lambda rows: {name: place(name, x) for name, x in rows.items()}


def abstract_batch(data: DataConfig, mesh: Mesh, fields: Mapping[str, int] | None = None) -> AbstractBatch:
    """Shapes and shardings of a batch with further `fields` of these widths."""
    widths = dict.fromkeys(FIELDS, data.sequence_length) | dict(fields or {})
    batch = {}
    for name, width in widths.items():
        shape, sharding = _layout(data, mesh, name, width)
        dtype = jnp.int32 if name in FIELDS else jnp.float32
        batch[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return batch
