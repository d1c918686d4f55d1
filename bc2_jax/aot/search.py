"""Which batch, remat policy and mesh to try on a topology, and which of the results are worth a choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from bc2_jax.config import ComputeConfig, MeshConfig, TrainConfig
from bc2_jax.tpu.chips import Topology

BATCHES = (1, 2, 4)
"""Sequences per chip."""
POLICIES = ("full", "save_attention", "save_projections", "save_dots")
"""Values of compute.remat that fit a pod; "none" holds every intermediate value."""
HBM_LIMIT = 0.95
"""Share of HBM a chosen line may take: programs beside the step (evaluation, checkpoints) need the rest."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One combination to compile."""

    batch_per_chip: int
    remat: str
    data: int
    tensor: int

    def overrides(self) -> list[str]:
        """As arguments of tools/aot_compile.py."""
        return [
            "--batch-per-chip", str(self.batch_per_chip), "--compute.remat", self.remat,
            "--mesh.data", str(self.data), "--mesh.fsdp", "-1", "--mesh.tensor", str(self.tensor),
        ]  # fmt: skip

    def config_line(self, config: TrainConfig, chips: int) -> str:
        """What to write into the config file, with its global batch; other fields stay as they are in `config`."""
        compute = dataclasses.replace(config.compute, remat=self.remat)  # type: ignore[arg-type]  # one of POLICIES
        mesh = dataclasses.replace(config.mesh, data=self.data, tensor=self.tensor, fsdp=-1)
        return (
            f"compute={_call(compute)}, mesh={_call(mesh)},  # data.global_batch_size = {self.batch_per_chip * chips}"
        )


def _call(value: ComputeConfig | MeshConfig) -> str:
    """The call that makes a config, without the fields that have their default."""
    fields = [
        (f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if getattr(value, f.name) != f.default
    ]
    return f"{type(value).__name__}({', '.join(f'{name}={value!r}' for name, value in fields)})"


@dataclasses.dataclass(frozen=True)
class Result:
    """A candidate and its figures, or why there are none."""

    candidate: Candidate
    hbm_bytes: int | None
    """Per chip."""
    mfu: float | None
    """Estimated."""
    mfu_low: float | None = None
    error: str = ""


def candidates(config: TrainConfig, topology: Topology) -> Iterator[Candidate]:
    """Every combination that suits the model and the topology, smallest first.

    The mesh is either one axis of parameter shards over all devices, or that with replicas on top (one per slice at
    least), or with two parts of each layer.
    """
    meshes = [(topology.num_slices, 1), (2 * topology.num_slices, 1), (4 * topology.num_slices, 1)]
    meshes.append((topology.num_slices, 2))
    for batch in BATCHES:
        for remat in POLICIES:
            for data, tensor in meshes:
                mesh = dataclasses.replace(config.mesh, data=data, tensor=tensor, fsdp=-1, num_cpu_devices=0)
                rows = batch * topology.num_chips
                try:
                    dataclasses.replace(
                        config, mesh=mesh, data=dataclasses.replace(config.data, global_batch_size=rows)
                    ).resolve(topology.num_devices)
                except ValueError:
                    continue
                yield Candidate(batch, remat, data, tensor)


def pareto(results: Sequence[Result]) -> list[Result]:
    """Results that no other beats in both HBM and estimated MFU, least HBM first."""
    best, kept = 0.0, []
    complete = [r for r in results if r.hbm_bytes is not None and r.mfu is not None]
    for result in sorted(complete, key=lambda r: (r.hbm_bytes, -(r.mfu or 0))):
        if (result.mfu or 0) > best:
            best = result.mfu or 0
            kept.append(result)
    return kept


def choose(results: Sequence[Result], hbm_bytes: int) -> Result | None:
    """The highest estimated MFU that leaves a chip with `hbm_bytes` some room; None if nothing fits."""
    fitting = [r for r in pareto(results) if r.hbm_bytes is not None and r.hbm_bytes <= HBM_LIMIT * hbm_bytes]
    return fitting[-1] if fitting else None
