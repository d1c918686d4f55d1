"""The devices of this process: their kind, memory and place, and how large the checks on them are."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from bc2_jax.tpu.chips import CHIPS, DEVICE_KINDS, GIB, Chip, Topology

_CPU_MEMORY = 2 * GIB
_UNKNOWN_MEMORY = 8 * GIB


@dataclasses.dataclass(frozen=True)
class Device:
    """One device, and how many there are."""

    platform: str  # "cpu", "gpu" or "tpu"
    kind: str  # as JAX names it
    chip: Chip | None  # the TPU generation; None for others and for unknown ones
    memory_bytes: int
    count: int  # devices of all processes

    @property
    def name(self) -> str:
        """The TPU generation, as `tpu.rates.read_rates` expects it, else JAX's name."""
        return self.chip.name if self.chip else self.kind

    @property
    def is_small(self) -> bool:
        """Whether the checks use tiny arrays: on a CPU, where kernels are interpreted."""
        return self.platform == "cpu"

    @property
    def peak_flops(self) -> float | None:
        """bf16 FLOP/s of a device; None if unknown."""
        return self.chip.peak_flops / self.chip.devices if self.chip else None

    @property
    def hbm_bandwidth(self) -> float | None:
        """Bytes/s of a device; None if unknown."""
        return self.chip.hbm_bandwidth / self.chip.devices if self.chip else None


def find_device() -> Device:
    """The first device of this process; others are of the same kind."""
    device = jax.local_devices()[0]
    name = DEVICE_KINDS.get(device.device_kind)
    chip = None if name is None else CHIPS[name]
    memory = _CPU_MEMORY
    if device.platform != "cpu":
        known = _UNKNOWN_MEMORY if chip is None else chip.hbm_bytes // chip.devices
        memory = int((device.memory_stats() or {}).get("bytes_limit", known))
    return Device(device.platform, device.device_kind, chip, memory, jax.device_count())


def topology_of(chip: Chip, devices: list[Any]) -> Topology | None:
    """The slice that these devices make up; None if their coordinates are unknown or not those of a whole block."""
    if not all(hasattr(device, "coords") for device in devices):
        return None
    places = [tuple(device.coords)[: chip.torus_dims] for device in devices]
    sides = tuple(len({place[dim] for place in places}) for dim in range(chip.torus_dims))
    if any(min(place[dim] for place in places) for dim in range(chip.torus_dims)):
        return None  # a part of a larger slice
    slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    topology = Topology(chip, sides, slices)
    return topology if topology.num_devices == len(devices) else None
