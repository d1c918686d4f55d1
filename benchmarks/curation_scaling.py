"""What curation costs on more cores and machines, simulated from the measured costs of its tasks.

python benchmarks/curation_scaling.py RAW --workdir DIR [--dollars 0.04] [--json OUT]

Curates RAW twice, on one core and on two, and measures each task and the rest of each stage. Tasks of a stage are
scheduled on cores by list scheduling; a stage starts when the one before has ended. The simulation of two cores from
the costs on one is printed beside the measured time. Then costs are scaled to more text:

tasks        cost per byte, in units of --unit megabytes
dataframe    the rest of exact, near, spans and dense, which the engine partitions: cost per document, over all cores,
             and --shuffle bytes a document over the network
pairs        the dense stage's comparison: documents^2 / clusters, cut into tasks of at most 2^17 documents
one process  the fit of clusters to a sample (constant), and the rest of the other stages

Reading and writing are bounded by --bandwidth a machine. Measure on a machine that does nothing else.

The constants below and the defaults of --shuffle and --bandwidth are assumptions. Figures: docs/data.md.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))  # to be run as a file
from rich.console import Console
from rich.table import Table

CORES_PER_MACHINE = 32
MACHINES = (1, 4, 16, 64, 256, 1024)
DATAFRAMES = ("exact", "near", "spans", "dense")
# Assumed, not measured: bytes read and written in a run for each byte of raw text.
IO_PER_BYTE = 4.0
# Assumed, not measured: FLOP/s of one core in the blocks of cosines, float32.
PAIR_FLOPS = 4e10
DIM, MOST_CLUSTERS, DOCUMENTS_PER_CLUSTER, CLUSTERS_PER_DOCUMENT, MOST_COMPARED = 256, 4096, 128, 2, 1 << 17


def makespan(costs: Sequence[float], cores: int) -> float:
    """Seconds until all tasks have ended; each starts, in order, on the core that is free first."""
    free = [0.0] * cores
    for cost in costs:
        heapq.heappush(free, heapq.heappop(free) + cost)
    return max(free)


class Cost(NamedTuple):
    """Measured seconds of one stage on one core."""

    name: str
    groups: list[list[float]]
    """Tasks by call of `Runner.map`: a call waits for its last task."""
    rest: float
    """What is not in tasks."""

    def on(self, cores: int) -> float:
        """Simulated seconds; the rest stays on one core."""
        return sum(makespan(group, cores) for group in self.groups) + self.rest


def measure(raw: str, out: str, cores: int) -> dict[str, Any]:
    """Runs curation on some cores of this machine, in a process of its own."""
    command = [sys.executable, __file__, raw, "--workdir", out, "--child", str(cores)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_here(raw: str, out: str, cores: int) -> dict[str, Any]:
    """The seconds of each stage, of each of its tasks and of the whole."""
    os.sched_setaffinity(0, range(cores))
    from bc2_jax.curate import clustering
    from bc2_jax.curate.config import CurationConfig
    from bc2_jax.curate.engine import Engine
    from bc2_jax.curate.pipeline import curate

    stages: dict[str, list[list[float]]] = {}
    current = ""

    class TimedEngine(Engine):
        """An engine that notes the CPU seconds of each task."""

        def map(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
            group: list[float] = []
            stages.setdefault(current, []).append(group)

            def timed(task: Any) -> Any:
                begin = time.thread_time()
                result = function(task)
                group.append(time.thread_time() - begin)
                return result

            return super().map(timed, tasks)

    def show(stage: str, done: int, total: int) -> None:
        nonlocal current
        current = stage

    fit, fitting = clustering.fit, [0.0]

    def timed_fit(*arguments: Any) -> Any:
        begin = time.perf_counter()
        centroids = fit(*arguments)
        fitting.append(time.perf_counter() - begin)
        return centroids

    begin = time.perf_counter()
    with mock.patch.object(clustering, "fit", timed_fit):
        report = curate([raw], out, CurationConfig(), TimedEngine(), show)
    return {
        "seconds": time.perf_counter() - begin,
        "stages": {stage["name"]: stage["seconds"] for stage in report["stages"]},
        "tasks": stages,
        "fit": sum(fitting),
        "documents": report["read"]["documents"],
        "bytes": report["read"]["bytes"],
    }


def costs_of(run: dict[str, Any]) -> list[Cost]:
    """The costs of a run on one core."""
    found = []
    for name, seconds in run["stages"].items():
        groups = run["tasks"].get(name, [])
        found.append(Cost(name, groups, max(0.0, seconds - sum(map(sum, groups)))))
    return found


class Plan(NamedTuple):
    """What a run on many machines takes."""

    wall: float
    """Seconds."""
    work: float
    """Core seconds that do something."""
    serial: float
    """Seconds of the wall in one process."""
    longest: float
    """Seconds of the longest task."""


def simulate(costs: Sequence[Cost], run: dict[str, Any], size: float, machines: int, args: argparse.Namespace) -> Plan:
    """Curation of `size` bytes on some machines."""
    cores = machines * CORES_PER_MACHINE
    scale = size / run["bytes"]
    documents = run["documents"] * scale
    units = max(1, round(size / (args.unit * 1e6)))
    wall = work = serial = longest = 0.0
    for cost in costs:
        in_tasks = sum(map(sum, cost.groups)) * scale
        if cost.groups:
            each = in_tasks / units
            # Equal tasks: whole rounds of them.
            wall += -(-units // cores) * each
            work += in_tasks
            longest = max(longest, each)
        constant = cost.rest
        if cost.name in DATAFRAMES:
            # The fit's sample does not grow.
            constant = min(run["fit"], cost.rest) if cost.name == "dense" else 0.0
            frames = (cost.rest - constant) * scale
            work += frames
            wall += frames / cores + documents * args.shuffle / (machines * args.bandwidth * 1e9)
        serial += constant
    clusters = min(args.clusters, max(1, documents / DOCUMENTS_PER_CLUSTER))
    members = CLUSTERS_PER_DOCUMENT * documents / clusters
    pair_work = clusters * members**2 / 2 * 2 * DIM / PAIR_FLOPS
    pair_tasks = clusters * max(1, -(-members // MOST_COMPARED))
    wall += -(-pair_tasks // cores) * pair_work / pair_tasks
    work += pair_work
    longest = max(longest, pair_work / pair_tasks)
    wall += IO_PER_BYTE * size / (machines * args.bandwidth * 1e9)
    return Plan(wall + serial, work + serial, serial, longest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw")
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--dollars", type=float, default=0.04, help="price of a core hour (stated, not looked up)")
    parser.add_argument("--unit", type=float, default=24.0, help="megabytes of text of a task")
    parser.add_argument("--bandwidth", type=float, default=1.0, help="GB/s of a machine to storage and to the others")
    parser.add_argument("--shuffle", type=float, default=2000.0, help="bytes a document that a dataframe stage moves")
    parser.add_argument("--clusters", type=int, default=MOST_CLUSTERS)
    parser.add_argument("--terabytes", type=float, nargs="+", default=(0.01, 1.0, 10.0))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measured", type=Path, help="figures of --json instead of measuring")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run_here(args.raw, args.workdir, args.child)))
        return
    if args.measured:
        runs = json.loads(args.measured.read_text(encoding="utf-8"))
    else:
        runs = [measure(args.raw, f"{args.workdir}/{cores}", cores) for cores in (1, 2)]
    if args.json:
        args.json.write_text(json.dumps(runs) + "\n", encoding="utf-8")
    console, costs = Console(), costs_of(runs[0])
    table = Table("stage", "1 core s", "in tasks", "2 cores: simulated", "measured")
    for cost in costs:
        one, two = runs[0]["stages"][cost.name], runs[1]["stages"][cost.name]
        table.add_row(cost.name, f"{one:.1f}", f"{one - cost.rest:.1f}", f"{cost.on(2):.1f}", f"{two:.1f}")
    total = sum(cost.on(2) for cost in costs)
    table.add_row("all", *(f"{x:.1f}" for x in (
        sum(runs[0]["stages"].values()), sum(sum(map(sum, c.groups)) for c in costs), total,
        sum(runs[1]["stages"].values()),
    )))  # fmt: skip
    console.print(table)
    table = Table("TB", "machines", "cores", "wall h", "core h", "efficiency", "one process h", "longest task s", "$")
    for terabytes in args.terabytes:
        for machines in MACHINES:
            plan = simulate(costs, runs[0], terabytes * 1e12, machines, args)
            paid = plan.wall * machines * CORES_PER_MACHINE
            table.add_row(
                f"{terabytes:g}", f"{machines}", f"{machines * CORES_PER_MACHINE:,}", f"{plan.wall / 3600:,.2f}",
                f"{plan.work / 3600:,.0f}", f"{plan.work / paid:.0%}", f"{plan.serial / 3600:.2f}",
                f"{plan.longest:,.0f}", f"{paid / 3600 * args.dollars:,.0f}",
            )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
