"""Checks, casts, head normalisation and fingerprints of arrays during a conversion."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import ml_dtypes
import numpy as np

from bc2_jax.convert.table import Part
from bc2_jax.model.head import MIN_NORM

if TYPE_CHECKING:
    from bc2_jax.convert.source import Source

Item = TypeVar("Item")
Result = TypeVar("Result")

HEAD = "lm_head.weight"
# More than the cores of a small machine: each waits for the disk, then hashes and transposes.
WORKERS = 4
_BLOCK_BYTES = 32 << 20
_CACHE_BYTES = 256 << 10
_EXPONENT = {
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(np.float32): (np.uint32, 0x7F800000),
}


class Stream:
    """Reads a source part by part, in another dtype, and records what it sees. Thread-safe.

    `read` is a `table.Reader`. `normalize_head` scales the rows of a NormHead to unit length in fp32. A finite value
    that overflows in `dtype` raises ValueError. Parts with values that are not finite raise ValueError if `strict`,
    else they are listed in `not_finite`. `advance` gets the number of bytes of each part.
    """

    def __init__(
        self,
        source: Source,
        dtype: np.dtype | None = None,
        normalize_head: bool = False,
        strict: bool = False,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.source, self.dtype, self.strict, self.advance = source, dtype, strict, advance
        self.normalize_head = normalize_head and source.config.normalize_head
        self.not_finite: list[str] = []
        self.digests: dict[Part, str] = {}
        """`digest_part` of every part read."""

    def dtype_of(self, path: str) -> np.dtype:
        return self.source.dtypes[path] if self.dtype is None else self.dtype

    def read(self, path: str, layer: int | None) -> np.ndarray:
        array = self.source.read(path, layer)
        name = path if layer is None else f"{path}[{layer}]"
        if not _is_finite(array):
            if self.strict:
                raise ValueError(f"{self.source.path}: {name} has values that are not finite.")
            self.not_finite.append(name)
        size = array.nbytes
        if self.normalize_head and path == HEAD:
            array = _by_rows(normalize_rows, array, self.dtype_of(path), name)
        elif array.dtype != self.dtype_of(path):
            array = _by_rows(lambda rows: rows, array, self.dtype_of(path), name)
        self.digests[path, layer] = digest_part((path, layer), array)
        self.advance(size)
        return array


def normalize_rows(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to unit length in fp32; rows shorter than 1e-12 become zero, as in `model.head`."""
    rows = rows.astype(np.float32)
    norms = np.sqrt(np.sum(rows * rows, axis=1, keepdims=True))
    return np.where(norms < MIN_NORM, 0, rows / np.maximum(norms, MIN_NORM))


def _by_rows(function: Callable[[np.ndarray], np.ndarray], array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """function(array) cast to `dtype`, block by block, so that no other array of this size is in memory."""
    out = np.empty(array.shape, dtype)
    for block, target in zip(row_blocks(array), row_blocks(array, out), strict=True):
        rows = function(block)
        with np.errstate(over="ignore"):
            target[...] = rows
        overflow = np.isinf(target) & np.isfinite(rows)
        if overflow.any():
            largest = float(np.abs(rows[overflow].astype(np.float32)).max())
            raise ValueError(f"{name} overflows in {dtype.name}: it has the value {largest:.6g}; use bfloat16.")
    return out


def row_blocks(array: np.ndarray, of: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Views of consecutive row blocks of `array`, 32 MiB or one row each; or the same rows of the array `of`."""
    step = max(1, _BLOCK_BYTES * len(array) // max(1, array.nbytes))
    return ((array if of is None else of)[i : i + step] for i in range(0, len(array), step))


def _is_finite(array: np.ndarray) -> bool:
    """Whether all values are finite, from their exponent bits: numpy has no fast test for bfloat16."""
    kind, mask = _EXPONENT[array.dtype]
    flat = array.reshape(-1).view(kind)
    step = _CACHE_BYTES // flat.itemsize
    return all((flat[i : i + step] & mask).max() < mask for i in range(0, flat.size, step))


def digest_part(part: Part, array: np.ndarray) -> str:
    """One line of `fingerprint`: SHA-256 of the bytes in C order, with path, dtype and shape."""
    digest = hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()
    return f"{part[0]} {part[1]} {array.dtype} {array.shape} {digest}"


def fingerprint(digests: Iterable[str]) -> str:
    """SHA-256 of all part digests; equal models have equal ones in any format, mesh or order."""
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
    """map(function, items) on a few threads that work only a few items ahead, to save memory."""
    waiting: deque[Future[Result]] = deque()
    remaining = iter(items)
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            for item in itertools.islice(remaining, WORKERS):
                waiting.append(pool.submit(function, item))
            while waiting:
                result = waiting.popleft().result()
                yield result
                del result
                for item in itertools.islice(remaining, 1):
                    waiting.append(pool.submit(function, item))
        finally:
            for future in waiting:
                future.cancel()
