"""What each compiler option of a generation is worth: the step compiled with all of them, then without each in turn.

python benchmarks/compiler_options.py configs/baichuan2_7b.py --topology v5p:4x4x4 --batch-per-chip 2
python benchmarks/compiler_options.py CONFIG.py --topology v5e:16x16 --compute.remat save_attention --only vmem fusion

Needs the tpu extra and no TPU. Every line is a run of tools/aot_compile.py in a process of its own, one at a time, and
takes 1-5 minutes; other arguments are passed to it. Times are compile-time estimates (docs/tpu.md); compile times hold
for a machine that does nothing else. A ratio above 1 is what the option gains, or costs in compile time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bc2_jax.tpu.chips import GIB, parse_topology
from bc2_jax.tpu.options import OPTIONS

TOOL = Path(__file__).parents[1] / "tools" / "aot_compile.py"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", help="a config file, as for tools/aot_compile.py")
    parser.add_argument("--topology", required=True, help="slice to compile for, for instance v5p:4x4x4")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="options whose names contain a PART")
    return parser


def compile_without(args: argparse.Namespace, rest: list[str], name: str | None) -> dict[str, Any]:
    """The figures of tools/aot_compile.py, or the last line that it wrote to stderr as "error"."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder, "figures.json")
        command = [sys.executable, str(TOOL), args.config, "--topology", args.topology, "--json", str(figures), *rest]
        command += [f"--xla={name}="] if name else []
        done = subprocess.run(command, capture_output=True, text=True)
        if not figures.exists():
            last = (done.stderr.strip().splitlines() or [f"the compiler ended with {done.returncode}"])[-1]
            return {"error": last}
        return json.loads(figures.read_text(encoding="utf-8"))


def main() -> None:
    args, rest = make_parser().parse_known_args()
    try:
        generation = parse_topology(args.topology).chip.name
    except ValueError as error:
        sys.exit(f"error: {error}")
    tuned = compile_without(args, rest, None)
    if "error" in tuned:
        sys.exit(f"error: {tuned['error']}")
    step, seconds = tuned["estimated_step_seconds"], tuned["compile_seconds"]
    print(f"{'without':70} {'MFU':>6} {'step':>7} {'HBM GiB':>8} {'compile':>8}")

    def show(label: str, values: dict[str, Any]) -> None:
        ratios = values["estimated_step_seconds"] / step, values["compile_seconds"] / seconds
        hbm = values["hbm_bytes_per_chip"] / GIB
        print(f"{label:70} {values['estimated_mfu']:6.3f} x{ratios[0]:6.3f} {hbm:8.1f} x{ratios[1]:7.2f}", flush=True)

    show(f"(all there: {step:.3f} s a step, {seconds:.0f} s to compile)", tuned)
    for option in OPTIONS[generation]:
        if not any(part in option.name for part in args.only):
            continue
        values = compile_without(args, rest, option.name)
        if "error" in values:
            print(f"{option.name:70} {values['error']}", flush=True)
        else:
            show(option.name, values)


if __name__ == "__main__":
    main()
