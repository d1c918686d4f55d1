"""TPU generations and their bookable slices as data.

libtpu compiles for slices that do not exist (v5e:16x32), so shapes are checked against Google's lists.

Sources: Cloud TPU documentation, the page of each generation (peak, HBM, TensorCores, SparseCores, shapes, data-centre
network); "How to Scale Your Model", chapter 2 (usable one-way bandwidth of a link, a tenth below the nominal value; a
2-D torus closes only along 16 chips, a 3-D one along multiples of 4). The clock is the one at which the MXUs reach the
documented peak (MXUs * size^2 * 2 FLOP * clock); libtpu's cycle estimates are in its cycles.
"""

from __future__ import annotations

import dataclasses
import math
import re

GIB = 2**30
_GB_PER_GBIT = 1e9 / 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One generation; every figure is per chip."""

    name: str
    peak_flops: float  # bf16 FLOP/s with fp32 accumulation
    hbm_bytes: int  # documented capacity; libtpu reserves a little (0.25 GiB on v5e)
    hbm_bandwidth: float  # bytes/s
    clock: float  # Hz of the cycles in scheduled programs
    mxu: int  # rows and columns of a matrix unit
    tensor_cores: int  # on v4 and v5p both are one JAX device (megacore), on tpu7x each is a device
    devices: int  # JAX devices
    sparse_cores: int  # SparseCores that can run collectives beside the TensorCores
    link_bandwidth: float  # usable bytes/s of one link, one way
    torus_dims: int  # dimensions of the torus, with two links each
    dcn_bandwidth: float  # bytes/s of the data-centre network between slices
    chip_config: str | None = None
    """libtpu's `chip_config_name`, if its default makes each TensorCore a device."""
    shapes: tuple[tuple[int, ...], ...]  # documented slices, smallest first
    max_chips: int  # largest slice
    cube: int = 0
    """3-D slices larger than this cube may have any multiples of it as sides; 0 if only `shapes` exist."""


DEVICE_KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
    "TPU v6e": "v6e", "TPU7x": "tpu7x",
}  # fmt: skip
"""JAX's device kind -> generation."""

_PLANE_SHAPES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SPACE_SHAPES = (
    (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16), (8, 16, 16),
    (16, 16, 16),
)  # fmt: skip

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4", peak_flops=275e12, hbm_bytes=32 * GIB, hbm_bandwidth=1200e9, clock=1.05e9,
            mxu=128, tensor_cores=2, devices=1, sparse_cores=0, link_bandwidth=45e9, torus_dims=3,
            dcn_bandwidth=25 * _GB_PER_GBIT, chip_config="megacore", shapes=_SPACE_SHAPES, max_chips=4096, cube=4,
        ),
        Chip(
            name="v5e", peak_flops=197e12, hbm_bytes=16 * GIB, hbm_bandwidth=819e9, clock=1.5e9,
            mxu=128, tensor_cores=1, devices=1, sparse_cores=0, link_bandwidth=45e9, torus_dims=2,
            dcn_bandwidth=25 * _GB_PER_GBIT, shapes=_PLANE_SHAPES, max_chips=256,
        ),
        Chip(
            name="v5p", peak_flops=459e12, hbm_bytes=95 * GIB, hbm_bandwidth=2765e9, clock=1.75e9,
            mxu=128, tensor_cores=2, devices=1, sparse_cores=4, link_bandwidth=90e9, torus_dims=3,
            dcn_bandwidth=50 * _GB_PER_GBIT, shapes=(*_SPACE_SHAPES, (16, 16, 24)), max_chips=6144, cube=4,
        ),
        Chip(
            name="v6e", peak_flops=918e12, hbm_bytes=32 * GIB, hbm_bandwidth=1638e9, clock=1.75e9,
            mxu=256, tensor_cores=1, devices=1, sparse_cores=2, link_bandwidth=90e9, torus_dims=2,
            dcn_bandwidth=100 * _GB_PER_GBIT, shapes=_PLANE_SHAPES, max_chips=256,
        ),
        Chip(
            name="tpu7x", peak_flops=2307e12, hbm_bytes=192 * GIB, hbm_bandwidth=7380e9, clock=2.2e9,
            mxu=256, tensor_cores=2, devices=2, sparse_cores=4, link_bandwidth=90e9, torus_dims=3,
            dcn_bandwidth=100 * _GB_PER_GBIT, shapes=_SPACE_SHAPES, max_chips=9216, cube=4,
        ),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of one generation and shape; made by `parse_topology`."""

    chip: Chip
    shape: tuple[int, ...]  # chips along each dimension of one slice
    num_slices: int = 1  # slices, joined by the data-centre network

    @property
    def name(self) -> str:
        """For instance v5p:4x4x8."""
        return f"{self.chip.name}:{_shape_name(self.shape)}"

    @property
    def slice_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def num_chips(self) -> int:
        return self.slice_chips * self.num_slices

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices

    def is_ring(self, dim: int) -> bool:
        """Whether the links of this dimension form a ring, which doubles its bandwidth."""
        size = self.shape[dim]
        return size == 16 if self.chip.torus_dims == 2 else size % 4 == 0

    def __str__(self) -> str:
        return self.name if self.num_slices == 1 else f"{self.num_slices} x {self.name}"


def parse_topology(text: str, num_slices: int = 1) -> Topology:
    """Parses GENERATION:AxB or GENERATION:AxBxC, for instance v5e:16x16 or v5p:4x4x8.

    Raises ValueError for an unknown generation, a shape that cannot be booked, and less than one slice.
    """
    generation, _, shape_text = text.partition(":")
    chip = CHIPS.get(generation)
    if chip is None:
        raise ValueError(f"topology = {text!r} is not valid: the generation must be one of {', '.join(CHIPS)}.")
    if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)+", shape_text):
        form = "x".join("ABC"[: chip.torus_dims])
        raise ValueError(
            f"topology = {text!r} is not valid: write {chip.name}:{form}, for instance "
            f"{chip.name}:{_shape_name(chip.shapes[-1])}."
        )
    shape = tuple(int(side) for side in shape_text.split("x"))
    if not _exists(chip, shape):
        legal = ", ".join(_shape_name(s) for s in chip.shapes)
        if chip.cube:
            legal += f" and AxBxC in ascending multiples of {chip.cube} up to {chip.max_chips} chips"
        raise ValueError(f"topology = {text!r} is not valid: no {chip.name} slice has this shape; legal are {legal}.")
    if num_slices < 1:
        raise ValueError(f"num_slices = {num_slices} is not valid: it must be at least 1.")
    return Topology(chip, shape, num_slices)


def _exists(chip: Chip, shape: tuple[int, ...]) -> bool:
    if shape in chip.shapes:
        return True
    cubes = chip.cube and len(shape) == 3 and all(side % chip.cube == 0 for side in shape)
    return bool(cubes) and list(shape) == sorted(shape) and math.prod(shape) <= chip.max_chips


def _shape_name(shape: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in shape)
