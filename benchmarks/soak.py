"""A training run that is killed, stopped, terminated and damaged at random, beside the same run without interruption.

python benchmarks/soak.py [--kills 200] [--seed 0] [--elastic] [--folder KEPT]

A tiny model, real processes on this machine, a checkpoint every few steps. Each start suffers one fault at a random
moment: SIGKILL to one process or to all, SIGTERM, or SIGSTOP; between starts checkpoints are damaged, but never the
last valid one. The run is started again with --resume auto until it had --kills kills and is complete. Final
parameters, optimizer state, and the loss and rows of every step must be bit-identical to the uninterrupted run.
--elastic changes the number of processes and the mesh at each start; then losses must agree within 1e-4, and rows
exactly.

Prints the injected faults, how many the run survived (a later start resumed from the newest valid checkpoint) and how
many it detected. Damage: the log names it. Kill and stop: the other processes exit by themselves, with codes after
which tools/supervise.sh starts them again. Terminate: the step is saved and the exit code is 75, possible only once
all processes have joined. The exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import os
import random
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # to be run as a file

from bc2_jax.tokenizer import train_tokenizer
from tests.faults import harness
from tests.faults.injection import DAMAGES, KINDS, Damage, Fault, Record, Start, differences, run
from tests.packed_rows import pack_texts

STEPS_PER_KILL = SAVE_EVERY = 3
ROWS, LENGTH = 12, 32  # rows a batch and tokens a row of harness.CONFIG
# For each phase how often a fault is drawn for it, and up to how many seconds after its beginning.
MOMENTS = {
    "start": (4, 1.5), "join": (4, 0.5), "verify": (8, 1.0), "restore": (12, 0.3), "compile": (8, 2.0),
    "read": (15, 0.1), "step": (15, 0.1), "save": (10, 0.05), "write": (10, 0.1), "seal": (10, 0.03),
    "rename": (8, 0.003), "end": (0, 0.3),
}  # fmt: skip
# Processes, devices of each, arguments.
LAYOUTS = ((2, 2, ()), (1, 4, ()), (4, 1, ("--mesh.tensor=2",)), (3, 1, ("--mesh.data=3",)), (2, 1, ()))


def prepare(folder: Path, num_steps: int) -> Path:
    """The config file of a tiny run, which reads less than there is."""
    words = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text(encoding="utf-8").split()
    words = [word for word in words if len(word) <= 16]  # no row is one word
    tokenizer = train_tokenizer([" ".join(words)], folder / "tokenizer.model", 640)
    rng = random.Random(0)
    documents = (" ".join(rng.choices(words, k=rng.randint(5, 30))) for _ in range(num_steps * ROWS))
    pack_texts(documents, tokenizer, folder / "rows", LENGTH, validation_fraction=0.01)
    return harness.write_config(folder, folder / "rows", tokenizer.path)


def draw(rng: random.Random, kills: int, num_steps: int, layouts: tuple, record: Record, good: list[int]) -> Start:
    """The next start. Faults come later and later in the run, so that the last ones find it at its end."""
    processes, devices, args = rng.choice(layouts)
    damages = tuple(Damage(rng.choice(DAMAGES), rng.randrange(1 << 30)) for _ in range(rng.choice((0, 0, 0, 0, 1, 2))))
    if record.kills >= kills:
        return Start(processes, devices, args, damages=damages)
    weights = {phase: weight for phase, (weight, _) in MOMENTS.items()}
    if not good:
        weights["restore"] = 0
    if good and good[-1] == num_steps:  # nothing is left to train
        weights = {phase: weights[phase] for phase in harness.START_PHASES} | {"end": 20}
    elif record.kills >= kills - 3:
        weights["end"] = 100
    (kind,) = rng.choices(KINDS, (60, 25, 8, 7))
    (phase,) = rng.choices(list(weights), list(weights.values()))
    if kind == "stop" and phase not in ("read", "step", "save", "write"):
        kind = "kill"  # not watched there; see distributed.Watchdog
    step = int(num_steps * (record.kills + rng.random()) / kills)
    fault = Fault(kind, rng.randrange(processes), phase, step, rng.uniform(0, MOMENTS[phase][1]))
    return Start(processes, devices, args, fault, damages)


def table(record: Record) -> str:
    """Faults by kind and phase."""
    lines = ["| fault | while | injected | survived | detected |", "|---|---|---|---|---|"]
    for kind, phase in itertools.product((*KINDS, *DAMAGES), (*harness.PHASES, "between starts", "all")):
        if not (events := [event for event in record.events if event.kind == kind and phase in (event.phase, "all")]):
            continue
        asked = [event.is_detected for event in events if event.is_detected is not None]
        detected = f"{sum(asked)} of {len(asked)}" if asked else ""
        lines.append(f"| {kind} | {phase} | {len(events)} | {sum(e.is_survived for e in events)} | {detected} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs; the other faults come on top (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule (default 0)")
    parser.add_argument("--processes", type=int, default=2, help="of each start (default 2)")
    parser.add_argument("--devices", type=int, default=2, help="of each process (default 2)")
    parser.add_argument(
        "--elastic", action="store_true", help="other processes and meshes at each start, whatever the two above"
    )
    parser.add_argument("--step-seconds", type=float, default=0.05, help="least time of a step (default 0.05)")
    parser.add_argument("--folder", type=Path, help="an empty folder for both runs and their logs, which then stay")
    args = parser.parse_args()
    for name in ("kills", "processes", "devices"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} = {getattr(args, name)} is not valid: it must be at least 1.")
    if not args.step_seconds >= 0:
        parser.error(f"--step-seconds = {args.step_seconds} is not valid: it must be at least 0.")
    if ROWS % (args.processes * args.devices):
        parser.error(f"--processes * --devices = {args.processes * args.devices} is not valid: it must divide {ROWS}.")
    if args.folder is not None and args.folder.exists() and any(args.folder.iterdir()):
        parser.error(f"--folder = '{args.folder}' is not valid: it must be empty or not exist.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        sys.exit(soak(folder, args))


def soak(folder: Path, args: argparse.Namespace) -> int:
    """Both runs; the exit code."""
    begin, num_steps = time.time(), STEPS_PER_KILL * args.kills
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
    layouts = LAYOUTS if args.elastic else ((args.processes, args.devices, ()),)
    config = prepare(folder, num_steps)
    run_args = (
        f"--num-steps={num_steps}", f"--optimizer.decay-steps={num_steps}", f"--checkpoint.save-every={SAVE_EVERY}",
        "--checkpoint.keep-last=3", "--distributed.start-timeout=12", "--distributed.heartbeat-timeout=10",
        f"--distributed.step-timeout={20 if args.elastic else 10}",
    )  # fmt: skip
    (folder / "whole").mkdir()
    (folder / "faulty").mkdir()
    whole = harness.launch(
        config, folder / "whole/run", *run_args, *layouts[0][2], processes=layouts[0][0], devices=layouts[0][1]
    )
    if any(whole.wait(3600)):
        print(f"The run without faults failed.\n{whole.text()}")
        return 1
    expected = harness.rows_read(whole.workdir)
    distinct = {row for rows in expected.values() for row in rows}
    print(f"without faults: {num_steps} steps, {len(distinct)} different rows, {time.time() - begin:.0f} s", flush=True)
    rng, shown = random.Random(args.seed), [0, 0]

    def next_start(record: Record, good: list[int]) -> Start:
        for event in record.events[shown[0] :]:
            print(f"{time.time() - begin:6.0f} s  start {record.starts}  {event}", flush=True)
        for problem in record.problems[shown[1] :]:
            print(f"NOT AS PROMISED: {problem}", flush=True)
        shown[:] = len(record.events), len(record.problems)
        return draw(rng, args.kills, num_steps, layouts, record, good)

    record = run(config, folder / "faulty/run", run_args, next_start, step_seconds=args.step_seconds)
    problems = list(record.problems)
    if len(distinct) != num_steps * ROWS:
        problems.append(f"{num_steps * ROWS - len(distinct)} rows of the run without faults come twice")
    if record.last is None or any(process.returncode for process in record.last.processes):
        problems.append("the run did not come to its end")
    else:
        problems += differences(config, num_steps, record.last, whole, rtol=1e-4 if args.elastic else 0)
    problems += [f"not survived: {event}" for event in record.events if not event.is_survived]
    problems += [f"not detected: {e}" for e in record.events if e.kind != "terminate" and e.is_detected is False]
    print(table(record))
    by_processes = collections.Counter(event.processes for event in record.events)
    print(f"starts {record.starts}, of which {record.unprovoked} ended before their fault came")
    print(f"faults by number of processes {dict(by_processes)}")
    print(f"exit codes {dict(record.exit_codes.most_common())}; steps trained again {record.steps_again}")
    print(f"{num_steps} steps, {time.time() - begin:.0f} s, seed {args.seed}")
    summary = {"events": [dataclasses.asdict(event) for event in record.events], "problems": problems}
    (folder / "soak.json").write_text(json.dumps(summary, indent=1))
    for problem in problems:
        print(f"NOT AS PROMISED: {problem.splitlines()[0]}")  # all of it was printed when it came
    print(
        "not as promised" if problems else "identical to the run without faults" if not args.elastic else "as promised"
    )
    return bool(problems)


if __name__ == "__main__":
    main()
