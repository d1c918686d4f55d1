"""Checks kernels and tiny models on this machine's devices, and measures what the estimate assumes.

bc2 check-hardware --out REPORT.json                            about ten minutes on one TPU chip
bc2 check-hardware --minutes 3 --out REPORT.json
bc2 check-hardware --only kernels models --out REPORT.json
bc2 estimate baichuan2_7b --topology v5e:16x16 --calibrate REPORT.json

Runs on one chip, a host or, started on every host, a slice; on a CPU with tiny arrays and interpreted kernels; on an
NVIDIA GPU without estimates. Prints measured figures beside the estimated ones and says in which the estimate is wrong.
The report is written after each check, so that what was found is kept if the time ends or the program is stopped. The
exit code is 3 if a kernel or a model computes something wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from bc2_jax.config import DistributedConfig, MeshConfig
from bc2_jax.terminal import local_path, make_console, run_program
from bc2_jax.validation import require

out = make_console()
NAMES = ("kernels", "models", "matmuls", "memory", "host", "attention", "collectives", "training", "decoding")
EXIT_WRONG = 3


class Start(NamedTuple):
    """What joining the other hosts needs."""

    mesh: MeshConfig
    distributed: DistributedConfig


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--out", type=local_path, required=True, metavar="REPORT.json", help="where to write the report"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a report that exists")
    parser.add_argument("--minutes", type=float, default=10.0, help="start no check after this time; 10 by default")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=(), metavar="CHECK", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--num-cpu-devices", type=int, default=0, metavar="N", help="simulate N devices on the CPU")
    return parser


def run(args: argparse.Namespace) -> int:
    require(0 < args.minutes < 1e4, "--minutes", args.minutes, "it must be positive")
    require(args.num_cpu_devices >= 0, "--num-cpu-devices", args.num_cpu_devices, "it must be at least 0")
    require(
        args.overwrite or not args.out.exists(), "--out", str(args.out), "it exists; give --overwrite to replace it"
    )
    require(args.out.parent.is_dir(), "--out", str(args.out), "its folder does not exist")
    from bc2_jax.cpu import choose_cpu_without_tpu
    from bc2_jax.train.distributed import start

    choose_cpu_without_tpu()
    start(Start(MeshConfig(num_cpu_devices=args.num_cpu_devices), DistributedConfig()))
    import jax

    from bc2_jax.hardware.device import find_device
    from bc2_jax.hardware.report import print_report, run_checks

    is_first, device = jax.process_index() == 0, find_device()

    def tell(text: str) -> None:
        if is_first:
            out.print(text)

    if args.out.exists():
        tell(f"{args.out} is replaced.")
    tell(f"{device.count} x {device.kind} ({device.platform}), {device.memory_bytes / 2**30:.1f} GiB each")
    if device.platform == "tpu" and device.chip is None:
        tell("The estimate does not know this chip: nothing is compared with it, and rates are not reported.")
    report = run_checks(
        device, 60 * args.minutes, args.only, tell, lambda report: report.save(args.out) if is_first else None
    )
    if is_first:
        print_report(report, out)
        out.print(f"Written: {args.out}")
        if report.as_json()["rates"]:
            out.print(f"To estimate with these rates: bc2 estimate CONFIG --topology ... --calibrate {args.out}")
    return EXIT_WRONG if report.is_wrong else 0


def main(argv: Sequence[str] | None = None) -> int:
    codes: list[int] = []
    code = run_program(lambda args: codes.append(run(args)), make_parser(), argv)
    return code or codes[0]
