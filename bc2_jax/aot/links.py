"""Times of transfers on a chip's links: collectives, between slices, and between HBM and host memory."""

from __future__ import annotations

from collections.abc import Sequence

from bc2_jax.aot.offload import FROM_HOST, TO_HOST
from bc2_jax.aot.program import BETWEEN_SLICES, Collective
from bc2_jax.tpu.chips import Topology
from bc2_jax.tpu.rates import Rates

QUEUES = ("", BETWEEN_SLICES, TO_HOST, FROM_HOST)
"""Links that work at the same time, each with one transfer at a time; "" is for collectives within a slice."""


class Links:
    """Times of transfers in a topology."""

    def __init__(self, topology: Topology, coordinates: Sequence[tuple[int, ...]], rates: Rates):
        """`coordinates`: (slice, x, y, ...) of each device in the program's order."""
        self.topology, self.coordinates, self.rates = topology, coordinates, rates

    def seconds(self, collective: Collective) -> float:
        """bytes * (n - 1) / n over the bidirectional rings of the torus dimensions that the group spans, plus latency.

        A dimension that is not a ring counts half. A permute uses one link. Between slices each chip sends its share
        over the data-centre network in both directions. To host memory and back, PCIe carries both directions at once.
        """
        if collective.kind in (TO_HOST, FROM_HOST):
            return collective.bytes / self.rates.host_bandwidth
        return self.rates.collective_latency + self._moving(collective)

    def _moving(self, collective: Collective) -> float:
        if collective.kind == BETWEEN_SLICES:
            num_slices = self.topology.num_slices
            return 2 * collective.bytes * (num_slices - 1) / num_slices / self.rates.dcn_bandwidth
        places = [self.coordinates[device] for device in collective.group if device < len(self.coordinates)]
        slices = len({place[0] for place in places})
        chips = {place[1:] for place in places}
        if collective.kind == "collective-permute":
            return collective.bytes / (self.rates.dcn_bandwidth if slices > 1 else self.rates.link_bandwidth)
        seconds, inside = 0.0, len(chips)
        if inside > 1:
            seconds = collective.bytes * (inside - 1) / inside / self._bandwidth(chips)
            if collective.kind.endswith("all-to-all"):
                # Each byte has one destination and travels a quarter of each ring on average.
                sides = [len({place[dim] for place in chips}) for dim in range(self.topology.chip.torus_dims)]
                seconds *= sum(side for side in sides if side > 1) / 4 / max(sum(side > 1 for side in sides), 1)
        if slices > 1:
            seconds += collective.bytes / inside * (slices - 1) / slices / self.rates.dcn_bandwidth
        return 2 * seconds if collective.kind == "all-reduce" else seconds

    def _bandwidth(self, chips: set[tuple[int, ...]]) -> float:
        """Bytes/s that a chip receives over the links spanned by the group."""
        links = 0
        for dim in range(self.topology.chip.torus_dims):
            side = len({place[dim] for place in chips if dim < len(place)})
            if side > 1:
                links += 2 if side == self.topology.shape[dim] and self.topology.is_ring(dim) else 1
        return max(links, 1) * self.rates.link_bandwidth
