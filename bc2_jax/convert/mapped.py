"""A tensor that stays in its file until it is read, whichever format the file has."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np

from bc2_jax.convert.table import Shape


@dataclasses.dataclass(frozen=True)
class MappedTensor:
    """Where a tensor lies in a file. The maker has checked that its bytes are inside the file."""

    file: Path
    offset: int
    """First byte of the first element."""
    dtype: np.dtype
    shape: Shape
    strides: Shape | None = None
    """In elements; None is contiguous in C order."""

    def read(self) -> np.ndarray:
        """A read-only array that maps the file while it lives: a slice of it reads only its own pages.

        The mapping is made again by each call and goes with the array, so a walk over all tensors never holds more
        than one of them in memory.
        """
        if math.prod(self.shape) == 0:
            return np.empty(self.shape, self.dtype)
        strides = contiguous_strides(self.shape) if self.strides is None else self.strides
        count = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, strides, strict=True))
        raw: np.ndarray = np.memmap(self.file, np.uint8, "r", self.offset, (count * self.dtype.itemsize,))
        if self.offset % self.dtype.itemsize:  # both formats allow it; a copy is safer than unaligned access
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
