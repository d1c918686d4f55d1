"""Batches, remat policies and meshes to compile for a topology, and the Pareto front of the results."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bc2_jax.config import ComputeConfig, MeshConfig, TrainConfig
from bc2_jax.terminal import program_words
from bc2_jax.tpu.chips import Topology

BATCHES = (1, 2, 4)  # sequences per chip
POLICIES = ("full", "save_attention", "q,k,v,attention", "save_projections", "q,k,v,attention,o,up", "save_dots")
"""Values of compute.remat from least to most HBM; "none" would keep every activation."""
HBM_LIMIT = 0.95  # largest share of HBM for a chosen result; evaluation and checkpoints need the rest


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
        """The line to paste into the config file; other fields stay as they are in `config`."""
        compute = dataclasses.replace(config.compute, remat=self.remat)
        mesh = dataclasses.replace(config.mesh, data=self.data, tensor=self.tensor, fsdp=-1)
        return (
            f"compute={_call(compute)}, mesh={_call(mesh)},  # data.global_batch_size = {self.batch_per_chip * chips}"
        )


def _call(value: ComputeConfig | MeshConfig) -> str:
    """The constructor call of a config, without fields at their defaults."""
    fields = ((f.name, getattr(value, f.name), f.default) for f in dataclasses.fields(value))
    return f"{type(value).__name__}({', '.join(f'{name}={now!r}' for name, now, default in fields if now != default)})"


@dataclasses.dataclass(frozen=True)
class Result:
    """Estimated figures of a candidate, or the error."""

    candidate: Candidate
    hbm_bytes: int | None  # per chip
    mfu: float | None
    mfu_low: float | None = None
    error: str = ""


def run_aot_compile(arguments: Sequence[str]) -> dict[str, Any]:
    """What `tools/aot_compile.py ARGUMENTS --json` writes, from a process of its own: a compile takes gigabytes and may
    be killed. {"error": the last line of stderr} where it writes nothing."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder, "figures.json")
        command = [*program_words("tools/aot_compile.py"), *arguments, "--json", str(figures)]
        done = subprocess.run(command, capture_output=True, text=True)
        if figures.exists():
            values: dict[str, Any] = json.loads(figures.read_text(encoding="utf-8"))
            return values
        return {"error": (done.stderr.strip().splitlines() or [f"the compiler ended with {done.returncode}"])[-1]}


def candidates(config: TrainConfig, topology: Topology) -> Iterator[Candidate]:
    """Every combination that suits the model and the topology, smallest first.

    Meshes: fsdp over all devices of a slice; the same with 2 or 4 replicas a slice; fsdp with tensor 2.
    """
    slices = topology.num_slices
    for batch in BATCHES:
        for remat in POLICIES:
            for data, tensor in ((slices, 1), (2 * slices, 1), (4 * slices, 1), (slices, 2)):
                mesh = dataclasses.replace(config.mesh, data=data, tensor=tensor, fsdp=-1, num_cpu_devices=0)
                rows = dataclasses.replace(config.data, global_batch_size=batch * topology.num_chips)
                try:
                    dataclasses.replace(config, mesh=mesh, data=rows).resolve(topology.num_devices)
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
    """The highest estimated MFU within HBM_LIMIT of a chip with `hbm_bytes`; None if nothing fits."""
    fitting = [r for r in pareto(results) if r.hbm_bytes is not None and r.hbm_bytes <= HBM_LIMIT * hbm_bytes]
    return fitting[-1] if fitting else None
