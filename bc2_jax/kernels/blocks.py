"""Block sizes of the flash attention kernels by chip, head size and length.

tools/tune_attention.py prints the lines of the table: it compiles the candidates and counts their cycles.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from bc2_jax.validation import require, require_positive


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Block sizes of both kernels for one head. Raises ValueError if they do not fit together."""

    forward: int
    """Queries, and keys, per grid step of the forward pass."""
    forward_chunk: int
    """Queries computed at once: while one chunk is in the softmax, the next is multiplied."""
    backward: int
    """Queries, and keys, per grid step of the backward pass."""
    backward_chunk: int
    """Queries computed at once in the backward pass, off the diagonal."""
    backward_diagonal_chunk: int
    """The same on the diagonal; small chunks skip more of the keys after the chunk."""
    span: int
    """Queries of a head whose fp32 dq the backward pass keeps on the chip at a time."""
    vmem_mib: int
    """MiB of the chip's vector memory for one kernel."""

    def __post_init__(self) -> None:
        require_positive(self, "blocks.", *(field.name for field in dataclasses.fields(self)))
        for name in ("forward_chunk", "backward_chunk", "backward_diagonal_chunk"):
            block, chunk = name.split("_")[0], getattr(self, name)
            legal = f"it must divide blocks.{block} = {getattr(self, block)}"
            require(getattr(self, block) % chunk == 0, f"blocks.{name}", chunk, legal)
        large, small = max(self.forward, self.backward), min(self.forward, self.backward)
        require(
            large % small == 0, "blocks.backward", self.backward,
            f"it and blocks.forward = {self.forward} must be multiples of one another",
        )  # fmt: skip

    def fit(self, length: int, granule: int) -> BlockSizes:
        """The sizes for rows of `length` tokens: the same number of blocks, no larger than needed.

        Blocks are multiples of `granule`. A row of 1100 tokens in blocks of 1024 gets two blocks of 640.
        """
        large = max(self.forward, self.backward)
        ratio = large // min(self.forward, self.backward)
        count = -(-length // large)
        large = _round_up(-(-length // count), granule * ratio)
        forward = large if self.forward >= self.backward else large // ratio
        backward = large if self.backward >= self.forward else large // ratio
        return dataclasses.replace(
            self,
            forward=forward,
            forward_chunk=_chunk(forward, self.forward_chunk, granule),
            backward=backward,
            backward_chunk=_chunk(backward, self.backward_chunk, granule),
            backward_diagonal_chunk=_chunk(backward, self.backward_diagonal_chunk, granule),
        )

    def padded(self, length: int) -> int:
        """`length` rounded up to whole blocks of both kernels."""
        return _round_up(length, max(self.forward, self.backward))


class _Line(NamedTuple):
    chip: str
    head_dim: int
    length: int
    """Maximum row length of this line."""
    sizes: BlockSizes


_ANY = 2**31
TABLE = (
    _Line("v4", 128, _ANY, BlockSizes(512, 256, 512, 256, 128, 4096, 14)),
    _Line("v5e", 128, _ANY, BlockSizes(1024, 256, 1024, 512, 256, 32768, 48)),
    _Line("v5p", 128, _ANY, BlockSizes(1024, 256, 1024, 512, 128, 16384, 32)),
    _Line("v6e", 128, _ANY, BlockSizes(1024, 1024, 1024, 512, 512, 32768, 48)),
)


def choose_blocks(chip: str | None, head_dim: int, length: int) -> BlockSizes:
    """The line of the table. An unknown chip gets the sizes of v4, which fit everywhere."""
    chip = chip if chip in {line.chip for line in TABLE} else "v4"
    lines = [line for line in TABLE if line.chip == chip and line.head_dim >= head_dim and line.length >= length]
    lines = lines or [line for line in TABLE if line.chip == chip and line.length >= length]
    return min(lines, key=lambda line: (line.head_dim, line.length)).sizes


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _chunk(block: int, wanted: int, granule: int) -> int:
    """The largest multiple of `granule` up to `wanted` that divides `block`."""
    return max(
        size for size in range(granule, block + 1, granule) if block % size == 0 and size <= max(wanted, granule)
    )
