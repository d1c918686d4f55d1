"""Reads and writes `*.safetensors`: 8 bytes of header length, a JSON header, raw little-endian tensors.

Not the `safetensors` package: its numpy side cannot read bfloat16 (0.8.0: "data type 'bfloat16' not understood"),
copies what it reads, and writes only tensors that are all in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bc2_jax.convert.mapped import TORCH_DTYPES, MappedTensor, tensor_bytes
from bc2_jax.convert.table import Shape
from bc2_jax.files import sync

_NAMES = {dtype: name for dtype, (name, _) in TORCH_DTYPES.items()}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_MAX_HEADER = 100_000_000  # the format's own limit


def read_safetensors(path: Path) -> dict[str, MappedTensor]:
    """Name -> tensor; reads only the header.

    Raises ValueError with the file's name if the header is malformed, a dtype is unknown, a tensor's bytes do not match
    its shape, or the tensors do not cover the file exactly: no overlaps, gaps, missing or surplus bytes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise ValueError(f"{path} is truncated or not a safetensors file: its header does not fit in it.")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the safetensors header is not valid JSON ({error}).") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the safetensors header is not a JSON object.")
    header.pop("__metadata__", None)
    spans, tensors = [], {}
    for name, entry in header.items():
        dtype, shape, begin, end = _parse_entry(path, name, entry)
        spans.append((begin, end, name))
        tensors[name] = MappedTensor(path, 8 + length + begin, dtype, shape)
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise ValueError(f"{path}: {name} starts at byte {begin} of the data, expected {position}.")
        position = end
    if position != size - 8 - length:
        raise ValueError(f"{path} is truncated or damaged: {size - 8 - length} bytes of data, expected {position}.")
    return tensors


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, Shape, int, int]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{path}: {name} has no dtype, shape or data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{path}: {name} has dtype {dtype!r}; known are {', '.join(_DTYPES)}.")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise ValueError(
            f"{path}: {name} has shape {reprlib.repr(shape)} and data_offsets {reprlib.repr(offsets)}, expected sizes."
        )
    begin, end = offsets
    if end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError(f"{path}: {name} is {dtype} {shape} in {end - begin} bytes, which do not match.")
    return _DTYPES[dtype], tuple(shape), begin, end


def _are_sizes(value: Any) -> bool:
    """Whether it is a list of sizes that an array can have; more or larger ones would take forever to multiply."""
    return isinstance(value, list) and len(value) <= 32 and all(type(n) is int and 0 <= n < 2**48 for n in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError for a repeated key, of which json would silently keep the last."""
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return result


def write_safetensors(
    path: Path, dtype: np.dtype | type, shapes: Mapping[str, Shape], tensors: Iterable[tuple[str, np.ndarray]]
) -> str:
    """Writes tensors of one dtype, one in memory at a time in the order of `shapes`, and syncs the file to disk.

    Returns the file's SHA-256 in hex. Raises ValueError as `mapped.tensor_bytes`.
    """
    dtype = np.dtype(dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    position = 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # aligns the tensors in a memory map
    header_bytes = len(encoded).to_bytes(8, "little") + encoded
    digest = hashlib.sha256(header_bytes)
    # Each tensor is hashed while it is written, and what was written goes to disk meanwhile.
    with path.open("wb") as file, ThreadPoolExecutor(1) as hashing, ThreadPoolExecutor(1) as syncing:
        file.write(header_bytes)
        synced = syncing.submit(os.fsync, file.fileno())
        for content in tensor_bytes(path, dtype, shapes, tensors):
            hashed = hashing.submit(digest.update, content)
            file.write(content)
            if synced.done():
                synced.result()  # raises what failed
                synced = syncing.submit(os.fsync, file.fileno())
            hashed.result()
            del content, hashed  # before the next one is made
        synced.result()
    sync(path)
    return digest.hexdigest()
