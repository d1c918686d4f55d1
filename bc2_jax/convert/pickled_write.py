"""Writes `pytorch_model*.bin` without torch, one tensor in memory at a time.

The pickle of a state dict contains only names, dtypes and shapes, which are known before the tensors. So it is written
first, and each tensor then goes straight into its zip entry; `torch.save` needs all tensors at once.
"""

from __future__ import annotations

import itertools
import math
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from bc2_jax.convert.mapped import contiguous_strides, tensor_bytes
from bc2_jax.convert.pickled import ORDERED_DICT, STORAGES, TENSOR
from bc2_jax.convert.table import Shape
from bc2_jax.files import sync

_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
_ALIGNMENT = 64  # torch's own, so a memory map of the file is aligned
_HEADER, _ZIP64_EXTRA = 30, 20  # bytes of an entry's local header, and additional bytes of a large entry's


def write_pickled(
    path: Path, dtype: np.dtype | type, shapes: Mapping[str, Shape], tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes a file that `torch.load` reads as a state dict of tensors of one dtype, and syncs it to disk.

    Tensors are taken one at a time in the order of `shapes`; equal tensors give equal bytes. Raises ValueError as
    `mapped.tensor_bytes`, and if torch has no such dtype.
    """
    dtype = np.dtype(dtype)
    if dtype not in _STORAGE_NAMES:
        raise ValueError(f"{path}: torch has no dtype {dtype}.")
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        _write_entry(archive, file.tell(), "data.pkl", _pickle(dtype, shapes))
        _write_entry(archive, file.tell(), "byteorder", b"little")
        _write_entry(archive, file.tell(), "version", b"3\n")
        keys = itertools.count()  # enumerate() would hold the last tensor
        for content in tensor_bytes(path, dtype, shapes, tensors):
            _write_entry(archive, file.tell(), f"data/{next(keys)}", content)
            del content  # before the next one is made
    sync(path)


def _write_entry(archive: zipfile.ZipFile, position: int, name: str, content: bytes | memoryview) -> None:
    """Writes an uncompressed entry with a fixed date; an extra field aligns its first byte, as in torch."""
    info = zipfile.ZipInfo(f"archive/{name}")
    info.create_system = 3  # otherwise the current operating system
    large = len(content) > zipfile.ZIP64_LIMIT
    start = position + _HEADER + len(info.filename) + large * _ZIP64_EXTRA + 4
    padding = -start % _ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=large) as entry:
        entry.write(content)
    info.extra = b""  # the directory does not need it


def _pickle(dtype: np.dtype, shapes: Mapping[str, Shape]) -> bytes:
    """The state dict as protocol 2 opcodes: a mark, the items of a tuple or dict, and the opcode that collects them."""
    empty = _global(ORDERED_DICT) + b")R"
    parts = [b"\x80\x02", empty, b"("]
    for key, (name, shape) in enumerate(shapes.items()):
        kind = _text("storage") + _global(_STORAGE_NAMES[dtype])
        storage = b"(" + kind + _text(str(key)) + _text("cpu") + _integer(math.prod(shape)) + b"tQ"
        layout = _integer(0) + _integers(shape) + _integers(contiguous_strides(shape))
        parts.append(_text(name) + _global(TENSOR) + b"(" + storage + layout + b"\x89" + empty + b"tR")
    return b"".join([*parts, b"u."])


def _global(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value) if value < 2**31 else b"\x8a\x08" + struct.pack("<q", value)


def _integers(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
