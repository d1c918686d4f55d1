"""Evaluates a model on benchmarks, offline, from the files that their authors released.

bc2 evaluate MODEL --tasks ceval,cmmlu,mmlu,gsm8k --data-dir DIR --out EVALS
bc2 evaluate RUN --checkpoints all --tasks ceval,mmlu --data-dir DIR --out EVALS
bc2 evaluate --compare EVALS_A EVALS_B
bc2 evaluate MODEL --lm-eval TASK --include-path YAMLS --out EVALS
bc2 evaluate --list

MODEL is a folder in a PyTorch layout, a checkpoint, or a run, of which it is the newest checkpoint. DIR has a folder
for each benchmark (--list says of which files); all of them are read before the weights are. EVALS/TASK/records.jsonl
has every item: prompt, answer, log-probabilities; results.json the figures. An evaluation that was stopped resumes with
the same command. EVALS is of one model: another one, or other settings, are refused.

With --checkpoints EVALS/step_N has the results of each checkpoint, EVALS/curve.png the curve. docs/evaluation.md has
the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bc2_jax.cpu import choose_cpu_without_tpu
from bc2_jax.terminal import here, local_path, make_console, use_utf8
from bc2_jax.validation import require

if TYPE_CHECKING:
    from rich.console import Console

    from bc2_jax.evaluate.evaluation import Evaluated
    from bc2_jax.evaluate.runner import Say, Way
    from bc2_jax.sharding import Mesh

HINT = "finished items are kept; the same command resumes"


def make_parser() -> argparse.ArgumentParser:
    from bc2_jax.evaluate.devices import add_device_options

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a PyTorch folder, a checkpoint or a run")
    add = parser.add_argument_group("what is asked").add_argument
    add("--tasks", metavar="A,B,...", help="names of benchmarks; --list has them")
    add("--data-dir", type=local_path, metavar="DIR", help="where the benchmarks' files are")
    add("--limit", type=int, metavar="N", help="N items of each benchmark, taken evenly from its subjects")
    add("--shots", type=int, metavar="N", help="the first N solved examples of each prompt (default: all it has)")
    add("--lm-eval", metavar="A,B,...", help="tasks of lm-eval instead (pip install -e '.[eval]')")
    add("--include-path", type=local_path, metavar="YAMLS", help="with --lm-eval: a folder of tasks of your own")
    add("--chat", action="store_true", default=None, help="with --lm-eval: ask in the format of our chat models")
    add("--list", action="store_true", help="the benchmarks there are, and which files they need")
    add = parser.add_argument_group("of which model").add_argument
    add("--checkpoints", metavar="WHICH", help="of a run: all, permanent, or steps such as 1000,2000")
    add("--adapter", type=local_path, metavar="DIR", help="a LoRA adapter on MODEL")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and sums (default %(default)s)")
    add(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens of a prompt and its answer (default: what the model takes)",
    )
    add("--rows", type=int, metavar="N", help="rows of tokens at one time (default: what suits the model)")
    add = parser.add_argument_group("what is made of it").add_argument
    add("--out", type=local_path, metavar="EVALS", help="default evals/ and the name of the model")
    add(
        "--letter", choices=("as_shown", "bare"), default="as_shown",
        help="which token of a letter leads: as the shots show it, or without what comes before it; both are reported",
    )  # fmt: skip
    add(
        "--judge", metavar="WHAT",
        help="for benchmarks without a judge: FILE.py:NAME, a function judge(prompts, answers, rows) -> how harmless "
        "each is, command:PROGRAM or reward:RM",
    )  # fmt: skip
    add("--threshold", type=float, metavar="X", help="of --judge: harmless from this score on (default 0.5)")
    add("--records", choices=("jsonl", "parquet"), default="jsonl", help="parquet: beside the jsonl (needs pyarrow)")
    add("--compare", nargs=2, type=local_path, metavar=("A", "B"), help="two folders of results, by paired bootstrap")
    add_device_options(parser)
    return parser


_ASKS = ("--tasks", "--lm-eval")
_GOES_WITH = {
    "data_dir": ("--tasks",), "checkpoints": ("--tasks",), "judge": ("--tasks",), "threshold": ("--tasks",),
    "records": ("--tasks",), "letter": ("--tasks", "--compare"), "include_path": ("--lm-eval",),
    "chat": ("--lm-eval",), "out": (*_ASKS, "--compare"),
    **dict.fromkeys(("limit", "shots", "adapter", "dtype", "max_length", "rows"), _ASKS),
}  # fmt: skip
"""Option -> what it has an effect on; elsewhere it is refused, not ignored."""


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raises ValueError for options that do not go together."""
    ways = {"--compare": args.compare, "--list": args.list, "--tasks": args.tasks, "--lm-eval": args.lm_eval}
    given = [name for name, value in ways.items() if value]
    if len(given) != 1:
        found = f"{' and '.join(given)} are given" if given else "none is"
        raise ValueError(f"one of --tasks, --lm-eval, --compare and --list says what to do: {found}.")
    if (args.model is None) != (given[0] in ("--compare", "--list")):
        raise ValueError(f"{given[0]} needs {'a MODEL' if args.model is None else 'no MODEL'}.")
    devices = {name: _ASKS for name in vars(args) if "." in name}
    for name, goes_with in (_GOES_WITH | devices).items():
        if getattr(args, name) != parser.get_default(name) and given[0] not in goes_with:
            raise ValueError(f"--{name.replace('_', '-')} goes with {' and '.join(goes_with)}, not with {given[0]}.")
    for name in ("limit", "rows", "max_length"):
        value = getattr(args, name)
        require(value is None or value > 0, f"--{name.replace('_', '-')}", value, "it must be positive")
    if args.threshold is not None and args.judge is None:
        raise ValueError("--threshold is that of a --judge, which is not given.")
    if args.tasks and args.data_dir is None:
        raise ValueError("--tasks needs --data-dir, the folder of the benchmarks' files; --list says which.")
    if args.checkpoints is not None and args.adapter is not None:
        raise ValueError("--checkpoints are of a run that trains all parameters: --adapter does not go with it.")
    if args.records == "parquet":
        try:
            import pyarrow  # noqa: F401  # only whether it can be imported
        except ImportError as error:
            raise ValueError("--records parquet needs pyarrow: pip install 'bc2_jax[data]'.") from error


def names_in(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def list_tasks(console: Console) -> None:
    from bc2_jax.evaluate.tasks import TASKS, find_task

    for name in TASKS:
        task = find_task(name)
        console.print(f"{name}: {task.title}, {task.shots} shots\n    {task.source}")


def show_progress(console: Console) -> tuple[Any, Say]:
    """(a bar on a terminal, to be closed; what is told how far a benchmark is, which prints a line elsewhere)."""
    import jax
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if jax.process_index() != 0:
        return contextlib.nullcontext(), lambda name, done, count: None
    if not console.is_terminal:
        told: dict[str, float] = {}

        def tell(name: str, done: int, count: int) -> None:
            now, last = time.monotonic(), told.get(name, 0.0)
            if last < math.inf and (done == count or now - last > 30):
                told[name] = math.inf if done == count else now
                console.print(f"{name}: {done} of {count}")

        return contextlib.nullcontext(), tell
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
    ids: dict[str, Any] = {}

    def move(name: str, done: int, count: int) -> None:
        if name not in ids or (done == 0 and bar.tasks[ids[name]].finished):
            ids[name] = bar.add_task(name, total=count)
        bar.update(ids[name], completed=done, total=count)

    return bar, move


def load_way(args: argparse.Namespace) -> Way:
    from bc2_jax.evaluate.judging import load_harm_judge, name_judge
    from bc2_jax.evaluate.runner import Way

    if args.judge is None:
        return Way(args.letter)
    return Way(args.letter, load_harm_judge(args.judge, args.threshold), name_judge(args.judge, args.threshold))


def mesh_for(args: argparse.Namespace, path: Path) -> Mesh | None:
    """Raises FileNotFoundError if there is no model, or no tokenizer beside it."""
    from bc2_jax.convert.pretrained import find_model, find_tokenizer
    from bc2_jax.evaluate.devices import devices_of, make_device_mesh

    find_tokenizer(path)
    return make_device_mesh(devices_of(args), find_model(path).config)


def out_of(args: argparse.Namespace) -> Path:
    name = "-".join(Path(path).absolute().name for path in (args.model, args.adapter) if path is not None)
    return args.out or Path("evals") / name


def evaluate(args: argparse.Namespace, console: Console, path: Path, checkpoints: list[Path] | None) -> None:
    """--tasks, of the model in `path` or of these checkpoints of a run."""
    from bc2_jax.agreement import first_decides
    from bc2_jax.evaluate.asking import read_questions
    from bc2_jax.evaluate.curve import check_points
    from bc2_jax.evaluate.evaluation import evaluate_model
    from bc2_jax.evaluate.identity import Model
    from bc2_jax.evaluate.runner import check_sandbox

    asked = read_questions(names_in(args.tasks), args.data_dir, limit=args.limit, shots=args.shots)
    way, mesh, out = load_way(args), mesh_for(args, path), out_of(args)
    check_sandbox(asked)
    options = {} if args.rows is None else {"rows": args.rows}

    def model_in(path: Path) -> Model:
        return Model(path, args.adapter, args.dtype, args.max_length)

    def put(path: Path, folder: Path, say: Say) -> Evaluated:
        parquet = args.records == "parquet"
        return evaluate_model(model_in(path), asked, folder, mesh, way, say, parquet=parquet, **options)

    if checkpoints is None:
        bar, say = show_progress(make_console(stderr=True))
        with bar:
            found = put(path, out, say)
        report(console, found, f"{args.model}, {args.dtype}", out)
        return
    first_decides(lambda: check_points(out, model_in(path), asked))
    draw_curve(console, out, checkpoints, put)


def report(console: Console, found: Evaluated, title: str, out: Path) -> None:
    from bc2_jax.evaluate.results import print_summary, print_task

    for results in found.results:
        print_task(console, results)
    console.print()
    print_summary(console, found.results, title)
    if found.stats is not None and (seconds := found.stats.seconds):
        fed, alone = found.stats.tokens_fed, found.stats.tokens_unshared
        console.print(
            f"{found.stats.requests:,} scores in {seconds:.1f} s, compiling included; {fed:,} tokens were fed, not "
            f"{alone:,} as without shared prefixes; {found.stats.padding_share:.0%} of the slots were padding"
        )
    console.print(f"written to {here(out)}: results.json, TASK/records.jsonl")


def draw_curve(
    console: Console, out: Path, checkpoints: list[Path], put: Callable[[Path, Path, Say], Evaluated]
) -> None:  # fmt: skip
    """Evaluates each checkpoint, then draws all of which `out` has results."""
    import jax

    from bc2_jax.evaluate import curve
    from bc2_jax.evaluate.records import write_json

    bar, say = show_progress(make_console(stderr=True))
    with bar:
        for number, checkpoint in enumerate(checkpoints, 1):
            console.print(f"checkpoint {checkpoint.name}, {number} of {len(checkpoints)}")
            step = checkpoint.name
            put(checkpoint, out / curve.FOLDER.format(step), lambda name, *count, s=step: say(f"{s} {name}", *count))
    if jax.process_index() == 0:
        points = curve.read_points(out)
        curve.print_curve(console, points)
        write_json(out / "curve.json", curve.as_json(points))
        curve.plot_curve(out / "curve.png", points)
        console.print(f"written to {here(out)}: curve.png, curve.json, step_N/results.json")


def ask_lm_eval(args: argparse.Namespace, console: Console, path: Path) -> None:
    import jax

    from bc2_jax.evaluate import lm_eval
    from bc2_jax.evaluate.evaluation import load_scorer
    from bc2_jax.evaluate.identity import Model

    mesh = mesh_for(args, path)
    options = {} if args.rows is None else {"rows": args.rows}
    model = Model(path, args.adapter, args.dtype, args.max_length)
    bar, say = show_progress(make_console(stderr=True))
    # Answers are kept as they come, so that the same command resumes; by one process only.
    kept: dict[str, Any] = {
        "cache": out_of(args) / "lm_eval" / "cache",
        "identity": json.dumps(model.describe(), sort_keys=True),
    }
    with bar:
        results = lm_eval.run_lm_eval(
            lambda: load_scorer(model, mesh, **options), names_in(args.lm_eval), include_path=args.include_path,
            name=str(path), shots=args.shots, limit=args.limit, chat=bool(args.chat),
            progress=lambda done, count: say("lm-eval", done, count), **(kept if jax.process_count() == 1 else {}),
        )  # fmt: skip
    console.print(lm_eval.tabulate(results))
    if jax.process_index() == 0:
        paths = lm_eval.write_results(results, out_of(args) / "lm_eval")
        console.print(f"written to {', '.join(here(path) for path in paths)}")


def compare(args: argparse.Namespace, console: Console) -> None:
    from bc2_jax.evaluate import compare as comparing
    from bc2_jax.evaluate.records import write_json

    a, b = args.compare
    differences, left_out = comparing.compare(a, b, args.letter)
    comparing.print_differences(console, differences, left_out, str(a), str(b))
    if args.out is not None:
        tasks = comparing.as_json(differences)
        write_json(args.out / "compare.json", {"a": str(a), "b": str(b), "tasks": tasks, "left_out": left_out})
        console.print(f"written to {here(args.out / 'compare.json')}")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    check(args, parser)
    if args.list:
        list_tasks(make_console())
        return
    choose_cpu_without_tpu()
    if args.compare:
        compare(args, make_console())
        return
    import jax

    from bc2_jax.agreement import require_agreement
    from bc2_jax.evaluate.devices import devices_of, start_devices

    start_devices(devices_of(args))
    # Paths may differ where hosts mount a file system at different places; what the files hold is compared later.
    apart = ("distributed", "model", "adapter", "data_dir", "include_path", "out")
    require_agreement({f"--{name}": str(value) for name, value in vars(args).items() if not name.startswith(apart)})
    console = make_console(quiet=jax.process_index() != 0)
    path, checkpoints = Path(args.model), None
    if args.checkpoints is not None:
        from bc2_jax.evaluate.curve import choose_checkpoints

        checkpoints = [milestone.path for milestone in choose_checkpoints(path, args.checkpoints)]
        path = checkpoints[0]
    if args.lm_eval:
        ask_lm_eval(args, console, path)
    else:
        evaluate(args, console, path, checkpoints)


def leave(code: int) -> int:
    """Of several processes, ends this one without waiting for the others."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        from bc2_jax.train import distributed

        distributed.leave(code, HINT)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    use_utf8()
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        run(args, parser)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return leave(1)
    except KeyboardInterrupt:
        print(f"\ninterrupted: {HINT}.", file=sys.stderr)
        return leave(130)
    except Exception:  # of any kind: other processes must not wait for this one
        traceback.print_exc()
        return leave(1)
    return 0
