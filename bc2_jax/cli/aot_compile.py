"""Estimates memory, communication and MFU of a training step, a server or scoring on a TPU pod, by compiling for it.

bc2 estimate baichuan2_13b --topology v5p:4x4x8
bc2 estimate CONFIG.py --topology v5p:4x4x8 --num-slices 2 --batch-per-chip 2 --compute.remat save_dots
bc2 estimate CONFIG.py --topology v5e:16x16 --search
bc2 estimate baichuan2_13b --topology v5e:2x4 --serve --quantize int8 --kv int8
bc2 estimate baichuan2_13b --topology v5e:2x4 --score --batch 2 --row-length 4096

bc2 estimate baichuan2_13b --topology v5e:16x16 --calibrate REPORT.json

bc2 estimate baichuan2_13b_chat --topology v5e:2x4 --lora.rank 16
bc2 estimate baichuan2_13b_ppo --topology v5p:4x4x4

For reinforcement learning the rollout is compiled too, and what an iteration holds is added up.

Needs `pip install 'bc2_jax[tpu]'` but no TPU. Memory, collectives and their bytes are what the compiler decides; times
and MFU are compile-time estimates (docs/tpu.md). Any field of the config can be overridden as in `bc2 train`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bc2_jax.terminal import local_path, make_console, make_table, program_words, use_utf8

if TYPE_CHECKING:
    from bc2_jax.aot.compilation import CompiledProgram
    from bc2_jax.aot.search import Candidate, Result
    from bc2_jax.config import RunConfig
    from bc2_jax.tpu.chips import Topology
    from bc2_jax.tpu.rates import Rates

out = make_console()
SERVING_OPTIONS = ("slots", "slot_length", "prompt_length", "quantize", "kv")
SCORING_OPTIONS = ("batch", "row_length", "benchmark")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", help="a config file or name, as for bc2 train")
    parser.add_argument("--topology", required=True, help="slice to compile for, for instance v5p:4x4x8 or v5e:16x16")
    parser.add_argument("--num-slices", type=int, default=1, help="slices joined by the data-centre network")
    parser.add_argument(
        "--batch-per-chip", type=int,
        help="sequences per chip and accumulation step; 1 unless --data.global-batch-size is given",
    )  # fmt: skip
    parser.add_argument("--hlo", type=local_path, help="write the scheduled program's text here")
    parser.add_argument("--json", type=local_path, help="write the figures here")
    parser.add_argument(
        "--xla", action="append", default=[], metavar="NAME=VALUE",
        help="a compiler option on top of the generation's; NAME= leaves one at its default",
    )  # fmt: skip
    parser.add_argument(
        "--calibrate", type=local_path, metavar="REPORT.json",
        help="estimate with the rates that tools/check_hardware.py measured on this generation",
    )  # fmt: skip
    parser.add_argument("--search", action="store_true", help="try batches, remat policies and meshes; takes long")
    parser.add_argument(
        "--serve", action="store_true",
        help="compile the programs of a server instead of the step; every chip holds a part of each layer unless "
        "--mesh.* says otherwise; --hlo writes one file for each",
    )  # fmt: skip
    parser.add_argument(
        "--score", action="store_true",
        help="compile the scoring of evaluations instead of the step, on the mesh of --serve; says how long a "
        "pass over benchmarks takes",
    )  # fmt: skip
    parser.add_argument("--slots", type=int, help="with --serve: sequences at one time, by default the most that fit")
    parser.add_argument("--slot-length", type=int, help="with --serve: tokens of prompt and answer, 4096 by default")
    parser.add_argument("--prompt-length", type=int, help="with --serve: tokens of a prompt, 1024 by default")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="with --serve: the weights, bf16 by default")
    parser.add_argument("--kv", choices=("compute", "int8"), help="with --serve: the cache, bf16 by default")
    parser.add_argument("--batch", type=int, help="with --score: rows, 2 by default")
    parser.add_argument("--row-length", type=int, help="with --score: tokens of a row, 4096 by default")
    parser.add_argument(
        "--benchmark", action="append", metavar="NAME:ITEMS:SUBJECTS:SHOTS:QUESTION",
        help="with --score: a benchmark to estimate, with the tokens of all its shots and of a question; by default "
        "the tests of C-Eval and MMLU with rough numbers of tokens",
    )  # fmt: skip
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raises ValueError for options of training, serving and scoring that are mixed."""
    kinds = {"serve": SERVING_OPTIONS, "score": SCORING_OPTIONS}
    chosen = [kind for kind in kinds if getattr(args, kind)]
    if len(chosen) > 1:
        raise ValueError("--serve and --score compile different programs: leave one out.")
    for name, value in (("--search", args.search), ("--batch-per-chip", args.batch_per_chip)):
        if chosen and value:
            raise ValueError(f"{name} is an option of training: leave it out with --{chosen[0]}.")
    legal = kinds[chosen[0]] if chosen else ()
    for kind, names in kinds.items():
        for name in names:
            if getattr(args, name) is not None and name not in legal:
                what = {"score": "scoring", "serve": "serving"}[kind]
                raise ValueError(f"--{name.replace('_', '-')} is an option of {what}: give --{kind} as well.")


def load_config(args: argparse.Namespace, overrides: list[str], topology: Topology) -> RunConfig:
    """The config file with the overrides and the batch; raises ValueError for what does not suit each other."""
    import dataclasses

    import tyro

    from bc2_jax.config.file import read_config_file
    from bc2_jax.train.kinds import KINDS

    file = read_config_file(args.config, *KINDS)
    config: RunConfig = tyro.cli(type(file.config), default=file.config, args=overrides, description=file.doc)
    names = [arg.split("=")[0].replace("_", "-") for arg in overrides]
    config = dataclasses.replace(config, **set_batch(args, config, names, topology))
    mesh = dataclasses.replace(config.mesh, num_cpu_devices=0)
    if (args.serve or args.score) and not any(name.startswith("--mesh.") for name in names):
        from bc2_jax.aot.inference import whole_slice_mesh

        mesh = whole_slice_mesh(topology)
    return dataclasses.replace(config, mesh=mesh)


def set_batch(args: argparse.Namespace, config: RunConfig, names: list[str], topology: Topology) -> dict[str, Any]:
    """The fields of the config that give each chip its batch; none where the batch is not made of packed rows."""
    import dataclasses

    from bc2_jax.config import TrainConfig

    if not isinstance(config, TrainConfig):
        if args.batch_per_chip is not None:
            raise ValueError(
                f"--batch-per-chip is not for a {type(config).__name__}, whose own fields give the batch: leave it out."
            )
        return {}
    given = "--data.global-batch-size" in names
    if given and args.batch_per_chip is not None:
        raise ValueError("--batch-per-chip and --data.global-batch-size both give the batch: leave one out.")
    batch = config.data.global_batch_size
    if not given:
        batch = (args.batch_per_chip or 1) * topology.num_chips * config.data.accumulation_steps
    return {"data": dataclasses.replace(config.data, global_batch_size=batch)}


def compile_and_report(args: argparse.Namespace, config: RunConfig, topology: Topology) -> None:
    from bc2_jax.aot import compilation, report, rollout
    from bc2_jax.tpu.options import compiler_options

    rates = read_given_rates(args, topology)
    compilation.use_topologies()
    name, xla = topology.chip.name, tuple(args.xla)
    step = compilation.compile_step(config, topology, compiler_options(name, xla))
    sampled = rollout.compile_rollout(config, topology, compiler_options(name, xla, inference=True))
    programs: dict[str, compilation.CompiledProgram] = {"": step}
    if sampled is not None:
        programs |= {"_extend": sampled.engine.extend, "_decode": sampled.engine.decode}
    write_hlo(args.hlo, programs)
    result = report.make_report(step, rates)
    values, rows, warnings = result.as_json(), report.render(result), result.warnings
    if sampled is not None:
        beside, used = rollout.make_report(sampled, rates), result.memory.laid_out
        values["rollout"] = beside.as_json(used)
        rows = [(f"update: {name}", text) for name, text in rows] + rollout.render(beside, used)
        warnings = (*(f"update: {line}" for line in warnings), *beside.warnings)
    if args.json:
        args.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print_table(f"{config.name} on {topology}", rows, warnings)


def read_given_rates(args: argparse.Namespace, topology: Topology) -> Rates:
    """The measured rates of --calibrate, else the default."""
    from bc2_jax.tpu.rates import default_rates, read_rates

    return read_rates(args.calibrate, topology.chip) if args.calibrate else default_rates(topology.chip)


def write_hlo(path: Path | None, programs: Mapping[str, CompiledProgram]) -> None:
    """Each program's text beside `path`, its name with what stands for the program; nothing without a path."""
    for ending, program in programs.items() if path else ():
        assert path is not None
        path.with_name(f"{path.stem}{ending}{path.suffix}").write_text(program.hlo, encoding="utf-8")


def compile_and_report_serving(args: argparse.Namespace, config: RunConfig, topology: Topology) -> None:
    from bc2_jax.aot import compilation, serving
    from bc2_jax.tpu.options import compiler_options

    rates = read_given_rates(args, topology)
    compilation.use_topologies()
    given = {name: getattr(args, name) for name in SERVING_OPTIONS if getattr(args, name) is not None}
    options = compiler_options(topology.chip.name, tuple(args.xla), inference=True)
    compiled = serving.compile_serving(config, topology, serving.ServingShapes(**given), options)
    programs = compiled.engine
    write_hlo(args.hlo, {"_extend": programs.extend, "_decode": programs.decode})
    result = serving.make_report(compiled, rates)
    if args.json:
        args.json.write_text(json.dumps(result.as_json(), indent=1) + "\n", encoding="utf-8")
    print_table(f"{config.name}, serving on {topology}", serving.render(result), result.warnings)


def compile_and_report_scoring(args: argparse.Namespace, config: RunConfig, topology: Topology) -> None:
    from bc2_jax.aot import compilation, scoring
    from bc2_jax.tpu.options import compiler_options

    benchmarks = tuple(map(scoring.Benchmark.parse, args.benchmark or ())) or scoring.DEFAULT_BENCHMARKS
    given = {"rows": args.batch, "row_length": args.row_length}
    shapes = scoring.ScoringShapes(**{name: value for name, value in given.items() if value is not None})
    for benchmark in benchmarks:
        benchmark.rows(shapes.row_length)  # raises where it does not fit, before the minutes of compilation
    rates = read_given_rates(args, topology)
    compilation.use_topologies()
    options = compiler_options(topology.chip.name, tuple(args.xla), inference=True)
    compiled = scoring.compile_scoring(config, topology, shapes, options)
    write_hlo(args.hlo, {"": compiled.program})
    result = scoring.make_report(compiled, benchmarks, rates)
    if args.json:
        args.json.write_text(json.dumps(result.as_json(), indent=1) + "\n", encoding="utf-8")
    print_table(f"{config.name}, scoring on {topology}", scoring.render(result), result.warnings)


def print_table(title: str, rows: list[tuple[str, str]], warnings: Sequence[str]) -> None:
    table = make_table("", "", title=f"{title}: compile-time estimate, nothing was run")
    for name, text in rows:
        table.add_row(name, text)
    out.print(table)
    for line in warnings:
        out.print(f"warning: {line}")


def search(args: argparse.Namespace, overrides: list[str], config: RunConfig, topology: Topology) -> None:
    """Compiles every candidate in its own process, one at a time: a compile holds gigabytes and may die."""
    from bc2_jax.aot.search import candidates, choose, pareto
    from bc2_jax.config import TrainConfig

    if not isinstance(config, TrainConfig):
        raise ValueError(f"--search is for runs on packed rows, not for a {type(config).__name__}: leave it out.")
    read_given_rates(args, topology)  # refuses a wrong report before the minutes of compilation
    results = []
    for candidate in candidates(config, topology):
        results.append(result := try_candidate(args, overrides, candidate))
        figures = result.error or f"{(result.hbm_bytes or 0) / 2**30:.1f} GiB, estimated MFU {result.mfu:.3f}"
        out.print(f"{candidate}: {figures}")
    headers = ("sequences/chip", "remat", "data", "tensor", "HBM GiB", "estimated MFU", "at worst")
    title = f"{config.name} on {topology}: no other line has less HBM and a higher estimated MFU"
    table = make_table(*headers, title=title, numbers_from=0)
    for result in pareto(results):
        c = result.candidate
        cells = (c.batch_per_chip, c.remat, c.data, c.tensor, f"{(result.hbm_bytes or 0) / 2**30:.1f}")
        table.add_row(*map(str, cells), f"{result.mfu:.3f}", f"{result.mfu_low:.3f}")
    out.print(table)
    chosen = choose(results, topology.chip.hbm_bytes)
    if chosen is None:
        raise ValueError(f"nothing that was tried fits {topology}; take more chips or a chip with more memory.")
    out.print(f"chosen: {chosen.candidate.config_line(config, topology.num_chips)}")
    if args.json:
        import dataclasses

        lines = [dataclasses.asdict(r) | {"chosen": r is chosen} for r in results]
        args.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


def try_candidate(args: argparse.Namespace, overrides: list[str], candidate: Candidate) -> Result:
    from bc2_jax.aot.search import Result

    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder, "figures.json")
        command = [
            *program_words("tools/aot_compile.py"), args.config, "--topology", args.topology,
            "--num-slices", str(args.num_slices), "--json", str(figures), *(f"--xla={text}" for text in args.xla),
            *(("--calibrate", str(args.calibrate)) if args.calibrate else ()), *overrides, *candidate.overrides(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if not figures.exists():
            last = (done.stderr.strip().splitlines() or [f"the compiler ended with {done.returncode}"])[-1]
            return Result(candidate, None, None, error=last)
        values = json.loads(figures.read_text(encoding="utf-8"))
    return Result(candidate, values["hbm_bytes_per_chip"], values["estimated_mfu"], values["estimated_mfu_low"])


def main(argv: Sequence[str] | None = None) -> int:
    use_utf8()
    args, overrides = make_parser().parse_known_args(argv)
    try:
        from bc2_jax.tpu.chips import parse_topology

        topology = parse_topology(args.topology, args.num_slices)
        check_options(args)
        config = load_config(args, overrides, topology)
        if args.search:
            search(args, overrides, config, topology)
        elif args.serve:
            compile_and_report_serving(args, config, topology)
        elif args.score:
            compile_and_report_scoring(args, config, topology)
        else:
            compile_and_report(args, config, topology)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
