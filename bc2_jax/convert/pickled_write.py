"""Writing `pytorch_model*.bin` without torch, one tensor at a time.

The counterpart of `pickled.py`. `torch.save` needs all tensors at once; but what it pickles are only names, dtypes and
shapes, which are known before the first tensor is there. So the pickle, a few opcodes a tensor, is written first and
every tensor goes straight into its zip entry.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from bc2_jax.convert.mapped import contiguous_strides
from bc2_jax.convert.pickled import ORDERED_DICT, STORAGES, TENSOR
from bc2_jax.convert.table import Shape
from bc2_jax.files import sync

_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
_ALIGNMENT = 64  # as torch aligns, so that a memory map of the file can be used as it is
_HEADER, _ZIP64_EXTRA = 30, 20  # bytes of an entry's local header, and what that of a large entry has more


def write_pickled(
    path: Path, dtype: np.dtype | type, shapes: Mapping[str, Shape], tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes what `torch.load` reads as a state dict of tensors of one dtype, and syncs it to disk.

    The tensors are taken one at a time in the order of `shapes`. Equal tensors make equal files, byte for byte. Raises
    ValueError if `tensors` is not exactly what `shapes` and `dtype` announce, or torch has no such dtype.
    """
    dtype = np.dtype(dtype)
    if dtype not in _STORAGE_NAMES:
        raise ValueError(f"{path}: torch has no dtype {dtype}.")
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        _write_entry(archive, file.tell(), "data.pkl", _pickle(dtype, shapes))
        _write_entry(archive, file.tell(), "byteorder", b"little")
        _write_entry(archive, file.tell(), "version", b"3\n")
        announced = enumerate(shapes.items())
        for name, array in tensors:
            key, expected = next(announced, (0, None))
            if (name, array.shape) != expected or array.dtype != dtype:
                raise ValueError(f"{path}: {name} {array.dtype} {array.shape} is not the tensor announced here.")
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            _write_entry(archive, file.tell(), f"data/{key}", content)
            del array, content  # before the next one is made
        if (left := next(announced, None)) is not None:
            raise ValueError(f"{path}: {left[1][0]} was announced and did not come.")
    sync(path)


def _write_entry(archive: zipfile.ZipFile, position: int, name: str, content: bytes | memoryview) -> None:
    """An uncompressed entry with a fixed date, whose first byte is aligned by an extra field, as torch does it."""
    info = zipfile.ZipInfo(f"archive/{name}")
    info.create_system = 3  # zipfile would write on which system it runs
    large = len(content) > zipfile.ZIP64_LIMIT
    start = position + _HEADER + len(info.filename) + large * _ZIP64_EXTRA + 4
    padding = -start % _ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=large) as entry:
        entry.write(content)
    info.extra = b""  # the directory does not need it


def _pickle(dtype: np.dtype, shapes: Mapping[str, Shape]) -> bytes:
    """The state dict as opcodes of protocol 2: a mark, what a tuple or dict holds, and the opcode that collects it."""
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
