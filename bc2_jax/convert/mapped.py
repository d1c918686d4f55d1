"""Tensors that stay in their weight file until they are read, and the check shared by the writers of such files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from bc2_jax.convert.table import Shape

# numpy dtype -> (its name in safetensors, torch's storage class)
TORCH_DTYPES: dict[np.dtype, tuple[str, str]] = {
    np.dtype(kind): (name, f"torch.{storage}Storage")
    for kind, name, storage in (
        (np.float64, "F64", "Double"), (np.float32, "F32", "Float"), (np.float16, "F16", "Half"),
        (ml_dtypes.bfloat16, "BF16", "BFloat16"), (np.int64, "I64", "Long"), (np.int32, "I32", "Int"),
        (np.int16, "I16", "Short"), (np.int8, "I8", "Char"), (np.uint8, "U8", "Byte"), (np.bool_, "BOOL", "Bool"),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MappedTensor:
    """Location of a tensor in a file. Its creator has checked that all bytes are inside the file."""

    file: Path
    offset: int  # first byte of the first element
    dtype: np.dtype
    shape: Shape
    strides: Shape | None = None  # in elements; None is contiguous in C order

    def read(self) -> np.ndarray:
        """A read-only array that maps the file; a slice of it reads only its own pages.

        Each call makes its own mapping, which ends with the array, so reading tensors one by one keeps one in memory.
        """
        if math.prod(self.shape) == 0:
            return np.empty(self.shape, self.dtype)
        strides = contiguous_strides(self.shape) if self.strides is None else self.strides
        count = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, strides, strict=True))
        raw: np.ndarray = np.memmap(self.file, np.uint8, "r", self.offset, (count * self.dtype.itemsize,))
        if self.offset % self.dtype.itemsize:  # legal in both formats; a copy is safer than unaligned access
            raw = raw.copy()
            raw.flags.writeable = False
        flat = raw.view(np.ndarray).view(self.dtype)
        if strides == contiguous_strides(self.shape):
            return flat.reshape(self.shape)
        steps = [stride * self.dtype.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)


def contiguous_strides(shape: Shape) -> Shape:
    """Strides in elements of a C-ordered array."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def tensor_bytes(
    path: Path, dtype: np.dtype, shapes: Mapping[str, Shape], tensors: Iterable[tuple[str, np.ndarray]]
) -> Iterator[memoryview]:
    """The bytes of each of `tensors`, one in memory at a time.

    Raises ValueError unless `tensors` has exactly the names and shapes of `shapes`, in their order, and this dtype.
    """
    expected = iter(shapes.items())
    for name, array in tensors:
        if (name, array.shape) != next(expected, None) or array.dtype != dtype:
            raise ValueError(f"{path}: {name} {array.dtype} {array.shape} is not the tensor expected here.")
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        del array  # before the next one is made
    if (missing := next(expected, None)) is not None:
        raise ValueError(f"{path}: the tensor {missing[0]} is missing.")
